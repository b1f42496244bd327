"""The algorithm of DESIGN.md, section 1, against independent float64 references."""

import copy

import numpy as np
import pytest
import torch
from simulation import Simulation, recipe
from torch import nn
from torch.nn import functional as F

import lte
from lte import config, lowrank
from lte.errors import ConfigError

MODES = ("reset-less", "reset-b", "reset")


class Regression(nn.Module):
    """y = x W^T: nothing but one adapted weight."""

    def __init__(self, in_features: int = 6, out_features: int = 5) -> None:
        super().__init__()
        self.layer = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Net(nn.Module):
    """Two adapted weights, a norm, biases: adapted and dense parameters that interact."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


def seeded(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind()


def mse(model: nn.Module, batch: object) -> torch.Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def batches(num_workers: int, steps: int, size: int, seed: int = 1, features: int = 6):
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            (torch.randn(size, features, generator=generator), torch.randn(size, 5, generator=generator))
            for _ in range(steps)
        ]
        for _ in range(num_workers)
    ]


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_two_rounds_of_sgd_with_one_step_give_the_formula(heads: int) -> None:
    """(a) reset-less, T = 1: round 1 moves only B; in round 2 B is not zero, so A moves as well.

    The reference is numpy in float64, with the gradients written out: for head h with slice (x, y),
    G = 2/n (f(x) - y)^T x is the gradient of its loss by W, dB = s G A^T and dA = s B^T G.
    """
    workers, lr, rate_A, s = 3, 0.1, 0.05, 2.0
    settings = recipe(
        **{
            "lora.merge": "reset-less",
            "lora.heads": heads,
            "train.batch_size": 4 * heads,
            "optimizer.lr": lr,
            "optimizer.lr_A": rate_A,
        }
    )
    simulation = Simulation(seeded(Regression), settings, workers)
    W = simulation.master.weights["layer"].double().numpy()
    A = [t.modules["layer"].lora_A.detach().double().numpy() for t in simulation.trainers]
    B = [np.zeros((heads, 5, 4)) for _ in range(workers)]
    for round_ in range(2):
        data = batches(workers, 1, 4 * heads, seed=round_)
        merged_A, merged_B = copy.deepcopy(A), copy.deepcopy(B)
        D = np.zeros_like(W)
        for w in range(workers):
            for h in range(heads):
                x, y = (t.double().numpy()[4 * h : 4 * h + 4] for t in data[w][0])
                effective = W + s * (B[w][h] @ A[w][h] - merged_B[w][h] @ merged_A[w][h])
                G = 2 / (4 * 5) * (x @ effective.T - y).T @ x
                dB, dA = s * G @ A[w][h].T, s * B[w][h].T @ G
                B[w][h] = B[w][h] - lr * dB
                A[w][h] = A[w][h] - rate_A * dA
                D += s * (B[w][h] @ A[w][h] - merged_B[w][h] @ merged_A[w][h])
        W = W + D / (workers * heads)
        simulation.local_steps(mse, data)
        simulation.merge()
        met = simulation.master.weights["layer"].double().numpy()
        assert np.abs(met - W).max() < 1e-6
    moved = np.abs(A[0] - simulation.trainers[0].modules["layer"].lora_A.detach().numpy()).max()
    assert np.abs(merged_A[0] - A[0]).max() > 1e-4, "A did not move in round 2: the test is blind to it"
    assert moved < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_every_merge_adds_the_mean_of_the_deltas(mode: str, quant: str) -> None:
    """(b, d) W += mean(s (BA - B'A')) naively in float64, over several rounds of AdamW, each mode."""
    settings = recipe(**{"lora.merge": mode, "base.quant": quant, "optimizer.name": "adamw"})
    simulation = Simulation(seeded(Net), settings, 3)
    for round_ in range(4):
        expected = {name: w.double() for name, w in simulation.master.weights.items()}
        simulation.local_steps(mse, batches(3, 5, 8, seed=round_))
        for name in expected:
            for trainer in simulation.trainers:
                module = trainer.modules[name]
                D = module.lora_B[0].detach().double() @ module.lora_A[0].detach().double()
                if module.merged_A is not None:
                    D -= module.merged_B[0].double() @ module.merged_A[0].double()
                expected[name] += 2.0 * D / 3
        before = dict(simulation.master.weights)
        simulation.merge()
        for name, weight in simulation.master.weights.items():
            assert (weight.double() - expected[name]).abs().max() < 1e-6
            assert (weight - before[name]).abs().max() > 1e-3, "nothing was merged"


def test_reset_b_and_reset_less_differ() -> None:
    """(d) Both are right (above), and they are not the same algorithm."""
    masters = {}
    for mode in ("reset-less", "reset-b"):
        simulation = Simulation(seeded(Net), recipe(**{"lora.merge": mode, "optimizer.lr": 0.05}), 2)
        for round_ in range(3):
            simulation.local_steps(mse, batches(2, 4, 8, seed=round_))
            simulation.merge()
            if round_ == 0:
                first = simulation.master.weights["up"].clone()
                assert torch.allclose(first, masters.setdefault("first", first)), "round 1 is common to both"
        masters[mode] = simulation.master.weights["up"]
    assert (masters["reset-less"] - masters["reset-b"]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("mode", "A"),
    [*((mode, "trained") for mode in MODES), ("reset-less", "frozen"), ("reset-b", "frozen")],
)
def test_merging_the_only_worker_leaves_its_function_unchanged(mode: str, A: str) -> None:
    """(c) Unquantized base, plain averaging. Tolerance 1e-5 of outputs of size 1 (fp32 rounding)."""
    simulation = Simulation(seeded(Net), recipe(**{"lora.merge": mode, "lora.A": A, "optimizer.lr": 0.05}), 1)
    model, x = simulation.trainers[0].model, torch.randn(32, 6)
    for round_ in range(3):
        start = model(x).detach()
        simulation.local_steps(mse, batches(1, 5, 8, seed=round_))
        before = model(x).detach()
        simulation.merge()
        assert (before - start).abs().max() > 1e-2, "it did not train: the test is blind"
        assert (model(x) - before).abs().max() < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_A_gets_a_gradient_from_the_second_step_and_again_after_a_reset(mode: str) -> None:
    """(e) B = 0 hides A from the loss at the first step after a start or reset; B moves at once."""
    simulation = Simulation(seeded(Net), recipe(**{"lora.merge": mode, "optimizer.lr": 0.05}), 1)
    trainer = simulation.trainers[0]
    module = trainer.modules["up"]
    for round_ in range(3):
        for step, batch in enumerate(batches(1, 3, 8, seed=round_)[0]):
            mse(trainer.model, batch).backward()
            assert module.lora_B.grad.abs().max() > 1e-6
            fresh = step == 0 and (mode != "reset-less" or round_ == 0)
            assert (module.lora_A.grad.abs().max() == 0) == fresh
            trainer.step()
        simulation.merge()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_heads_of_one_worker_are_workers_of_one_head(mode: str, optimizer: str) -> None:
    """(f) H heads on one worker give the master of H workers; dense parameters aside (there are none)."""
    H = 4
    common = {"lora.merge": mode, "optimizer.name": optimizer, "optimizer.lr": 0.02}
    many = Simulation(seeded(Regression), recipe(**common), H)
    one = Simulation(seeded(Regression), recipe(**common, **{"lora.heads": H, "train.batch_size": 8 * H}), 1)
    for round_ in range(3):
        data = batches(H, 4, 8, seed=round_)
        joined = [tuple(torch.cat([data[w][t][i] for w in range(H)]) for i in (0, 1)) for t in range(4)]
        many.local_steps(mse, data)
        one.local_steps(mse, [joined])
        many.merge()
        one.merge()
        assert (many.master.weights["layer"] - one.master.weights["layer"]).abs().max() < 1e-5


def test_nesterov_is_torchs() -> None:
    """The outer SGD with Nesterov momentum against torch.optim.SGD in float64 on the same deltas."""
    settings = recipe(
        **{"outer.name": "sgd", "outer.lr": 0.7, "outer.momentum": 0.9, "lora.merge": "reset-b"}
    )
    simulation = Simulation(seeded(Regression), settings, 2)
    weight = nn.Parameter(simulation.master.weights["layer"].double())
    optimizer = torch.optim.SGD([weight], lr=0.7, momentum=0.9, nesterov=True)
    for round_ in range(4):
        simulation.local_steps(mse, batches(2, 3, 8, seed=round_))
        deltas = [
            lowrank.delta(m.lora_A[0].double(), m.lora_B[0].double(), 2.0)
            for m in (t.modules["layer"] for t in simulation.trainers)
        ]
        weight.grad = -(deltas[0] + deltas[1]).detach() / 2
        optimizer.step()
        simulation.merge()
        assert (simulation.master.weights["layer"].double() - weight).abs().max() < 1e-6


def test_dense_parameters_are_averaged_and_what_was_not_merged_stays_owed() -> None:
    simulation = Simulation(seeded(Net), recipe(**{"optimizer.dense_lr": 0.1}), 2)
    trainers, start = simulation.trainers, simulation.master.dense["norm.weight"].clone()
    simulation.local_steps(mse, batches(2, 3, 8))
    local = [t.dense["norm.weight"].detach().clone() for t in trainers]
    simulation.merge(only=[0])  # worker 1 is too late; the missing do not enlarge the others
    published = start + (local[0] - start) / 2
    assert torch.allclose(simulation.master.dense["norm.weight"], published, atol=1e-6)
    assert torch.equal(trainers[0].dense["norm.weight"], simulation.master.dense["norm.weight"])
    owed = trainers[1].dense["norm.weight"] - published
    assert torch.allclose(owed, local[1] - start, atol=1e-6)
    simulation.merge(only=[1])  # without further steps: exactly what was owed arrives
    expected = start + (local[0] - start) / 2 + (local[1] - start) / 2
    assert torch.allclose(simulation.master.dense["norm.weight"], expected, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_contribution_that_came_too_late_is_owed_whole(mode: str) -> None:
    """A head that is not merged keeps its delta; merged one version later it adds the same delta."""
    simulation = Simulation(seeded(Net), recipe(**{"lora.merge": mode, "optimizer.lr": 0.05}), 2)
    for round_ in range(2):  # the second time reset-less has merged factors
        simulation.local_steps(mse, batches(2, 3, 8, seed=round_))
        module = simulation.trainers[1].modules["up"]
        owed = lowrank.delta(
            module.lora_A[0].double(),
            module.lora_B[0].double(),
            2.0,
            None if module.merged_A is None else module.merged_A[0].double(),
            None if module.merged_B is None else module.merged_B[0].double(),
        ).detach()
        simulation.merge(only=[0])
        before = simulation.master.weights["up"].double()
        simulation.merge(only=[1])
        met = simulation.master.weights["up"].double() - before
        assert owed.abs().max() > 1e-3
        assert (met - owed / 2).abs().max() < 1e-6


@pytest.mark.parametrize("moments", ["keep", "transport", "clear"])
@pytest.mark.parametrize("subspace", ["random", "disjoint", "shared"])
def test_rotating_A_is_known_to_the_server_and_never_sent(moments: str, subspace: str) -> None:
    settings = recipe(
        **{
            "lora.A": "rotating",
            "lora.moments": moments,
            "lora.subspace": subspace,
            "lora.rotate_every": 2,
            "lora.rank": 2,
            "optimizer.name": "adamw",
        }
    )
    simulation = Simulation(seeded(Net), settings, 3)
    drawn = []
    for round_ in range(4):
        drawn.append([t.modules["up"].lora_A.clone() for t in simulation.trainers])
        expected = simulation.master.weights["up"].double()
        simulation.local_steps(mse, batches(3, 3, 8, seed=round_))
        assert not any(name.endswith("/A") for name, _ in simulation.trainers[0].contribution())
        for trainer, A in zip(simulation.trainers, drawn[-1], strict=True):
            assert torch.equal(trainer.modules["up"].lora_A, A), "A moves only at a merge"
            expected += 2.0 / 3 * trainer.modules["up"].lora_B[0].double() @ A[0].double()
        simulation.merge()
        assert (simulation.master.weights["up"].double() - expected).abs().max() < 1e-6
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[2][0], drawn[3][0])
    assert not torch.allclose(drawn[1][0], drawn[2][0])
    for heads in drawn:
        are_same = all(torch.equal(head, heads[0]) for head in heads)
        assert are_same == (subspace == "shared")
    if subspace == "disjoint":  # 3 heads of rank 2 fill the 6 input dimensions
        for A in (drawn[0], drawn[2]):
            mean = sum(head[0].T @ head[0] for head in A) / 3
            assert (mean - torch.eye(6)).abs().max() < 1e-5


def test_transported_moments_are_those_of_the_new_subspace() -> None:
    """If the new A spans the old rows, B's first moment describes the same M in W's space."""
    generator = torch.Generator().manual_seed(0)
    old = lowrank.draw_A(4, 16, init="semi-orthogonal", subspace="random", seed=0, module="m", head=0, draw=0)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    new, moment = turn @ old, torch.randn(7, 4, generator=generator)
    moved, squares = lowrank.transport(moment, moment.square(), old, new)
    assert (moved @ new - moment @ old).abs().max() < 1e-5
    assert (squares >= 0).all()


@pytest.mark.parametrize("init", ["semi-orthogonal", "kaiming", "xavier"])
@pytest.mark.parametrize(("rank", "features"), [(4, 16), (16, 16), (24, 16)])
def test_initializations(init: str, rank: int, features: int) -> None:
    def draw(head: int) -> torch.Tensor:
        return lowrank.draw_A(
            rank, features, init=init, subspace="random", seed=3, module="m", head=head, draw=0
        )

    A = draw(0).double()
    assert A.shape == (rank, features)
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    if init == "semi-orthogonal":
        gram = A @ A.T if rank <= features else A.T @ A
        assert (gram - torch.eye(len(gram)) * features / rank).abs().max() < 1e-5
    else:
        bound = features**-0.5 if init == "kaiming" else (6 / (features + rank)) ** 0.5
        assert A.abs().max() <= bound
        assert A.abs().max() > 0.8 * bound


def test_settings_per_module() -> None:
    overrides = [{"modules": "do*", "rank": 2, "scale": 5.0, "init": "xavier"}]
    lora = config.replace(recipe(), **{"lora.overrides": overrides}).lora
    model = lte.convert(seeded(Net), lora, "int8")
    assert (model.up.rank, model.up.scale, model.up.init) == (4, 2.0, "semi-orthogonal")
    assert (model.down.rank, model.down.scale, model.down.init) == (2, 5.0, "xavier")
    assert model.down.lora_A.shape == (1, 2, 16)


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
def test_the_layer_computes_the_formula_and_its_gradients(quant: str) -> None:
    """Forward and all gradients of a layer in reset-less state, against float64 autograd."""
    lora = lte.LoRA(rank=3, scale=1.5, heads=2, merge="reset-less")
    model = lte.convert(nn.Sequential(nn.Linear(96, 40)), lora, quant)
    layer = model[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (layer.lora_A, layer.lora_B, layer.merged_A, layer.merged_B):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    x = torch.randn(6, 7, 96, generator=generator, requires_grad=True)
    target = torch.randn(6, 7, 40, generator=generator)
    F.mse_loss(model(x), target).backward()

    W = lte.quantize.dequantize(layer.base).double()
    A, B = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    wide, bias = x.detach().double().requires_grad_(), layer.bias.detach().double()
    losses = []
    for h in range(2):
        D = 1.5 * (B[h] @ A[h] - layer.merged_B[h].double() @ layer.merged_A[h].double())
        y = wide[3 * h : 3 * h + 3] @ (W + D).T + bias
        losses.append(F.mse_loss(y, target[3 * h : 3 * h + 3].double()))
    sum(losses).backward()
    for met, expected in ((layer.lora_A.grad, A.grad), (layer.lora_B.grad, B.grad)):
        assert (met.double() - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
    # x sees the mean over the batch, as it would in the unconverted model
    assert (x.grad.double() - wide.grad / 2).abs().max() < 1e-5


def test_settings_made_in_python_are_checked() -> None:
    for lora, base, key in (
        (lte.LoRA(rank=0), "nf4", "lora.rank"),
        (lte.LoRA(merge="reset-c"), "nf4", "lora.merge"),
        (lte.LoRA(A="rotating", merge="reset-less"), "nf4", "lora.A"),
        (lte.LoRA(modules=("sideways",)), "nf4", "lora.modules"),
        (lte.LoRA(), "nf5", "base.quant"),
    ):
        with pytest.raises(ConfigError, match=key):
            lte.convert(seeded(Net), lora, base)


def test_tied_frozen_and_excluded_weights_get_no_heads() -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(10, 6),
            "hidden": nn.Linear(6, 6),
            "frozen": nn.Linear(6, 6),
            "head": nn.Linear(6, 6),
            "output": nn.Linear(6, 10, bias=False),
        }
    )
    model["output"].weight = model["embedding"].weight
    model["frozen"].weight.requires_grad_(False)
    lte.convert(model, lte.LoRA(rank=2, exclude=("head",)), "int8")
    kinds = {name: type(module).__name__ for name, module in model.items()}
    assert kinds == {
        "embedding": "Embedding",
        "hidden": "LoRALinear",
        "frozen": "Linear",
        "head": "Linear",
        "output": "Linear",
    }
    dense = dict(lte.nn.dense_parameters(model))
    assert "embedding.weight" in dense
    assert "head.weight" in dense
    assert "frozen.weight" not in dense
    assert "output.weight" not in dense, "a tied weight is one parameter"
