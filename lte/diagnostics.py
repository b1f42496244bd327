"""What heads, updates and bases look like: torch in, numbers out. Nothing here is merged or published.

Shapes: A (r, in), B (out, r), a weight or an update of one (out, in), n heads or workers. All is computed
in float64. What is not defined, such as the direction of a delta of zeros, is NaN.

The LTE paper (Huh et al. 2024, arXiv 2402.16828) looks at `cosines` and `grassmann_distance` between heads
and at the `effective_rank` of updates; the LoRA paper (Hu et al. 2021, arXiv 2106.09685, section 7) at
`subspace_similarities` and `amplification`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lte import merge, quantize
from lte.merge import HeadDelta
from lte.quantize import Quantized

_ZERO = 1e-6
"""Singular values below this share of the largest are rounding errors of fp32."""


# Heads beside each other


def cosines(deltas: Sequence[HeadDelta]) -> Tensor:
    """<D_m, D_n> / (||D_m|| ||D_n||) of heads' deltas D = B A - B' A', (n, n), from their factors alone.

    Weights and scales do not matter.
    """
    products = merge.products([replace(delta, weight=1.0) for delta in deltas])
    norms = products.diagonal().clamp(min=0).sqrt()
    return products / torch.outer(norms, norms)


def of_pairs(matrix: Tensor) -> Tensor:
    """What a symmetric (n, n) says of two different ones: its n (n - 1) / 2 elements above the diagonal."""
    row, column = torch.triu_indices(len(matrix), len(matrix), offset=1)
    return matrix[row, column]


def subspaces(delta: HeadDelta) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of a head's column space, (out, k), and row space, (in, k), from its factors alone.

    They are the left and right singular vectors of B A - B' A', the leading r of them where merged factors
    add to its rank. k is less than r where its rank is.
    """
    left, right = merge.product(replace(delta, weight=1.0))
    left_basis, left_core = torch.linalg.qr(left.double())
    right_basis, right_core = torch.linalg.qr(right.double().T)
    u, values, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    k = min(delta.B.shape[1], int((values > _ZERO * values[0]).sum()))
    return left_basis @ u[:, :k], right_basis @ vh[:k].T


def grassmann_distance(one: Tensor, other: Tensor) -> float:
    """Geodesic distance of two subspaces: sqrt(sum_i theta_i^2), in radians.

    cos theta_i are the singular values of U^T V, and theta_i the principal angles, as many as the smaller
    subspace has dimensions k. 0 where it lies in the other one, sqrt(k) pi/2 where they are orthogonal.

    Args:
        one, other: orthonormal bases U (d, k), V (d, l), such as `subspaces` gives.
    """
    if not one.shape[1] or not other.shape[1]:
        return math.nan
    cosine = torch.linalg.svdvals(one.double().T @ other.double()).clamp(max=1)
    return float(cosine.acos().norm())


def subspace_similarities(one: Tensor, other: Tensor) -> Tensor:
    """The LoRA paper's equation 4 at all i and j: ||U_i^T V_j||_F^2 / min(i, j), from 0 (orthogonal) to 1
    (one contains the other). U_i, V_j are the leading i and j columns.

    Args:
        one, other: orthonormal U (d, k), V (d, l), by descending singular value: right singular vectors of
            A of two ranks or runs, or of their updates.

    Returns:
        (k, l): of i = 1 ... k and j = 1 ... l.
    """
    shared = (one.double().T @ other.double()).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, one.shape[1] + 1), torch.arange(1, other.shape[1] + 1)
    return shared / torch.minimum(i[:, None], j)


# An update by itself, and beside the weight


class Singular(NamedTuple):
    """Singular values of a matrix (out, in), k = min(out, in) of them, and vectors.

    Attributes:
        left: (out, k), zeros where the value is zero. values: (k,), descending. right: (in, k).
    """

    left: Tensor
    values: Tensor
    right: Tensor


def singular(matrix: Tensor) -> Singular:
    """Decompose a matrix by the eigenvalues of its smaller Gram matrix, several times faster than an SVD.

    That squares the condition: values below 1e-6 of the largest are taken for zero, where those of an
    fp32 matrix are noise, too.
    """
    m = matrix.double()
    if not m.isfinite().all():  # a run that has diverged
        k, nan = min(m.shape), torch.full_like(m, math.nan)
        return Singular(nan[:, :k], nan[0, :k], nan.T[:, :k])
    if m.shape[0] < m.shape[1]:
        flipped = singular(m.T)
        return Singular(flipped.right, flipped.values, flipped.left)
    squares, vectors = torch.linalg.eigh(m.T @ m)
    values, right = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    values = torch.where(values > _ZERO * values[0], values, 0)
    left = torch.where(values > 0, m @ right / values, 0)
    return Singular(left, values, right)


def effective_rank(values: Tensor) -> float:
    """exp(H(p)), p = values / sum(values): from 1 to their number (Roy & Vetterli 2007).

    Args:
        values: singular values of a matrix.
    """
    share = values.double() / values.sum()
    return float(torch.special.entr(share).sum().exp())


def stable_rank(values: Tensor) -> float:
    """||M||_F^2 / ||M||_2^2 of a matrix with these singular values: from 1 to its rank."""
    return float((values.double() / values.max()).square().sum())


def amplification(update: Singular, weight: Tensor, rank: int) -> float:
    """How much stronger an update is in its own directions than the weight was in them:
    ||dW||_F / ||U^T W V||_F (the LoRA paper's section 7.3).

    U, V are the update's leading `rank` singular vectors, and dW what of it they hold: the paper's has no
    more.

    Args:
        weight: W (out, in), without the update.
    """
    left, values, right = (part[..., :rank] for part in update)
    return float(values.norm() / (left.T @ weight.double() @ right).norm())


# Workers beside each other


class Noise(NamedTuple):
    """How far workers' gradients agree. Means over rounds are to be taken of `signal` and `noise`, not of
    their ratio.

    Attributes:
        signal: |G|^2 of the true gradient, in squared units of the deltas; as an estimate it may be negative.
        noise: tr(Sigma), the variance of the gradient of a single token.
        scale: B_simple = noise / signal, in tokens: the batch at which both are the same. Infinite
            where no signal is left.
    """

    signal: float
    noise: float
    scale: float


def gradient_noise(products: Tensor, tokens: Sequence[float]) -> Noise:
    """McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1, with a worker's delta for a gradient of a
    small batch b and the mean delta for one of a big batch B = n b:

        signal = (B |G_B|^2 - b |G_b|^2) / (B - b),    noise = (|G_b|^2 - |G_B|^2) / (1/b - 1/B)

    T local steps count as one step of T batches, which holds while they are small. Heads with other A see
    other projections of a gradient; in what these differ counts as noise, so that for adapted weights the
    scale is an upper bound.

    Args:
        products: inner products of workers' deltas, (n, n), summed over tensors.
        tokens: that each was trained on; where they differ b is their harmonic mean, which leaves both
            estimates unbiased.
    """
    n = len(tokens)
    if n < 2:
        return Noise(math.nan, math.nan, math.nan)
    small = n / sum(1 / count for count in tokens)
    big = n * small
    of_small, of_big = float(products.diagonal().mean()), float(products.mean())
    signal = (big * of_big - small * of_small) / (big - small)
    noise = (of_small - of_big) / (1 / small - 1 / big)
    return Noise(signal, noise, noise / signal if signal > 0 else math.inf)


# The base


def quantization_error(weight: Tensor, base: Quantized) -> tuple[float, float]:
    """How far a base is from its weight (out, in).

    Returns:
        ||W - deq(Q)||_F / ||W||_F; and the root mean square of the error in steps, `quantize.step`'s root
        mean square over the blocks: NaN for a base without any.
    """
    error = float((weight - quantize.dequantize(base)).double().norm())
    steps = float(quantize.step(base).double().norm()) * math.sqrt(quantize.BLOCK)
    norm = float(weight.double().norm())
    return error / norm if norm else math.nan, error / steps if steps else math.nan


def codes_flipped(before: Quantized, after: Quantized) -> float:
    """Share of a base's codes that are others in another version of it; of fp32 elements for `none`, and
    NaN where the format is another one."""
    if before.quant != after.quant:
        return math.nan
    if before.quant == "nf4":  # two codes a byte
        changed = before.codes ^ after.codes
        count = (changed > 0x0F).sum() + (changed & 0x0F > 0).sum()
    else:
        count = (before.codes != after.codes).sum()
    return int(count) / (before.shape[0] * before.shape[1])
