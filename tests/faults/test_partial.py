"""Processes that stop, hang, wake up, or are there twice."""

from __future__ import annotations

import signal

from cluster import ROUNDS, Cluster, Fault, audit

STEP = "lte.worker.trainer:Trainer.step"
STOP = signal.SIGSTOP


def test_a_straggler_past_the_deadline_is_left_out_and_takes_part_again(cluster: Cluster) -> None:
    """b stops in its third round. The others' merge without it; when it wakes, what it had is owed still."""
    server = cluster.serve(server__grace_s=1.0, server__silence_s=600.0, train__rounds=20)
    a, b = cluster.work("a"), cluster.work("b", Fault(STEP, call=5, number=STOP))
    cluster.until(lambda: 1 in merged(cluster)[2:], "round without b")
    cluster.wake(b)
    for process in (server, a, b):
        cluster.ended(process, 0)
    counts = merged(cluster)
    assert 2 in counts[counts.index(1) :], "b is back"
    audit(cluster.run, 20, {"a", "b"})
    assert cluster.events("left") == []


def test_a_worker_that_was_silent_for_too_long_says_hello_again(cluster: Cluster) -> None:
    """b stops in its third round, and a in its fifth, lest it finish the run before b is back."""
    server = cluster.serve(server__silence_s=4.0, train__rounds=40)
    a = cluster.work("a", Fault(STEP, call=9, number=STOP))
    b = cluster.work("b", Fault(STEP, call=5, number=STOP))
    cluster.until(lambda: "b is gone" in str(cluster.events("left")), "word that b is gone")
    cluster.wake(b)
    cluster.until(lambda: cluster.events("joined").count("b joined") >= 2, "word that b is back")
    cluster.wake(a)
    for process in (server, a, b):
        cluster.ended(process, 0)
    # On a busy machine a may be silent for so long, too, and is taken back all the same.
    assert any(words.startswith("b is gone: no sign of life") for words in cluster.events("left"))
    assert cluster.events("fenced") == []
    counts = merged(cluster)
    assert 2 in counts[counts.index(1) :], "b is back"
    audit(cluster.run, 40, {"a", "b"})


def test_a_ghost_of_a_worker_is_fenced_when_it_wakes(cluster: Cluster, undisturbed: str) -> None:
    server, a = cluster.serve(), cluster.work("a")
    ghost = cluster.work("b", Fault(STEP, call=5, number=STOP))
    cluster.stopped(ghost)
    again = cluster.work("b", Fault(STEP, call=5, number=STOP))
    cluster.until(lambda: cluster.events("left"), "word that the ghost is replaced")
    cluster.wake(ghost)
    cluster.ended(ghost, 1)
    assert "b was replaced by a newer process" in cluster.logs()
    cluster.wake(again)
    for process in (server, a, again):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    audit(cluster.run, ROUNDS, {"a", "b"})


def test_a_ghost_of_a_server_neither_writes_nor_moves_anybody(cluster: Cluster, undisturbed: str) -> None:
    """It hangs with a merge that it has not journaled; its run is taken over and finished; it wakes."""
    ghost = cluster.serve(Fault("lte.server.journal:Journal.write", call=3, given="Merged", number=STOP))
    with_ghost = [cluster.work(name) for name in ("a", "b")]
    cluster.stopped(ghost)
    refused = cluster.serve()
    cluster.ended(refused, 1)
    assert "in use by another server" in cluster.logs()
    for worker in with_ghost[:1]:
        worker.kill()
    other = f"{cluster.address}-2"
    server = cluster.serve(take_over=True, server__address=other)
    workers = [cluster.work(name, address=other) for name in ("a", "b")]
    for process in (server, *workers):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    written = {path: path.read_bytes() for path in cluster.run.rglob("*") if path.is_file()}
    cluster.wake(ghost)
    cluster.ended(ghost, 1)
    assert "generation 2 of the server has taken this run over" in cluster.logs()
    audit(cluster.run, ROUNDS, {"a", "b"})
    now = {path: path.read_bytes() for path in cluster.run.rglob("*") if path.is_file()}
    changed = {path.parent.name for path in now if now[path] != written.get(path)}
    assert changed <= {"journal"}, "at most what no later server reads"


def merged(cluster: Cluster) -> list[int]:
    return [line["num_merged"] for line in cluster.lines("round")]
