"""Runs of recipes for the benchmarks: each in a folder of its own, none repeated once it is finished."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import local
from lte import config
from lte.data import pack

Figures = list[dict[str, Any]]
"""What an experiment came to, a dictionary a case."""

ADAMW_NF4 = ("base.quant=nf4", "optimizer.name=adamw", "optimizer.lr=1e-3")
"""Of configs/quickstart.yaml as it was when docs/log.md's figures of it were measured, before it had Muon."""


def lte(*arguments: str) -> None:
    """An `lte` command; what it says goes nowhere, what it complains about to the terminal."""
    subprocess.run([sys.executable, "-m", "lte", *arguments], check=True, stdout=subprocess.DEVNULL)


def shards_of(text: str, folder: Path, valid: str | None = None) -> Path:
    """The text, packed once; without a validation text of its own its last tenth is that."""
    shards = folder / "shards" / Path(text).name
    if not (shards / "index.json").exists():
        lte("data", "pack", text, "--out", str(shards), *(["--valid", valid] if valid else []))
    return shards


def packed_bottles(folder: Path) -> Path:
    """A text of few bytes, for benchmarks that measure no loss, packed in the folder."""
    text, shards = folder / "text.txt", folder / "packed"
    text.write_text("".join(f"{n} bottles of beer on the wall. " for n in range(700)))
    pack([text], shards, num_shards=2, force=True)
    return shards


def train(folder: Path, recipe: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Train a recipe in a folder, if that was not done; returns its records, the `done` line last."""
    lines = records(folder)
    if not lines or lines[-1]["kind"] != "done":
        quiet = [f"run.dir={folder}", "eval.sample_tokens=0", "server.checkpoint_every=1000"]
        lte("train", recipe, *overrides, *quiet)
        lines = records(folder)
    return lines


def train_here(folder: Path, recipe: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """`train` with server and workers as threads of this process, which saves a second of starting a run;
    of the folder only the records are kept."""
    lines = records(folder)
    if not lines or lines[-1]["kind"] != "done":
        own = [*overrides, f"run.dir={folder}", f"server.address=inprocess://{folder}", "run.resume=never"]
        with contextlib.redirect_stdout(io.StringIO()):
            code = local.train_in_threads(config.load(recipe, own))
        if code:
            raise SystemExit(code)
        for heavy in ("journal", "checkpoints", "workers"):
            shutil.rmtree(folder / heavy, ignore_errors=True)
        lines = records(folder)
        print(f"{folder}: {lines[-1]['loss']:.4g}", file=sys.stderr, flush=True)
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
