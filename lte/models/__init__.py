"""The models that recipes name."""

from __future__ import annotations

from torch import nn

from lte.models.gpt import GPT, build

__all__ = ["GPT", "build", "initialize"]


def initialize(model: nn.Module, seed: int) -> None:
    """Give a model of a recipe, which has memory, the initial weights of this seed."""
    assert isinstance(model, GPT)
    model.initialize(seed)
