"""What arrives at either end of a connection: waited for, with a deadline."""

from __future__ import annotations

from lte.transport import Frames, Peer, ServerEndpoint, WorkerEndpoint

WAIT_S = 60.0
"""For whatever must arrive; generous, as other jobs may share the machine."""


def hear(server: ServerEndpoint) -> tuple[Peer, list[bytes]]:
    received = server.receive(WAIT_S)
    assert received is not None, "nothing arrived"
    return received[0], plain(received[1])


def hear_at(worker: WorkerEndpoint) -> list[bytes]:
    received = worker.receive(WAIT_S)
    assert received is not None, "nothing arrived"
    return plain(received)


def plain(frames: Frames) -> list[bytes]:
    return [bytes(frame) for frame in frames]
