"""What the parts of a divided master (`server.shards`) come to together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from lte.config import Recipe
from lte.errors import RunError
from lte.nn import divide, plan
from lte.server import checkpoint
from lte.server.checkpoint import Progress
from lte.server.commit import Prepared, Published
from lte.server.master import Master, Outcome
from lte.server.shards import folder_of

State = Mapping[str, Mapping[str, Tensor]]
Traffic = tuple[int, int, dict[str, int]]


def names(model: nn.Module, recipe: Recipe) -> tuple[tuple[str, ...], ...]:
    """What each shard has of a plain model; nothing where it is not divided.

    Raises:
        ConfigError: there are more shards than tensors.
    """
    if recipe.server.shards == 1:
        return ()
    return divide(plan(model, recipe.as_built.lora, recipe.as_built.base.quant), recipe.server.shards)


def joined(states: Sequence[State]) -> dict[str, dict[str, Tensor]]:
    """The groups of tensors of all shards."""
    groups: dict[str, dict[str, Tensor]] = {}
    for state in states:
        for group, tensors in state.items():
            groups.setdefault(group, {}).update(tensors)
    return groups


def fill(master: Master, version: int, states: Sequence[State]) -> None:
    """Have a master of the whole model hold what the shards do: what is published, W and its average.
    What only merges need is left out."""
    master.enter(version)
    master.load_state({**joined(states), "momentum": {}, "merged": {}})


def load(run_folder: Path, recipe: Recipe) -> tuple[Progress, dict[str, dict[str, Tensor]]]:
    """The newest checkpoint of a run; of a divided one, the newest that all its shards have.

    Raises:
        RunError: there is none, or it is damaged.
    """
    if recipe.server.shards == 1:
        return checkpoint.load(checkpoint.newest(run_folder))
    folders = [folder_of(run_folder, shard) / "checkpoints" for shard in range(recipe.server.shards)]
    found = [{checkpoint.version_of(p): p for p in checkpoint.versions(folder)} for folder in folders]
    common = set(found[0]).intersection(*found[1:])
    if not common:
        raise RunError(
            f"{run_folder}: its shards have no checkpoint of one version; go on with the run first"
        )
    loaded = [checkpoint.load(paths[max(common)]) for paths in found]
    return loaded[0][0], joined([state for _, state in loaded])


def outcome(own: Outcome, prepared: Sequence[Prepared]) -> Outcome:
    """What the merges of all shards came to."""
    if not prepared:
        return own
    change = math.hypot(own.change, *(shard.change for shard in prepared))
    return replace(own, change=change, step=math.hypot(own.step, *(shard.step for shard in prepared)))


def changed(master: Master, own: dict[str, float], published: Sequence[Published]) -> dict[str, float]:
    """What `Publisher.publish` says, of all shards.

    Args:
        master: the first shard's. own: what it said there.
    """
    if not published:
        return own
    num_scales = sum(base.scales.numel() for base in master.base.values())
    parts = [
        (own, master.plan.num_adapted_parameters, num_scales),
        *((shard.changed, shard.num_parameters, shard.num_scales) for shard in published),
    ]

    def mean(key: str, place: int) -> float:
        sizes = [(part[1], part[2])[place] for part in parts]
        return sum(part[0][key] * size for part, size in zip(parts, sizes, strict=True)) / max(sum(sizes), 1)

    return {
        "codes_changed": mean("codes_changed", 0),
        "scales_changed": mean("scales_changed", 1),
        "changes_bytes": sum(part[0]["changes_bytes"] for part in parts),
    }


def traffic(own: Traffic, published: Sequence[Published]) -> Traffic:
    """Bytes up, down and by kind, of all shards."""
    up, down, by_kind = own
    return (
        up + sum(shard.uplink_bytes for shard in published),
        down + sum(shard.downlink_bytes for shard in published),
        {kind: num + sum(shard.by_kind[kind] for shard in published) for kind, num in by_kind.items()},
    )
