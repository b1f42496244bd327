"""Where in a run's folder the shards of a divided master are."""

from __future__ import annotations

from pathlib import Path

SHARDS = "shards"
"""Name of the folder in a run's that holds those of its holders, by their numbers."""


def folder_of(run_folder: Path, shard: int) -> Path:
    """Where a shard keeps its journal and checkpoints; the first is the run's own server."""
    return run_folder / SHARDS / str(shard) if shard else run_folder
