"""Frames are lost, doubled, reordered, held back, cut short and damaged on their way, by script."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
from cluster import ROUNDS, Cluster, Script, audit

from lte.transport import Frames, Peer
from lte.transport.zmq import ZmqServer
from lte.worker import session


@dataclass(frozen=True)
class Garble:
    """Every so many frames that come to the server or leave it meet this fate, by a seed."""

    fate: str
    seed: int = 0
    every: int = 20

    def install(self) -> None:
        receive, send, chance = ZmqServer.receive, ZmqServer.send, random.Random(self.seed)
        coming = deque[tuple[Peer, Frames]]()
        leaving = deque[tuple[Peer, Frames]]()

        def faulty_receive(server: ZmqServer, timeout_s: float | None) -> tuple[Peer, Frames] | None:
            while (received := receive(server, 0 if coming else timeout_s)) is not None:
                self.meet(received, coming, chance)
                if coming:
                    break
                timeout_s = 0
            return coming.popleft() if coming else None

        def faulty_send(server: ZmqServer, peer: Peer, frames: Frames) -> None:
            self.meet((peer, frames), leaving, chance)
            while leaving:
                send(server, *leaving.popleft())

        ZmqServer.receive = faulty_receive  # type: ignore[method-assign]
        ZmqServer.send = faulty_send  # type: ignore[method-assign]

    def meet(self, met: tuple[Peer, Frames], line: deque[Any], chance: random.Random) -> None:
        peer, frames = met
        if chance.randrange(self.every):
            line.append(met)
        elif self.fate == "doubled":
            line.extend([met, met])
        elif self.fate == "damaged":
            line.append((peer, [*frames[:-1], _damaged(frames[-1], chance)]))
        elif self.fate == "cut short":
            line.append((peer, [*frames[:-1], bytes(frames[-1])[: chance.randrange(len(frames[-1]))]]))
        else:
            assert self.fate == "lost"


@dataclass(frozen=True)
class Reorder:
    """Every so many frames that come to the server or leave it go behind some that come after them."""

    seed: int = 0
    every: int = 20

    def install(self) -> None:
        receive, send, chance = ZmqServer.receive, ZmqServer.send, random.Random(self.seed)
        held: dict[str, list[tuple[int, tuple[Peer, Frames]]]] = {"in": [], "out": []}

        def due(way: str) -> list[tuple[Peer, Frames]]:
            """Those held back that enough others have overtaken."""
            held[way] = [(left - 1, met) for left, met in held[way]]
            ready = [met for left, met in held[way] if left <= 0]
            held[way] = [(left, met) for left, met in held[way] if left > 0]
            return ready

        ready = deque[tuple[Peer, Frames]]()

        def faulty_receive(server: ZmqServer, timeout_s: float | None) -> tuple[Peer, Frames] | None:
            if ready:
                return ready.popleft()
            received = receive(server, timeout_s)
            if received is None:
                return None
            if not chance.randrange(self.every):
                held["in"].append((chance.randrange(1, 5), (received[0], [bytes(f) for f in received[1]])))
                return None
            ready.extend(due("in"))
            return received

        def faulty_send(server: ZmqServer, peer: Peer, frames: Frames) -> None:
            if not chance.randrange(self.every):
                held["out"].append((chance.randrange(1, 5), (peer, frames)))
                return
            send(server, peer, frames)
            for met in due("out"):
                send(server, *met)

        ZmqServer.receive = faulty_receive  # type: ignore[method-assign]
        ZmqServer.send = faulty_send  # type: ignore[method-assign]


@dataclass(frozen=True)
class Late:
    """All frames that come to the server or leave it are held back until so many more want to pass, and
    go on in order; the last ones when the server has waited in vain."""

    by: int = 4

    def install(self) -> None:
        receive, send = ZmqServer.receive, ZmqServer.send
        coming = deque[tuple[Peer, Frames]]()
        leaving = deque[tuple[Peer, Frames]]()

        def late_receive(server: ZmqServer, timeout_s: float | None) -> tuple[Peer, Frames] | None:
            while len(coming) <= self.by:
                received = receive(server, timeout_s)
                if received is None:
                    break
                coming.append((received[0], [bytes(frame) for frame in received[1]]))
            if len(coming) > self.by or (coming and timeout_s):
                return coming.popleft()
            while leaving and timeout_s:
                send(server, *leaving.popleft())
            return None

        def late_send(server: ZmqServer, peer: Peer, frames: Frames) -> None:
            leaving.append((peer, frames))
            if len(leaving) > self.by:
                send(server, *leaving.popleft())

        def close(server: ZmqServer) -> None:
            while leaving:
                send(server, *leaving.popleft())
            closed(server)

        closed = ZmqServer.close
        ZmqServer.receive = late_receive  # type: ignore[method-assign]
        ZmqServer.send = late_send  # type: ignore[method-assign]
        ZmqServer.close = close  # type: ignore[method-assign]


@dataclass(frozen=True)
class Impatient:
    """A worker asks again at once for what did not come whole, so that a test is short."""

    def install(self) -> None:
        session._ASK_AGAIN_S = session._STALLED_S = 0.5


def _damaged(frame: Any, chance: random.Random) -> bytes:
    data = bytearray(frame)
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


FATES: dict[str, Script] = {fate: Garble(fate) for fate in ("lost", "doubled", "damaged", "cut short")}
FATES |= {"reordered": Reorder(), "late": Late()}


@pytest.mark.parametrize("script", FATES.values(), ids=FATES.keys())
def test_bad_links_change_no_bit(cluster: Cluster, undisturbed: str, script: Script) -> None:
    server = cluster.serve(script, compress__part_bytes=16384, server__silence_s=30.0)
    workers = [cluster.work(name, Impatient()) for name in ("a", "b")]
    for process in (server, *workers):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    audit(cluster.run, ROUNDS, {"a", "b"})
