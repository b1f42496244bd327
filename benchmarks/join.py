"""What it costs that a worker joins in the middle of a run, where its heads have no moments yet.

    python benchmarks/join.py SHARDS [--seeds 4] [--warmups 0,5,10,20,50] [key=value ...]

A small GPT on packed text, trained in this process: two workers; at 40 % of the run two more join, without
warmup of their own or with some steps of it (`schedule.join_warmup_steps`). All cases of a seed share what
came before the join, so that their losses compare in pairs; `never` is the run that nobody joins. Prints
a markdown table: norms of the joiners' contributions over the others', in rounds since the join; the
published validation loss less that of `never`, after rounds since the join and at the end.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from statistics import mean

import torch
from runs import header, row

from lte import config, recipes
from lte.compress import CODES, SCALES, factors
from lte.config import Recipe
from lte.data import TrainingStream
from lte.models import build
from lte.nn import convert
from lte.server.master import Master, Received
from lte.tasks import task_of
from lte.worker.trainer import Trainer, materialize

WORKERS, JOINERS = 2, 2
SHOWN = (1, 2, 4, 8)
"""Rounds since the join that are shown."""
RECIPE = {
    "model.num_layers": 2,
    "model.width": 64,
    "model.mlp_width": 256,
    "model.context_tokens": 64,
    "train.rounds": 60,
    "train.local_steps": 5,
    "train.workers": WORKERS,
    "lora.rank": 32,
    "base.quant": "nf4",
    "optimizer.name": "adamw",
    "optimizer.lr": 2e-3,
    "schedule.warmup_steps": 20,
    "eval.tokens": 32768,
}


@dataclass
class Run:
    """A server and its workers, stepped by hand."""

    recipe: Recipe
    master: Master
    trainers: list[Trainer]
    version: int = 0

    def join(self) -> None:
        """One more worker, in the next slot."""
        model = materialize(
            convert(build(self.recipe.model), self.recipe.lora, self.recipe.base.quant), torch.device("cpu")
        )
        trainer = Trainer(
            model,
            self.recipe,
            slot=len(self.trainers),
            version=self.version,
            base=self.master.snapshot(),
            base_digest=self.master.base_digest(),
        )
        self.trainers.append(trainer)

    def round(self, streams: list[TrainingStream]) -> list[float]:
        """One round. Returns the norms of the workers' contributions."""
        received, norms = [], []
        for slot, trainer in enumerate(self.trainers):
            for step in range(self.recipe.train.local_steps):
                batch = streams[slot].batch(self.version * self.recipe.train.local_steps + step)
                task_of(self.recipe).loss(trainer.model, batch).backward()  # type: ignore[no-untyped-call]
                trainer.step()
            norms.append(norm(trainer))
            worker_id, heads, rank = f"w{slot}", trainer.heads, trainer.rank
            tensors = self.master.decode(dict(trainer.contribution()), worker_id, heads, rank)
            first_head, draw = trainer.first_head, trainer.draw
            received.append(Received(worker_id, heads, rank, first_head, draw, 1, tensors))
        self.master.merge(received, 0)
        before, update = self.master.requantize(), self.master.publish_dense()
        for name, change in self.master.changes_since(before):
            update |= {name + CODES: change.codes, name + SCALES: change.scales}
        self.version += 1
        for trainer in self.trainers:
            trainer.apply(self.version, update, self.master.base_digest(), merged=True, whole=False)
        return norms

    @torch.no_grad()
    def loss(self) -> float:
        """Of the published model."""
        model = materialize(build(self.recipe.model), torch.device("cpu")).eval()
        self.master.fill(model, "published")
        return task_of(self.recipe).evaluate(model, self.recipe.eval.tokens).loss or 0.0


def norm(trainer: Trainer) -> float:
    """Of s (B A - B' A'), over all modules."""
    total = 0.0
    for module in trainer.modules.values():
        A, B = module.lora_A.detach(), module.lora_B.detach()
        merged_A = torch.zeros_like(A) if module.merged_A is None else module.merged_A
        merged_B = torch.zeros_like(B) if module.merged_B is None else module.merged_B
        squared, _ = factors.lost(B, A, merged_B, merged_A)
        total += module.scale**2 * squared
    return total**0.5


def measure(recipe: Recipe, warmups: list[int]) -> dict[str, tuple[list[float], list[float]]]:
    """Case -> ratios of norms and losses, after the `SHOWN` rounds since the join; losses at the end, too."""
    streams = [
        TrainingStream(
            recipe.data.shards,
            context_tokens=recipe.model.context_tokens,
            batch_size=recipe.train.batch_size,
            seed=recipe.run.seed,
            worker=worker,
            num_workers=WORKERS,
        )
        for worker in range(WORKERS + JOINERS)
    ]
    run = Run(recipe, Master(recipes.initial_model(recipe), recipe), [])
    for _ in range(WORKERS):
        run.join()
    joined = 2 * recipe.train.rounds // 5
    for _ in range(joined):
        run.round(streams)
    found = {}
    for case in ["never", *map(str, warmups)]:
        branch = copy.deepcopy(run)
        if case != "never":
            branch.recipe = config.replace(recipe, **{"schedule.join_warmup_steps": int(case)})
            for _ in range(JOINERS):
                branch.join()
        ratios, losses = [], []
        for since in range(1, recipe.train.rounds - joined + 1):
            norms = branch.round(streams)
            if since in SHOWN:
                ratios.append(mean(norms[WORKERS:] or norms) / mean(norms[:WORKERS]))
                losses.append(branch.loss())
        found[case] = ratios, [*losses, branch.loss()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--warmups", default="0,5,10,20,50")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    given = dict(override.split("=") for override in arguments.overrides)
    settings = RECIPE | {"data.shards": arguments.shards} | given
    warmups = [int(each) for each in arguments.warmups.split(",")]
    found = [
        measure(config.replace(Recipe(), **settings, **{"run.seed": seed}), warmups)
        for seed in range(arguments.seeds)
    ]
    after = [f"after {since}" for since in SHOWN]
    header(
        ["warmup", *(f"norm {words}" for words in after), *(f"loss {words}" for words in after), "at the end"]
    )
    for case in found[0]:
        ratios = [mean(each) for each in zip(*(seed[case][0] for seed in found), strict=True)]
        losses = list(zip(*(seed[case][1] for seed in found), strict=True))
        never = list(zip(*(seed["never"][1] for seed in found), strict=True))
        cells = []
        for mine, theirs in zip(losses, never, strict=True):
            gaps = [a - b for a, b in zip(mine, theirs, strict=True)]
            spread = (max(gaps) - min(gaps)) / 2
            cells.append(f"{mean(mine):.4f}" if case == "never" else f"{mean(gaps):+.4f} ± {spread:.4f}")
        row([case, *(f"{ratio:.2f}" for ratio in ratios), *cells])


if __name__ == "__main__":
    main()
