"""Clocks that jump, and a run that is stopped as a whole."""

from __future__ import annotations

import datetime
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import ENDS_WITHIN_S, ROUNDS, Cluster, Fault, Scripted, audit

from lte import track

STEP = "lte.worker.trainer:Trainer.step"
DAY_S = 86_400


@dataclass(frozen=True)
class JumpInTime(Scripted):
    """The machine's date is set."""

    by_s: int = 0

    def happen(self) -> None:
        seconds, nanoseconds, by = time.time, time.time_ns, datetime.timedelta(seconds=self.by_s)

        class Datetime(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
                return super().now(tz) + by

        time.time = lambda: seconds() + self.by_s
        time.time_ns = lambda: nanoseconds() + self.by_s * 10**9
        datetime.datetime = Datetime  # type: ignore[misc]


@dataclass(frozen=True)
class HourWhile:
    """Once a file is there, the process finds that an hour has passed: it was stopped for so long."""

    path: Path

    def install(self) -> None:
        now = time.monotonic

        def later() -> float:
            return now() + 3600.0 * self.path.exists()

        time.monotonic = track.monotonic = later


@pytest.mark.parametrize("by_s", [DAY_S, -DAY_S], ids=["forward", "backward"])
def test_a_date_that_jumps_changes_nothing(cluster: Cluster, undisturbed: str, by_s: int) -> None:
    """Nor does it show in the records."""
    processes = [
        cluster.serve(JumpInTime("lte.server.master:Master.merge", call=3, by_s=by_s)),
        cluster.work("a"),
        cluster.work("b", JumpInTime(STEP, call=5, by_s=by_s)),
    ]
    for process in processes:
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    assert cluster.events("left") == []
    times_s = [line["time_s"] for kind in ("round", "done") for line in cluster.lines(kind)]
    assert times_s == sorted(times_s)
    assert 0 < times_s[-1] < ENDS_WITHIN_S
    audit(cluster.run, ROUNDS, {"a", "b"})


def test_a_run_that_is_stopped_as_a_whole_goes_on(cluster: Cluster, undisturbed: str) -> None:
    """As by a laptop's lid, for an hour: longer than anybody is waited for. When all wake, none is silent."""
    hour = cluster.folder / "hour"
    awake = HourWhile(hour)
    b = cluster.work("b", awake, Fault(STEP, call=5, number=signal.SIGSTOP))
    processes = [cluster.serve(awake), cluster.work("a", awake), b]
    cluster.stopped(b)
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        cluster.stopped(process)
    hour.touch()
    for process in processes:
        cluster.wake(process)
    for process in processes:
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    assert cluster.events("left") == []
    audit(cluster.run, ROUNDS, {"a", "b"})
