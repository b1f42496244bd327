"""Is compression free? Paired seeds with and without it, and without error feedback.

    python benchmarks/free.py TEXT [num_seeds] [key=value ...]

Without: fp32 factors and dense changes, every code and scale recomputed at each merge. With: the
recipe's codecs, sticky scales and hysteresis. Prints final losses, and for each pair of settings the
mean difference with its 95 % interval over the seeds (Student's t). Finished runs are not repeated.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from statistics import mean, stdev

from runs import ADAMW_NF4, header, row, shards_of, train

RUNS = Path("runs/free")
RECIPE = "configs/quickstart.yaml"
COMMON = [
    *ADAMW_NF4,
    "lora.rank=32",
    "train.local_steps=10",
    "train.rounds=50",
    "train.precision=bf16",
    "eval.every=0",
    "eval.final_tokens=131072",
    "server.num_threads=2",
]
PLAIN = ["base.hysteresis=0", "base.keep_scale_from=1", "base.keep_scale_to=1"]
SETTINGS = {
    "uncompressed": ["compress.factors=fp32", "compress.dense=fp32", *PLAIN],
    "int4 + changes": ["compress.factors=int4", "compress.dense=int4"],
    "rank 8, int2, with feedback": [
        "compress.factors=int2",
        "compress.truncate_rank=8",
        "compress.dense=int4",
    ],
    "rank 8, int2, without feedback": [
        "compress.factors=int2",
        "compress.truncate_rank=8",
        "compress.dense=int4",
        "compress.error_feedback=false",
    ],
}
PAIRS = [
    ("uncompressed", "int4 + changes"),
    ("rank 8, int2, with feedback", "rank 8, int2, without feedback"),
]
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t at 97.5 % for so many pairs."""


def main() -> None:
    text, *rest = sys.argv[1:]
    overrides = [argument for argument in rest if "=" in argument]
    num_seeds = next((int(argument) for argument in rest if "=" not in argument), 3)
    shards = shards_of(text, RUNS)
    losses: dict[str, list[float]] = {name: [] for name in SETTINGS}
    header(["settings", "seed", "published", "master", "MB up", "MB down"])
    for seed in range(num_seeds):
        for name, settings in SETTINGS.items():
            folder = RUNS / "-".join([name.replace(" ", "_").replace(",", ""), f"seed{seed}", *overrides])
            own = [*COMMON, *settings, f"data.shards={shards}", f"run.seed={seed}", *overrides]
            done = train(folder, RECIPE, own)[-1]
            losses[name].append(done["loss"])
            cells = [f"{done[key]:.4f}" for key in ("loss", "loss_master")]
            megabytes = [f"{done[key] / 1e6:.1f}" for key in ("uplink_bytes", "downlink_bytes")]
            row([name, seed, *cells, *megabytes])
    print()
    header(["from", "to", "difference of losses", "95 % interval", "in % of the loss"])
    for one, other in PAIRS:
        differences = [b - a for a, b in zip(losses[one], losses[other], strict=True)]
        middle, interval = mean(differences), "one seed tells none"
        if len(differences) > 1:
            half = T_95[len(differences)] * stdev(differences) / math.sqrt(len(differences))
            interval = f"{middle - half:+.4f} ... {middle + half:+.4f}"
        row([one, other, f"{middle:+.4f}", interval, f"{100 * middle / mean(losses[one]):+.2f} %"])


if __name__ == "__main__":
    main()
