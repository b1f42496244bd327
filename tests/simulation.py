"""Rounds without processes or sockets: one Master, N Trainers, the arithmetic of a real run."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

import lte
from lte import config
from lte.config import Recipe
from lte.server.master import Master, Received
from lte.worker.trainer import Trainer

Loss = Callable[[nn.Module, object], torch.Tensor]


def recipe(**settings: object) -> Recipe:
    """A recipe with plain SGD, no clipping, no warmup and a constant rate, changed by settings."""
    plain = {
        "optimizer.name": "sgd",
        "optimizer.clip_norm": 0.0,
        "schedule.name": "constant",
        "schedule.warmup_steps": 0,
        "lora.rank": 4,
        "lora.scale": 2.0,
        "base.quant": "none",
    }
    return config.replace(Recipe(), **(plain | settings))


class Simulation:
    """N workers and a server, stepped by hand."""

    def __init__(self, model: nn.Module, recipe: Recipe, num_workers: int) -> None:
        self.recipe = recipe
        self.master = Master(model, recipe)
        self.trainers = [
            Trainer(
                lte.convert(copy.deepcopy(model), recipe.lora, recipe.base.quant),
                recipe,
                slot=slot,
                version=0,
                base=self.master.published(),
                base_digest=self.master.base_digest(),
            )
            for slot in range(num_workers)
        ]

    def local_steps(self, loss: Loss, batches: Sequence[Sequence[object]]) -> None:
        """Every worker trains on its own batches, one a local step."""
        for trainer, own in zip(self.trainers, batches, strict=True):
            for batch in own:
                loss(trainer.model, batch).backward()
                trainer.step()

    def merge(self, only: Sequence[int] | None = None) -> None:
        """Merge the contributions of these workers (all by default); everyone takes the update."""
        chosen = list(range(len(self.trainers)) if only is None else only)
        received = []
        for slot, trainer in enumerate(self.trainers):
            tensors = {name: tensor.clone() for name, tensor in trainer.contribution().items()}
            if slot in chosen:
                assert trainer.merged_digest() == self.master.merged_digest(slot)
                assert trainer.base_digest() == self.master.base_digest()
                assert trainer.given_digest() == self.master.given_digest(
                    trainer.first_head, trainer.heads, trainer.draw
                )
                received.append(
                    Received(
                        incarnation=slot,
                        heads=trainer.heads,
                        first_head=trainer.first_head,
                        draw=trainer.draw,
                        tokens=1,
                        tensors=tensors,
                    )
                )
        missing = sum(t.heads for slot, t in enumerate(self.trainers) if slot not in chosen)
        self.master.merge(received, missing)
        for slot, trainer in enumerate(self.trainers):
            trainer.apply(
                trainer.version + 1,
                self.master.published(),
                self.master.base_digest(),
                merged=slot in chosen,
            )
