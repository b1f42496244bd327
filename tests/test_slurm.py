"""What SLURM's tasks run, by the variables that SLURM gives them; and the batch files, by bash, with
stand-ins of SLURM's commands that only write down what they are told. tests/slurm has real ones."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from launch import slurm
from lte import config
from lte.server import folder
from lte.transport import keys, posted

ROOT = Path(__file__).parent.parent
RECIPE = "configs/quickstart.yaml"
FILES = ("train", "hetjob", "elastic")

JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_SUBMIT_DIR": str(ROOT)}
THIRD_TASK = {
    **JOB,
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
    "SLURMD_NODENAME": "node2",
}
OF_AN_ARRAY = {
    "SLURM_JOB_ID": "9",
    "SLURM_ARRAY_JOB_ID": "8",
    "SLURM_ARRAY_TASK_ID": "5",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


class Executed(Exception):
    """Stands for the command that takes this process's place."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.command, self.environment = command, environment


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def execve(path: str, words: list[str], environment: dict[str, str]) -> None:
        assert words[:3] == [path, "-m", "lte"]
        raise Executed(words[3:], environment)

    monkeypatch.setattr("os.execve", execve)
    return tmp_path / "run"


def executed(run: Path, environment: Mapping[str, str], role: str, *more: str) -> Executed:
    with pytest.raises(Executed) as caught:
        slurm.main([role, *words(run, *more)], environment)
    return caught.value


def words(run: Path, *more: str) -> list[str]:
    return [RECIPE, f"run.dir={run}", *more]


def following(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_a_run_gets_its_keys_once_and_only_its_owner_may_read_them(run: Path) -> None:
    assert slurm.main(["keys", "--number", "6", *words(run)], JOB) == 0
    allowed = keys.AllowList(run / "keys" / "allow", print)
    for k in range(6):
        assert allowed.worker_id(keys.load_secret(run / "keys" / f"w{k}.secret").public) == f"w{k}"
    assert stat.S_IMODE((run / "keys").stat().st_mode) == 0o700
    before = (run / "keys" / "server.secret").read_text()
    assert slurm.main(["keys", *words(run)], JOB) == 0
    assert (run / "keys" / "server.secret").read_text() == before
    assert [path.name for path in run.iterdir()] == ["keys"]


def test_keys_stay_when_an_earlier_run_is_moved_aside(run: Path) -> None:
    """The job's workers hold some of them already."""
    slurm.main(["keys", *words(run)], JOB)
    (run / "metrics.jsonl").touch()
    recipe = config.load(RECIPE, [*words(run)[1:], "run.resume=never"])
    with folder.claim(run, recipe, take_over=False):
        assert (run / "keys" / "w0.secret").exists()
        assert not (run / "metrics.jsonl").exists()


def test_there_are_keys_for_all_of_the_recipes_workers(run: Path) -> None:
    assert slurm.main(["keys", "--number", "1", *words(run)], JOB) == 0
    assert len([*(run / "keys").glob("w*.secret")]) == 4


@pytest.mark.parametrize(
    "setting",
    ["server.insecure=true", "server.address=ipc:///tmp/socket", "server.address=tcp://127.0.0.1:5"],
)
def test_who_says_otherwise_is_obeyed(run: Path, setting: str) -> None:
    command = executed(run, JOB, "server", setting).command
    assert command[:4] == ["server", *words(run, setting)]
    with_keys = setting.startswith("server.address=tcp")
    assert any(word.startswith("server.key=") for word in command) == with_keys
    assert slurm.main(["keys", *words(run, setting)], JOB) == 0
    assert run.exists() == with_keys


def test_the_server_is_reached_from_other_nodes_and_has_keys(run: Path) -> None:
    command = executed(run, JOB, "server").command
    slurm.main(["keys", *words(run)], JOB)
    recipe = config.load(command[1], command[2:])
    assert recipe.server.address == "tcp://*:*"
    keys.load_secret(str(recipe.server.key))
    keys.AllowList(str(recipe.server.allow), print)


def test_an_address_that_the_recipe_says_is_kept(run: Path, tmp_path: Path) -> None:
    """Of a port that the nodes' firewalls let through, say."""
    path = tmp_path / "recipe.yaml"
    path.write_text("server:\n  address: tcp://*:7000\n")
    with pytest.raises(Executed) as caught:
        slurm.main(["server", str(path), f"run.dir={run}"], JOB)
    assert not any(word.startswith("server.address") for word in caught.value.command)


def test_a_job_that_was_started_again_takes_over_and_goes_on(run: Path) -> None:
    first = executed(run, JOB, "server", "run.resume=never").command
    again = executed(run, {**JOB, "SLURM_RESTART_COUNT": "1"}, "server", "run.resume=never").command
    assert "--take-over" not in first and config.load(first[1], first[2:]).run.resume == "never"
    again.remove("--take-over")
    assert config.load(again[1], again[2:]).run.resume == "auto"


def test_a_task_is_a_worker_of_a_name_with_its_key_and_state(run: Path) -> None:
    slurm.main(["keys", *words(run)], JOB)
    command = executed(run, THIRD_TASK, "worker").command
    assert following(command, "--id") == "w2"
    assert following(command, "--state") == str(run / "workers" / "w2")
    assert following(command, "--server") == f"file://{run / posted.NAME}"
    assert keys.load_secret(following(command, "--key"))
    assert keys.load_public(following(command, "--server-key"))


def test_a_task_of_an_array_is_the_worker_that_its_file_says(run: Path) -> None:
    slurm.main(["keys", "--number", "6", *words(run)], JOB)
    assert following(executed(run, OF_AN_ARRAY, "worker", "--first", "5").command, "--id") == "w5"


@pytest.mark.parametrize(
    ("visible", "seen"),
    [("0,1", "1"), ("0,1,2,3", "1"), ("GPU-a,GPU-b", "GPU-b"), ("0", "0"), ("3", "3"), ("", None)],
)
def test_a_task_sees_a_gpu_of_its_own(run: Path, visible: str, seen: str | None) -> None:
    """All of its node's are in the variable, or, with --gpus-per-task, its own alone."""
    slurm.main(["keys", *words(run)], JOB)
    environment = {**THIRD_TASK, **({"CUDA_VISIBLE_DEVICES": visible} if visible else {})}
    assert executed(run, environment, "worker").environment.get("CUDA_VISIBLE_DEVICES") == seen


def test_more_tasks_than_gpus_share_them(run: Path) -> None:
    environment = {**THIRD_TASK, "SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "4,5"}
    assert slurm.own_gpus(environment, 1) == {"CUDA_VISIBLE_DEVICES": "5"}


@pytest.mark.parametrize(
    ("visible", "seen"), [("0,1,2,3", "2,3"), ("4,5", "4,5"), ("0,1,2", "2,0")], ids=["all", "own", "shared"]
)
def test_a_task_of_two_processes_sees_two_gpus(visible: str, seen: str) -> None:
    environment = {**THIRD_TASK, "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": visible}
    assert slurm.own_gpus(environment, 2) == {"CUDA_VISIBLE_DEVICES": seen}


@pytest.mark.parametrize(
    ("environment", "more", "line"),
    [
        (THIRD_TASK, ["train.workers=8"], "train.workers: 8, but this job has 4 tasks"),
        (THIRD_TASK, ["train.wokers=4"], "train.wokers"),
        (OF_AN_ARRAY, ["--first", "5"], "no such key"),
        (
            OF_AN_ARRAY,
            ["--first", "3"],
            "worker w3 is the server's job's own; further ones are",
        ),
    ],
)
def test_mistakes_are_one_line(
    run: Path,
    environment: Mapping[str, str],
    more: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slurm.main(["keys", *words(run)], JOB)
    assert slurm.main(["worker", *words(run, *more)], environment) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said


def test_a_worker_of_a_finished_run_has_nothing_to_do(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of an array, say, that was queued for longer than the run took."""
    monkeypatch.setattr("lte.server.folder.is_complete", lambda recipe: True)
    assert slurm.main(["worker", "--first", "5", *words(run)], OF_AN_ARRAY) == 0
    assert "finished already" in capsys.readouterr().out


# The batch files

STAYS = "trap 'say left; exit 138' USR1; say came; exec 3<>$NEVER; until read -r -t 1 -u 3; do :; done"
"""What a stand-in does that saves and leaves when it is told to. A signal between two commands is seen after
the second: none may take for ever."""


def once(other: str, act: str) -> str:
    """What a stand-in does that acts when the other one has come: bash forgets a signal that comes to a
    process which it has forked and that is nothing of its own yet."""
    return f"exec 3<>$NEVER; until grep -q '^{other} came' $SAID; do read -r -t 0.02 -u 3 || :; done; {act}"


STAND_INS = {
    "python": """
        say() { echo "$role $1" >>"$SAID"; }
        role=$3
        say "was given ${*:4}"
        case $role in server) eval "$SERVER" ;; worker) eval "$WORKER" ;; esac
        """,
    "srun": """
        while [[ $1 == --* ]]; do
          if [ "$1" = --wait=0 ]; then waits=yes; fi
          shift
        done
        : "${waits:?many sites have WaitTime=30: one task that ends would end all}"
        exec "$@"
        """,
    "squeue": """
        echo "squeue $*" >>"$SAID"
        if [ "$(grep -c ^squeue "$SAID")" -le "$UNANSWERED" ]; then
          echo "slurm_load_jobs error: $NO_ANSWER" >&2
          exit 1
        fi
        printf '%-20s%-20s\\n' $STATE
        """,
    "scontrol": """
        echo "scontrol $*" >>"$SAID"
        """,
    "sleep": """
        echo "slept $*" >>"$SAID"
        """,
}


class Job:
    """A batch file that runs, among stand-ins of SLURM's commands and of lte."""

    def __init__(self, folder: Path, name: str, environment: Mapping[str, str]) -> None:
        self._said, commands = folder / "said", folder / "bin"
        self._said.touch()
        os.mkfifo(folder / "never")
        commands.mkdir()
        for command, text in STAND_INS.items():
            (commands / command).write_text(f"#!/usr/bin/env bash\n{textwrap.dedent(text)}")
            (commands / command).chmod(0o755)
        given = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "LTE_PYTHON": str(commands / "python"),
            "SAID": str(self._said),
            "NEVER": str(folder / "never"),
            "STATE": "RUNNING 0",
            "UNANSWERED": "0",
            "NO_ANSWER": "Socket timed out on send/recv operation",
            **JOB,
            **environment,
        }
        command = ["bash", str(ROOT / "slurm" / f"{name}.sbatch"), "recipe.yaml", "train.rounds=3"]
        self.process = subprocess.Popen(command, env=given, start_new_session=True)

    def said(self) -> list[str]:
        return self._said.read_text().splitlines()

    def until_said(self, *lines: str) -> None:
        deadline_s = time.monotonic() + 60
        while not {*lines} <= {*self.said()}:
            assert self.process.poll() is None and time.monotonic() < deadline_s, self.said()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.01)

    def ended(self) -> int:
        return self.process.wait(60)

    def close(self) -> None:
        """See that it left nobody behind."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail("somebody was left behind")


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def submit(name: str, **environment: str) -> Job:
        jobs.append(Job(tmp_path, name, environment))
        return jobs[-1]

    yield submit
    for job in jobs:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()
        else:
            job.close()


REQUEUED = "scontrol requeue 7"


@pytest.mark.parametrize("name", ["train", "hetjob"])
def test_a_run_that_is_finished_ends_its_job(submit: Callable[..., Job], name: str) -> None:
    job = submit(name, SERVER="exit 0", WORKER="exit 0", MOST_WORKERS="9")
    assert job.ended() == 0
    assert sorted(job.said()) == [
        "keys was given --number 9 recipe.yaml train.rounds=3",
        "server was given recipe.yaml train.rounds=3",
        "worker was given recipe.yaml train.rounds=3",
    ]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("name", ["train", "hetjob"])
def test_who_is_warned_has_the_server_leave_then_the_workers_and_comes_again(
    submit: Callable[..., Job], name: str, number: int
) -> None:
    job = submit(name, SERVER=STAYS, WORKER=STAYS)
    job.until_said("server came", "worker came")
    job.process.send_signal(number)
    assert job.ended() == 138
    done = [line for line in job.said() if not line.startswith("squeue")]
    assert done[-3:] == ["server left", "worker left", REQUEUED]


@pytest.mark.parametrize("code", [138, 143])
def test_workers_that_slurm_ended_come_again_with_their_server(submit: Callable[..., Job], code: int) -> None:
    """A preemption signals the tasks alone."""
    job = submit("train", SERVER=STAYS, WORKER=once("server", f"exit {code}"))
    assert job.ended() == code
    assert job.said()[-1] == REQUEUED


def test_a_controller_that_does_not_answer_is_asked_again(submit: Callable[..., Job]) -> None:
    """Both before the workers are told and before the job is queued again."""
    job = submit("train", SERVER=STAYS, WORKER=STAYS, UNANSWERED="3")
    job.until_said("server came", "worker came")
    job.process.send_signal(signal.SIGUSR1)
    assert job.ended() == 138
    assert "worker left" in job.said()
    assert job.said().count("slept 2") == 3
    assert job.said()[-1] == REQUEUED


@pytest.mark.parametrize(("answer", "asked"), [("Invalid job id specified", 1), ("Connection refused", 6)])
def test_a_job_that_slurm_does_not_know_is_left(submit: Callable[..., Job], answer: str, asked: int) -> None:
    job = submit(
        "train", SERVER=STAYS, WORKER=once("server", "exit 143"), UNANSWERED="1000", NO_ANSWER=answer
    )
    assert job.ended() == 143
    said = [line.split()[0] for line in job.said()]
    assert (said.count("squeue"), said.count("scontrol")) == (asked, 0)


@pytest.mark.parametrize("state", ["COMPLETING 0", "CANCELLED 0", "RUNNING 1", "PENDING 1", ""])
def test_what_is_decided_already_stays_so(submit: Callable[..., Job], state: str) -> None:
    """By who cancelled the job; or by SLURM, which runs it elsewhere, and this is its ghost."""
    job = submit("train", SERVER=STAYS, WORKER=once("server", "exit 143"), STATE=state)
    assert job.ended() == 143
    assert job.said()[-1].startswith("squeue")


def test_a_ghost_whose_server_was_fenced_signals_no_worker(submit: Callable[..., Job]) -> None:
    """Its srun would signal the new ones, which are steps of the same numbers."""
    job = submit("train", SERVER=once("worker", "exit 1"), WORKER=STAYS, STATE="RUNNING 1")
    assert job.ended() == 1
    assert "worker left" not in job.said()


@pytest.mark.parametrize(
    ("server", "worker", "code"),
    [
        (STAYS, once("server", "exit 2"), 2),
        (once("worker", "exit 2"), STAYS, 2),
        (STAYS, once("server", "exit 3"), 3),
        ("exit 1", "exit 0", 1),
    ],
    ids=["worker", "server", "worker whose run ended", "both"],
)
def test_a_failure_ends_all_and_is_not_repeated(
    submit: Callable[..., Job], server: str, worker: str, code: int
) -> None:
    job = submit("train", SERVER=server, WORKER=worker)
    assert job.ended() == code
    assert not [line for line in job.said() if line.startswith("scontrol")]


def test_an_element_of_an_array_is_queued_again_alone(submit: Callable[..., Job]) -> None:
    job = submit("elastic", WORKER=STAYS, **OF_AN_ARRAY)
    job.until_said("worker came")
    job.process.send_signal(signal.SIGUSR1)
    assert job.ended() == 138
    assert job.said()[0] == "worker was given --first 5 recipe.yaml train.rounds=3"
    assert job.said()[-2:] == [
        "squeue --noheader --jobs=8_5 --Format=State,RestartCnt",
        "scontrol requeue 8_5",
    ]


@pytest.mark.parametrize("code", [0, 2, 3])
def test_an_element_whose_run_is_over_ends(submit: Callable[..., Job], code: int) -> None:
    job = submit("elastic", WORKER=f"exit {code}", **OF_AN_ARRAY)
    assert job.ended() == code
    assert len(job.said()) == 1


@pytest.mark.parametrize("name", FILES)
def test_a_batch_file_says_what_it_needs(name: str) -> None:
    done = subprocess.run(
        ["bash", ROOT / "slurm" / f"{name}.sbatch"],
        env={"PATH": os.environ["PATH"], **OF_AN_ARRAY, **JOB},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "no recipe was given" in done.stderr
