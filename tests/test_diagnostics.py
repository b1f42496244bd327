"""Diagnostics against naive float64 implementations and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lte import diagnostics, lowrank, merge, quantize
from lte.compress import changes
from lte.merge import HeadDelta
from lte.quantize import Quant

OUT, IN = 24, 17


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head(seed: int, rank: int = 4, *, merged: bool = False, weight: float = 1.0) -> HeadDelta:
    parts = [normal(*shape, seed=10 * seed + k) for k, shape in enumerate([(rank, IN), (OUT, rank)] * 2)]
    merged_A, merged_B = parts[2:] if merged else (None, None)
    return HeadDelta(parts[0], parts[1], merged_A, merged_B, weight)


def whole(delta: HeadDelta) -> Tensor:
    """The delta as a matrix, (out, in), float64."""
    matrix = delta.B.double() @ delta.A.double()
    if delta.merged_A is not None and delta.merged_B is not None:
        matrix -= delta.merged_B.double() @ delta.merged_A.double()
    return matrix


# Heads


@pytest.mark.parametrize("merged", [False, True])
def test_cosines_are_those_of_the_whole_matrices(merged: bool) -> None:
    heads = [
        head(seed, rank, merged=merged, weight=w) for seed, rank, w in [(1, 4, 2.0), (2, 3, 0.0), (3, 1, 1)]
    ]
    flat = torch.stack([whole(delta).flatten() for delta in heads])
    flat /= flat.norm(dim=1, keepdim=True)
    torch.testing.assert_close(diagnostics.cosines(heads), flat @ flat.T, atol=1e-6, rtol=0)


def test_cosines_of_the_same_the_opposite_and_nothing() -> None:
    one = head(1)
    opposite, nothing = (
        HeadDelta(one.A, -3 * one.B, None, None, 1.0),
        HeadDelta(one.A, 0 * one.B, None, None, 1.0),
    )
    cosine = diagnostics.cosines([one, one, opposite, nothing])
    torch.testing.assert_close(cosine[0, :3], torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    assert cosine[3].isnan().all()
    assert diagnostics.of_pairs(cosine[:3, :3]).tolist() == pytest.approx([1, -1, -1])


@pytest.mark.parametrize(("rank", "merged"), [(4, False), (20, False), (4, True)])
def test_subspaces_are_the_leading_singular_vectors(rank: int, merged: bool) -> None:
    delta = head(5, rank, merged=merged)
    columns, rows = diagnostics.subspaces(delta)
    left, _, right = np.linalg.svd(whole(delta).numpy())
    k = min(rank, OUT, IN)
    assert (columns.shape, rows.shape) == ((OUT, k), (IN, k))
    naive_columns, naive_rows = left[:, :k] @ left[:, :k].T, right[:k].T @ right[:k]
    np.testing.assert_allclose(columns @ columns.T, naive_columns, atol=1e-6)
    np.testing.assert_allclose(rows @ rows.T, naive_rows, atol=1e-6)


def test_a_subspace_has_the_dimensions_that_the_delta_has() -> None:
    delta = head(6)
    poor = HeadDelta(delta.A, delta.B * torch.tensor([1.0, 0.0, 1.0, 0.0]), None, None, 1.0)
    assert [basis.shape[1] for basis in diagnostics.subspaces(poor)] == [2, 2]
    empty = diagnostics.subspaces(HeadDelta(delta.A, 0 * delta.B, None, None, 1.0))
    assert [basis.shape[1] for basis in empty] == [0, 0]
    assert math.isnan(diagnostics.grassmann_distance(empty[0], diagnostics.subspaces(delta)[0]))


def test_grassmann_distance_of_planes_turned_by_known_angles() -> None:
    angles = torch.tensor([0.3, 1.1], dtype=torch.float64)
    one = torch.eye(5, 2, dtype=torch.float64)
    turned = torch.zeros(5, 2, dtype=torch.float64)
    turned[:2].diagonal().copy_(angles.cos())
    turned[2:4].diagonal().copy_(angles.sin())
    rotation, _ = torch.linalg.qr(normal(2, 2).double())
    assert diagnostics.grassmann_distance(one, turned @ rotation) == pytest.approx(math.hypot(0.3, 1.1))
    assert diagnostics.grassmann_distance(one, one @ rotation) == pytest.approx(0, abs=1e-7)
    apart = torch.eye(5, dtype=torch.float64)[:, 2:]
    assert diagnostics.grassmann_distance(one, apart) == pytest.approx(math.sqrt(2) * math.pi / 2)


def test_heads_dealt_rows_of_one_orthogonal_matrix_are_as_far_apart_as_can_be() -> None:
    A = lowrank.draw_A_of_heads(
        4, 16, init="semi-orthogonal", subspace="disjoint", seed=0, module="m", heads=range(4), draw=0
    )
    heads = [HeadDelta(a, normal(OUT, 4, seed=k), None, None, 1.0) for k, a in enumerate(A)]
    rows = [diagnostics.subspaces(delta)[1] for delta in heads]
    assert diagnostics.grassmann_distance(rows[0], rows[3]) == pytest.approx(math.pi, abs=1e-4)
    assert diagnostics.of_pairs(diagnostics.cosines(heads)).abs().max() < 1e-5


def test_subspace_similarities_are_equation_4() -> None:
    one, other = normal(3, IN, seed=1), normal(8, IN, seed=2)
    u, v = (np.linalg.svd(A.double().numpy(), full_matrices=False)[2].T for A in (one, other))
    found = diagnostics.subspace_similarities(torch.from_numpy(u), torch.from_numpy(v))
    naive = [
        [np.linalg.norm(u[:, :i].T @ v[:, :j]) ** 2 / min(i, j) for j in range(1, 9)] for i in range(1, 4)
    ]
    assert found.numpy() == pytest.approx(np.array(naive))
    contained = torch.eye(IN)[:, :3]
    assert diagnostics.subspace_similarities(contained, torch.eye(IN))[2, -1] == 1
    assert not diagnostics.subspace_similarities(contained, torch.eye(IN)[:, 3:5]).any()


# Updates


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
@pytest.mark.parametrize("rank", [3, IN])
def test_singular_values_and_vectors_are_those_of_an_svd(shape: tuple[int, int], rank: int) -> None:
    matrix = normal(shape[0], rank, seed=3) @ normal(rank, shape[1], seed=4)
    left, values, right = diagnostics.singular(matrix)
    naive = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(values, naive, atol=1e-5 * naive[0])
    assert int((values > 0).sum()) == rank
    torch.testing.assert_close(left * values @ right.T, matrix.double(), atol=1e-5, rtol=0)


def test_ranks_of_known_spectra() -> None:
    flat, geometric = torch.ones(7), 0.5 ** torch.arange(60)
    assert diagnostics.effective_rank(flat) == pytest.approx(7)
    assert diagnostics.stable_rank(flat) == pytest.approx(7)
    assert (
        diagnostics.effective_rank(torch.tensor([2.0, 0, 0]))
        == diagnostics.stable_rank(torch.tensor([2.0]))
        == 1
    )
    assert diagnostics.effective_rank(geometric) == pytest.approx(4)  # entropy of p = 1/2, 1/4, ...: 2 bits
    assert diagnostics.stable_rank(geometric) == pytest.approx(4 / 3)
    assert math.isnan(diagnostics.effective_rank(torch.zeros(3)))
    assert math.isnan(diagnostics.stable_rank(torch.zeros(3)))


def test_amplification_is_the_papers_for_an_update_of_low_rank() -> None:
    update, weight = whole(head(7, rank=3)), normal(OUT, IN, seed=9).double()
    u, values, vh = np.linalg.svd(update.numpy())
    for rank in (3, 2):
        naive = np.linalg.norm(values[:rank]) / np.linalg.norm(u[:, :rank].T @ weight.numpy() @ vh[:rank].T)
        met = diagnostics.amplification(diagnostics.singular(update), weight, rank)
        assert met == pytest.approx(naive)
    whole_norm = float(update.norm())
    in_directions = float((torch.tensor(u[:, :3]).T @ weight @ torch.tensor(vh[:3]).T).norm())
    met = diagnostics.amplification(diagnostics.singular(update), weight, 3)
    assert met == pytest.approx(whole_norm / in_directions)
    scaled = diagnostics.singular(2.5 * weight)
    assert diagnostics.amplification(scaled, weight, IN) == pytest.approx(2.5), "all of it amplified alike"


def test_what_is_not_finite_has_no_rank_and_ends_nothing() -> None:
    found = diagnostics.singular(torch.full((3, 2), math.inf))
    assert (found.left.shape, found.values.shape, found.right.shape) == ((3, 2), (2,), (2, 2))
    assert math.isnan(diagnostics.effective_rank(found.values))
    assert math.isnan(diagnostics.amplification(found, torch.ones(3, 2), 1))


# Workers


@pytest.mark.parametrize("tokens", [[8, 8, 8, 8], [4, 8, 16, 8]])
def test_gradient_noise_finds_the_noise_that_was_added(tokens: list[int]) -> None:
    """G + noise of variance sigma^2 / tokens in each of d coordinates: signal |G|^2, noise d sigma^2."""
    d, sigma = 200_000, 0.7
    gradient = normal(d).double()
    deltas = torch.stack(
        [gradient + sigma / math.sqrt(b) * normal(d, seed=k + 1).double() for k, b in enumerate(tokens)]
    )
    found = diagnostics.gradient_noise(deltas @ deltas.T, tokens)
    assert found.signal == pytest.approx(float(gradient @ gradient), rel=0.01)
    assert found.noise == pytest.approx(d * sigma**2, rel=0.01)
    assert found.scale == found.noise / found.signal


def test_gradient_noise_is_the_formula_of_norms() -> None:
    deltas, small = normal(3, 50).double(), 16
    big = 3 * small
    of_small = float(deltas.square().sum(1).mean())
    of_big = float(deltas.mean(0).square().sum())
    found = diagnostics.gradient_noise(deltas @ deltas.T, [small] * 3)
    assert found.signal == pytest.approx((big * of_big - small * of_small) / (big - small))
    assert found.noise == pytest.approx((of_small - of_big) / (1 / small - 1 / big))


def test_gradient_noise_of_the_same_of_orthogonal_ones_and_of_one() -> None:
    same = diagnostics.gradient_noise(torch.ones(4, 4).double(), [8] * 4)
    assert (same.signal, same.noise, same.scale) == pytest.approx((1, 0, 0))
    assert diagnostics.gradient_noise(torch.eye(4).double(), [8] * 4).scale == math.inf
    assert all(map(math.isnan, diagnostics.gradient_noise(torch.ones(1, 1), [8])))


# Bases


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_quantization_error_is_the_naive_one(quant: Quant) -> None:
    weight = normal(OUT, 30) * torch.logspace(-2, 0, 30)  # blocks of different scales; the last is padded
    base = quantize.quantize(weight, quant)
    relative, in_steps = diagnostics.quantization_error(weight, base)
    error = (weight.double() - quantize.dequantize(base).double()).numpy()
    assert relative == pytest.approx(
        np.linalg.norm(error) / np.linalg.norm(weight.double().numpy()), rel=1e-5
    )
    steps = quantize.step(base).double().numpy().repeat(quantize.BLOCK)
    assert in_steps == pytest.approx(np.linalg.norm(error) / np.linalg.norm(steps), rel=1e-5)
    assert 0.1 < in_steps < 0.5


def test_int8_errors_of_evenly_spread_weights_are_a_step_over_the_root_of_12() -> None:
    weight = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    _, in_steps = diagnostics.quantization_error(weight, quantize.quantize(weight, "int8"))
    assert in_steps == pytest.approx(1 / math.sqrt(12), rel=0.03)


def test_a_base_without_quantization_has_no_error_and_no_steps() -> None:
    weight = normal(OUT, IN)
    relative, in_steps = diagnostics.quantization_error(weight, quantize.quantize(weight, "none"))
    assert relative == 0
    assert math.isnan(in_steps)


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
def test_codes_flipped_are_those_that_travel(quant: Quant) -> None:
    weight = normal(OUT, 30)
    before = quantize.quantize(weight, quant)
    assert diagnostics.codes_flipped(before, before) == 0
    moved = weight.clone()
    moved[::3] += 0.2 * normal(OUT // 3, 30, seed=1)
    after = quantize.requantize(moved, before)
    flipped = changes.encode(before, after).codes_changed
    assert diagnostics.codes_flipped(before, after) == flipped / weight.numel()
    assert 0 < flipped < weight.numel()


def test_the_mean_deltas_rank_is_at_most_the_heads_ranks_together() -> None:
    heads = [head(seed, 2, weight=0.25) for seed in range(4)]
    values = diagnostics.singular(merge.mean_delta(heads)).values
    assert 2 < diagnostics.effective_rank(values) <= 8
    assert int((values > 0).sum()) == 8
