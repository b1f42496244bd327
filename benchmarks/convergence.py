"""Parity: what LTE and its competitors lose at equal tokens, each at the best rate that it has.

    python benchmarks/convergence.py DATA [--valid TEXT] [--only WORDS] [--trials 4] [--minutes 120]
    python benchmarks/convergence.py DATA --minutes 0           # no more runs, the table alone

DATA is a text, for a GPT of 0.85M parameters on bytes, or a folder of packed images (28 x 28, `lte data
pack-images`), for a ViT of 0.8M: 1,000 optimizer steps, rates that end at 0, and the whole validation split.
Workers read 8 sequences of 128 tokens a step, or 16 images, and half of that where there are 8 workers: 4.1M
tokens, or 64,000 images. Data-parallel training takes the same steps with the same total batch, and, at a
quarter of the batch, four times as many.
Every case has as many trials of its rate: from a first guess by factors of 2 until the best lies between two
others, then between the best and its better neighbour; a best rate that is still the least or the largest
tried is marked. The winner of each method is run again with other seeds, which are paired: initial weights
and data are the same for all cases. The first seed is the one that rates were chosen by.

Finished runs are written down in docs/convergence and not repeated, so a benchmark that takes days goes on
where it was, on another machine, too; `--minutes` says for how long runs are begun. Loss, bytes and time of a
row are of the same runs: means over the seeds. The published model is compared with the fp32 weights of
data-parallel training; their NF4, of the same matrices as LTE's, is beside them. MB: what all workers send
and receive, as the kernel counted it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from runs import header, row, shards_of, train

from lte.config import load

STEPS = 1000
COMMON = ["schedule.final=0", "train.precision=bf16", "eval.every=0", "server.num_threads=2"]
LOSSES = ("loss", "loss_master")
"""Of a run's last record: of the published model and of the master."""
STUDENT_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Two-sided 95 % quantiles of Student's t, by the number of paired seeds."""


@dataclass(frozen=True)
class Case:
    """One method with all of its settings but the rate.

    Attributes:
        method: cases of one method compete for its place in the final comparison.
        key: the setting that is swept. guess: the first value tried.
    """

    method: str
    recipe: str
    settings: tuple[str, ...]
    key: str
    guess: float

    @property
    def minimized(self) -> str:
        """The loss that a rate is chosen by: the published model's, and fp32's where that is what is used."""
        return "loss_master" if Path(self.recipe).stem in ("ddp", "powersgd") else "loss"

    def on(self, kind: Kind) -> list[str]:
        """Its settings with data of a kind."""
        batch = load(self.recipe, self.settings).train.batch_size * kind.batch
        return [*COMMON, *self.settings, *kind.settings, f"train.batch_size={batch}"]


@dataclass(frozen=True)
class Kind:
    """A kind of data, and the model for it. batch: samples for each sequence of a text. rate: factor on the
    first guesses of rates. folder: of the runs. ledger: what finished runs came to, a JSON object a line."""

    settings: tuple[str, ...]
    batch: int
    rate: float
    folder: Path
    ledger: Path


TEXT = Kind(
    (), batch=1, rate=1.0, folder=Path("runs/convergence"), ledger=Path("docs/convergence/text.jsonl")
)
IMAGES = Kind(
    (
        "data.kind=images",
        "model.name=vit",
        "model.image_size=28",
        "model.channels=1",
        "model.patch_size=4",
        "model.num_classes=10",
        "optimizer.dense_lr=1e-3",
        "optimizer.adamw_lr=1e-3",
    ),
    batch=2,
    rate=0.25,
    folder=Path("runs/convergence-images"),
    ledger=Path("docs/convergence/images.jsonl"),
)


def steps(local_steps: int, total: int = STEPS) -> tuple[str, ...]:
    return f"train.local_steps={local_steps}", f"train.rounds={total // local_steps}"


def workers(num: int) -> tuple[str, ...]:
    """The batch of all workers is 32 sequences."""
    return f"train.workers={num}", f"train.batch_size={32 // num}"


NF4 = ("base.quant=nf4",)
OF_BLOCKS = "lora.exclude=[output]"
"""Heads on all matrices of the blocks, 92 % of the parameters, and these are what is quantized."""
MUON = "optimizer.name=muon"
DENSE_MUON = (MUON, "optimizer.adamw_lr=3e-3")
"""The rate that is swept is of the matrices; embedding, output and norms have what they have in LTE."""


SHORTER = "optimizer.muon_momentum=0.85"
LONGER = "optimizer.muon_momentum=0.975"


def lte(
    local_steps: int, *more: str, rank: int = 128, num: int = 4, guess: float = 1.4e-3, method: str = ""
) -> Case:
    """Embedding and output are dense."""
    shape = (f"lora.rank={rank}", OF_BLOCKS, *workers(num))
    settings = (*NF4, *shape, *steps(local_steps), *more)
    name = method or f"LTE T={local_steps}"
    return Case(name, "configs/quickstart.yaml", settings, "optimizer.lr", guess)


def full_rank(local_steps: int, *more: str, method: str = "") -> Case:
    """LTE with heads as large as their matrices: of it the quantized base and the int4 deltas are left."""
    settings = (*NF4, "train.full_rank=true", OF_BLOCKS, *steps(local_steps), *workers(4))
    name = method or f"LTE T={local_steps} full rank"
    own = (*settings, *DENSE_MUON, *more)
    return Case(name, "configs/quickstart.yaml", own, "optimizer.dense_lr", 1.6e-2)


def outer(
    lr: float, momentum: float, local_steps: int, guess: float, *more: str, method: str = "DiLoCo"
) -> Case:
    settings = (*steps(local_steps), f"outer.lr={lr:g}", f"outer.momentum={momentum:g}", *more)
    name = f"{method} T={local_steps}"
    return Case(name, "configs/methods/diloco.yaml", settings, "optimizer.dense_lr", guess)


def ddp(
    *more: str, guess: float = 4e-3, method: str = "DDP", recipe: str = "ddp", total: int = STEPS
) -> Case:
    settings = (OF_BLOCKS, *steps(10, total), *more)
    return Case(method, f"configs/methods/{recipe}.yaml", settings, "optimizer.dense_lr", guess)


def int8_from(round_: int) -> str:
    return f"train.phases=[{{from_round: {round_}, base_quant: int8}}]"


FEWER_STEPS = "train.phases=[{from_round: 80, local_steps: 5}]"
"""T = 5 in place of 10 for the last fifth of the steps: 80 rounds, then 40."""
MORE_STEPS = "train.phases=[{from_round: 40, local_steps: 10}, {from_round: 80, local_steps: 22}]"
"""T = 4 for 40 rounds, 10 for 40 and 22 for 20: as many steps and bytes as T = 10 throughout."""

CASES: dict[str, Case] = {
    "DDP AdamW": ddp(),
    "LTE T=10 Muon r=128": lte(10, MUON),
    "LTE T=10 Muon r=64": lte(10, MUON, rank=64, method="LTE T=10 r=64"),
    "DDP Muon": ddp(*DENSE_MUON, method="DDP Muon", guess=1.6e-2),
    "LTE T=10 Muon r=128, no hysteresis": lte(10, MUON, "base.hysteresis=0"),
    "LTE T=10 Muon r=128, base int8": lte(10, MUON, "base.quant=int8", method="LTE T=10 int8"),
    "LTE T=10 Muon r=128, base int8, T=5 from 80": lte(
        10, MUON, "base.quant=int8", "train.rounds=120", FEWER_STEPS, method="LTE T=10 int8, then 5"
    ),
    "LTE T=4, 10, 22 Muon r=128, base int8": lte(
        4,
        MUON,
        "base.quant=int8",
        "train.rounds=100",
        MORE_STEPS,
        guess=7e-4,
        method="LTE T=4, 10, 22 int8",
    ),
    "LTE T=20 Muon r=128, base int8, batch / 2": lte(
        20,
        MUON,
        "base.quant=int8",
        "train.batch_size=4",
        *steps(20, 2 * STEPS),
        guess=5e-4,
        method="LTE T=20 int8, batch / 2",
    ),
    "LTE T=10 Muon r=64, base int8": lte(10, MUON, "base.quant=int8", rank=64, method="LTE T=10 int8 r=64"),
    "LTE T=10 Muon r=128, int8 from 80": lte(10, MUON, int8_from(80)),
    "LTE T=10 Muon r=64, int8 from 80": lte(10, MUON, int8_from(80), rank=64, method="LTE T=10 r=64"),
    "LTE T=10 Muon full rank": full_rank(10),
    "LTE T=10 Muon full rank, int8": full_rank(10, "base.quant=int8", method="LTE T=10 int8 full rank"),
    "LTE T=10 Muon r=32": lte(10, MUON, rank=32, guess=1e-3, method="LTE T=10 r=32"),
    "LTE T=10 AdamW r=128": lte(10, "optimizer.name=adamw", guess=1e-3, method="LTE T=10 AdamW"),
    "DDP AdamW beta1=0.7": ddp("optimizer.beta1=0.7"),
    "DDP AdamW beta1=0.5": ddp("optimizer.beta1=0.5"),
    "DDP Muon, momentum 0.85": ddp(*DENSE_MUON, SHORTER, method="DDP Muon", guess=8e-3),
    "LTE T=10 Muon r=128, base int8, momentum 0.85": lte(
        10, MUON, "base.quant=int8", SHORTER, guess=7e-4, method="LTE T=10 int8"
    ),
    "DDP Muon, momentum 0.7": ddp(*DENSE_MUON, "optimizer.muon_momentum=0.7", method="DDP Muon", guess=8e-3),
    "LTE T=10 Muon r=128, base int8, momentum 0.975": lte(
        10, MUON, "base.quant=int8", LONGER, guess=7e-4, method="LTE T=10 int8"
    ),
    "DDP, batch / 4, Muon": ddp(
        "train.batch_size=2", *DENSE_MUON, method="DDP Muon batch / 4", total=4 * STEPS, guess=4e-3
    ),
    "DDP, batch / 4, AdamW": ddp("train.batch_size=2", method="DDP batch / 4", total=4 * STEPS, guess=2e-3),
    "DiLoCo T=10 0.7/0.9": outer(0.7, 0.9, 10, 1e-3),
    "DiLoCo T=10 0.7/0.5": outer(0.7, 0.5, 10, 2e-3),
    "DiLoCo T=10 0.7/0.5 Muon": outer(0.7, 0.5, 10, 8e-3, *DENSE_MUON, method="DiLoCo Muon"),
    "local SGD T=10": outer(1.0, 0.0, 10, 4e-3, method="local SGD"),
    "local SGD T=10 Muon": outer(1.0, 0.0, 10, 1.6e-2, *DENSE_MUON, method="local SGD Muon"),
    "local SGD T=20 Muon": outer(1.0, 0.0, 20, 1.6e-2, *DENSE_MUON, method="local SGD Muon"),
    "DiLoCo T=50 0.7/0.9": outer(0.7, 0.9, 50, 2e-3),
    "LTE T=5 Muon": lte(5, MUON),
    "LTE T=5 Muon, int8 from 160": lte(5, MUON, int8_from(160)),
    "LTE T=5 Muon r=128, base int8": lte(5, MUON, "base.quant=int8", method="LTE T=5 int8"),
    "LTE T=50 Muon": lte(50, MUON),
    "LTE T=50 Muon r=128, base int8": lte(50, MUON, "base.quant=int8", method="LTE T=50 int8"),
    "LTE T=10 Muon N=8": lte(10, MUON, num=8, method="LTE T=10 N=8"),
    "LTE T=10 Muon N=8, base int8": lte(10, MUON, "base.quant=int8", num=8, method="LTE T=10 N=8 int8"),
    "ReLoRA": Case(
        "ReLoRA", "configs/methods/relora.yaml", ("train.rounds=20", OF_BLOCKS), "optimizer.lr", 1e-3
    ),
    "PowerSGD r=4": ddp(method="PowerSGD", recipe="powersgd"),
}


REFERENCES = ("DDP AdamW", "DDP Muon")
"""Cases that all others are compared with."""


class OutOfTimeError(Exception):
    """No more runs are to be begun."""


class Runs:
    """Runs of the cases, each in a folder; begun as long as there is time."""

    def __init__(self, kind: Kind, shards: Path, minutes: float) -> None:
        self.kind, self.shards = kind, shards
        self._until = time.monotonic() + 60 * minutes
        self._ledger: dict[tuple[str, float, int], dict[str, Any]] = {}
        if kind.ledger.exists():
            for line in kind.ledger.read_text().splitlines():
                self._enter(json.loads(line))

    def _enter(self, line: dict[str, Any]) -> None:
        diverged_or_not_kept = dict.fromkeys(LOSSES, math.inf)
        self._ledger[line["case"], line["rate"], line["seed"]] = {**diverged_or_not_kept, **line}

    def finished(self, name: str, rate: float, seed: int) -> dict[str, Any] | None:
        """What a finished run came to; its losses are infinite if it diverged."""
        return self._ledger.get((name, rate, seed))

    def done(self, name: str, rate: float, seed: int = 0) -> dict[str, Any]:
        """What a case came to at a rate.

        Raises:
            OutOfTimeError: it is not finished, and there is no time.
        """
        if found := self.finished(name, rate, seed):
            return found
        if time.monotonic() > self._until:
            raise OutOfTimeError
        case = CASES[name]
        readable = name.replace(" ", "_").replace("/", "-").replace(",", "")
        folder = self.kind.folder / f"{readable}-{rate:g}-seed{seed}"
        own = [f"{case.key}={rate:g}", f"run.seed={seed}", f"data.shards={self.shards}"]
        line: dict[str, Any] = {"case": name, "rate": rate, "seed": seed}
        try:
            last = train(folder, case.recipe, [*case.on(self.kind), *own])[-1]
            line |= {key: round(last[key], 5) for key in LOSSES}
            line |= {"bytes": last["uplink_bytes"] + last["downlink_bytes"], "time_s": round(last["time_s"])}
        except subprocess.CalledProcessError:
            if not diverged(folder):
                raise
            line["diverged"] = True
        self.kind.ledger.parent.mkdir(parents=True, exist_ok=True)
        with self.kind.ledger.open("a") as ledger:
            ledger.write(json.dumps(line) + "\n")
        self._enter(line)
        return self._ledger[name, rate, seed]

    def try_another(self, name: str) -> None:
        """Try one more rate: until the best is bracketed, and then between."""
        case = CASES[name]
        tried = {rate: done[case.minimized] for rate, done in self.trials(name).items()}
        self.done(name, next_rate(tried, case.guess * self.kind.rate))

    def trials(self, name: str) -> dict[float, dict[str, Any]]:
        """What a case's finished runs with seed 0 came to, by rate."""
        return {rate: line for (case, rate, seed), line in self._ledger.items() if (case, seed) == (name, 0)}

    def best(self, name: str) -> float | None:
        """The best rate tried."""
        tried = self.trials(name)
        minimized = CASES[name].minimized
        return min(tried, key=lambda rate: tried[rate][minimized]) if tried else None

    def winners(self, names: list[str]) -> list[str]:
        """Of each method the case with the least loss."""
        first: dict[str, tuple[float, str]] = {}
        for name in names:
            if tried := self.trials(name):
                own = (min(done[CASES[name].minimized] for done in tried.values()), name)
                first[CASES[name].method] = min(own, first.get(CASES[name].method, own))
        return [name for _, name in first.values()]

    def report(self, num_seeds: int) -> None:
        """Print the table."""
        compared = [text for name in REFERENCES for text in (f"against {name}", "95 %")]
        header(["case", "rates tried", "best", "published", "master", "seeds", *compared, "MB", "s"])
        for name in CASES:
            rate = self.best(name)
            if rate is None:
                continue
            same = {seed: done for seed in range(num_seeds) if (done := self.finished(name, rate, seed))}
            losses = [mean(done[key] for done in same.values()) for key in LOSSES]
            tried = sorted(self.trials(name))
            edge = " (an edge)" if rate in (tried[0], tried[-1]) else ""
            cells = [name, ", ".join(f"{rate:g}" for rate in tried), f"{rate:g}{edge}"]
            cells += [*(f"{loss:.4f}" for loss in losses), str(len(same))]
            compared = [text for other in REFERENCES for text in self._against(same, other)]
            num_bytes, time_s = (
                _mean([done.get(key) for done in same.values()]) for key in ("bytes", "time_s")
            )
            row([*cells, *compared, f"{num_bytes / 1e6:,.0f}", f"{time_s:.0f}" if time_s else ""])

    def _against(self, same: dict[int, dict[str, Any]], name: str) -> tuple[str, str]:
        """The published loss over that of a data-parallel case's fp32 weights, by pairs of seeds, and its
        interval."""
        rate = self.best(name)
        if rate is None:
            return "", ""
        excess = [
            100 * (done["loss"] / other["loss_master"] - 1)
            for seed, done in same.items()
            if (other := self.finished(name, rate, seed))
        ]
        if len(excess) < 2:
            return (f"{excess[0]:+.2f} %" if excess else ""), ""
        half = STUDENT_95[len(excess)] * stdev(excess) / math.sqrt(len(excess))
        return f"{mean(excess):+.2f} %", f"± {half:.2f}"


def _mean(numbers: list[float | None]) -> float:
    """Of those that are known; 0 of none."""
    known = [number for number in numbers if number is not None]
    return mean(known) if known else 0.0


def diverged(folder: Path) -> bool:
    """Whether a process of the run ended because its training had diverged."""
    return any("training diverged" in log.read_text() for log in folder.glob("logs/*.log"))


def next_rate(losses: dict[float, float], guess: float) -> float:
    """The rate to try next: the guess, then by factors of 2 downhill until the best has a worse one on each
    side, then the geometric mean of the best and its better neighbour."""
    if not losses:
        return guess
    rates = sorted(losses)
    k = rates.index(min(losses, key=losses.__getitem__))
    if k == len(rates) - 1:
        return rates[k] * 2
    if k == 0:
        return rates[k] / 2
    neighbour = min(rates[k - 1], rates[k + 1], key=losses.__getitem__)
    return float(f"{math.sqrt(rates[k] * neighbour):.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--valid", help="validation text (default: the last tenth of the text)")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--trials", type=int, default=4, help="rates tried of each case")
    parser.add_argument("--seeds", type=int, choices=range(1, max(STUDENT_95) + 1), default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="for how long runs are begun")
    arguments = parser.parse_args()
    if Path(arguments.data).is_dir():
        runs = Runs(IMAGES, Path(arguments.data), arguments.minutes)
    else:
        runs = Runs(TEXT, shards_of(arguments.data, TEXT.folder, arguments.valid), arguments.minutes)
    names = [name for name in CASES if arguments.only in name]
    try:
        for num in range(1, arguments.trials + 1):
            for name in names:
                if len(runs.trials(name)) < num:
                    runs.try_another(name)
        for seed in range(1, arguments.seeds):
            for name in runs.winners(names):
                rate = runs.best(name)
                assert rate is not None
                runs.done(name, rate, seed)
    except OutOfTimeError:
        pass
    runs.report(arguments.seeds)


if __name__ == "__main__":
    main()
