"""A worker of a simulated run: what it does with its time, and its deaths."""

from __future__ import annotations

import math
import random
from collections.abc import Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lte.simulate.fleet import WorkerClass
from lte.simulate.fluid import Shared, come, then
from lte.simulate.links import Connection, Way
from lte.simulate.server import Server
from lte.simulate.world import World

if TYPE_CHECKING:
    from simpy import Event, Process

    _Life = Generator[Event, Any, None]


class Worker:
    """One worker, and the processes that live by its name, one after the other.

    Attributes:
        step_s: its own mean seconds of a local step, without stalls. is_alive: whether a process lives.
    """

    def __init__(
        self,
        world: World,
        server: Server,
        number: int,
        kind: WorkerClass,
        *,
        up: Way,
        down: Way,
        cores: Shared | None,
    ) -> None:
        """Begin to train on version 0.

        Args:
            down: by which it takes the whole model. cores: of its machine, if others run there too.
        """
        self.number, self.kind = number, kind
        self._world, self._server, self._env, self._cores = world, server, world.env, cores
        self._uplink, self._downlink = Connection(world.env, up), Connection(world.env, down)
        self._random = random.Random(f"{world.seed} {number}")
        self.step_s = (world.costs.step_s if kind.step_s is None else kind.step_s) * self._around_1(
            kind.spread
        )
        # The version that it trains on, the newest that has come, and the last that it contributed to.
        self._version, self._newest, self._sent = 0, 0, -1
        self._word: Event | None = None
        self._is_called = self._is_training = False
        self._process: Process | None = None
        self._num_lives, self._born_s = 0, 0.0
        self._begin(self._train())
        if math.isfinite(kind.up_s):
            world.env.process(self._live_and_die())

    @property
    def is_alive(self) -> bool:
        return self._process is not None

    def received(self, version: int) -> None:
        """An update has come."""
        if self.is_alive:
            self._newest = max(self._newest, version)
            come(self._word)

    def call(self) -> None:
        """The open round, which it did not belong to, waits for it."""
        self._is_called = True
        come(self._word)

    # Rounds

    def _train(self) -> _Life:
        costs, train = self._world.costs, self._world.recipe.train
        ahead, apply_s, step_s = 0, 0.0, self._drawn_step_s()
        while True:
            self._is_training = True
            yield from self._work(train.local_steps - ahead, step_s, apply_s + costs.first_encode_s)
            self._contribute(costs.encode_s - costs.first_encode_s)
            ahead, step_s = train.steps_ahead, self._drawn_step_s()
            self._is_training = ahead > 0
            if ahead or costs.up_parts > 1:
                yield from self._work(ahead, step_s, costs.encode_s - costs.first_encode_s)
            if self._newest <= self._version:
                yield from self._wait()
            behind = self._newest - self._version
            taken = min(1, behind) if train.overlap else behind
            self._version += taken
            apply_s = taken * costs.apply_s

    def _work(self, steps: int, step_s: float, other_s: float) -> _Life:
        """Local steps, and other work, on this machine's cores."""
        work_s = steps * step_s + other_s
        if not work_s:
            return
        began_s = self._env.now
        if self._cores is None:
            yield self._env.timeout(work_s)
        else:
            done = self._cores.take(work_s * self._world.threads, self._world.threads)
            try:
                yield done
            except self._world.simpy.Interrupt:
                self._cores.drop(done)
                raise
        self._world.tally.computed_s += (self._env.now - began_s) * steps * step_s / work_s

    def _contribute(self, encode_s: float) -> None:
        """Send a contribution, whose parts but the first take so long to encode."""
        world, version = self._world, self._version
        parts = world.costs.up_parts

        def arrive(took_s: float) -> None:
            world.tally.stalled += took_s / parts > world.rules.silence_s
            self._server.received(self.number, version)

        self._sent = version
        self._uplink.send(world.costs.up_bytes, arrive, parts=parts, encode_s=encode_s)

    def _wait(self) -> _Life:
        """Until there is a later version, or the server calls."""
        while self._newest <= self._version and not self._is_called:
            self._word = self._env.event()
            yield self._word
        self._word, self._is_called = None, False

    def _drawn_step_s(self) -> float:
        """Seconds of a local step in one round."""
        kind = self.kind
        is_stalled = kind.stalls and self._random.random() < kind.stalls
        return self.step_s * self._around_1(kind.jitter) * (kind.stall_factor if is_stalled else 1.0)

    def _around_1(self, deviation: float) -> float:
        """Of the log-normal distribution with this deviation and the mean 1."""
        return self._random.lognormvariate(-(deviation**2) / 2, deviation) if deviation else 1.0

    # Lives

    def _live_and_die(self) -> _Life:
        while True:
            yield self._env.timeout(self._random.expovariate(1 / self.kind.up_s))
            num_lost = self._die()
            yield self._env.timeout(self._random.expovariate(1 / self.kind.down_s))
            self._begin(self._come_back(num_lost))

    def _begin(self, life: _Life) -> None:
        self._num_lives, self._born_s = self._num_lives + 1, self._env.now
        self._world.tally.count_alive(self._env.now, 1)
        self._process = self._env.process(self._until_interrupted(life))

    def _until_interrupted(self, life: _Life) -> _Life:
        with suppress(self._world.simpy.Interrupt):  # by `_die`
            yield from life

    def _die(self) -> int:
        """End without a word. Returns how many contributions were under way."""
        assert self._process is not None
        world, num_lives = self._world, self._num_lives
        world.tally.lost += self._is_training
        world.tally.count_alive(self._env.now, -1)
        self._process.interrupt()
        self._process, self._word, self._is_training = None, None, False
        silent_s = (self._env.now - self._born_s) % world.recipe.heartbeat_s
        missed_s = world.rules.silence_s - silent_s + self.kind.link.rtt_s / 2

        def miss(_: Event) -> None:
            if self._num_lives == num_lives:
                self._server.gone(self.number)

        then(self._env.timeout(missed_s), miss)
        self._downlink.cut()
        return self._uplink.cut()

    def _come_back(self, num_lost: int) -> _Life:
        """Join with the state that was kept, and go on.

        Args:
            num_lost: contributions that were under way.
        """
        yield self._env.timeout(self.kind.link.rtt_s)
        is_awaited, published = self._server.joined(self.number), self._server.version
        if published != self._sent:
            whole = self._env.event()
            self._downlink.send(self._world.costs.snapshot_bytes, lambda took_s: come(whole))
            yield whole
            self._version = published
        elif is_awaited:
            self._contribute(0.0)
            num_lost = 0
        self._world.tally.lost += num_lost
        if published == self._sent or not is_awaited:
            yield from self._wait()
        self._version, self._is_called = max(self._version, self._newest), False
        self._newest = self._version
        yield from self._train()
