"""Simulated runs against real ones: 4, 8 and 16 worker processes that share the cores of this machine.

    python benchmarks/simulate.py [--workers 4,8,16] [--config CONFIG] [key=value ...] [--text FILE]

A run of as many workers as there are cores tells what things cost, as each has one while it trains, and slows
down the others as it will (two threads of one core do). From it the runs of more are simulated. Printed is a
markdown table of real and simulated figures with the errors.

Runs are kept in runs/simulate/ and not repeated. Run it on an idle machine: what else is busy there is no
part of the model.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs import header, row, shards_of, train

from lte import config, cost, simulate
from lte.config import Recipe

RUNS = Path("runs/simulate")
RECIPE = "configs/quickstart.yaml"
TEXT = "data/tinyshakespeare/input.txt.gz"
SETTINGS = ["eval.every=0", "eval.final_tokens=2000", "log.diagnostics_every=0", "server.silence_s=60"]
"""Of all runs: what a round takes, and nothing between rounds."""
WARM_ROUNDS = 3
"""Rounds that do not count."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare simulated runs with real ones.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe")
    parser.add_argument("--config", default=RECIPE, help=f"default: {RECIPE}")
    parser.add_argument("--workers", default="4,8,16", help="default: 4,8,16")
    parser.add_argument("--rounds", type=int, default=20, help="of each run (default: 20)")
    parser.add_argument("--text", default=TEXT, metavar="FILE", help=f"default: {TEXT}")
    arguments = parser.parse_args()
    shards = shards_of(arguments.text, RUNS)
    own = [*SETTINGS, f"data.shards={shards}", f"train.rounds={arguments.rounds}", *arguments.overrides]
    compare(arguments.config, own, [int(n) for n in arguments.workers.split(",")])


def compare(path: str, own: Sequence[str], counts: Sequence[int]) -> None:
    """Print a row for each number of workers."""
    recipe, fleet = config.load(path, own), here()
    cores = int(fleet.cores)
    measured(path, own, cores)
    rates = cost.from_run(folder(cores), recipe, cost.probe(recipe, cost.assumed(recipe)))
    header(["workers", "measured s/round", "simulated", "error", "measured tokens/s", "simulated", "error"])
    for workers in counts:
        real = measured(path, own, workers)
        found = simulated(recipe, fleet, rates, workers)
        cells: list[str] = [str(workers)]
        for key in ("round_s", "tokens_s"):
            met, said = real[key], getattr(found, key)
            cells += [f"{met:,.3g}", f"{said:,.3g}", f"{said / met - 1:+.0%}"]
        row(cells)


def here() -> simulate.Fleet:
    """All processes on this machine, over loopback."""
    link = cost.Link(up_bps=float("inf"), down_bps=float("inf"), rtt_s=0.0)
    workers = simulate.WorkerClass(name="process", link=link)
    return simulate.Fleet(classes=[workers], cores=float(len(os.sched_getaffinity(0))))


def simulated(recipe: Recipe, fleet: simulate.Fleet, rates: cost.Rates, workers: int) -> simulate.Figures:
    return simulate.simulate(config.replace(recipe, **{"train.workers": workers}), fleet, rates)


def folder(workers: int) -> Path:
    return RUNS / f"{workers}-workers"


def measured(path: str, own: Sequence[str], workers: int) -> dict[str, Any]:
    """Medians of the rounds of a real run."""
    lines = train(folder(workers), path, [*own, f"train.workers={workers}"])
    rounds = [line for line in lines if line["kind"] == "round"][WARM_ROUNDS - 1 :]
    round_s = statistics.median(now["time_s"] - then["time_s"] for then, now in itertools.pairwise(rounds))
    tokens = (rounds[-1]["tokens"] - rounds[0]["tokens"]) / (len(rounds) - 1)
    return {"round_s": round_s, "tokens_s": tokens / round_s}


if __name__ == "__main__":
    main()
