"""A worker is killed at every point of a round and started again: its contributions are those that it
would have made, and each counts once."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from cluster import ROUNDS, Cluster, Fault, audit

PUSHES = "lte.worker.session:Session"
KILLED = {
    "in its first steps": Fault("lte.worker.trainer:Trainer.step", call=1),
    "between two steps": Fault("lte.worker.trainer:Trainer.step", call=5, after=True),
    "before it encodes": Fault(f"{PUSHES}.push", call=3),
    "between two parts": Fault(f"{PUSHES}._send_parts", call=3, after=True),
    "before its state is saved": Fault("lte.worker.state:save", call=3),
    "while its state is saved": Fault("lte.durable:name", call=3),
    "when its state is saved": Fault("lte.worker.state:save", call=3, after=True),
    "before the push is complete": Fault(f"{PUSHES}._close_parts", call=3),
    "when it has pushed": Fault(f"{PUSHES}.push", call=3, after=True),
    "before it applies the update": Fault("lte.worker.trainer:Trainer.apply", call=3),
    "when it has applied the update": Fault("lte.worker.trainer:Trainer.apply", call=3, after=True),
}


@pytest.mark.parametrize("fault", KILLED.values(), ids=KILLED.keys())
def test_a_killed_worker_goes_on_bit_for_bit(cluster: Cluster, undisturbed: str, fault: Fault) -> None:
    server = cluster.serve()
    other = cluster.work("a")
    cluster.ended(cluster.work("b", fault), -signal.SIGKILL)
    again = cluster.work("b")
    for process in (server, other, again):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    audit(cluster.run, ROUNDS, {"a", "b"})
    assert cluster.events("refused") == []


def test_a_worker_that_is_killed_again_before_its_round_closes_knows_what_is_merged_of_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Its third contribution is sent by two processes, and merged while no third one is there."""
    mode = {"lora__merge": "reset-b", "server__silence_s": 600.0}
    calm = Cluster(tmp_path / "calm", cluster.settings)
    calm.folder.mkdir()
    for process in (calm.serve(**mode), calm.work("a"), calm.work("b")):
        calm.ended(process, 0)
    server = cluster.serve(**mode)
    a = cluster.work("a", Fault("lte.worker.trainer:Trainer.step", call=5, number=signal.SIGSTOP))
    cluster.ended(cluster.work("b", Fault(f"{PUSHES}._close_parts", call=3)), -signal.SIGKILL)
    cluster.ended(cluster.work("b", Fault(f"{PUSHES}._is_stale", given="Receipt")), -signal.SIGKILL)
    cluster.wake(a)
    cluster.until(lambda: len(cluster.lines("round")) >= 3, "third round")
    for process in (cluster.work("b"), server, a):
        cluster.ended(process, 0)
    assert cluster.master_digest() == calm.master_digest()
    audit(cluster.run, ROUNDS, {"a", "b"})
    calm.close()


def test_a_worker_that_lost_its_disk_goes_on_from_what_was_merged_of_it(cluster: Cluster) -> None:
    server = cluster.serve()
    other = cluster.work("a")
    cluster.ended(cluster.work("b", Fault(f"{PUSHES}.push", call=3, after=True)), -signal.SIGKILL)
    shutil.rmtree(cluster.state_of("b"))
    again = cluster.work("b")
    for process in (server, other, again):
        cluster.ended(process, 0)
    audit(cluster.run, ROUNDS, {"a", "b"})
    assert cluster.events("recalled")
    merged = [line["num_merged"] for line in cluster.lines("round")]
    assert merged == [2] * ROUNDS, "it took part in every round, with the heads of before or new ones"


def test_workers_go_on_with_another_optimizer_and_say_whose_moments_begin_anew(cluster: Cluster) -> None:
    """Both leave in the second round, and the server after them."""
    server, leaves = cluster.serve(), Fault("lte.worker.trainer:Trainer.step", call=3, number=signal.SIGTERM)
    for worker in [cluster.work(name, leaves) for name in ("a", "b")]:
        cluster.ended(worker, 128 + signal.SIGTERM)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGTERM)
    cluster.ended(server, 3)
    again = {"optimizer__name": "sgd", "optimizer__momentum": 0.9}
    for process in [cluster.serve(**again), cluster.work("a"), cluster.work("b")]:
        cluster.ended(process, 0)
    for name in ("a", "b"):
        said = (cluster.folder / f"{name}.log").read_text()
        (line,) = [line for line in said.splitlines() if "begin anew" in line]
        assert line.startswith(f"{name}: moments of ")
        assert "the state saved is AdamW's, not SGD with momentum's (" in line
        assert "Traceback" not in said
    audit(cluster.run, ROUNDS, {"a", "b"})
