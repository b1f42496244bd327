"""Nested ranks (DyLoRA): local steps against a naive loop, what a step uses and moves, and settings."""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from simulation import Simulation, recipe
from test_algorithm import Net, batches, mse, seeded
from torch import Tensor, nn
from torch.func import functional_call

import lte
from lte import cost, lowrank
from lte.config import LoRA
from lte.errors import ConfigError
from lte.server.master import Master

R, S, LR, DENSE_LR, CLIP = 4, 2.0, 0.01, 0.003, 0.3
NESTED = {
    "lora.rank": R,
    "lora.scale": S,
    "lora.nested": "unfrozen",
    "lora.merge": "reset-less",
    "train.workers": 1,
    "optimizer.name": "adamw",
    "optimizer.lr": LR,
    "optimizer.dense_lr": DENSE_LR,
    "optimizer.clip_norm": CLIP,
}


class Naive:
    """A model W + (alpha / b) B[:, :b] A[:b] in plain torch, as DyLoRA is published, but for AdamW: written
    out, it moves the rows and columns of a step alone, and all of them share its count of steps."""

    def __init__(self, start: nn.Module, A: dict[str, Tensor], mode: str, local_ranks: Sequence[int]) -> None:
        self.model, self.mode, self.local_ranks = copy.deepcopy(start), mode, local_ranks
        self.W = {name: self.model.get_parameter(f"{name}.weight").detach() for name in A}
        self.A = {name: of.detach().clone().requires_grad_() for name, of in A.items()}
        self.B = {n: torch.zeros(len(self.W[n]), len(of), requires_grad=True) for n, of in A.items()}
        self.moments = {id(p): (torch.zeros_like(p), torch.zeros_like(p)) for p in self.factors}
        self.dense = [p for n, p in self.model.named_parameters() if n.removesuffix(".weight") not in A]
        self.adamw = torch.optim.AdamW(self.dense, lr=DENSE_LR, betas=(0.9, 0.95), weight_decay=0)
        self.num_steps = 0

    @property
    def factors(self) -> list[Tensor]:
        return [*self.A.values(), *self.B.values()]

    def weight(self, name: str, b: int) -> Tensor:
        return self.W[name] + S * R / b * self.B[name][:, :b] @ self.A[name][:b]

    def step(self, batch: object, b: int) -> float:
        below = (
            max((rank for rank in self.local_ranks if rank < b), default=0) if self.mode == "frozen" else 0
        )
        weights = {}
        for name in self.W:
            A, B = self.A[name], self.B[name]
            rows = torch.cat([A[:below].detach(), A[below:b]])
            columns = torch.cat([B[:, :below].detach(), B[:, below:b]], 1)
            weights[f"{name}.weight"] = self.W[name] + S * R / b * columns @ rows
        loss = mse(lambda x: functional_call(self.model, weights, x), batch)
        self.adamw.zero_grad()
        gradients = torch.autograd.grad(loss, self.factors, retain_graph=True)
        loss.backward(inputs=self.dense)
        every = [*gradients, *(p.grad for p in self.dense if p.grad is not None)]
        norm = torch.cat([gradient.flatten() for gradient in every]).norm()
        for gradient in every:
            gradient.mul_((CLIP / (norm + 1e-6)).clamp(max=1))
        self.adamw.step()
        self.num_steps += 1
        for parameter, gradient in zip(self.factors, gradients, strict=True):
            of_A = any(parameter is A for A in self.A.values())
            part = slice(below, b) if of_A else (slice(None), slice(below, b))
            m, v = (moment[part] for moment in self.moments[id(parameter)])
            m.mul_(0.9).add_(gradient[part], alpha=0.1)
            v.mul_(0.95).add_(gradient[part] ** 2, alpha=0.05)
            size = (v / (1 - 0.95**self.num_steps)).sqrt() + 1e-8
            with torch.no_grad():
                parameter[part] -= LR * m / (1 - 0.9**self.num_steps) / size
        return float(loss.detach())


@pytest.mark.parametrize("mode", ["unfrozen", "frozen"])
@pytest.mark.parametrize("local_ranks", [(), (1, 2, 4, 4)])
def test_rounds_are_those_of_a_naive_loop(mode: str, local_ranks: tuple[int, ...]) -> None:
    """One worker, reset-less: losses, factors and master. Tolerance: fp32 rounding over 18 steps of 0.01."""
    settings = NESTED | {"lora.nested": mode, "lora.nested_ranks": list(local_ranks)}
    simulation = Simulation(seeded(Net), recipe(**settings), 1)
    (trainer,) = simulation.trainers
    drawn_from = local_ranks or range(1, R + 1)
    naive = Naive(seeded(Net), {n: m.lora_A[0] for n, m in trainer.modules.items()}, mode, drawn_from)
    seen, step = set(), 0
    for round_ in range(3):
        data = batches(1, 10, 8, seed=round_)
        for batch in data[0]:
            b = lowrank.draw_rank(drawn_from, seed=0, head=0, step=step)
            seen.add(b)
            step += 1
            loss = mse(trainer.model, batch)
            loss.backward()
            assert float(loss.detach()) == pytest.approx(naive.step(batch, b), abs=1e-5)
            trainer.step()
        simulation.merge()
        for name, module in trainer.modules.items():
            assert torch.allclose(module.lora_A[0], naive.A[name], rtol=0, atol=1e-5)
            assert torch.allclose(module.lora_B[0], naive.B[name], rtol=0, atol=1e-5)
            met = simulation.master.weights[name]
            assert torch.allclose(met, naive.weight(name, R), rtol=0, atol=1e-5)
    assert seen == set(drawn_from)


@pytest.mark.parametrize(("mode", "moves"), [("unfrozen", [0, 1, 2]), ("frozen", [2])])
def test_a_step_moves_what_it_uses_alone(mode: str, moves: list[int]) -> None:
    """Of b = 3, after a step that has filled the moments of all four rows and columns."""
    simulation = Simulation(seeded(Net), recipe(**(NESTED | {"lora.nested": mode})), 1)
    (trainer,) = simulation.trainers
    module, ((first, second),) = trainer.modules["up"], batches(1, 2, 8)
    drawn = iter([4, 4, 3, 3])
    trainer._ranks = lambda: [next(drawn)]  # type: ignore[method-assign]
    module.lora_B.data.normal_()
    mse(trainer.model, first).backward()
    trainer.step()
    for parameter in (module.lora_A, module.lora_B):  # as if all had been used
        trainer.optimizer.state[parameter]["exp_avg"].fill_(0.1)
        trainer.optimizer.state[parameter]["exp_avg_sq"].fill_(0.1)
    before = [p.detach().clone() for p in (module.lora_A[0], module.lora_B[0].mT)]
    mse(trainer.model, second).backward()
    trainer.step()
    for old, parameter in zip(before, (module.lora_A, module.lora_B), strict=True):
        moments = trainer.optimizer.state[parameter]
        values = [parameter[0], moments["exp_avg"][0], moments["exp_avg_sq"][0]]
        if parameter is module.lora_B:
            values = [value.mT for value in values]
        now, *held = values
        assert [k for k in range(R) if not torch.equal(now[k], old[k])] == moves
        for moment in held:
            assert [k for k in range(R) if not bool((moment[k] == 0.1).all())] == moves


def test_ranks_are_a_function_of_run_head_and_step() -> None:
    def drawn(simulation: Simulation, num_steps: int) -> list[list[int]]:
        (trainer,) = simulation.trainers
        found = []
        for _ in range(num_steps):
            found.append(trainer._ranks())
            trainer.step()
        return found

    settings = NESTED | {"lora.merge": "reset-b", "lora.heads": 2}
    first = drawn(Simulation(seeded(Net), recipe(**settings), 1), 40)
    assert drawn(Simulation(seeded(Net), recipe(**settings), 1), 40) == first
    assert {b for pair in first for b in pair} == {1, 2, 3, 4}
    assert any(a != b for a, b in first), "heads draw alike"
    other = drawn(Simulation(seeded(Net), recipe(**settings, **{"run.seed": 1}), 1), 40)
    assert other != first


def test_a_worker_that_is_restarted_draws_the_same() -> None:
    """From its state in the middle of a round it goes on to the same bits."""
    simulation = Simulation(seeded(Net), recipe(**NESTED), 1)
    (trainer,) = simulation.trainers
    simulation.local_steps(mse, batches(1, 3, 8))
    tensors, numbers = copy.deepcopy(trainer.state())
    (other,) = Simulation(seeded(Net), recipe(**NESTED), 1).trainers
    other.resume(tensors, numbers, merged=False)
    for each in (trainer, other):
        for batch in batches(1, 6, 8, seed=3)[0]:
            mse(each.model, batch).backward()
            each.step()
    met, expected = (dict(each.model.named_parameters()) for each in (other, trainer))
    assert all(torch.equal(met[name], parameter) for name, parameter in expected.items())


def test_a_rank_that_stands_twice_is_twice_as_likely() -> None:
    found = Counter(lowrank.draw_rank((1, 4, 4), seed=0, head=0, step=step) for step in range(900))
    assert found.keys() == {1, 4}
    assert 240 < found[1] < 360  # 300, give or take four standard deviations


@pytest.mark.parametrize(
    ("settings", "rank", "expected"),
    [
        ({}, 4, (1, 2, 3, 4)),
        ({"nested_min_rank": 3}, 4, (3, 4)),
        ({"nested_min_rank": 3}, 2, (2,)),
        ({"nested_ranks": (2, 8, 8)}, 8, (2, 8, 8)),
        ({"nested_ranks": (2, 8, 8)}, 4, (2, 4, 4)),
    ],
)
def test_ranks_that_are_drawn_from(settings: Any, rank: int, expected: tuple[int, ...]) -> None:
    assert LoRA(**settings).drawn_ranks(rank) == expected


# A cut head is a head of that rank


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return y


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 6)), (4, 8)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), (4, 4, 5, 5)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 8)), (4, 5)),
    "attention": (Attention, (4, 5, 8)),
}


@pytest.mark.parametrize("scaling", ["given", "rank-stabilized"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_rank_b_computes_with_a_model_of_b_rows(kind: str, scaling: str) -> None:
    """The same function and the same gradients as heads that have b rows, at lora_alpha / b or its root."""
    make, shape = KINDS[kind]
    generator, b = torch.Generator().manual_seed(0), 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = make()
    x = torch.randn(shape, generator=generator)
    if kind == "embedding":
        x = x.mul(3).long() % 7
    said: dict[str, Any] = {"scaling": scaling, "embeddings": True, "nested": "unfrozen"}
    alpha = {"alpha": 6.0} if scaling == "rank-stabilized" else {}
    of_r = LoRA(rank=R, scale=1.5, **said, **alpha)
    of_b = LoRA(rank=b, scale=1.5 * R / b, **said, **alpha)
    gated, small = (lte.convert(copy.deepcopy(plain), lora, "none") for lora in (of_r, of_b))
    pairs = list(zip(lte.nn.adapted_modules(gated), lte.nn.adapted_modules(small), strict=True))
    assert pairs
    for (_, module), (_, of_small) in pairs:
        module.lora_B.data.normal_(std=0.1, generator=generator)
        of_small.lora_A.data.copy_(module.lora_A[:, :b])
        of_small.lora_B.data.copy_(module.lora_B[..., :b])
        module.gates = torch.zeros(1, 1, R)
        module.gates[..., :b] = of_r.nested_scale(R, b)
    assert torch.allclose(gated(x), small(x), atol=1e-5)
    for model in (gated, small):
        (model(x) ** 2).mean().backward()
    for (_, module), (_, of_small) in pairs:
        for met, expected in (
            (module.lora_A.grad, of_small.lora_A.grad),
            (module.lora_B.grad.mT, of_small.lora_B.grad.mT),
        ):
            assert torch.allclose(met[:, :b], expected, atol=1e-5)
            assert not bool(met[:, b:].any())
    assert torch.allclose(gated.eval()(x), plain(x), atol=1e-6), "the published model has no heads to cut"


def test_each_head_has_a_rank_of_its_own_and_small_modules_are_used_whole() -> None:
    settings = NESTED | {"lora.merge": "reset-b", "lora.heads": 2}
    own = recipe(**settings, **{"lora.overrides": [{"modules": "down", "rank": 2}]})
    (trainer,) = Simulation(seeded(Net), own, 1).trainers
    trainer._ranks = lambda: [3, 1]  # type: ignore[method-assign]
    trainer.model(torch.zeros(4, 6))
    up, down = (trainer.modules[name].gates for name in ("up", "down"))
    assert up is not None and down is not None
    assert up[:, 0].tolist() == [[pytest.approx(4 / 3)] * 3 + [0], [4, 0, 0, 0]]
    assert down[:, 0].tolist() == [[1, 1], [2, 0]]


def test_a_worker_of_a_smaller_rank_uses_its_heads_whole_where_more_is_drawn() -> None:
    own = recipe(**(NESTED | {"lora.merge": "reset-b", "lora.nested_ranks": [1, 2, 4], "train.workers": 2}))
    simulation = Simulation(seeded(Net), own, 2, caps=[(3, 0), (0, 0)])
    capped, _ = simulation.trainers
    drawn = set()
    for batch in batches(1, 12, 8)[0]:
        drawn |= set(capped._ranks())
        mse(capped.model, batch).backward()
        capped.step()
    assert drawn == {1, 2, 3}
    for module in capped.modules.values():
        assert module.lora_B.shape[-1] == 3
        assert bool(module.lora_B.any(dim=1).all()), "a column that no step trains"


@pytest.mark.parametrize(("mode", "of_last"), [("unfrozen", slice(0, 4)), ("frozen", slice(2, 4))])
def test_ranks_are_drawn_from_those_of_the_phase(mode: str, of_last: slice) -> None:
    """Of heads of rank 2, of none, as weights of full rank are trained, and of rank 4."""
    phases = [
        {"from_round": 1, "full_rank": True},
        {"from_round": 2, "full_rank": False, "rank": 4},
    ]
    changed = {"lora.rank": 2, "lora.merge": "reset-b", "lora.nested": mode, "lora.nested_ranks": [1, 2, 4]}
    own = recipe(**(NESTED | changed), **{"train.rounds": 3, "train.phases": phases})
    simulation = Simulation(seeded(Net), own, 1)
    (trainer,) = simulation.trainers
    drawn = list[set[int]]()
    for round_ in range(3):
        whole, drawn_now = trainer.recipe.train.full_rank, set()
        for batch in batches(1, 10, 8, seed=round_)[0]:
            before = {name: module.lora_B.detach().clone() for name, module in trainer.modules.items()}
            (b,) = trainer._ranks()
            drawn_now.add(b)
            mse(trainer.model, batch).backward()
            trainer.step()
            for name, module in trainer.modules.items():
                moved = (module.lora_B != before[name]).any(dim=1)[0]
                if whole:
                    assert module.gates is None
                    assert bool(moved.all())
                elif b == 4:
                    assert moved.nonzero().flatten().tolist() == list(range(4))[of_last]
                else:
                    assert not bool(moved[b:].any())
        drawn.append(drawn_now)
        simulation.merge()
    assert (drawn[0], drawn[2]) == ({1, 2}, {1, 2, 4})


@pytest.mark.parametrize("A", ["trained", "frozen"])
def test_workers_merge_their_whole_heads(A: str) -> None:
    """Nested ranks are a matter of local steps: the master gets the mean of s B A at full rank."""
    settings = NESTED | {"lora.merge": "reset-b", "lora.A": A, "train.workers": 2}
    simulation = Simulation(seeded(Net), recipe(**settings), 2)
    for round_ in range(2):
        expected = {name: w.double() for name, w in simulation.master.weights.items()}
        simulation.local_steps(mse, batches(2, 5, 8, seed=round_))
        for name, trainer in itertools.product(expected, simulation.trainers):
            module = trainer.modules[name]
            expected[name] += S / 2 * module.lora_B[0].detach().double() @ module.lora_A[0].detach().double()
        before = dict(simulation.master.weights)
        simulation.merge()
        for name, weight in simulation.master.weights.items():
            assert (weight.double() - expected[name]).abs().max() < 1e-6
            assert (weight - before[name]).abs().max() > 1e-3, "nothing was merged"


def test_a_step_keeps_heads_and_moments_of_before() -> None:
    """Which a plan counts: weights and two moments of AdamW, 12 bytes of the 16 with the gradients."""
    link = cost.Link(up_bps=1e7, down_bps=1e7, rtt_s=0.05, loss=0.0)
    site = cost.Site(name="worker", link=link, count=1)
    adamw = {"optimizer.name": "adamw"}
    plain, nested = (
        cost.lte_round(own, cost.plan_of(own), [site], cost.assumed(own)).worker_bytes
        for own in (recipe(**adamw), recipe(**adamw, **{"lora.nested": "unfrozen"}))
    )
    (kept,) = (size for name, size in nested.items() if name not in plain)
    assert kept == plain["heads, gradients, moments"] * 12 / 16


# Settings


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"lora.nested": "none", "lora.nested_min_rank": 2}, "lora.nested_min_rank, lora.nested_ranks: need"),
        ({"lora.nested_min_rank": 2, "lora.nested_ranks": [2, 4]}, "lora.nested_min_rank: contradicts"),
        ({"lora.nested_min_rank": 8}, r"lora.nested_min_rank: 8 is more than the largest lora_rank \(4\)"),
        ({"lora.nested_ranks": [2, 8]}, r"lora.nested_ranks: 8 is more than the largest lora_rank \(4\)"),
        ({"lora.nested_ranks": [1, 2]}, r"lora.nested_ranks: must hold the largest lora_rank \(4\)"),
        ({"optimizer.name": "muon"}, "lora.nested: needs an optimizer that steps each number by itself"),
        ({"train.workers": 2}, "lora.nested: with lora.merge = reset-less it needs train.workers = 1"),
        ({"lora.heads": 2}, "lora.nested: with lora.merge = reset-less it needs train.workers = 1"),
        ({"lora.merge": "never", "train.workers": 2}, "lora.nested: with lora.merge = never it needs"),
        (
            {"lora.merge": "never", "outer.combine": "factors"},
            "lora.nested: with lora.merge = never it needs",
        ),
        ({"outer.name": "sgd"}, "lora.nested: with lora.merge = reset-less it needs outer.name = average"),
        ({"outer.weight_decay": 0.1}, "lora.nested: with lora.merge = reset-less it needs outer.name"),
        (
            {"outer.when": "arrival"},
            "lora.nested: with lora.merge = reset-less it needs .* outer.when = round",
        ),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], fault: str) -> None:
    recipe(**NESTED)
    with pytest.raises(ConfigError, match=fault) as raised:
        recipe(**(NESTED | settings))
    assert len([line for line in raised.value.faults if line.startswith("lora.nested")]) == 1


@pytest.mark.parametrize(
    ("drawn", "later_rank", "line"),
    [
        ({"lora.nested_ranks": [2, 4]}, 8, "from round 2 on: lora.nested_ranks: must hold the largest"),
        ({"lora.nested_ranks": [2, 9]}, 8, "lora.nested_ranks: 9 is more than the largest lora_rank (8)"),
        ({"lora.nested_ranks": [2, 4, 8]}, 8, None),
        ({"lora.nested_min_rank": 3}, 2, "from round 2 on: lora.nested_min_rank: 3 is more than"),
        ({"lora.nested_min_rank": 2}, 2, None),
    ],
)
def test_ranks_that_are_drawn_fit_the_ranks_of_every_phase(
    drawn: dict[str, Any], later_rank: int, line: str | None
) -> None:
    settings = NESTED | drawn | {"train.phases": [{"from_round": 2, "rank": later_rank}]}
    if line is None:
        recipe(**settings)
        return
    with pytest.raises(ConfigError, match=re.escape(line)) as raised:
        recipe(**settings)
    assert len(raised.value.faults) == 1


def test_a_worker_with_other_nesting_trains_another_model() -> None:
    model = lte.convert(seeded(Net), LoRA(rank=R, scale=S), "none")
    theirs = Master(seeded(Net), recipe(**(NESTED | {"lora.merge": "reset-b"})))
    told = lte.nn.difference(lte.nn.describe(model), theirs.plan.describe(theirs.recipe.lora))
    assert told.startswith("up.weight is ")
    assert told.endswith(", nested unfrozen")
