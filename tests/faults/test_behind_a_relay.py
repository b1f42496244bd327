"""Runs whose workers are behind a relay: it, the server and the link between them break at scripted points.

No bit of the master depends on it, and nothing is merged twice."""

from __future__ import annotations

import random
import signal
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster import ROUNDS, Cluster, Fault, audit
from relay import Figures, Meter, downloads
from test_frames import FATES, Garble, Impatient

from lte.transport import Frames, Peer, envelope
from lte.transport.zmq import ZmqServer

PARTS = {"compress__part_bytes": 16384, "server__silence_s": 30.0}
"""Several parts a message, so that some of them may be lost."""


def test_a_run_behind_a_relay_is_the_same(cluster: Cluster, undisturbed: str) -> None:
    cluster.relay()
    processes = [cluster.serve(), *(cluster.work(name, address=cluster.relay_address) for name in ("a", "b"))]
    for process in processes:
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    audit(cluster.run, ROUNDS, {"a", "b"})
    assert (cluster.folder / "relay.log").read_text() == "", "nothing was missing or damaged"


def test_some_are_behind_a_relay_and_some_are_not(cluster: Cluster, undisturbed: str) -> None:
    relay = cluster.relay()
    processes = [cluster.serve(), cluster.work("a"), cluster.work("b", address=cluster.relay_address)]
    for process in processes:
        cluster.ended(process, 0)
    relay.terminate()
    cluster.ended(relay, 0)
    assert cluster.master_digest() == undisturbed


KILLED = {
    "as the first worker asks to join": Fault("lte.relay:Relay._pass_up", call=1),
    "before it hands out a part of the model": Fault("lte.relay:Relay._hand_out", call=4),
    "before it passes on what it heard in a round": Fault("lte.relay:Relay._pass_up", call=25),
    "after that": Fault("lte.relay:Relay._pass_up", call=26, after=True),
    "before it hands out a part of an update": Fault("lte.relay:Relay._hand_out", call=40),
    "after that, to one worker": Fault("lte.relay:Relay._hand_out", call=45, after=True),
    "as it takes a piece from its shelf": Fault("lte.transport.shelf:Shelf.take", call=12),
}


@pytest.mark.parametrize("fault", KILLED.values(), ids=KILLED.keys())
def test_a_killed_relay_loses_nothing(cluster: Cluster, undisturbed: str, fault: Fault) -> None:
    workers = [cluster.work(name, Impatient(), address=cluster.relay_address) for name in ("a", "b")]
    server = cluster.serve(**PARTS)
    cluster.ended(cluster.relay(fault), -signal.SIGKILL)
    cluster.relay()
    for process in (server, *workers):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    audit(cluster.run, ROUNDS, {"a", "b"})


RESTARTED = {
    "between two contributions": Fault("lte.server.service:Server._keep", call=5, after=True),
    "between journal and publishing": Fault("lte.server.publisher:Publisher.publish", call=3),
    "before one worker has the update": Fault("lte.server.publisher:Publisher._send", call=7, given="Update"),
    "when the update is out": Fault("lte.server.publisher:Publisher.publish", call=3, after=True),
}


@pytest.mark.parametrize("fault", RESTARTED.values(), ids=RESTARTED.keys())
def test_a_server_that_is_killed_behind_a_relay_loses_nothing(
    cluster: Cluster, undisturbed: str, fault: Fault
) -> None:
    """The next generation is told nothing of what the relay keeps, and sends what it names."""
    cluster.relay()
    workers = [cluster.work(name, address=cluster.relay_address) for name in ("a", "b")]
    cluster.ended(cluster.serve(fault), -signal.SIGKILL)
    cluster.ended(cluster.serve(), 0)
    for worker in workers:
        cluster.ended(worker, 0)
    assert cluster.master_digest() == undisturbed
    audit(cluster.run, ROUNDS, {"a", "b"})
    assert (cluster.folder / "relay.log").read_text() == "", "nothing was missing or damaged"


@pytest.mark.parametrize("fate", FATES)
def test_bad_links_to_a_relay_change_no_bit(cluster: Cluster, undisturbed: str, fate: str) -> None:
    """Any message, both ways; of the pieces that the relay keeps few or none, see below."""
    cluster.relay()
    server = cluster.serve(FATES[fate], **PARTS)
    workers = [cluster.work(name, Impatient(), address=cluster.relay_address) for name in ("a", "b")]
    for process in (server, *workers):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    audit(cluster.run, ROUNDS, {"a", "b"})


@dataclass(frozen=True)
class Pieces:
    """One in four of the pieces that leave the server, to be kept by the relay, meets this fate."""

    fate: str

    def install(self) -> None:
        send, garble, chance = ZmqServer.send, Garble(self.fate, every=1), random.Random(0)

        def faulty_send(server: ZmqServer, peer: Peer, frames: Frames) -> None:
            line = deque([(peer, frames)])
            is_piece = len(frames) > 1 and len(frames[-1]) >= envelope.LEAST_BYTES
            if is_piece and not chance.randrange(4):
                line.clear()
                garble.meet((peer, frames), line, chance)
            if not line:  # it left all the same: not sent would mean that the connection is gone
                server.sent_bytes += sum(memoryview(frame).nbytes for frame in frames)
            for met in line:
                send(server, *met)

        ZmqServer.send = faulty_send  # type: ignore[method-assign]


@pytest.mark.parametrize("fate", ["lost", "damaged", "cut short"])
def test_what_does_not_reach_the_relay_whole_is_not_on_its_shelf(
    cluster: Cluster, undisturbed: str, fate: str
) -> None:
    """It finds out, by its digest or as another worker wants it, and the piece is sent again."""
    cluster.relay()
    server = cluster.serve(Pieces(fate), **PARTS)
    workers = [cluster.work(name, Impatient(), address=cluster.relay_address) for name in ("a", "b")]
    for process in (server, *workers):
        cluster.ended(process, 0)
    assert "a message was dropped, as part of it is not here" in (cluster.folder / "relay.log").read_text()
    assert cluster.master_digest() == undisturbed
    audit(cluster.run, ROUNDS, {"a", "b"})


@pytest.mark.parametrize("shelf_bytes", [0, 5_000, 40_000])
def test_a_shelf_that_is_too_small_changes_no_bit(
    cluster: Cluster, undisturbed: str, shelf_bytes: int
) -> None:
    """For anything; for one part; for a whole update."""
    cluster.relay(shelf_bytes=shelf_bytes)
    server = cluster.serve(**PARTS)
    workers = [cluster.work(name, address=cluster.relay_address) for name in ("a", "b")]
    for process in (server, *workers):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    assert (cluster.folder / "relay.log").read_text() == "", "the server knows what is not there"


def test_late_joiners_get_the_model_through_the_relay_and_it_crosses_once(cluster: Cluster) -> None:
    """c and d join in the middle of the run, at the same version, and are merged."""
    stopped = Fault("lte.worker.trainer:Trainer.step", call=6, number=signal.SIGSTOP)
    server = cluster.serve(
        server__address="tcp://127.0.0.1:*", server__silence_s=500.0, compress__part_bytes=16384
    )
    posted = cluster.run / "address"
    cluster.until(posted.exists, "server")
    with Meter(int(posted.read_text().rpartition(":")[2])) as meter:
        cluster.relay(server=f"tcp://127.0.0.1:{meter.port}")
        a = cluster.work("a", stopped, address=cluster.relay_address)
        b = cluster.work("b", address=cluster.relay_address)
        cluster.stopped(a)
        joiners, crossed = [], []
        for name in ("c", "d"):
            before, log = meter.down_bytes, cluster.folder / f"{name}.log"
            joiners.append(cluster.work(name, address=cluster.relay_address))
            # Which it says with the whole model in hand.
            cluster.until(lambda log=log: log.exists() and " joined " in log.read_text(), name)
            crossed.append(meter.down_bytes - before)
        cluster.wake(a)
        for process in (server, a, b, *joiners):
            cluster.ended(process, 0)
    assert crossed[1] < crossed[0] / 4, "its Welcome, and names of what the relay has kept"
    audit(cluster.run, ROUNDS, {"a", "b", "c", "d"})
    assert max(line["num_merged"] for line in cluster.lines("round")) == 4


def test_eight_workers_download_each_update_once(tmp_path: Path, settings: dict[str, Any]) -> None:
    """By what a TCP proxy before the server counts; with and without a relay the master is the same. What the
    records say travelled is that, too."""
    # What is each worker's own (its Welcome, receipts, names of what is held) is a kilobyte or two a round,
    # of which a smaller model would make too much.
    larger = {"model.width": 256, "model.mlp_width": 1024, "train.rounds": 6, "train.local_steps": 1}
    # Signs of life are a matter of time, not of rounds: next to none of them.
    own = {"train.workers": 8, "worker.heartbeat_s": 60.0, "server.silence_s": 600.0}
    runs = {}
    for name in ("direct", "relayed"):
        cluster = Cluster(tmp_path / name, settings | larger | own)
        cluster.folder.mkdir()
        try:
            runs[name] = _metered(cluster, by_relay=name == "relayed")
        finally:
            cluster.close()
    direct, relayed = runs["direct"], runs["relayed"]
    assert relayed.master_digest == direct.master_digest
    assert downloads(direct, relayed, workers=8) < 1.1
    for figures in runs.values():
        assert figures.recorded_down_bytes == pytest.approx(figures.down_bytes, rel=0.03)
        assert figures.recorded_up_bytes == pytest.approx(figures.up_bytes, rel=0.03)


def _metered(cluster: Cluster, *, by_relay: bool) -> Figures:
    """Run eight workers of a site to the end."""
    server = cluster.serve(server__address="tcp://127.0.0.1:*")
    posted = cluster.run / "address"
    cluster.until(posted.exists, "server")
    with Meter(int(posted.read_text().rpartition(":")[2])) as meter:
        link = f"tcp://127.0.0.1:{meter.port}"
        if by_relay:
            cluster.relay(server=link)
        site = cluster.relay_address if by_relay else link
        for process in (server, *(cluster.work(f"w{n}", address=site) for n in range(8))):
            cluster.ended(process, 0)
        (done,) = cluster.lines("done")
        recorded = done["uplink_bytes"], done["downlink_bytes"]
        return Figures(meter.up_bytes, meter.down_bytes, *recorded, done["master_digest"])
