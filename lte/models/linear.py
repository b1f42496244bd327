"""A single linear map: what linear regression trains."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lte.config import Model
from lte.lowrank import generator_of


class Linear(nn.Module):
    """y = x W^T, W of shape (width, width), without a bias."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.map = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(samples, width) both ways."""
        y: Tensor = self.map(x)
        return y

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Normal, of standard deviation 1 / sqrt(width): outputs as large as inputs."""
        weight = self.map.weight
        nn.init.normal_(weight, std=1 / math.sqrt(len(weight)), generator=generator_of(seed, "init", "map"))
