"""Modules with heads on frozen bases, and the conversion of any module to them."""

from lte.nn.adapted import Adapted
from lte.nn.convert import (
    Plan,
    adapted_modules,
    convert,
    dense_parameters,
    describe,
    difference,
    draw_A,
    draw_heads,
    lora_of,
    parameter_groups,
    plan,
    plan_of,
)
from lte.nn.embedding import LoRAEmbedding
from lte.nn.linear import LoRALinear
from lte.nn.recompute import blocks, recompute_activations

__all__ = [
    "Adapted",
    "LoRAEmbedding",
    "LoRALinear",
    "Plan",
    "adapted_modules",
    "blocks",
    "convert",
    "dense_parameters",
    "describe",
    "difference",
    "draw_A",
    "draw_heads",
    "lora_of",
    "parameter_groups",
    "plan",
    "plan_of",
    "recompute_activations",
]
