"""A worker's state on its own disk: one file, written whole or not at all, before each push and when the
worker is told to stop.

Each process of a worker writes a file of its own, named by its incarnation, so that two in one folder do not
spoil each other's, and one that was replaced and wakes up does not hide its successor's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lte import durable, quantize, wire
from lte.errors import FencedError, RunError

FORMAT = "5"
_NAMES = "state-*.safetensors"
_BLOB = "blob/"


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Of the local steps that no contribution tells of yet: sum of the losses, how many there are of
    them, and tokens."""

    loss: float = 0.0
    batches: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a worker needs to go on bit for bit where it was.

    Attributes:
        run_id, slot: of the run and the worker's place in it. incarnation: of the process that saved it.
        contribution, blobs: what it has pushed, or was about to, on the version that it holds; None
            and empty where it has not. senders: incarnations of all processes that have, or were.
        tally: of its local steps since.
        tensors, numbers: of the trainer; see `Trainer.state`.
    """

    run_id: str
    slot: int
    incarnation: int
    senders: Sequence[int]
    contribution: wire.Contribution | None
    blobs: Mapping[str, Tensor]
    tally: Tally
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]

    @property
    def version(self) -> int:
        """Version of the base that it held."""
        return int(self.numbers["version"])

    def continues(self, welcome: wire.Welcome) -> bool:
        """Whether it is of this run and place, and of no version that the server does not have: one
        that lost its journal went back."""
        same = (self.run_id, self.slot) == (welcome.run_id, welcome.slot)
        return same and self.version <= welcome.version


def save(folder: Path, saved: Saved, replaces: int = 0) -> None:
    """Write `folder/state-INCARNATION.safetensors`, durably, in place of older ones.

    Args:
        replaces: incarnation of the state that this process found, whose file goes, too: after a server
            went back, or in another run, it may be a later one.

    Raises:
        OSError: the disk; the older one is still there. FencedError: a newer process saved its state.
    """
    own = saved.incarnation
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in saved.tensors.items()}
    tensors |= {_BLOB + name: blob for name, blob in saved.blobs.items()}
    described = _described(saved) | {"digest": quantize.digest(sorted(tensors.items()))}
    final = folder / _NAMES.replace("*", f"{own:08d}")
    partial = final.with_name(f".{final.name}")
    durable.save_tensors(tensors, partial, described)
    try:
        durable.name(partial, final)
    except FileNotFoundError:
        raise FencedError(f"a newer process of this worker goes on in {folder}") from None
    for path in (*folder.glob(_NAMES), *folder.glob(f".{_NAMES}")):
        if _incarnation(path) < own or own != _incarnation(path) == replaces:
            path.unlink(missing_ok=True)


def load(folder: Path) -> Saved | None:
    """The state in a folder, of the newest process that saved one; None where there is none.

    Raises:
        RunError: it is damaged, or of another version of lte.
    """
    path = _newest(folder)
    if path is None:
        return None
    try:
        with _opened(path) as file:
            described = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:  # another process has saved a newer one meanwhile
        return load(folder)
    if described.get("format") != FORMAT:
        raise RunError(f"{path}: of another version of lte; delete it, and this worker starts over")
    if described["digest"] != quantize.digest(sorted(tensors.items())):
        raise RunError(f"{path}: damaged; delete it, and this worker starts over")
    return Saved(
        run_id=described["run_id"],
        slot=int(described["slot"]),
        incarnation=int(described["incarnation"]),
        senders=json.loads(described["senders"]),
        contribution=msgspec.json.decode(described["contribution"], type=wire.Contribution | None),
        blobs={n.removeprefix(_BLOB): t.to(torch.uint8) for n, t in tensors.items() if n.startswith(_BLOB)},
        tally=Tally(**json.loads(described["tally"])),
        tensors={name: tensor for name, tensor in tensors.items() if not name.startswith(_BLOB)},
        numbers=json.loads(described["numbers"]),
    )


def is_newest(folder: Path, saved: Saved | None) -> bool:
    """Whether this is what `load` would give: no process has saved another state since.

    Raises:
        RunError: the state in the folder is damaged.
    """
    path = _newest(folder)
    if path is None or saved is None:
        return path is None and saved is None
    try:
        with _opened(path) as file:
            described = file.metadata() or {}
    except FileNotFoundError:  # another process has saved a newer one meanwhile
        return False
    return _described(saved).items() <= described.items()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A state's file, by safetensors' `safe_open`, which has no types.

    Raises:
        RunError: it is damaged. FileNotFoundError: it is gone.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: damaged ({error}); delete it, and this worker starts over") from None


def _described(saved: Saved) -> dict[str, str]:
    """What the head of a state's file says beside the digest of its tensors."""
    return {
        "format": FORMAT,
        "run_id": saved.run_id,
        "slot": str(saved.slot),
        "incarnation": str(saved.incarnation),
        "senders": json.dumps(list(saved.senders)),
        "contribution": msgspec.json.encode(saved.contribution).decode(),
        "tally": json.dumps(asdict(saved.tally)),
        "numbers": json.dumps(saved.numbers),
    }


def _newest(folder: Path) -> Path | None:
    return max(folder.glob(_NAMES), key=_incarnation, default=None)


def _incarnation(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])
