"""A clock for silence: it stands still while nobody looks at it."""

from __future__ import annotations

import time
from collections.abc import Callable


class Watch:
    """Seconds that its owner was there to see pass.

    A process that was stopped, as by a laptop's lid, or busy for long, heard nobody in that time and cannot
    tell the silence of others from its own absence. So of the time between two looks only so much counts.

    Attributes:
        most_s: of the time between two looks. Whoever waits looks at least this often.
    """

    def __init__(self, most_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start at 0. `clock` gives seconds and never falls."""
        self.most_s, self._clock = most_s, clock
        self._seen_s, self._looked_s = 0.0, clock()

    def now_s(self) -> float:
        """Look: seconds seen so far."""
        clock_s = self._clock()
        self._seen_s += min(clock_s - self._looked_s, self.most_s)
        self._looked_s = clock_s
        return self._seen_s
