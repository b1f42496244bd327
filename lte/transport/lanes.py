"""Whose message goes next, where those of many share one link."""

from __future__ import annotations

from collections import deque

from lte.transport.base import Frames

SMALL_BYTES = 4096
"""Signs of life and the like are smaller, parts are larger."""


class Lanes:
    """Messages that wait, in order in each lane. Small ones go first, as a sign of life must not wait for
    what others send in bulk; then lanes take turns."""

    def __init__(self) -> None:
        self._lanes: dict[bytes, deque[Frames]] = {}  # none of them empty; the next turn's first

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def put(self, lane: bytes, frames: Frames) -> None:
        self._lanes.setdefault(lane, deque()).append(frames)

    def take(self) -> Frames:
        """The next message. There must be one."""
        small = (lane for lane, waiting in self._lanes.items() if _size(waiting[0]) < SMALL_BYTES)
        lane = next(small, next(iter(self._lanes)))
        waiting = self._lanes.pop(lane)
        frames = waiting.popleft()
        if waiting:
            self._lanes[lane] = waiting
        return frames


def _size(frames: Frames) -> int:
    return sum(memoryview(frame).nbytes for frame in frames)
