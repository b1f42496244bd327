"""A clock that stands still while nobody looks at it."""

from __future__ import annotations

from lte.clock import Watch


def test_of_the_time_between_two_looks_only_so_much_counts() -> None:
    now_s = 1e6
    watch = Watch(2.0, lambda: now_s)
    assert watch.now_s() == 0.0
    seen = []
    for passed_s in (0.5, 2.0, 3600.0, 0.0, 1.5):
        now_s += passed_s
        seen.append(watch.now_s())
    assert seen == [0.5, 2.5, 4.5, 4.5, 6.0]
