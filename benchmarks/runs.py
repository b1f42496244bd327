"""Runs of recipes for the benchmarks: each in a folder of its own, none repeated once it is finished."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def lte(*arguments: str) -> None:
    """An `lte` command; what it says goes nowhere, what it complains about to the terminal."""
    subprocess.run([sys.executable, "-m", "lte", *arguments], check=True, stdout=subprocess.DEVNULL)


def shards_of(text: str, folder: Path) -> Path:
    """The text, packed once."""
    shards = folder / "shards" / Path(text).name
    if not (shards / "index.json").exists():
        lte("data", "pack", text, "--out", str(shards))
    return shards


def train(folder: Path, recipe: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Train a recipe in a folder, if that was not done; returns its records, the `done` line last."""
    lines = records(folder)
    if not lines or lines[-1]["kind"] != "done":
        quiet = [f"run.dir={folder}", "eval.sample_tokens=0", "server.checkpoint_every=1000"]
        lte("train", recipe, *overrides, *quiet)
        lines = records(folder)
    return lines


def records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def row(cells: Sequence[object]) -> None:
    """Print a row of a markdown table, at once."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(titles: Sequence[str]) -> None:
    row(titles)
    row(["---"] * len(titles))
