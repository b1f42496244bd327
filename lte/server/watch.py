"""What a server keeps an eye on while it merges. No clock, disk or socket."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

TRIMS_IN_A_ROW = 5
"""Merges that leave a worker out, after which its heads are to start over."""
_SAID_BELOW = 0.5
"""Share of a contribution's length merged, below which its worker is named: chance takes less away."""
_CALM_ROUNDS = 20
"""Latest losses, those that are being judged left out, whose steps tell what is noise."""
_LEAST_STEPS = 5
"""Of them, to tell it by."""
_NOISE = 8.0
"""A rise of fewer such steps is noise."""


class Outliers:
    """Workers whose contributions robust merging holds down.

    A worker that has diverged would be left out for ever. After some merges in a row it is told to start
    over, from what is merged of it and with new moments.
    """

    def __init__(self) -> None:
        self._said: dict[str, str] = {}
        self._in_a_row: Counter[str] = Counter()

    def saw(
        self, merged: Sequence[str], bounded: Mapping[str, float], trimmed: Sequence[str]
    ) -> list[tuple[str, str, str]]:
        """Take note of a merge.

        Args:
            merged: the workers whose contributions were in it. bounded, trimmed: as `master.Outcome` has
                them.

        Returns:
            (event, worker_id, words) for each worker that was not held down so the last time.
        """
        news = []
        for worker_id in merged:
            what, words = "", ""
            if worker_id in trimmed:
                what, words = "trimmed", "is left out: its contribution points elsewhere than the others'"
            elif bounded.get(worker_id, 1.0) < _SAID_BELOW:
                what = "bounded"
                words = (
                    f"counts {bounded[worker_id]:.1%} as much: its contribution is longer than the others'"
                )
            if what and what != self._said.get(worker_id):
                news.append((what, worker_id, f"{worker_id} {words}"))
            self._said[worker_id] = what
            self._in_a_row[worker_id] = self._in_a_row[worker_id] + 1 if worker_id in trimmed else 0
        return news

    def is_stuck(self, worker_id: str) -> bool:
        """Whether so many merges in a row left this worker out that it must start over."""
        return self._in_a_row[worker_id] >= TRIMS_IN_A_ROW

    def started_over(self, worker_id: str) -> None:
        """Count from nothing again."""
        self._in_a_row.pop(worker_id, None)


@dataclass(frozen=True)
class Rise:
    """A loss that has risen for good.

    Attributes:
        best: the lowest smoothed loss. version: at which it was. now: the smoothed loss of now.
    """

    best: float
    version: int
    now: float


def typical(losses: Sequence[float]) -> float | None:
    """The loss of the worker in the middle, which no single one can drag along; of two the lower."""
    known = [loss if math.isfinite(loss) else math.inf for loss in losses]
    return statistics.median_low(known) if known else None


class Divergence:
    """Notices that a loss rises for good: once, until it is lower than ever again.

    Losses are smoothed by the median of the latest few. A rise counts that takes back a share of all that
    the loss had fallen, whatever its unit and its floor, and that is no noise: several times the mean
    step between losses just before. A loss that is not finite counts at once.
    """

    def __init__(self, share: float | None, window: int) -> None:
        """Args: share: of the fall; None: nothing is noticed. window: losses that are smoothed."""
        self._share, self._window = share, window
        self._losses: list[float] = []
        self._best = Rise(math.inf, 0, math.inf)
        self._said = False

    def saw(self, version: int, loss: float | None) -> Rise | None:
        """Take note of the loss of a round, or of an evaluation, that ended with this version.

        Args:
            loss: None where there is none.

        Returns:
            The rise, where this is the loss that shows it.
        """
        if self._share is None or loss is None:
            return None
        if not math.isfinite(loss):
            is_new, self._said = not self._said, True
            return Rise(self._best.best, self._best.version, loss) if is_new else None
        self._losses.append(loss)
        if len(self._losses) < self._window:
            return None
        now = statistics.median_low(self._losses[-self._window :])
        if now < self._best.best:
            self._best, self._said = Rise(now, version, now), False
        if self._said or now - self._best.best <= self._margin():
            return None
        self._said = True
        return Rise(self._best.best, self._best.version, now)

    def _margin(self) -> float:
        assert self._share is not None
        before = self._losses[: -self._window][-_CALM_ROUNDS:]
        steps = [abs(after - one) for one, after in pairwise(before)]
        noise = statistics.fmean(steps) if len(steps) >= _LEAST_STEPS else math.inf
        return max(self._share * (self._losses[0] - self._best.best), _NOISE * noise)
