"""Merging on arrival under faults: nothing is lost or merged twice, and the journal's order is the truth."""

from __future__ import annotations

import signal
from pathlib import Path

import naive
import pytest
import torch
from cluster import ROUNDS, Cluster, Fault, Gate, Wait, audit_arrivals, replayed
from test_server import KILLED

from lte.server import checkpoint

CONTRIBUTIONS = 2 * ROUNDS


@pytest.fixture
def arriving(cluster: Cluster) -> Cluster:
    """A cluster whose journal tells in fp32 all that was merged."""
    cluster.settings = cluster.settings | {
        "outer.when": "arrival",
        "outer.staleness": "polynomial",
        "compress.factors": "fp32",
        "compress.dense": "fp32",
    }
    return cluster


def all_is_well(cluster: Cluster) -> None:
    """What the journal tells makes the master, to the bit when replayed, to rounding in a naive way. That no
    contribution was encoded against other merged factors than the server's shows that workers took out what
    was merged of them, and nothing else."""
    num_versions = audit_arrivals(cluster.run, CONTRIBUTIONS)
    lines = cluster.lines("round")
    assert [line["version"] for line in lines] == list(range(1, num_versions + 1))
    assert sum(line["num_merged"] for line in lines) == lines[-1]["contributions"] >= CONTRIBUTIONS
    for what in ("refused", "recalled", "damaged"):
        assert cluster.events(what) == []
    assert replayed(cluster.run) == cluster.master_digest()
    weights, expected = naive.master(cluster.run)
    _, state = checkpoint.load(checkpoint.newest(cluster.run))
    assert set(expected) <= {1, 2}
    for name, weight in state["master"].items():
        assert torch.allclose(weight.double(), weights[name], atol=1e-5), name


@pytest.mark.parametrize("fault", KILLED.values(), ids=KILLED.keys())
def test_a_killed_server_loses_nothing(arriving: Cluster, fault: Fault) -> None:
    workers = [arriving.work(name) for name in ("a", "b")]
    arriving.ended(arriving.serve(fault), -signal.SIGKILL)
    arriving.ended(arriving.serve(), 0)
    for worker in workers:
        arriving.ended(worker, 0)
    all_is_well(arriving)


DIES = {
    "before it has encoded": Fault("lte.worker.trainer:Trainer.contribution", call=3),
    "before its state is saved": Fault("lte.worker.state:save", call=3),
    "saved, and not sent": Fault("lte.worker.state:save", call=3, after=True),
    "sent": Fault("lte.worker.session:Session.push", call=3, after=True),
    "before it takes the update": Fault("lte.worker.trainer:Trainer.apply", call=3),
    "with the update": Fault("lte.worker.trainer:Trainer.apply", call=3, after=True),
}


@pytest.mark.parametrize("fault", DIES.values(), ids=DIES.keys())
def test_a_worker_that_dies_goes_on_and_its_work_counts_once(arriving: Cluster, fault: Fault) -> None:
    server = arriving.serve()
    b = arriving.work("b")
    arriving.ended(arriving.work("a", fault), -signal.SIGKILL)
    again = arriving.work("a")
    for process in (again, b, server):
        arriving.ended(process, 0)
    all_is_well(arriving)


CONTRIBUTES = "lte.worker.trainer:Trainer.contribution"


def test_nobody_waits_for_a_slow_worker_and_what_it_brings_counts(arriving: Cluster, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    processes = [arriving.serve(), arriving.work("a", Wait(CONTRIBUTES, gate=gate)), arriving.work("b")]
    arriving.until(lambda: len(arriving.lines("round")) >= 4, "versions without the slow one")
    gate.open()
    for process in processes:
        arriving.ended(process, 0)
    all_is_well(arriving)
    behind = [line["staleness_max"] for line in arriving.lines("round")]
    assert behind[:4] == [0, 0, 0, 0]
    assert max(behind) >= 4
    assert arriving.events("superseded") == []


def test_a_worker_too_far_behind_is_renewed_and_still_brings_what_it_learnt(
    arriving: Cluster, tmp_path: Path
) -> None:
    """The fast one brings five contributions, and then no more before the slow one has brought one."""
    slow, fast = Gate(tmp_path / "slow"), Gate(tmp_path / "fast")
    processes = [
        arriving.serve(outer__max_staleness=3),
        arriving.work("a", Wait(CONTRIBUTES, gate=slow)),
        arriving.work("b", Wait(CONTRIBUTES, call=6, gate=fast)),
    ]
    arriving.until(fast.reached.exists, "versions without the slow one")
    slow.open()
    arriving.until(lambda: len(arriving.lines("round")) >= 6, "contribution of the slow one")
    fast.open()
    for process in processes:
        arriving.ended(process, 0)
    all_is_well(arriving)
    assert arriving.lines("round")[5]["staleness_max"] == 0, "it was brought up to date before"
    (said,) = arriving.events("superseded")
    assert said == "a came too late: it is 5 versions behind, and outer.max_staleness is 3"


def test_a_joiner_takes_part_at_once_and_counts_and_who_leaves_does_not(
    arriving: Cluster, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    server = arriving.serve()
    a = arriving.work("a", Wait("lte.worker.trainer:Trainer.contribution", call=2, gate=gate))
    leaving = Fault("lte.worker.trainer:Trainer.step", call=5, number=signal.SIGTERM)
    arriving.ended(arriving.work("b", leaving), 128 + signal.SIGTERM)
    c = arriving.work("c")
    arriving.until(lambda: "c joined" in arriving.events("joined"), "joiner")
    gate.open()
    for process in (a, c, server):
        arriving.ended(process, 0)
    all_is_well(arriving)
