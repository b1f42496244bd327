"""A worker's state on its own disk: one file, written whole or not at all, each time before a push."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lte import durable, quantize, wire
from lte.errors import RunError

FORMAT = "1"
NAME = "state.safetensors"
_BLOB = "blob/"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a worker needs to go on bit for bit where it was when it pushed.

    Attributes:
        run_id, slot: of the run and the worker's place in it.
        contribution, blobs: what it pushed, or was about to.
        tensors, numbers: of the trainer; see `Trainer.state`.
    """

    run_id: str
    slot: int
    contribution: wire.Contribution
    blobs: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]

    def continues(self, welcome: wire.Welcome) -> bool:
        """Whether it is of this run and place, and of no version that the server does not have: one
        that lost its journal went back."""
        same = (self.run_id, self.slot) == (welcome.run_id, welcome.slot)
        return same and self.contribution.version <= welcome.version


def save(folder: Path, saved: Saved) -> None:
    """Write `folder/state.safetensors`, durably, in place of an older one.

    Raises:
        OSError: the disk; the older one is still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in saved.tensors.items()}
    tensors |= {_BLOB + name: blob for name, blob in saved.blobs.items()}
    described = {
        "format": FORMAT,
        "run_id": saved.run_id,
        "slot": str(saved.slot),
        "contribution": msgspec.json.encode(saved.contribution).decode(),
        "numbers": json.dumps(saved.numbers),
        "digest": quantize.digest(sorted(tensors.items())),
    }
    final, partial = folder / NAME, folder / f".{NAME}"
    durable.save_tensors(tensors, partial, described)
    durable.name(partial, final)


def load(folder: Path) -> Saved | None:
    """The state in a folder; None where there is none.

    Raises:
        RunError: it is damaged, or of another version of lte.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            described = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: damaged ({error}); delete it, and this worker starts over") from None
    if described.get("format") != FORMAT:
        raise RunError(f"{path}: of another version of lte; delete it, and this worker starts over")
    if described["digest"] != quantize.digest(sorted(tensors.items())):
        raise RunError(f"{path}: damaged; delete it, and this worker starts over")
    return Saved(
        run_id=described["run_id"],
        slot=int(described["slot"]),
        contribution=msgspec.json.decode(described["contribution"], type=wire.Contribution),
        blobs={n.removeprefix(_BLOB): t.to(torch.uint8) for n, t in tensors.items() if n.startswith(_BLOB)},
        tensors={name: tensor for name, tensor in tensors.items() if not name.startswith(_BLOB)},
        numbers=json.loads(described["numbers"]),
    )
