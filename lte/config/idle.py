"""Settings that are set and change nothing. They are no faults: whoever changes one line of a recipe, of its
optimizer, say, need not take out all that belonged to the one before. But they are told."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

from lte.config.recipe import Recipe

_OF_RANKS = (
    *(f"lora.{name}" for name in ("rank", "scale", "scaling", "alpha", "dropout", "A", "init", "subspace")),
    *(f"lora.{name}" for name in ("rotate_every", "moments", "prune", "overrides")),
    *(f"lora.{name}" for name in ("nested", "nested_min_rank", "nested_ranks")),
    "compress.factors",
    "compress.truncate_rank",
    "optimizer.lr",
    "optimizer.lr_A",
)
"""Settings that matter where some module has heads of a rank, which full rank is none."""
_OF_HEADS = (
    *_OF_RANKS,
    *(f"lora.{name}" for name in ("heads", "batch", "merge")),
    "train.full_rank",
    "outer.weight_decay",
)
"""Settings that matter where some module is trained by heads."""
_OF_CODES = ("base.hysteresis", "base.keep_scale_from", "base.keep_scale_to")
"""Settings of how a quantized base follows what is merged."""
_OF_SITES = ("lora.embeddings", "lora.exclude", "lora.tied", "base.quant", *_OF_CODES, "base.keep_initial")
"""Further settings that matter where some module is adapted, also if only for what is published."""
_OF_PHASES = {
    "local_steps": "train.local_steps",
    "base_quant": "base.quant",
    "rank": "lora.rank",
    "merge": "lora.merge",
    "full_rank": "train.full_rank",
}
"""Settings that a phase may have otherwise, by their names there."""
_OF_ADAM = ("outer.beta1", "outer.beta2", "outer.eps")
_OF_MERGES = (
    *(f"outer.{name}" for name in ("name", "lr", "momentum", "nesterov", "dense", "weights", "weight_decay")),
    *(f"outer.{name}" for name in ("staleness", "staleness_exponent", "max_staleness")),
    *(f"outer.{name}" for name in ("bound_norm", "trim")),
    *_OF_ADAM,
    *_OF_CODES,
    "base.keep_initial",
    "train.overlap",
    "train.overlap_steps",
    "compress.dense",
    "compress.measure_entropy",
    "schedule.join_warmup_steps",
    "log.diagnostics_every",
)
"""Settings of contributions, of merging them and of what is published of that."""

_NONE_ADAPTED = "it is of adapted modules, and lora.modules names none"

Found = Iterator[tuple[str, tuple[str, ...]]]
"""Reasons, and the settings that have no effect for them."""


def idle(recipe: Recipe) -> list[str]:
    """A line for each setting that differs from its default and has no effect, in any phase; and for a
    warmup that the run ends in."""
    default, warmup_steps = Recipe(), recipe.schedule.warmup_steps
    lines = [
        f"{setting}={_value(recipe, setting)} has no effect: {why}"
        for setting, why in _idle(recipe).items()
        if _value(recipe, setting) != _value(default, setting)
    ]
    if default.schedule.warmup_steps != warmup_steps >= recipe.total_steps:
        whole = f"the run of {recipe.total_steps} steps ends before its rates are at their peak"
        lines.append(f"schedule.warmup_steps={warmup_steps}: {whole}")
    return lines


def _value(recipe: Recipe, setting: str) -> object:
    return reduce(getattr, setting.split("."), recipe)


def _idle(recipe: Recipe) -> dict[str, str]:
    """Settings that have no effect, and why."""
    of_method = _of_lte if recipe.train.method == "lte" else _of_ddp
    found: dict[str, str] = {}
    for some in (_of_any(recipe), of_method(recipe), _of_sites(recipe)):
        for why, settings in some:
            found.update(dict.fromkeys(settings, why))
    return found


def _of_any(recipe: Recipe) -> Found:
    """Of any method."""
    optimizer, schedule = recipe.optimizer, recipe.schedule
    by_name = f"optimizer.name is {optimizer.name}"
    if optimizer.name != "sgd":
        yield by_name, ("optimizer.momentum",)
    else:
        yield by_name, ("optimizer.beta1", "optimizer.beta2", "optimizer.eps")
    if optimizer.name != "muon":
        of_muon = ("muon_momentum", "muon_dtype", "muon_scale", "muon_exclude", "adamw_lr")
        yield by_name, tuple(f"optimizer.{setting}" for setting in of_muon)
    if not optimizer.clip_norm:
        yield "optimizer.clip_norm is 0", ("optimizer.clip_by",)

    by_name = f"schedule.name is {schedule.name}"
    if schedule.name != "wsd":
        yield by_name, ("schedule.decay_share", "schedule.decay_shape")
    if schedule.name != "jagged-cosine":
        yield by_name, ("schedule.restart_rounds", "schedule.restart_warmup_steps")
    if schedule.name == "constant":
        yield by_name, ("schedule.final",)

    if not recipe.train.checkpoint_activations:
        yield "train.checkpoint_activations is off", ("train.checkpoint_modules",)


def _of_ddp(recipe: Recipe) -> Found:
    """Of data-parallel training."""
    yield "data-parallel training has no heads", (*_OF_HEADS, "optimizer.clip_by")
    yield "data-parallel training has no merges", _OF_MERGES
    if recipe.ddp.hook != "powersgd":
        of_powersgd = ("ddp.powersgd_rank", "ddp.powersgd_start", "compress.error_feedback")
        yield f"ddp.hook is {recipe.ddp.hook}", of_powersgd


def _of_lte(recipe: Recipe) -> Found:
    """Of heads and merges."""
    lora, outer = recipe.lora, recipe.outer
    phases = [recipe.in_round(start) for start in (0, *(phase.from_round for phase in recipe.train.phases))]
    merges = {phase.lora.merge for phase in phases}
    for phase in recipe.train.phases:
        if phase.from_round == 0:
            told = (setting for name, setting in _OF_PHASES.items() if getattr(phase, name) is not None)
            yield "train.phases has another from round 0 on", tuple(told)
    of_hooks = ("ddp.hook", "ddp.powersgd_rank", "ddp.powersgd_start", "ddp.find_unused")
    yield "train.method is lte", of_hooks

    if lora.A != "trained":
        yield f"lora.A is {lora.A}", ("optimizer.lr_A",)
    if lora.A != "rotating":
        yield f"lora.A is {lora.A}", ("lora.rotate_every",)
        if "reset" not in merges:
            yield "no merge draws a new A (lora.merge, lora.A)", ("lora.moments",)
    if lora.heads == 1:
        yield "lora.heads is 1", ("lora.batch",)
    if not lora.modules or all(phase.train.full_rank for phase in phases):
        yield "no module has heads of a rank (lora.modules, train.full_rank)", _OF_RANKS
    if not lora.modules:
        yield _NONE_ADAPTED, (*_OF_HEADS, "optimizer.clip_by")

    if all(phase.base.quant == "none" for phase in phases):
        yield "base.quant is none", _OF_CODES
    if phases[0].base.quant == "none":
        yield "the first base is not quantized", ("base.keep_initial",)
    if "never" in merges:  # in all phases, then
        yield "the base stays as it was, as lora.merge is never", _OF_CODES
        if not recipe.averages_factors:
            yield "there is one worker, as lora.merge is never", ("outer.weights",)

    by_name = f"outer.name is {outer.name}"
    if outer.name != "adam":
        yield by_name, _OF_ADAM
    if outer.name != "sgd":
        yield by_name, ("outer.nesterov",)
    elif not outer.momentum:
        yield "outer.momentum is 0", ("outer.nesterov",)
    if outer.name == "average":
        yield f"{by_name}, of dense parameters, too", ("outer.dense",)
    if outer.staleness == "constant":
        yield "outer.staleness is constant", ("outer.staleness_exponent",)


def _of_sites(recipe: Recipe) -> Found:
    """Of what has heads, or is quantized as if it had."""
    if not recipe.lora.modules:
        # Not quantized at all is what such a recipe says in so many words, and what it gets.
        told = (setting for setting in _OF_SITES if (setting, recipe.base.quant) != ("base.quant", "none"))
        yield _NONE_ADAPTED, tuple(told)
