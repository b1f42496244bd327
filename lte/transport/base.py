"""The interface of a transport.

A server's endpoint belongs to one thread. A worker's endpoint may be used by several threads. Both
hand over frames in order, whole or not at all; a message may be lost when a connection breaks, so
whoever needs an answer asks again. `send` never blocks on the network, and the buffers given to it
must not change afterwards. `close` may be called twice; after it, `send` does nothing.
"""

from __future__ import annotations

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
            there are no keys. A peer's name for its connection proves nothing, this does.
        origin: the address of the machine that the last message came from, or ""; for people to read.
    """

    address: str
    received_bytes: int
    sent_bytes: int
    sender: str
    origin: str

    def send(self, peer: Peer, frames: Frames) -> None:
        """Send to a peer; dropped without a word if its connection is gone."""

    def receive(self, timeout_s: float | None) -> tuple[Peer, Frames] | None:
        """The next message, or None after the timeout (None: no limit).

        Where there are keys, messages of one that is not allowed any more are dropped.
        """

    def watch(self, descriptors: Sequence[int]) -> None:
        """Have `receive` return early, with None, whenever one of these is readable."""

    def notices(self) -> list[str]:
        """What a person should know of strangers and of the allow-list since the last call, in words."""

    def close(self) -> None:
        """Hand what was sent to the network, for at most a second, and close."""


class WorkerEndpoint(Protocol):
    """Where a worker hears its server."""

    @property
    def address(self) -> str:
        """Where it is connected to now; "" while a file that is to say so holds none."""

    def send(self, frames: Frames) -> None:
        """Send to the server."""

    def receive(self, timeout_s: float) -> Frames | None:
        """The next message, or None after the timeout.

        Raises:
            ConnectError: keys do not fit: the server admits this one not, or has another itself.
        """

    def pending(self) -> int:
        """Messages that have arrived and were not received yet."""

    def close(self) -> None:
        """Hand what was sent to the network, for at most a second, and close."""
