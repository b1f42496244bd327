"""What the forward passes of a local step draw: dropout's masks, and the ranks of nested heads. Each is a
function of run, head and step, so that neither a restart nor threads of other workers change it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lte import lowrank
from lte.config import Recipe
from lte.nn import Adapted


def seed_dropout(
    modules: Mapping[str, Adapted],
    recipe: Recipe,
    *,
    first_head: int,
    step: int,
    forward: int,
    process: int = 0,
) -> None:
    """Choose the masks of the next forward pass.

    Args:
        first_head: global number of the worker's first one. step: local steps of this worker before.
        forward: passes of the local step before: micro-batches have masks of their own.
        process: of the worker, as each sees other samples.
    """
    others = (process,) if process else ()
    for name, module in modules.items():
        module.dropout_seeds = [
            lowrank.seed_of(recipe.run.seed, "dropout", name, head, step, forward, *others)
            for head in range(first_head, first_head + module.num_slices)
        ]


def ranks(modules: Mapping[str, Adapted], recipe: Recipe, *, first_head: int, step: int) -> list[int]:
    """Rank b of each head in a local step, the same on all processes of a worker. Modules of a smaller
    lora_rank are used whole."""
    drawn, seed = drawn_ranks(modules, recipe), recipe.run.seed
    heads = next((module.heads for module in modules.values()), 1)
    return [lowrank.draw_rank(drawn, seed=seed, head=first_head + h, step=step) for h in range(heads)]


def drawn_ranks(modules: Mapping[str, Adapted], recipe: Recipe) -> tuple[int, ...]:
    """The ranks that heads as they are now draw from."""
    return recipe.lora.drawn_ranks(max((m.rank for m in modules.values()), default=1))


def gate(modules: Mapping[str, Adapted], recipe: Recipe, used: Sequence[int]) -> None:
    """Have the next forward pass use the first b columns of each head's B, at lora_alpha / b.

    Args:
        used: b of each head.
    """
    for module in modules.values():
        gates = torch.zeros(module.heads, 1, module.rank)
        for of_head, b in zip(gates, used, strict=True):
            of_head[:, :b] = recipe.lora.nested_scale(module.rank, min(b, module.rank))
        module.gates = gates.to(module.lora_B.device)
