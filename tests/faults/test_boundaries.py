"""Server and workers are killed where a phase begins: the master's bits are those of the undisturbed run."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import ROUNDS, Cluster, EveryCheckpoint, Fault, audit, replayed

from lte import recipes

PHASES = [
    {"from_round": 2, "local_steps": 3, "base_quant": "nf4", "rank": 6},
    {"from_round": 4, "local_steps": 1, "base_quant": "none", "merge": "reset-b", "rank": 3},
]
"""From T = 2, int8, lora_rank 4 and reset-less; contributions travel in 4 bits, so that much is owed."""
BOUNDARIES = (2, 4)

PUSHES = "lte.worker.session:Session"
WORKER = {
    "when it has taken a step": ("lte.worker.trainer:Trainer.step", True),
    "before its state is saved": ("lte.worker.state:save", False),
    "when its state is saved": ("lte.worker.state:save", True),
    "when it has pushed": (f"{PUSHES}.push", True),
    "before it applies the update": ("lte.worker.trainer:Trainer.apply", False),
    "when it has applied the update": ("lte.worker.trainer:Trainer.apply", True),
}
SERVER = {
    "before the merge is in the journal": ("lte.server.journal:Journal.write", False, "Merged"),
    "in the journal, not published": ("lte.server.publisher:Publisher.publish", False, ""),
    "published": ("lte.server.publisher:Publisher.publish", True, ""),
    "before a checkpoint of it": ("lte.server.store:Store.save_meanwhile", False, ""),
}


@pytest.fixture(scope="module")
def phased(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Iterator[Cluster]:
    """A run with these phases that nothing happened to."""
    cluster = Cluster(tmp_path_factory.mktemp("phased"), settings | {"train.phases": PHASES})
    for process in (cluster.serve(), cluster.work("a"), cluster.work("b")):
        cluster.ended(process, 0)
    yield cluster
    cluster.close()


WARM_START = [
    {"from_round": 0, "full_rank": True, "merge": "reset-b", "local_steps": 1, "base_quant": "none"},
    {"from_round": 2, "full_rank": False, "merge": "reset-less", "local_steps": 2, "base_quant": "int8"},
]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Iterator[Cluster]:
    """A run that begins at full rank."""
    cluster = Cluster(tmp_path_factory.mktemp("warm"), settings | {"train.phases": WARM_START})
    for process in (cluster.serve(), cluster.work("a"), cluster.work("b")):
        cluster.ended(process, 0)
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(tmp_path: Path, settings: dict[str, Any]) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, settings | {"train.phases": PHASES})
    yield cluster
    cluster.close()


def test_the_journal_leads_over_all_boundaries(phased: Cluster, warm: Cluster) -> None:
    for run in (phased, warm):
        assert replayed(run.run) == run.master_digest()
    tokens = [line["tokens"] for line in phased.lines("round")]
    assert tokens == [2 * 4 * 16 * steps for steps in (2, 4, 7, 10, 11, 12)]


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(("function", "after"), WORKER.values(), ids=WORKER.keys())
def test_a_worker_killed_at_a_boundary_goes_on_bit_for_bit(
    cluster: Cluster, phased: Cluster, boundary: int, function: str, after: bool
) -> None:
    """Its state, of before the boundary or after it, meets a version that may be one later."""
    call = {2: 5, 4: 11}[boundary] if function.endswith("step") else boundary
    server, other = cluster.serve(), cluster.work("a")
    cluster.ended(cluster.work("b", Fault(function, call=call, after=after)), -signal.SIGKILL)
    for process in (cluster.work("b"), server, other):
        cluster.ended(process, 0)
    assert cluster.master_digest() == phased.master_digest()
    audit(cluster.run, ROUNDS, {"a", "b"})
    assert cluster.events("refused") == cluster.events("recalled") == []


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(("function", "after", "given"), SERVER.values(), ids=SERVER.keys())
def test_a_server_killed_at_a_boundary_loses_nothing(
    cluster: Cluster, phased: Cluster, boundary: int, function: str, after: bool, given: str
) -> None:
    call = boundary // 2 if "save" in function else boundary
    fault = Fault(function, call=call, after=after, given=given)
    workers = [cluster.work(name) for name in ("a", "b")]
    cluster.ended(cluster.serve(EveryCheckpoint(), fault), -signal.SIGKILL)
    for process in (cluster.serve(), *workers):
        cluster.ended(process, 0)
    assert cluster.master_digest() == phased.master_digest()
    audit(cluster.run, ROUNDS, {"a", "b"})
    assert cluster.events("damaged") == cluster.events("recalled") == []


def test_a_run_goes_back_before_the_boundaries_and_over_them_again(phased: Cluster, cluster: Cluster) -> None:
    shutil.copytree(phased.run, cluster.run)
    recipes.roll_back(cluster.run, 1)
    for process in (cluster.serve(), cluster.work("a"), cluster.work("b")):
        cluster.ended(process, 0)
    audit(cluster.run, ROUNDS, {"a", "b"})
    assert cluster.events("refused") == []
    assert replayed(cluster.run) == cluster.master_digest()


def test_who_joins_in_a_phase_has_its_heads(cluster: Cluster) -> None:
    """b, which may have 5 ranks at most, misses rounds 2 and 3; a waits for it in the next one."""
    step = "lte.worker.trainer:Trainer.step"
    server = cluster.serve(server__silence_s=600.0)
    a = cluster.work("a", Fault(step, call=11, number=signal.SIGSTOP))
    b = cluster.work("b", Fault(step, call=5, number=signal.SIGTERM), rank=5)
    cluster.ended(b, 128 + signal.SIGTERM)
    cluster.stopped(a)
    joiners = [cluster.work("b", rank=5), cluster.work("c")]
    cluster.until(lambda: len(cluster.events("joined")) == 4, "joiners")
    cluster.wake(a)
    for process in (server, a, *joiners):
        cluster.ended(process, 0)
    assert [line["num_merged"] for line in cluster.lines("round")] == [2, 2, 1, 1, 1, 3]
    assert cluster.events("refused") == []
    audit(cluster.run, ROUNDS, {"a", "b", "c"})


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("dies", ["worker", "server"])
def test_a_warm_start_survives_whoever_is_killed_in_it(
    cluster: Cluster, warm: Cluster, dies: str, call: int
) -> None:
    cluster.settings = warm.settings
    server_dies = [Fault("lte.server.publisher:Publisher.publish", call=call)] if dies == "server" else []
    worker_dies = [Fault(f"{PUSHES}.push", call=call, after=True)] if dies == "worker" else []
    server, a = cluster.serve(*server_dies), cluster.work("a")
    b = cluster.work("b", *worker_dies)
    if server_dies:
        cluster.ended(server, -signal.SIGKILL)
        server = cluster.serve()
    else:
        cluster.ended(b, -signal.SIGKILL)
        b = cluster.work("b")
    for process in (server, a, b):
        cluster.ended(process, 0)
    assert cluster.master_digest() == warm.master_digest()
    audit(cluster.run, ROUNDS, {"a", "b"})
    assert cluster.events("refused") == cluster.events("recalled") == []
