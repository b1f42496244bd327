"""The server is killed at every point of a round: nothing is lost, nothing is merged twice."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
from cluster import ROUNDS, Cluster, Fault, audit

KILLED = {
    "before the first contribution is kept": Fault("lte.server.service:Server._keep", call=5),
    "between two contributions": Fault("lte.server.service:Server._keep", call=5, after=True),
    "before the merge is in the journal": Fault("lte.server.journal:Journal.write", call=3, given="Merged"),
    "in the journal, not yet on disk": Fault(
        "lte.server.journal:Journal.write", call=3, given="Merged", after=True
    ),
    "between journal and publishing": Fault("lte.server.publisher:Publisher.publish", call=3),
    "before one worker has the update": Fault("lte.server.publisher:Publisher._send", call=7, given="Update"),
    "when the update is out": Fault("lte.server.publisher:Publisher.publish", call=3, after=True),
    "before the last update is out": Fault("lte.server.publisher:Publisher.publish", call=ROUNDS),
    "before a checkpoint": Fault("lte.server.checkpoint:save", call=2),
    "in a checkpoint": Fault("lte.server.checkpoint:save_tensors", call=8),
    "before a checkpoint has its name": Fault("lte.server.checkpoint:_name", call=2),
    "after a checkpoint, before old ones go": Fault("lte.server.checkpoint:_name", call=2, after=True),
}


@pytest.mark.parametrize("fault", KILLED.values(), ids=KILLED.keys())
def test_a_killed_server_loses_nothing(cluster: Cluster, undisturbed: str, fault: Fault) -> None:
    workers = [cluster.work(name) for name in ("a", "b")]
    cluster.ended(cluster.serve(fault), -signal.SIGKILL)
    cluster.ended(cluster.serve(), 0)
    for worker in workers:
        cluster.ended(worker, 0)
    assert cluster.master_digest() == undisturbed
    assert [line["version"] for line in cluster.lines("round")] == list(range(1, ROUNDS + 1))
    audit(cluster.run, ROUNDS, {"a", "b"})
    assert cluster.events("damaged") == []


def test_a_contribution_that_came_before_its_round_was_open_is_sent_again(
    cluster: Cluster, undisturbed: str
) -> None:
    """The server is ended in order when it holds a's, not b's. Then a is back before b, so that no round
    is open when it sends that again."""
    kept = "lte.server.service:Server._keep"
    server = cluster.serve(Fault(kept, call=5, after=True, number=signal.SIGTERM))
    a, b = cluster.work("a"), cluster.work("b", Fault("lte.worker.trainer:Trainer.step", call=5))
    cluster.ended(b, -signal.SIGKILL)
    cluster.ended(server, 3)
    cluster.ended(a, 1)
    again = [cluster.serve(), cluster.work("a")]
    cluster.until(lambda: cluster.events("superseded"), "word that no round is open")
    again.append(cluster.work("b"))
    for process in again:
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    assert [line["version"] for line in cluster.lines("round")] == list(range(1, ROUNDS + 1))
    audit(cluster.run, ROUNDS, {"a", "b"})


DIAGNOSED = {
    "when the update is out": Fault("lte.server.publisher:Publisher.publish", call=3, after=True),
    "before it is measured": Fault("lte.server.diagnosis:Diagnosis.measure", call=4),
    "before it is recorded": Fault("lte.server.diagnosis:Diagnosis.measure", call=4, after=True),
    "once it is recorded": Fault("lte.server.service:Server._diagnose", call=3, after=True),
    "before a checkpoint, all recorded": Fault("lte.server.checkpoint:save", call=3),
}


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]
) -> Iterator[list[dict[str, Any]]]:
    """The diagnostics of a run that nothing happened to."""
    cluster = Cluster(tmp_path_factory.mktemp("measured"), settings)
    cluster.serve(log__diagnostics_every=1)
    for name in ("a", "b"):
        cluster.work(name)
    cluster.all_ended()
    yield cluster.lines("diagnostics")
    cluster.close()


@pytest.mark.parametrize("fault", DIAGNOSED.values(), ids=DIAGNOSED.keys())
def test_a_killed_server_makes_up_for_the_diagnostics_that_were_due(
    cluster: Cluster, undisturbed: str, measured: list[dict[str, Any]], fault: Fault
) -> None:
    """A version has one line of them, the one that it would have had."""
    workers = [cluster.work(name) for name in ("a", "b")]
    cluster.ended(cluster.serve(fault, log__diagnostics_every=1), -signal.SIGKILL)
    cluster.ended(cluster.serve(log__diagnostics_every=1), 0)
    for worker in workers:
        cluster.ended(worker, 0)
    assert cluster.master_digest() == undisturbed
    found = cluster.lines("diagnostics")
    assert [line["version"] for line in found] == list(range(1, ROUNDS + 1))
    for line, expected in zip(found, measured, strict=True):
        assert line["tokens"] == expected["tokens"]
        assert line["noise_scale_dense"] == pytest.approx(expected["noise_scale_dense"], rel=1e-4)
        assert line["modules"].keys() == expected["modules"].keys()
        for name, of_module in expected["modules"].items():
            assert line["modules"][name] == pytest.approx(of_module, rel=1e-4, abs=1e-6)
