"""The server of a simulated run: its CPU, and rounds by the product's rules."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from lte.simulate.fluid import Shared, then
from lte.simulate.world import MESSAGE_S, World

if TYPE_CHECKING:
    from simpy import Environment, Event

_LEAST_SPEED = 0.01
"""What signs of life leave of the server's CPU at least, however many they are."""


class Cpu:
    """One process's work, in the order in which it came, on a machine of its own or on one that is shared.

    Attributes:
        busy_s: that it has or will have worked. slowed: by how many times all takes longer.
    """

    def __init__(self, env: Environment, cores: Shared | None) -> None:
        self.busy_s, self.slowed = 0.0, 1.0
        self._env, self._cores, self._free_s = env, cores, 0.0
        self._waiting: deque[tuple[float, Event]] = deque()

    def run(self, work_s: float) -> Event:
        """An event that comes when all that was asked for before is done, and then this."""
        work_s *= self.slowed
        self.busy_s += work_s
        if self._cores is None:
            self._free_s = max(self._free_s, self._env.now) + work_s
            return self._env.timeout(self._free_s - self._env.now)
        done = self._env.event()
        self._waiting.append((work_s, done))
        if len(self._waiting) == 1:
            self._next(self._cores)
        return done

    def _next(self, cores: Shared) -> None:
        then(cores.take(self._waiting[0][0], 1.0), lambda _: self._finished(cores))

    def _finished(self, cores: Shared) -> None:
        _, done = self._waiting.popleft()
        done.succeed()
        if self._waiting:
            self._next(cores)


class Server:
    """Rounds as `server.rounds` has them, where no contribution is wrong.

    Attributes:
        version: published. members: numbers of the workers that it takes for alive. expected, held: of
            those whom the open round waits for, and of them those whose contribution it has.
        beats_share: of the CPU, that signs of life take.
    """

    def __init__(
        self,
        world: World,
        cores: Shared | None,
        *,
        call: Callable[[int], None],
        publish: Callable[[int, float], None],
    ) -> None:
        """Open the first round to all workers.

        Args:
            call: tells a worker that the open round waits for it after all.
            publish: told the number of contributions in a version, and how many seconds it takes to pack
                the parts of it but the first.
        """
        self.version, self.is_merging = 0, False
        self._is_published = False  # what is being merged: the first part of it has left
        self.members = set(range(world.rules.workers))
        self.expected, self.held = set(self.members), set[int]()
        self.cpu = Cpu(world.env, cores)
        self._world, self._call, self._publish = world, call, publish
        self._opened_s = world.env.now
        self._quorum_s: float | None = None
        # Each sign of life comes in and is answered.
        self.beats_share = world.rules.workers * (world.hear_s + MESSAGE_S) / world.recipe.heartbeat_s
        self.cpu.slowed = 1 / max(_LEAST_SPEED, 1 - self.beats_share)

    def received(self, number: int, version: int) -> None:
        """All parts of a worker's contribution have come."""
        costs, world = self._world.costs, self._world
        messages_s = (costs.up_parts + 1) * world.hear_s + MESSAGE_S
        decoded = self.cpu.run(costs.decode_s / world.shards + messages_s)
        then(decoded, lambda _: self.contributed(number, version))

    def contributed(self, number: int, version: int) -> None:
        """A worker's contribution to the round on a version is decoded."""
        is_open = version == self.version and not self.is_merging
        if not is_open or number in self.held or number not in self.expected:
            self._world.tally.late += 1
            return
        self.held.add(number)
        if self._quorum_s is None and len(self.held) >= self._world.rules.quorum:
            self._quorum_s = now_s = self._world.env.now
            closes_s = self._world.rules.closing_time(self._opened_s, now_s)
            then(self._world.env.timeout(closes_s - now_s), lambda _: self._close(version))
        self._settle()

    def joined(self, number: int) -> bool:
        """A worker is back, or a new process of one that was taken for alive. Returns whether the round on
        the version that is published waits for it."""
        if number in self.members and self.expected == {number} and not self.held:
            self.expected.clear()  # its old process was the last that was waited for: the round opens anew
        self.members.add(number)
        self._settle()
        if self.is_merging:  # the parts of an update leave: the round on it opens to all members
            return self._is_published
        return number in self.expected - self.held

    def gone(self, number: int) -> None:
        """A worker was silent for too long."""
        self.members.discard(number)
        if number not in self.held:
            self.expected.discard(number)
        self._settle()

    def _settle(self) -> None:
        """Merge a round that is complete. Open one that nobody else will contribute to, below its quorum, to
        whoever has joined since."""
        if self.is_merging or len(self.held) < len(self.expected):
            return
        if len(self.held) >= self._world.rules.quorum:
            self._close(self.version)
            return
        called = self.members - self.held
        if called and not self.expected:
            self._opened_s = self._world.env.now
        self.expected |= called
        for number in sorted(called):
            self._call(number)

    def _close(self, version: int) -> None:
        """Merge what the round on a version has, if it is open still."""
        if version == self.version and not self.is_merging:
            self.is_merging = True
            self._world.env.process(self._merge())

    def _merge(self) -> Generator[Event, Any, None]:
        """Merge and publish: one piece of work, whose first part leaves before the last is packed."""
        costs, shards = self._world.costs, self._world.shards
        rest_s = (costs.pack_s - costs.first_pack_s) / shards
        merge_s = len(self.held) * costs.merge_s + costs.requantize_s + costs.first_pack_s
        told_s = len(self.members) * (costs.down_parts + 2) * MESSAGE_S
        begun, packed = self.cpu.run(merge_s / shards + told_s), self.cpu.run(rest_s)
        yield begun
        self.version, self._is_published = self.version + 1, True
        self._publish(len(self.held), rest_s * self.cpu.slowed)
        yield packed
        self.is_merging = self._is_published = False
        self._opened_s, self._quorum_s = self._world.env.now, None
        self.expected, self.held = set(self.members), set()
        self._settle()
