"""Several heads see a slice of the batch each, or the model is refused."""

import copy

import pytest
import torch
from simulation import Simulation, recipe
from torch import nn
from torch.nn import functional as F

import lte
from lte.errors import ConfigError

BATCH, TIME, WIDTH = 4, 8, 8  # a multiple of the batch: by its size alone time could be a batch
SETTINGS = {"lora.heads": 2, "lora.A": "frozen", "train.batch_size": BATCH, "optimizer.lr": 0.1}


class Block(nn.Module):
    """(batch, time, width) to the same by attention and two layers, which see it batch first or not."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.batch_first = batch_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        y = x + self.down(self.up(x).relu())
        return F.layer_norm(y if self.batch_first else y.transpose(0, 1), (WIDTH,))


class Experts(nn.Module):
    """Rows of all samples gathered by which expert is to see them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, num_first: int = 18) -> torch.Tensor:
        flat = x.flatten(0, 1)
        return torch.cat([self.first(flat[:num_first]), self.second(flat[num_first:])]).view_as(x)


class Wrapped(nn.Module):
    """Gives what another model gives as libraries do: the loss, none here, and logits by name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
        return {"loss": None, "logits": self.inner(x)}


def seeded(model: type[nn.Module], *arguments: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model(*arguments)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, TIME, WIDTH, generator=made), torch.randn(BATCH, TIME, WIDTH, generator=made)


def mse(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def test_heads_of_one_worker_learn_what_workers_of_one_head_do() -> None:
    """Where the batch comes first, to the last bits of fp32; the check moves nothing."""
    net, masters = seeded(Block, True), []
    for heads, workers in ((2, 1), (1, 2)):
        asked = {**SETTINGS, "lora.heads": heads, "train.workers": workers}
        simulation = Simulation(net, recipe(**asked, **{"optimizer.dense_lr": 0.0}), workers)
        for round_ in range(3):
            x, y = batch(round_)
            cut = zip(x.chunk(workers), y.chunk(workers), strict=True)
            simulation.local_steps(mse, [[own] for own in cut])
            simulation.merge()
        masters.append(simulation.master.weights)
    for name, weight in masters[0].items():
        assert (weight - masters[1][name]).abs().max() < 1e-5
        assert (weight - net.get_parameter(f"{name}.weight" if "in_proj" not in name else f"{name}_weight")
                ).abs().max() > 1e-3  # fmt: skip


@pytest.mark.parametrize("wrap", [False, True])
def test_modules_that_are_given_time_first_are_refused(wrap: bool) -> None:
    """At the first forward pass in training; attention, which knows where its batch is, is not at fault."""
    net = seeded(Block, False)
    simulation = Simulation(Wrapped(net) if wrap else net, recipe(**SETTINGS), 1)
    (trainer,) = simulation.trainers
    x, _ = batch(0)
    run = (lambda: trainer.model(x=x)) if wrap else (lambda: trainer.model(x))
    with torch.no_grad():
        run()
    trainer.model.eval()
    run()
    trainer.model.train()
    names = "inner.up, inner.down" if wrap else "up, down"
    with pytest.raises(ConfigError, match=rf"^{names}: heads see each other's samples"):
        run()
    fine = Simulation(net, recipe(**SETTINGS, **{"lora.exclude": ["up", "down"]}), 1)
    fine.local_steps(mse, [[batch(0)]])
    for whole in ({"lora.batch": "whole"}, {"lora.heads": 1}):
        Simulation(net, recipe(**{**SETTINGS, **whole}), 1).local_steps(mse, [[batch(0)]])


def test_rows_that_are_gathered_from_all_samples_are_refused() -> None:
    """Whether their number can be cut or not."""
    simulation = Simulation(seeded(Experts), recipe(**SETTINGS), 1)
    (trainer,) = simulation.trainers
    with pytest.raises(
        ConfigError, match=r"^first: a batch of 17 cannot be cut .* as experts, .* lora.heads=1$"
    ):
        trainer.model(batch(0)[0], 17)
    with pytest.raises(ConfigError, match=r"^second: heads see each other's samples"):
        trainer.model(batch(0)[0], 18)


def test_models_that_mix_samples_by_statistics_are_let_and_losses_are_not_looked_at() -> None:
    class Normed(Block):
        def __init__(self) -> None:
            super().__init__(True)
            self.norm = nn.BatchNorm1d(TIME)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.norm(x))

    class Loss(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).square().mean()

    Simulation(seeded(Normed), recipe(**SETTINGS), 1).local_steps(mse, [[batch(0)]])
    (trainer,) = Simulation(seeded(Loss, True), recipe(**SETTINGS), 1).trainers
    trainer.model(batch(0)[0]).backward()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_look_changes_no_bit(checkpoint: bool) -> None:
    """Nor does it with activations that are computed anew, and masks of dropout."""
    asked = {**SETTINGS, "lora.dropout": 0.5}
    if checkpoint:
        asked |= {"train.checkpoint_activations": True, "train.checkpoint_modules": ["*"]}

    def gradients(*, looks: bool) -> list[torch.Tensor]:
        (trainer,) = Simulation(nn.Sequential(seeded(Block, True)), recipe(**asked), 1).trainers
        if not looks:
            trainer.model._forward_hooks.clear()
        nn.init.normal_(trainer.modules["0.up"].lora_B, generator=torch.Generator().manual_seed(0))
        mse(trainer.model, batch(0)).backward()
        assert not trainer.model._forward_hooks
        return [p.grad for p in trainer.model.parameters() if p.requires_grad]

    for met, expected in zip(gradients(looks=True), gradients(looks=False), strict=True):
        assert torch.equal(met, expected)


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_torchs_layers_with_time_first_are_refused_before_anything_runs(layer: type[nn.Module]) -> None:
    net = nn.ModuleDict({"inner": layer(WIDTH, 2, 16)})
    wanted = rf"^inner: {layer.__name__} has batch_first=False, so that 2 heads .* batch_first=True, or"
    with pytest.raises(ConfigError, match=wanted):
        lte.convert(copy.deepcopy(net), lte.LoRA(rank=2, heads=2), "int8")
    with pytest.raises(ConfigError, match=wanted):
        lte.nn.plan(net, lte.LoRA(rank=2, heads=2), "int8")
    for fine in (
        lte.LoRA(rank=2),
        lte.LoRA(rank=2, heads=2, batch="whole"),
        lte.LoRA(rank=2, heads=2, exclude=("*.linear?",)),
    ):
        lte.convert(copy.deepcopy(net), fine, "int8")
    first = nn.ModuleDict({"inner": layer(WIDTH, 2, 16, batch_first=True)})
    lte.convert(first, lte.LoRA(rank=2, heads=2), "int8")
