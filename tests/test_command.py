"""The `lte` command as its users meet it: in real processes, over real sockets, with real mistakes."""

from __future__ import annotations

import errno
import faulthandler
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import yaml
from processes import DEADLINE_S, Command, Family, done, lines, saved_versions, versions

from launch import local
from lte import config, durable, recipes, signals, transport, wire
from lte.cli import main
from lte.errors import RunEnded
from lte.server.folder import LOCKS
from lte.server.master import Master
from lte.track import METRICS

ENDS_WITHIN_S = 25.0
"""How long Ctrl-C may take: less than the 30 s after which launchers kill who has not ended."""


# The recipe, the data, and ways to run `lte`


def tree(**settings: Any) -> dict[str, Any]:
    """A recipe as small as can be, changed by settings such as `lora__rank=4`."""
    small: dict[str, Any] = {
        "run": {"dir": "run", "seed": 3},
        "model": {
            "num_layers": 1,
            "width": 32,
            "num_attention_heads": 2,
            "mlp_width": 64,
            "context_tokens": 16,
        },
        "data": {"shards": "data"},
        "train": {"rounds": 6, "local_steps": 3, "workers": 2, "batch_size": 4},
        "lora": {"rank": 4, "merge": "reset-b"},
        "base": {"quant": "nf4"},
        "schedule": {"warmup_steps": 3},
        "server": {"address": "tcp://127.0.0.1:*", "checkpoint_every": 2},
        "eval": {"every": 2, "sample_tokens": 20},
    }
    for key, value in settings.items():
        section, name = key.split("__")
        small.setdefault(section, {})[name] = value
    return small


MANY = 40
LONG = {  # rounds enough that whoever watches comes in time, and quick ones
    "train__rounds": MANY,
    "train__local_steps": 1,
    "base__quant": "none",
    "server__checkpoint_every": 1000,
    "eval__every": 0,
    "eval__sample_tokens": 0,
}


def write_recipe(folder: Path, name: str = "recipe.yaml", **settings: Any) -> Path:
    (folder / name).write_text(yaml.safe_dump(tree(**settings)))
    return folder / name


def write_text(path: Path) -> Path:
    """About 8 kB of words."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "lazy",
        "dogs",
        "while",
        "wizards",
        "brew",
        "ale",
    ]
    generator = random.Random(0)
    path.write_text("\n".join(" ".join(generator.choices(words, k=8)) for _ in range(200)))
    return path


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Lte = Callable[..., Outcome]
Heard = TypeVar("Heard", bound=wire.Message)


@pytest.fixture
def lte(capfd: pytest.CaptureFixture[str]) -> Lte:
    """The command in this process: `lte("train", recipe)`. Signals are handled as before afterwards."""

    def run(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        before = [signal.getsignal(number) for number in signals.ENDINGS]
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        assert [signal.getsignal(number) for number in signals.ENDINGS] == before
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    text = write_text(folder / "text.txt")
    assert main(["data", "pack", str(text), "--out", str(folder / "data"), "--shards", "4"]) == 0
    return folder / "data"


@pytest.fixture
def folder(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user stands: a folder that holds `data`."""
    (tmp_path / "data").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def family(folder: Path) -> Iterator[Family]:
    family = Family(folder)
    yield family
    family.close()


class Trained(NamedTuple):
    run: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Trained:
    """`lte train`: a server process and two worker processes over zmq. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").symlink_to(data)
    family = Family(folder)
    command = family.start("train", write_recipe(folder))
    try:
        assert command.ended() == 0, command.err
    finally:
        family.close()
    return Trained(folder / "run", command.out, command.err)


@pytest.fixture
def copied(trained: Trained, folder: Path) -> Path:
    """The trained run, to be changed."""
    shutil.copytree(trained.run, folder / "run")
    return folder / "run"


def digest_in_threads(folder: Path, **settings: Any) -> str:
    """Train in this process; returns the digest of the master."""
    recipe = config.from_dict(tree(server__address="inprocess://x", **settings))
    shutil.rmtree(folder / recipe.run.dir, ignore_errors=True)
    assert local.train_in_threads(recipe) == 0
    return str(done(folder / recipe.run.dir)["master_digest"])


# The same arithmetic everywhere


def test_threads_and_processes_reach_the_same_master(lte: Lte, folder: Path, trained: Trained) -> None:
    recipe = write_recipe(folder, server__address="inprocess://x")
    for run in ("once", "twice"):
        assert lte("train", recipe, f"run.dir={run}").code == 0
        assert done(folder / run)["master_digest"] == done(trained.run)["master_digest"]
        for mine, theirs in zip(lines(folder / run, "round"), lines(trained.run, "round"), strict=True):
            assert mine["train_loss"] == theirs["train_loss"]
    other = digest_in_threads(folder, run__seed=4)
    assert other != done(trained.run)["master_digest"]

    for way in ("uplink", "downlink"):  # the same messages, but for heartbeats
        kinds = ("factors", "dense") if way == "uplink" else ("codes", "scales", "dense")
        for key in (f"{way}_{kind}_bytes" for kind in kinds):
            mine, theirs = (
                [line[key] for line in lines(run, "round")] for run in (folder / "once", trained.run)
            )
            assert mine == theirs
        total = sum(line[f"{way}_bytes"] for line in lines(trained.run, "round"))
        assert done(trained.run)[f"{way}_bytes"] == total


def test_every_merge_mode_repeats_itself_and_differs_from_the_others(folder: Path) -> None:
    modes = [("reset-less", "trained"), ("reset-less", "frozen"), ("reset", "trained")]
    modes += [("reset-b", A) for A in ("trained", "frozen", "rotating")]
    digests = dict[tuple[str, str], str]()
    for merge, A in modes:
        settings = {"lora__merge": merge, "lora__A": A, "lora__heads": 2, "train__rounds": 3}
        one, other = (digest_in_threads(folder, **settings, eval__every=0) for _ in range(2))
        assert one == other, f"{merge}, A {A}"
        digests[merge, A] = one
    # With a frozen A, B - B' is all that reset-less trains: what reset-b does, up to rounding.
    del digests["reset-less", "frozen"]
    assert len({*digests.values()}) == len(digests)


def test_server_and_workers_started_by_hand_do_as_lte_train_does(
    lte: Lte, folder: Path, family: Family, trained: Trained
) -> None:
    """... although meanwhile others knock at the server's door who should not."""
    recipe = write_recipe(folder)
    server = family.start("server", recipe)
    address = server.until_said(r"lte worker --server (tcp://127\.0\.0\.1:\d+)").group(1)

    other = write_recipe(folder, "other.yaml", model__width=64)
    stranger = lte("worker", "--server", address, other)
    assert stranger.code == 2
    assert is_one_line(stranger.err, "the server refused this worker: it trains another model", "64")

    second = lte("server", recipe)
    assert second.code == 2
    assert is_one_line(second.err, "run: in use by another server; choose another run.dir")

    same_port = lte("server", recipe, "run.dir=elsewhere", f"server.address={address}")
    assert same_port.code == 2
    assert is_one_line(same_port.err, address, "the port is in use", "server.address=tcp://127.0.0.1:*")

    workers = [family.start("worker", "--server", address) for _ in range(2)]
    workers[0].until_said("joined")
    assert [worker.ended() for worker in workers] == [0, 0]
    assert server.ended() == 0
    assert {line for worker in workers for line in worker.out.splitlines()} == {
        f"w{slot} {what}"
        for slot in (0, 1)
        for what in (f"joined {address} at version 0", "finished at version 6")
    }
    assert server.err == ""
    assert [line["message"] for line in lines(folder / "run", "event") if line["what"] == "refused"]
    assert done(folder / "run")["master_digest"] == done(trained.run)["master_digest"]


def test_settings_can_be_read_while_a_server_starts_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By workers that start beside it, and compare them with their own."""
    recipe = config.from_dict(tree(server__address="inprocess://x"))
    with recipes.make_server(recipe, display=False):
        written = (folder / "run" / "config.yaml").read_text()
    replaced, found = durable.name, list[str]()

    def look(partial: Path, final: Path) -> None:
        if final.name == "config.yaml":
            found.extend((final.read_text(), partial.read_text()))
        replaced(partial, final)

    monkeypatch.setattr(durable, "name", look)
    with recipes.make_server(recipe, display=False):
        assert found == [written, written]


def test_a_file_system_without_locks_is_said(lte: Lte, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    outcome = lte("train", write_recipe(folder, server__address="inprocess://x"))
    assert outcome.code == 2
    assert is_one_line(outcome.err, "run/lock: cannot be locked (Function not implemented)", "-o flock")


# Records


def test_the_run_folder_holds_what_the_design_promises(trained: Trained) -> None:
    run, rounds = trained.run, lines(trained.run, "round")
    for name in ("config.yaml", METRICS, "checkpoints", "logs", "loss.png", "sample.txt"):
        assert (run / name).exists(), name
    written = config.load(run / "config.yaml")
    assert written == config.load(run.parent / "recipe.yaml")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert saved_versions(run) == [4, 6]

    assert versions(run) == [1, 2, 3, 4, 5, 6]
    for version, line in enumerate(rounds, start=1):
        assert line.keys() >= {
            "kind",
            "version",
            "time_s",
            "tokens",
            "train_loss",
            "num_merged",
            "num_told",
            "uplink_bytes",
            "downlink_bytes",
            "merge_s",
            "wait_s",
            "lr",
        }
        assert line["tokens"] == version * 3 * 2 * 4 * 16  # local steps, workers, sequences, tokens each
        assert line["num_merged"] == 2
        assert min(line["uplink_bytes"], line["downlink_bytes"], line["merge_s"], line["wait_s"]) > 0
    times = [line["time_s"] for line in rounds]
    assert times == sorted(times)
    assert rounds[0]["lr"] == written.optimizer.lr > rounds[-1]["lr"]
    assert rounds[-1]["train_loss"] < rounds[0]["train_loss"] - 1

    evals = lines(run, "eval")
    assert [line["version"] for line in evals] == [2, 4, 6]
    assert [line["tokens"] for line in evals] == [rounds[version - 1]["tokens"] for version in (2, 4, 6)]
    assert [line["what"] for line in lines(run, "event")] == ["started", "joined", "joined"]
    last = done(run)
    assert last.keys() == {
        "kind",
        "rounds",
        "tokens",
        "workers",
        "num_parameters",
        "num_adapted_parameters",
        "uplink_bytes",
        "downlink_bytes",
        "loss",
        "loss_master",
        "master_digest",
        "version",
        "time_s",
    }
    assert (last["rounds"], last["tokens"], last["workers"]) == (6, 2304, 2)
    assert (last["loss"], last["loss_master"]) == (evals[-1]["loss"], evals[-1]["loss_master"])
    assert last["loss"] != last["loss_master"]
    assert last["num_adapted_parameters"] == 32 * (4 * 32 + 2 * 64 + 256)
    assert last["num_parameters"] > last["num_adapted_parameters"] + 256 * 32

    assert trained.err == ""
    assert "finished at round 6 of 6" in trained.out
    assert f"{last['loss']:.3f} published (nf4), {last['loss_master']:.3f} master" in trained.out
    sample = (run / "sample.txt").read_text(encoding="utf-8")
    assert sample.split()[0] in trained.out.split("The trained model writes:")[1]
    logs = [path.read_text().splitlines() for path in sorted((run / "logs").iterdir())]
    assert [[line.split()[1] for line in log] for log in logs] == [["joined", "finished"]] * 2


def test_eval_measures_what_the_run_recorded(lte: Lte, trained: Trained, folder: Path) -> None:
    last = done(trained.run)
    code, out, err = lte("eval", trained.run)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"published  version 6  validation loss {last['loss']:.4f} nats a token",
        f"master     version 6  validation loss {last['loss_master']:.4f} nats a token",
    ]
    few = lte("eval", trained.run, "--tokens", "64").out
    assert few != out
    (folder / "data").rename(folder / "moved")
    assert lte("eval", trained.run, "--data", folder / "moved").out == out


def test_generate_repeats_itself_by_seed(lte: Lte, trained: Trained, folder: Path) -> None:
    def text(*arguments: str) -> str:
        code, out, err = lte("generate", trained.run, "--prompt", "the ", "--tokens", "40", *arguments)
        assert (code, err) == (0, "")
        assert out.startswith("the ")
        return out

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    likeliest = text("--temperature", "0")
    assert likeliest == text("--temperature", "0", "--seed", "5")
    assert text("--tokens", "0") == "the \n"
    assert text("--weights", "master", "--temperature", "0").startswith("the ")


def test_bpe_from_packing_to_writing(lte: Lte, folder: Path) -> None:
    text = write_text(folder / "text.txt")
    packed = lte("data", "pack", text, "--out", "bpe", "--tokenizer", "bpe:300", "--shards", "2")
    assert packed.code == 0
    assert re.search(r"^bpe: [\d,]+ training and [\d,]+ validation tokens \(bpe:300\)$", packed.out, re.M)

    recipe = write_recipe(folder, server__address="inprocess://x", data__shards="bpe")
    too_small = lte("train", recipe)
    assert too_small.code == 2
    assert is_one_line(too_small.err, "model.vocab_size: 256 is less than the", "bpe")
    (cure,) = re.findall(r"set (model\.vocab_size=\d+)", too_small.err)
    assert lte("train", recipe, cure).code == 0
    assert done(folder / "run")["loss"] < lines(folder / "run", "eval")[0]["loss"]
    assert lte("generate", "run", "--prompt", "quick brown", "--tokens", "9").out.startswith("quick brown")


def test_wandb_offline_needs_no_key_and_no_network(
    lte: Lte, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    (folder / "home").mkdir()
    monkeypatch.setenv("HOME", str(folder / "home"))
    recipe = write_recipe(folder, server__address="inprocess://x", log__wandb="offline")
    code, _, err = lte("train", recipe, "train.rounds=1")
    import wandb

    wandb.teardown()
    assert (code, err) == (0, "")
    (recorded,) = (folder / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"round/uplink_bytes" in recorded.read_bytes()
    assert "wandb sync" in next(
        line["message"] for line in lines(folder / "run", "event") if line["what"] == "wandb"
    )


# Faults of machines: every wait is for a fact, and the families' fixture finds orphans and tracebacks


def start_long_run(family: Family, folder: Path, until: int = 3, **settings: Any) -> Command:
    """`lte train` that has merged some rounds and has many before it."""
    command = family.start("train", write_recipe(folder, **{**LONG, **settings}))
    command.until_round(folder / "run", until)
    return command


def finish(lte: Lte, folder: Path, rounds: int) -> None:
    """Go on with a run that was cut short, up to so many rounds: its records must be whole."""
    saved = saved_versions(folder / "run")[-1]
    arguments = (f"train.rounds={rounds}", "server.address=inprocess://x", "run.resume=must")
    assert lte("train", folder / "recipe.yaml", *arguments).code == 0
    assert_whole(folder / "run", rounds)
    assert lines(folder / "run", "event")[-1]["version"] == saved


def assert_whole(run: Path, rounds: int) -> None:
    """One line a version, whatever happened on the way; totals that are the lines' sums."""
    recorded = lines(run, "round")
    assert [line["version"] for line in recorded] == list(range(1, rounds + 1))
    tokens = [line["tokens"] for line in recorded]
    assert tokens == sorted(set(tokens))
    last = done(run)
    assert (last["rounds"], last["tokens"]) == (rounds, tokens[-1])
    assert last["uplink_bytes"] == sum(line["uplink_bytes"] for line in recorded)
    assert len(lines(run, "done")) == 1


def test_the_run_goes_on_without_a_worker_that_was_killed(family: Family, folder: Path) -> None:
    settings = {"server__silence_s": 5.0, "worker__heartbeat_s": 0.3}
    command = start_long_run(family, folder, **settings)
    family.kill(family.members("worker")[0])

    assert command.ended() == 0
    family.until_all_ended(ENDS_WITHIN_S)
    assert_whole(folder / "run", MANY)
    merged = [line["num_merged"] for line in lines(folder / "run", "round")]
    assert merged == [2] * merged.count(2) + [1] * merged.count(1)
    assert merged.count(1) > 0
    assert merged.count(2) >= 3
    (left,) = (line["message"] for line in lines(folder / "run", "event") if line["what"] == "left")
    assert re.fullmatch(r"w[01] is gone: no sign of life for \d s", left)
    assert is_one_line(command.err, "worker", "killed by SIGKILL", "run/logs/worker-")


def test_a_run_without_workers_saves_and_ends(lte: Lte, family: Family, folder: Path) -> None:
    command = start_long_run(family, folder)
    family.kill(*family.members("worker"))

    assert command.ended() == 1
    family.until_all_ended(ENDS_WITHIN_S)
    assert is_one_line(command.err, "workers 0, 1 ended: killed by SIGKILL; see run/logs")
    assert "The same command goes on from here." in command.out
    version = versions(folder / "run")[-1]
    assert saved_versions(folder / "run") == [0, version]
    finish(lte, folder, version + 2)


def test_workers_that_cannot_start_end_the_run_with_their_reason(family: Family, folder: Path) -> None:
    command = family.start("train", write_recipe(folder, **LONG), "worker.device=nonsense")
    assert command.ended() == 2
    family.until_all_ended(ENDS_WITHIN_S)
    assert is_one_line(command.err, "worker.device: 'nonsense' is not on this machine; use auto or cpu")


def test_nobody_outlives_a_launcher_that_was_killed(lte: Lte, family: Family, folder: Path) -> None:
    command = start_long_run(family, folder)
    family.kill(command.pid)

    family.until_all_ended(ENDS_WITHIN_S)
    version = versions(folder / "run")[-1]
    assert saved_versions(folder / "run") == [0, version]
    assert lines(folder / "run", "event")[-1]["message"] == "stopped by SIGTERM"
    finish(lte, folder, version + 2)


def test_a_killed_server_ends_the_run_and_loses_no_version(lte: Lte, family: Family, folder: Path) -> None:
    command = start_long_run(family, folder, server__checkpoint_every=5, until=12)
    family.kill(*family.members("server"))

    assert command.ended() == 1
    family.until_all_ended(ENDS_WITHIN_S)
    assert is_one_line(command.err, "the server was ended by SIGKILL", "goes on where it was")
    version = versions(folder / "run")[-1]
    arguments = (f"train.rounds={version + 3}", "server.address=inprocess://x", "run.resume=must")
    assert lte("train", folder / "recipe.yaml", *arguments).code == 0
    assert_whole(folder / "run", version + 3)
    started = [line["version"] for line in lines(folder / "run", "event") if line["what"] == "started"]
    assert started[-1] in (version, version + 1), "the last merge may have been in the journal alone"


# Ctrl-C


class Terminal:
    """A terminal of its own for a command: what it shows is kept, and keys can be pressed."""

    LOGIN = (sys.executable, "-c", "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])")

    def __init__(self, family: Family, *arguments: str | Path) -> None:
        self.shown = b""
        self._keys, screen = os.openpty()
        try:
            self.command = family.execute(*arguments, before=self.LOGIN, stdin=screen)
        finally:
            os.close(screen)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self.shown += os.read(self._keys, 65_536)
            except OSError:  # the last process that had it open has ended
                return

    def press_ctrl_c(self) -> None:
        os.write(self._keys, b"\x03")

    def close(self) -> str:
        """Wait until nobody has the terminal open; returns what was shown."""
        self._reader.join(ENDS_WITHIN_S)
        assert not self._reader.is_alive()
        os.close(self._keys)
        return self.shown.decode(errors="replace")


def test_ctrl_c_saves_and_the_same_command_goes_on(
    family: Family, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    recipe = write_recipe(folder, **LONG)
    terminal = Terminal(family, "train", recipe)
    terminal.command.until_round(folder / "run", 3)
    terminal.press_ctrl_c()

    assert terminal.command.ended(within_s=ENDS_WITHIN_S) == 130
    assert family.members() == []
    shown = terminal.close()
    assert "Traceback" not in shown
    assert "Saved in run. The same command goes on from here." in shown
    assert re.search(rf"run\S* round \d+/{MANY}", shown), "no live display"
    version = versions(folder / "run")[-1]
    assert 3 <= version < MANY
    assert saved_versions(folder / "run") == [0, version]
    assert lines(folder / "run", "event")[-1]["message"] == "stopped by SIGINT"

    again = family.start("train", recipe)
    assert again.ended() == 0
    assert (again.err, family.members()) == ("", [])
    assert_whole(folder / "run", MANY)
    started = [line["version"] for line in lines(folder / "run", "event") if line["what"] == "started"]
    assert started == [0, version]
    tokens = [line["tokens"] for line in lines(folder / "run", "round")]
    assert tokens == [version * 2 * 4 * 16 for version in range(1, MANY + 1)]


def test_sigterm_saves_and_ends_too(lte: Lte, family: Family, folder: Path) -> None:
    command = start_long_run(family, folder, train__workers=1)
    command.signal(signal.SIGTERM)

    assert command.ended(within_s=ENDS_WITHIN_S) == 143
    assert (command.err, family.members()) == ("", [])
    version = versions(folder / "run")[-1]
    assert saved_versions(folder / "run") == [0, version]
    finish(lte, folder, version + 2)


def test_a_preempted_run_goes_on_with_the_same_bits(family: Family, folder: Path) -> None:
    """SLURM's --signal=USR1@60, and its SIGTERM while everybody saves."""
    settings = {"train__rounds": 30, "train__local_steps": 10}
    undisturbed = digest_in_threads(folder, **LONG | settings, run__dir="calm")
    command = start_long_run(family, folder, **settings)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        command.signal(number)

    assert command.ended(within_s=ENDS_WITHIN_S) in (138, 143)  # whichever the kernel gave first
    assert (command.err, family.members()) == ("", [])
    assert versions(folder / "run")[-1] < 30
    again = family.start("train", folder / "recipe.yaml")
    assert again.ended() == 0
    assert_whole(folder / "run", 30)
    assert done(folder / "run")["master_digest"] == undisturbed
    assert not [line for line in lines(folder / "run", "event") if line["what"] in ("refused", "recalled")]


@pytest.mark.parametrize("number", signals.ENDINGS)
def test_a_worker_that_looks_for_its_server_leaves_at_once(
    lte: Lte, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(transport, "connect", lambda *_, **__: signal.raise_signal(number))
    outcome = lte("worker", "--server", "tcp://127.0.0.1:1")
    assert outcome == (128 + number, "", "lte: interrupted\n")


def test_a_second_ctrl_c_ends_at_once_even_if_the_server_hangs(family: Family, folder: Path) -> None:
    command = start_long_run(family, folder, train__workers=1)
    (server,) = family.members("server")
    os.kill(server, signal.SIGSTOP)
    command.until(lambda: is_stopped(server) or None, "stop of the server")
    command.signal(signal.SIGINT)
    command.until(lambda: is_pending(server, signal.SIGINT) or None, "SIGINT passed on to the server")
    command.signal(signal.SIGINT)

    assert command.ended(within_s=ENDS_WITHIN_S) == 130
    assert family.members() == []
    assert command.err == ""


def is_stopped(pid: int) -> bool:
    """Whether every thread of a process is stopped."""
    states = [
        path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")
    ]
    return set(states) == {"T"}


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal waits for a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return any(
        int(mask, 16) >> (number - 1) & 1 for mask in re.findall(r"^(?:Shd|Sig)Pnd:\s*(\w+)", status, re.M)
    )


def test_ctrl_c_before_the_server_can_hear_it(family: Family, folder: Path) -> None:
    command = family.execute("train", write_recipe(folder, **LONG))
    command.until(lambda: family.members("server") or None, "server process")
    command.signal(signal.SIGINT)

    assert command.ended() == 130, "it must start first, however long that takes"
    assert family.members() == []
    assert command.err in ("", "lte: interrupted\n")


def test_a_hand_run_server_that_waits_can_be_stopped(lte: Lte, family: Family, folder: Path) -> None:
    server = family.start("server", write_recipe(folder, **LONG))
    server.until_said("waiting for workers: 0 of 2")
    server.signal(signal.SIGINT)

    assert server.ended(within_s=ENDS_WITHIN_S) == 130
    assert server.err == ""
    assert saved_versions(folder / "run") == [0]
    finish(lte, folder, 3)


def test_ctrl_c_of_a_hand_run_worker_leaves_the_others_training(family: Family, folder: Path) -> None:
    recipe = config.load(write_recipe(folder, **LONG))
    with recipes.make_server(recipe, display=False) as server:
        serving = threading.Thread(target=server.serve)
        serving.start()
        try:
            workers = [family.start("worker", "--server", server.address) for _ in range(2)]
            workers[0].until_round(folder / "run", 3)
            workers[0].signal(signal.SIGINT)
            assert workers[0].ended(within_s=ENDS_WITHIN_S) == 130
            assert is_one_line(workers[0].err, "interrupted")
            assert workers[1].ended() == 0
            serving.join(DEADLINE_S)  # its last words come after its workers' end
        finally:
            server.stop("the test is over")
            serving.join()
    name = workers[0].out.split()[0]
    (left,) = (line["message"] for line in lines(folder / "run", "event") if line["what"] == "left")
    assert left == f"{name} is gone: interrupted"
    assert_whole(folder / "run", MANY)
    assert {line["num_merged"] for line in lines(folder / "run", "round")} == {1, 2}


def test_a_worker_hears_a_round_open_whatever_stands_behind_that_word(folder: Path) -> None:
    """A worker that joins at version 5 trains, although a sign of life follows the word at once."""
    recipe = config.from_dict(tree(server__address="inprocess://x", worker__heartbeat_s=0.01))
    master = Master(recipes.initial_model(recipe), recipe)
    endpoint = transport.bind(recipe.server.address, max_message_bytes=1 << 20)
    ended: list[RunEnded] = []

    def work() -> None:
        try:
            recipes.work(recipe.server.address, say=lambda line: None)
        except RunEnded as end:
            ended.append(end)

    def hear(kind: type[Heard]) -> tuple[transport.Peer, Heard]:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            received = endpoint.receive(max(0.0, deadline - time.monotonic()))
            if received is None:
                faulthandler.dump_traceback(all_threads=True)  # where the worker stands instead
                pytest.fail(f"no {kind.__name__}")
            message, _ = wire.decode(received[1])
            if isinstance(message, kind):
                return received[0], message

    worker = threading.Thread(target=work)
    worker.start()
    try:
        peer, _ = hear(wire.Hello)
        welcome = wire.Welcome(
            holds=False,
            run_id="run",
            merged_digest=master.merged_digest("w0", recipe.lora.heads, recipe.lora.rank),
            generation=2,
            worker_id="w0",
            incarnation=1,
            slot=0,
            version=5,
            settings=config.to_dict(recipe),
            model=master.plan.describe(recipe.lora),
        )
        endpoint.send(peer, wire.encode(welcome))

        def part(index: int) -> wire.Part:
            return wire.Part(generation=2, worker_id="", incarnation=0, version=5, stream=1, index=index)

        parts = [frames for frames, _ in wire.in_parts(master.snapshot().items(), 1 << 18, part)]
        update = wire.Update(
            generation=2,
            version=5,
            since=None,
            step=0,
            stream=1,
            parts=len(parts),
            merged=(),
            base_digest=master.base_digest(),
            last=False,
        )
        for frames in [*parts, wire.encode(update)]:
            endpoint.send(peer, frames)
        endpoint.send(peer, wire.encode(wire.Begin(generation=2, version=5)))
        endpoint.send(peer, wire.encode(wire.Pulse(generation=2, number=0, version=5)))
        assert hear(wire.Contribution)[1].version == 5
        assert hear(wire.Heartbeat)[1].version == 5
    finally:
        farewell = wire.Farewell(generation=2, reason="enough", finished=False, returns=False)
        endpoint.send(peer, wire.encode(farewell))
        worker.join()
        endpoint.close()
    assert [str(end) for end in ended] == ["enough"]


# Resuming


def test_a_finished_run_is_not_trained_again(lte: Lte, copied: Path) -> None:
    before = (copied / METRICS).read_bytes()
    for recipe, command in ((copied / "config.yaml", "train"), (copied / "config.yaml", "server")):
        code, out, err = lte(command, recipe)
        assert (code, err) == (0, "")
        assert "finished at round 6 of 6" in out
        assert "run: finished already. run.resume=never starts anew" in out
    assert (copied / METRICS).read_bytes() == before
    assert (copied / "generation").read_text() == "1\n"


def test_more_rounds_go_on_with_a_finished_run(lte: Lte, copied: Path) -> None:
    arguments = ("train.rounds=8", "server.address=inprocess://x")
    assert lte("train", copied / "config.yaml", *arguments).code == 0
    assert_whole(copied, 8)


def test_a_run_that_died_before_its_last_line_gets_it(lte: Lte, copied: Path, trained: Trained) -> None:
    text = (copied / METRICS).read_text()
    (copied / METRICS).write_text(text[: text.rindex('{"kind": "done"')])
    assert lte("train", copied / "config.yaml", "server.address=inprocess://x").code == 0
    assert_whole(copied, 6)
    assert done(copied)["master_digest"] == done(trained.run)["master_digest"]
    assert done(copied)["loss"] == done(trained.run)["loss"]


def test_never_moves_the_old_run_aside(lte: Lte, copied: Path, folder: Path, trained: Trained) -> None:
    arguments = ("run.resume=never", "run.seed=4", "server.address=inprocess://x")
    for _ in range(2):
        assert lte("train", copied / "config.yaml", *arguments).code == 0
        assert_whole(copied, 6)
        assert done(copied)["master_digest"] != done(trained.run)["master_digest"]
    assert sorted(path.name for path in folder.iterdir()) == ["data", "run", "run.old-1", "run.old-2"]
    for path in trained.run.rglob("*"):
        if path.is_file() and path.name not in LOCKS:
            assert (folder / "run.old-1" / path.relative_to(trained.run)).read_bytes() == path.read_bytes()


def test_must_demands_a_run(lte: Lte, folder: Path) -> None:
    code, _, err = lte("train", write_recipe(folder, server__address="inprocess://x"), "run.resume=must")
    assert code == 2
    assert is_one_line(err, "run: holds no run to resume (run.resume=must); use auto to start one")


@pytest.mark.parametrize(
    "setting", ["lora.rank=5", "run.seed=4", "train.local_steps=2", "model.width=64", "outer.when=arrival"]
)
def test_a_run_with_other_settings_is_not_mixed_in(lte: Lte, copied: Path, setting: str) -> None:
    before = (copied / METRICS).read_bytes()
    code, out, err = lte("train", copied / "config.yaml", setting, "train.rounds=8")
    assert (code, out) == (2, "")
    key, value = setting.split("=")
    assert is_one_line(err, "run: holds a run with other settings", key, f"-> {value}", "run.resume=never")
    assert (copied / METRICS).read_bytes() == before


def test_a_run_that_combines_otherwise_is_not_mixed_in(lte: Lte, folder: Path) -> None:
    """Its heads are one worker's own, or parameters like others: no checkpoint holds both."""
    settings = {"lora__merge": "never", "train__workers": 1, "server__address": "inprocess://x"}
    for combine, other in (("products", "factors"), ("factors", "products")):
        run = folder / combine
        arguments = (write_recipe(folder, **settings, run__dir=str(run)), "train.rounds=2")
        assert lte("train", *arguments, f"outer.combine={combine}").code == 0
        before = (run / METRICS).read_bytes()
        code, out, err = lte("train", *arguments, f"outer.combine={other}", "train.rounds=3")
        assert (code, out) == (2, "")
        assert is_one_line(err, "holds a run with other settings", "outer.combine", f"-> {other}")
        assert (run / METRICS).read_bytes() == before


@pytest.mark.parametrize("name", ["master.safetensors", "progress.json"])
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_all_the_same(
    lte: Lte, copied: Path, name: str
) -> None:
    arguments = (copied / "config.yaml", "train.rounds=8", "server.address=inprocess://x")
    path = copied / "checkpoints" / "version-00000006" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    code, _, err = lte("eval", "run")
    assert code == 2
    assert is_one_line(err, "run/checkpoints/version-00000006", "to use an older one")
    assert lte("train", *arguments).code == 0
    assert_whole(copied, 8)
    (damaged,) = (line for line in lines(copied, "event") if line["what"] == "damaged")
    assert "version-00000006" in damaged["message"]
    assert damaged["version"] == 6, "the journal tells what came after the one before"


# Mistakes: one line, exit code 2


def is_one_line(text: str, *parts: str) -> bool:
    """Whether a complaint is one line of `lte` that says all these; shows it otherwise."""
    assert re.fullmatch(r"lte: [^\n]+\n", text), text
    for part in parts:
        assert part in text, f"no {part!r} in {text}"
    return True


MISTAKES: list[tuple[Sequence[str], Sequence[str]]] = [
    (["train", "recipee.yaml"], ["recipee.yaml: no such file, did you mean recipe.yaml?"]),
    (["train", "data"], ["data: cannot be read"]),
    (["train", "text.txt"], ["text.txt: "]),
    (["train", "recipe.yaml", "lora.rnak=3"], ["lora.rnak: unknown setting, did you mean lora.rank?"]),
    (["train", "recipe.yaml", "rank=3"], ["rank: unknown setting, did you mean lora.rank?"]),
    (["train", "recipe.yaml", "lora.rank"], ["'lora.rank': an override is key=value"]),
    (["train", "recipe.yaml", "lora.rank=0"], ["lora.rank: ", "must be greater"]),
    (["train", "recipe.yaml", "lora.merge=resetb"], ["lora.merge: 'resetb'", "did you mean reset-b?"]),
    (["data", "pack-images", "nowhere", "--out", "new"], ["nowhere: no such folder or tar file"]),
    (
        ["train", "recipe.yaml", "data.kind=images", "model.name=vit"],
        ["data: holds text, not images; set data.kind=text"],
    ),
    (
        [
            *["train", "recipe.yaml", "model.name=transformers", "model.architecture=llama"],
            *["model.width=128", "model.num_layers=4", "model.num_attention_heads=4", "model.mlp_width=512"],
            "model.config.hiden_size=64",
        ],
        ["model.config.hiden_size: unknown setting of llama, did you mean model.config.hidden_size?"],
    ),
    (["train", "recipe.yaml", "data.shards=nowhere"], ["nowhere: no packed text", "lte data pack TEXT"]),
    (["train", "recipe.yaml", "model.vocab_size=99"], ["model.vocab_size: 99 is less than the 256 tokens"]),
    (
        ["train", "recipe.yaml", "model.context_tokens=9999"],
        ["tokens are too few for windows of 9999", "context_tokens"],
    ),
    (["train", "recipe.yaml", "run.dir=text.txt"], ["text.txt: cannot be a run's folder (File exists)"]),
    (["train", "recipe.yaml", "run.dir=text.txt/run"], ["text.txt/run: cannot be a run's folder"]),
    (["train", "recipe.yaml", "run.dir=/proc/run"], ["/proc/run: cannot be a run's folder", "run.dir"]),
    (
        ["convert", "recipe.yaml", "--dry-run", "lora.rnak=3"],
        ["lora.rnak: unknown setting, did you mean lora."],
    ),
    (["convert", "recipe.yaml", "--dry-run", "rank"], ["unrecognized arguments: rank (see 'lte --help')"]),
    (["status", "--server", "inprocess://x", "a=1"], ["unrecognized arguments: a=1"]),
    (["train", "recipe.yaml", "--fast"], ["unrecognized arguments: --fast (see 'lte --help')"]),
    (["server", "recipe.yaml", "server.address=tcp://0.0.0.0:*"], ["there are no keys", "insecure=true"]),
    (["server", "recipe.yaml", "server.address=tcp://127.0.0.1"], ["tcp://127.0.0.1", "tcp://HOST:PORT"]),
    (["server", "recipe.yaml", "server.address=5555"], ["server.address: ", "tcp://"]),
    (["worker", "--server", "127.0.0.1:5555"], ["an address is tcp://HOST:PORT"]),
    (["worker"], ["the following arguments are required: --server (see 'lte worker --help')"]),
    (["worker", "--server", "tcp://127.0.0.1:1", "--wait", "soon"], ["'soon' is not a number"]),
    (["status"], ["the following arguments are required: --server (see 'lte status --help')"]),
    (["status", "--server", "inprocess://x"], ["no server of this process has this address"]),
    (["report", "nowhere"], ["nowhere/config.yaml: no such file"]),
    (["report", "run", "--diagnostics", "heads.jpg"], ["'heads.jpg' is not a file", ".png, .pdf, .svg"]),
    (["report", "run", "--diagnostics", "nowhere/heads.png"], ["is not a file in a folder that exists"]),
    (["eval", "nowhere"], ["nowhere: not a run folder"]),
    (["eval", "text.txt"], ["text.txt: not a run folder"]),
    (["generate", "data"], ["data: not a run folder (it has no config.yaml); give the run.dir of a run"]),
    (["generate", "run", "--tokens", "-1"], ["--tokens"]),
    (["export", "run"], ["the following arguments are required: --format, --out"]),
    (["export", "nowhere", "--format", "safetensors", "--out", "out"], ["nowhere: not a run folder"]),
    (["train", "recipe.yaml", "model.init_from=nowhere"], ["model.init_from: nowhere cannot be read"]),
    (["generate", "run", "--temperature", "hot"], ["--temperature: 'hot' is not a number of 0 or more"]),
    (["data", "pack", "nowhere.txt", "--out", "out"], ["nowhere.txt: no such text file"]),
    (["data", "pack", "text.txt", "--out", "data"], ["data: holds packed data already", "--force"]),
    (["data", "pack", "text.txt", "--out", "text.txt"], ["text.txt: cannot be made a folder"]),
    (
        ["data", "pack", "text.txt", "--out", "out", "--tokenizer", "bpe"],
        ["'bpe': must be bytes, bpe:SIZE"],
    ),
    (["data", "pack", "text.txt", "--out", "out", "--shards", "none"], ["--shards: 'none' is not a whole"]),
    (["trian", "recipe.yaml"], ["invalid choice: 'trian'"]),
    ([], ["the following arguments are required: COMMAND (see 'lte --help')"]),
]


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_gets_one_line(
    lte: Lte, folder: Path, arguments: Sequence[str], parts: Sequence[str]
) -> None:
    write_recipe(folder, server__address="inprocess://x")
    (folder / "text.txt").write_text("no recipe at all")
    before = sorted(folder.iterdir())
    code, out, err = lte(*arguments)
    assert (code, out) == (2, "")
    assert is_one_line(err, *parts)
    assert "Traceback" not in err
    left = {path.name for path in folder.iterdir()} - {path.name for path in before}
    assert left <= {"run"}


def test_every_fault_of_a_recipe_gets_a_line(lte: Lte, folder: Path) -> None:
    code, _, err = lte("train", write_recipe(folder), "lora.rnak=3", "train.rounds=0", "modle.width=8")
    assert code == 2
    assert sorted(line.split(":")[1].strip() for line in err.splitlines()) == [
        "lora.rnak",
        "modle",
        "train.rounds",
    ]


def test_ports_that_are_taken_or_dead(lte: Lte, folder: Path) -> None:
    recipe = write_recipe(folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        code, _, err = lte("server", recipe, f"server.address={address}")
        assert code == 2
        assert is_one_line(err, f"{address}: the port is in use")
    with socket.socket() as dead:  # bound, so that nobody else takes it, but nobody listens
        dead.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{dead.getsockname()[1]}"
        code, _, err = lte("worker", "--server", address, "--wait", "0.2")
        assert code == 2
        assert is_one_line(err, f"no server answers at {address} after 0.2 s", "lte server CONFIG")


def test_mistakes_in_processes_of_their_own(family: Family, folder: Path) -> None:
    """What only the operating system shows: the exit code, and that a launcher complains once."""
    recipe = write_recipe(folder)
    commands = [
        family.start("train", "missing.yaml"),
        family.start("train", recipe, "run.dir=data/index.json"),
    ]
    assert [command.ended() for command in commands] == [2, 2]
    assert is_one_line(commands[0].err, "missing.yaml: no such file")
    assert is_one_line(commands[1].err, "data/index.json: cannot be a run's folder")
    assert [command.out for command in commands] == ["", ""]
    assert family.members() == []


# Help and pipes


@pytest.mark.parametrize(
    "command",
    [
        "",
        "train",
        "server",
        "worker",
        "status",
        "report",
        "rollback",
        "eval",
        "generate",
        "export",
        "ranks",
        "convert",
        "data",
        "data pack",
        "data pack-images",
    ],
)
def test_help_shows_an_example(lte: Lte, command: str) -> None:
    code, out, err = lte(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert re.search(rf"^ +lte {command or 'train'} ", out, re.M), out
    assert max(map(len, out.splitlines())) <= 110


def test_train_help_documents_every_setting(lte: Lte) -> None:
    out = lte("train", "--help").out
    for key, _, default, _ in config.describe():
        assert re.search(rf"^ +{re.escape(key)} \(.*, {re.escape(default)}\)$", out, re.M), key


def test_the_reader_of_a_pipe_may_leave(family: Family, folder: Path) -> None:
    def start(*arguments: str | Path) -> tuple[Command, int]:
        reading, writing = os.pipe()
        command = family.execute(*arguments, stdout=writing)
        os.close(writing)
        return command, reading

    help_, reading = start("train", "--help")
    os.close(reading)
    train, reading = start("train", write_recipe(folder, **LONG), "train.workers=1")
    with os.fdopen(reading) as pipe:  # as `| head -1` does
        assert pipe.readline().startswith("event started")

    assert help_.ended() in (0, 128 + signal.SIGPIPE)
    assert train.ended() == 128 + signal.SIGPIPE
    assert (help_.err, train.err, family.members()) == ("", "", [])
    assert lines(folder / "run", "event")[-1]["message"] == "its output was closed"
    assert saved_versions(folder / "run")[-1] == (versions(folder / "run") or [0])[-1]
