"""A classifier of packed images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lte import models
from lte.config import Recipe
from lte.data import ImageIndex, Images, TrainingImages, validation_images
from lte.errors import ConfigError
from lte.server.evaluation import Measured

EVAL_BATCH = 256
"""Images evaluated at a time."""


class Classes:
    """See `base.Task`. What counts where the records speak of tokens are images."""

    unit = "nats an image"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def build(self) -> nn.Module:
        return models.build(self.recipe.model, "images")

    def initialize(self, model: nn.Module, seed: int) -> None:
        models.initialize(model, seed)

    def loss(self, model: nn.Module, batch: Images) -> Tensor:
        logits, auxiliary = models.outputs(model, batch.pixels)
        loss = F.cross_entropy(logits, batch.labels)
        return loss if auxiliary is None else loss + auxiliary

    def stream(self, slot: int) -> TrainingImages:
        return TrainingImages(
            self.recipe.data.shards,
            batch_size=self.recipe.train.batch_size,
            augment=self.recipe.data.augment,
            seed=self.recipe.run.seed,
            worker=slot,
            num_workers=self.recipe.train.workers,
        )

    def noise(self, num_samples: int, device: torch.device) -> Images:
        model = self.recipe.model
        shape = (num_samples, model.channels, model.image_size, model.image_size)
        labels = torch.randint(model.num_classes, (num_samples,), device=device)
        return Images(torch.randn(shape, device=device), labels)

    def num_tokens(self, batch: Images) -> int:
        return len(batch.labels)

    def evaluate(self, model: nn.Module, max_tokens: int) -> Measured:
        """Extra: `accuracy`, the share of the images whose class is the model's likeliest."""
        total, right, count = 0.0, 0, 0
        for images in validation_images(
            self.recipe.data.shards, batch_size=EVAL_BATCH, max_images=max_tokens
        ):
            logits, _ = models.outputs(model, images.pixels)
            total += float(F.cross_entropy(logits, images.labels, reduction="sum"))
            right += int((logits.argmax(1) == images.labels).sum())
            count += len(images.labels)
        return Measured(total / count, {"accuracy": right / count})

    def check(self) -> None:
        data, model = self.recipe.data, self.recipe.model
        index = ImageIndex.load(data.shards)
        faults = []
        if (index.height, index.width) != (model.image_size, model.image_size):
            faults.append(
                f"model.image_size: {model.image_size}, but the images of {data.shards} are"
                f" {index.width}x{index.height} pixels; set it, and pack them square"
            )
        if index.channels != model.channels:
            faults.append(
                f"model.channels: {model.channels}, but the images of {data.shards} have {index.channels};"
                f" set model.channels={index.channels}"
            )
        if len(index.classes) > model.num_classes:
            faults.append(
                f"model.num_classes: {model.num_classes} is less than the {len(index.classes)} classes of"
                f" {data.shards}; set model.num_classes={len(index.classes)}"
            )
        if faults:
            raise ConfigError(faults)

    def check_run(self) -> None:
        self.check()
        self.build()
        for slot in range(self.recipe.train.workers):
            self.stream(slot)
        validation_images(self.recipe.data.shards, batch_size=EVAL_BATCH)
