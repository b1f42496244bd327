"""Links between workers and their server, whose own link they share."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lte.cost.links import FRAME_BYTES, SEGMENT_BYTES, Link, transfer_s
from lte.simulate.fluid import Shared, then

if TYPE_CHECKING:
    from simpy import Environment, Event


def payload(bps: float) -> float:
    """Bytes a second that messages get through a link of so many bits a second."""
    return bps / 8 * SEGMENT_BYTES / FRAME_BYTES


class Way:
    """One direction of links that are alike, with the server's link at one of its ends.

    Attributes:
        shared: the server's link. delay_s: from there to the worker, or back.
    """

    def __init__(self, link: Link, bps: float, shared: Shared) -> None:
        """`bps` is that direction's rate."""
        self.shared, self.delay_s = shared, link.rtt_s / 2
        self._link, self._bps, self._paces = link, bps, dict[float, float]()

    def pace(self, num_bytes: float) -> float:
        """Mean bytes a second at which so many would move alone: with slow start and loss in it."""
        if num_bytes not in self._paces:
            whole_s = transfer_s(num_bytes, self._bps, self._link.rtt_s, self._link.loss)
            alone_s = whole_s - self.delay_s
            self._paces[num_bytes] = num_bytes / alone_s if alone_s > 0 else math.inf
        return self._paces[num_bytes]

    def alone_s(self, num_bytes: float) -> float:
        """Seconds of so many bytes where nobody shares the server's link, without the delay."""
        return num_bytes / self.pace(num_bytes)


@dataclass(slots=True)
class _Message:
    """Bytes on their way; what is to happen when they have come; when the last of them leave at the
    earliest, as they may have to be encoded yet."""

    num_bytes: float
    arrive: Callable[[float], None]
    ready_s: float
    began_s: float = 0.0


class Connection:
    """What one TCP connection carries one way: message after message."""

    def __init__(self, env: Environment, way: Way) -> None:
        self.way, self._env = way, env
        self._messages = deque[_Message]()
        self._moving: Event | None = None

    def send(
        self, num_bytes: float, arrive: Callable[[float], None], *, parts: int = 1, encode_s: float = 0.0
    ) -> None:
        """Send a message, of whose parts all but the first take so many seconds to encode.

        Args:
            arrive: told, when the last byte has come, in how many seconds they passed.
        """
        last_s = encode_s and encode_s + self.way.alone_s(num_bytes) / parts
        self._messages.append(_Message(num_bytes, arrive, self._env.now + last_s))
        if self._moving is None:
            self._next()

    def cut(self) -> int:
        """Lose what has not passed. Returns how many messages that was."""
        if self._moving is not None:
            self.way.shared.drop(self._moving)
        lost, self._moving = len(self._messages), None
        self._messages.clear()
        return lost

    def _next(self) -> None:
        message = self._messages[0]
        message.began_s = self._env.now
        self._moving = self.way.shared.take(message.num_bytes, self.way.pace(message.num_bytes))
        then(self._moving, self._passed)

    def _passed(self, _: Event) -> None:
        message, self._moving = self._messages.popleft(), None
        took_s = self._env.now - message.began_s
        left_s = self.way.delay_s + max(0.0, message.ready_s - self._env.now)
        then(self._env.timeout(left_s), lambda _: message.arrive(took_s))
        if self._messages:
            self._next()
