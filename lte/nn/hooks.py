"""Hooks of modules that others take the place of."""

from __future__ import annotations

from torch import nn

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
"""Where torch has a module's hooks on what it is given and gives. Those of state dicts name what is gone."""


def take_hooks(plain: nn.Module, instead: nn.Module) -> None:
    """Give a module the hooks of another, the very ones: their handles still remove them."""
    for hooks in _HOOKS:
        setattr(instead, hooks, getattr(plain, hooks))


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks on what it is given and gives."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def has_gradient_hooks(parameter: nn.Parameter) -> bool:
    """Whether a parameter has hooks on its gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)
