"""The arithmetic of a merge: weights, the mean delta, and the outer step. fp32, in one fixed order.

Pure functions; W is (out, in), A (r, in), B (out, r).

Against poisoned contributions weights alone are used, never edits: what a worker sent counts as merged,
with a smaller weight or none. So its merged factors need no other rule than those of all others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lte import lowrank
from lte.config import Outer

_PIECE = 1 << 20
"""Elements of dense deltas that are looked at together, in fp64."""


@dataclass(frozen=True)
class HeadDelta:
    """One head's contribution to one weight: w s (B A - B' A'), kept as factors.

    Attributes:
        A, B: (r, in), (out, r). A is None for the identity, where B is of full rank.
        merged_A, merged_B: A', B', or None for zero.
        weight: s times the head's weight w in the mean.
    """

    A: Tensor | None
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


def staleness_weight(staleness: int, outer: Outer) -> float:
    """What is left of the weight of a contribution to a version that so many others have followed."""
    a = outer.staleness_exponent
    match outer.staleness:
        case "constant":
            return 1.0
        case "polynomial":
            return float((1 + staleness) ** -a)
        case "inverse":
            return 1 / (1 + a * staleness)


@dataclass(frozen=True)
class Robust:
    """What robust merging makes of the contributions to one merge.

    Attributes:
        factors: by tensor, on the weight of each of its addends (heads, or dense deltas).
        kept: of each contribution, the share of its length that its bounds leave.
        trimmed: indices of the contributions that are left out. The others do not grow by it.
    """

    factors: dict[str, list[float]]
    kept: list[float]
    trimmed: frozenset[int]


def robust(
    products: Mapping[str, Tensor],
    owners: Mapping[str, Sequence[int]],
    outer: Outer,
    quorum: int,
    aside: Collection[str] = (),
) -> Robust:
    """Bound lengths tensor by tensor, then leave out contributions whose direction is an outlier.

    Each tensor has a bound of its own: a contribution cannot hide a small tensor that it has blown up
    behind large ones, and is not cut everywhere for one that is long by chance.

    Args:
        products: by tensor, inner products of its weighted addends, (n, n), fp64; the diagonal is
            enough where `outer.trim` is none.
        owners: by tensor, the index of the contribution that each addend is of.
        quorum: least contributions to leave.
        aside: tensors that are bounded, but tell nothing of a contribution's length and direction.
    """
    num = 1 + max(owner for some in owners.values() for owner in some)
    merged = torch.zeros(num, num, dtype=torch.float64)
    before, after = torch.zeros(2, num, dtype=torch.float64)
    factors = {}
    for name, product in products.items():
        owned, squares = _indicator(owners[name], num), product.diagonal()
        factor = factors[name] = torch.ones_like(squares)
        if outer.bound_norm is not None:
            factor = factors[name] = bounds(squares.clamp(min=0).sqrt(), outer.bound_norm)
        if name in aside:
            continue
        merged += owned.T @ (product * torch.outer(factor, factor)) @ owned
        before += squares @ owned
        after += (squares * factor.square()) @ owned
    trimmed = frozenset[int]()
    if outer.trim is not None:
        trimmed = frozenset(outliers(merged, outer.trim, least=max(quorum, num // 2 + 1)))
    return Robust(
        factors={
            name: [
                0.0 if owner in trimmed else f for owner, f in zip(owners[name], factor.tolist(), strict=True)
            ]
            for name, factor in factors.items()
        },
        kept=torch.where(before > 0, after / before, 1.0).sqrt().tolist(),
        trimmed=trimmed,
    )


def bounds(norms: Tensor, multiple: float) -> Tensor:
    """Factors, at most 1, that hold each of these norms to a multiple of the median.

    The median is of those that moved at all: few workers may touch a module. Of two middle ones it is
    the lower, so that up to half of them may be anything.
    """
    moved = norms[norms > 0]
    if not len(moved):
        return torch.ones_like(norms)
    return (multiple * moved.median() / norms).clamp(max=1.0)


def outliers(products: Tensor, share: float, least: int) -> list[int]:
    """The contributions that agree with the others less than a share of what is usual.

    A contribution's agreement is the median of its cosines with each of the others; the usual one is
    the median of these. So neither lengths nor, below a half, poisoned ones among the others matter.
    What is usual is measured, as it depends on rank, batch and progress; where it is not positive,
    and for fewer than four, nobody is an outlier.

    Args:
        products: of contributions, (n, n). least: how many are left at least.

    Returns:
        Their indices, those that agree least first.
    """
    n = len(products)
    if n < 4:
        return []
    norms = products.diagonal().clamp(min=0).sqrt()
    cosines = (products / torch.outer(norms, norms)).nan_to_num()
    others = cosines[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    agreement = others.sort(dim=1).values[:, (n - 1) // 2]  # the upper of two middle ones
    usual = float(agreement.median())
    if usual <= 0:
        return []
    order = agreement.argsort(stable=True).tolist()
    return [k for k in order[: n - least] if agreement[k] < share * usual and norms[k] > 0]


def products(deltas: Sequence[HeadDelta]) -> Tensor:
    """Inner products of heads' weighted deltas, (n, n), fp64, from small matrices alone.

    With D = L R it is <D, D'> = sum((L^T L') * (R R'^T)); no matrix (out, in) is made.
    """
    if any(head.A is None for head in deltas):
        return dense_products([head.B for head in deltas], [head.weight for head in deltas])
    lefts, rights = zip(*map(product, deltas), strict=True)
    left, right = torch.cat(lefts, dim=1).double(), torch.cat(rights, dim=0).double()
    owners = [k for k, right in enumerate(rights) for _ in range(len(right))]
    owned = _indicator(owners, len(deltas))
    return owned.T @ ((left.T @ left) * (right @ right.T)) @ owned


def dense_products(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Inner products of weighted dense deltas of one shape, (n, n), fp64."""
    total = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    flat = [delta.flatten() for delta in deltas]
    for start in range(0, flat[0].numel(), _PIECE):
        piece = torch.stack([delta[start : start + _PIECE] for delta in flat]).double()
        total += piece @ piece.T
    w = torch.tensor(weights, dtype=torch.float64)
    return total * torch.outer(w, w)


def _indicator(owners: Sequence[int], n: int) -> Tensor:
    """(len(owners), n), 1 where the owner is: sums over what each owns are products with it."""
    return torch.nn.functional.one_hot(torch.tensor(owners, dtype=torch.long), n).double()


def mean_delta(deltas: Sequence[HeadDelta]) -> Tensor:
    """sum_n w_n s_n (B_n A_n - B'_n A'_n), (out, in), as one product of the stacked factors.

    No head's delta is ever made in full, unless it is of full rank; the order of heads fixes the result to
    the bit.
    """
    if any(head.A is None for head in deltas):
        total = torch.zeros_like(deltas[0].B)
        for head in deltas:
            total += head.B * head.weight
        return total
    lefts, rights = zip(*map(product, deltas), strict=True)
    return torch.cat(lefts, dim=1) @ torch.cat(rights, dim=0)


def product(head: HeadDelta) -> tuple[Tensor, Tensor]:
    """Factors, left (out, k) and right (k, in), of w s (B A - B' A'): k is r, or 2 r with merged factors."""
    left, right = head.B, torch.eye(head.B.shape[1]) if head.A is None else head.A
    if head.merged_A is not None and head.merged_B is not None:
        left, right = lowrank.stacked(right, head.B, head.merged_A, head.merged_B)
    return left * head.weight, right


def outer_step(
    weight: Tensor, delta: Tensor, state: Mapping[str, Tensor], outer: Outer, share: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Move a master weight by the mean delta.

    The outer gradient is g = -delta. Averaging is W - g. SGD is torch's: m <- mu m + g (m = g at first),
    then W <- W - lr (g + mu m) with Nesterov's momentum, W - lr m without. Adam is torch's, too:
    m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2, both divided by the sum of the weights in
    them, then W <- W - lr m / (sqrt(v) + eps).

    With a delta that is a share of a round that share of a round's time passes: momentum fades to mu^share,
    and moves W (1 - mu^share) / (1 - mu) times as far as in a round. So it fades as much in the shares of a
    round as in the round, and a delta moves W by lr / (1 - mu) times itself in the end either way.

    Args:
        state: of this weight, as it was returned; empty before the first step.
        share: of the heads of a round, how many the delta is of; not for Adam.

    Returns:
        The new weight and the new state: `momentum` (m), and Adam's `squares` (v) and `steps`; empty
        where there is none to keep.
    """
    decayed = weight * (1 - outer.weight_decay * share) if outer.weight_decay else weight
    if outer.name == "average":
        return decayed + delta, {}
    if outer.name == "adam":
        assert share == 1, "config.rules"
        return _adam(decayed, delta, state, outer)
    if not outer.momentum:
        return decayed + outer.lr * delta, {}
    # One that Adam has left behind is of another size.
    held = None if "squares" in state else state.get("momentum")
    fade = outer.momentum**share
    gain = outer.momentum * ((1 - fade) / (1 - outer.momentum))
    momentum = -delta if held is None else fade * held - delta
    moves = momentum if outer.nesterov else held
    step = -delta if moves is None else gain * moves - delta
    return decayed - outer.lr * step, {"momentum": momentum}


def _adam(
    weight: Tensor, delta: Tensor, state: Mapping[str, Tensor], outer: Outer
) -> tuple[Tensor, dict[str, Tensor]]:
    if "squares" not in state:
        zeros = torch.zeros_like(delta)
        state = {"momentum": zeros, "squares": zeros, "steps": torch.zeros((), dtype=torch.int64)}
    momentum = outer.beta1 * state["momentum"] - (1 - outer.beta1) * delta
    squares = outer.beta2 * state["squares"] + (1 - outer.beta2) * delta.square()
    steps = state["steps"] + 1
    of_momentum, of_squares = (1 - beta ** int(steps) for beta in (outer.beta1, outer.beta2))
    size = (squares / of_squares).sqrt() + outer.eps
    moved = weight - outer.lr * (momentum / of_momentum) / size
    return moved, {"momentum": momentum, "squares": squares, "steps": steps}
