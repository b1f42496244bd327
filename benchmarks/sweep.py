"""Sweep settings of recipes and print a table: final losses, bytes and time of each run.

    python benchmarks/sweep.py configs/quickstart-adamw.yaml optimizer.dense_lr=1e-3,2e-3,3e-3,6e-3,1e-2
    python benchmarks/sweep.py configs/quickstart.yaml optimizer.lr=2e-4,5e-4,1e-3 outer.momentum=0,0.5

Every combination of the comma-separated values is a run. Runs that are finished are not repeated, so
an interrupted sweep goes on from where it was. Each is one process with its workers as threads.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

RUNS = Path("runs/sweep")


def main() -> None:
    recipe, settings = sys.argv[1], sys.argv[2:]
    keys = [setting.partition("=")[0] for setting in settings]
    values = [setting.partition("=")[2].split(",") for setting in settings]
    header = [*keys, "published", "master", "up MB", "down MB", "time s"]
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for chosen in itertools.product(*values):
        done = run(recipe, [f"{key}={value}" for key, value in zip(keys, chosen, strict=True)])
        megabytes = [f"{done[key] / 1e6:.1f}" for key in ("uplink_bytes", "downlink_bytes")]
        losses = [f"{done[key]:.4f}" for key in ("loss", "loss_master")]
        print("| " + " | ".join([*chosen, *losses, *megabytes, f"{done['time_s']:.0f}"]) + " |", flush=True)


def run(recipe: str, overrides: list[str]) -> dict[str, float]:
    """Train a recipe in a folder named after its overrides; returns its last record."""
    folder = RUNS / "-".join([Path(recipe).stem, *overrides])
    command = [sys.executable, "-m", "lte", "train", recipe, *overrides]
    command += [f"run.dir={folder}", f"server.address=inprocess://{folder.name}", "eval.sample_tokens=0"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    last = (folder / "metrics.jsonl").read_text().splitlines()
    return next(line for line in map(json.loads, reversed(last)) if line["kind"] == "done")


if __name__ == "__main__":
    main()
