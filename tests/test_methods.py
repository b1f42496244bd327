"""Methods that are settings of the same machine, against naive loops in plain torch."""

from collections.abc import Iterator

import pytest
import torch
from simulation import Simulation, recipe
from torch import nn
from torch.nn import functional as F

from lte import config, quantize
from lte.errors import ConfigError

SCALE = 2.0


class Net(nn.Module):
    """Two adapted weights, a norm, biases: adapted and dense parameters that interact."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def mse(model: nn.Module, batch: object) -> torch.Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def batches(num_workers: int, steps: int, seed: int, size: int = 8) -> list[list[object]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            (torch.randn(size, 6, generator=generator), torch.randn(size, 5, generator=generator))
            for _ in range(steps)
        ]
        for _ in range(num_workers)
    ]


class NaiveLoRA:
    """`Net` with plain factors beside its two weights: y = x (W + s / H sum_h B_h A_h)^T + b, nothing else.

    Attributes:
        W: the frozen weights. A, B: (H, r, in), (H, out, r) of each. dense: norm and biases.
    """

    def __init__(self, model: nn.Module, starts: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Args: model: plain. starts: the A of each weight to begin with."""
        parameters = {n: p.detach().clone().to(dtype) for n, p in model.named_parameters()}
        self.W = {name: parameters.pop(f"{name}.weight") for name in ("up", "down")}
        self.dense = {name: nn.Parameter(p) for name, p in parameters.items()}
        self.A = {name: nn.Parameter(A.detach().clone().to(dtype)) for name, A in starts.items()}
        self.B = {
            name: nn.Parameter(torch.zeros(A.shape[0], len(self.W[name]), A.shape[1], dtype=dtype))
            for name, A in starts.items()
        }

    def weight(self, name: str) -> torch.Tensor:
        products = torch.einsum("hor,hri->oi", self.B[name], self.A[name])
        return self.W[name] + SCALE / len(self.A[name]) * products

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.W["up"].dtype)
        x = F.linear(x, self.weight("up"), self.dense["up.bias"])
        x = F.layer_norm(x, (16,), self.dense["norm.weight"], self.dense["norm.bias"])
        return F.linear(torch.tanh(x), self.weight("down"), self.dense["down.bias"])

    def loss(self, batch: object) -> torch.Tensor:
        x, y = batch
        return F.mse_loss(self(x), y.to(self.W["up"].dtype))

    def groups(self, lr: float, dense_lr: float) -> list[dict[str, object]]:
        return [
            {"params": [*self.A.values(), *self.B.values()], "lr": lr},
            {"params": list(self.dense.values()), "lr": dense_lr},
        ]

    @property
    def trained(self) -> Iterator[nn.Parameter]:
        yield from (*self.A.values(), *self.B.values(), *self.dense.values())


def starts(simulation: Simulation, worker: int = 0) -> dict[str, torch.Tensor]:
    """The A that a worker holds now, by module."""
    modules = simulation.trainers[worker].modules
    return {name: module.lora_A.detach().clone() for name, module in modules.items()}


def distance(simulation: Simulation, naive: NaiveLoRA, which: str) -> float:
    """The largest difference of what the server measures losses on from a naive model."""
    met = simulation.master.parameters(which)
    expected = {f"{name}.weight": naive.weight(name) for name in naive.W} | naive.dense
    return max(float((met[name] - tensor.detach()).abs().max()) for name, tensor in expected.items())


LORA = {
    "lora.merge": "never",
    "train.workers": 1,
    "optimizer.name": "adamw",
    "optimizer.lr": 0.02,
    "optimizer.dense_lr": 0.01,
    "optimizer.eps": 1e-6,
}


# LoRA


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_lora_is_lora(optimizer: str) -> None:
    """Losses, and what is published after each round, are those of a naive loop over the same batches."""
    simulation = Simulation(net(), recipe(**LORA | {"optimizer.name": optimizer}), 1)
    naive = NaiveLoRA(net(), starts(simulation), torch.float64)
    groups = naive.groups(lr=0.02, dense_lr=0.01)
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    other = torch.optim.SGD(groups) if optimizer == "sgd" else adamw
    model, base = simulation.trainers[0].model, dict(simulation.master.base)
    for round_ in range(4):
        data = batches(1, 5, seed=round_)
        for batch in data[0]:
            loss = naive.loss(batch)
            assert mse(model, batch).item() == pytest.approx(loss.item(), abs=1e-5)
            loss.backward()
            other.step()
            other.zero_grad()
            simulation.local_steps(mse, [[batch]])
        simulation.merge()
        assert distance(simulation, naive, "published") < 1e-5
        assert distance(simulation, naive, "master") < 1e-5
        assert simulation.master.base == base, "the base is that of the start"
    moved = (naive.weight("up") - naive.W["up"]).detach().abs().max()
    assert moved > 0.01, "it did not train: the test is blind"


def test_the_function_of_heads_that_are_never_merged_is_no_other_in_eval_mode() -> None:
    simulation = Simulation(net(), recipe(**LORA, **{"lora.dropout": 0.5}), 1)
    simulation.local_steps(mse, batches(1, 5, seed=1))
    simulation.merge()
    model, x = simulation.trainers[0].model.eval(), torch.randn(32, 6)
    published = net()
    simulation.master.fill(published, "published")
    assert torch.allclose(model(x), published(x), atol=1e-5)
    assert (model(x) - net()(x)).abs().max() > 0.01, "it did not train: the test is blind"
    assert torch.allclose(model.up.weight, published.up.weight, atol=1e-6)


@pytest.mark.parametrize("A", ["trained", "frozen"])
def test_qlora_owes_what_its_codec_leaves_out(A: str) -> None:
    """On a quantized base, sent in 4 bits: what is published is the base of the start with the factors as
    the server knows them, and these follow the worker's own."""
    settings = recipe(**LORA, **{"lora.A": A, "base.quant": "nf4", "compress.factors": "int4"})
    simulation = Simulation(net(), settings, 1)
    trainer, base = simulation.trainers[0], dict(simulation.master.base)
    for round_ in range(3):
        simulation.local_steps(mse, batches(1, 5, seed=round_))
        simulation.merge()
        assert trainer.merged_digest() == simulation.master.merged_digest("w0", 1, 4)
    known = simulation.master.merged_of("w0", 1, 4)
    for name, module in trainer.modules.items():
        assert simulation.master.base[name] is base[name]
        sent = SCALE * known[f"{name}/B"][0] @ known[f"{name}/A"][0]
        published = simulation.master.parameters("published")[f"{name}.weight"]
        assert torch.allclose(published, quantize.dequantize(base[name]) + sent, atol=1e-6)
        left_out = (module.lora_B - known[f"{name}/B"]).abs().max()
        assert 0 < left_out < 0.2 * module.lora_B.abs().max()
    before = {name: module.lora_B.clone() for name, module in trainer.modules.items()}
    for _ in range(6):  # without further steps what is owed arrives
        simulation.merge()
    for name, module in trainer.modules.items():
        assert torch.equal(module.lora_B, before[name]), "a worker's own heads are never touched"
        left_out = (module.lora_B - simulation.master.merged_of("w0", 1, 4)[f"{name}/B"]).abs().max()
        assert left_out < 1e-4 * module.lora_B.abs().max()


def test_nothing_but_dense_changes_is_published_of_lora() -> None:
    simulation = Simulation(net(), recipe(**LORA), 1)
    simulation.local_steps(mse, batches(1, 5, seed=0))
    simulation.merge()
    before = simulation.master.requantize()
    changes = [change for _, change in simulation.master.changes_since(before)]
    assert [(change.codes.numel(), change.scales.numel()) for change in changes] == [(1, 1)] * 2


def test_whoever_comes_goes_on_with_heads_that_are_never_merged() -> None:
    """Another worker's name, no state: it adopts what the server knows, and computes what it publishes."""
    first = Simulation(net(), recipe(**LORA), 1)
    first.local_steps(mse, batches(1, 5, seed=0))
    first.merge()
    master = first.master
    master.keep_only([])
    second = Simulation(net(), recipe(**LORA), 2).trainers[1]
    assert second.merged_digest() != master.merged_digest("else", 1, 4)
    second.adopt(master.merged_of("else", 1, 4))
    assert second.merged_digest() == master.merged_digest("else", 1, 4)
    for name, module in second.modules.items():
        assert torch.allclose(module.weight, master.parameters("published")[f"{name}.weight"], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train.workers": 4}, "lora.merge: never is for one worker"),
        ({"lora.heads": 2}, "lora.merge: never is for one head"),
        ({"outer.name": "sgd"}, "lora.merge: never leaves the outer optimizer nothing"),
        ({"outer.weight_decay": 0.1}, "lora.merge: never leaves the outer optimizer nothing"),
        ({"outer.bound_norm": 2.0}, "outer.bound_norm: compares"),
        ({"outer.ema": 0.9, "outer.publish_ema": True}, "outer.publish_ema: cannot be told in heads"),
        ({"lora.A": "rotating"}, "lora.A: rotating needs lora.merge = reset-b, not never"),
    ],
)
def test_what_contradicts_lora_is_one_line(changes: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config.replace(recipe(**LORA), **changes)
    assert len(raised.value.faults) == 1 and line in raised.value.faults[0]
