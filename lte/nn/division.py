"""The division of a model among a run's servers (`server.shards`): by bytes, a function of its plan alone."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from lte.errors import ConfigError
from lte.nn.plan import Plan


def divide(plan: Plan, num_shards: int) -> tuple[tuple[str, ...], ...]:
    """The names of modules with heads, dense parameters, statistics and constants of each shard.

    The largest goes first, each to the shard that has the fewest bytes then. A tensor is never divided.

    Raises:
        ConfigError: there are more shards than tensors.
    """
    sizes, num_trained = sizes_of(plan), len(plan.adapted) + len(plan.averaged)
    if num_shards > num_trained:
        raise ConfigError(
            [f"server.shards: {num_shards} is more than the {num_trained} tensors that are trained"]
        )
    shards: list[list[str]] = [[] for _ in range(num_shards)]
    loads = [(0, 0)] * num_shards
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        k = loads.index(min(loads))
        shards[k].append(name)
        loads[k] = (loads[k][0] + sizes[name], loads[k][1] + 1)
    return tuple(map(tuple, shards))


def sizes_of(plan: Plan) -> dict[str, int]:
    """Bytes in the plain model of what is divided, by the names of modules and tensors."""
    sizes = {name: 4 * math.prod(spec.shape) for name, spec in plan.adapted.items()}
    sizes |= {name: 4 * math.prod(shape) for name, shape in plan.averaged.items()}
    return sizes | {name: c.dtype.itemsize * math.prod(c.shape) for name, c in plan.constants.items()}


def part_of(plan: Plan, names: Collection[str]) -> Plan:
    """The plan of what has these names."""
    of = frozenset(names)
    return replace(
        plan,
        adapted={name: spec for name, spec in plan.adapted.items() if name in of},
        dense={name: shape for name, shape in plan.dense.items() if name in of},
        statistics={name: shape for name, shape in plan.statistics.items() if name in of},
        constants={name: constant for name, constant in plan.constants.items() if name in of},
    )
