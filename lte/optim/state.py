"""What an optimizer remembers, as tensors and numbers that a file can hold.

By the names of parameters: their places among an optimizer's groups change with its settings, which a run
that goes on may have others of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor, nn

from lte.errors import ConfigError
from lte.optim.muon import Muon
from lte.printable import some

Number = bool | int | float | None
Described = dict[str, Any]
"""What a file says of one parameter beside its tensors, as JSON: `kind` and `shape`, which must be those of
the parameter that it is for, and `numbers`, by key."""
_OPTIONS = ("amsgrad", "centered", "momentum")
"""Settings of torch's optimizers with which they keep more of a parameter."""


@dataclass(frozen=True)
class _Place:
    """A parameter that an optimizer steps.

    Attributes:
        name: in files. kind: what keeps its state; two of one kind keep the same of a shape.
    """

    name: str
    kind: str
    shape: list[int]


def flat(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Described]]:
    """Its state, without settings: tensors by `PARAMETER/KEY`, and by parameter what else there is.

    Raises:
        ConfigError: it keeps what is neither tensor nor number, or what is of no parameter.
    """
    tensors: dict[str, Tensor] = {}
    described: dict[str, Described] = {}
    memory, places = set[int](), _places(optimizer, model)
    for index, held in optimizer.state_dict()["state"].items():
        if index not in places:
            raise ConfigError([f"the optimizer keeps {index!r} of no parameter, which cannot be saved"])
        place, numbers, is_kept = places[index], dict[str, Number](), False
        for key, value in _leaves(held):
            is_kept = True
            if isinstance(value, Tensor):
                # A file holds no memory twice, and bitsandbytes' maps are those of all parameters.
                is_shared = value.data_ptr() in memory
                memory.add(value.data_ptr())
                tensors[f"{place.name}/{key}"] = value.clone() if is_shared else value
            elif value is None or isinstance(value, bool | int | float):
                numbers[key] = value
            else:
                kind = f"{type(value).__name__} ({key})"
                raise ConfigError([f"the optimizer keeps a {kind}, which cannot be saved: no worker.dir"])
        if is_kept:
            described[place.name] = {"kind": place.kind, "shape": place.shape, "numbers": numbers}
    return tensors, described


def load_flat(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    described: Mapping[str, Described],
) -> str:
    """Take over what `flat` returned, of the parameters that this optimizer keeps the same of; the others
    begin with none. Settings stay.

    Returns:
        Which do not go on, and why, in a line for a person; "" where all do.

    Raises:
        ValueError, KeyError: it is not what `flat` returned.
    """
    saved: dict[str, dict[str, Tensor | Number]]
    saved = {name: dict(of["numbers"]) for name, of in described.items()}
    for path, tensor in tensors.items():
        name, _, key = path.partition("/")
        saved[name][key] = tensor
    places, held = _places(optimizer, model), dict[int, dict[str, Any]]()
    anew = dict[str, list[str]]()
    for index, place in places.items():
        if (state := saved.pop(place.name, None)) is None:
            continue
        kind, shape = described[place.name]["kind"], described[place.name]["shape"]
        if kind != place.kind:
            anew.setdefault(f"the state saved is {kind}'s, not {place.kind}'s", []).append(place.name)
        elif shape != place.shape:
            anew.setdefault("the state saved is of another shape", []).append(place.name)
        else:
            held[index] = _nested(state)
    optimizer.load_state_dict({"state": held, "param_groups": optimizer.state_dict()["param_groups"]})
    if saved:
        anew["the optimizer has none of these names"] = list(saved)
    reasons = [f"{reason} ({len(names)}: {some(names)})" for reason, names in anew.items()]
    if not reasons:
        return ""
    num = sum(len(names) for names in anew.values())
    return f"moments of {num} of {len(described)} parameters begin anew, empty: {'; '.join(reasons)}"


def _places(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[int, _Place]:
    """By the index that the optimizer's `state_dict` gives a parameter.

    What the model does not have is named by its place among all such: #0, #1, ...
    """
    names = {parameter: quote(name, safe="") for name, parameter in model.named_parameters()}
    places, num_others = dict[int, _Place](), 0
    for group, indices in zip(optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True):
        kind = _kind(optimizer, group)
        for parameter, index in zip(group["params"], indices["params"], strict=True):
            if (name := names.get(parameter)) is None:
                name, num_others = f"#{num_others}", num_others + 1
            places[index] = _Place(name, kind, list(parameter.shape))
    return places


def _kind(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> str:
    """What keeps the state of a group's parameters, as people call it."""
    made = type(optimizer)
    if isinstance(optimizer, Muon):  # to which AdamW's moments are as good as its own
        return "Muon" if group["orthogonal"] else "AdamW"
    is_known = made.__module__.startswith("torch.optim.")
    name = made.__qualname__ if is_known else f"{made.__module__}.{made.__qualname__}"
    options = [option for option in _OPTIONS if group.get(option)]
    return f"{name} with {', '.join(options)}" if options else name


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Path, A/B/C, and value of everything in mappings of mappings: bitsandbytes' state is one."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}/{path}", leaf) for path, leaf in _leaves(value))
        else:
            yield key, value


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The mappings of mappings that have these `_leaves`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *above, key = path.split("/")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[key] = value
    return tree
