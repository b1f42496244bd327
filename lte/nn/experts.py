"""Experts of the transformers library, each with matrices of its own, which can take heads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lte.errors import ConfigError
from lte.nn.hooks import has_gradient_hooks, has_hooks, take_hooks

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
"""What the library's `use_experts_implementation` gives a module whose experts lie in parameters of three
dimensions, and who can then compute in any of the library's ways."""


class Experts(nn.Module):
    """What a module of stacked experts computes, of the same arguments.

    Its parameter (experts, out, in) of a projection, or (experts, in, out), is a list of `nn.Linear`, whose
    weights and biases are views of it. All else that it owns stays where it was.

    Every expert takes part in every pass, those that no row is sent to with none: their gradients are zero,
    as those of stacked experts, and not missing.
    """

    def __init__(self, stacked: nn.Module) -> None:
        """Take over the parameters and children of a module that `_is_stacked`."""
        super().__init__()
        for name in _projections(stacked):
            self.add_module(name, nn.ModuleList(_linears(stacked, name)))
        self.train(stacked.training)  # and not the children, whose mode is their own
        for name, child in stacked.named_children():
            self.add_module(name, child)
        rest = copy.copy(stacked)
        rest._parameters = dict.fromkeys(stacked._parameters)
        take_hooks(stacked, self)
        # In a tuple, where torch does not find it: its children are this module's.
        self._rest = (rest,)

    def __getattr__(self, name: str) -> Any:
        """Its settings are those of the stacked module, and so is how it gates."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_rest" not in self.__dict__:
                raise
            return getattr(self._rest[0], name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the experts make of their rows, weighted and summed.

        Args:
            hidden_states: (rows, width). top_k_index: (rows, k), which experts each row is sent to; one that
                there is not sends it nowhere. top_k_weights: (rows, k).

        Returns:
            (rows, width).
        """
        total = torch.zeros_like(hidden_states)
        up, *_ = (self.get_submodule(name) for name in _projections(self))
        assert isinstance(up, nn.ModuleList)
        for first, down, chosen in zip(up, self.down_proj, _chosen(top_k_index, len(up)), strict=True):
            rows = chosen // top_k_index.shape[1]
            y = first(hidden_states[rows])
            y = down(self._apply_gate(y) if self.has_gate else self.act_fn(y))
            if self.has_post_expert_norm:
                y = self.post_expert_norm(y)
            weighted = y * top_k_weights.flatten()[chosen, None]
            total.index_add_(0, rows, weighted.to(total.dtype))
        return total

    def joined(self) -> nn.Module:
        """The module of stacked experts that computes the same, with parameters of its own.

        A parameter asks for a gradient if an expert's part of it does.
        """
        stacked = copy.copy(self._rest[0])
        stacked._parameters = {name: self._stack(name) for name in stacked._parameters}
        stacked._modules = {name: self._modules[name] for name in stacked._modules}
        stacked.training = self.training
        take_hooks(self, stacked)
        return stacked

    def linears(self) -> Iterator[tuple[str, nn.Module]]:
        """What computes the experts' projections, `nn.Linear` as it was split, by its name in here."""
        for projection in _projections(self):
            for place, linear in self.get_submodule(projection).named_children():
                yield f"{projection}.{place}", linear

    @torch.no_grad()
    def _stack(self, name: str) -> nn.Parameter:
        """What the stacked parameter of this name is made of the experts' parts."""
        projection = name.removesuffix("_bias")
        part = "weight" if name == projection else "bias"
        parts = [linear.get_parameter(part) for linear in self.get_submodule(projection).children()]
        matrices = [one.mT for one in parts] if part == "weight" and self.is_transposed else parts
        return nn.Parameter(torch.stack([*matrices]), any(one.requires_grad for one in parts))


def split_experts(model: nn.Module) -> nn.Module:
    """Give each expert of a plain model of transformers matrices of its own, in place: as the library has
    them, stacked in parameters of three dimensions, they take no heads. The model computes what it did.
    `join_experts` is the way back, to be taken before `save_pretrained`.

    Returns:
        The same model. The experts' new parameters are views of the old ones, under other names:
        `experts.down_proj.3.weight` for `experts.down_proj[3]`. Hooks of the stacked experts, forward and
        backward, are those of what takes their place.

    Raises:
        ConfigError: a hook on the gradient of a stacked parameter, or a model that is nothing but experts.
    """
    found = _stacked(model)
    _check_parents(found)
    if faults := [
        f"{names[0]}.{own}: has a hook on its gradient, which is computed no more once each expert has one of"
        " its own; remove the hook"
        for module, names in found.items()
        for own, parameter in module.named_parameters(recurse=False)
        if has_gradient_hooks(parameter)
    ]:
        raise ConfigError(faults)
    for module, names in found.items():
        _set(model, names, Experts(module))
    return model


def join_experts(model: nn.Module) -> nn.Module:
    """Make a model that `split_experts` was given the library's again, in place: names, shapes and what
    asks for gradients are as they were, values and types of numbers those of the experts now, so that
    `save_pretrained` writes what `from_pretrained` reads.

    Returns:
        The same model. The stacked parameters are new: an optimizer of the experts' knows nothing of them.

    Raises:
        ConfigError: an expert has heads, or something else that is no `nn.Linear`, or hooks of its own; or a
            model that is nothing but experts.
    """
    found = _by_names(model, lambda module: isinstance(module, Experts))
    _check_parents(found)
    for module, names in found.items():
        assert isinstance(module, Experts)
        _check_joinable(names[0], module)
    while found:  # no more than one module has its numbers twice
        module, names = found.popitem()
        assert isinstance(module, Experts)
        _set(model, names, module.joined())
    return model


def _check_parents(found: dict[nn.Module, list[str]]) -> None:
    for module, names in found.items():
        if "" in names:
            raise ConfigError(
                [
                    f"a bare {type(module).__name__} has no parent to hold another in its place; wrap it in a"
                    " module"
                ]
            )


def _check_joinable(name: str, experts: Experts) -> None:
    for place, linear in experts.linears():
        if type(linear) is not nn.Linear:
            raise ConfigError(
                [
                    f"{name}.{place}: is a {type(linear).__name__}, which the library has no place for; give"
                    " its weights to a model that split_experts made and nothing converted, and join that"
                ]
            )
        if has_hooks(linear) or any(has_gradient_hooks(parameter) for parameter in linear.parameters()):
            raise ConfigError(
                [f"{name}.{place}: has hooks, and is called no more once it is joined; remove them"]
            )


@contextmanager
def experts_split(model: nn.Module) -> Iterator[None]:
    """Have a model as `split_experts` makes it for a while. What its parameters are given meanwhile, in
    place, is theirs afterwards."""
    stacked = _stacked(model)
    split_experts(model)
    try:
        yield
    finally:
        for module, names in stacked.items():
            _set(model, names, module)


def places_in_stacks(model: nn.Module) -> dict[str, tuple[str, int]]:
    """The modules that `split_experts` would make of a model's matrices of experts, by name: the parameter
    that each would be cut from, and its place there."""
    return {
        f"{names[0]}.{projection}.{place}": (f"{names[0]}.{projection}", place)
        for module, names in _stacked(model).items()
        for projection in _projections(module)
        for place in range(len(module.get_parameter(projection)))
    }


def has_split_experts(model: nn.Module) -> bool:
    """Whether `split_experts` made modules of a model."""
    return any(isinstance(module, Experts) for module in model.modules())


def _stacked(model: nn.Module) -> dict[nn.Module, list[str]]:
    return _by_names(model, _is_stacked)


def _by_names(model: nn.Module, is_one: Callable[[nn.Module], bool]) -> dict[nn.Module, list[str]]:
    """Modules of a model, each with all of its names there."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_one(module):
            found.setdefault(module, []).append(name)
    return found


def _is_stacked(module: nn.Module) -> bool:
    """Whether it keeps to the library's interface, and all its own parameters are what that names."""
    if isinstance(module, Experts) or not all(name in module.__dict__ for name in _INTERFACE):
        return False
    names = _projections(module)
    wanted = {*names, *(f"{name}_bias" for name in names if module.has_bias)}
    return module._parameters.keys() == wanted and not module._buffers


def _projections(experts: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def _linears(stacked: nn.Module, name: str) -> Iterator[nn.Linear]:
    weights = stacked.get_parameter(name)
    biases = stacked.get_parameter(f"{name}_bias") if stacked.has_bias else None
    rows = [None] * len(weights) if biases is None else biases.detach()
    for weight, row in zip(weights.detach(), rows, strict=True):
        weight = weight.mT if stacked.is_transposed else weight
        out_features, in_features = weight.shape
        linear = nn.Linear(in_features, out_features, bias=biases is not None, device="meta")
        linear.weight = nn.Parameter(weight, weights.requires_grad)
        if biases is not None:
            linear.bias = nn.Parameter(row, biases.requires_grad)
        yield linear


def _chosen(top_k_index: Tensor, num_experts: int) -> Sequence[Tensor]:
    """Places in the flattened index of those rows that each expert is sent. On the meta device, without
    numbers, all are sent as many."""
    if top_k_index.is_meta:
        return [top_k_index.new_empty(-(-top_k_index.numel() // num_experts))] * num_experts
    sent_to = top_k_index.flatten()
    counts = sent_to.clamp(max=num_experts).bincount(minlength=num_experts + 1)
    return torch.split(sent_to.argsort(stable=True), counts.tolist())[:num_experts]


def _set(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
