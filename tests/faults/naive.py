"""The arithmetic of a run, naively and in float64, from its initial weights and what its journal holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lte import config
from lte.compress import blockwise
from lte.server import checkpoint, journal

Factors = dict[str, tuple[Tensor, Tensor]]


def master(run: Path) -> tuple[dict[str, Tensor], list[int]]:
    """W += 1 / (heads expected) * the sum of s (B A - B' A') over heads, version by version; each with its
    weight, where contributions are merged on arrival.

    For runs in reset-less mode with a trained A, whose factors and dense changes travel in fp32.

    Returns:
        The master's parameters, and how many heads each version expected.
    """
    recipe = config.load(run / "config.yaml")
    assert (recipe.lora.merge, recipe.lora.A, recipe.outer.name) == ("reset-less", "trained", "average")
    assert (recipe.compress.factors, recipe.compress.dense) == ("fp32", "fp32")
    _, state = checkpoint.load(run / "checkpoints" / "version-00000000")
    weights = {name: tensor.double() for name, tensor in state["master"].items()}
    assert recipe.outer.staleness in ("constant", "polynomial")
    power = recipe.outer.staleness_exponent if recipe.outer.staleness == "polynomial" else 0.0
    kept: dict[int, journal.Kept] = {}
    merged: dict[tuple[str, int, int], Factors] = {}  # of heads like these of this worker
    expected: list[int] = []
    for segment in journal.history(run):
        for record in segment:
            if isinstance(record, journal.Kept):
                kept[record.incarnation] = record
            elif isinstance(record, journal.Merged):
                taken = [kept[incarnation] for incarnation in record.incarnations]
                expected.append(sum(c.heads for c in taken) + record.num_missing_heads)
                for contribution in taken:
                    weight = float(record.version - contribution.version) ** -power
                    _merge(
                        contribution,
                        weight / expected[-1],
                        contribution.scale or recipe.lora.scale,
                        weights,
                        merged,
                    )
    return weights, expected


def _merge(
    contribution: journal.Kept,
    share: float,
    scale: float,
    weights: dict[str, Tensor],
    merged: dict[tuple[str, int, int], Factors],
) -> None:
    blobs = {name: torch.tensor(np.frombuffer(blob, np.uint8)) for name, blob in contribution.blobs.items()}
    heads, rank = contribution.heads, contribution.rank
    mine = contribution.worker_id, heads, rank
    for other in [them for them in merged if them[0] == mine[0] and them != mine]:
        del merged[other]  # gone: what comes back is new
    before = merged.setdefault(mine, {})
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if f"{module}/B" not in blobs:
            change = blockwise.decode_rows(blobs[f"{name}/dense"], "fp32", tuple(weight.shape))
            weight += change.double() * heads * share
            continue
        out_features, in_features = weight.shape
        A = blockwise.decode_rows(blobs[f"{module}/A"], "fp32", (heads * rank, in_features)).double()
        B = blockwise.decode_rows(blobs[f"{module}/B"], "fp32", (heads * out_features, rank)).double()
        A, B = A.view(heads, rank, in_features), B.view(heads, out_features, rank)
        old_A, old_B = before.get(module, (torch.zeros_like(A), torch.zeros_like(B)))
        before[module] = A + old_A, B + old_B
        weight += scale * share * ((B + old_B) @ (A + old_A) - old_B @ old_A).sum(0)
