"""The arithmetic of a merge: weights, the mean delta, and the outer step. fp32, in one fixed order.

Pure functions; W is (out, in), A (r, in), B (out, r).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lte import lowrank
from lte.config import Outer


@dataclass(frozen=True)
class HeadDelta:
    """One head's contribution to one weight: w s (B A - B' A'), kept as factors.

    Attributes:
        A, B: (r, in), (out, r). merged_A, merged_B: A', B', or None for zero.
        weight: s times the head's weight w in the mean.
    """

    A: Tensor
    B: Tensor
    merged_A: Tensor | None
    merged_B: Tensor | None
    weight: float


def shares(heads: Sequence[int], tokens: Sequence[int], num_missing_heads: int, by: str) -> list[float]:
    """Weight of each head of each merged worker; the missing do not enlarge the others.

    Args:
        heads: heads of each merged worker. tokens: tokens that each trained on.
        num_missing_heads: heads of workers that were expected and are not merged.
        by: `heads`: 1 / (number of heads expected); `tokens`: a worker's share of all tokens, those
            of the missing taken as the mean a head of the others.
    """
    expected = sum(heads) + num_missing_heads
    if by == "heads" or sum(tokens) == 0:
        return [1 / expected] * len(heads)
    tokens_expected = sum(tokens) * expected / sum(heads)
    return [t / tokens_expected / h for h, t in zip(heads, tokens, strict=True)]


def mean_delta(deltas: Sequence[HeadDelta]) -> Tensor:
    """sum_n w_n s_n (B_n A_n - B'_n A'_n), (out, in), as one product of the stacked factors.

    No head's delta is ever made in full; the order of heads fixes the result to the bit.
    """
    lefts, rights = [], []
    for head in deltas:
        left, right = head.B, head.A
        if head.merged_A is not None and head.merged_B is not None:
            left, right = lowrank.stacked(head.A, head.B, head.merged_A, head.merged_B)
        lefts.append(left * head.weight)
        rights.append(right)
    return torch.cat(lefts, dim=1) @ torch.cat(rights, dim=0)


def outer_step(
    weight: Tensor, delta: Tensor, momentum: Tensor | None, outer: Outer
) -> tuple[Tensor, Tensor | None]:
    """Move a master weight by the mean delta.

    The outer gradient is g = -delta. SGD is torch's: m <- mu m + g (m = g at first), then
    W <- W - lr (g + mu m) with Nesterov's momentum, W - lr m without. Averaging is W - g.

    Args:
        momentum: m, or None before the first step and without momentum.

    Returns:
        The new weight and the new m.
    """
    decayed = weight * (1 - outer.weight_decay) if outer.weight_decay else weight
    if outer.name == "average":
        return decayed + delta, None
    if not outer.momentum:
        return decayed + outer.lr * delta, None
    momentum = -delta if momentum is None else outer.momentum * momentum - delta
    step = outer.momentum * momentum - delta if outer.nesterov else momentum
    return decayed - outer.lr * step, momentum
