"""A simulated run as a whole: workers of all classes, their server, and what they come to."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lte.config import Recipe
from lte.cost.model import Rates
from lte.errors import ConfigError
from lte.simulate.fleet import Fleet, WorkerClass
from lte.simulate.fluid import Shared
from lte.simulate.links import Connection, Way, payload
from lte.simulate.server import Server
from lte.simulate.worker import Worker
from lte.simulate.world import Tally, World, costs_of

_MANY_TIMES = 100
"""A run whose rounds take so many times as long as without faults is given up."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a simulated run came to, from its first merge to its last.

    Attributes:
        merged: versions published; fewer than asked for where the run got stuck.
        round_s: from merge to merge, mean; infinite where there were not two.
        tokens_s: of contributions that were merged. efficiency: the share that this is of what the workers
            would train on if they never died and never waited.
        compute_share: of the time that workers live, the share in local steps.
        server_up, server_down, server_cpu: utilisation of the server's link from and to the workers, 0
            where it has no limit, and of its CPU; of each shard.
        uplink_bytes, downlink_bytes: a round, of all workers, through the server's link.
        used, late, lost: contributions merged; that came after the merge; that died with a worker.
        stalled: contributions with parts that took longer than `server.silence_s`, for which the product
            would have taken their workers for gone.
    """

    workers: int
    merged: int
    round_s: float
    tokens_s: float
    efficiency: float
    compute_share: float
    server_up: float
    server_down: float
    server_cpu: float
    uplink_bytes: float
    downlink_bytes: float
    used: int
    late: int
    lost: int
    stalled: int


def simulate(
    recipe: Recipe,
    fleet: Fleet,
    rates: Rates,
    *,
    rounds: int = 20,
    seed: int = 0,
    shards: int = 1,
    relay_group: int = 1,
) -> Figures:
    """Run `train.workers` workers of a fleet.

    Args:
        rounds: to merge, two at least. seed: of lifetimes and of how long steps take.
        shards: of the server. relay_group: workers of one class that one relay updates.

    Raises:
        ConfigError: the recipe has no rounds, or no server, or there are relays before a divided one.
        UserError: simpy is not installed.
    """
    if recipe.merges_on_arrival:
        raise ConfigError(["outer.when: simulated are rounds, not merges on arrival; set outer.when=round"])
    if recipe.train.method != "lte":
        raise ConfigError([f"train.method: simulated is lte, not {recipe.train.method}"])
    if shards > 1 and relay_group > 1:
        raise ConfigError(["server.shards: a divided server has no relays; simulate the one or the other"])
    world = World(recipe, costs_of(recipe, rates), seed=seed, shards=shards)
    with _no_collector():
        return _Run(world, fleet, relay_group).figures(rounds)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Leave garbage to the counts of references. Python's collector would look through the events of ten
    thousand workers again and again: it takes most of the time, and finds next to nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """Where all counters stood when a version was published."""

    time_s: float
    version: int
    up_bytes: float
    down_bytes: float
    cpu_s: float
    tally: Tally


class _Run:
    def __init__(self, world: World, fleet: Fleet, relay_group: int) -> None:
        env, shards = world.env, world.shards
        self._world, self._fleet, self._relay_group = world, fleet, relay_group
        self._up = Shared(env, payload(fleet.server_up_bps) * shards)
        self._down = Shared(env, payload(fleet.server_down_bps) * shards)
        self._cores = Shared(env, fleet.cores) if math.isfinite(fleet.cores) else None
        self._workers: list[Worker] = []
        self._server = Server(
            world, self._cores, call=lambda number: self._workers[number].call(), publish=self._publish
        )
        self._groups: list[tuple[Connection, Sequence[Worker]]] = []
        # Local steps a second that all workers would take if they did nothing else.
        self._steps_per_s = 0.0
        for kind, count in zip(fleet.classes, fleet.counts(world.rules.workers), strict=True):
            self._add(kind, count)
        self._counts: list[_Counts] = []
        self._rounds, self._finished = 0, env.event()

    def _add(self, kind: WorkerClass, count: int) -> None:
        """Add the workers of a class, with what they share."""
        world, link, number = self._world, kind.link, len(self._workers)
        up = Way(link, link.up_bps / kind.per_link, self._up)
        down = Way(link, link.down_bps / kind.per_link, self._down)
        relayed = Way(link, link.down_bps * min(1.0, self._relay_group / kind.per_link), self._down)
        for first in range(0, count, kind.per_machine):
            num_here = min(kind.per_machine, count - first)
            cores, num_sharing = self._cores, world.rules.workers
            if cores is None and math.isfinite(kind.cores):
                cores, num_sharing = Shared(world.env, kind.cores), num_here
            speed = 1.0 if cores is None else min(1.0, cores.capacity / (num_sharing * world.threads))
            for k in range(number + first, number + first + num_here):
                worker = Worker(world, self._server, k, kind, up=up, down=down, cores=cores)
                self._workers.append(worker)
                self._steps_per_s += speed / (worker.step_s * (1 + kind.stalls * (kind.stall_factor - 1)))
        for first in range(number, number + count, self._relay_group):
            last = min(first + self._relay_group, number + count)
            self._groups.append((Connection(world.env, relayed), self._workers[first:last]))

    def _publish(self, num_merged: int, pack_s: float) -> None:
        """Send a version of so many contributions, whose parts but the first take so long to pack."""
        world, costs, version = self._world, self._world.costs, self._server.version
        world.tally.used += num_merged
        world.tally.count_alive(world.env.now)
        counts = _Counts(
            time_s=world.env.now,
            version=version,
            up_bytes=self._up.given,
            down_bytes=self._down.given,
            cpu_s=self._server.cpu.busy_s,
            tally=dataclasses.replace(world.tally),
        )
        self._counts = [*self._counts[:1], counts]
        with self._down.at_once():
            for connection, workers in self._groups:
                if any(worker.is_alive for worker in workers):
                    arrive = _to_all(workers, version)
                    connection.send(costs.down_bytes, arrive, parts=costs.down_parts, encode_s=pack_s)
        if version == self._rounds:
            self._finished.succeed()

    def figures(self, rounds: int) -> Figures:
        """Go on until so many rounds are merged, or it takes far too long."""
        self._rounds = rounds
        env = self._world.env
        env.run(until=self._finished | env.timeout(rounds * self._too_long_s()))
        if len(self._counts) < 2:
            tally = self._world.tally
            return _nothing(self._world.rules.workers, self._server.version, tally)
        return self._between(*self._counts)

    def _between(self, first: _Counts, last: _Counts) -> Figures:
        world, costs, before, after = self._world, self._world.costs, first.tally, last.tally
        seconds, rounds = last.time_s - first.time_s, last.version - first.version
        used = after.used - before.used
        steps = used * world.recipe.train.local_steps
        worked_s = (last.cpu_s - first.cpu_s) / self._server.cpu.slowed
        up_bytes, down_bytes = last.up_bytes - first.up_bytes, last.down_bytes - first.down_bytes
        return Figures(
            workers=world.rules.workers,
            merged=last.version,
            round_s=seconds / rounds,
            tokens_s=steps * costs.tokens / seconds,
            efficiency=steps / seconds / self._steps_per_s,
            compute_share=(after.computed_s - before.computed_s) / (after.alive_s - before.alive_s),
            server_up=up_bytes / seconds / self._up.capacity,
            server_down=down_bytes / seconds / self._down.capacity,
            server_cpu=min(1.0, self._server.beats_share + worked_s / seconds),
            uplink_bytes=up_bytes / rounds,
            downlink_bytes=down_bytes / rounds,
            used=used,
            late=after.late - before.late,
            lost=after.lost - before.lost,
            stalled=after.stalled - before.stalled,
        )

    def _too_long_s(self) -> float:
        """For a round: many times what it takes where all comes one after the other."""
        world, costs = self._world, self._world.costs
        workers, steps = world.rules.workers, world.recipe.train.local_steps
        step_s = max(worker.step_s * worker.kind.stall_factor for worker in self._workers)
        moved_s = max(
            connection.way.alone_s(costs.up_bytes + costs.down_bytes) for connection, _ in self._groups
        )
        in_line_s = costs.decode_s + costs.merge_s + costs.up_bytes / self._up.capacity
        in_line_s += costs.down_bytes / self._down.capacity
        alone_s = steps * step_s + costs.encode_s + costs.apply_s + moved_s
        if self._cores is not None:
            in_line_s += alone_s / self._cores.capacity
        server_s = (costs.requantize_s + costs.pack_s + workers * in_line_s) * self._server.cpu.slowed
        return _MANY_TIMES * (alone_s + server_s) + world.rules.deadline_s + world.rules.silence_s


def _to_all(workers: Sequence[Worker], version: int) -> Callable[[float], None]:
    def arrive(took_s: float) -> None:
        for worker in workers:
            worker.received(version)

    return arrive


def _nothing(workers: int, merged: int, tally: Tally) -> Figures:
    """Of a run without two merges."""
    return Figures(
        workers=workers,
        merged=merged,
        round_s=math.inf,
        tokens_s=0.0,
        efficiency=0.0,
        compute_share=0.0,
        server_up=0.0,
        server_down=0.0,
        server_cpu=0.0,
        uplink_bytes=0.0,
        downlink_bytes=0.0,
        used=tally.used,
        late=tally.late,
        lost=tally.lost,
        stalled=tally.stalled,
    )
