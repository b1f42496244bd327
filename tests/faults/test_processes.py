"""A worker of several processes trains as one process would, and is one worker in its end, too."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from cluster import Cluster, Fault, Scripted, audit

from lte import recipes
from lte.errors import DataError
from lte.team.follower import Follower

ROUNDS = 4
ALL = {"train.rounds": ROUNDS, "worker.processes": 2, "server.quorum": 2}
"""Settings of a run of two workers whose rounds wait for both."""
STEP = "lte.worker.trainer:Trainer.step"
TOKEN = "LTE_TEST_TEAM"
"""Environment variable that names the processes of a cluster's workers."""


@dataclass(frozen=True)
class Forked:
    """The other processes are forked, which saves seconds each."""

    def install(self) -> None:
        subprocess.Popen = forks._ForkedPopen  # type: ignore[misc]


@dataclass(frozen=True)
class Named:
    """The other processes have the cluster's folder in their environment."""

    folder: Path

    def install(self) -> None:
        os.environ[TOKEN] = str(self.folder)


@dataclass(frozen=True)
class Signalled(Scripted):
    """Process 1 of the worker gets a signal."""

    number: int = signal.SIGKILL

    def happen(self) -> None:
        (child, *_) = _children(os.getpid())
        os.kill(child, self.number)


def _children(pid: int) -> list[int]:
    """By whichever of its threads they were started."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in path.read_text().split()]
    return found


def followers(folder: Path) -> list[int]:
    """Processes that workers of a cluster started and that are alive."""
    found, own = [], f"{TOKEN}={folder}".encode()
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended
            if entry.name.isdecimal() and own in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def trained(folder: Path, settings: dict[str, Any], workers: int = 1) -> Cluster:
    """A run that nothing happens to."""
    folder.mkdir()
    cluster = Cluster(folder, settings | {"train.rounds": ROUNDS, "train.workers": workers})
    started = [cluster.serve(), *(cluster.work(f"w{k}", Forked()) for k in range(workers))]
    for process in started:
        cluster.ended(process, 0)
    return cluster


SGD = {"optimizer.name": "sgd", "optimizer.lr": 0.1, "base.quant": "none", "compress.factors": "fp32"}
MODES: dict[str, dict[str, Any]] = {
    "reset-less on int8, AdamW": {},
    "rotating A on NF4, two heads, Muon": {
        "lora.merge": "reset-b",
        "lora.A": "rotating",
        "base.quant": "nf4",
        "lora.heads": 2,
        "train.batch_size": 8,
        "optimizer.name": "muon",
    },
    "phases of other ranks, bases and full rank": {
        "train.phases": [
            {"from_round": 0, "full_rank": True},
            {"from_round": 1, "full_rank": False, "rank": 2, "base_quant": "nf4"},
            {"from_round": 3, "rank": 6},
        ],
        "lora.merge": "reset-b",
        "optimizer.clip_by": "head",
    },
    "overlap, with recomputed activations": {
        "train.overlap": True,
        "train.checkpoint_activations": True,
        "lora.A": "frozen",
    },
    "nested ranks": {"lora.nested": "frozen", "lora.merge": "reset-b"},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_two_processes_are_one_with_twice_as_many_pieces_bit_for_bit(
    tmp_path: Path, settings: dict[str, Any], mode: dict[str, Any]
) -> None:
    """Half of a sum is exact, and a sum of two has no order: the mean of two processes' gradients is the sum
    of two pieces', each with half of its loss."""
    one = trained(tmp_path / "one", settings | mode | {"train.accumulate": 2})
    two = trained(tmp_path / "two", settings | mode | {"worker.processes": 2})
    assert two.master_digest() == one.master_digest()
    for key in ("train_loss", "tokens"):
        assert [line[key] for line in two.lines("round")] == [line[key] for line in one.lines("round")]
    for cluster in (one, two):
        cluster.close()


def test_workers_of_one_and_of_two_processes_with_pieces_of_batches_are_one_run(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """The second worker says itself how many it is."""
    settings = settings | {"train.rounds": ROUNDS, "train.batch_size": 8, "train.accumulate": 4}
    one = trained(tmp_path / "one", settings, workers=2)
    (tmp_path / "two").mkdir()
    two = Cluster(tmp_path / "two", settings | {"train.accumulate": 2, "worker.processes": 2})
    for process in (two.serve(), two.work("w0", Forked()), two.work("w1", Forked(), processes=2)):
        two.ended(process, 0)
    assert two.master_digest() == one.master_digest()
    for cluster in (one, two):
        cluster.close()


def test_three_processes_train_as_one_up_to_rounding(tmp_path: Path, settings: dict[str, Any]) -> None:
    """By SGD, to which a gradient that is rounded otherwise makes no more difference than that."""
    settings = settings | SGD | {"train.batch_size": 6}
    one = trained(tmp_path / "one", settings)
    three = trained(tmp_path / "three", settings | {"worker.processes": 3})
    (of_one, *_), (of_three, *_) = (recipes.load_run(c.run, "master") for c in (one, three))
    for name, weight in of_one.state_dict().items():
        torch.testing.assert_close(of_three.state_dict()[name], weight, rtol=1e-4, atol=1e-6)
    for cluster in (one, three):
        cluster.close()


def test_dropout_repeats_itself_and_is_another_on_each_process(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = settings | {"lora.dropout": 0.3}
    digests = set()
    for name, more in (
        ("once", {"worker.processes": 2}),
        ("again", {"worker.processes": 2}),
        ("pieces", {"train.accumulate": 2}),
    ):
        cluster = trained(tmp_path / name, settings | more)
        digests.add((name == "pieces", cluster.master_digest()))
        cluster.close()
    assert len(digests) == 2


def test_one_that_joins_in_the_middle_takes_part(tmp_path: Path, settings: dict[str, Any]) -> None:
    cluster = Cluster(tmp_path, settings | {"train.workers": 1})
    server = cluster.serve()
    first = cluster.work("a", Fault(STEP, call=5, number=signal.SIGSTOP))
    cluster.stopped(first)
    joins = cluster.work("b", Forked(), processes=2)
    cluster.until(lambda: cluster.events("joined") and len(cluster.events("joined")) > 1, "second worker")
    cluster.wake(first)
    for process in (server, first, joins):
        cluster.ended(process, 0)
    assert max(line["num_merged"] for line in cluster.lines("round")) == 2
    cluster.close()


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> str:
    """Digest of the master of a run of two workers of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("calm") / "run-of-two"
    cluster = trained(folder, settings | ALL, workers=2)
    try:
        return cluster.master_digest()
    finally:
        cluster.close()


KILLS = {
    "the leader in its backward pass": (Fault("lte.team.leader:Team.mean", call=5), -signal.SIGKILL),
    "the leader when it has pushed": (
        Fault("lte.worker.session:Session.push", call=3, after=True),
        -signal.SIGKILL,
    ),
    "a follower before a step": (Signalled("lte.team.leader:Team.lead", call=5), 1),
    "a follower in its backward pass": (Signalled("lte.team.leader:Team.mean", call=4), 1),
}


@pytest.mark.parametrize(("fault", "code"), KILLS.values(), ids=KILLS.keys())
def test_killed_it_leaves_nobody_behind_and_another_goes_on_bit_for_bit(
    tmp_path: Path, settings: dict[str, Any], calm: str, fault: Scripted, code: int
) -> None:
    """Executed, not forked: what a user has."""
    cluster = Cluster(tmp_path, settings | ALL)
    server, other = cluster.serve(), cluster.work("w0", Forked())
    cluster.ended(cluster.work("w1", Named(tmp_path), fault), code)
    cluster.until(lambda: not followers(tmp_path), "end of all that it had started")
    if code == 1:
        assert "process 1 of this worker's 0 to 1 was killed by SIGKILL" in cluster.logs()
    again = cluster.work("w1", Forked())
    for process in (server, other, again):
        cluster.ended(process, 0)
    assert cluster.master_digest() == calm
    audit(cluster.run, ROUNDS, {"w0", "w1"})
    cluster.close()


def test_a_follower_is_missed_while_the_leader_waits_for_the_server(
    tmp_path: Path, settings: dict[str, Any], calm: str
) -> None:
    cluster = Cluster(tmp_path, settings | ALL)
    server = cluster.serve(server__silence_s=600.0)
    slow = cluster.work("w0", Forked(), Fault(STEP, call=3, number=signal.SIGSTOP))
    # It waits until the run begins, until the second round does, and now for the third.
    killed = Signalled("lte.worker.service:Worker._until_open", call=3)
    cluster.ended(cluster.work("w1", Forked(), killed), 1)
    assert "process 1 of this worker's 0 to 1 was killed by SIGKILL" in cluster.logs()
    again = cluster.work("w1", Forked())
    cluster.wake(slow)
    for process in (server, slow, again):
        cluster.ended(process, 0)
    assert cluster.master_digest() == calm
    cluster.close()


def test_a_follower_is_missed_before_the_first_round(tmp_path: Path, settings: dict[str, Any]) -> None:
    cluster = Cluster(tmp_path, settings | ALL)
    cluster.serve()
    killed = Signalled("lte.worker.service:Worker._until_open")
    cluster.ended(cluster.work("w0", Forked(), killed), 1)
    assert "ProcessError: process 1 of this worker's 0 to 1 was killed by SIGKILL" in cluster.logs()
    cluster.close()


def test_told_to_stop_it_saves_and_ends_with_all_its_processes(
    tmp_path: Path, settings: dict[str, Any], calm: str
) -> None:
    cluster = Cluster(tmp_path, settings | ALL)
    server, other = cluster.serve(), cluster.work("w0", Forked())
    told = cluster.work("w1", Named(tmp_path), Fault(STEP, call=4, number=signal.SIGTERM))
    cluster.ended(told, 128 + signal.SIGTERM)
    assert followers(tmp_path) == []
    again = cluster.work("w1", Forked())
    for process in (server, other, again):
        cluster.ended(process, 0)
    assert cluster.master_digest() == calm
    cluster.close()


@dataclass(frozen=True)
class Broken:
    """No process of a worker but the first can be built. They are forked from one in which this is so."""

    def install(self) -> None:
        def refuse(follower: Follower, begin: object) -> None:
            raise DataError("data.shards: nothing is here")

        Follower.__init__ = refuse  # type: ignore[method-assign]


def test_it_ends_with_a_follower_that_cannot_begin(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Before the first round; the reason is the follower's."""
    cluster = Cluster(tmp_path, settings | {"train.workers": 1})
    cluster.serve()
    cluster.ended(cluster.work("w0", Forked(), Broken(), processes=2), 1)
    assert "RunError: process 1 of this worker's 0 to 1 ended: data.shards: nothing is here" in cluster.logs()
    assert cluster.lines("round") == []
    cluster.close()
