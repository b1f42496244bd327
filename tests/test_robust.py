"""Robust merging against naive float64 references, and that both ends keep the same books by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from simulation import Simulation, recipe
from test_algorithm import MODES, Net, batches, mse, seeded
from torch import Tensor

from lte import merge
from lte.config import Outer
from lte.merge import HeadDelta
from lte.server.watch import TRIMS_IN_A_ROW, Outliers
from lte.worker.trainer import Trainer

BOUND = {"outer.bound_norm": 2.0}
TRIM = {**BOUND, "outer.trim": 0.3}
NOBODY = (1.0, 1.0, 1.0, 1.0)


def heads(*ranks: int, seed: int = 0) -> list[HeadDelta]:
    """Heads of these ranks, half of them with merged factors that they have hardly moved from."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for k, rank in enumerate(ranks):
        A, B = (torch.randn(shape, generator=generator) for shape in ((rank, 24), (17, rank)))
        near = [t + 1e-3 * torch.randn(t.shape, generator=generator) for t in (A, B)] if k % 2 else [None] * 2
        made.append(HeadDelta(A, B, near[0], near[1], weight=0.5 + k))
    return made


def naive(head: HeadDelta) -> Tensor:
    delta = head.B.double() @ head.A.double()
    if head.merged_A is not None and head.merged_B is not None:
        delta -= head.merged_B.double() @ head.merged_A.double()
    return head.weight * delta


def test_inner_products_of_heads_are_those_of_their_deltas() -> None:
    some = heads(3, 5, 2, 4)
    flat = torch.stack([naive(head).flatten() for head in some])
    expected = flat @ flat.T
    scale = expected.diagonal().sqrt()
    met = merge.products(some)
    assert met.dtype == torch.float64
    assert ((met - expected).abs() <= 1e-6 * torch.outer(scale, scale)).all()


def test_inner_products_of_dense_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "_PIECE", 7)
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(5, 6, generator=generator) for _ in range(3)]
    weights = [0.5, 1.0, 2.0]
    flat = torch.stack([w * d.double().flatten() for w, d in zip(weights, deltas, strict=True)])
    assert torch.allclose(merge.dense_products(deltas, weights), flat @ flat.T, rtol=1e-12)


@pytest.mark.parametrize(
    ("norms", "factors"),
    [
        ([1.0, 1.0, 1.5, 8.0], [1.0, 1.0, 1.0, 0.25]),
        ([1.0, 100.0], [1.0, 0.02]),  # of two middle ones the lower: half may be anything
        ([3.0], [1.0]),
        ([0.0, 0.0, 1.0, 4.0], [1.0, 1.0, 1.0, 0.5]),  # who did not move a module has no say in it
        ([0.0, 0.0], [1.0, 1.0]),
    ],
)
def test_bounds_hold_norms_to_twice_the_median(norms: list[float], factors: list[float]) -> None:
    assert merge.bounds(torch.tensor(norms).double(), 2.0).tolist() == pytest.approx(factors)


def contributions(*signs: float, noise: float = 2.0, size: int = 5000, seed: int = 0) -> Tensor:
    """Inner products of contributions along one direction by these signs, each with noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(size, generator=generator, dtype=torch.float64)
    own = torch.randn(len(signs), size, generator=generator, dtype=torch.float64)
    flat = torch.tensor(signs).double()[:, None] * common + noise * own
    return flat @ flat.T


def lengthened(products: Tensor, *factors: float) -> Tensor:
    return products * torch.outer(torch.tensor(factors).double(), torch.tensor(factors).double())


@pytest.mark.parametrize(
    ("products", "expected"),
    [
        (contributions(1, 1, 1, 1), []),
        (contributions(1, 1, -1, 1), [2]),
        (contributions(1, 1, 0, 1), [2]),
        (contributions(1, -1, 1, -1, 1), [1, 3]),
        (contributions(1, 1, -1), []),  # of three, who is right?
        (contributions(0, 0, 0, 0), []),  # all noise: no direction is usual
        (contributions(1, 1, -1, -1), []),
        (lengthened(contributions(1, 1, -1, 1), 1, 1, 100, 1), [2]),
        (lengthened(contributions(1, 1, 1, 1), 100, 1, 1, 0.01), []),
        (lengthened(contributions(1, 1, 1, 1), 0, 1, 1, 1), []),  # it had nothing to say
    ],
)
def test_outliers_are_told_by_direction_alone(products: Tensor, expected: list[int]) -> None:
    assert sorted(merge.outliers(products, 0.3, least=len(products) // 2 + 1)) == expected


def test_as_many_are_left_as_must_be_and_the_worst_go_first() -> None:
    products = contributions(1, 0.1, 1, -1, 1)
    assert merge.outliers(products, 0.3, least=3) == [3, 1]
    assert merge.outliers(products, 0.3, least=4) == [3]
    assert merge.outliers(products, 0.3, least=5) == []


def test_no_merge_leaves_fewer_than_the_quorum() -> None:
    products, owners = {"x": contributions(1, 1, -1, 1)}, {"x": range(4)}
    outer = Outer(bound_norm=2.0, trim=0.3)
    assert merge.robust(products, owners, outer, quorum=3).trimmed == {2}
    assert merge.robust(products, owners, outer, quorum=4).trimmed == frozenset()


def poison(trainer: Trainer, factor: float) -> None:
    """Have a worker's change since the last merge be so many times what it is."""
    with torch.no_grad():
        for module in trainer.modules.values():
            known = 0 if module.merged_B is None else module.merged_B
            module.lora_B.copy_(known + factor * (module.lora_B - known))
        for name, parameter in trainer.dense.items():
            parameter.copy_(trainer._published[name] + factor * (parameter - trainer._published[name]))


def rounds_of(settings: dict[str, object], factors: tuple[float, ...], rounds: int = 3) -> Simulation:
    """Train, with each worker's contribution enlarged by its factor in every round."""
    made = recipe(**{"optimizer.name": "adamw", "lora.heads": 2} | settings)
    simulation = Simulation(seeded(Net), made, len(factors))
    for round_ in range(rounds):
        simulation.local_steps(mse, batches(len(factors), 4, 8, seed=round_))
        for trainer, factor in zip(simulation.trainers, factors, strict=True):
            poison(trainer, factor)
        simulation.merge()
    return simulation


@pytest.mark.parametrize("mode", MODES)
def test_no_head_moves_a_weight_by_more_than_twice_the_median(mode: str) -> None:
    """Two heads a worker; the whole merge in float64, adapted and dense, with one worker 50 times as long."""
    simulation = rounds_of(BOUND | {"lora.merge": mode}, NOBODY, rounds=1)
    simulation.local_steps(mse, batches(4, 4, 8, seed=9))
    poison(simulation.trainers[1], 50.0)
    master = simulation.master
    expected: dict[str, Tensor] = {}
    for name, weight in {**master.weights, **master.dense}.items():
        deltas = []
        for trainer in simulation.trainers:
            if name in trainer.dense:
                deltas.append((trainer.dense[name].detach() - trainer._published[name]).double())
                continue
            m = trainer.modules[name]
            for h in range(2):
                known = (None, None) if m.merged_A is None else (m.merged_A[h], m.merged_B[h])
                deltas.append(naive(HeadDelta(m.lora_A[h].detach(), m.lora_B[h].detach(), *known, 2.0)))
        norms = torch.stack([delta.norm() for delta in deltas])
        limit = 2.0 * norms.sort().values[(len(norms) - 1) // 2]
        assert (norms > limit).any(), "nothing to bound: the test is blind"
        total = sum(d * min(1.0, float(limit / n)) for d, n in zip(deltas, norms, strict=True) if n)
        expected[name] = weight.double() + total / len(deltas)
    simulation.merge()
    for name, weight in {**master.weights, **master.dense}.items():
        assert (weight.double() - expected[name]).abs().max() < 1e-6
    assert simulation.outcome.bounded["w1"] < 0.2
    assert simulation.outcome.bounded.keys() == {"w1"}
    assert simulation.outcome.trimmed == ()


@pytest.mark.parametrize("settings", [BOUND, TRIM], ids=["bound", "trim"])
def test_bounds_that_hold_nobody_down_change_no_bit(settings: dict[str, object]) -> None:
    plain, robust = (rounds_of(s, NOBODY) for s in ({}, settings | {"outer.bound_norm": 100.0}))
    assert robust.master.master_digest() == plain.master.master_digest()
    assert robust.outcome == replace(plain.outcome, bounded={}, trimmed=())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_a_worker_that_is_left_out_moves_nothing_and_both_ends_agree_on_it(mode: str, codec: str) -> None:
    """What it sent counts as merged, with no weight: the digests that `Simulation.merge` compares."""
    settings = TRIM | {"lora.merge": mode, "compress.factors": codec, "compress.dense": codec}
    poisoned = rounds_of(settings, (1.0, 1.0, -1.0, 1.0))
    assert poisoned.outcome.trimmed == ("w2",)
    assert len({trainer.base_digest() for trainer in poisoned.trainers}) == 1
    # Whatever a worker that is left out does, the others' merges are the same bits.
    longer = rounds_of(settings, (1.0, 1.0, -2.0, 1.0), rounds=1)
    once = rounds_of(settings, (1.0, 1.0, -1.0, 1.0), rounds=1)
    assert longer.master.master_digest() == once.master.master_digest()


def test_the_others_do_not_grow_by_one_that_is_left_out() -> None:
    """The change is the sum over three, still over four."""
    before = rounds_of(TRIM, NOBODY, rounds=1)
    three = {name: weight.double() for name, weight in before.master.weights.items()}
    before.local_steps(mse, batches(4, 4, 8, seed=9))
    poison(before.trainers[2], -1.0)
    for name in three:
        for trainer in (before.trainers[k] for k in (0, 1, 3)):
            m = trainer.modules[name]
            for h in range(2):
                three[name] += 2.0 * m.lora_B[h].detach().double() @ m.lora_A[h].detach().double() / 8
    before.merge()
    assert before.outcome.trimmed == ("w2",)
    for name, expected in three.items():
        assert (before.master.weights[name].double() - expected).abs().max() < 1e-6


def test_threads_change_no_bit_of_robust_merging() -> None:
    digests = {
        rounds_of(TRIM | {"server.num_threads": n}, (1.0, 9.0, -1.0, 1.0)).master.master_digest()
        for n in (1, 2)
    }
    assert len(digests) == 1


def test_a_worker_is_named_once_for_as_long_as_it_is_held_down() -> None:
    outliers = Outliers()
    workers = ("a", "b", "c", "d")

    def said(bounded: dict[str, float], *trimmed: str) -> list[tuple[str, str]]:
        return [(what, who) for what, who, _ in outliers.saw(workers, bounded, trimmed)]

    assert said({"a": 0.9, "b": 0.03}) == [("bounded", "b")], "chance takes a little away"
    assert said({"b": 0.03}) == []
    assert said({"b": 0.03}, "b") == [("trimmed", "b")]
    assert said({}) == []
    assert said({"b": 0.03}) == [("bounded", "b")]


def test_who_is_left_out_again_and_again_is_to_start_over() -> None:
    outliers = Outliers()

    def left_out(times: int) -> bool:
        for _ in range(times):
            outliers.saw(("a", "b"), {}, ("b",))
        return outliers.is_stuck("b")

    assert not left_out(TRIMS_IN_A_ROW - 1)
    outliers.saw(("a", "b"), {}, ())
    assert not left_out(TRIMS_IN_A_ROW - 1), "not in a row"
    outliers.saw(("a",), {}, ())
    assert left_out(1), "it did not contribute meanwhile"
    assert not outliers.is_stuck("a")
    outliers.started_over("b")
    assert not left_out(TRIMS_IN_A_ROW - 1)
