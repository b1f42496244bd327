"""What all parts of a simulated run look at: the clock, the recipe, what things cost, what is counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lte.config import Recipe
from lte.cost.links import Link, Site
from lte.cost.model import Rates, lte_round, plan_of, sizes, tokens_of_step
from lte.errors import UserError
from lte.server.rounds import Rules

if TYPE_CHECKING:
    from simpy import Environment

MESSAGE_S = 1.5e-5
"""Seconds of the server's CPU for a message in or out. About: of `wire`, `rounds.step` and zmq."""
MEMBER_S = 4e-9
"""Seconds more for a message in, and for each member: `rounds.step` copies their table. Measured."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a round costs: bytes, and seconds on one core; of a worker, but for requantize and pack.

    Attributes:
        up_parts, down_parts: messages that they travel in. tokens: of a local step.
    """

    up_bytes: float
    up_parts: int
    down_bytes: float
    down_parts: int
    snapshot_bytes: float
    tokens: int
    step_s: float
    encode_s: float
    decode_s: float
    merge_s: float
    requantize_s: float
    pack_s: float
    apply_s: float

    @property
    def first_encode_s(self) -> float:
        """Until the first part of a contribution is encoded; the others are while it travels."""
        return self.encode_s / self.up_parts

    @property
    def first_pack_s(self) -> float:
        """Until the first part of an update is."""
        return self.pack_s / self.down_parts


def costs_of(recipe: Recipe, rates: Rates) -> Costs:
    """What `lte plan` computes, of one worker."""
    plan, anywhere = plan_of(recipe), Link(up_bps=math.inf, down_bps=math.inf, rtt_s=0.0)
    one = lte_round(recipe, plan, [Site(name="worker", link=anywhere, count=1)], rates)
    up_bytes, down_bytes = sum(one.uplink_bytes.values()), sum(one.downlink_bytes.values())
    part_bytes = recipe.compress.part_bytes
    return Costs(
        up_bytes=up_bytes,
        up_parts=max(1, math.ceil(up_bytes / part_bytes)),
        down_bytes=down_bytes,
        down_parts=max(1, math.ceil(down_bytes / part_bytes)),
        snapshot_bytes=sizes(recipe, plan).snapshot_bytes,
        tokens=tokens_of_step(recipe),
        step_s=rates.step_s,
        encode_s=one.seconds.encode,
        decode_s=one.seconds.decode,
        merge_s=one.seconds.merge,
        requantize_s=one.seconds.requantize,
        pack_s=one.seconds.pack,
        apply_s=one.seconds.apply,
    )


@dataclass
class Tally:
    """What is counted until now.

    Attributes:
        used, late, lost, stalled: contributions, as in `run.Figures`.
        computed_s: of all workers, in local steps. alive_s: of all, until `seen_s`; alive: how many are.
    """

    used: int = 0
    late: int = 0
    lost: int = 0
    stalled: int = 0
    computed_s: float = 0.0
    alive_s: float = 0.0
    alive: int = 0
    seen_s: float = 0.0

    def count_alive(self, now_s: float, more: int = 0) -> None:
        """So many more are alive from now on."""
        self.alive_s += self.alive * (now_s - self.seen_s)
        self.seen_s = now_s
        self.alive += more


class World:
    """A simulated run's clock, settings and counters.

    Attributes:
        simpy: the library. threads: of a worker. shards: parts of the server, each with 1 / shards of
            its work.
    """

    def __init__(self, recipe: Recipe, costs: Costs, *, seed: int, shards: int) -> None:
        """Begin at 0 s.

        Raises:
            UserError: simpy is not installed.
        """
        try:
            import simpy
        except ImportError:
            raise UserError("a simulation needs simpy; pip install 'lte[simulate]'") from None
        self.simpy: Any = simpy
        self.env: Environment = simpy.Environment()
        self.recipe, self.costs, self.seed, self.shards = recipe, costs, seed, shards
        self.threads, self.tally = recipe.worker.num_threads, Tally()
        workers, server = recipe.train.workers, recipe.server
        self.rules = Rules(
            workers=workers,
            rounds=recipe.train.rounds,
            quorum=server.quorum,
            grace_s=recipe.grace_s,
            deadline_s=server.deadline_s,
            silence_s=server.silence_s,
            most_workers=workers,
        )

    @property
    def hear_s(self) -> float:
        """Seconds of the server's CPU for a message in."""
        return MESSAGE_S + MEMBER_S * self.rules.workers
