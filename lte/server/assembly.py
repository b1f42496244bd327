"""What the parts of a divided master (`server.shards`) come to together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lte import quantize
from lte.compress import constants
from lte.config import Recipe
from lte.errors import RunError
from lte.nn import Plan, divide, plan, sizes_of
from lte.server import checkpoint, commit
from lte.server.checkpoint import Progress
from lte.server.commit import Prepared, Published
from lte.server.master import Master, Outcome, named_tensors
from lte.server.shards import folder_of

State = Mapping[str, Mapping[str, Tensor]]
Ask = Callable[[int, str, Sequence[str]], Mapping[str, Tensor]]
"""(shard, `which` of `Master.parameters`, names) -> these of its tensors of the plain model, by name."""
Traffic = tuple[int, int, dict[str, int]]
_MOST_BYTES = 1 << 22
"""Of what one message brings from another shard, but for larger tensors."""


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


@torch.no_grad()
def fill_others(model: nn.Module, which: str, plan: Plan, names: Sequence[Sequence[str]], ask: Ask) -> None:
    """Copy what all shards but the first have into a plain model; one message of it is there at a time.

    Args:
        which: as `Master.parameters` has it. plan: of the whole model. names: what each shard has.
    """
    tensors, sizes = named_tensors(model), sizes_of(plan)
    for shard, of_shard in enumerate(names[1:], 1):
        for part in commit.in_parts({name: sizes[name] for name in of_shard}, _MOST_BYTES):
            for name, tensor in ask(shard, which, part).items():
                if name in plan.constants:
                    constants.fill(tensors, {name: tensor})
                else:
                    tensors[name].copy_(tensor)


def master_digest(
    master: Master, names: Sequence[Sequence[str]], digests: Mapping[str, str], ask: Ask
) -> str:
    """Digest of the whole master: the one that it would have undivided.

    Args:
        master: the first shard's. names: what each shard has. digests: of all others' modules.
    """
    shard_of = {name: shard for shard, of_shard in enumerate(names) for name in of_shard}
    dense = (
        (name, master.dense[name] if name in master.dense else ask(shard_of[name], "master", [name])[name])
        for name in sorted(master.built.averaged)
    )
    found = {**master.digests(), **digests}
    return quantize.digest(dense, *(found[name] for name in master.built.adapted))


def load(run_folder: Path, recipe: Recipe) -> tuple[Progress, dict[str, dict[str, Tensor]]]:
    """The newest checkpoint of a run; of a divided one, the newest that all its shards have.

    Raises:
        RunError: there is none, or it is damaged.
    """
    loaded = list(map(checkpoint.load, newest(run_folder, recipe)))
    return loaded[0][0], joined([state for _, state in loaded])


def newest(run_folder: Path, recipe: Recipe) -> list[Path]:
    """The checkpoints, one of each shard, that `load` reads.

    Raises:
        RunError: there is none.
    """
    if recipe.server.shards == 1:
        return [checkpoint.newest(run_folder)]
    folders = [folder_of(run_folder, shard) / "checkpoints" for shard in range(recipe.server.shards)]
    found = [{checkpoint.version_of(p): p for p in checkpoint.versions(folder)} for folder in folders]
    common = set(found[0]).intersection(*found[1:])
    if not common:
        raise RunError(
            f"{run_folder}: its shards have no checkpoint of one version; go on with the run first"
        )
    return [paths[max(common)] for paths in found]


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
