"""What a slow worker costs: rounds that wait for it, beside contributions that are merged on arrival.

    python benchmarks/arrival.py TEXT FOLDER [--slowness 3] [--rounds 20] [case ...] [key=value ...]

TEXT is a text file (.gz too), packed once into FOLDER. Four workers in processes of their own, one of which
does every local step --slowness times over (real work, so that the ratio holds on a machine that others use
too). All cases train on as many tokens, of the same data; on arrival the fast ones bring more of them. Cases
(all by default) are the keys of CASES. Prints a markdown table; runs that are finished are not repeated.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

from fleet import Fleet
from forks import fork
from runs import header, records, row, shards_of
from torch import Tensor, nn

from lte import recipes
from lte.server import journal
from lte.tasks import Text

WORKERS = 4
SETTINGS: dict[str, Any] = {
    "model.num_layers": 2,
    "model.width": 64,
    "model.mlp_width": 256,
    "model.context_tokens": 64,
    "lora.rank": 32,
    "train.workers": WORKERS,
    "train.local_steps": 10,
    "schedule.name": "cosine",
    "schedule.warmup_steps": 20,
    "eval.every": 0,
    "eval.final_tokens": 65536,
    "server.keep_checkpoints": 1000,  # and with them the whole journal
}
ARRIVAL = {"outer.when": "arrival"}
CASES: dict[str, dict[str, Any]] = {
    "round": {},
    "constant": ARRIVAL,
    "polynomial": ARRIVAL | {"outer.staleness": "polynomial"},
    "inverse": ARRIVAL | {"outer.staleness": "inverse"},
    "nesterov": ARRIVAL | {"outer.name": "sgd", "outer.lr": 0.7, "outer.momentum": 0.5},
    "round-nesterov": {"outer.name": "sgd", "outer.lr": 0.7, "outer.momentum": 0.5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slowness", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("rest", nargs="*")
    arguments = parser.parse_intermixed_args()
    overrides = dict(each.split("=", 1) for each in arguments.rest if "=" in each)
    cases = [each for each in arguments.rest if "=" not in each] or list(CASES)
    shards = shards_of(arguments.text, arguments.folder)
    settings = SETTINGS | {"data.shards": str(shards), "train.rounds": arguments.rounds} | overrides
    titles = ["case", "tokens", "time s", "tokens/s", "loss", "master", "versions", "staleness", "most"]
    header([*titles, "slow one's share", "down bytes"])
    for case in cases:
        folder = arguments.folder / f"{case}-{arguments.slowness}-{arguments.rounds}"
        if not folder.exists():
            train(folder, settings | CASES[case], arguments.slowness)
        tell(case, folder / "run")


def train(folder: Path, settings: dict[str, Any], slowness: int) -> None:
    with Fleet(folder, settings) as fleet:
        fleet.serve()
        for k in range(WORKERS - 1):
            fleet.work(f"w{k}")
        slow = fork(_work_slowly, str(fleet.settings["server.address"]), slowness, folder / "slow.log")
        fleet.workers["slow"] = slow
        fleet.until_version(1, patience_s=600)
        while fleet.server.exitcode is None:
            fleet.look(timeout_s=1.0)
        slow.join()


def _work_slowly(address: str, slowness: int, log: Path) -> None:
    """Be a worker that computes every gradient so many times."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    once = Text.loss

    def many(task: Text, model: nn.Module, batch: Tensor) -> Tensor:
        for _ in range(slowness - 1):
            once(task, model, batch).backward()  # type: ignore[no-untyped-call]
            model.zero_grad(set_to_none=True)
        return once(task, model, batch)

    Text.loss = many  # type: ignore[method-assign]
    recipes.work(address, worker_id="slow", wait_s=120.0)


def tell(case: str, run: Path) -> None:
    lines = records(run)
    rounds, done = [line for line in lines if line["kind"] == "round"], lines[-1]
    # The first round is not timed: that is when processes warm up.
    time_s, tokens = rounds[-1]["time_s"] - rounds[0]["time_s"], rounds[-1]["tokens"] - rounds[0]["tokens"]
    of_merges = [line.get("staleness_mean", 0.0) for line in rounds for _ in range(line["num_merged"])]
    row(
        [
            case,
            f"{done['tokens']:,}",
            f"{time_s:.1f}",
            f"{tokens / time_s:,.0f}",
            f"{done['loss']:.4f}",
            f"{done['loss_master']:.4f}",
            len(rounds),
            f"{statistics.fmean(of_merges):.1f}",
            max(line.get("staleness_max", 0) for line in rounds),
            share_of_slow(run),
            f"{done['downlink_bytes']:,}",
        ]
    )


def share_of_slow(run: Path) -> str:
    """Share of all contributions that the slow worker brought."""
    kept, merged = dict[int, str](), list[str]()
    for segment in journal.history(run):
        for record in segment:
            if isinstance(record, journal.Kept):
                kept[record.incarnation] = record.worker_id
            elif isinstance(record, journal.Merged):
                merged += [kept[incarnation] for incarnation in record.incarnations]
    return f"{merged.count('slow') / len(merged):.0%}"


if __name__ == "__main__":
    main()
