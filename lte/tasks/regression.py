"""Linear regression, the smallest task: the best update of rank r of its weight is known in closed form.

Y = X W*^T without noise, X and W* drawn from the run's seed. W* - W_0, which training has to find, has full
rank. The loss of an error E = W - W* is ||E||_F^2 / width in expectation over X, so that after an update of
rank r it is at least the sum of squares of the singular values of W* - W_0 but the r largest, over width
(Eckart & Young 1936).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lte import models
from lte.config import Recipe
from lte.lowrank import generator_of
from lte.server.evaluation import Measured

VALIDATION_SAMPLES = 4096


class Regression:
    """See `base.Task`. A batch is (samples, 2, width): x and y. What counts where the records speak of tokens
    are samples. `data.shards` is not read."""

    unit = "squared error"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def build(self) -> nn.Module:
        return models.build(self.recipe.model)

    def initialize(self, model: nn.Module, seed: int) -> None:
        models.initialize(model, seed)

    def solution(self) -> Tensor:
        """W* (width, width): normal, of standard deviation 1 / sqrt(width)."""
        width = self.recipe.model.width
        generator = generator_of(self.recipe.run.seed, "regression", "solution")
        return torch.randn(width, width, generator=generator) / math.sqrt(width)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        outputs, _ = models.outputs(model, batch[:, 0])
        return F.mse_loss(outputs, batch[:, 1])

    def stream(self, slot: int) -> Samples:
        return Samples(self.recipe, self.solution(), slot)

    def noise(self, num_samples: int, device: torch.device) -> Tensor:
        return torch.randn(num_samples, 2, self.recipe.model.width, device=device)

    def num_tokens(self, batch: Tensor) -> int:
        return len(batch)

    def evaluate(self, model: nn.Module, max_tokens: int) -> Measured:
        samples = _draw(self.recipe, self.solution(), VALIDATION_SAMPLES, "valid")
        return Measured(float(self.loss(model, samples[: max_tokens or None])))

    def check(self) -> None:
        """There is nothing that could be missing."""

    def check_run(self) -> None:
        self.check()


class Samples:
    """See `base.Stream`. No sample comes twice."""

    def __init__(self, recipe: Recipe, solution: Tensor, slot: int) -> None:
        self._recipe, self._solution, self._slot = recipe, solution, slot

    def batch(self, step: int) -> Tensor:
        return _draw(self._recipe, self._solution, self._recipe.train.batch_size, "train", self._slot, step)


def _draw(recipe: Recipe, solution: Tensor, num_samples: int, *which: int | str) -> Tensor:
    """(num_samples, 2, width): standard normal x, and y = x W*^T."""
    generator = generator_of(recipe.run.seed, "regression", *which)
    x = torch.randn(num_samples, len(solution), generator=generator)
    return torch.stack([x, x @ solution.T], dim=1)
