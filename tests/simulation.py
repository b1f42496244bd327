"""Rounds without processes or sockets: one Master, N Trainers, the arithmetic of a real run."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

import lte
from lte import config
from lte.compress import CODES, SCALES, changes
from lte.config import Recipe
from lte.server.master import Master, Received
from lte.worker.trainer import Trainer

Loss = Callable[[nn.Module, object], torch.Tensor]


class Cap(NamedTuple):
    """Most lora_rank and number of a worker's heads, and their lora_scale; 0: the recipe's."""

    rank: int = 0
    heads: int = 0
    scale: float = 0.0


def recipe(**settings: object) -> Recipe:
    """A recipe with plain SGD, no clipping, no warmup, a constant rate and nothing left out on the
    wire, changed by settings."""
    plain = {
        "optimizer.name": "sgd",
        "optimizer.clip_norm": 0.0,
        "schedule.name": "constant",
        "schedule.warmup_steps": 0,
        "lora.rank": 4,
        "lora.scale": 2.0,
        "base.quant": "none",
        "compress.factors": "fp32",
        "compress.dense": "fp32",
    }
    return config.replace(Recipe(), **(plain | settings))


class Simulation:
    """N workers and a server, stepped by hand."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        num_workers: int,
        caps: Sequence[Cap | tuple[int, int]] = (),
    ) -> None:
        """Args: caps: of the heads of each worker; by default the recipe's."""
        self.recipe = recipe
        self.master = Master(model, recipe)
        self.trainers = [
            Trainer(
                lte.convert(
                    copy.deepcopy(model), recipe.as_built.lora.capped(*cap), recipe.as_built.base.quant
                ),
                recipe,
                slot=slot,
                version=0,
                base=self.master.snapshot(),
                base_digest=self.master.base_digest(),
                scale=cap.scale,
            )
            for slot, cap in enumerate(Cap(*cap) for cap in caps or [Cap()] * num_workers)
        ]

    def local_steps(self, loss: Loss, batches: Sequence[Sequence[object]]) -> None:
        """Every worker trains on its own batches, one a local step."""
        for trainer, own in zip(self.trainers, batches, strict=True):
            for batch in own:
                loss(trainer.model, batch).backward()
                trainer.step()

    def merge(
        self,
        only: Sequence[int] | None = None,
        ahead: Callable[[], None] | None = None,
        tokens: Sequence[int] = (),
    ) -> None:
        """Merge the contributions of these workers (all by default); everyone takes the update.

        Args:
            ahead: takes local steps of the next round after contributions are encoded and before the
                update is applied, as a worker that overlaps does.
            tokens: that each worker counts; 1 by default.
        """
        chosen = list(range(len(self.trainers)) if only is None else only)
        received = []
        for slot, trainer in enumerate(self.trainers):
            merged_digest = trainer.merged_digest()
            blobs = dict(trainer.contribution())
            most = self.master.max_contribution(trainer.heads, trainer.rank)
            assert all(blob.numel() <= most[name] for name, blob in blobs.items())
            if slot in chosen:
                assert merged_digest == self.master.merged_digest(f"w{slot}", trainer.heads, trainer.rank)
                assert trainer.base_digest() == self.master.base_digest()
                assert trainer.given_digest() == self.master.given_digest(
                    trainer.first_head, trainer.heads, trainer.rank, trainer.draw
                )
                received.append(
                    Received(
                        worker_id=f"w{slot}",
                        heads=trainer.heads,
                        rank=trainer.rank,
                        scale=trainer.scale,
                        first_head=trainer.first_head,
                        draw=trainer.draw,
                        tokens=tokens[slot] if tokens else 1,
                        tensors=self.master.decode(blobs, f"w{slot}", trainer.heads, trainer.rank),
                    )
                )
        missing = sum(t.heads for slot, t in enumerate(self.trainers) if slot not in chosen)
        if ahead is not None:
            for trainer in self.trainers:
                trainer.go_ahead()
            ahead()
        self.outcome = self.master.merge(received, missing)
        version = self.trainers[0].version + 1
        self.master.enter(version)
        before = self.master.requantize()
        blobs = self.master.publish_dense()
        whole = changes.is_reformatted(before, self.master.base)
        if whole:
            blobs = self.master.snapshot()
        else:
            for name, change in self.master.changes_since(before):
                blobs |= {name + CODES: change.codes, name + SCALES: change.scales}
        for slot, trainer in enumerate(self.trainers):
            trainer.apply(
                version,
                blobs,
                self.master.base_digest(),
                merged=slot in chosen,
                whole=whole,
            )
