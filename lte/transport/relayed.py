"""The server's end of relays: hears workers through them as if each had a connection of its own.

A relay has one connection, on which the messages of all its workers travel in envelopes. To the server each
worker behind it is a peer like any other, so rounds and sessions know nothing of relays. What the server
sends to one of them and the relay holds already, because it went to another one, is named by its digest
instead of sent. Nothing is asked beforehand: the server keeps account of what the relay must hold (see
`shelf`), and if that turns out wrong, because something was lost or damaged, the relay says what it misses
and drops the message. To the worker that is a message lost with a broken connection, which it asks for
again; and then it is sent.

That a relay holds something is known of one connection alone. So whatever is started anew, relay or server,
begins with nothing, and every piece is named by its bytes: no generation's can pass for another's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from lte.errors import WireError
from lte.printable import printable
from lte.transport import envelope, keys
from lte.transport.base import Frames, Peer, ServerEndpoint
from lte.transport.shelf import Shelf

_MOST_RELAYS = 64
"""Of whose shelves account is kept. To more of them everything is sent in full."""
_MOST_IN_A_ROW = 1_000
"""Envelopes without a message, heard before the caller looks at its clock."""
_NUM_NOTICES = 100


class RelayedServer:
    """See `base.ServerEndpoint`. Bytes are counted as they travel on the server's own link: envelopes are,
    and what a relay hands out from its shelf is not."""

    def __init__(self, own: ServerEndpoint, *, max_message_bytes: int) -> None:
        """Args: own: on which both workers and relays are heard. max_message_bytes: that it accepts, told to
        relays: they are to accept no other."""
        self._own, self._max_message_bytes = own, max_message_bytes
        self.address, self.is_relayed = own.address, False
        self.sender = self.key_owner = self.origin = ""
        self._shelves: dict[Peer, Shelf[bool]] = {}  # of the connections of relays, by last word
        self._hashed: tuple[Frames, Sequence[bytes]] = (), ()
        self._notices: deque[str] = deque(maxlen=_NUM_NOTICES)

    @property
    def received_bytes(self) -> int:
        return self._own.received_bytes

    @property
    def sent_bytes(self) -> int:
        return self._own.sent_bytes

    def send(self, peer: Peer, frames: Frames) -> None:
        connection, route = _parted(peer)
        if not route:
            self._own.send(connection, frames)
            return
        entries, sent = self._on_the_way(self._shelves.get(connection), frames)
        before = self._own.sent_bytes
        delivery = envelope.seal(envelope.Delivery(route, tuple(entries)))
        self._own.send(connection, [delivery, *sent])
        if self._own.sent_bytes == before:  # the connection is gone
            self._shelves.pop(connection, None)

    def _on_the_way(self, shelf: Shelf[bool] | None, frames: Frames) -> tuple[list[bytes], list[memoryview]]:
        """What to say of each frame, and those to send."""
        entries, sent = list[bytes](), list[memoryview]()
        for frame, digest in zip(frames, self._digests(frames), strict=True):
            if shelf is not None and digest and shelf.take(digest):
                entries.append(envelope.HELD + digest)
                continue
            sent.append(memoryview(frame))
            if shelf is not None and digest:
                shelf.put(digest, True, memoryview(frame).nbytes)
                entries.append(envelope.KEEP + digest)
            else:
                entries.append(envelope.SENT)
        return entries, sent

    def _digests(self, frames: Frames) -> Sequence[bytes]:
        """Computed once where the same frames go to one worker after the other."""
        last, found = self._hashed
        if len(last) != len(frames) or any(a is not b for a, b in zip(last, frames, strict=True)):
            found = envelope.digests(frames)
            self._hashed = tuple(frames), found
        return found

    def receive(self, timeout_s: float | None) -> tuple[Peer, Frames] | None:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        for _ in range(_MOST_IN_A_ROW):
            received = self._own.receive(None if deadline_s is None else deadline_s - time.monotonic())
            self.sender, self.key_owner = self._own.sender, self._own.key_owner
            self.origin, self.is_relayed = self._own.origin, False
            if received is None:
                return None
            connection, frames = received
            if not envelope.is_sealed(frames):
                return _peer(connection), frames
            if route := self._open(connection, frames):
                self.is_relayed = True
                return _peer(connection, route), frames[1:]
        return None

    def _open(self, connection: Peer, frames: Frames) -> bytes:
        """Take note of an envelope. Returns the route of the message in it, b"" where there is none."""
        try:
            opened = envelope.open_from_relay(frames)
        except WireError as error:
            self._notices.append(f"what a relay at {self.origin or 'an unknown address'} passed on: {error}")
            return b""
        if isinstance(opened, envelope.Missing):
            if (shelf := self._shelves.get(connection)) is not None:
                for digest in opened.digests:
                    shelf.drop(digest)
            return b""
        if self.key_owner and not self.key_owner.startswith(keys.RELAY):
            return opened.route  # a worker's key: it speaks for itself, from where it is, and has no shelf
        if (shelf := self._shelves.pop(connection, None)) is None:
            shelf = Shelf(opened.shelf_bytes)
            self._own.send(connection, [envelope.seal(envelope.Accepts(self._max_message_bytes))])
        self._shelves[connection] = shelf
        if len(self._shelves) > _MOST_RELAYS:
            del self._shelves[next(iter(self._shelves))]
        if self._own.sender and self._own.speaks_for(opened.sender):
            self.sender = opened.sender  # else it is the relay's own name, which is no worker's
        self.origin = f"{printable(opened.origin)} by way of {self._own.origin}".strip()
        return opened.route

    def speaks_for(self, worker_id: str) -> bool:
        return self._own.speaks_for(worker_id)

    def watch(self, descriptors: Sequence[int]) -> None:
        self._own.watch(descriptors)

    def wake(self) -> None:
        self._own.wake()

    def notices(self) -> list[str]:
        own = [self._notices.popleft() for _ in range(len(self._notices))]
        return [*self._own.notices(), *own]

    def close(self) -> None:
        self._own.close()


def _peer(connection: Peer, route: bytes = b"") -> Peer:
    """One name for a connection, or for a worker's connection behind that; no two share it."""
    return bytes([len(connection)]) + connection + route


def _parted(peer: Peer) -> tuple[Peer, bytes]:
    """Connection and route of a peer; b"" for one without a relay."""
    end = 1 + peer[0]
    return peer[1:end], peer[end:]
