"""What an optimizer remembers, as tensors and numbers that a file can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lte.errors import ConfigError

Number = bool | int | float | None


def flat(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Number]]:
    """Its state by `PARAMETER'S INDEX/KEY`, without settings: tensors and numbers.

    Raises:
        ConfigError: it keeps what is neither.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Number] = {}
    memory = set[int]()
    for index, held in optimizer.state_dict()["state"].items():
        for key, value in _leaves(held):
            if isinstance(value, Tensor):
                # A file holds no memory twice, and bitsandbytes' maps are those of all parameters.
                is_shared = value.data_ptr() in memory
                memory.add(value.data_ptr())
                tensors[f"{index}/{key}"] = value.clone() if is_shared else value
            elif value is None or isinstance(value, bool | int | float):
                numbers[f"{index}/{key}"] = value
            else:
                kind = f"{type(value).__name__} ({key})"
                raise ConfigError([f"the optimizer keeps a {kind}, which cannot be saved: no worker.dir"])
    return tensors, numbers


def load_flat(optimizer: torch.optim.Optimizer, entries: Mapping[str, Tensor | Number]) -> None:
    """Take over what `flat` returned, tensors and numbers together; settings stay.

    Raises:
        ValueError, KeyError: it is of other parameters.
    """
    held: dict[int, dict[str, Any]] = {}
    for path, value in entries.items():
        index, *above, key = path.split("/")
        node = held.setdefault(int(index), {})
        for part in above:
            node = node.setdefault(part, {})
        node[key] = value
    optimizer.load_state_dict({"state": held, "param_groups": optimizer.state_dict()["param_groups"]})


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Path, A/B/C, and value of everything in mappings of mappings: bitsandbytes' state is one."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}/{path}", leaf) for path, leaf in _leaves(value))
        else:
            yield key, value
