"""Queues between threads of one process: for tests, simulation and a debugger."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Sequence

from lte.errors import ConnectError
from lte.transport.base import Frames, Peer

_servers: dict[str, InprocessServer] = {}
_lock = threading.Lock()
_names = itertools.count()


def _copied(frames: Frames) -> list[bytes]:
    return [bytes(frame) for frame in frames]


class InprocessServer:
    """See `base.ServerEndpoint`."""

    def __init__(self, address: str, *, max_message_bytes: int) -> None:
        self.address, self.max_message_bytes = address, max_message_bytes
        self.received_bytes = self.sent_bytes = 0
        self.sender = self.key_owner = self.origin = ""
        self.is_relayed = False
        self.inbox: queue.Queue[tuple[Peer, list[bytes]] | None] = queue.Queue()
        self.peers: dict[Peer, InprocessWorker] = {}

    def send(self, peer: Peer, frames: Frames) -> None:
        if worker := self.peers.get(peer):
            copied = _copied(frames)
            self.sent_bytes += sum(map(len, copied))
            worker.inbox.put(copied)

    def receive(self, timeout_s: float | None) -> tuple[Peer, Frames] | None:
        try:
            received = self.inbox.get(timeout=None if timeout_s is None else max(timeout_s, 0))
        except queue.Empty:
            return None
        if received is None:
            return None
        peer, frames = received
        self.received_bytes += sum(map(len, frames))
        return peer, frames

    def watch(self, descriptors: Sequence[int]) -> None:
        assert not descriptors, "nothing but its own queue can be waited for"

    def speaks_for(self, worker_id: str) -> bool:
        return True

    def wake(self) -> None:
        self.inbox.put(None)

    def notices(self) -> list[str]:
        return []

    def close(self) -> None:
        with _lock:
            if _servers.get(self.address) is self:
                del _servers[self.address]


class InprocessWorker:
    """See `base.WorkerEndpoint`."""

    def __init__(self, address: str) -> None:
        self.inbox: queue.Queue[list[bytes]] = queue.Queue()
        self._address, self._peer = address, b"%d" % next(_names)
        self._closed = False

    @property
    def address(self) -> str:
        return self._address

    def send(self, frames: Frames, lane: bytes = b"") -> None:
        copied = _copied(frames)
        with _lock:  # the server of now: it may be another than at the last message
            server = _servers.get(self._address)
            if server is None or self._closed:
                return
            server.peers[self._peer] = self
            if max(map(len, copied), default=0) <= server.max_message_bytes:
                server.inbox.put((self._peer, copied))

    def receive(self, timeout_s: float) -> Frames | None:
        try:
            return self.inbox.get(timeout=max(timeout_s, 0))
        except queue.Empty:
            return None

    def pending(self) -> int:
        return self.inbox.qsize()

    def close(self) -> None:
        with _lock:
            self._closed = True
            if server := _servers.get(self._address):
                server.peers.pop(self._peer, None)


def bind(address: str, *, max_message_bytes: int) -> InprocessServer:
    """See `transport.bind`."""
    with _lock:
        if address in _servers:
            raise ConnectError(f"{address}: in use by another server of this process; choose another name")
        _servers[address] = InprocessServer(address, max_message_bytes=max_message_bytes)
        return _servers[address]


def connect(address: str) -> InprocessWorker:
    """See `transport.connect`."""
    with _lock:
        if address not in _servers:
            raise ConnectError(
                f"{address}: no server of this process has this address; start it first, or use tcp:// or"
                " ipc:// between processes"
            )
        return InprocessWorker(address)
