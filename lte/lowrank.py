"""Low-rank arithmetic: how a head starts, what it adds to a weight, how its subspace turns.

Pure functions of tensors. Shapes: lora_A (r, in), lora_B (out, r), weight (out, in); r is the
LoRA rank. Randomness comes only from seeds that are named, so that server and worker can draw
the same A without sending it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Init = Literal["semi-orthogonal", "kaiming", "xavier"]
Subspace = Literal["random", "disjoint", "shared"]


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else (not on PYTHONHASHSEED)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator_of(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded with `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def draw_A(
    rank: int,
    in_features: int,
    *,
    init: Init,
    subspace: Subspace,
    seed: int,
    module: str,
    head: int,
    draw: int,
    share: int | None = None,
) -> Tensor:
    """Draw one head's A, fp32, shape (rank, in_features).

    * `semi-orthogonal`: orthonormal rows times sqrt(in/r), as in the reference code (the paper's
      text has the inverse ratio). For rank > in_features the columns are orthogonal instead.
    * `kaiming`: U(-1/sqrt(in), 1/sqrt(in)), i.e. `kaiming_uniform_(a=sqrt(5))`, LoRA's own.
    * `xavier`: U(-b, b) with b = sqrt(6 / (in + r)).

    Args:
        subspace: `random` draws every head by itself. `disjoint` (semi-orthogonal only) deals the
            rows of one orthogonal (in, in) matrix to the heads in order of `head`, so that their
            row spaces are orthogonal while num_heads * share <= in; with equality, and all heads
            of that rank, the mean of A^T A over the heads is the identity. Heads beyond that use
            further matrices. `shared` gives every head the A of head 0, or the first rows that it was
            made of: then B alone tells heads apart.
        seed: the run's seed.
        module: name of the adapted module, so that modules differ.
        head: index of the head among all heads of all workers.
        draw: 0 at the start, then one more with each redraw (reset, rotation).
        share: rows that are drawn for a head where they are disjoint or shared, of which it takes the
            first `rank`: the rank of the largest heads. None: rank.
    """
    share = rank if share is None or subspace == "random" else share
    if subspace == "disjoint":
        assert init == "semi-orthogonal", "the recipe's checks let only this init be disjoint"
        # Block b of a matrix is what its rows add to those of blocks 0 ... b - 1.
        matrix, block = divmod(head, max(1, in_features // share))
        generators = [generator_of(seed, "A", module, "matrix", matrix, b, draw) for b in range(block + 1)]
        rows = torch.cat([_normal(share, in_features, generator) for generator in generators])
        used = rows[: block * share + rank]
        return _orthonormal_rows(used)[-rank:] * math.sqrt(in_features / rank)
    generator = generator_of(seed, "A", module, 0 if subspace == "shared" else head, draw)
    if init == "semi-orthogonal":
        rows_of_one = _normal(share, in_features, generator)[:rank]
        return _orthonormal_rows(rows_of_one) * math.sqrt(in_features / rank)
    bound = 1 / math.sqrt(in_features) if init == "kaiming" else math.sqrt(6 / (in_features + rank))
    return torch.empty(share, in_features).uniform_(-bound, bound, generator=generator)[:rank]


def draw_A_of_heads(
    rank: int,
    in_features: int,
    *,
    init: Init,
    subspace: Subspace,
    seed: int,
    module: str,
    heads: range,
    draw: int,
    share: int | None = None,
) -> Tensor:
    """`draw_A` of several heads of one module: (H, rank, in_features)."""
    return torch.stack(
        [
            draw_A(
                rank,
                in_features,
                init=init,
                subspace=subspace,
                seed=seed,
                module=module,
                head=head,
                draw=draw,
                share=share,
            )
            for head in heads
        ]
    )


def _normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _orthonormal_rows(normal: Tensor) -> Tensor:
    """Orthonormal rows with the span of `normal`'s, or columns where it has more rows than columns.

    Factored in float64, so that the fp32 result is orthogonal to fp32's precision.
    """
    wide = normal.shape[0] <= normal.shape[1]
    q, r = torch.linalg.qr(normal.T if wide else normal)
    q = q * torch.sign(torch.diagonal(r))  # makes the distribution uniform (Mezzadri 2007)
    rows: Tensor = q.T if wide else q
    return rows.contiguous().float()


def draw_rank(ranks: Sequence[int], *, seed: int, head: int, step: int) -> int:
    """One of these ranks, each place as likely as any other: the rank of a head in a local step.

    Args:
        seed: the run's. head: index of the head among all heads of all workers. step: local steps since the
            run's start.
    """
    generator = generator_of(seed, "nested", head, step)
    return ranks[int(torch.randint(len(ranks), (), generator=generator))]


def delta(
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    merged_A: Tensor | None = None,
    merged_B: Tensor | None = None,
) -> Tensor:
    """What a head adds to the weight beyond what the master already holds.

    D = s (B A - B' A'), computed as s [(B - B') A + B' (A - A')], which does not cancel when the
    head has moved little since it was merged.

    Args:
        lora_A: (r, in). lora_B: (out, r). scale: s.
        merged_A, merged_B: A' and B', or None for zero.

    Returns:
        (out, in), in the factors' dtype.
    """
    if merged_A is None or merged_B is None:
        return scale * (lora_B @ lora_A)
    left, right = stacked(lora_A, lora_B, merged_A, merged_B)
    return scale * (left @ right)


def sum_of_heads(lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """s times the sum of B A over heads, (out, in), as one product.

    Args:
        lora_A: (H, r, in). lora_B: (H, out, r).
    """
    left, right = side_by_side(lora_A, lora_B)
    return scale * (left @ right)


def side_by_side(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (left, right) of the sum of B A over heads: one head of rank H r.

    Args:
        lora_A: (H, r, in). lora_B: (H, ..., r).

    Returns:
        left (..., H r) and right (H r, in).
    """
    return lora_B.movedim(0, -2).flatten(-2), lora_A.flatten(0, 1)


def stacked(lora_A: Tensor, lora_B: Tensor, merged_A: Tensor, merged_B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (left, right) of B A - B' A' = [B - B', B'] [A; A - A'].

    Args:
        lora_A, merged_A: (..., r, in). lora_B, merged_B: (..., out, r).

    Returns:
        left (..., out, 2r) and right (..., 2r, in).
    """
    left = torch.cat([lora_B - merged_B, merged_B], dim=-1)
    right = torch.cat([lora_A, lora_A - merged_A], dim=-2)
    return left, right


def resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """A tensor of this size along one dimension: its first elements, then zeros."""
    same = tensor.narrow(dim, 0, min(size, tensor.shape[dim]))
    shape = list(tensor.shape)
    shape[dim] = size - same.shape[dim]
    return torch.cat([same, tensor.new_zeros(shape)], dim)


def transport(
    first_moment: Tensor, second_moment: Tensor, old_A: Tensor, new_A: Tensor
) -> tuple[Tensor, Tensor]:
    """Carry Adam's moments of B from the subspace of `old_A` into that of `new_A`.

    The gradient of B is s G A^T, so with (nearly) orthogonal rows of norm c the moment in W's space
    is M A / c^2, and in the new coordinates M (A A_new^T) / c^2. The second moment is rotated by
    the square of that matrix, as if coordinates were independent.

    Args:
        first_moment, second_moment: (out, r). old_A, new_A: (r, in).
    """
    # The pseudo-inverse: with more rows than columns A A^T has none of its own.
    rotation = torch.linalg.pinv(old_A @ old_A.T, hermitian=True) @ (old_A @ new_A.T)
    return first_moment @ rotation, second_moment @ rotation.square()
