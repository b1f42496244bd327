"""Signals of a batch system, and Ctrl-C: everybody saves and leaves, and goes on with the same bits."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest
from cluster import ROUNDS, Cluster, Counted, Fault, audit

STEP, WAIT = "lte.worker.trainer:Trainer.step", "lte.worker.session:Session.next_step"
STOP = signal.SIGSTOP
EVALUATE = "lte.tasks.text:Text.loss"
LEFT = {  # two local steps a round
    "in a round's first step": Fault(STEP, call=5, number=signal.SIGTERM),
    "after it": Fault(STEP, call=5, after=True, number=signal.SIGUSR1),
    "in its last step": Fault(STEP, call=6, number=signal.SIGINT),
    "while it pushes": Fault("lte.worker.session:Session.push", call=3, number=signal.SIGTERM),
    "while it waits": Fault(WAIT, call=4, number=signal.SIGUSR1),
    "when a round has opened": Fault(WAIT, call=4, after=True, number=signal.SIGTERM),
}


@pytest.mark.parametrize("fault", LEFT.values(), ids=LEFT.keys())
def test_a_worker_saves_within_a_round_and_redoes_no_step(
    cluster: Cluster, undisturbed: str, fault: Fault, tmp_path: Path
) -> None:
    counted = Counted(STEP, tmp_path / "steps")
    server = cluster.serve(server__quorum=2)
    other = cluster.work("a")
    cluster.ended(cluster.work("b", fault, counted), 128 + fault.number)
    again = cluster.work("b", counted)
    for process in (server, other, again):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    assert counted.path.stat().st_size == 2 * ROUNDS
    audit(cluster.run, ROUNDS, {"a", "b"})
    assert "b is gone: interrupted" in cluster.events("left")
    assert cluster.events("refused") == cluster.events("recalled") == []


@pytest.mark.parametrize("call", [3, 4], ids=lambda call: f"step {call}")
def test_a_worker_that_is_ahead_of_the_update_saves_that_too(
    cluster: Cluster, tmp_path: Path, call: int
) -> None:
    """Its contribution is in flight then; pushed again, it counts once. Where it has taken no step ahead
    yet, the update comes one earlier than the recipe says: with other bits, but to the same end."""
    overlap = {"train__overlap": True, "train__overlap_steps": 1, "train__local_steps": 3}
    calm = Cluster(tmp_path / "calm", cluster.settings)
    calm.folder.mkdir()
    for process in (calm.serve(**overlap), calm.work("a"), calm.work("b")):
        calm.ended(process, 0)
    counted = Counted(STEP, tmp_path / "steps")
    server, other = cluster.serve(server__quorum=2, **overlap), cluster.work("a")
    fault = Fault(STEP, call=call, number=signal.SIGTERM)
    cluster.ended(cluster.work("b", fault, counted), 128 + signal.SIGTERM)
    for process in (server, other, cluster.work("b", counted)):
        cluster.ended(process, 0)
    assert counted.path.stat().st_size == 3 * ROUNDS
    assert cluster.master_digest() == calm.master_digest() or call == 3
    assert cluster.events("refused") == cluster.events("recalled") == []
    audit(cluster.run, ROUNDS, {"a", "b"})
    calm.close()


def test_what_a_worker_learnt_in_a_round_that_closed_without_it_is_owed(cluster: Cluster) -> None:
    """It goes on with the next round, from the heads that it has; a waits for it in its fifth."""
    server, a = cluster.serve(server__silence_s=600.0), cluster.work("a", Fault(STEP, call=9, number=STOP))
    cluster.ended(cluster.work("b", Fault(STEP, call=5, number=signal.SIGTERM)), 128 + signal.SIGTERM)
    cluster.until(lambda: 1 in [line["num_merged"] for line in cluster.lines("round")], "round without b")
    again = cluster.work("b")
    cluster.until(lambda: cluster.events("joined").count("b joined") == 2, "b")
    cluster.wake(a)
    for process in (server, a, again):
        cluster.ended(process, 0)
    assert cluster.events("refused") == cluster.events("recalled") == []
    audit(cluster.run, ROUNDS, {"a", "b"})
    assert [line["num_merged"] for line in cluster.lines("round")][-1] == 2


def test_what_was_merged_of_a_worker_that_had_left_is_remembered(cluster: Cluster, undisturbed: str) -> None:
    """Its first contribution, which it makes and leaves; a wakes up only then."""
    server = cluster.serve(server__quorum=2, server__silence_s=600.0)
    a = cluster.work("a", Fault(STEP, call=1, number=STOP))
    hears = Fault("lte.worker.session:Session._is_stale", given="Receipt", number=signal.SIGTERM)
    cluster.ended(cluster.work("b", hears), 128 + signal.SIGTERM)
    cluster.wake(a)
    cluster.until(lambda: cluster.lines("round"), "round")
    for process in (cluster.work("b"), server, a):
        cluster.ended(process, 0)
    assert cluster.events("recalled") == []
    assert cluster.master_digest() == undisturbed


@pytest.mark.parametrize(
    ("number", "when"),
    [(signal.SIGTERM, "in the run"), (signal.SIGUSR1, "in the run"), (signal.SIGINT, "at its end")],
)
def test_an_evaluation_is_given_up(
    cluster: Cluster, undisturbed: str, number: int, when: str, tmp_path: Path
) -> None:
    """It has many batches before it, and leaves at the second; the next server does it all."""
    counted = Counted(EVALUATE, tmp_path / "batches")
    settings = {
        "eval__every": 2 if when == "in the run" else 0,
        "eval__tokens": 1024,
        "eval__final_tokens": 0,
    }
    fault = Fault(EVALUATE, call=2, number=number)
    workers = [cluster.work(name) for name in ("a", "b")]
    cluster.ended(cluster.serve(fault, counted, **settings), 3)
    assert counted.path.stat().st_size == 2
    assert cluster.lines("eval") == cluster.lines("done") == []
    assert cluster.events("stopped")[0].startswith(f"stopped by {signal.Signals(number).name}")
    if number != signal.SIGUSR1 or when == "at its end":  # else they wait for it
        for worker in workers:
            cluster.ended(worker, 0 if when == "at its end" else 1)
        workers = [] if when == "at its end" else [cluster.work(name) for name in ("a", "b")]
    for process in [cluster.serve(**settings), *workers]:
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    assert Counter(line["version"] for line in cluster.lines("eval"))[ROUNDS] == 1
    audit(cluster.run, ROUNDS, {"a", "b"})


AT_ONCE = {
    "a server that waits": ("server", "lte.transport.zmq:ZmqServer.receive"),
    "a server that merges": ("server", "lte.server.master:Master.merge"),
    "a server that saves": ("server", "lte.server.store:Store.save"),
    "a server that evaluates": ("server", EVALUATE),
    "a worker that trains": ("worker", EVALUATE),
    "a worker that encodes": ("worker", "lte.worker.trainer:Trainer._encode_B"),
    "a worker that saves": ("worker", "lte.worker.state:save"),
    "a worker that waits": ("worker", WAIT),
}


@pytest.mark.parametrize(("role", "function"), AT_ONCE.values(), ids=AT_ONCE.keys())
def test_a_second_ctrl_c_ends_at_once(cluster: Cluster, role: str, function: str) -> None:
    """The kernel does it: no handler, no `finally` and no other thread keeps the process."""
    once = function.endswith("Store.save")
    fault = Fault(function, call=1 if once else 2, numbers=(signal.SIGINT, signal.SIGTERM, signal.SIGINT))
    server = cluster.serve(*([fault] if role == "server" else []))
    a, _ = cluster.work("a"), cluster.work("b", *([fault] if role == "worker" else []))
    ends = server if role == "server" else cluster.processes[-1]
    cluster.ended(ends, -signal.SIGINT)
    if role == "worker":
        for process in (cluster.work("b"), server, a):
            cluster.ended(process, 0)
