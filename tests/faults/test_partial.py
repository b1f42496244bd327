"""Processes that stop, hang, wake up, or are there twice."""

from __future__ import annotations

import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from cluster import ROUNDS, Cluster, Fault, Gate, Wait, audit

from lte.transport import keys

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


def test_a_worker_whose_place_was_taken_meanwhile_joins_anew(cluster: Cluster) -> None:
    """c takes the place of b and hangs in turn: the run is below its quorum until b is back."""
    server = cluster.serve(server__quorum=2, server__silence_s=4.0)
    a, b = cluster.work("a"), cluster.work("b", Fault(STEP, call=5, number=STOP))
    cluster.until(lambda: cluster.events("left"), "word that b is gone")
    c = cluster.work("c", Fault(STEP, number=STOP))
    cluster.until(lambda: "c joined" in cluster.events("joined"), "c")
    cluster.wake(b)
    for process in (server, a, b):
        cluster.ended(process, 0)
    c.kill()
    assert "another has taken its place meanwhile; joining anew" in cluster.logs()
    audit(cluster.run, ROUNDS, {"a", "b"})


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


@pytest.mark.parametrize("with_keys", [False, True], ids=["without keys", "with one key"])
def test_of_two_workers_with_one_id_the_newer_goes_on(
    cluster: Cluster, undisturbed: str, tmp_path: Path, with_keys: bool
) -> None:
    """Both are started at once, with one folder for their state."""
    of_server, of_worker = {}, dict[str, dict[str, Path]]()
    if with_keys:
        public = {name: keys.create(tmp_path / name).public for name in ("server", "a", "b")}
        (tmp_path / "allow").write_text("".join(f"{name} {public[name]}\n" for name in ("a", "b")))
        of_server = {"server__key": str(tmp_path / "server.secret"), "server__allow": str(tmp_path / "allow")}
        of_server["server__address"] = "tcp://127.0.0.1:*"
        known = {"server_key": tmp_path / "server.public"}
        of_worker = {name: {"key": tmp_path / f"{name}.secret", **known} for name in ("a", "b")}
    gate = Gate(tmp_path / "gate")
    server = cluster.serve(**of_server)
    cluster.until(lambda: cluster.events("started"), "server")
    address = cluster.events("started")[0].rpartition(" ")[2]
    a = cluster.work("a", Wait(STEP, call=5, gate=gate), address=address, **of_worker.get("a", {}))
    both = [cluster.work("b", address=address, **of_worker.get("b", {})) for _ in range(2)]
    fenced = cluster.first_ended(both)
    cluster.ended(fenced, 1)
    # Whichever it meets first: the server, or its successor's state.
    words = r"^lte\.errors\.\w+: .*(b was replaced by a newer process|a newer process of this worker goes on)"
    assert len(re.findall(words, logged(cluster, "b"), re.MULTILINE)) == 1
    gate.open()
    for process in {server, a, *both} - {fenced}:
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    audit(cluster.run, ROUNDS, {"a", "b"})


CONNECT = "lte.transport:connect"
GOES_ON = {  # where b waits while its successor reads; where it stops then; where a waits, if not for b
    "none, and one is held": (
        Wait(CONNECT),
        Fault("lte.worker.session:Session._is_stale", given="Receipt", number=STOP),
        Wait(STEP),
    ),
    "none, and one is merged": (Wait(CONNECT), Fault(STEP, call=3, number=STOP), None),
    "none, and two are merged": (Wait(CONNECT), Fault(STEP, call=5, number=STOP), None),
    "one, and two more are merged": (Wait(STEP, call=3), Fault(STEP, call=7, number=STOP), None),
}


@pytest.mark.parametrize(("waits", "stops", "of_a"), GOES_ON.values(), ids=GOES_ON.keys())
def test_a_successor_goes_on_from_the_last_state_of_whom_it_fences(
    cluster: Cluster, undisturbed: str, tmp_path: Path, waits: Wait, stops: Fault, of_a: Wait | None
) -> None:
    """It reads what state there is of b, and says Hello when b has contributed once more, or twice."""
    of_b, of_successor, until = (Gate(tmp_path / name) for name in ("b", "successor", "a"))
    server = cluster.serve()
    a = cluster.work("a", *([replace(of_a, gate=until)] if of_a else []))
    b = cluster.work("b", replace(waits, gate=of_b), stops)
    cluster.until(of_b.reached.exists, "b")
    successor = cluster.work("b", Wait(CONNECT, gate=of_successor))
    cluster.until(of_successor.reached.exists, "successor that has read")
    of_b.open()
    cluster.stopped(b)
    of_successor.open()
    cluster.until(lambda: cluster.events("left"), "word that b is replaced")
    cluster.wake(b)
    cluster.ended(b, 1)
    if of_a:
        until.open()
    for process in (server, a, successor):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    assert cluster.events("recalled") == []
    audit(cluster.run, ROUNDS, {"a", "b"})


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("lte.worker.state:save", "b was replaced by a newer process"),
        ("lte.durable:name", "a newer process of this worker goes on"),
    ],
    ids=["before it saves its state", "before its state has its name"],
)
def test_a_ghost_of_a_worker_does_not_spoil_the_state_of_its_successor(
    cluster: Cluster, undisturbed: str, where: str, words: str
) -> None:
    """It wakes when its successor was killed in the round after."""
    server, a = cluster.serve(), cluster.work("a")
    ghost = cluster.work("b", Fault(where, call=3, number=STOP))
    cluster.stopped(ghost)
    successor = cluster.work("b", Fault(STEP, call=3))
    cluster.ended(successor, -signal.SIGKILL)
    cluster.wake(ghost)
    cluster.ended(ghost, 1)
    assert words in logged(cluster, "b")
    for process in (server, a, cluster.work("b")):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    assert cluster.events("recalled") == []
    audit(cluster.run, ROUNDS, {"a", "b"})


STARTS = {
    "when it has read the generation": Wait("lte.server.folder:read_generation", after=True),
    "before it rewrites the records": Wait("lte.track:Records.__init__"),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS.keys())
def test_of_two_servers_that_take_a_run_over_at_once_one_is_refused(
    cluster: Cluster, undisturbed: str, tmp_path: Path, start: Wait
) -> None:
    """And one that comes later fences the first."""
    replaced = cluster.serve(server__silence_s=500.0)
    stopped = [cluster.work(name, Fault(STEP, call=5, number=STOP)) for name in ("a", "b")]
    for worker in stopped:
        cluster.stopped(worker)
    gate = Gate(tmp_path / "gate")
    address = {number: f"{cluster.address}-{number}" for number in (1, 2, 3)}
    first = cluster.serve(replace(start, gate=gate), take_over=True, server__address=address[1])
    cluster.until(gate.reached.exists, "server that starts")
    cluster.ended(cluster.serve(take_over=True, server__address=address[2]), 1)
    assert "another server is starting on it; wait for it, or end it" in logged(cluster, "server")
    gate.open()
    cluster.ended(replaced, 1)
    cluster.until(lambda: len(cluster.events("started")) == 2, "server that has started")
    third = cluster.serve(take_over=True, server__address=address[3])
    cluster.ended(first, 1)
    assert "generation 3 of the server has taken this run over from generation 2" in logged(cluster, "server")
    for worker in stopped:
        worker.kill()
    for process in (third, *(cluster.work(name, address=address[3]) for name in ("a", "b"))):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    assert [line["version"] for line in cluster.lines("round")] == list(range(1, ROUNDS + 1))
    audit(cluster.run, ROUNDS, {"a", "b"})


def logged(cluster: Cluster, name: str) -> str:
    return (cluster.folder / f"{name}.log").read_text()


def merged(cluster: Cluster) -> list[int]:
    return [line["num_merged"] for line in cluster.lines("round")]
