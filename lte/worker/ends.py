"""A worker's connections to the servers of its run, heard as one."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Sequence
from pathlib import Path

from lte import transport
from lte.errors import ConnectError
from lte.transport import Frames, WorkerEndpoint

_LOOK_UP_S = 1.0
"""How often who carries what has come looks whether its connection is closed."""
_ANY_HOST = re.compile(r"tcp://(0\.0\.0\.0|\[::\]):(\d+)")


class Ends:
    """One connection, to the first server, and those to the other shards once it has told of them.

    May be used by several threads, but for `go_to` and `receive`.
    """

    def __init__(self, address: str, *, key: str | Path | None, server_key: str | Path | None) -> None:
        """Connect to the first. Raises: see `transport.connect`."""
        self._key, self._server_key = key, server_key
        self._ends = [self._connected(address)]
        self._addresses: tuple[str, ...] = ()
        # (end, what came of it), once there are several.
        self._inbox: queue.Queue[tuple[WorkerEndpoint, Frames | ConnectError]] = queue.Queue()
        self._closed: set[WorkerEndpoint] = set()
        self._is_carried = False

    @property
    def num(self) -> int:
        return len(self._ends)

    def address_of(self, shard: int) -> str:
        return self._ends[shard].address

    def go_to(self, addresses: Sequence[str]) -> bool:
        """Have connections to these servers, shard 1 and on, and to no others beside the first.

        Returns:
            Whether it had others before.
        """
        found = [_reachable(address, self._ends[0].address) for address in addresses]
        if tuple(found) == self._addresses:
            return False
        for end in self._ends[1:]:
            self._close(end)
        self._addresses = tuple(found)
        self._ends = [self._ends[0], *map(self._connected, found)]
        for end in self._ends[self._is_carried :]:
            threading.Thread(target=self._carry, args=(end,), name="lte-shard", daemon=True).start()
        self._is_carried = True
        return True

    def send(self, frames: Frames, shard: int = 0) -> None:
        """Send to a shard; without a word not to one that was never told of."""
        ends = self._ends
        if shard < len(ends):
            ends[shard].send(frames)

    def receive(self, timeout_s: float) -> tuple[int, Frames] | None:
        """The next message and the shard that it is of, or None after the timeout.

        Raises:
            ConnectError: keys do not fit.
        """
        if not self._is_carried:
            frames = self._ends[0].receive(timeout_s)
            return None if frames is None else (0, frames)
        try:
            end, came = self._inbox.get(timeout=max(timeout_s, 0))
        except queue.Empty:
            return None
        if isinstance(came, ConnectError):
            raise came
        # What was under way from where a shard is no more is of nobody's.
        return (self._ends.index(end), came) if end in self._ends else None

    def pending(self) -> int:
        """Messages that have arrived and were not received yet."""
        return self._inbox.qsize() + sum(end.pending() for end in self._ends)

    def close(self) -> None:
        for end in self._ends:
            self._close(end)

    def _connected(self, address: str) -> WorkerEndpoint:
        return transport.connect(address, key=self._key, server_key=self._server_key)

    def _close(self, end: WorkerEndpoint) -> None:
        self._closed.add(end)
        end.close()

    def _carry(self, end: WorkerEndpoint) -> None:
        while end not in self._closed:
            try:
                frames = end.receive(_LOOK_UP_S)
            except ConnectError as error:
                self._inbox.put((end, error))
                continue
            if frames is not None:
                self._inbox.put((end, frames))


def _reachable(address: str, first: str) -> str:
    """An address as this worker reaches it: servers that listen everywhere are where the first is."""
    found, own = _ANY_HOST.fullmatch(address), first.rpartition(":")[0]
    return f"{own}:{found[2]}" if found else address
