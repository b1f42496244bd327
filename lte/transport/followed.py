"""A worker's end of a server that posts its address: by whichever transport that address is of.

Each transport follows the file itself for as long as its own addresses stand there. Here is seen when those
of another do: the first that is posted may be, and so may that of a server which is started anew.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from lte.errors import ConnectError
from lte.transport import meeting, posted
from lte.transport.base import Frames, WorkerEndpoint

_LOOK_UP_S = 1.0


class FollowedWorker:
    """See `base.WorkerEndpoint`."""

    def __init__(
        self,
        file: Path,
        *,
        by_zmq: Callable[[], WorkerEndpoint],
        by_collective: Callable[[], WorkerEndpoint],
        has_keys: bool,
    ) -> None:
        """Open the end of the transport whose address is there, or else of zmq.

        Args:
            by_zmq, by_collective: open an end that follows the file. has_keys: refuse the second, which has
                none, so that who can write the file cannot have this one join without.

        Raises:
            ConnectError: what is in the file is no address, or may not be gone to.
        """
        self._file, self._by_zmq, self._by_collective = file, by_zmq, by_collective
        self._has_keys, self._is_closed = has_keys, False
        self._left: deque[Frames] = deque()  # come by the transport before, not received yet
        self._lock, self._looked_up_s = threading.Lock(), time.monotonic()
        self._is_collective = posted.read(file).startswith(meeting.SCHEME)
        self._own = self._opened(self._is_collective)

    @property
    def address(self) -> str:
        return self._own.address

    def send(self, frames: Frames, lane: bytes = b"") -> None:
        self._own.send(frames, lane)

    def receive(self, timeout_s: float) -> Frames | None:
        deadline_s = time.monotonic() + max(timeout_s, 0)
        while True:
            with self._lock:
                self._follow()
                if self._left:
                    return self._left.popleft()
            left_s = max(0.0, deadline_s - time.monotonic())
            frames = self._own.receive(min(left_s, _LOOK_UP_S))
            if frames is not None or left_s <= _LOOK_UP_S:
                return frames

    def pending(self) -> int:
        return len(self._left) + self._own.pending()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._own.close()

    def _follow(self) -> None:
        """Change the transport if the file says so, and if it is time to look."""
        now_s = time.monotonic()
        if self._is_closed or now_s - self._looked_up_s < _LOOK_UP_S:
            return
        self._looked_up_s = now_s
        address = posted.read(self._file)
        if address and address.startswith(meeting.SCHEME) != self._is_collective:
            before, self._own = self._own, self._opened(not self._is_collective)
            self._is_collective = not self._is_collective
            before.close()
            while (frames := before.receive(0)) is not None:
                self._left.append(frames)

    def _opened(self, is_collective: bool) -> WorkerEndpoint:
        if not is_collective:
            return self._by_zmq()
        if self._has_keys:
            raise ConnectError(
                f"{self._file}: says {posted.read(self._file)}, a transport without keys; leave --key and"
                " --server-key out, or start the server at a tcp:// address"
            )
        return self._by_collective()
