"""What a server keeps an eye on while it merges. No clock, disk or socket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

TRIMS_IN_A_ROW = 3
"""Merges that leave a worker out, after which its heads are to start over."""
_SAID_BELOW = 0.5
"""Share of a contribution's length merged, below which its worker is named: chance takes less away."""


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
