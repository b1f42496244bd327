"""Which learning rate, decay and kind of step each parameter of a converted model gets."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lte.config import Optimizer
from lte.errors import ConfigError
from lte.nn import Layout, LoRAEmbedding, Plan, layouts, parameter_groups

Group = dict[str, Any]
"""A group of parameters with settings of their own, as torch's optimizers take them."""


def groups(model: nn.Module, settings: Optimizer) -> list[Group]:
    """Groups of what a converted model trains: lora_A, lora_B, B of full rank, dense matrices and dense
    vectors, each divided further where rates differ, and by `orthogonal` and `layout` for Muon.

    A B of full rank has dense_lr, and no decay, which would be that of its change alone.

    Raises:
        ConfigError: a pattern matches no parameter.
    """
    peaks = {
        "lora_A": settings.lr if settings.lr_A is None else settings.lr_A,
        "lora_B": settings.lr,
        "full": settings.dense_lr,
        "dense": settings.dense_lr,
    }
    names = {parameter: name for name, parameter in model.named_parameters()}
    _check(names.values(), settings)
    factors = dict(zip(names, rate_factors(list(names.values()), settings), strict=True))
    orthogonal = _orthogonal(model, settings) if settings.name == "muon" else {}
    found: dict[tuple[object, ...], Group] = {}
    for kind, parameters in parameter_groups(model).items():
        for parameter in sorted(parameters, key=lambda p: p.ndim < 2):
            is_vector, layout = parameter.ndim < 2, orthogonal.get(parameter)
            peak = peaks[kind]
            if settings.name == "muon" and layout is None and settings.adamw_lr is not None:
                peak = settings.adamw_lr
            key = (kind, is_vector, factors[parameter], layout)
            if key not in found:
                decay = settings.dense_weight_decay if kind == "dense" and not is_vector else 0.0
                found[key] = {"params": [], "lr": peak * factors[parameter], "weight_decay": decay}
                if settings.name == "muon":
                    found[key] |= {"orthogonal": layout is not None, "layout": layout or "matrices"}
            found[key]["params"].append(parameter)
    return list(found.values())


def check_patterns(plan: Plan, settings: Optimizer) -> None:
    """Refuse patterns of `optimizer.rates` that match no parameter of a model's plan.

    Raises:
        ConfigError: with one line for each.
    """
    _check(
        [*(f"{module}.{head}" for module in plan.adapted for head in ("lora_A", "lora_B")), *plan.dense],
        settings,
    )


def _check(names: Iterable[str], settings: Optimizer) -> None:
    names = list(names)
    faults = []
    for rate in settings.rates:
        if not any(fnmatchcase(name, rate.modules) for name in names):
            near = difflib.get_close_matches(rate.modules, names, n=1, cutoff=0.3) or names[:1]
            meant = f", did you mean one like {near[0]}?" if near else ""
            faults.append(f"optimizer.rates: {rate.modules!r} matches no parameter{meant}")
    if settings.layer_decay != 1 and not any(_number(name) is not None for name in names):
        faults.append(
            "optimizer.layer_decay: no parameter of this model has the number of a layer in its name"
        )
    if faults:
        raise ConfigError(faults)


def rate_factors(names: Sequence[str], settings: Optimizer) -> list[float]:
    """Factor on the learning rate of each of these parameters: of the last of `optimizer.rates` that
    names it, else 1, times `optimizer.layer_decay` for every layer above it.

    Args:
        names: in the model's order.
    """
    factors = []
    above = layers_above(names)
    for name, num_above in zip(names, above, strict=True):
        named = [rate.factor for rate in settings.rates if fnmatchcase(name, rate.modules)]
        factors.append((named[-1] if named else 1.0) * settings.layer_decay**num_above)
    return factors


def layers_above(names: Sequence[str]) -> list[int]:
    """How many layers come after each parameter's own: 0 for those behind the last numbered layer, which
    make one layer, as do those before the first.

    Args:
        names: in the model's order. The first number in a name is its layer's.
    """
    numbers = [_number(name) for name in names]
    num_layers = 1 + max((number for number in numbers if number is not None), default=-1)
    above, is_before = [], True
    for number in numbers:
        is_before = is_before and number is None
        if number is not None:
            above.append(num_layers - number)
        else:
            above.append(num_layers + 1 if is_before else 0)
    return above


def _number(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _orthogonal(model: nn.Module, settings: Optimizer) -> dict[nn.Parameter, Layout]:
    """What Muon orthogonalizes, and how it lies as matrices: factors of heads, dense matrices and kernels of
    convolutions; no tables, no other parameters of more dimensions, and nothing excluded."""
    of_heads = {p for kind, some in parameter_groups(model).items() if kind != "dense" for p in some}
    of_tables = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding | LoRAEmbedding)
        for parameter in module.parameters(recurse=False)
    }
    known = layouts(model)
    return {
        parameter: known.get(parameter, "matrices")
        for name, parameter in model.named_parameters()
        if (parameter in of_heads or parameter in known or parameter.ndim == 2)
        and parameter not in of_tables
        and not any(fnmatchcase(name, pattern) for pattern in settings.muon_exclude)
    }
