"""The curve that counts: loss of the published model over all bytes, for LTE, DiLoCo and DDP.

    python benchmarks/curve.py TEXT [--seeds 3] [--only WORDS]

A GPT of about 1M parameters, 2M tokens, 4 workers of batch 8 (one of 32 for DDP), 500 local steps;
each setting with as many learning rates. The finalists, of each method the settings that no other beats
both in bytes and in loss, are then run at their best rate with more seeds.
Finished runs are not repeated, so that a sweep which takes days goes on where it was; a table of what
there is, and runs/curve/curve.png, come at the end and with --only nothing.

DiLoCo is the same machine with dense parameters alone: H local steps of AdamW on every parameter,
outer Nesterov 0.7 / 0.9 on the mean change, which travels in the codec named, with error feedback,
both ways. DDP is one worker with the whole batch; its bytes are 4 a parameter, step and worker. The bytes
of the others hold the first copy of the model, which weighs in so short a run; they are given without
it, too: the first update's excess over the second's. DDP's hold none.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

from runs import ADAMW_NF4, header, records, row, shards_of, train

RUNS = Path("runs/curve")
STEPS, WORKERS = 500, 4
COMMON = ["train.precision=bf16", "eval.every=0", "eval.final_tokens=131072", "server.num_threads=2"]
LTE_RATES, DENSE_RATES = (1e-3, 5e-4, 2e-3), (2e-3, 1e-3, 4e-3)


def lte(rank: int, local_steps: int, *more: str) -> list[str]:
    return [
        "configs/quickstart.yaml",
        *ADAMW_NF4,
        f"lora.rank={rank}",
        "lora.embeddings=true",
        "compress.dense=int4",
        *rounds(local_steps),
        *more,
    ]


def diloco(local_steps: int, codec: str) -> list[str]:
    return [
        "configs/quickstart-adamw.yaml",
        f"train.workers={WORKERS}",
        "train.batch_size=8",
        *rounds(local_steps),
        f"compress.dense={codec}",
        "outer.name=sgd",
        "outer.lr=0.7",
        "outer.momentum=0.9",
        "outer.dense=true",
    ]


def rounds(local_steps: int) -> list[str]:
    return [f"train.local_steps={local_steps}", f"train.rounds={STEPS // local_steps}"]


SETTINGS: dict[str, list[str]] = {
    "LTE r=32 T=10 int4": lte(32, 10),
    "DiLoCo H=50 int4": diloco(50, "int4"),
    "LTE r=32 T=50 int4": lte(32, 50),
    "DiLoCo H=10 int4": diloco(10, "int4"),
    "LTE r=64 T=5 int4": lte(64, 5),
    "LTE r=16 T=50 int4": lte(16, 50),
    "DDP": ["configs/quickstart-adamw.yaml", *rounds(10)],
    "DiLoCo H=100 int4": diloco(100, "int4"),
    "LTE r=32 T=25 int2": lte(32, 25, "compress.factors=int2"),
    "LTE r=32 T=25 int4, A frozen": lte(32, 25, "lora.A=frozen"),
    "LTE r=16 T=100 int2": lte(16, 100, "compress.factors=int2"),
    "DiLoCo H=250 int4": diloco(250, "int4"),
    "DiLoCo H=50 fp32": diloco(50, "fp32"),
    "DiLoCo H=50 int8": diloco(50, "int8"),
    "LTE r=16 T=250 int2": lte(16, 250, "compress.factors=int2"),
    "DiLoCo H=500 int4": diloco(500, "int4"),
    "LTE r=64 T=250 int2": lte(64, 250, "compress.factors=int2"),
    "LTE r=64 T=100 int2": lte(64, 100, "compress.factors=int2"),
    "LTE r=32 T=250 int2": lte(32, 250, "compress.factors=int2"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="settings whose name holds this; 'nothing' runs none")
    arguments = parser.parse_args()
    shards = shards_of(arguments.text, RUNS)
    chosen = [name for name in SETTINGS if arguments.only in name]
    for k in range(len(LTE_RATES)):  # the middle rate of all settings first
        for name in chosen:
            run(name, rate_of(name, k), 0, shards)
    for seed in range(1, arguments.seeds):
        for name in finalists(chosen):
            run(name, best_of(name)["rate"], seed, shards)
    report(arguments.seeds)


def is_lte(name: str) -> bool:
    return name.startswith("LTE")


def rate_of(name: str, k: int) -> float:
    return (LTE_RATES if is_lte(name) else DENSE_RATES)[k]


def folder_of(name: str, rate: float, seed: int) -> Path:
    return RUNS / f"{name.replace(' ', '_').replace(',', '')}-{rate:g}-seed{seed}"


def run(name: str, rate: float, seed: int, shards: Path) -> None:
    recipe, *settings = SETTINGS[name]
    key = "optimizer.lr" if is_lte(name) else "optimizer.dense_lr"
    own = [*settings, *COMMON, f"{key}={rate:g}", f"run.seed={seed}", f"data.shards={shards}"]
    train(folder_of(name, rate, seed), recipe, own)


def finished(name: str, seed: int) -> list[dict[str, Any]]:
    """The `done` lines of a setting at each rate that was run, with the rate."""
    found = []
    for k in range(len(LTE_RATES)):
        lines = records(folder_of(name, rate_of(name, k), seed))
        if lines and lines[-1]["kind"] == "done":
            rounds = [line for line in lines if line["kind"] == "round"]
            found.append(lines[-1] | {"rate": rate_of(name, k), "first": first_copy(rounds)})
    return found


def first_copy(rounds: list[dict[str, Any]]) -> int:
    """Bytes of the whole model that all workers begin with: what the first round brought them beyond an
    update, for which one of DiLoCo's contributions stands where there is but one round."""
    update = rounds[1]["downlink_bytes"] if len(rounds) > 1 else rounds[0]["uplink_bytes"]
    return int(rounds[0]["downlink_bytes"] - update)


def best_of(name: str) -> dict[str, Any]:
    return min(finished(name, 0), key=lambda found: found["loss"])


def moved(done: dict[str, Any], name: str) -> float:
    """Bytes up and down, all workers."""
    return ddp_bytes(done) if name == "DDP" else done["uplink_bytes"] + done["downlink_bytes"]


def ddp_bytes(done: dict[str, Any]) -> float:
    return 4 * done["num_parameters"] * STEPS * WORKERS


def finalists(names: list[str]) -> list[str]:
    """Of each method the settings that no other beats both in bytes and in loss."""
    best = {name: best_of(name) for name in names}

    def beats(other: str, name: str) -> bool:
        lower = best[other]["loss"] < best[name]["loss"]
        fewer = moved(best[other], other) < moved(best[name], name)
        return other.split()[0] == name.split()[0] and lower and fewer

    return [name for name in names if not any(beats(other, name) for other in names)]


def report(num_seeds: int) -> None:
    """Print the table, and draw it."""
    from matplotlib.figure import Figure

    header(
        [
            "setting",
            "rates tried",
            "best",
            "seeds",
            "loss",
            "of each",
            "MB in all",
            "below DDP",
            "without the first copy",
        ]
    )
    points: dict[str, list[tuple[float, float]]] = {}
    for name in SETTINGS:
        tried = finished(name, 0)
        if not tried:
            continue
        best = best_of(name)
        same = [f for seed in range(num_seeds) for f in finished(name, seed) if f["rate"] == best["rate"]]
        size = moved(best, name)
        apart = f"{ddp_bytes(best) / (size - best['first']):,.0f}x"
        loss = mean(f["loss"] for f in same)
        each = ", ".join(f"{f['loss']:.4f}" for f in same)
        numbers = [f"{best['rate']:g}", len(same), f"{loss:.4f}", each]
        row([name, len(tried), *numbers, f"{size / 1e6:,.1f}", f"{ddp_bytes(best) / size:,.0f}x", apart])
        points.setdefault(name.split()[0], []).append((size, loss))
    figure = Figure(figsize=(7, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for method, some in points.items():
        axes.plot(*zip(*sorted(some), strict=True), marker="o", label=method)
    axes.set(xscale="log", xlabel="bytes sent up and down, all workers", ylabel="loss (nats a byte)")
    axes.legend(frameon=False)
    axes.grid(color="0.92")
    figure.savefig(RUNS / "curve.png")


if __name__ == "__main__":
    main()
