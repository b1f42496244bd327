"""The server's state on disk: folders of safetensors, written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lte import quantize
from lte.durable import save_tensors, sync
from lte.errors import RunError
from lte.server.journal import Admitted

FORMAT = 5


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is; stands beside the tensors.

    Attributes:
        version: merges done. tokens: trained on.
        master_digest: of the fp32 master's bits. base_digest: of what was published.
        members: the workers of then. known: all that ever were, as they were last.
            next_incarnation: to be handed out.
        merged_in: worker_id -> the version that its last merged contribution is in, and of which
            incarnation that was.
        num_merged: contributions merged. told: where they are merged on arrival, the version that each
            member was sent last, and its base's digest.
    """

    version: int
    tokens: int
    master_digest: str
    base_digest: str
    members: tuple[Admitted, ...] = ()
    known: tuple[Admitted, ...] = ()
    next_incarnation: int = 1
    merged_in: dict[str, tuple[int, int]] = field(default_factory=dict)
    num_merged: int = 0
    told: dict[str, tuple[int, str]] = field(default_factory=dict)


class _Described(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in a checkpoint's progress.json; digests are of its groups of tensors."""

    format: int
    progress: Progress
    digests: dict[str, str]


_JSON, _DECODER = msgspec.json.Encoder(), msgspec.json.Decoder(_Described)


def save(
    folder: Path, progress: Progress, state: Mapping[str, Mapping[str, Tensor]], *, keep: int | None
) -> Path:
    """Write `folder/version-V`, durably, then delete all but the newest `keep` checkpoints.

    Args:
        state: groups of tensors; each becomes a file GROUP.safetensors. keep: None: delete none.

    Raises:
        OSError: the disk; what was written is gone again.
    """
    digests = {group: quantize.digest(sorted(tensors.items())) for group, tensors in state.items()}
    described = _JSON.encode(_Described(format=FORMAT, progress=progress, digests=digests))
    final = folder / f"version-{progress.version:08d}"
    if (final / "progress.json").is_file() and (final / "progress.json").read_bytes() == described:
        return final
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".partial-*"):  # of a process that was killed here
        shutil.rmtree(stale)
    partial = folder / f".partial-{progress.version:08d}"
    partial.mkdir()
    try:
        for group, tensors in state.items():
            save_tensors(tensors, partial / f"{group}.safetensors")
        (partial / "progress.json").write_bytes(described)
        for path in [*partial.iterdir(), partial]:
            sync(path)
    except OSError:
        shutil.rmtree(partial)  # the journal may need the room
        raise
    _name(partial, final)
    for old in versions(folder)[:-keep] if keep else []:
        shutil.rmtree(old)
    return final


def _name(partial: Path, final: Path) -> None:
    """Have what was written whole count as a checkpoint, in place of one of the same version."""
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)


def versions(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    return sorted(folder.glob("version-*"))


def version_of(checkpoint: Path) -> int:
    """The version that a checkpoint is named for."""
    return int(checkpoint.name.removeprefix("version-"))


def progress(checkpoint: Path) -> Progress:
    """How far a checkpoint is, without its tensors.

    Raises:
        RunError: it is missing, damaged, or of another format.
    """
    return _described(checkpoint).progress


def load(checkpoint: Path) -> tuple[Progress, dict[str, dict[str, Tensor]]]:
    """Read a checkpoint and check its digests.

    Raises:
        RunError: it is missing, damaged, or of another format.
    """
    described = _described(checkpoint)
    digests = described.digests
    try:
        state = {group: load_file(checkpoint / f"{group}.safetensors") for group in digests}
    except (OSError, SafetensorError) as error:
        raise _unreadable(checkpoint, error) from None
    for group, expected in digests.items():
        if quantize.digest(sorted(state[group].items())) != expected:
            raise RunError(
                f"{checkpoint / group}.safetensors: damaged; delete {checkpoint} to use an older one"
            )
    return described.progress, state


def _described(checkpoint: Path) -> _Described:
    try:
        text = (checkpoint / "progress.json").read_bytes()
        written = msgspec.json.decode(text)["format"]
        if written == FORMAT:
            return _DECODER.decode(text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(checkpoint, error) from None
    raise RunError(f"{checkpoint}: written by another version of lte (format {written}, not {FORMAT})")


def _unreadable(checkpoint: Path, error: Exception) -> RunError:
    return RunError(f"{checkpoint}: not a readable checkpoint ({error}); delete it to use an older one")


def newest(run_folder: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        RunError: there is none.
    """
    found = versions(run_folder / "checkpoints")
    if not found:
        raise RunError(f"{run_folder}: holds no checkpoint; is it the run.dir of a run that trained?")
    return found[-1]
