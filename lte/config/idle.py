"""Settings that are set and change nothing. They are no faults: whoever changes one line of a recipe, of its
optimizer, say, need not take out all that belonged to the one before. But they are told."""

from __future__ import annotations

from functools import reduce

from lte.config.recipe import Recipe

_OF_HEADS = (
    *(f"lora.{name}" for name in ("rank", "scale", "dropout", "heads", "batch", "merge", "A", "init")),
    "compress.factors",
    "compress.truncate_rank",
    "optimizer.lr",
    "optimizer.lr_A",
)
"""Settings that matter where some module is adapted."""


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
    optimizer, schedule, lora, train = recipe.optimizer, recipe.schedule, recipe.lora, recipe.train
    found: dict[str, str] = {}

    def without_effect(unless: bool, why: str, *settings: str) -> None:
        if not unless:
            found.update(dict.fromkeys(settings, why))

    by_name = f"optimizer.name is {optimizer.name}"
    without_effect(optimizer.name == "sgd", by_name, "optimizer.momentum")
    without_effect(optimizer.name != "sgd", by_name, "optimizer.beta1", "optimizer.beta2", "optimizer.eps")
    of_muon = ("muon_momentum", "muon_dtype", "muon_scale", "muon_exclude", "adamw_lr")
    without_effect(optimizer.name == "muon", by_name, *(f"optimizer.{setting}" for setting in of_muon))

    by_name = f"schedule.name is {schedule.name}"
    without_effect(schedule.name == "wsd", by_name, "schedule.decay_share", "schedule.decay_shape")
    of_restarts = ("schedule.restart_rounds", "schedule.restart_warmup_steps")
    without_effect(schedule.name == "jagged-cosine", by_name, *of_restarts)
    without_effect(schedule.name != "constant", by_name, "schedule.final")

    again = "train.checkpoint_activations is off"
    without_effect(train.checkpoint_activations, again, "train.checkpoint_modules")

    is_lte = train.method == "lte"
    of_hooks = ("ddp.hook", "ddp.powersgd_rank", "ddp.powersgd_start", "ddp.find_unused")
    without_effect(not is_lte, "train.method is lte", *of_hooks)
    without_effect(
        is_lte,
        "data-parallel training has no heads",
        *_OF_HEADS,
        "compress.dense",
        "log.diagnostics_every",
    )
    if is_lte:
        has_heads = bool(lora.modules) and any(
            not recipe.in_round(start).train.full_rank
            for start in (0, *(phase.from_round for phase in train.phases))
        )
        no_heads = "no module has heads of a rank (lora.modules, train.full_rank)"
        of_rank = ("lora.rank", "lora.dropout", "compress.truncate_rank", "optimizer.lr_A")
        without_effect(has_heads, no_heads, *of_rank)
        without_effect(lora.A == "trained", f"lora.A is {lora.A}", "optimizer.lr_A")
        without_effect(lora.A == "rotating", f"lora.A is {lora.A}", "lora.rotate_every")
        adapts = bool(lora.modules)
        none_adapted = "it is of adapted modules, and lora.modules names none"
        without_effect(adapts, none_adapted, *_OF_HEADS, "outer.weight_decay")
    return found
