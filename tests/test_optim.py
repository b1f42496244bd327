"""Inner optimizers, their parameter groups and clipping, against torch's own and naive loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from simulation import Simulation, recipe
from test_algorithm import Net, Regression, batches, mse, seeded
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lte
from lte import config, durable, lowrank, optim
from lte.config import Optimizer, Recipe
from lte.errors import ConfigError
from lte.nn import parameter_groups
from lte.optim.groups import groups, layers_above, rate_factors
from lte.optim.muon import Muon, orthogonalized
from lte.server.master import Master
from lte.worker.trainer import Trainer

OPTIMIZERS = ("adamw", "sgd", "muon", "adamw8bit")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def settings(**changed: object) -> Optimizer:
    return config.replace(Recipe(), **{f"optimizer.{key}": value for key, value in changed.items()}).optimizer


class Blocks(nn.Module):
    """Everything that optimizers tell apart: a table, numbered layers, vectors, an output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.output = nn.Linear(8, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        logits: Tensor = self.output(self.norm(x))
        return logits


def converted(**lora: Any) -> nn.Module:
    return lte.convert(seeded(Blocks), lte.LoRA(rank=2, **lora), "none")


# Muon


@pytest.mark.parametrize("shape", [(6, 6), (3, 9), (20, 4), (5, 3, 7), (2, 9, 4)])
def test_singular_values_go_through_the_quintic_and_singular_vectors_stay(shape: tuple[int, ...]) -> None:
    """In float64, matrix by matrix: what the polynomial makes of the singular values, between U and V^T."""
    matrices = normal(*shape).double()
    expected = []
    for matrix in matrices.reshape(-1, *shape[-2:]):
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        S = S / S.norm()
        for _ in range(5):
            S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
        assert ((S > 0.3) & (S < 1.3)).all()
        expected.append(U @ S.diag() @ V)
    assert torch.allclose(
        orthogonalized(matrices, torch.float64), torch.stack(expected).view(shape), rtol=0, atol=1e-9
    )


def test_a_matrix_of_zeros_has_no_direction() -> None:
    """A's gradient is zero where B is."""
    assert not orthogonalized(torch.zeros(2, 3, 4), torch.bfloat16).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has a Muon from 2.9 on")
@pytest.mark.parametrize(("scale", "torchs"), [("original", "original"), ("match-rms", "match_rms_adamw")])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_muon_is_torchs(scale: Any, torchs: str, shape: tuple[int, int]) -> None:
    """Up to what bf16 rounds: both iterate in it, in another order."""
    mine, other = nn.Parameter(normal(*shape)), nn.Parameter(normal(*shape))
    common: dict[str, Any] = {"lr": 0.02, "momentum": 0.9}
    muon = Muon(
        [{"params": [mine], "orthogonal": True, "weight_decay": 0.1}],
        dtype=torch.bfloat16,
        scale=scale,
        betas=(0.9, 0.95),
        eps=1e-8,
        **common,
    )
    reference = torch.optim.Muon([other], weight_decay=0.1, adjust_lr_fn=torchs, **common)
    start = mine.detach().clone()
    for step in range(6):
        mine.grad = normal(*shape, seed=step)
        other.grad = mine.grad.clone()
        muon.step()
        reference.step()
    assert torch.dist(mine, other) < 0.03 * torch.dist(other, start)


def test_each_head_is_orthogonalized_by_itself() -> None:
    """Heads in one parameter step as they do in parameters of their own."""

    def stepped(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        group = {"params": list(parameters), "orthogonal": True}
        muon = Muon(
            [group], lr=0.1, momentum=0.9, dtype=torch.float32, scale="original", betas=(0.9, 0.95), eps=1e-8
        )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        muon.step()

    together, gradient = nn.Parameter(normal(3, 4, 6)), normal(3, 4, 6, seed=1)
    apart = [nn.Parameter(head.detach().clone()) for head in together]
    stepped([together], [gradient * torch.tensor([1.0, 10.0, 0.1])[:, None, None]])
    stepped(apart, list(gradient))
    assert torch.allclose(together, torch.stack(list(apart)), atol=1e-5)


def test_what_is_no_matrix_steps_by_adamw_to_the_bit() -> None:
    mine, other = [[nn.Parameter(normal(7, seed=k)) for k in range(2)] for _ in range(2)]
    group = {"orthogonal": False, "weight_decay": 0.1}
    muon = Muon(
        [{"params": mine, **group}],
        lr=0.1,
        momentum=0.9,
        dtype=torch.float32,
        scale="original",
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    adamw = torch.optim.AdamW(other, lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, fused=True)
    for step in range(4):
        for own, its in zip(mine, other, strict=True):
            own.grad = normal(7, seed=step)
            its.grad = own.grad.clone()
        muon.step()
        adamw.step()
    assert all(torch.equal(own, its) for own, its in zip(mine, other, strict=True))


def test_muon_takes_heads_and_dense_matrices_but_no_tables_vectors_and_outputs() -> None:
    model = converted(embeddings=True, modules=("blocks.[01]", "embedding"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    own = settings(name="muon", lr=0.3, adamw_lr=0.001)
    by_muon, by_adamw = set[str](), set[str]()
    for group in groups(model, own):
        (by_muon if group["orthogonal"] else by_adamw).update(names[p] for p in group["params"])
        assert (group["lr"] == 0.001) == (not group["orthogonal"])
    of_heads = {f"blocks.{layer}.lora_{factor}" for layer in (0, 1) for factor in "AB"}
    assert by_muon == {*of_heads, "blocks.2.weight"}
    assert by_adamw == {
        *(f"blocks.{layer}.bias" for layer in range(3)),
        *("embedding.lora_A", "embedding.lora_B", "norm.weight", "norm.bias", "output.weight"),
    }


def stepped_naively(weight: Tensor, gradients: Sequence[Tensor], lr: float, shape: Sequence[int]) -> Tensor:
    """A weight after Muon's steps in float64, momentum 0.9 and scale `match-rms`, as a matrix of a shape."""
    momentum, stepped = torch.zeros(*shape).double(), weight.detach().double()
    for gradient in (gradient.double().reshape(*shape) for gradient in gradients):
        momentum = 0.9 * momentum + 0.1 * gradient
        U, S, V = torch.linalg.svd(0.1 * gradient + 0.9 * momentum, full_matrices=False)
        S = S / S.norm()
        for _ in range(5):
            S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
        stepped = stepped - lr * 0.2 * math.sqrt(max(shape)) * (U @ S.diag() @ V).view(weight.shape)
    return stepped


class Convolutions(nn.Module):
    """A kernel of each kind, and parameters of as many dimensions that are none."""

    MATRICES: ClassVar = {
        "line": (6, 3 * 2),
        "plane": (8, 6 * 2 * 3),
        "grouped": (8, 4 * 2 * 2),
        "space": (5, 2 * 2 * 2 * 2),
        "back": (4, 3 * 2 * 3),
        "grouped_back": (4, 2 * 2 * 2),
        "linear": (4, 6),
    }

    def __init__(self) -> None:
        super().__init__()
        self.line, self.plane = nn.Conv1d(3, 6, 2), nn.Conv2d(6, 8, (2, 3))
        self.grouped, self.space = nn.Conv2d(8, 8, 2, groups=2), nn.Conv3d(2, 5, 2)
        self.back = nn.ConvTranspose2d(4, 3, (2, 3))
        self.grouped_back = nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.depthwise, self.linear = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(6, 4)
        self.table, self.stack = nn.Embedding(4, 6), nn.Parameter(normal(3, 4, 5))


@pytest.mark.parametrize("full_rank", [False, True])
def test_dense_kernels_of_convolutions_are_orthogonalized_as_matrices_as_those_of_heads_are(
    full_rank: bool,
) -> None:
    model, gradients = seeded(Convolutions), list[dict[str, Tensor]]()
    own = recipe(
        **{
            "optimizer.name": "muon",
            "optimizer.muon_momentum": 0.9,
            "optimizer.dense_lr": 0.02,
            "optimizer.adamw_lr": 0.5,
            "lora.modules": ["plane", "grouped", "linear"] if full_rank else [],
            "lora.exclude": ["plane"],
            "train.full_rank": full_rank,
        }
    )
    for step in range(3):
        gradients.append({n: normal(*p.shape, seed=step) for n, p in model.named_parameters()})
    simulation = Simulation(model, own, 1)
    trainer = simulation.trainers[0]
    for of_step in gradients:
        for name, parameter in trainer.model.named_parameters():
            plain = name.replace("lora_B", "weight")
            parameter.grad = of_step[plain].reshape(parameter.shape) if plain in of_step else None
        trainer.step()
    for name, start in model.named_parameters():
        module = name.removesuffix(".weight")
        if full_rank and module in ("grouped", "linear"):
            adapted = trainer.model.get_submodule(module)
            end = start + adapted.lora_B.detach().view(start.shape)
        else:
            end = trainer.model.get_parameter(name)
        if name.endswith(".weight") and module in Convolutions.MATRICES:
            of_it = [of_step[name] for of_step in gradients]
            expected = stepped_naively(start, of_it, 0.02, Convolutions.MATRICES[module])
            assert torch.allclose(end.double(), expected, rtol=0, atol=1e-5), name
        else:
            reference = nn.Parameter(start.detach().clone())
            adamw = torch.optim.AdamW([reference], lr=0.5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
            for of_step in gradients:
                reference.grad = of_step[name].clone()
                adamw.step()
            assert torch.equal(end, reference), name


@pytest.mark.parametrize(
    ("module", "features"),
    [
        (nn.Conv1d(2, 12, 1), (12, 2)),
        (nn.ConvTranspose1d(2, 12, 1), (12, 2)),
        (nn.ConvTranspose2d(12, 2, 1), (2, 12)),
        (Conv1D(12, 2), (12, 2)),
        (nn.Linear(2, 12), (12, 2)),
    ],
)
def test_what_goes_out_of_a_matrix_is_known_where_it_is_transposed(
    module: nn.Module, features: tuple[int, int]
) -> None:
    """By the scale of steps `original`: sqrt(out / in) where out is more."""
    start = module.weight.detach().clone()
    optimizer = optim.make_optimizer(module, settings(name="muon", muon_scale="original", dense_lr=1.0))
    module.weight.grad = torch.ones_like(start)
    optimizer.step()
    rank_one = 1.0
    for _ in range(5):
        rank_one = 3.4445 * rank_one - 4.7750 * rank_one**3 + 2.0315 * rank_one**5
    out_features, in_features = features
    expected = rank_one * math.sqrt(max(1.0, out_features / in_features))
    assert torch.linalg.vector_norm(start - module.weight).item() == pytest.approx(expected, rel=1e-4)


def test_a_kernel_that_torch_computes_of_others_is_none_of_its_module() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 2))
    orthogonal = [group["orthogonal"] for group in groups(model, settings(name="muon"))]
    assert orthogonal == [False] * len(orthogonal)


# All of them


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_trainer_goes_on_bit_for_bit_from_its_state(name: str, tmp_path: Path) -> None:
    """Also after a trip to the disk, in the middle of a round."""
    own = recipe(
        **{
            "optimizer.name": name,
            "optimizer.momentum": 0.9,
            "optimizer.lr": 0.01,
            "optimizer.clip_norm": 1.0,
            "optimizer.layer_decay": 0.9,
            "lora.merge": "reset-less",
            "lora.heads": 2,
            "lora.rank": 40,
            "schedule.name": "wsd",
        }
    )
    wide = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 5))  # with moments of 8 bits, and of 32
    simulation = Simulation(wide, own, 1)
    (trainer,) = simulation.trainers
    simulation.local_steps(mse, batches(1, 3, 8))
    simulation.merge()
    simulation.local_steps(mse, batches(1, 3, 8, seed=5))
    tensors, numbers = trainer.state()
    durable.save_tensors({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, tmp_path / "state")
    other = Trainer(
        lte.convert(copy.deepcopy(wide), own.lora, own.base.quant),
        own,
        slot=0,
        version=1,
        base=simulation.master.snapshot(),
        base_digest=simulation.master.base_digest(),
    )
    saved = load_file(tmp_path / "state")
    other.resume(saved, numbers, merged=False)
    for each in (trainer, other):
        for batch in batches(1, 4, 8, seed=6)[0]:
            mse(each.model, batch).backward()
            each.step()
    met, expected = (dict(each.model.named_parameters()) for each in (other, trainer))
    assert all(torch.equal(met[n], p) for n, p in expected.items())
    assert all(not torch.equal(p, saved[f"parameter/{n}"]) for n, p in expected.items()), "nothing moved"


def tokens(seed: int) -> Tensor:
    return torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(seed))


def next_tokens(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def saved_and_resumed(before: dict[str, Any], after: dict[str, Any]) -> tuple[Trainer, Trainer, str]:
    """A trainer in the midst of its second round, one of other settings that goes on from its state, and
    what that says."""
    own, other = recipe(**before), recipe(**{**before, **after})
    simulation = Simulation(seeded(Blocks), own, 1)
    simulation.local_steps(next_tokens, [[tokens(0), tokens(1)]])
    simulation.merge()
    simulation.local_steps(next_tokens, [[tokens(2)]])
    resumed = Trainer(
        lte.convert(seeded(Blocks), other.lora, other.base.quant),
        other,
        slot=0,
        version=1,
        base=simulation.master.snapshot(),
        base_digest=simulation.master.base_digest(),
    )
    tensors, numbers = simulation.trainers[0].state()
    said = resumed.resume(
        {name: tensor.clone() for name, tensor in tensors.items()}, copy.deepcopy(numbers), merged=False
    )
    return simulation.trainers[0], resumed, said


def kept(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """What a trainer's optimizer keeps, by the names of parameters."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    return {names[p]: dict(state) for p, state in trainer.optimizer.state.items() if state}


def take_steps(trainer: Trainer) -> None:
    for seed in (3, 4):
        next_tokens(trainer.model, tokens(seed)).backward()
        trainer.step()
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


@pytest.mark.parametrize(
    "after",
    [
        {"optimizer.rates": [{"modules": "blocks.1.*", "factor": 0.5}]},
        {"optimizer.rates": [{"modules": "*.bias", "factor": 0.5}]},
        {"optimizer.layer_decay": 0.5},
        {"optimizer.lr": 0.1, "optimizer.dense_lr": 0.1, "optimizer.beta1": 0.5, "optimizer.clip_norm": 1.0},
    ],
    ids=lambda after: next(iter(after)),
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_stay_with_their_parameters_when_others_settings_group_them(
    name: str, after: dict[str, Any]
) -> None:
    before = {"optimizer.name": name, "optimizer.momentum": 0.9}
    trainer, resumed, said = saved_and_resumed(before, after)
    assert not said
    expected, met = kept(trainer), kept(resumed)
    assert met.keys() == expected.keys() == dict(trainer.model.named_parameters()).keys()
    for parameter, state in expected.items():
        assert met[parameter].keys() == state.keys(), parameter
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(met[parameter][key]), torch.as_tensor(value)), (parameter, key)
    take_steps(resumed)


_BNB = "bitsandbytes.optim.adamw.AdamW8bit"


@pytest.mark.parametrize(
    ("name", "after", "num", "reasons"),
    [
        ("adamw", {"name": "sgd"}, 14, ["AdamW's, not SGD with momentum's (14: blocks.0.lora_A, "]),
        ("sgd", {"name": "adamw"}, 14, ["SGD with momentum's, not AdamW's (14: blocks.0.lora_A, "]),
        ("sgd", {"momentum": 0.0}, 14, ["SGD with momentum's, not SGD's (14: blocks.0.lora_A, "]),
        ("adamw", {"name": "adamw8bit"}, 14, [f"AdamW's, not {_BNB}'s (14: "]),
        ("adamw8bit", {"name": "adamw"}, 14, [f"{_BNB}'s, not AdamW's (14: "]),
        ("muon", {"name": "adamw"}, 6, ["Muon's, not AdamW's (6: blocks.0.lora_A, "]),
        (
            "muon",
            {"muon_exclude": ["blocks.1*"]},
            4,
            ["Muon's, not AdamW's (2: blocks.1.lora_A, b", "AdamW's, not Muon's (2: output.lora_A, output"],
        ),
    ],
)
def test_moments_of_another_optimizer_begin_anew_and_the_run_says_so(
    name: str, after: dict[str, Any], num: int, reasons: list[str]
) -> None:
    before = {"optimizer.name": name, "optimizer.momentum": 0.9, "schedule.join_warmup_steps": 4}
    trainer, resumed, said = saved_and_resumed(before, {f"optimizer.{k}": v for k, v in after.items()})
    assert said.startswith(f"moments of {num} of 14 parameters begin anew, empty: the state saved is ")
    assert all(f"the state saved is {reason}" in said for reason in reasons), said
    assert "\n" not in said
    kept_before, stay = kept(trainer), kept(resumed)
    assert len(stay) == 14 - num
    for parameter, state in stay.items():
        for key, value in state.items():
            assert torch.equal(value, kept_before[parameter][key]), (parameter, key)
    next_tokens(resumed.model, tokens(5)).backward()
    resumed.step()
    of_lora_A = resumed.optimizer.param_groups[0]["lr"]
    assert of_lora_A == resumed.recipe.optimizer.lr / 4, "as of heads that begin in the middle of the run"
    take_steps(resumed)


def test_moments_of_another_shape_and_of_no_parameter_begin_anew() -> None:
    """As where somebody's own optimizer steps what is outside of the model, too."""

    def made(*shapes: tuple[int, ...]) -> tuple[nn.Linear, torch.optim.Optimizer]:
        model, others = nn.Linear(3, 2), [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = torch.optim.AdamW([*others, *model.parameters()], lr=0.1)
        for parameter in [*others, *model.parameters()]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return model, optimizer

    model, optimizer = made((4,), (5,), (6,))
    tensors, described = optim.flat(optimizer, model)
    assert {path.partition("/")[0] for path in tensors} == {"weight", "bias", "#0", "#1", "#2"}
    other_model, other = made((4,), (7,))
    said = optim.load_flat(other, other_model, tensors, described)
    assert said == (
        "moments of 2 of 5 parameters begin anew, empty: the state saved is of another shape (1: #1);"
        " the optimizer has none of these names (1: #2)"
    )
    assert set(optim.flat(other, other_model)[1]) == {"weight", "bias", "#0"}
    other.step()


def test_counts_of_fused_steps_are_where_the_parameter_is() -> None:
    """Files are read on the CPU; a GPU's kernel wants the count in its own memory."""
    model = lte.convert(seeded(Blocks), lte.LoRA(rank=2), "none")
    optimizer = optim.make_optimizer(model, settings(name="muon"))
    next_tokens(model, tokens(0)).backward()
    optimizer.step()
    tensors, described = optim.flat(optimizer, model)
    elsewhere = lte.convert(seeded(Blocks), lte.LoRA(rank=2), "none").to("meta")
    other = optim.make_optimizer(elsewhere, settings(name="muon"))
    assert not optim.load_flat(other, elsewhere, tensors, described)
    steps = [state["step"] for state in other.state.values() if "step" in state]
    assert steps
    assert {(step.device.type, step.dtype) for step in steps} == {("meta", torch.float32)}


def test_momentum_of_muon_turns_with_A() -> None:
    own = recipe(
        **{"lora.A": "rotating", "lora.moments": "transport", "lora.rank": 2, "optimizer.name": "muon"}
    )
    simulation = Simulation(seeded(Net), own, 1)
    (trainer,) = simulation.trainers
    simulation.local_steps(mse, batches(1, 3, 8))
    module = trainer.modules["up"]
    momentum = trainer.optimizer.state[module.lora_B]["momentum_buffer"]
    before, old_A = momentum[0].clone(), module.lora_A[0].clone()
    simulation.merge()
    expected, _ = lowrank.transport(before, torch.zeros_like(before), old_A, module.lora_A[0])
    assert torch.equal(momentum[0], expected)
    assert not torch.allclose(momentum[0], before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns(name: str) -> None:
    own = recipe(**{"optimizer.name": name, "optimizer.lr": 0.02, "optimizer.dense_lr": 0.02})
    simulation = Simulation(seeded(Net), own, 2)
    data = batches(1, 1, 16, seed=3) * 2

    def loss() -> float:
        return sum(
            float(mse(t.model, own[0]).detach()) for t, own in zip(simulation.trainers, data, strict=True)
        )

    before = loss()
    for _ in range(3):
        simulation.local_steps(mse, [own * 10 for own in data])
        simulation.merge()
    assert loss() < 0.8 * before


def test_moments_of_8_bits_are_of_8_bits() -> None:
    model = lte.convert(nn.Sequential(nn.Linear(512, 32)), lte.LoRA(rank=16), "none")
    optimizer = optim.make_optimizer(model, settings(name="adamw8bit"))
    model(normal(4, 512)).square().sum().backward()
    optimizer.step()
    kinds = {state["state1"].dtype for state in optimizer.state.values()}
    assert kinds == {torch.uint8, torch.float32}, "small ones are not worth it"


def test_pages_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer\.name: paged-adamw8bit needs a GPU"):
        optim.make_optimizer(converted(), settings(name="paged-adamw8bit"))


# Groups


def test_without_further_settings_there_is_a_group_a_kind() -> None:
    model = converted(modules=("blocks.0",))
    own = settings(name="adamw", lr=1.0, lr_A=2.0, dense_lr=3.0, dense_weight_decay=0.5)
    met = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups(model, own)]
    assert met == [(1, 2.0, 0.0), (1, 1.0, 0.0), (4, 3.0, 0.5), (5, 3.0, 0.0)]
    assert all("orthogonal" not in group for group in groups(model, own))


def test_the_last_rate_that_matches_counts() -> None:
    rates = [
        {"modules": "blocks.*", "factor": 0.5},
        {"modules": "blocks.1.*", "factor": 0.25},
        {"modules": "*.bias", "factor": 0.0},
    ]
    model, own = converted(), settings(lr=1.0, lr_A=2.0, dense_lr=4.0, rates=rates)
    names = {parameter: name for name, parameter in model.named_parameters()}
    met = {names[p]: group["lr"] for group in groups(model, own) for p in group["params"]}
    assert met["blocks.0.lora_A"] == 1.0
    assert met["blocks.0.lora_B"] == 0.5
    assert (met["blocks.1.lora_A"], met["blocks.1.lora_B"]) == (0.5, 0.25)
    assert met["blocks.1.bias"] == met["norm.bias"] == 0.0
    assert met["norm.weight"] == 4.0
    assert met.keys() == set(names.values())


def test_a_rate_acts_on_what_it_names() -> None:
    """With factor 0 a block stays as it is, while the others move."""
    own = recipe(**{"optimizer.rates": [{"modules": "up.*", "factor": 0}], "optimizer.lr": 0.1})
    simulation = Simulation(seeded(Net), own, 1)
    before = copy.deepcopy(simulation.trainers[0].model.state_dict())
    simulation.local_steps(mse, batches(1, 2, 8))
    after = simulation.trainers[0].model.state_dict()
    still = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert still == {name for name in after if name.startswith("up.")}


def test_rates_that_fall_with_depth() -> None:
    names = ["embedding.weight", "blocks.0.a", "blocks.0.b", "blocks.2.a", "norm.weight"]
    assert layers_above(names) == [4, 3, 3, 1, 0]
    own = settings(layer_decay=0.5, rates=[{"modules": "*.b", "factor": 8}])
    assert rate_factors(names, own) == [0.5**4, 0.5**3, 1.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (
            {"rates": [{"modules": "block.1.*"}, {"modules": "norm.*"}]},
            "optimizer.rates: 'block.1.*' matches no parameter, did you mean one like blocks.1.",
        ),
        ({"rates": [{"modules": "xyz"}]}, "optimizer.rates: 'xyz' matches no parameter"),
    ],
)
def test_patterns_that_match_nothing_are_told_what_is_near(changed: dict[str, Any], fault: str) -> None:
    """By the worker, and by the server before any worker comes."""
    own = config.replace(Recipe(), **{f"optimizer.{key}": value for key, value in changed.items()})
    with pytest.raises(ConfigError) as raised:
        optim.make_optimizer(converted(), own.optimizer)
    (met,) = raised.value.faults
    assert met.startswith(fault)
    with pytest.raises(ConfigError) as raised:
        Master(seeded(Blocks), own)
    (met,) = raised.value.faults
    assert met.startswith(fault)


def test_layers_without_numbers_cannot_decay() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer\.layer_decay: no parameter"):
        optim.make_optimizer(lte.convert(seeded(Net), lte.LoRA(rank=2), "none"), settings(layer_decay=0.9))


# Clipping


def of_kinds(model: nn.Module) -> dict[str, list[Tensor]]:
    return {
        kind: [p.grad.clone() for p in parameters if p.grad is not None]
        for kind, parameters in parameter_groups(model).items()
    }


@pytest.mark.parametrize("by", ["all", "group", "head"])
@pytest.mark.parametrize("most", [0.5, 3.0, 1e6])
def test_clipping_against_a_naive_loop(by: str, most: float) -> None:
    H = 3
    model = lte.convert(seeded(Net), lte.LoRA(rank=2, heads=H), "none")
    for k, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        size = torch.tensor([0.01, 1.0, 5.0]).view(3, 1, 1) if parameter.ndim == 3 else 1.0
        parameter.grad = normal(*parameter.shape, seed=k) * size
    before = of_kinds(model)

    def length(vectors: list[Tensor]) -> float:
        return math.sqrt(sum(float(v.double().square().sum()) for v in vectors))

    def factor(vectors: list[Tensor]) -> float:
        return min(1.0, most / length(vectors))

    optim.clip(model, settings(clip_norm=most, clip_by=by))
    for kind, gradients in of_kinds(model).items():
        for gradient, was in zip(gradients, before[kind], strict=True):
            if by == "all":
                expected = was * factor([g for some in before.values() for g in some])
            elif by == "group" or kind == "dense":
                expected = was * factor(before[kind])
            else:
                expected = torch.stack(
                    [
                        was[h] * factor([g[h] for k in ("lora_A", "lora_B") for g in before[k]])
                        for h in range(H)
                    ]
                )
            assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_no_clipping() -> None:
    model = converted()
    model(torch.arange(4)).square().sum().backward()
    before = of_kinds(model)
    optim.clip(model, settings(clip_norm=0.0, clip_by="head"))
    assert all(
        torch.equal(a, b) for k, some in of_kinds(model).items() for a, b in zip(some, before[k], strict=True)
    )


@pytest.mark.parametrize("merge", ["reset-less", "reset-b"])
def test_heads_of_one_worker_clip_like_workers_of_one_head(merge: str) -> None:
    """Regression has no dense parameters: what differs else is only that a worker's heads share one norm."""
    H = 4
    masters = {}
    for heads, by in ((1, "head"), (H, "head"), (H, "all")):
        own = recipe(
            **{
                "lora.heads": heads,
                "lora.merge": merge,
                "optimizer.lr": 0.05,
                "optimizer.clip_norm": 0.05,
                "optimizer.clip_by": by,
                "train.batch_size": 8 * heads,
            }
        )
        simulation = Simulation(seeded(Regression), own, H // heads)
        for round_ in range(3):
            data = batches(H, 2, 8, seed=round_)
            if heads == H:
                data = [[tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*data, strict=True)]]
            simulation.local_steps(mse, data)
            simulation.merge()
        masters[heads, by] = simulation.master.weights["layer"]
    assert torch.allclose(masters[1, "head"], masters[H, "head"], atol=1e-6)
    assert not torch.allclose(masters[1, "head"], masters[H, "all"], atol=1e-4)
