"""The server's state on disk: folders of safetensors, written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lte import quantize
from lte.errors import RunError

FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is; stands beside the tensors.

    Attributes:
        version: merges done. tokens: trained on.
        master_digest: of the fp32 master's bits. base_digest: of what was published.
    """

    version: int
    tokens: int
    master_digest: str
    base_digest: str


def save(folder: Path, progress: Progress, state: Mapping[str, Mapping[str, Tensor]], *, keep: int) -> Path:
    """Write `folder/version-V`, durably, then delete all but the newest `keep` checkpoints.

    Args:
        state: groups of tensors; each becomes a file GROUP.safetensors.
    """
    digests = {group: quantize.digest(sorted(tensors.items())) for group, tensors in state.items()}
    described = json.dumps({"format": FORMAT, **asdict(progress), "digests": digests}, indent=1) + "\n"
    final = folder / f"version-{progress.version:08d}"
    if (final / "progress.json").is_file() and (final / "progress.json").read_text() == described:
        return final
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".partial-*"):  # of a process that was killed here
        shutil.rmtree(stale)
    partial = folder / f".partial-{progress.version:08d}"
    partial.mkdir()
    for group, tensors in state.items():
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial / f"{group}.safetensors")
    (partial / "progress.json").write_text(described)
    for path in [*partial.iterdir(), partial]:
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(folder)
    for old in versions(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def versions(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    return sorted(folder.glob("version-*"))


def load(checkpoint: Path) -> tuple[Progress, dict[str, dict[str, Tensor]]]:
    """Read a checkpoint and check its digests.

    Raises:
        RunError: it is missing, damaged, or of another format.
    """
    try:
        described = json.loads((checkpoint / "progress.json").read_text())
        if described.pop("format") != FORMAT:
            raise RunError(f"{checkpoint}: written by another version of lte (format is not {FORMAT})")
        digests = described.pop("digests")
        state = {group: load_file(checkpoint / f"{group}.safetensors") for group in digests}
        progress = Progress(**described)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(
            f"{checkpoint}: not a readable checkpoint ({error}); delete it to use an older one"
        ) from None
    for group, expected in digests.items():
        if quantize.digest(sorted(state[group].items())) != expected:
            raise RunError(
                f"{checkpoint / group}.safetensors: damaged; delete {checkpoint} to use an older one"
            )
    return progress, state


def newest(run_folder: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        RunError: there is none.
    """
    found = versions(run_folder / "checkpoints")
    if not found:
        raise RunError(f"{run_folder}: holds no checkpoint; is it the run.dir of a run that trained?")
    return found[-1]


def lock(folder: Path) -> IO[str]:
    """Claim a run folder for this process, until the returned file is closed.

    Raises:
        RunError: another process has it, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("w")
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be a run's folder ({error.strerror}); choose another run.dir"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise RunError(f"{folder}: in use by another server; choose another run.dir") from None
    return handle


def next_generation(folder: Path) -> int:
    """Raise the run's generation, durably: it rises with each start of its server."""
    path, partial = folder / "generation", folder / ".generation"
    generation = 1 + (int(path.read_text()) if path.exists() else 0)
    partial.write_text(f"{generation}\n")
    _sync(partial)
    partial.rename(path)
    _sync(folder)
    return generation


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
