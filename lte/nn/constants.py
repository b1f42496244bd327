"""What of a model no gradient trains: constants, which the server sends once, and statistics.

A rule by kinds, the same for a plain model and a converted one:

* constants: frozen parameters, and buffers of whatever kind, persistent or not;
* statistics: floating-point buffers of torch's norms that track them (`_NormBase`: `BatchNorm`,
  `InstanceNorm`), and those that `lora.statistics` names. Forward passes change them on each worker; they
  are averaged at merges;
* counters: integer buffers of those (`num_batches_tracked`). They stay what they are on each machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lte.errors import ConfigError
from lte.nn.adapted import Adapted
from lte.printable import some

_MARK = "_lte_statistics"
"""Attribute of a module: names of those buffers of its own that `lora.statistics` names."""

HEADS = ("lora_A", "lora_B")
"""Names of the parameters of `Adapted` that are heads."""


@dataclass(frozen=True)
class Constant:
    """A tensor of the plain model that stays as it is.

    Attributes:
        is_buffer: it is no frozen parameter. persistent: whether a state dict of the model holds it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_buffer: bool
    persistent: bool


def constant_tensors(
    model: nn.Module, frozen: frozenset[str] = frozenset()
) -> Iterator[tuple[str, Tensor, Constant]]:
    """Every constant with its name and tensor, frozen parameters first, each in the model's order.

    Args:
        frozen: names of parameters that count as frozen though they ask for a gradient.
    """
    heads = {
        f"{name}.{head}" for name, m in model.named_modules() if isinstance(m, Adapted) for head in HEADS
    }
    for name, parameter in model.named_parameters():
        if (name in frozen or not parameter.requires_grad) and name not in heads:
            yield name, parameter, Constant(tuple(parameter.shape), parameter.dtype, False, True)
    for name, module, buffer in _buffers(model):
        if not _is_changing(name, module):
            persistent = _leaf(name) not in module._non_persistent_buffers_set
            yield name, buffer, Constant(tuple(buffer.shape), buffer.dtype, True, persistent)


def statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every statistic, in the model's order."""
    for name, module, buffer in _buffers(model):
        if _is_changing(name, module) and buffer.is_floating_point():
            yield name, buffer


def changing_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Statistics and counters: all buffers that training changes."""
    for name, module, buffer in _buffers(model):
        if _is_changing(name, module):
            yield name, buffer


def mark_statistics(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Have the fp32 buffers that these patterns name count as statistics, and no others beside norms' own.

    Raises:
        ConfigError: a pattern that matches none.
    """
    modules = {name: module for name, module, buffer in _buffers(model) if buffer.dtype == torch.float32}
    faults, marked = [], dict[nn.Module, set[str]]()
    for pattern in patterns:
        matched = [name for name in modules if fnmatchcase(name, pattern)]
        if not matched:
            there = some(modules, 6) or "none"
            faults.append(f"lora.statistics: {pattern!r} matches no buffer of float32; there are: {there}")
        for name in matched:
            marked.setdefault(modules[name], set()).add(_leaf(name))
    if faults:
        raise ConfigError(faults)
    for module in model.modules():
        if module in marked or hasattr(module, _MARK):
            setattr(module, _MARK, frozenset(marked.get(module, ())))


def _is_changing(name: str, module: nn.Module) -> bool:
    return isinstance(module, _NormBase) or _leaf(name) in getattr(module, _MARK, ())


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Every buffer once, with its module, but for those of bases and merged factors."""
    seen = set()
    for prefix, module in model.named_modules():
        if isinstance(module, Adapted):
            continue
        for leaf, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{leaf}" if prefix else leaf, module, buffer
