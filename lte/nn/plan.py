"""What of a model is adapted, dense or constant: decided once, the same on server and workers."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lte import lowrank
from lte.config import LoRA
from lte.errors import ConfigError
from lte.nn.adapted import Adapted
from lte.nn.constants import HEADS, Constant, constant_tensors, mark_statistics, statistics
from lte.nn.experts import Experts
from lte.nn.kinds import can_share, can_take_heads, is_table, kind_of, why_none
from lte.nn.sites import HeadSpec
from lte.printable import some
from lte.quantize import Quant


@dataclass(frozen=True)
class Plan:
    """What becomes of each tensor of a model; the same on server and workers.

    Attributes:
        adapted: site -> its heads. dense: parameter name -> shape.
        quant: format of the base.
        statistics: buffer name -> shape, of what `constants.statistics` finds.
        constants: parameter or buffer name -> what `constants.constant_tensors` finds.
        full_rank: see `of_settings`.
    """

    adapted: dict[str, HeadSpec]
    dense: dict[str, tuple[int, ...]]
    quant: Quant
    statistics: dict[str, tuple[int, ...]]
    constants: dict[str, Constant]
    full_rank: bool = False

    @property
    def averaged(self) -> dict[str, tuple[int, ...]]:
        """All that workers send beside factors, name -> shape: dense parameters, then statistics."""
        return self.dense | self.statistics

    @property
    def num_adapted_parameters(self) -> int:
        """Elements of the adapted weights."""
        return sum(spec.shape[0] * spec.shape[1] for spec in self.adapted.values())

    @property
    def num_parameters(self) -> int:
        """Elements of all trained weights, adapted and dense."""
        return self.num_adapted_parameters + sum(torch.Size(s).numel() for s in self.dense.values())

    @property
    def rank(self) -> int:
        """The largest lora_rank of a site; 0 where none is adapted."""
        return max((spec.rank for spec in self.adapted.values()), default=0)

    def factors(self, lora: LoRA) -> dict[str, tuple[int, ...]]:
        """The factors of all heads that are trained, parameter name -> shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, spec in self.adapted.items():
            out_features, in_features = spec.shape
            if lora.A == "trained":
                shapes[f"{name}.lora_A"] = (lora.heads, spec.rank, in_features)
            shapes[f"{name}.lora_B"] = (lora.heads, out_features, spec.rank)
        return shapes

    def capped(self, rank: int, scale: float = 0.0) -> Plan:
        """The plan of a worker whose heads are of this lora_rank at most.

        Args:
            scale: lora_scale of its heads; 0: as here.
        """
        if self.full_rank:
            return self
        adapted = {
            name: replace(spec, rank=min(spec.rank, rank), scale=self.scale_at(name, scale))
            for name, spec in self.adapted.items()
        }
        return replace(self, adapted=adapted)

    def scale_at(self, site: str, own: float) -> float:
        """lora_scale at a site of a worker that has its own, or 0. Heads of full rank have none."""
        return self.adapted[site].scale if self.full_rank or not own else own

    def of_settings(self, lora: LoRA, quant: Quant, *, full_rank: bool = False) -> Plan:
        """The plan of the same model where other settings hold for its heads and its base.

        Args:
            full_rank: every B is (out, in), its A the identity and its scale 1, also of capped workers.
        """
        adapted = {}
        for name, spec in self.adapted.items():
            rank, scale, init = settings_of(name, lora)
            if full_rank:
                rank, scale = spec.shape[1], 1.0
            adapted[name] = replace(spec, rank=rank, scale=scale, init=init)
        return replace(self, adapted=adapted, quant=quant, full_rank=full_rank)

    def describe(self, lora: LoRA) -> dict[str, str]:
        """Everything in which server and worker must agree about the model, in words."""
        described = {}
        for spec in self.adapted.values():
            plain = "" if spec.plain_shape == spec.shape else f" of {_by(spec.plain_shape)}"
            described[spec.parameter] = (
                f"adapted {_by(spec.shape)}{plain} on {self.quant}, rank {spec.rank}, scale"
                f" {spec.scale:g}, {spec.init}, A {lora.A}, {lora.merge}"
                f"{f', dropout {lora.dropout:g}' if lora.dropout else ''}"
                f"{', whole batch' if lora.batch == 'whole' else ''}"
                f"{f', nested {lora.nested}' if lora.nested != 'none' else ''}"
            )
        for name, shape in self.dense.items():
            described[name] = f"dense {_by(shape)}"
        for name, shape in self.statistics.items():
            described[name] = f"averaged {_by(shape)}"
        for name, constant in self.constants.items():
            kind = str(constant.dtype).removeprefix("torch.")
            described[name] = f"constant {kind} {_by(constant.shape)}"
        return described


def plan(model: nn.Module, lora: LoRA, quant: Quant) -> Plan:
    """Decide what of a plain model is adapted and what is dense.

    Adapted are the weights of modules that can take heads (see `kinds`; of `nn.Embedding` those alone
    for which `lora.embeddings` asks and which are plain tables) where a pattern of `lora.modules` matches
    the site's name and none of `lora.exclude` does, unless the weight is frozen or shared with another
    module (tied). Every other parameter that asks for a gradient is dense. Frozen are parameters that ask
    for none, and those that a pattern of `lora.freeze` names. Buffers that `lora.statistics` names are marked
    as such on the model.

    With `lora.tied` = adapted a weight of several modules gets heads once, if each of these can compute
    with them (see `kinds.can_share`). Its site has the name of the first of them, and `lora.embeddings`
    need not ask for it where one of them is no embedding.

    Raises:
        ConfigError: a pattern or an override that matches nothing, nothing to train, parameters without a
            shape, parameters to train that are not fp32, or several heads in layers of torch's that have time
            first, or in experts.
    """
    _check_shapes(model)
    mark_statistics(model, lora.statistics)
    frozen = frozen_parameters(model, lora)
    _check_dtypes(model, frozen)
    sites = list(_sites(model, lora))
    _check_patterns(lora, [spec.name for spec, _, _ in sites])
    adapted = {
        spec.name: spec
        for spec, parameter, can_have_heads in sites
        if can_have_heads
        and parameter.requires_grad
        and spec.parameter not in frozen
        and _matches(spec.name, lora.modules)
        and not _matches(spec.name, lora.exclude)
    }
    _check_slices(model, lora, adapted)
    taken = {spec.parameter for spec in adapted.values()}
    dense = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in taken and name not in frozen
    }
    if frozen and not adapted and not dense:
        raise ConfigError(["lora.freeze: leaves nothing to train"])
    return Plan(adapted, dense, quant, *_untrained(model, frozen))


def without_heads(model: nn.Module, lora: LoRA) -> dict[str, list[str]]:
    """Modules of subclasses that patterns ask heads for, but which can take none, by why, in words."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        is_asked = _matches(name, lora.modules) and not _matches(name, lora.exclude)
        if (
            is_asked
            and (lora.embeddings or not isinstance(module, nn.Embedding))
            and (why := why_none(module))
        ):
            found.setdefault(why, []).append(name)
    return found


def frozen_parameters(model: nn.Module, lora: LoRA) -> frozenset[str]:
    """The parameters that `lora.freeze` names, by whichever of their names, under their first one.

    Raises:
        ConfigError: a pattern that matches none.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    faults = []
    for pattern in lora.freeze:
        if not any(fnmatchcase(name, pattern) for name in every):
            nearest = difflib.get_close_matches(pattern, every, n=1, cutoff=0.5)
            hint = f", did you mean {nearest[0]}?" if nearest else f"; there are: {some(every, 6)}"
            faults.append(f"lora.freeze: {pattern!r} matches no parameter{hint}")
    if faults:
        raise ConfigError(faults)
    matched = {id(parameter) for name, parameter in every.items() if _matches(name, lora.freeze)}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in matched)


def plan_of(model: nn.Module) -> Plan:
    """What `plan` decided for a model that is converted now."""
    converted = dict(adapted_modules(model))
    adapted = {name: replace(module.spec, name=name) for name, module in converted.items()}
    dense = {name: tuple(parameter.shape) for name, parameter in dense_parameters(model)}
    quant: Quant = next((module.quant for module in converted.values()), "none")
    return Plan(adapted, dense, quant, *_untrained(model))


def _untrained(
    model: nn.Module, frozen: frozenset[str] = frozenset()
) -> tuple[dict[str, tuple[int, ...]], dict[str, Constant]]:
    """Statistics and constants of a model."""
    found = {name: tuple(buffer.shape) for name, buffer in statistics(model)}
    return found, {name: constant for name, _, constant in constant_tensors(model, frozen)}


def lora_of(model: nn.Module) -> LoRA:
    """The settings that a model was converted with."""
    return next((module.lora for _, module in adapted_modules(model)), LoRA())


def describe(model: nn.Module) -> dict[str, str]:
    """`Plan.describe` of a converted model."""
    return plan_of(model).describe(lora_of(model))


def difference(workers: Mapping[str, str], servers: Mapping[str, str]) -> str:
    """The first difference between two descriptions of a model (`Plan.describe`), or ''."""
    for key in [*servers, *(key for key in workers if key not in servers)]:
        if workers.get(key) != servers.get(key):
            return f"{key} is {workers.get(key, 'missing')}, on the server {servers.get(key, 'missing')}"
    return ""


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """The modules with heads, by name, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield name, module


def dense_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a converted model trains at full rank, in the model's order."""
    converted = dict(adapted_modules(model))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not _is_head(name, converted):
            yield name, parameter


def settings_of(name: str, lora: LoRA) -> tuple[int, float, lowrank.Init]:
    """Rank, scale and init of one site: those of the last override that names it, else the recipe's."""
    rank, scale, init = lora.rank, None, lora.init
    for override in lora.overrides:
        if fnmatchcase(name, override.modules):
            rank = override.rank if override.rank is not None else rank
            scale = override.scale if override.scale is not None else scale
            init = override.init if override.init is not None else init
    return rank, lora.scale_of(rank) if scale is None else scale, init


def _sites(model: nn.Module, lora: LoRA) -> Iterator[tuple[HeadSpec, nn.Parameter, bool]]:
    """Every place that patterns may name, with its plain parameter and whether it can have heads."""
    users: dict[nn.Parameter, list[nn.Module]] = {}  # a module that has two names counts twice
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, []).append(module)
    for name, module in model.named_modules():
        kind = kind_of(module)
        for slot in kind.slots(module) if kind else ():
            parameter = getattr(module, slot.attribute)
            together = users[parameter] if lora.tied == "adapted" else [module]
            if module is not together[0] or (all(map(is_table, together)) and not lora.embeddings):
                continue
            if len(set(together)) > 1:
                can_have_heads = all(map(can_share, together))
            else:
                can_have_heads = can_take_heads(module) and len(together) == len(users[parameter])
            rank, scale, init = settings_of(name + slot.suffix, lora)
            spec = HeadSpec(
                name=name + slot.suffix,
                ending=slot.ending,
                plain_shape=tuple(parameter.shape),
                transposed=slot.transposed,
                rank=rank,
                scale=scale,
                init=init,
            )
            yield spec, parameter, can_have_heads


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _is_head(parameter_name: str, converted: dict[str, Adapted]) -> bool:
    module, _, leaf = parameter_name.rpartition(".")
    return leaf in HEADS and module in converted


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_shapes(model: nn.Module) -> None:
    """Refuse what torch gives a shape at the first forward pass, as of `nn.LazyLinear`."""
    named = (*model.named_parameters(), *model.named_buffers())
    if unknown := [name for name, tensor in named if is_lazy(tensor)]:
        raise ConfigError(
            [f"{unknown[0]}: has no shape yet; run a batch through the model before it is converted"]
        )


def _check_dtypes(model: nn.Module, frozen: frozenset[str]) -> None:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and n not in frozen]
    for name, parameter in [*trained, *statistics(model)]:
        if parameter.dtype != torch.float32:
            raise ConfigError(
                [
                    f"{name}: is {str(parameter.dtype).removeprefix('torch.')}, but what is trained and"
                    " merged must be float32; use model.float(), and torch.autocast for speed"
                ]
            )


def _check_slices(model: nn.Module, lora: LoRA, adapted: Mapping[str, HeadSpec]) -> None:
    """Refuse what is known to give modules (time, batch, width), of which heads would slice the time, or rows
    of all samples. What other models give them is seen when they run; see `isolation`."""
    if lora.num_slices == 1:
        return
    faults = []
    experts = [f"{name}." for name, module in model.named_modules() if isinstance(module, Experts)]
    if gathered := [site for site in adapted if any(map(site.startswith, experts))]:
        faults.append(
            f"{some(gathered)}: experts are given rows of all samples, which {lora.heads} heads cannot share"
            " out; name them in lora.exclude, or set lora.heads=1, or lora.batch=whole"
        )
    for name, layer in model.named_modules():
        if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            inner = [f"{name}.{own}".lstrip(".") for own in ("linear1", "linear2")]
            if not layer.self_attn.batch_first and any(site in adapted for site in inner):
                faults.append(
                    f"{name or 'the model'}: {type(layer).__name__} has batch_first=False, so that"
                    f" {lora.heads} heads would cut the time in slices, not the batch; set batch_first=True,"
                    " or lora.heads=1"
                )
    if faults:
        raise ConfigError(faults)


def _check_patterns(lora: LoRA, names: list[str]) -> None:
    named = [("lora.modules", p) for p in lora.modules]
    named += [("lora.exclude", p) for p in lora.exclude]
    named += [("lora.overrides", o.modules) for o in lora.overrides]
    off = "" if lora.embeddings else " (embeddings do with lora.embeddings=true)"
    faults = [
        f"{key}: {pattern!r} matches nothing that takes heads{off}; there are: {some(names, 6)}"
        for key, pattern in named
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names)
    ]
    if faults:
        raise ConfigError(faults)
