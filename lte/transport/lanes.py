"""Whose message goes next, where those of many share one link."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from lte.transport.base import Frames

SMALL_BYTES = 4096
"""Signs of life and the like are smaller, parts are larger."""
SMALL_IN_A_ROW = 16
"""Small messages that go before large ones: then one of these has its turn."""


class Lanes:
    """Messages that wait, in order in each lane. Small ones go first, as a sign of life must not wait for
    what others send in bulk, though not all of them always; among both kinds lanes take turns.

    For one thread at a time.
    """

    def __init__(
        self, most_bytes: float = math.inf, on_loss: Callable[[int], None] = lambda num_bytes: None
    ) -> None:
        """Make it, without any lanes.

        Args:
            most_bytes: of all that waits. Beyond it the longest lane is emptied: most of what waits is its,
                and a part of what it sends is of no use without the others.
            on_loss: told, as a message is put, how many bytes were lost by that.
        """
        self.num_bytes = 0
        self._most_bytes, self._on_loss = most_bytes, on_loss
        self._lanes: dict[bytes, deque[Frames]] = {}  # none of them empty; the next turn's first
        self._num_bytes: dict[bytes, int] = {}  # of each
        self._num_small = 0  # sent one after the other while larger ones waited

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def put(self, lane: bytes, frames: Frames) -> None:
        self._lanes.setdefault(lane, deque()).append(frames)
        self._count(lane, _size(frames))
        lost_bytes = 0
        while self.num_bytes > self._most_bytes:
            longest = max(self._num_bytes, key=self._num_bytes.__getitem__)
            lost_bytes += self._num_bytes[longest]
            self._count(longest, -self._num_bytes[longest])
            del self._lanes[longest], self._num_bytes[longest]
        if lost_bytes:
            self._on_loss(lost_bytes)

    def take(self) -> Frames:
        """The next message. There must be one."""
        small = next((lane for lane, waiting in self._lanes.items() if _is_small(waiting[0])), None)
        large = next((lane for lane, waiting in self._lanes.items() if not _is_small(waiting[0])), None)
        is_small = small is not None and (large is None or self._num_small < SMALL_IN_A_ROW)
        self._num_small = self._num_small + 1 if is_small and large is not None else 0
        lane = small if is_small else large
        assert lane is not None, "nothing waits"
        waiting = self._lanes.pop(lane)
        frames = waiting.popleft()
        self._count(lane, -_size(frames))
        if waiting:
            self._lanes[lane] = waiting
        else:
            del self._num_bytes[lane]
        return frames

    def _count(self, lane: bytes, num_bytes: int) -> None:
        self._num_bytes[lane] = self._num_bytes.get(lane, 0) + num_bytes
        self.num_bytes += num_bytes


def _is_small(frames: Frames) -> bool:
    return _size(frames) < SMALL_BYTES


def _size(frames: Frames) -> int:
    return sum(memoryview(frame).nbytes for frame in frames)
