"""Weights that a run starts from: trained before, by lte or by anybody else.

All that a state dict of the model holds must be there in its shape, and nothing else; what is tied need be
there once. bf16 and fp16 become fp32. Counters of norms (`num_batches_tracked`) are of no account.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lte import quantize
from lte.config import Model
from lte.errors import ConfigError
from lte.models import hf
from lte.models.counterparts import counterpart_of
from lte.models.taken import CONFIG
from lte.printable import some

FILE = "model.safetensors"
"""Name of the file of weights in a folder; transformers' too."""
DIGEST = "lte.digest"
"""What the head of a file that lte wrote calls the digest of its tensors."""
_SHARDS = f"{FILE}.index.json"
_COUNTER = "num_batches_tracked"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Found:
    """Weights that were found, and are read one at a time.

    Attributes:
        shapes: by the names that a model's state dict has. take: the tensor of a name, once; no memory is
            held for it here afterwards.
    """

    shapes: Mapping[str, tuple[int, ...]]
    take: Callable[[str], Tensor]


def of_memory(tensors: dict[str, Tensor]) -> Found:
    """Tensors that are there, and leave the dict when they are taken."""
    return Found({name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.pop)


def compare(config: Model, kind: hf.Kind, path: Path) -> None:
    """Refuse a folder in transformers' layout that is of another model, by its config.json alone: no model
    is built, and no tensor read.

    Raises:
        ConfigError: it is of another model, in a line. UserError: transformers is not installed.
    """
    if (path / CONFIG).is_file():
        hf.compare(counterpart_of(config).model, kind, path)


def read(config: Model, kind: hf.Kind, path: Path, model: nn.Module) -> Found:
    """The weights of a folder in transformers' layout, or of a .safetensors file or a folder of them.

    Args:
        config, kind: what the model was built of, that they are for; `compare` has seen them. model: it may
            be on the meta device.

    Raises:
        ConfigError: there are none, damaged ones, or those of another model; a line for each way in which
            it is another. UserError: transformers is not installed.
    """
    if pickled := _pickled(path):
        raise ConfigError(
            [
                f"model.init_from: {pickled} is a pickle, which may run code and is not opened; save the"
                " model as safetensors (transformers: AutoModel...from_pretrained(OLD).save_pretrained(NEW))"
            ]
        )
    if not (path / CONFIG).is_file():
        return _from_safetensors(path)
    counterpart = counterpart_of(config)
    there = hf.read(counterpart.model, kind, path)
    _check(path, there.missing, there.misshapen, there.unknown)
    shapes = {names[0]: tuple(tensor.shape) for names, tensor in _looked_for(model)}
    return Found(shapes, lambda name: counterpart.take(there.tensors, name, shapes[name]))


def _pickled(path: Path) -> Path | None:
    """A file that torch.save wrote, where there is nothing else."""
    if path.is_file():
        return path if path.suffix in _PICKLES else None
    pickles = sorted(file for file in path.glob("*") if file.suffix in _PICKLES)
    # Beside weights there may be others, such as an optimizer's.
    return pickles[0] if pickles and not any(path.glob("*.safetensors")) else None


def check(model: nn.Module, found: Found, path: Path) -> None:
    """Refuse weights, of that place, that are not this model's, which may be on the meta device.

    Raises:
        ConfigError: they are another model's; a line for each way in which they are.
    """
    missing, misshapen, known = list[str](), list[hf.Misshapen](), set[str]()
    for names, tensor in _looked_for(model):
        known.update(names)
        there = next((found.shapes[name] for name in names if name in found.shapes), None)
        if there is None:
            missing.append(names[0])
        elif there != tuple(tensor.shape):
            misshapen.append((names[0], there, tuple(tensor.shape)))
    unknown = (name for name in found.shapes if name not in known and not name.endswith(_COUNTER))
    _check(path, missing, misshapen, unknown)


@torch.no_grad()
def fill(model: nn.Module, found: Found) -> None:
    """Give a model that `start_buffers` has seen the weights that `check` found to be its own. Its parameters
    get memory one after the other, each from what was just taken: all it ever needs is one model's."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, leaf))
    for names, tensor in _looked_for(model):
        taken = found.take(next(name for name in names if name in found.shapes))
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(_owned(taken, tensor.dtype), tensor.requires_grad)
            for module, leaf in owners[id(tensor)]:  # what is tied stays one
                setattr(module, leaf, made)
        else:
            tensor.copy_(taken)


def _owned(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, in memory that is nothing else's: itself, or a copy."""
    storage = tensor.untyped_storage()
    # A file that is mapped into memory, as those of safetensors are, cannot be resized.
    is_own = storage.resizable() and storage.nbytes() == tensor.nbytes and tensor.is_contiguous()
    return tensor.detach() if is_own and tensor.dtype == dtype else tensor.to(dtype, copy=True).contiguous()


@torch.no_grad()
def start_buffers(model: nn.Module) -> None:
    """Give the buffers of a model on the meta device memory and their initial values. Those that no state
    dict holds, such as the angles of rotary positions, have them from nowhere else."""
    made: dict[int, Tensor] = {}  # what is shared stays one
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if id(buffer) not in made:
                made[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
            setattr(module, name, made[id(buffer)])
    held = model.state_dict().keys()
    if any(name not in held for name, _ in model.named_buffers()):
        # Parameters have no memory yet, so their random numbers cost nothing.
        hf.initialize(model, seed=0)


def held(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """What a state dict of the model holds: each tensor once, with all its names."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def _looked_for(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """The same without counters."""
    return [(names, tensor) for names, tensor in held(model) if not names[0].endswith(_COUNTER)]


def _from_safetensors(path: Path) -> Found:
    """The tensors of a file, or of a folder's one or many; they lie in the files until they are taken."""
    folder = path if path.is_dir() else path.parent
    shapes, places = dict[str, tuple[int, ...]](), dict[str, Path]()
    try:
        if (path / _SHARDS).is_file():
            names = sorted(set(json.loads((path / _SHARDS).read_text())["weight_map"].values()))
        else:
            names = [FILE if path.is_dir() else path.name]
        for name in names:
            with safe_open(folder / name, "pt") as file:
                keys = sorted(file.keys())
                wanted = (file.metadata() or {}).get(DIGEST)
                if wanted and quantize.digest((key, file.get_tensor(key)) for key in keys) != wanted:
                    raise ConfigError([f"model.init_from: {folder / name} is damaged; export it again"])
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in keys}
                places |= dict.fromkeys(keys, folder / name)
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError([f"model.init_from: {path} cannot be read ({hf.in_a_line(error)})"]) from None

    def take(name: str) -> Tensor:
        # Opened anew for each: what was read of it is given back.
        with safe_open(places[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    return Found(shapes, take)


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
    return f"{len(names)} tensor{'s' * (len(names) > 1)}: {some(names)}"


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
