"""Queues between threads of one process: for tests, simulation and a debugger."""

from __future__ import annotations

import itertools
import queue
import threading

from lte.errors import ConnectError
from lte.transport.base import Frames, Peer

_servers: dict[str, InprocessServer] = {}
_lock = threading.Lock()


def _copied(frames: Frames) -> list[bytes]:
    return [bytes(frame) for frame in frames]


class InprocessServer:
    """See `base.ServerEndpoint`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.received_bytes = self.sent_bytes = 0
        self.inbox: queue.Queue[tuple[Peer, list[bytes]]] = queue.Queue()
        self.peers: dict[Peer, InprocessWorker] = {}
        self._names = itertools.count()

    def attach(self, worker: InprocessWorker) -> Peer:
        """Give a worker its name."""
        peer = b"%d" % next(self._names)
        self.peers[peer] = worker
        return peer

    def send(self, peer: Peer, frames: Frames) -> None:
        if worker := self.peers.get(peer):
            copied = _copied(frames)
            self.sent_bytes += sum(map(len, copied))
            worker.inbox.put(copied)

    def receive(self, timeout_s: float | None) -> tuple[Peer, Frames] | None:
        try:
            peer, frames = self.inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None
        self.received_bytes += sum(map(len, frames))
        return peer, frames

    def close(self) -> None:
        with _lock:
            _servers.pop(self.address, None)


class InprocessWorker:
    """See `base.WorkerEndpoint`."""

    def __init__(self, server: InprocessServer) -> None:
        self.inbox: queue.Queue[list[bytes]] = queue.Queue()
        self._server = server
        self._peer = server.attach(self)

    def send(self, frames: Frames) -> None:
        self._server.inbox.put((self._peer, _copied(frames)))

    def receive(self, timeout_s: float) -> Frames | None:
        try:
            return self.inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def pending(self) -> int:
        return self.inbox.qsize()

    def close(self) -> None:
        self._server.peers.pop(self._peer, None)


def bind(address: str) -> InprocessServer:
    """See `transport.bind`."""
    with _lock:
        if address in _servers:
            raise ConnectError(f"{address}: in use by another server of this process; choose another name")
        _servers[address] = InprocessServer(address)
        return _servers[address]


def connect(address: str) -> InprocessWorker:
    """See `transport.connect`."""
    with _lock:
        if address not in _servers:
            raise ConnectError(f"{address}: no server of this process has this address")
        return InprocessWorker(_servers[address])
