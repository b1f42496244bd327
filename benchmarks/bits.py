"""What travels: bits a parameter, round and worker, and how far below data-parallel training.

    python benchmarks/bits.py TEXT [case ...] [key=value ...]

TEXT is a text file (.gz too), packed once into runs/bits/shards. Cases (all by default):

    a    GPT of 10M parameters, 4 workers, r = 32, T = 10, 100 rounds
    b    the same with T = 50, 30 rounds
    c    one transformer block at the shapes of a 1B model (2048, MLP 5632), T = 10, 20 rounds

Data-parallel bytes are 4 a parameter, step and worker (bf16 gradients out and in); a ring of N
exchanges 4 (N - 1) / N. Runs that are finished are not repeated. Prints a markdown table.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean
from typing import Any

from runs import header, row, shards_of, train

from lte import config, nn
from lte.models import build

RUNS = Path("runs/bits")
RECIPE = "configs/gpt-10m.yaml"
CASES = {
    "a": ["train.rounds=100", "train.local_steps=10"],
    "b": ["train.rounds=30", "train.local_steps=50"],
    "c": [
        "train.rounds=20",
        "train.local_steps=10",
        "model.num_layers=1",
        "model.width=2048",
        "model.num_attention_heads=16",
        "model.mlp_width=5632",
        "eval.final_tokens=32768",
    ],
}
COLUMNS = {
    "up": "bits up",
    "element": "bits an element sent",
    "down": "bits down",
    "late": "down, last half",
    "dense": "of it dense",
    "entropy": "changes over their entropy",
    "changed": "codes changed, last half",
    "ddp": "below DDP",
    "ring": "below a ring",
    "loss": "loss",
    "master": "master",
}


def main() -> None:
    text, *rest = sys.argv[1:]
    overrides = [argument for argument in rest if "=" in argument]
    cases = [argument for argument in rest if "=" not in argument] or list(CASES)
    shards = shards_of(text, RUNS)
    header(["case", "settings", *COLUMNS.values()])
    measured = ["compress.measure_entropy=true", "eval.final_tokens=65536", "eval.every=0"]
    measured += ["server.num_threads=2", f"data.shards={shards}"]
    for case in cases:
        folder = RUNS / "-".join([case, *overrides])
        lines = train(folder, RECIPE, [*measured, *CASES[case], *overrides])
        found = figures(lines, folder)
        row([case, " ".join(overrides), *(found[key] for key in COLUMNS)])


def figures(lines: list[dict[str, Any]], folder: Path) -> dict[str, str]:
    recipe = config.load(folder / "config.yaml")
    rounds = [line for line in lines if line["kind"] == "round"]
    done = next(line for line in reversed(lines) if line["kind"] == "done")
    half, workers, parameters = rounds[len(rounds) // 2 :], done["workers"], done["num_parameters"]
    plan = nn.plan(build(recipe.model), recipe.lora, recipe.base.quant)
    sends_A = recipe.lora.A == "trained"
    elements = recipe.lora.heads * sum(
        spec.rank * (spec.shape[0] + spec.shape[1] * sends_A) for spec in plan.adapted.values()
    )

    def bits(key: str, some: list[dict[str, Any]]) -> float:
        return mean(8 * line[key] / parameters / workers for line in some)

    dense = bits("uplink_dense_bytes", rounds) + bits("downlink_dense_bytes", rounds)
    up, down = bits("uplink_bytes", rounds), bits("downlink_bytes", rounds)
    ddp = 32 * recipe.train.local_steps
    element = mean(8 * line["uplink_factors_bytes"] / workers / elements for line in rounds[1:])
    return {
        "up": f"{up:.3f}",
        "element": f"{element:.2f}",
        "down": f"{down:.3f}",
        "late": f"{bits('downlink_bytes', half):.3f}",
        "dense": f"{dense:.3f}",
        "entropy": over_entropy(rounds),
        "changed": f"{mean(line['codes_changed'] for line in half):.1%}",
        "ddp": f"{ddp / (up + down):,.0f}x",
        "ring": f"{ddp * (workers - 1) / workers / (up + down):,.0f}x",
        "loss": f"{done['loss']:.4f}",
        "master": f"{done['loss_master']:.4f}",
    }


def over_entropy(rounds: list[dict[str, Any]]) -> str:
    """How many more bytes codes and scales took than they had to, over all rounds and the worst."""
    told = [line for line in rounds if line.get("entropy_bytes")]
    if not told:
        return "-"
    total = sum(line["changes_bytes"] for line in told) / sum(line["entropy_bytes"] for line in told)
    worst = max(line["changes_bytes"] / line["entropy_bytes"] for line in told)
    return f"{total - 1:.1%}, worst {worst - 1:.1%}"


if __name__ == "__main__":
    main()
