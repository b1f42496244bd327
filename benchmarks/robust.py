"""What robust merging costs honest workers, and what a poisoned one of four costs without and with it.

    python benchmarks/robust.py TEXT [num_seeds] [key=value ...]

A GPT of 0.1M parameters, four workers as threads of one process; the first one follows an attack in every
round. Prints the mean final loss of the published model, and for the honest runs the mean difference to
plain merging with its 95 % interval over the seeds. Finished runs are not repeated.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import torch
from runs import ADAMW_NF4, header, records, row, shards_of

from lte import config, recipes
from lte.compress import B
from lte.errors import LTEError
from lte.worker.trainer import Trainer

RUNS = Path("runs/robust")
RECIPE = "configs/quickstart.yaml"
COMMON = [
    *ADAMW_NF4,
    "model.num_layers=2",
    "model.width=64",
    "model.mlp_width=256",
    "model.context_tokens=64",
    "lora.rank=32",
    "train.rounds=25",
    "schedule.warmup_steps=20",
    "optimizer.lr=2e-3",
    "eval.every=0",
    "eval.final_tokens=32768",
    "eval.sample_tokens=0",
    "server.checkpoint_every=1000",
]
SETTINGS = {
    "plain": [],
    "bound": ["outer.bound_norm=1.5"],
    "bound and trim": ["outer.bound_norm=1.5", "outer.trim=0.3"],
}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t at 97.5 % for so many pairs."""

Attack = Callable[[torch.Tensor], torch.Tensor]
"""What a worker has learnt of a tensor since the last merge -> what it sends instead."""


def noise(change: torch.Tensor) -> torch.Tensor:
    """Ten times as long, in a random direction."""
    random = torch.randn_like(change)
    return 10 * random * (change.norm() / random.norm())


ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "turned round": lambda change: -change,
    "turned round, 10 times": lambda change: -10 * change,
    "turned round, 100 times": lambda change: -100 * change,
    "noise, 10 times as long": noise,
}
RATE = "100 times the learning rate"
"""An attack that needs no malice."""


class Poisoned(Trainer):
    """A worker that sends something else than what it has learnt."""

    attack: Attack | None = None

    @torch.no_grad()
    def contribution(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.attack is None:
            yield from super().contribution()
            return
        for module in self.modules.values():
            module.lora_B.copy_(self.attack(module.lora_B))
        for name, parameter in self.dense.items():
            parameter.copy_(self._published[name] + self.attack(parameter - self._published[name]))
        yield from super().contribution()
        # What the codecs left out is not owed, or the attack would be made on it again and again.
        for name, module in self.modules.items():
            module.lora_B.copy_(self._sent[name + B])
        for name, parameter in self.dense.items():
            parameter.copy_(self._published[name] + self._sent[name])

    def _check_finite(self) -> None:
        """It does not mind."""


def trainer(attack: str) -> Callable[..., Trainer]:
    """What makes the trainers of a run: the first worker's is poisoned."""

    def make(*arguments: Any, slot: int, **named: Any) -> Trainer:
        if slot or attack == "none":
            return Trainer(*arguments, slot=slot, **named)
        made = Poisoned(*arguments, slot=slot, **named)
        made.attack = ATTACKS.get(attack)
        if attack == RATE:
            made._peak_rates = [100 * rate for rate in made._peak_rates]
        return made

    return make


def train(folder: Path, attack: str, overrides: list[str]) -> list[dict[str, Any]]:
    """Train in a folder, if that was not done; returns its records. Who fails is missed by the others."""
    lines = records(folder)
    if not lines or lines[-1]["kind"] != "done":
        own = [f"run.dir={folder}", f"server.address=inprocess://{folder.name}", "run.resume=never"]
        recipe = config.load(RECIPE, [*COMMON, *overrides, *own])

        def work() -> None:
            with contextlib.suppress(LTEError):
                recipes.work(server.address, say=lambda line: None)
            left.remove(threading.current_thread())
            if not left:
                server.stop("nobody is left")

        left: list[threading.Thread] = []
        with (
            patch("lte.worker.service.Trainer", trainer(attack)),
            recipes.make_server(recipe, display=False) as server,
        ):
            threads = [threading.Thread(target=work) for _ in range(recipe.train.workers)]
            left += threads
            for thread in threads:
                thread.start()
            server.serve()
            for thread in threads:
                thread.join()
        lines = records(folder)
    return lines


def loss_of(lines: list[dict[str, Any]]) -> float:
    """Of the published model at the end; infinite for a run that diverged."""
    last = lines[-1]
    return math.inf if last["kind"] != "done" or last["loss"] is None else float(last["loss"])


def held_down(lines: list[dict[str, Any]]) -> str:
    """How many contributions were bounded and trimmed: of the worker that was most often, and of others."""
    rounds = [line for line in lines if line["kind"] == "round"]
    counts = []
    for what in ("bounded", "trimmed"):
        named = Counter(who for line in rounds for who in line.get(what, ()))
        most = max(named.values(), default=0)
        counts.append(f"{most} + {named.total() - most}")
    return " / ".join(counts)


def main() -> None:
    text, *rest = sys.argv[1:]
    overrides = [argument for argument in rest if "=" in argument]
    num_seeds = next((int(argument) for argument in rest if "=" not in argument), 3)
    shards = shards_of(text, RUNS)
    losses: dict[tuple[str, str], list[float]] = {}
    header(
        [
            "attack of one worker of four",
            "merging",
            "loss",
            "of each seed",
            "rounds bounded / trimmed: one + others",
        ]
    )
    for attack in (*ATTACKS, RATE):
        for name, settings in SETTINGS.items():
            runs = []
            for seed in range(num_seeds):
                folder = RUNS / "-".join([attack, name, f"seed{seed}", *overrides]).replace(" ", "_")
                own = [*settings, f"data.shards={shards}", f"run.seed={seed}", *overrides]
                runs.append(train(folder, attack, own))
            some = losses[attack, name] = list(map(loss_of, runs))
            each = ", ".join(f"{loss:.3f}" for loss in some)
            row([attack, name, f"{mean(some):.4f}", each, "; ".join(map(held_down, runs))])
    print()
    header(["honest", "difference to plain", "95 % interval"])
    for name in list(SETTINGS)[1:]:
        pairs = zip(losses["none", "plain"], losses["none", name], strict=True)
        differences = [robust - plain for plain, robust in pairs]
        interval = "one seed tells none"
        if len(differences) > 1:
            half = T_95[len(differences)] * stdev(differences) / math.sqrt(len(differences))
            interval = f"{mean(differences) - half:+.4f} ... {mean(differences) + half:+.4f}"
        row([name, f"{mean(differences):+.4f}", interval])


if __name__ == "__main__":
    main()
