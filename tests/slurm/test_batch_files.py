"""The batch files on a real SLURM cluster: to the end; preempted, and with nodes that are lost or cut off.

Slow, as SLURM gives a node up only after a while: `make test-slurm`, not `make test`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch import Slurm, processes, started
from cluster import TINY, audit, replayed, shards
from processes import done, lines, versions

from launch import local
from lte import config
from lte.config import Recipe

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
ROUNDS = 120
WORKERS = "--ntasks=2 --ntasks-per-node=1"
"""Two, on two nodes, the first of them the server's."""
OPTIONS = {"train": WORKERS, "hetjob": f": {WORKERS}"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return TINY | {
        "data.shards": str(shards(tmp_path_factory.mktemp("data"))),
        "train.rounds": ROUNDS,
        "server.quorum": 2,
        "worker.heartbeat_s": 0.1,
        "eval.sample_tokens": 0,
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> str:
    """Digest of the master that nothing happened to, in one process."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    own = {"run.dir": str(run), "server.address": "inprocess://undisturbed"}
    assert local.train_in_threads(config.replace(Recipe(), **settings, **own)) == 0
    return str(done(run)["master_digest"])


@pytest.fixture
def recipe(tmp_path: Path, settings: dict[str, Any]) -> Path:
    """A recipe's file; it runs in the folder `run` beside it."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        config.to_yaml(config.replace(Recipe(), **settings, **{"run.dir": str(tmp_path / "run")}))
    )
    return path


@pytest.fixture
def slurm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Slurm]:
    with started(tmp_path, networked=getattr(request, "param", False)) as slurm:
        yield slurm


networked = pytest.mark.parametrize("slurm", [True], indirect=True, ids=["networked"])


def of(recipe: Path) -> Path:
    return recipe.with_name("run")


def events(run: Path, what: str) -> list[str]:
    return [line["message"] for line in lines(run, "event") if line["what"] == what]


def until_round(slurm: Slurm, run: Path, version: int) -> None:
    slurm.until(lambda: (versions(run) or [0])[-1] >= version, f"round {version}")


def check(run: Path, digest: str) -> None:
    """The run is finished, each contribution counted once, and its master is this one."""
    audit(run, ROUNDS, {"w0", "w1"})
    assert done(run)["master_digest"] == digest
    assert replayed(run) == digest


@pytest.mark.parametrize("file", OPTIONS)
def test_a_job_trains_to_the_end(slurm: Slurm, recipe: Path, undisturbed: str, file: str) -> None:
    slurm.ended(slurm.submit(file, recipe, options=OPTIONS[file]))
    check(of(recipe), undisturbed)


def test_an_array_joins_a_run_that_goes_on(slurm: Slurm, recipe: Path) -> None:
    """Of two, one is preempted and comes again. w0 is stopped until then, so that the run does not end."""
    run = of(recipe)
    job = slurm.submit("train", recipe, "server.silence_s=600", options=WORKERS)
    until_round(slurm, run, 3)
    (first,) = processes(run, "worker", "w0")
    os.kill(first, signal.SIGSTOP)
    more = slurm.submit("elastic", recipe, options="--array=2-3")
    slurm.until(lambda: {"w2 joined", "w3 joined"} <= {*events(run, "joined")}, "further workers")
    slurm.tell("scancel", "--batch", "--signal=USR1", f"{more}_3")
    slurm.until(lambda: events(run, "joined").count("w3 joined") == 2, "the preempted one")
    assert (slurm.restarts(f"{more}_2"), slurm.restarts(f"{more}_3")) == (0, 1)
    os.kill(first, signal.SIGCONT)
    slurm.ended(job)
    slurm.ended(more)
    assert max(line["num_merged"] for line in lines(run, "round")) == 4
    audit(run, ROUNDS, {"w0", "w1", "w2", "w3"})
    assert replayed(run) == done(run)["master_digest"]


@pytest.mark.parametrize(
    ("file", "how"),
    [("train", "at its limit"), ("hetjob", "by its signal"), ("train", "at once"), ("hetjob", "at once")],
)
def test_a_job_that_is_preempted_comes_again(
    slurm: Slurm, recipe: Path, undisturbed: str, file: str, how: str
) -> None:
    """By what --signal has SLURM send to the batch file, near the time limit or else; or by its own requeue,
    which ends the tasks."""
    run = of(recipe)
    job = slurm.submit(file, recipe, "server.silence_s=600", options=OPTIONS[file])
    until_round(slurm, run, 3)
    if how == "at its limit":
        (first,) = processes(run, "worker", "w0")
        os.kill(first, signal.SIGSTOP)  # SLURM looks every half minute, which the run would not take
        slurm.tell("scontrol", "update", f"JobId={job}", "TimeLimit=2")  # --signal wants 120 s
        slurm.until(lambda: events(run, "stopped"), "word that time is nearly up")
        slurm.tell("scontrol", "update", f"JobId={job}", "TimeLimit=60")
        os.kill(first, signal.SIGCONT)
    elif how == "by its signal":
        slurm.tell("scancel", "--batch", "--signal=USR1", job)
    else:
        slurm.tell("scontrol", "requeue", job)
    slurm.until(lambda: slurm.restarts(job) == 1, "restart")
    slurm.ended(job)
    assert slurm.restarts(job) == 1
    check(run, undisturbed)


def test_a_job_that_is_cancelled_does_not_come_again(slurm: Slurm, recipe: Path, undisturbed: str) -> None:
    run = of(recipe)
    job = slurm.submit("train", recipe, options=WORKERS)
    until_round(slurm, run, 3)
    slurm.tell("scancel", job)
    slurm.ended(job, "CANCELLED")
    slurm.until(lambda: not processes(run), "end of its processes")
    assert slurm.restarts(job) == 0
    slurm.ended(slurm.submit("train", recipe, options=WORKERS))
    check(run, undisturbed)


def test_a_node_that_is_lost_is_replaced(slurm: Slurm, recipe: Path, undisturbed: str) -> None:
    run = of(recipe)
    job = slurm.submit("train", recipe, options=WORKERS)
    until_round(slurm, run, 3)
    assert slurm.nodes(job) == "node[1-2]"
    slurm.crash(2)
    slurm.until(lambda: slurm.restarts(job) == 1, "restart without the node")
    slurm.ended(job)
    check(run, undisturbed)


@networked
@pytest.mark.parametrize("node", [1, 2], ids=["the server's", "a worker's"])
def test_a_node_that_is_cut_off_and_runs_on_is_fenced(
    slurm: Slurm, recipe: Path, undisturbed: str, node: int
) -> None:
    """The job goes on elsewhere; then the node is back, with the old processes."""
    run = of(recipe)
    job = slurm.submit("train", recipe, options=WORKERS)
    until_round(slurm, run, 3)
    assert slurm.nodes(job) == "node[1-2]"
    ghosts = processes(run, "server") if node == 1 else processes(run, "worker", "w1")
    slurm.cut(node)
    slurm.until(lambda: slurm.restarts(job) == 1, "restart elsewhere")
    slurm.until(lambda: len(events(run, "started")) == 2, "second server")
    slurm.mend(node)
    slurm.ended(job)
    slurm.until(lambda: not {*ghosts} & {*processes(run)}, "end of the ghosts")
    assert slurm.restarts(job) == 1
    check(run, undisturbed)


def test_the_others_go_on_without_a_worker_that_was_lost(slurm: Slurm, recipe: Path) -> None:
    """How long that takes is printed; it must be little more than server.silence_s."""
    run = of(recipe)
    given = ["server.quorum=1", "server.silence_s=3", "train.rounds=100000"]
    job = slurm.submit("train", recipe, *given, options=WORKERS)
    until_round(slurm, run, 3)
    (lost,) = processes(run, "worker", "w1")
    os.kill(lost, signal.SIGKILL)
    lost_s = time.monotonic()
    slurm.until(lambda: lines(run, "round")[-1]["num_merged"] == 1, "merge without it")
    print(f"\nfrom the loss of a worker to the next merge: {time.monotonic() - lost_s:.1f} s, silence_s = 3")
    slurm.tell("scancel", job)
    slurm.until(lambda: not processes(run), "end of its processes")
