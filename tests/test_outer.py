"""The outer Adam and the master's average, against torch's and naive loops in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulation import Simulation, recipe
from test_algorithm import Net, Regression, batches, mse, seeded
from torch import Tensor, nn

from lte import lowrank, merge, quantize
from lte.compress import CODES, SCALES
from lte.config import Outer
from lte.server.average import Average
from lte.server.evaluation import Evaluation
from lte.server.master import Master, Received

ADAM = {"outer.name": "adam", "outer.lr": 0.01, "outer.beta1": 0.8, "outer.beta2": 0.95, "outer.eps": 1e-6}


def deltas(num: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(num)]


# Adam


def test_outer_adam_is_torchs() -> None:
    weight = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reference = nn.Parameter(weight.clone())
    optimizer = torch.optim.Adam([reference], lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    outer, state = Outer(name="adam", lr=0.01, beta1=0.8, beta2=0.95, eps=1e-6), dict[str, Tensor]()
    for delta in deltas(6):
        reference.grad = -delta
        optimizer.step()
        weight, state = merge.outer_step(weight, delta, state, outer)
        assert torch.allclose(weight, reference, rtol=0, atol=1e-14)
    assert int(state["steps"]) == 6


def test_weight_decay_stands_beside_adam() -> None:
    weight, (delta,) = torch.ones(5, 6, dtype=torch.float64), deltas(1)
    plain, _ = merge.outer_step(weight * 0.9, delta, {}, Outer(name="adam", lr=0.01))
    decayed, _ = merge.outer_step(weight, delta, {}, Outer(name="adam", lr=0.01, weight_decay=0.1))
    assert torch.allclose(decayed, plain)


def test_a_state_is_not_changed_by_a_step() -> None:
    """A checkpoint may be written meanwhile."""
    outer, (first, second) = Outer(name="adam", lr=0.01), deltas(2)
    _, state = merge.outer_step(torch.zeros(5, 6), first.float(), {}, outer)
    before = {kind: tensor.clone() for kind, tensor in state.items()}
    merge.outer_step(torch.zeros(5, 6), second.float(), state, outer)
    assert all(torch.equal(state[kind], tensor) for kind, tensor in before.items())


@pytest.mark.parametrize("dense", [False, True])
def test_rounds_with_outer_adam(dense: bool) -> None:
    """Adapted weights by Adam on minus the mean delta; dense parameters alike, or averaged."""
    simulation = Simulation(seeded(Net), recipe(**ADAM, **{"outer.dense": dense}), 2)
    start = {**simulation.master.weights, **simulation.master.dense}
    weights = {name: nn.Parameter(w.double()) for name, w in start.items()}
    chosen = [w for name, w in weights.items() if dense or name in simulation.master.weights]
    optimizer = torch.optim.Adam(chosen, lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    for round_ in range(3):
        simulation.local_steps(mse, batches(2, 3, 8, seed=round_))
        means = dict[str, Tensor]()
        for name in simulation.master.weights:
            modules = [t.modules[name] for t in simulation.trainers]
            of_each = [lowrank.delta(m.lora_A[0].double(), m.lora_B[0].double(), 2.0) for m in modules]
            means[name] = sum(of_each).detach() / 2
        for name, published in simulation.master.published_dense.items():
            means[name] = sum(t.dense[name].detach().double() - published for t in simulation.trainers) / 2
        for name, weight in weights.items():
            if any(weight is one for one in chosen):
                weight.grad = -means[name]
            else:
                weight.data += means[name]
        optimizer.step()
        simulation.merge()
        met = {**simulation.master.weights, **simulation.master.dense}
        for name, weight in weights.items():
            assert torch.allclose(met[name].double(), weight, rtol=0, atol=2e-5), name


def test_another_outer_optimizer_begins_with_moments_of_its_own() -> None:
    """Those of SGD are no squares, and Adam's are of another size."""
    adam, sgd = Outer(name="adam", lr=0.01), Outer(name="sgd", momentum=0.9)
    weight, (first, second) = torch.zeros(5, 6, dtype=torch.float64), deltas(2)
    for one, other in ((adam, sgd), (sgd, adam)):
        _, left = merge.outer_step(weight, first, {}, one)
        met = merge.outer_step(weight, second, left, other)
        fresh = merge.outer_step(weight, second, {}, other)
        assert torch.equal(met[0], fresh[0])
        assert met[1].keys() == fresh[1].keys()


# The average


def naive_average(history: list[Tensor], decays: list[float]) -> Tensor:
    """Of the float64 weights after each merge, by what is left of each one's weight at the end."""
    total, sum_of_weights = torch.zeros_like(history[0]), 0.0
    for k, weight in enumerate(history):
        share = 1 - decays[k]
        for later in decays[k + 1 :]:
            share *= later
        total, sum_of_weights = total + share * weight, sum_of_weights + share
    return total / sum_of_weights


@pytest.mark.parametrize("decays", [[0.0] * 4, [0.9] * 5, [0.5, 0.99, 0.99, 0.7]])
def test_the_average_is_bias_corrected_also_where_its_decay_changes(decays: list[float]) -> None:
    average, history = Average(), deltas(len(decays))
    for weight, decay in zip(history, decays, strict=True):
        held = dict(average.tensors)
        before = {name: tensor.clone() for name, tensor in held.items()}
        average.include({"w": weight}, decay)
        assert all(torch.equal(held[name], tensor) for name, tensor in before.items()), "makes new tensors"
    assert torch.allclose(average.tensors["w"], naive_average(history, decays), rtol=0, atol=1e-13)
    if set(decays) == {0.9}:
        assert average.weight == pytest.approx(1 - 0.9**5)


def run(num_rounds: int, **settings: Any) -> tuple[Simulation, list[dict[str, Tensor]]]:
    simulation = Simulation(seeded(Net), recipe(**settings), 2)
    history = []
    for round_ in range(num_rounds):
        simulation.local_steps(mse, batches(2, 3, 8, seed=round_))
        simulation.merge()
        history.append(simulation.master.parameters("master"))
    return simulation, history


def test_the_master_is_averaged_adapted_and_dense() -> None:
    simulation, history = run(4, **{"outer.ema": 0.8})
    met = simulation.master.parameters("ema")
    assert met.keys() == history[0].keys()
    for name, tensor in met.items():
        expected = naive_average([weights[name].double() for weights in history], [0.8] * 4)
        assert torch.allclose(tensor.double(), expected, rtol=0, atol=1e-6), name
        assert not torch.equal(tensor, history[-1][name])


def test_an_average_changes_no_bit_of_the_run() -> None:
    assert run(3)[0].master.master_digest() == run(3, **{"outer.ema": 0.8})[0].master.master_digest()


@pytest.mark.parametrize("settings", [{"outer.ema": 0.8}, {**ADAM, "outer.ema": 0.5, "outer.dense": True}])
def test_a_master_goes_on_bit_for_bit_from_its_state(settings: dict[str, Any]) -> None:
    simulation, _ = run(2, **settings)
    other = Master(seeded(Net), simulation.recipe)
    other.load_state(simulation.master.state())
    assert other.ema.weight == simulation.master.ema.weight
    first = simulation.master
    simulation.local_steps(mse, batches(2, 3, 8, seed=7))
    blobs = [dict(trainer.contribution()) for trainer in simulation.trainers]
    for master in (first, other):
        master.merge([received(master, who, own) for who, own in enumerate(blobs)], 0)
    assert first.master_digest() == other.master_digest()
    for group, tensors in first.state().items():
        assert quantize.digest(sorted(tensors.items())) == quantize.digest(
            sorted(other.state()[group].items())
        )
    assert "ema" in first.state()


def received(master: Master, slot: int, blobs: dict[str, Tensor]) -> Any:
    tensors = master.decode(blobs, f"w{slot}", 1, 4)
    return Received(worker_id=f"w{slot}", heads=1, rank=4, first_head=slot, draw=0, tokens=1, tensors=tensors)


def test_without_an_average_a_state_is_as_it_was() -> None:
    """Checkpoints of before have no such group, and are read."""
    simulation, _ = run(1)
    state = simulation.master.state()
    assert state.keys() == {"master", "base", "constants", "momentum", "merged"}
    other = Master(seeded(Net), recipe(**{"outer.ema": 0.9}))
    other.load_state(state)
    assert other.ema.tensors == {}


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_the_last_version_publishes_the_average(quant: str) -> None:
    """Q is requantized to it, from what Q was; W stays what it is."""
    settings = {
        "outer.ema": 0.8,
        "outer.publish_ema": True,
        "base.quant": quant,
        "optimizer.lr": 0.05,
        "optimizer.dense_lr": 0.1,
    }
    simulation, _ = run(3, **settings)
    master = simulation.master
    master_digest, before = master.master_digest(), dict(master.base)
    master.requantize(last=True)
    master.publish_dense(last=True)
    assert master.master_digest() == master_digest
    published, average = master.parameters("published"), master.parameters("ema")
    base = simulation.recipe.base
    for name, module in master.base.items():
        expected = quantize.requantize(
            average[f"{name}.weight"],
            before[name],
            hysteresis=base.hysteresis,
            keep=(base.keep_scale_from, base.keep_scale_to),
        )
        assert torch.equal(module.codes, expected.codes)
        assert torch.equal(module.scales, expected.scales)
        assert not torch.equal(module.codes, before[name].codes)
    for name in master.dense:
        assert torch.allclose(published[name], average[name], atol=1e-6)
        assert not torch.allclose(published[name], master.dense[name], atol=1e-4)


def test_workers_take_the_average_that_is_published() -> None:
    simulation, _ = run(2, **{"outer.ema": 0.5, "outer.publish_ema": True, "lora.merge": "reset-less"})
    master, trainers = simulation.master, simulation.trainers
    simulation.local_steps(mse, batches(2, 3, 8, seed=9))
    blobs = [dict(trainer.contribution()) for trainer in trainers]
    master.merge([received(master, who, own) for who, own in enumerate(blobs)], 0)
    before = master.requantize(last=True)
    changed = master.publish_dense(last=True)
    for name, change in master.changes_since(before):
        changed |= {name + CODES: change.codes, name + SCALES: change.scales}
    for trainer in trainers:
        trainer.apply(trainer.version + 1, changed, master.base_digest(), merged=True, whole=False)
        for name, module in trainer.modules.items():
            assert torch.allclose(module.published_weight, master.ema.tensors[name], atol=1e-6)


def test_the_average_is_evaluated_beside_the_others() -> None:
    model = seeded(Regression)
    simulation = Simulation(model, recipe(**{"outer.ema": 0.5}), 1)
    evaluation = Evaluation(
        model,
        simulation.master,
        lambda model, tokens: float(model.layer.weight.detach().square().sum()),
        num_threads=1,
        is_stopped=lambda: False,
    )
    before = evaluation.losses(0)
    assert before is not None and before.ema is None
    for round_ in range(2):
        simulation.local_steps(mse, batches(1, 3, 8, seed=round_))
        simulation.merge()
    after = evaluation.losses(0)
    assert after is not None
    assert after.ema == pytest.approx(float(simulation.master.ema.tensors["layer"].square().sum()))
    assert after.ema != after.master
