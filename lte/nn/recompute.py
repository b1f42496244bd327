"""Activation checkpointing: blocks whose activations the backward pass computes anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lte.errors import ConfigError
from lte.nn.adapted import Adapted, Tied
from lte.nn.constants import changing_buffers
from lte.printable import some


def blocks(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the children of nn.ModuleList and nn.Sequential that a pattern matches, but for those that
    lie within another one.

    Raises:
        ConfigError: a pattern matches none.
    """
    names = [
        f"{name}.{child}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for child, _ in module.named_children()
    ]
    faults = [
        f"train.checkpoint_modules: {pattern!r} matches no child of an nn.ModuleList or nn.Sequential; there"
        f" are: {some(names, 6)}"
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if faults:
        raise ConfigError(faults)
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return [name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)]


def recompute_activations(model: nn.Module, patterns: Sequence[str]) -> None:
    """Have these `blocks` keep their inputs alone until the backward pass; gradients are the same.

    Raises:
        ConfigError: a pattern matches none.
    """
    for name in blocks(model, patterns):
        block = model.get_submodule(name)
        if not isinstance(block.forward, _Recomputing):  # by who trained this model before
            block.forward = _Recomputing(block)


class _Recomputing:
    """The forward of a block, which keeps its inputs alone. A copy of the block gets one of its own."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._forward: Callable[..., Any] = block.forward
        self._adapted = [
            module.adapted if isinstance(module, Tied) else module
            for module in block.modules()
            if isinstance(module, Adapted | Tied)
        ]

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*inputs, **named)
        seeds = [module.dropout_seeds for module in self._adapted]

        def run(*inputs: Any, **named: Any) -> Any:
            for module, then in zip(self._adapted, seeds, strict=True):  # the masks of the first time
                module.dropout_seeds = then
            return self._forward(*inputs, **named)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _StatisticsKept(self._block)

        return checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts, **named)


class _StatisticsKept:
    """Gives norms their statistics back, which a forward pass moves whether it is a second one or not, each
    time that it is entered: a graph that is kept is gone through more than once."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._kept: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> None:
        self._kept = [(buffer, buffer.clone()) for _, buffer in changing_buffers(self._block)]

    def __exit__(self, *_: object) -> None:
        for buffer, before in self._kept:  # unseen by autograd, which saved them, though it needs no value
            buffer.data.copy_(before)
