"""The models that recipes name: small reference ones, and any of the transformers library."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lte.config import Model
from lte.models import hf
from lte.models.gpt import GPT
from lte.models.linear import Linear
from lte.models.vit import ViT
from lte.nn import split_experts

__all__ = ["GPT", "Linear", "ViT", "build", "initialize", "outputs"]

_REFERENCES = {"gpt": GPT, "vit": ViT, "linear": Linear}


def build(config: Model, kind: hf.Kind = "text") -> nn.Module:
    """The model of a recipe, on the meta device: shapes without memory. Experts have matrices of their own.

    Args:
        kind: of the data, where the model is one for several.

    Raises:
        ConfigError: settings of which no model can be made. UserError: a library is missing.
    """
    with torch.device("meta"):
        if config.name == "transformers":
            return split_experts(hf.build(config, kind))
        return _REFERENCES[config.name](config)


def initialize(model: nn.Module, seed: int) -> None:
    """Give a model from `build` that has memory now the initial weights of this seed."""
    if isinstance(model, GPT | ViT | Linear):
        model.initialize(seed)
    else:
        hf.initialize(model, seed)


def outputs(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """A model's logits, and the loss of its own that it is to be trained with beside that of the data, if
    it has one."""
    if isinstance(model, GPT | ViT | Linear):
        return model(inputs), None
    return hf.outputs(model, inputs)
