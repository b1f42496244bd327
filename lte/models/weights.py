"""Weights that a run starts from: trained before, by lte or by anybody else.

All that a state dict of the model holds must be there in its shape, and nothing else; what is tied need be
there once. bf16 and fp16 become fp32. Counters of norms (`num_batches_tracked`) are of no account.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lte import quantize
from lte.config import Model
from lte.errors import ConfigError
from lte.models import hf
from lte.models.counterparts import counterpart_of

FILE = "model.safetensors"
"""Name of the file of weights in a folder; transformers' too."""
DIGEST = "lte.digest"
"""What the head of a file that lte wrote calls the digest of its tensors."""
_SHARDS = f"{FILE}.index.json"
_CONFIG = "config.json"
_COUNTER = "num_batches_tracked"
_SHOWN = 3


def read(config: Model, kind: hf.Kind, path: Path, model: nn.Module) -> Mapping[str, Tensor]:
    """The weights of a folder in transformers' layout, or of a .safetensors file or a folder of them.

    Args:
        config, kind: what the model was built of, that they are for.

    Raises:
        ConfigError: there are none, damaged ones, or those of another model; a line for each way in which
            it is another. UserError: transformers is not installed.
    """
    if not (path / _CONFIG).is_file():
        return _from_safetensors(path)
    counterpart = counterpart_of(config)
    found = hf.read(counterpart.model, kind, path)
    _check(path, found.missing, found.misshapen, found.unknown)
    return counterpart.gather(found.tensors, {names[0]: tensor for names, tensor in _looked_for(model)})


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give a model these weights, of that place.

    Raises:
        ConfigError: they are another model's.
    """
    missing, misshapen, known, chosen = list[str](), list[hf.Misshapen](), set[str](), []
    for names, tensor in _looked_for(model):
        known.update(names)
        found = next((tensors[name] for name in names if name in tensors), None)
        if found is None:
            missing.append(names[0])
        elif found.shape != tensor.shape:
            misshapen.append((names[0], tuple(found.shape), tuple(tensor.shape)))
        else:
            chosen.append((tensor, found))
    unknown = (name for name in tensors if name not in known and not name.endswith(_COUNTER))
    _check(path, missing, misshapen, unknown)
    for tensor, found in chosen:
        tensor.copy_(found)


def held(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """What a state dict of the model holds: each tensor once, with all its names."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def _looked_for(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """The same without counters."""
    return [(names, tensor) for names, tensor in held(model) if not names[0].endswith(_COUNTER)]


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of a folder's one or many; they lie in the files until they are used."""
    folder = path if path.is_dir() else path.parent
    tensors: dict[str, Tensor] = {}
    try:
        if (path / _SHARDS).is_file():
            names = sorted(set(json.loads((path / _SHARDS).read_text())["weight_map"].values()))
        else:
            names = [FILE if path.is_dir() else path.name]
        for name in names:
            with safe_open(folder / name, "pt") as file:
                found = {key: file.get_tensor(key) for key in sorted(file.keys())}
                wanted = (file.metadata() or {}).get(DIGEST)
            if wanted and quantize.digest(found.items()) != wanted:
                raise ConfigError([f"model.init_from: {folder / name} is damaged; export it again"])
            tensors |= found
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError([f"model.init_from: {path} cannot be read ({hf.in_a_line(error)})"]) from None
    return tensors


def _check(
    path: Path, missing: Iterable[str], misshapen: Iterable[hf.Misshapen], unknown: Iterable[str]
) -> None:
    """Refuse what is not, tensor for tensor, the model's.

    Raises:
        ConfigError: a line for each kind of what is wrong.
    """
    shapes = [f"{name} ({_by(there)}, not {_by(here)})" for name, there, here in sorted(misshapen)]
    faults = [
        f"model.init_from: {path} {what} {_counted(names)}"
        for what, names in (
            ("lacks", sorted(missing)),
            ("has in another shape", shapes),
            ("has, and the model has not,", sorted(unknown)),
        )
        if names
    ]
    if faults:
        raise ConfigError(faults)


def _counted(names: list[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)}: {', '.join(names[:_SHOWN])}{more}"


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
