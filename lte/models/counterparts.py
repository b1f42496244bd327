"""Architectures of the transformers library that compute what the reference models compute.

gpt is Arcee with a GELU, vit is ViT. They sum in another order there, so results agree to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lte.config import Model
from lte.errors import UserError


@dataclass(frozen=True)
class Counterpart:
    """What a recipe's model is in the transformers library.

    Attributes:
        model: the recipe of the model there.
        names: of a parameter here, those that it is there, where they lie one below the other. What is not
            in it has the same name there.
    """

    model: Model
    names: Mapping[str, tuple[str, ...]]

    def of(self, name: str) -> tuple[str, ...]:
        """Names there of a parameter or buffer here."""
        return self.names.get(name, (name,))

    @torch.no_grad()
    def fill(self, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
        """Copy tensors of a model here, as of its state dict, into those of the model there."""
        for name, tensor in ours.items():
            for part, piece in self.cut(name, tensor):
                theirs[part].copy_(piece.reshape(theirs[part].shape))

    def cut(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name there and rows of each part of a tensor here, or of what has its rows."""
        parts = self.of(name)
        # A scalar has no rows to cut.
        yield from zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else [tensor], strict=True)

    def take(self, theirs: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
        """Remove from the tensors of a model there what a tensor here is made of, and make it."""
        parts = [theirs.pop(part) for part in self.of(name)]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(shape)


def counterpart_of(config: Model) -> Counterpart:
    """The counterpart of a recipe's model; one of transformers' is its own.

    Raises:
        UserError: it has none.
    """
    if config.name == "transformers":
        return Counterpart(config, {})
    if config.name == "linear":
        raise UserError("model.name: linear is no model of transformers; use a .safetensors file")
    settings: dict[str, Any] = {
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": "gelu",
    }
    if config.name == "gpt":
        architecture, names = "arcee", _names_of_gpt(config.num_layers)
        settings |= {
            "num_key_value_heads": config.num_attention_heads,
            "max_position_embeddings": config.context_tokens,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": config.tie_embeddings,
        }
    else:
        architecture, names = "vit", _names_of_vit(config.num_layers)
        settings |= {"patch_size": config.patch_size, "layer_norm_eps": 1e-6, "qkv_bias": True}
    theirs = Model(
        name="transformers",
        architecture=architecture,
        config=settings,
        **{name: getattr(config, name) for name in _OF_THE_DATA},
    )
    return Counterpart(theirs, names)


_OF_THE_DATA = ("context_tokens", "vocab_size", "image_size", "channels", "num_classes")


def _names_of_gpt(num_layers: int) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {
        "embedding.weight": ("model.embed_tokens.weight",),
        "norm.weight": ("model.norm.weight",),
        "output.weight": ("lm_head.weight",),
    }
    for k in range(num_layers):
        ours, theirs = f"blocks.{k}", f"model.layers.{k}"
        names |= {
            f"{ours}.attention_norm.weight": (f"{theirs}.input_layernorm.weight",),
            f"{ours}.attention.qkv.weight": tuple(f"{theirs}.self_attn.{x}_proj.weight" for x in "qkv"),
            f"{ours}.attention.out.weight": (f"{theirs}.self_attn.o_proj.weight",),
            f"{ours}.mlp_norm.weight": (f"{theirs}.post_attention_layernorm.weight",),
            f"{ours}.mlp.up.weight": (f"{theirs}.mlp.up_proj.weight",),
            f"{ours}.mlp.down.weight": (f"{theirs}.mlp.down_proj.weight",),
        }
    return names


def _names_of_vit(num_layers: int) -> dict[str, tuple[str, ...]]:
    modules: dict[str, tuple[str, ...]] = {
        "patches": ("vit.embeddings.patch_embeddings.projection",),
        "norm": ("vit.layernorm",),
        "output": ("classifier",),
    }
    for k in range(num_layers):
        ours, theirs = f"blocks.{k}", f"vit.layers.{k}"
        modules |= {
            f"{ours}.attention_norm": (f"{theirs}.layernorm_before",),
            f"{ours}.attention.qkv": tuple(f"{theirs}.attention.{x}_proj" for x in "qkv"),
            f"{ours}.attention.out": (f"{theirs}.attention.o_proj",),
            f"{ours}.mlp_norm": (f"{theirs}.layernorm_after",),
            f"{ours}.mlp.up": (f"{theirs}.mlp.fc1",),
            f"{ours}.mlp.down": (f"{theirs}.mlp.fc2",),
        }
    names = {
        f"{ours}.{leaf}": tuple(f"{name}.{leaf}" for name in theirs)
        for ours, theirs in modules.items()
        for leaf in ("weight", "bias")
    }
    return names | {
        "class_token": ("vit.embeddings.cls_token",),
        "positions": ("vit.embeddings.position_embeddings",),
    }
