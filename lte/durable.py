"""Files that a crash leaves whole, in their old form or their new one."""

from __future__ import annotations

import os
from pathlib import Path


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
