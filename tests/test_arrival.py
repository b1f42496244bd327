"""Merging on arrival, against naive references: any order of arrival, every staleness, nothing lost."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from simulation import Simulation, recipe
from torch import Tensor, nn

import lte
from lte import merge
from lte.config import Outer
from lte.errors import ConfigError
from lte.server.master import Received
from lte.worker.trainer import Trainer

ORDER = [[0], [1], [0], [0], [2], [1, 2], [0], [2], [1]]
"""Who arrives, merge by merge: a fast one, slow ones, two at once."""


State = Mapping[str, Tensor]


class Net(nn.Module):
    """Two adapted weights, and dense ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.norm(self.first(x)).relu())
        return y


def mse(model: nn.Module, batch: object) -> Tensor:
    x, y = batch  # type: ignore[misc]
    loss: Tensor = nn.functional.mse_loss(model(x), y)
    return loss


class Arrivals(Simulation):
    """Workers that are merged as they arrive, each of which has the base that it was answered with last."""

    def __init__(self, model: nn.Module, num_workers: int = 3, **settings: object) -> None:
        settings = {"outer.when": "arrival", "train.workers": num_workers, **settings}
        super().__init__(model, recipe(**settings), num_workers)
        self.version = self.num_merged = 0
        self.numbers = torch.Generator().manual_seed(7)
        self.learnt: dict[int, dict[str, Tensor]] = {}

    def train(self, slot: int) -> None:
        for _ in range(2):
            x, y = (torch.randn(4, n, generator=self.numbers) for n in (6, 5))
            mse(self.trainers[slot].model, (x, y)).backward()
            self.trainers[slot].step()
        self.learnt[slot] = values(self.trainers[slot])

    def contribute(self, slot: int) -> Received:
        trainer = self.trainers[slot]
        blobs = dict(trainer.contribution())
        tensors = self.master.decode(blobs, f"w{slot}", trainer.heads, trainer.rank)
        return Received(
            worker_id=f"w{slot}",
            heads=trainer.heads,
            rank=trainer.rank,
            first_head=trainer.first_head,
            draw=trainer.draw,
            tokens=1,
            tensors=tensors,
        )

    def arrive(self, *slots: int) -> None:
        """These have trained; their contributions are merged at once, and answered."""
        for slot in slots:
            self.train(slot)
        received = [self.contribute(slot) for slot in slots]
        staleness = [self.version - self.trainers[slot].version for slot in slots]
        missing = sum(t.heads for slot, t in enumerate(self.trainers) if slot not in slots)
        self.master.merge(received, missing, staleness=staleness)
        self.master.requantize()
        self.master.publish_dense()
        self.version, self.num_merged = self.version + 1, self.num_merged + len(slots)
        for slot in slots:
            self.answer(slot, merged=True)

    def answer(self, slot: int, *, merged: bool) -> None:
        """Send a worker the published version, and word of whether it is in it."""
        self.trainers[slot].apply(
            self.version,
            self.master.snapshot(),
            self.master.base_digest(),
            merged=merged,
            whole=True,
            step=self.recipe.step_of(self.version, self.num_merged),
        )


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind()


def full(trainer: Trainer, name: str) -> Tensor:
    """W that a worker computes with, float64."""
    module = trainer.modules[name]
    weight = lte.quantize.dequantize(module.base).double()
    for head in range(module.heads):
        weight = weight + module.scale * (module.lora_B[head].double() @ module.lora_A[head].double())
        if module.merged_A is not None and module.merged_B is not None:
            weight -= module.scale * (module.merged_B[head].double() @ module.merged_A[head].double())
    return weight.detach()


def values(trainer: Trainer) -> dict[str, Tensor]:
    """All that a worker trains, as full weights."""
    adapted = {name: full(trainer, name) for name in trainer.modules}
    return adapted | {name: p.detach().double().clone() for name, p in trainer.dense.items()}


def naive_weight(kind: str, a: float, staleness: int) -> float:
    return {"constant": 1.0, "polynomial": 1 / (1 + staleness) ** a, "inverse": 1 / (1 + a * staleness)}[kind]


@pytest.mark.parametrize("mode", ["reset-less", "reset-b", "reset"])
@pytest.mark.parametrize("kind", ["constant", "polynomial", "inverse"])
def test_a_scripted_order_equals_a_naive_reference(mode: str, kind: str) -> None:
    """W += weight / N * (what the worker's weights are beyond its base), as each arrives."""
    settings = {"lora.merge": mode, "outer.staleness": kind, "outer.staleness_exponent": 0.7}
    simulation = Arrivals(seeded(Net), **settings)
    weights = {n: w.double() for n, w in {**simulation.master.weights, **simulation.master.dense}.items()}
    bases = [dict(weights)] * 3
    based_on, met = [0, 0, 0], set[int]()
    for version, slots in enumerate(ORDER):
        before = copy.deepcopy(weights)
        simulation.arrive(*slots)
        for slot in slots:
            now, staleness = simulation.learnt[slot], version - based_on[slot]
            met.add(staleness)
            share = naive_weight(kind, 0.7, staleness) / 3
            for name in weights:
                weights[name] = weights[name] + share * (now[name] - bases[slot][name])
        for slot in slots:
            based_on[slot], bases[slot] = version + 1, dict(weights)
        held = {**simulation.master.weights, **simulation.master.dense}
        for name, expected in weights.items():
            assert (held[name].double() - expected).abs().max() < 2e-5, name
            assert not torch.equal(expected, before[name]), "nothing was merged"
    assert {0, 1, 2, 3} <= met


def test_as_many_arrivals_as_workers_from_one_version_make_a_round() -> None:
    """Plain averaging, nobody behind in weight: the order matters to rounding alone."""
    rounds = Simulation(seeded(Net), recipe(**{"train.workers": 3}), 3)
    arrivals = Arrivals(seeded(Net))
    for slot in range(3):
        arrivals.train(slot)
    for here, there in zip(rounds.trainers, arrivals.trainers, strict=True):
        here.model.load_state_dict(there.model.state_dict())
    rounds.merge()
    for slot in (2, 0, 1):
        arrivals.master.merge([arrivals.contribute(slot)], 2, staleness=[0])
    for name, weight in rounds.master.weights.items():
        assert torch.allclose(arrivals.master.weights[name], weight, atol=1e-6), name
    for name, dense in rounds.master.dense.items():
        assert torch.allclose(arrivals.master.dense[name], dense, atol=1e-6), name


@pytest.mark.parametrize("A", ["trained", "frozen", "rotating"])
@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_error_feedback_owes_what_was_left_out_and_nothing_else(A: str, codec: str) -> None:
    """What a worker computes with, beyond its base, is what it was not told to be merged: in fp32 nothing."""
    simulation = Arrivals(seeded(Net), **{"lora.A": A, "compress.factors": codec})
    for slots in ORDER:
        simulation.arrive(*slots)
        for slot in slots:
            trainer = simulation.trainers[slot]
            owed = [float(module.lora_B.detach().abs().max()) for module in trainer.modules.values()]
            assert (max(owed) == 0) == (codec == "fp32")


@pytest.mark.parametrize("mode", ["reset-less", "reset-b"])
def test_what_was_put_off_is_owed_by_the_next_contribution(mode: str) -> None:
    simulation = Arrivals(seeded(Net), **{"lora.merge": mode})
    simulation.arrive(1)
    simulation.train(0)
    first = values(simulation.trainers[0])
    base = {n: w.double() for n, w in simulation.master.weights.items()}  # of w1's version
    list(simulation.trainers[0].contribution())
    initial = Arrivals(seeded(Net)).master.weights
    simulation.answer(0, merged=False)
    learnt = values(simulation.trainers[0])
    for name in initial:
        assert torch.allclose(learnt[name] - base[name], first[name] - initial[name].double(), atol=1e-6)
    assert simulation.trainers[0].round == 1, "other batches follow"


def test_the_draw_of_a_rotating_A_is_of_the_rounds_worth_that_is_merged() -> None:
    simulation = Arrivals(seeded(Net), **{"lora.A": "rotating", "lora.rotate_every": 2})
    draws = []
    for slots in [[0]] * 5 + [[1]] * 2 + [[0]]:
        simulation.arrive(*slots)
        draws.append(simulation.trainers[slots[0]].draw)
    assert draws == [0, 0, 0, 0, 0, 1, 1, 1], "two rounds' worth of three contributions each"


def test_A_that_merges_reset_is_another_after_each_merge() -> None:
    simulation = Arrivals(seeded(Net), **{"lora.merge": "reset"})
    seen = []
    for slots in ([0], [0], [1], [0]):
        simulation.arrive(*slots)
        seen.append(simulation.trainers[0].modules["first"].lora_A.detach().clone())
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2]), "nothing of it was merged"
    assert not torch.equal(seen[2], seen[3])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.layer(x))
        return y


def test_statistics_stay_between_those_of_the_workers() -> None:
    """Changes of then, added up, would lead beyond: N workers that all go from 1 to 0 are there at once, and
    on their way, stale, again and again."""
    simulation = Arrivals(seeded(Normed), num_workers=4)
    seen = []
    for slot in [0, 1, 2, 3] * 3:
        trainer = simulation.trainers[slot]
        with torch.no_grad():
            trainer.model.get_buffer("norm.running_var").fill_(0.01)
        received = simulation.contribute(slot)
        simulation.master.merge([received], 3, staleness=[simulation.version - trainer.version])
        simulation.version += 1
        simulation.master.publish_dense()
        simulation.answer(slot, merged=True)
        seen.append(float(simulation.master.dense["norm.running_var"][0]))
    naive, expected = 1.0, []
    for _ in seen:
        naive += (0.01 - naive) / 4
        expected.append(naive)
    assert seen == pytest.approx(expected, rel=1e-5)


# Outer momentum: shares of a round


def moved(
    outer: Outer, shares: Sequence[float], deltas: Sequence[Tensor]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    weight, state = torch.zeros(3, dtype=torch.float64), dict[str, Tensor]()
    for share, delta in zip(shares, deltas, strict=True):
        weight, state = merge.outer_step(weight, delta, state, outer, share)
    return weight, state


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_a_delta_moves_as_far_in_the_end_in_whatever_shares(momentum: float, nesterov: bool) -> None:
    outer = Outer(name="sgd", lr=0.7, momentum=momentum, nesterov=nesterov)
    delta, nothing = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for share in (1.0, 0.25):
        rest = [nothing] * int(400 / share)
        weight, _ = moved(outer, [share] * (1 + len(rest)), [delta, *rest])
        assert torch.allclose(weight, delta * 0.7 / (1 - momentum), rtol=1e-9), share


def test_momentum_fades_in_the_shares_of_a_round_as_in_the_round() -> None:
    outer = Outer(name="sgd", lr=1.0, momentum=0.8, nesterov=False)
    first, nothing = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    whole, held = moved(outer, [1.0, 1.0], [first, nothing])
    parts, left = moved(outer, [1.0] + [0.25] * 4, [first, *[nothing] * 4])
    assert torch.allclose(whole, parts, rtol=1e-12)
    assert torch.allclose(held["momentum"], left["momentum"], rtol=1e-12)


def test_decay_and_average_go_by_shares_of_a_round_too() -> None:
    simulation = Arrivals(seeded(Net), **{"outer.weight_decay": 0.3, "outer.ema": 0.5, "optimizer.lr": 0.0})
    before = simulation.master.weights["first"].clone()
    simulation.arrive(0)
    assert torch.allclose(simulation.master.weights["first"], before * (1 - 0.3 / 3), atol=1e-7)
    assert simulation.master.ema.weight == pytest.approx(1 - 0.5 ** (1 / 3))


# Rules


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"outer.staleness": "inverse"}, "outer.staleness"),
        ({"outer.max_staleness": 3}, "outer.max_staleness"),
        ({"outer.when": "arrival", "outer.name": "adam", "outer.lr": 0.01}, "outer.name"),
        ({"outer.when": "arrival", "outer.bound_norm": 1.5}, "outer.bound_norm"),
        ({"outer.when": "arrival", "train.phases": [{"from_round": 1, "local_steps": 2}]}, "train.phases"),
    ],
)
def test_what_contradicts_is_said(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        recipe(**settings)


def test_rates_go_by_how_far_the_run_is_not_the_worker() -> None:
    """A fast worker's rate does not end before the run does, and a slow one's does."""
    settings = {"schedule.name": "linear", "schedule.final": 0.0, "train.rounds": 4, "train.local_steps": 2}
    simulation = Arrivals(seeded(Net), **settings)
    met = []
    for slots in ([0], [0], [0], [0], [1], [2], [0]):
        simulation.arrive(*slots)
        met.append(simulation.trainers[slots[0]].optimizer.param_groups[0]["lr"] / 1e-3)
    # Of 8 local steps a contribution is two thirds of one; each ends with its second.
    done = [0, 0, 1, 2, 0, 0, 2]
    assert met == pytest.approx([1 - (step + 1) / 8 for step in done])
    assert [trainer.round for trainer in simulation.trainers] == [5, 1, 1], "batches are a worker's own"


def test_rounds_and_rates_go_by_what_is_merged() -> None:
    """N contributions are a round's worth, in however many versions they came."""
    made = recipe(**{"outer.when": "arrival", "train.workers": 4, "train.local_steps": 10})
    assert [made.step_of(9, n) for n in (0, 1, 2, 4, 9)] == [0, 2, 5, 10, 22]
    assert [made.round_of(9, n) for n in (0, 3, 4, 11)] == [0, 0, 1, 2]
    made = recipe(**{"train.workers": 4, "train.local_steps": 10})
    assert (made.step_of(9, 30), made.round_of(9, 30)) == (90, 9)
