"""What many use at once, link or cores, as a fluid: shares that change when somebody comes or goes.

Shares are max-min fair: who can take less than an equal part takes what it can, and the others share out
what it leaves. TCP connections that meet at one bottleneck come near it, and so does a fair scheduler.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simpy import Environment, Event

_INSTANT_S = 1e-7
"""What ends within so much of now ends now: times are sums of floats."""


def then(event: Event, act: Callable[[Event], None]) -> None:
    """Act when an event comes."""
    assert event.callbacks is not None, "it has come already"
    event.callbacks.append(act)


def come(event: Event | None) -> None:
    """Have an event come now, if there is one and it has not."""
    if event is not None and not event.triggered:
        event.succeed()


@dataclass(slots=True)
class _Lane:
    """Those who take at most `cap` a second each, and so all the same. `done` is what one of them that had
    been here from the start would have got; `ends` says at how much of it each has enough."""

    cap: float
    rate: float = 0.0
    done: float = 0.0
    ends: list[tuple[float, int, Event]] = field(default_factory=list)

    def next_s(self) -> float:
        """Seconds until the next of them has enough."""
        return max(0.0, self.ends[0][0] - self.done) / self.rate


class Shared:
    """So many bytes, or seconds of a core, a second for all who want some.

    Attributes:
        capacity: a second; infinite where everybody gets its `cap`.
    """

    def __init__(self, env: Environment, capacity: float = math.inf) -> None:
        self.capacity = capacity
        self._env, self._lanes = env, list[_Lane]()  # by their caps, rising
        self._given, self._rate, self._seen_s = 0.0, 0.0, env.now
        self._number = 0
        self._alarm: Event | None = None
        self._alarm_s = math.inf
        self._is_waiting = False

    @property
    def given(self) -> float:
        """What all have got so far."""
        return self._given + self._rate * (self._env.now - self._seen_s)

    def take(self, amount: float, cap: float) -> Event:
        """An event that comes when one who can take `cap` a second has got so much."""
        if math.isinf(cap) and math.isinf(self.capacity):
            amount, cap = 0.0, 1.0
        self._advance()
        done = self._env.event()
        self._number += 1
        lane = self._lane(cap)
        heapq.heappush(lane.ends, (lane.done + amount, self._number, done))
        self._share_out()
        return done

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Share out anew only after all who come within: they come at one moment."""
        self._is_waiting = True
        yield
        self._is_waiting = False
        self._share_out()

    def drop(self, done: Event) -> None:
        """Who waits for this event wants no more."""
        self._advance()
        for lane in self._lanes:
            if any(event is done for _, _, event in lane.ends):
                lane.ends = [entry for entry in lane.ends if entry[2] is not done]
                heapq.heapify(lane.ends)
        self._share_out()

    def _lane(self, cap: float) -> _Lane:
        for n, lane in enumerate(self._lanes):
            if lane.cap == cap:
                return lane
            if lane.cap > cap:
                self._lanes.insert(n, found := _Lane(cap))
                return found
        self._lanes.append(found := _Lane(cap))
        return found

    def _advance(self) -> None:
        """Give what the time since the last look was good for."""
        passed_s = self._env.now - self._seen_s
        if passed_s:
            self._seen_s = self._env.now
            self._given += self._rate * passed_s
            for lane in self._lanes:
                lane.done += lane.rate * passed_s

    def _share_out(self) -> None:
        """Rates of all from now on, and an alarm for the first who has enough."""
        if self._is_waiting:
            return
        lanes = self._lanes = [lane for lane in self._lanes if lane.ends]
        left, num_left, next_s = self.capacity, sum([len(lane.ends) for lane in lanes]), math.inf
        self._rate = 0.0
        for lane in lanes:
            num_here = len(lane.ends)
            lane.rate = min(lane.cap, left / num_left)
            left, num_left = left - lane.rate * num_here, num_left - num_here
            self._rate += lane.rate * num_here
            next_s = min(next_s, lane.next_s())
        # One that rings too early only looks again, which costs less than taking it back.
        if self._env.now + next_s < self._alarm_s:
            self._alarm_s = self._env.now + next_s
            self._alarm = self._env.timeout(next_s)
            then(self._alarm, self._ring)

    def _ring(self, alarm: Event) -> None:
        if alarm is not self._alarm:
            return
        self._alarm_s = math.inf
        self._advance()
        for lane in self._lanes:
            while lane.ends and lane.next_s() <= _INSTANT_S:
                heapq.heappop(lane.ends)[2].succeed()
        self._share_out()
