"""Dropout, rank-stabilized scales, gradient accumulation and activation checkpointing in local steps."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from simulation import Simulation, recipe
from test_algorithm import MODES, Net, Regression, batches, mse, seeded
from torch import Tensor, nn

import lte
from lte import config
from lte.config import LoRA, Recipe
from lte.errors import ConfigError
from lte.nn import blocks, recompute_activations
from lte.server.master import Master
from lte.tasks import micro_batches
from lte.worker.trainer import Trainer


class Deep(nn.Module):
    """Blocks in a list, one of which holds another list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(3)
        )
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        y: Tensor = self.last(x)
        return y


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def moved(model: nn.Module) -> nn.Module:
    """A converted model whose heads have left their start."""
    with torch.no_grad():
        for k, (_, module) in enumerate(lte.nn.adapted_modules(model)):
            module.lora_B.normal_(std=0.1, generator=torch.Generator().manual_seed(k))
    return model


# Dropout


def test_dropout_acts_on_the_inputs_of_A_alone() -> None:
    """Naively, with the masks that the seeds give: kept elements are divided by the share that is kept."""
    H, share = 2, 0.25
    model = moved(lte.convert(seeded(Regression), LoRA(rank=3, scale=1.5, heads=H, dropout=share), "none"))
    layer = model.layer
    layer.dropout_seeds = [7, 8]
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    expected = []
    for h in range(H):
        mask = torch.empty(4, 6).bernoulli_(0.75, generator=torch.Generator().manual_seed(7 + h))
        assert 0 < mask.mean() < 1
        own = x[4 * h : 4 * h + 4]
        delta = layer.lora_B[h] @ layer.lora_A[h]
        expected.append(own @ layer.published_weight.T + 1.5 * (own * mask / 0.75) @ delta.T)
    assert torch.allclose(model(x), torch.cat(expected), atol=1e-5)
    assert torch.equal(model.eval()(x), x @ layer.weight.T), "the published model drops nothing"


@pytest.mark.parametrize("merge", ["reset-less", "reset-b"])
def test_heads_of_one_worker_drop_what_workers_of_one_head_do(merge: str) -> None:
    """One head, one seed, wherever it is trained; and masks change with every step."""
    H = 3
    masters = {}
    for heads, share in ((1, 0.3), (H, 0.3), (1, 0.0)):
        own = recipe(
            **{
                "lora.heads": heads,
                "lora.merge": merge,
                "lora.dropout": share,
                "optimizer.lr": 0.05,
                "train.batch_size": 8 * heads,
            }
        )
        simulation = Simulation(seeded(Regression), own, H // heads)
        for round_ in range(2):
            data: list[Any] = batches(H, 2, 8, seed=round_)
            if heads == H:
                data = [[tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*data, strict=True)]]
            simulation.local_steps(mse, data)
            simulation.merge()
        masters[heads, share] = simulation.master.weights["layer"]
    assert torch.allclose(masters[1, 0.3], masters[H, 0.3], atol=1e-6)
    assert not torch.allclose(masters[1, 0.3], masters[1, 0.0], atol=1e-3)


def test_a_worker_that_drops_another_share_trains_another_model() -> None:
    model = lte.convert(seeded(Net), LoRA(rank=4, scale=2.0, dropout=0.1), "none")
    theirs = Master(seeded(Net), recipe(**{"lora.dropout": 0.2}))
    told = lte.nn.difference(lte.nn.describe(model), theirs.plan.describe(theirs.recipe.lora))
    assert told.startswith("up.weight is ")
    assert told.endswith(", dropout 0.2")


def test_masks_are_a_function_of_run_head_step_and_forward_pass() -> None:
    def seeds(trainer: Trainer) -> list[int]:
        trainer.model(torch.zeros(8, 6))
        assert trainer.modules["up"].dropout_seeds is not None
        return trainer.modules["up"].dropout_seeds

    own = recipe(**{"lora.dropout": 0.5, "lora.heads": 2})
    one, other = Simulation(seeded(Net), own, 2).trainers
    met = [*seeds(one), *seeds(one), *seeds(other)]
    one.step()
    met += seeds(one)
    assert len(set(met)) == len(met) == 8
    again = Simulation(seeded(Net), own, 1).trainers[0]
    assert seeds(again) == met[:2]


def test_dropout_goes_on_bit_for_bit_whatever_others_draw() -> None:
    own = recipe(**{"lora.dropout": 0.5, "optimizer.lr": 0.05})
    simulation = Simulation(seeded(Net), own, 1)
    (trainer,) = simulation.trainers
    simulation.local_steps(mse, batches(1, 3, 8))
    tensors, numbers = copy.deepcopy(trainer.state())
    (other,) = Simulation(seeded(Net), own, 1).trainers
    other.resume(tensors, numbers, merged=False)
    for each in (trainer, other):
        torch.rand(17)  # as another worker in this process might
        for batch in batches(1, 3, 8, seed=3)[0]:
            mse(each.model, batch).backward()
            each.step()
    met, expected = (dict(each.model.named_parameters()) for each in (other, trainer))
    assert all(torch.equal(met[name], parameter) for name, parameter in expected.items())


@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "too late"])
def test_a_worker_that_missed_a_rotation_has_the_A_of_its_state(is_merged: bool) -> None:
    """It turns its moments out of that A if its contribution was merged; else it owes by that A still."""
    own = recipe(**{"lora.A": "rotating", "lora.moments": "transport", "optimizer.name": "adamw"})
    simulation = Simulation(seeded(Net), own, 2)
    trainer = simulation.trainers[1]
    simulation.local_steps(mse, batches(2, 3, 8))
    simulation.merge()
    simulation.local_steps(mse, batches(2, 3, 8, seed=2))
    assert dict(trainer.contribution())
    tensors, numbers = copy.deepcopy(trainer.state())
    simulation.merge(only=[0, 1] if is_merged else [0])
    again = Trainer(
        lte.convert(seeded(Net), own.lora, "none"),
        own,
        slot=1,
        version=2,
        base=simulation.master.snapshot(),
        base_digest=simulation.master.base_digest(),
    )
    again.resume(tensors, numbers, merged=is_merged)
    assert again.draw == trainer.draw == (2 if is_merged else 1)
    assert again.given_digest() == trainer.given_digest() != ""
    for name, module in again.modules.items():
        other = trainer.modules[name]
        assert torch.equal(module.lora_B, other.lora_B)
        met, expected = (t.optimizer.state[m.lora_B] for t, m in ((again, module), (trainer, other)))
        assert torch.equal(met["exp_avg"], expected["exp_avg"])


# Scale


def test_rank_stabilized_scales_are_alpha_over_the_root_of_each_rank() -> None:
    lora = LoRA(rank=4, scaling="rank-stabilized", alpha=6.0, overrides=({"modules": "do*", "rank": 9},))
    model = lte.convert(seeded(Net), lora, "none")
    assert (model.up.scale, model.down.scale) == (3.0, 2.0)
    given = lte.convert(seeded(Net), LoRA(rank=4, scale=16.0), "none")
    assert (given.up.scale, given.down.scale) == (16.0, 16.0)


def test_a_smaller_worker_has_the_scales_of_the_recipe() -> None:
    """Or its heads would not mean what the server takes them for."""
    changes = {
        "lora.rank": 16,
        "lora.scaling": "rank-stabilized",
        "lora.alpha": 8.0,
        "lora.overrides": [{"modules": "down", "rank": 4}],
    }
    simulation = Simulation(seeded(Net), recipe(**changes), 2, caps=[(0, 0), (2, 0)])
    for trainer in simulation.trainers:
        assert (trainer.modules["up"].scale, trainer.modules["down"].scale) == (2.0, 4.0)
        assert lte.nn.describe(trainer.model) == simulation.master.plan.capped(trainer.rank).describe(
            simulation.recipe.lora
        )


# Accumulation


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("num", [1, 2, 4])
@pytest.mark.parametrize("merge", MODES)
def test_gradients_of_pieces_add_up_to_those_of_the_batch(heads: int, num: int, merge: str) -> None:
    lora = LoRA(rank=2, heads=heads, merge=merge)
    model = moved(lte.convert(seeded(Net), lora, "none"))
    n = 4 * heads
    (((x, y),),) = batches(1, 1, n)
    whole = mse(model, (x, y))
    whole.backward()
    expected = gradients(model)
    model.zero_grad()
    total = 0.0
    pieces = list(zip(micro_batches(x, heads, num), micro_batches(y, heads, num), strict=True))
    assert len(pieces) == num
    for piece in pieces:
        assert len(piece[0]) == n // num
        loss = mse(model, piece) / num
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(whole.detach()))
    met = gradients(model)
    assert met.keys() == expected.keys()
    for name, gradient in met.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5), name


def test_one_piece_is_the_batch_itself() -> None:
    batch = torch.arange(24).view(6, 4)
    (piece,) = micro_batches(batch, 3, 1)
    assert torch.equal(piece, batch)
    assert piece.data_ptr() == batch.data_ptr()


# Activation checkpointing


@pytest.mark.parametrize("patterns", [("*",), ("blocks.1", "blocks.2.*")])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_the_same_and_activations_are_not_kept(patterns: Any, dropout: float) -> None:
    own = recipe(**{"lora.dropout": dropout, "lora.heads": 2})
    kept, met = [], []
    for checkpoint in (False, True):
        changes = {"train.checkpoint_activations": checkpoint, "train.checkpoint_modules": list(patterns)}
        (trainer,) = Simulation(seeded(Deep), config.replace(own, **changes), 1).trainers
        moved(trainer.model)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        (two,) = batches(1, 2, 64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = mse(trainer.model, two[0]) + mse(trainer.model, two[1])  # each with masks of its own
        loss.backward()
        kept.append(sum(sizes))
        met.append(gradients(trainer.model))
    assert met[0].keys() == met[1].keys()
    for name, gradient in met[0].items():
        assert torch.equal(met[1][name], gradient), name
    assert kept[1] < 0.8 * kept[0]


class Normed(nn.Module):
    """A block of a convolution with norms that keep statistics, and one whose weight is another's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        tied = nn.Linear(6, 6)
        tied.weight = self.first.weight
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4, momentum=None), nn.Conv2d(4, 2, 1)), tied]
        )
        self.blocks[0].append(nn.InstanceNorm2d(2, track_running_stats=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.blocks[1](
            x + self.blocks[0](x.view(-1, 2, 3, 1).expand(-1, -1, -1, 4)).mean(3).flatten(1)
        )


def test_recomputing_leaves_statistics_alone_and_takes_tied_heads_masks() -> None:
    own = recipe(**{"lora.dropout": 0.4, "lora.heads": 2, "lora.tied": "adapted"})
    states, met = [], []
    for checkpoint in (False, True):
        changed = config.replace(own, **{"train.checkpoint_activations": checkpoint})
        (trainer,) = Simulation(seeded(Normed), changed, 1).trainers
        assert {"first", "blocks.0.0"} <= trainer.modules.keys()
        moved(trainer.model).train()
        (two,) = batches(1, 2, 16)
        (trainer.model(two[0][0]) + 2 * trainer.model(two[1][0])).square().mean().backward()
        states.append(dict(trainer.model.named_buffers()))
        met.append(gradients(trainer.model))
    assert states[1].keys() == states[0].keys()
    for name, buffer in states[0].items():
        assert torch.equal(states[1][name], buffer), name
    assert int(states[0]["blocks.0.1.num_batches_tracked"]) == 2
    assert met[0].keys() == met[1].keys()
    for name, gradient in met[0].items():
        assert torch.equal(met[1][name], gradient), name


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_of_a_convolution_is_that_of_its_factors_inputs(dropout: float) -> None:
    """Naively, as above: the base sees all of x, and conv1x1_B(conv_A(x)) what the masks leave."""
    model = moved(
        lte.convert(nn.Sequential(nn.Conv2d(3, 4, 2, bias=False)), LoRA(rank=2, dropout=dropout), "none")
    ).train()
    (conv,) = model
    conv.dropout_seeds = [5]
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    kept = torch.empty_like(x).bernoulli_(1 - dropout, generator=torch.Generator().manual_seed(5))
    inner = nn.functional.conv2d(x * kept / (1 - dropout), conv.lora_A[0].view(2, 3, 2, 2))
    heads = nn.functional.conv2d(inner, conv.lora_B[0][:, :, None, None])
    expected = nn.functional.conv2d(x, conv.published_weight) + conv.scale * heads
    assert torch.allclose(model(x), expected, atol=1e-4)


def test_a_copy_of_the_model_computes_by_itself() -> None:
    model = lte.convert(seeded(Deep), LoRA(rank=2), "none")
    recompute_activations(model, ["*"])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.blocks.parameters():
            parameter.zero_()
    x = torch.randn(3, 6)
    assert not torch.equal(twin.train()(x), model.train()(x))


def test_blocks_are_recomputed_once_however_often_that_is_asked_for() -> None:
    model = lte.convert(seeded(Deep), LoRA(rank=2), "none")
    recompute_activations(model, ["*"])
    before = [block.forward for block in model.blocks]
    recompute_activations(model, ["*"])
    assert all(block.forward is forward for block, forward in zip(model.blocks, before, strict=True))


def test_which_blocks() -> None:
    assert blocks(Deep(), ["*"]) == ["blocks.0", "blocks.1", "blocks.2"], "not those within others"
    assert sorted(blocks(Deep(), ["blocks.1.*", "blocks.2"])) == [
        "blocks.1.0",
        "blocks.1.1",
        "blocks.1.2",
        "blocks.2",
    ]
    assert blocks(nn.Sequential(nn.Tanh(), nn.Tanh()), ["1"]) == ["1"]


def test_blocks_that_are_not_there_are_a_fault_before_any_worker_comes() -> None:
    own = recipe(**{"train.checkpoint_activations": True, "train.checkpoint_modules": ["layers.*"]})
    with pytest.raises(ConfigError) as raised:
        Master(seeded(Deep), own)
    (line,) = raised.value.faults
    assert line.startswith("train.checkpoint_modules: 'layers.*' matches no child of an nn.ModuleList")
    assert "blocks.0" in line


def test_nothing_of_it_is_on_by_default() -> None:
    plain = Recipe()
    assert (plain.lora.dropout, plain.lora.scaling, plain.train.accumulate) == (0.0, "given", 1)
    assert not plain.train.checkpoint_activations
    assert math.isclose(plain.lora.scale_of(7), plain.lora.scale)
