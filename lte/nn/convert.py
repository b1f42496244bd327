"""Put heads on the layers of any module, and sort its parameters into adapted and dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lte import config, lowrank
from lte.config import Base, LoRA, Recipe, Train
from lte.errors import ConfigError
from lte.nn.adapted import Adapted
from lte.nn.embedding import LoRAEmbedding, can_adapt
from lte.nn.linear import LoRALinear
from lte.quantize import Quant


@dataclass(frozen=True)
class HeadSpec:
    """What the heads of one module are.

    Attributes:
        shape: (out, in) of the adapted weight. rank: r. scale: s. init: how A starts.
    """

    shape: tuple[int, int]
    rank: int
    scale: float
    init: lowrank.Init


@dataclass(frozen=True)
class Plan:
    """Which parameters of a model are adapted and which are dense; the same on server and workers.

    Attributes:
        adapted: module name -> its heads. The weight's own name is `NAME.weight`.
        dense: parameter name -> shape.
        quant: format of the base.
    """

    adapted: dict[str, HeadSpec]
    dense: dict[str, tuple[int, ...]]
    quant: Quant

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
        """The largest lora_rank of a module; 0 where none is adapted."""
        return max((spec.rank for spec in self.adapted.values()), default=0)

    def capped(self, rank: int) -> Plan:
        """The plan of a worker whose heads are of this lora_rank at most."""
        adapted = {n: replace(spec, rank=min(spec.rank, rank)) for n, spec in self.adapted.items()}
        return replace(self, adapted=adapted)

    def describe(self, lora: LoRA) -> dict[str, str]:
        """Everything in which server and worker must agree about the model, in words."""
        described = {}
        for name, spec in self.adapted.items():
            described[f"{name}.weight"] = (
                f"adapted {spec.shape[0]}x{spec.shape[1]} on {self.quant}, rank {spec.rank}, scale"
                f" {spec.scale:g}, {spec.init}, A {lora.A}, {lora.merge}"
                f"{f', dropout {lora.dropout:g}' if lora.dropout else ''}"
            )
        for name, shape in self.dense.items():
            described[name] = f"dense {'x'.join(map(str, shape))}"
        return described


def plan(model: nn.Module, lora: LoRA, quant: Quant) -> Plan:
    """Decide what of a plain model is adapted and what is dense.

    Adapted are `nn.Linear` and, with `lora.embeddings`, `nn.Embedding` modules (not subclasses)
    that a pattern of `lora.modules` matches and none of `lora.exclude` does, unless their weight is
    frozen or shared with another module (tied), or an embedding is no plain table (`can_adapt`).
    Every other parameter that asks for a gradient is dense.

    Raises:
        ConfigError: a pattern or an override that matches no such module, or parameters to train
            that are not fp32.
    """
    uses: Counter[int] = Counter()
    for _, module in model.named_modules(remove_duplicate=False):
        uses.update(id(parameter) for parameter in module.parameters(recurse=False))
    _check_dtypes(model)
    candidates = {name: m for name, m in model.named_modules() if type(m) in _kinds(lora)}
    _check_patterns(lora, list(candidates))
    adapted = {
        name: _head_spec(name, (module.weight.shape[0], module.weight.shape[1]), lora)
        for name, module in candidates.items()
        if uses[id(module.weight)] == 1
        and module.weight.requires_grad
        and (not isinstance(module, nn.Embedding) or can_adapt(module))
        and _matches(name, lora.modules)
        and not _matches(name, lora.exclude)
    }
    dense = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.removesuffix(".weight") not in adapted
    }
    return Plan(adapted, dense, quant)


def plan_of(model: nn.Module) -> Plan:
    """What `plan` decided for a model that is converted now."""
    converted = dict(adapted_modules(model))
    adapted = {
        name: HeadSpec((m.out_features, m.in_features), m.rank, m.scale, m.init)
        for name, m in converted.items()
    }
    dense = {name: tuple(parameter.shape) for name, parameter in dense_parameters(model)}
    quant: Quant = next((module.quant for module in converted.values()), "none")
    return Plan(adapted, dense, quant)


def lora_of(model: nn.Module) -> LoRA:
    """The settings that a model was converted with."""
    return next((module.lora for _, module in adapted_modules(model)), LoRA())


def convert(model: nn.Module, lora: LoRA | None = None, base: Quant = "nf4", *, seed: int = 0) -> nn.Module:
    """Put LoRA heads on frozen, quantized bases in place of weights of a model, in place.

    The heads are drawn for the first worker of a run; `lte.Worker` draws them anew for its place.
    In `eval()` mode the converted model computes the published model, without heads.

    Args:
        model: any module; one on the meta device gets a base of zeros, to be filled by a server.
        lora: which modules get heads, and what these are.
        base: `nf4`, `int8` or `none`.
        seed: of the heads.

    Returns:
        The same model, its `nn.Linear` replaced by `LoRALinear` and, with `lora.embeddings`, its
        `nn.Embedding` by `LoRAEmbedding`.

    Raises:
        ConfigError: impossible settings, a pattern that matches nothing, or a model that is converted.
    """
    lora = lora or LoRA()
    settings = Recipe(lora=lora, base=Base(quant=base), train=Train(batch_size=lora.heads))
    lora = config.checked(settings).lora
    if any(adapted_modules(model)):
        raise ConfigError(["this model is converted already"])
    if type(model) in _kinds(lora):
        kind = f"nn.{type(model).__name__}"
        raise ConfigError([f"a bare {kind} has no parent to hold its heads; wrap it in a module"])
    for name, spec in plan(model, lora, base).adapted.items():
        parent, _, child = name.rpartition(".")
        adapted = _with_heads(model.get_submodule(name), spec, lora, base)
        setattr(model.get_submodule(parent), child, adapted)
    draw_heads(model, lora, seed=seed, first_head=0, draw=0)
    return model


def describe(model: nn.Module) -> dict[str, str]:
    """`Plan.describe` of a converted model."""
    return plan_of(model).describe(lora_of(model))


def difference(workers: Mapping[str, str], servers: Mapping[str, str]) -> str:
    """The first difference between two descriptions of a model (`Plan.describe`), or ''."""
    for key in [*servers, *(key for key in workers if key not in servers)]:
        if workers.get(key) != servers.get(key):
            return f"{key} is {workers.get(key, 'missing')}, on the server {servers.get(key, 'missing')}"
    return ""


def draw_heads(model: nn.Module, lora: LoRA, *, seed: int, first_head: int, draw: int) -> None:
    """Start the heads of a converted model: A drawn, B zero, merged factors zero.

    Args:
        lora: the recipe's, whose ranks may be larger than this model's.
        seed: the run's. first_head: index of this worker's first head among those of all workers.
        draw: which draw of A this is.
    """
    with torch.no_grad():
        for name, module in adapted_modules(model):
            module.lora_A.copy_(draw_A(name, module, lora, seed=seed, first_head=first_head, draw=draw))
            module.lora_B.zero_()
            if module.merged_A is not None and module.merged_B is not None:
                module.merged_A.zero_()
                module.merged_B.zero_()


def draw_A(name: str, module: Adapted, lora: LoRA, *, seed: int, first_head: int, draw: int) -> Tensor:
    """A of the heads of one module, (H, r, in), on the CPU; arguments as of `draw_heads`."""
    return lowrank.draw_A_of_heads(
        module.rank,
        module.in_features,
        init=module.init,
        subspace=lora.subspace,
        seed=seed,
        module=name,
        heads=range(first_head, first_head + module.heads),
        draw=draw,
        share=_head_spec(name, (module.out_features, module.in_features), lora).rank,
    )


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


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What a worker trains, by kind: `lora_A`, `lora_B`, `dense`. Empty kinds are left out."""
    groups: dict[str, list[nn.Parameter]] = {"lora_A": [], "lora_B": [], "dense": []}
    for _, module in adapted_modules(model):
        if module.lora_A.requires_grad:
            groups["lora_A"].append(module.lora_A)
        groups["lora_B"].append(module.lora_B)
    groups["dense"] = [parameter for _, parameter in dense_parameters(model)]
    return {kind: parameters for kind, parameters in groups.items() if parameters}


def _is_head(parameter_name: str, converted: dict[str, Adapted]) -> bool:
    module, _, leaf = parameter_name.rpartition(".")
    return leaf in ("lora_A", "lora_B") and module in converted


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _kinds(lora: LoRA) -> tuple[type[nn.Module], ...]:
    """Types of the modules that may get heads."""
    return (nn.Linear, nn.Embedding) if lora.embeddings else (nn.Linear,)


def _with_heads(plain: nn.Module, spec: HeadSpec, lora: LoRA, base: Quant) -> Adapted:
    """What takes the place of a module that `plan` adapts."""
    if isinstance(plain, nn.Embedding):
        return LoRAEmbedding(plain, lora, base, rank=spec.rank, scale=spec.scale, init=spec.init)
    assert isinstance(plain, nn.Linear)
    return LoRALinear(plain, lora, base, rank=spec.rank, scale=spec.scale, init=spec.init)


def _head_spec(name: str, shape: tuple[int, int], lora: LoRA) -> HeadSpec:
    """Settings of one module, whose weight has this shape: those of the last override that names it,
    else the recipe's."""
    rank, scale, init = lora.rank, None, lora.init
    for override in lora.overrides:
        if fnmatchcase(name, override.modules):
            rank = override.rank if override.rank is not None else rank
            scale = override.scale if override.scale is not None else scale
            init = override.init if override.init is not None else init
    return HeadSpec(shape, rank, lora.scale_of(rank) if scale is None else scale, init)


def _check_dtypes(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ConfigError(
                [
                    f"{name}: is {str(parameter.dtype).removeprefix('torch.')}, but what is trained and"
                    " merged must be float32; use model.float(), and torch.autocast for speed"
                ]
            )


def _check_patterns(lora: LoRA, names: list[str]) -> None:
    named = [("lora.modules", p) for p in lora.modules]
    named += [("lora.exclude", p) for p in lora.exclude]
    named += [("lora.overrides", o.modules) for o in lora.overrides]
    kinds = " or ".join(f"nn.{kind.__name__}" for kind in _kinds(lora))
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    faults = [
        f"{key}: {pattern!r} matches no {kinds}; there are: {shown or 'none'}"
        for key, pattern in named
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names)
    ]
    if faults:
        raise ConfigError(faults)
