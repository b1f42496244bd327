"""What the server alone knows of past merges, its outer optimizer's moments and the master's average, is
the same to the bit after any fault; so is what the last version publishes of it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from cluster import ROUNDS, Cluster, Fault, audit, replayed

from lte import quantize
from lte.server import checkpoint, journal

OUTER = {
    "outer.name": "adam",
    "outer.lr": 0.01,
    "outer.dense": True,
    "outer.ema": 0.8,
    "outer.publish_ema": True,
    "server.keep_checkpoints": 1000,
}
KILLED = {
    "in the journal, not yet on disk": Fault(
        "lte.server.journal:Journal.write", call=3, given="Merged", after=True
    ),
    "between journal and publishing": Fault("lte.server.publisher:Publisher.publish", call=5),
    "before a checkpoint has its name": Fault("lte.server.checkpoint:_name", call=2),
}


@pytest.fixture(scope="module")
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | OUTER


def end_of(cluster: Cluster) -> dict[str, Any]:
    """Digests of what the last checkpoint holds, by group, and the last losses. Merged factors stand under
    the names of workers, whose slots depend on who came first."""
    newest: Path = checkpoint.newest(cluster.run)
    _, state = checkpoint.load(newest)
    assert {"ema", "momentum"} <= state.keys()
    assert any(name.endswith("/squares") for name in state["momentum"])
    digests = {
        group: quantize.digest(sorted(tensors.items()))
        for group, tensors in state.items()
        if group != "merged"
    }
    (done,) = cluster.lines("done")
    return digests | {key: done[key] for key in ("loss", "loss_master", "loss_ema")}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> dict[str, Any]:
    """The end of a run that nothing happened to."""
    cluster = Cluster(tmp_path_factory.mktemp("calm"), settings)
    try:
        for process in [cluster.serve(), *(cluster.work(name) for name in ("a", "b"))]:
            cluster.ended(process, 0)
        return end_of(cluster)
    finally:
        cluster.close()


@pytest.mark.parametrize("fault", KILLED.values(), ids=KILLED.keys())
def test_a_killed_server_keeps_moments_and_average(
    cluster: Cluster, calm: dict[str, Any], fault: Fault
) -> None:
    workers = [cluster.work(name) for name in ("a", "b")]
    cluster.ended(cluster.serve(fault), -signal.SIGKILL)
    cluster.ended(cluster.serve(), 0)
    for worker in workers:
        cluster.ended(worker, 0)
    assert end_of(cluster) == calm
    audit(cluster.run, ROUNDS, {"a", "b"})


def test_the_last_version_is_the_average_though_its_server_was_killed(
    cluster: Cluster, calm: dict[str, Any]
) -> None:
    for name in ("a", "b"):
        cluster.work(name)
    cluster.ended(
        cluster.serve(Fault("lte.server.publisher:Publisher.publish", call=ROUNDS)), -signal.SIGKILL
    )
    cluster.ended(cluster.serve(), 0)
    assert end_of(cluster) == calm


def test_the_journal_alone_leads_to_what_was_published_last(cluster: Cluster) -> None:
    """A replay checks the digest of the base after every version, the average's too."""
    for process in [cluster.serve(), *(cluster.work(name) for name in ("a", "b"))]:
        cluster.ended(process, 0)
    assert replayed(cluster.run) == cluster.master_digest()
    merged = [r for segment in journal.history(cluster.run) for r in segment if isinstance(r, journal.Merged)]
    assert merged[-1].version == ROUNDS
    assert merged[-1].base_digest == checkpoint.progress(checkpoint.newest(cluster.run)).base_digest
