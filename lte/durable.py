"""Files that a crash leaves whole, in their old form or their new one."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors that pass when somebody makes room."""


def sync(path: Path) -> None:
    """Have a file or folder on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def name(partial: Path, final: Path) -> None:
    """Have what was written whole under another name take the place of a file, durably."""
    sync(partial)
    partial.replace(final)
    sync(final.parent)


def write(path: Path, text: str) -> None:
    """Have a file hold this text; who reads it meanwhile finds what it held before, or all of it."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    name(partial, path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, described: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, with these words at their head.

    Raises:
        OSError: the disk is full, say. The library itself tells of that in words alone.
    """
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, described)
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
