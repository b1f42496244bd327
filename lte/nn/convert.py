"""Put heads on the weights of any module, and draw them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lte import config, lowrank
from lte.config import Base, LoRA, Optimizer, Recipe, Train
from lte.errors import ConfigError
from lte.nn.adapted import Adapted
from lte.nn.hooks import has_gradient_hooks, take_hooks
from lte.nn.kinds import kind_of, tied_to
from lte.nn.plan import Plan, adapted_modules, dense_parameters, frozen_parameters, plan, settings_of
from lte.quantize import Quant


def convert(model: nn.Module, lora: LoRA | None = None, base: Quant = "int8", *, seed: int = 0) -> nn.Module:
    """Put LoRA heads on frozen, quantized bases in place of weights of a model, in place.

    The heads are drawn for the first worker of a run; `lte.Worker` draws them anew for its place.
    In `eval()` mode the converted model computes the published model, without heads.

    Args:
        model: any module; one on the meta device gets a base of zeros, to be filled by a server. Experts of
            transformers get heads if `split_experts` gave them matrices of their own.
        lora: which modules get heads, and what these are.
        base: `nf4`, `int8` or `none`.
        seed: of the heads.

    Returns:
        The same model, modules that `plan` adapts replaced: `nn.Linear` by `LoRALinear`, say. Hooks of
        theirs, forward and backward, are those of what takes their place.

    Raises:
        ConfigError: impossible settings, a pattern that matches nothing, a hook on the gradient of a weight
            that is to have heads, or a model that is converted.
    """
    lora = lora or LoRA()
    # Who will step these heads is not known here: AdamW may step all of them. Nor is what merges of other
    # rounds will make of its moments.
    settings = Recipe(
        lora=replace(lora, moments="clear", prune=None),
        base=Base(quant=base),
        train=Train(batch_size=lora.heads, workers=1),
        optimizer=Optimizer(name="adamw"),
    )
    lora = config.checked(settings).lora
    if any(adapted_modules(model)):
        raise ConfigError(["this model is converted already"])
    if kind := kind_of(model):
        raise ConfigError([f"a bare {kind.called} has no parent to hold its heads; wrap it in a module"])
    decided = plan(model, lora, base)
    _check_hooks(model, decided)
    for name in frozen_parameters(model, lora):
        model.get_parameter(name).requires_grad_(False)
    _replace(model, decided, lora)
    draw_heads(model, lora, seed=seed, first_head=0, draw=0)
    return model


def _replace(model: nn.Module, plan: Plan, lora: LoRA) -> None:
    """Put modules with heads in place of plain ones, under each of their names."""
    plain = dict(model.named_parameters())
    owners = {id(plain[spec.parameter]): name for name, spec in plan.adapted.items()}
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        kind = kind_of(module)
        if kind and module not in replaced:
            slots = kind.slots(module)
            sites = {slot.suffix: owners.get(id(getattr(module, slot.attribute))) for slot in slots}
            own = {s: plan.adapted[name + s] for s, site in sites.items() if site == name + s}
            if own or (kind.holds and f"{name}.{kind.holds}" in plan.adapted):
                replaced[module] = _instead(module, kind.with_heads(module, own, lora, plan.quant))
            elif owner := next(filter(None, sites.values()), None):
                adapted = model.get_submodule(owner)
                assert isinstance(adapted, Adapted)
                replaced[module] = _instead(module, tied_to(module, adapted))
        if module in replaced:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replaced[module])


def _instead(plain: nn.Module, converted: nn.Module) -> nn.Module:
    """The converted module in the plain one's mode and with its hooks."""
    take_hooks(plain, converted)
    return converted.train(plain.training)


def _check_hooks(model: nn.Module, plan: Plan) -> None:
    """Refuse hooks of weights that will be no parameters any more."""
    names = [spec.parameter for spec in plan.adapted.values()]
    weights = ((name, model.get_parameter(name)) for name in names)
    faults = [
        f"{name}: has a hook on its gradient, which is computed no more once it is a base with heads; name"
        " its module in lora.exclude, or remove the hook"
        for name, weight in weights
        if has_gradient_hooks(weight)
    ]
    if faults:
        raise ConfigError(faults)


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


def fit_heads(
    model: nn.Module, lora: LoRA, most_rank: int, *, own_scale: float = 0.0, full_rank: bool
) -> None:
    """Give a converted model new heads, of the ranks and scales of other settings, that are zero.

    Args:
        lora: the recipe's, whose ranks may be larger. most_rank: largest lora_rank of this model.
        own_scale: lora_scale of this model's heads; 0: the recipe's.
        full_rank: they are of full rank instead.
    """
    for name, module in adapted_modules(model):
        if full_rank:
            module.set_full_heads()
        else:
            rank, scale, _ = settings_of(name, lora)
            are_kept = lora.merge == "reset-less"
            module.set_heads(min(rank, most_rank), own_scale or scale, are_kept=are_kept)


def draw_A(name: str, module: Adapted, lora: LoRA, *, seed: int, first_head: int, draw: int) -> Tensor:
    """A of the heads of one module, (H, r, in), on the CPU; without a row for heads of full rank.
    Arguments as of `draw_heads`."""
    if module.is_full:
        return torch.zeros(module.lora_A.shape)
    share, _, _ = settings_of(name, lora)
    return lowrank.draw_A_of_heads(
        module.rank,
        module.in_features,
        init=module.init,
        subspace=lora.subspace,
        seed=seed,
        module=name,
        heads=range(first_head, first_head + module.heads),
        draw=draw,
        share=share,
    )


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What a worker trains, by kind: `lora_A`, `lora_B`, `full` (B of full rank), `dense`. Empty kinds are
    left out."""
    groups: dict[str, list[nn.Parameter]] = {"lora_A": [], "lora_B": [], "full": [], "dense": []}
    for _, module in adapted_modules(model):
        if module.lora_A.requires_grad:
            groups["lora_A"].append(module.lora_A)
        groups["full" if module.is_full else "lora_B"].append(module.lora_B)
    groups["dense"] = [parameter for _, parameter in dense_parameters(model)]
    return {kind: parameters for kind, parameters in groups.items() if parameters}
