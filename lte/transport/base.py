"""The interface of a transport.

A server's endpoint belongs to one thread. A worker's endpoint may be used by several threads. Both
hand over frames in order, whole or not at all; a message may be lost when a connection breaks, so
whoever needs an answer asks again. `send` never blocks on the network, and the buffers given to it
must not change afterwards. `close` may be called twice; after it, `send` does nothing.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Protocol

Frames = Sequence[bytes | bytearray | memoryview]
Peer = bytes
"""Names one connection of a worker, for as long as it lasts."""


class ServerEndpoint(Protocol):
    """Where a server hears its workers.

    Attributes:
        address: where workers connect, with the real port.
        received_bytes, sent_bytes: of all frames so far, those dropped at once left out.
        sender: the worker_id that the key behind the last message received is bound to; "" where
            there are no keys. A peer's name for its connection proves nothing, this does. A name that
            begins with `keys.RELAY` is a relay's, which is no worker.
        key_owner: whose key that is: as `sender`, but by way of a relay the relay's own name.
        origin: the address of the machine that the last message came from, or ""; for people to read.
        is_relayed: whether the last message came by way of a relay.
    """

    address: str
    sender: str
    key_owner: str
    origin: str
    is_relayed: bool

    @property
    def received_bytes(self) -> int: ...

    @property
    def sent_bytes(self) -> int: ...

    def send(self, peer: Peer, frames: Frames) -> None:
        """Send to a peer; dropped without a word if its connection is gone."""

    def receive(self, timeout_s: float | None) -> tuple[Peer, Frames] | None:
        """The next message, or None after the timeout (None: no limit).

        Where there are keys, messages of one that is not allowed any more are dropped.
        """

    def watch(self, descriptors: Sequence[int]) -> None:
        """Have `receive` return early, with None, whenever one of these is readable."""

    def speaks_for(self, worker_id: str) -> bool:
        """Whether the key behind the last message received may speak for this worker: it is bound to it, or
        to a relay that is allowed to. Where there are no keys, anyone may."""

    def wake(self) -> None:
        """Make the `receive` under way, or else the next one, return None at once. Any thread may call."""

    def notices(self) -> list[str]:
        """What a person should know of strangers and of the allow-list since the last call, in words."""

    def close(self) -> None:
        """Hand what was sent to the network, for at most a second, and close."""


class WorkerEndpoint(Protocol):
    """Where a worker hears its server."""

    @property
    def address(self) -> str:
        """Where it is connected to now; "" while a file that is to say so holds none."""

    def send(self, frames: Frames, lane: bytes = b"") -> None:
        """Send to the server. Where `connect` was given lanes, they take turns, and only messages of one lane
        keep their order."""

    def receive(self, timeout_s: float) -> Frames | None:
        """The next message, or None after the timeout.

        Raises:
            ConnectError: keys do not fit: the server admits this one not, or has another itself.
        """

    def pending(self) -> int:
        """Messages that have arrived and were not received yet."""

    def close(self) -> None:
        """Hand what was sent to the network, for at most a second, and close."""


def is_loopback(host: str) -> bool:
    """Whether a host, a name or an IP address without brackets, is this machine and nobody else's."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
