"""Settings without effect, as they are told, against runs: whatever leaves the bits as they are is told, and
whatever is told leaves them."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.cluster import shards
from simulation import Simulation
from torch import Tensor, nn
from torch.nn import functional as F

from lte import config, ddp, models, quantize, recipes
from lte.config import Recipe
from lte.ddp import Place
from lte.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
TINY: dict[str, Any] = {
    "model.num_layers": 1,
    "model.width": 16,
    "model.num_attention_heads": 2,
    "model.mlp_width": 16,
    "model.context_tokens": 8,
    "model.vocab_size": 32,
    "train.rounds": 3,
    "train.local_steps": 1,
    "train.workers": 2,
    "train.batch_size": 2,
    "schedule.warmup_steps": 1,
    "lora.rank": 4,
    "eval.every": 0,
    "optimizer.name": "adamw",
}
NONE_ADAPTED = {"lora.modules": ()}
FULL_RANK = {"train.full_rank": True}
CONTEXTS: dict[str, dict[str, Any]] = {
    "heads": {},
    "full rank": FULL_RANK,
    "full rank at first": {**FULL_RANK, "train.phases": [{"from_round": 1, "full_rank": False}]},
    "full rank by phases": {"train.phases": [{"from_round": 0, "full_rank": True}]},
    "all by a phase": {
        "train.phases": [
            {"local_steps": 1, "base_quant": "int8", "rank": 4, "merge": "reset-b", "full_rank": False}
        ]
    },
    "none adapted": NONE_ADAPTED,
    "DiLoCo": {**NONE_ADAPTED, "outer.name": "sgd", "outer.momentum": 0.9, "outer.dense": True},
    "LoRA": {"lora.merge": "never", "train.workers": 1},
    "FedLoRA": {"lora.merge": "never", "outer.combine": "factors"},
    "ReLoRA": {"lora.merge": "reset"},
    "rotating A": {"lora.A": "rotating"},
    "frozen A": {"lora.A": "frozen"},
    "several heads": {"lora.heads": 2},
    "not quantized": {"base.quant": "none"},
    "quantized at last": {"base.quant": "none", "train.phases": [{"from_round": 1, "base_quant": "int8"}]},
    "outer SGD": {"outer.name": "sgd", "outer.lr": 0.7},
    "outer momentum": {"outer.name": "sgd", "outer.lr": 0.7, "outer.momentum": 0.5},
    "outer Adam": {"outer.name": "adam", "outer.lr": 0.01},
    "not clipped": {"optimizer.clip_norm": 0.0},
}

OTHERWISE: dict[str, dict[str, Any]] = {
    **{
        setting: {setting: value}
        for setting, value in {
            "lora.rank": 3,
            "lora.scale": 5.0,
            "lora.dropout": 0.3,
            "lora.heads": 2,
            "lora.batch": "whole",
            "lora.merge": "reset-less",
            "lora.A": "frozen",
            "lora.init": "kaiming",
            "lora.subspace": "disjoint",
            "lora.moments": "keep",
            "lora.embeddings": True,
            "lora.exclude": ("*.mlp.*",),
            "lora.overrides": ({"modules": "*mlp*", "rank": 2},),
            "lora.tied": "adapted",
            "train.full_rank": True,
            "train.local_steps": 3,
            "base.quant": "nf4",
            "base.hysteresis": 0.0,
            "base.keep_scale_from": 1.0,
            "base.keep_scale_to": 1.0,
            "base.keep_initial": True,
            "compress.factors": "int2",
            "compress.dense": "int2",
            "compress.truncate_rank": 1,
            "compress.error_feedback": False,
            "optimizer.lr": 3e-3,
            "optimizer.lr_A": 1e-2,
            "optimizer.dense_lr": 1e-3,
            "optimizer.clip_by": "group",
            "optimizer.momentum": 0.5,
            "outer.nesterov": False,
            "outer.beta1": 0.5,
            "outer.beta2": 0.5,
            "outer.eps": 1e-3,
            "outer.dense": True,
            "outer.weights": "tokens",
            "outer.weight_decay": 0.1,
            "outer.bound_norm": 1.0,
            "outer.staleness_exponent": 2.0,
        }.items()
    },
    "outer.name": {"outer.name": "sgd", "outer.lr": 0.5, "outer.momentum": 0.5},
    "lora.rotate_every": {"lora.A": "rotating", "lora.rotate_every": 2},
    "lora.prune": {"lora.A": "rotating", "lora.moments": "prune-magnitude", "lora.prune": 0.5},
    "lora.alpha": {"lora.scaling": "rank-stabilized", "lora.alpha": 8.0},
    "lora.nested": {"lora.nested": "unfrozen", "lora.nested_min_rank": 2},
    "lora.nested_ranks": {"lora.nested": "frozen", "lora.nested_ranks": (1, 4)},
}
"""Settings that could be without effect, with what they need."""
OF_THE_MODEL = {"lora.tied"}
"""Whether they have an effect no recipe tells: nothing is tied here."""
OF_DDP: dict[str, dict[str, Any]] = {
    "train.overlap": {"train.overlap": True, "train.overlap_steps": 1},
    "compress.measure_entropy": {"compress.measure_entropy": True},
    "ddp.powersgd_rank": {"ddp.powersgd_rank": 1},
    "ddp.powersgd_start": {"ddp.powersgd_start": 2},
    "schedule.join_warmup_steps": {"schedule.join_warmup_steps": 1},
    "log.diagnostics_every": {"log.diagnostics_every": 1},
    "outer.trim": {"outer.bound_norm": 1.5, "outer.trim": 0.5},
}


def changed(
    context: Mapping[str, Any], otherwise: Mapping[str, Mapping[str, Any]] = OTHERWISE
) -> dict[str, bool]:
    """Whether a thing that is otherwise is told to be without effect; of all that a recipe may have so."""
    found = {}
    plain = recipe_of(context)
    for name, changes in otherwise.items():
        try:
            recipe = recipe_of(context, changes)
        except ConfigError:
            continue
        settings = {key for key in changes if value(recipe, key) != value(plain, key)}
        if settings:
            found[name] = settings <= {line.partition("=")[0] for line in config.idle(recipe)}
    return found


def all_told(context: Mapping[str, Any], otherwise: Mapping[str, Mapping[str, Any]] = OTHERWISE) -> Recipe:
    """A recipe with all that is told to be without effect, but for what contradicts something of it."""
    together = dict(context)
    for name, told in changed(context, otherwise).items():
        if told:
            with suppress(ConfigError):
                recipe_of(together, otherwise[name])
                together |= otherwise[name]
    assert together != context
    return recipe_of(together)


def recipe_of(*changes: Mapping[str, Any]) -> Recipe:
    return config.replace(Recipe(), **reduce(lambda one, other: {**one, **other}, changes, TINY))


def value(recipe: Recipe, setting: str) -> object:
    return reduce(getattr, setting.split("."), recipe)


def loss(model: nn.Module, tokens: object) -> Tensor:
    assert isinstance(tokens, Tensor)
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def bits_of(recipe: Recipe) -> str:
    """Digest of a run: of what is merged and published, after each round."""
    model = models.build(recipe.model).to_empty(device="cpu")
    models.initialize(model, 0)
    simulation = Simulation(model, recipe, recipe.train.workers)
    generator, told = torch.Generator().manual_seed(5), hashlib.sha256()
    for number in range(recipe.train.rounds):
        steps = recipe.in_round(number).train.local_steps
        batches = torch.randint(0, 32, (recipe.train.workers, steps, 2, 9), generator=generator)
        simulation.local_steps(loss, [list(own) for own in batches])
        simulation.merge(tokens=[3 + slot for slot in range(recipe.train.workers)])
        told.update((simulation.master.master_digest() + simulation.master.base_digest()).encode())
    return told.hexdigest()


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_is_told_to_be_without_effect_leaves_the_bits(context: str) -> None:
    assert bits_of(all_told(CONTEXTS[context])) == bits_of(recipe_of(CONTEXTS[context]))


@pytest.mark.parametrize("context", ["heads", "full rank", "none adapted", "LoRA"])
def test_what_leaves_the_bits_is_told(context: str) -> None:
    own = CONTEXTS[context]
    plain = bits_of(recipe_of(own))
    untold = [name for name, told in changed(own).items() if not told and name not in OF_THE_MODEL]
    assert [name for name in untold if bits_of(recipe_of(own, OTHERWISE[name])) == plain] == []


# Data-parallel training

DDP: dict[str, Any] = {
    "train.method": "ddp",
    "train.workers": 1,
    "model.vocab_size": 256,
    "data.shards": "shards",
    "server.checkpoint_every": 3,
    "eval.sample_tokens": 0,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shards(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bits_of_ddp(recipe: Recipe) -> str:
    """Digest of what a run publishes and of its fp32 weights."""
    run = f"run-{uuid.uuid4().hex}"
    place = Place(
        number=0, size=1, local_number=0, local_size=1, meeting=str(Path(run + "-meeting").resolve())
    )
    assert ddp.train(config.replace(recipe, **{"run.dir": run}), place, claimed=False) == 0
    told = hashlib.sha256()
    for which in ("published", "master"):
        model = recipes.load_run(Path(run), which)[0]
        told.update(quantize.digest(sorted(model.state_dict().items())).encode())
    return told.hexdigest()


@pytest.mark.parametrize("own", [{}, NONE_ADAPTED, {"ddp.hook": "bf16"}])
def test_what_is_told_of_data_parallel_training_leaves_the_bits(own: dict[str, Any], folder: Path) -> None:
    context, otherwise = DDP | own, OTHERWISE | OF_DDP
    told = {name for name, told in changed(context, otherwise).items() if told}
    of_published = {"lora.exclude", "lora.embeddings", "lora.tied", "base.quant"}
    assert changed(context, otherwise).keys() - told == {
        *("optimizer.dense_lr", "train.local_steps"),
        *(set() if own == NONE_ADAPTED else of_published),
    }
    assert bits_of_ddp(all_told(context, otherwise)) == bits_of_ddp(recipe_of(context))


def test_what_has_an_effect_on_data_parallel_training_is_not_told(folder: Path) -> None:
    plain = bits_of_ddp(recipe_of(DDP))
    for name in ("lora.exclude", "lora.embeddings", "base.quant"):
        assert bits_of_ddp(recipe_of(DDP, OTHERWISE[name])) != plain
    powersgd = {"ddp.hook": "powersgd", "ddp.powersgd_start": 2, "ddp.powersgd_rank": 1}
    told = changed(DDP | powersgd, OTHERWISE | OF_DDP)
    assert not any(told[name] for name in ("ddp.powersgd_rank", "compress.error_feedback") if name in told)


RECIPES = [
    str(path.relative_to(CONFIGS)) for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name != "links"
]


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_have_nothing_without_effect(name: str) -> None:
    assert config.idle(config.load(CONFIGS / name)) == []
