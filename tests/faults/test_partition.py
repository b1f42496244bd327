"""The network is cut between the machines of a run, and heals."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from cluster import ROUNDS, Cluster, Fault, Gate, Run, Scripted, Wait, audit, replayed
from namespaces import HUB_ADDRESS, Commands, Inside, Network, run, star

from lte import wire
from lte.transport import zmq
from lte.transport.zmq import ZmqServer, ZmqWorker

ADDRESS = f"tcp://{HUB_ADDRESS}:5555"
STEP = "lte.worker.trainer:Trainer.step"
A, B = 0, 1
"""Leaves."""
MERGED = "lte.server.master:Master.requantize"
BACK_AT = 6
"""The round in which b is heard again, where it was cut off in the third."""

SILENT = [2, 2, 1, 1, 1, 1, 2, 2]
"""How many contributions each round merges then."""

Cut = Callable[[Network, int], Commands]
CUTS: dict[str, tuple[Cut, Cut]] = {
    "at the workers' end": (Network.down, Network.up),
    "at the server's end": (Network.hub_down, Network.hub_up),
    "in what workers say": (Network.mute, Network.unmute),
    "in what workers hear": (Network.deafen, Network.undeafen),
}


@dataclass(frozen=True)
class HangsUpSoon:
    """TCP gives a connection up that is not acknowledged for half a second, instead of bridging the cut."""

    def install(self) -> None:
        zmq._UNACKNOWLEDGED_MS = 500


@dataclass(frozen=True)
class CutAtPart:
    """The process cuts its network when it is to send a certain part of what leads on from a version."""

    version: int
    index: int
    commands: Commands

    def install(self) -> None:
        for owner in (ZmqWorker, ZmqServer):
            self._watch(owner)

    def _watch(self, owner: Any) -> None:
        send, done = owner.send, False

        def cutting(endpoint: Any, *arguments: Any) -> None:
            nonlocal done
            message, _ = wire.decode(arguments[-1])
            is_part = isinstance(message, wire.Part)
            if is_part and (message.version, message.index) == (self.version, self.index) and not done:
                done = True
                run(self.commands)
            send(endpoint, *arguments)

        owner.send = cutting


@dataclass(frozen=True)
class SmallParts:
    """What is sent is cut smaller than settings allow."""

    def install(self) -> None:
        in_parts = wire.in_parts
        wire.in_parts = lambda blobs, part_bytes, make: in_parts(blobs, 512, make)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with star(num_leaves=2) as network:
        yield network


@dataclass
class Site:
    """A cluster whose server is at the hub, and whose workers a and b are at leaves."""

    cluster: Cluster
    network: Network

    def serve(self, *scripts: Any, **settings: Any) -> BaseProcess:
        settings = {"server__address": ADDRESS, "server__insecure": True, **settings}
        return self.cluster.serve(Inside(self.network.hub), *scripts, **settings)

    def work(self, worker_id: str, *scripts: Any) -> BaseProcess:
        inside = Inside(self.network.leaves[(A, B)["ab".index(worker_id)]])
        return self.cluster.work(worker_id, inside, *scripts, address=ADDRESS)


@pytest.fixture
def site(cluster: Cluster, network: Network) -> Site:
    return Site(cluster, network)


def merged(cluster: Cluster) -> list[int]:
    return [line["num_merged"] for line in cluster.lines("round")]


def is_connected(process: BaseProcess) -> bool:
    """Whether TCP, where this process runs, believes in a connection to or from the server."""
    lines = Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[3] == "01" for line in lines)


def without_b(site: Site, leave: Scripted, back: Callable[[BaseProcess], None]) -> list[int]:
    """b leaves in its third round, and is back in the sixth. Returns how many each round merged."""
    cluster = site.cluster
    gate = Gate(cluster.folder / "gate")
    server = site.serve(server__silence_s=2.0, train__rounds=8)
    a = site.work("a", Wait(STEP, call=2 * BACK_AT - 1, gate=gate))
    cluster.until(lambda: cluster.events("joined"), "word of a, which has the first slot")
    b = site.work("b", leave)
    cluster.until(gate.reached.exists, "round that a holds up")
    back(b)
    cluster.until(lambda: cluster.events("joined").count("b joined") == 2, "word that b is back")
    gate.open()
    for process in (server, a, b):
        cluster.ended(process, 0)
    assert cluster.events("fenced") == cluster.events("damaged") == []
    audit(cluster.run, 8, {"a", "b"})
    assert replayed(cluster.run) == cluster.master_digest()
    return merged(cluster)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any], network: Network) -> str:
    """Digest of the master where b was stopped meanwhile, over a good network."""
    cluster = Cluster(tmp_path_factory.mktemp("stopped"), settings)
    stop = Fault(STEP, call=5, number=signal.SIGSTOP)
    try:
        assert without_b(Site(cluster, network), stop, cluster.wake) == SILENT
        return cluster.master_digest()
    finally:
        cluster.close()


@pytest.mark.parametrize("end", ["at the workers' end", "in what workers say"])
def test_the_others_go_on_without_a_worker_that_is_cut_off_and_take_it_back(
    site: Site, stopped: str, end: str
) -> None:
    """Bit for bit as if it had been stopped for so long."""
    sever, mend = (each(site.network, B) for each in CUTS[end])
    assert without_b(site, Run(STEP, call=5, commands=sever), lambda b: run(mend)) == SILENT
    assert site.cluster.master_digest() == stopped


def test_a_worker_that_hears_nothing_is_taken_back(site: Site) -> None:
    """TCP has it say a little more, which is not acknowledged to it: maybe a whole contribution."""
    leave = Run(STEP, call=5, commands=site.network.deafen(B))
    counts = without_b(site, leave, lambda b: run(site.network.undeafen(B)))
    assert counts in (SILENT, [2, 2, 2, *SILENT[3:]])


@pytest.mark.parametrize(
    ("cut", "tcp"),
    [(CUTS["at the server's end"], ()), *((cut, (HangsUpSoon(),)) for cut in CUTS.values())],
    ids=["that TCP bridges", *CUTS.keys()],
)
def test_a_cut_that_is_shorter_than_everybodys_patience_changes_no_bit(
    site: Site, undisturbed: str, cut: tuple[Cut, Cut], tcp: tuple[HangsUpSoon, ...]
) -> None:
    """The server is cut off from all when it has merged the third version and is to publish it."""
    cluster, network = site.cluster, site.network
    sever, mend = ([*each(network, A), *each(network, B)] for each in cut)
    server = site.serve(*tcp, Run(MERGED, call=3, after=True, commands=sever), server__silence_s=500.0)
    workers = [site.work(name, *tcp) for name in ("a", "b")]
    cluster.until(lambda: len(merged(cluster)) == 3, "version that nobody is told of")
    if tcp:
        cluster.until(lambda: not any(map(is_connected, workers)), "end of the workers' connections")
        cluster.until(lambda: not is_connected(server), "end of the server's connections")
    run(mend)
    for process in (server, *workers):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    assert cluster.events("left") == []
    audit(cluster.run, ROUNDS, {"a", "b"})


@pytest.mark.parametrize("who", ["a worker", "the server"])
def test_a_cut_between_two_parts_changes_no_bit(site: Site, undisturbed: str, who: str) -> None:
    """Whoever sends a's third contribution, or the version after it, takes the cable down between parts."""
    cluster, network = site.cluster, site.network
    is_cut = cluster.folder / "cut"
    touch = ("touch", str(is_cut))
    by_worker = CutAtPart(version=2, index=2, commands=(*network.down(A), touch))
    by_server = CutAtPart(version=3, index=2, commands=(*network.hub_down(A), touch))
    scripts = {"a": (by_worker,) * (who == "a worker"), "server": (by_server,) * (who == "the server")}
    each = (HangsUpSoon(), SmallParts())
    server = site.serve(*each, *scripts["server"], server__silence_s=500.0)
    a, b = site.work("a", *each, *scripts["a"]), site.work("b", *each)
    cluster.until(is_cut.exists, "cut")
    cluster.until(lambda: not is_connected(a), "end of a's connection")
    run(network.up(A) if who == "a worker" else network.hub_up(A))
    for process in (server, a, b):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    audit(cluster.run, ROUNDS, {"a", "b"})
