"""Modules with heads on frozen bases, and the conversion of any module to them."""

from lte.nn.adapted import Adapted
from lte.nn.attention import LoRAMultiheadAttention
from lte.nn.constants import changing_buffers, constant_tensors, mark_statistics, statistics
from lte.nn.conv import LoRAConv2d
from lte.nn.convert import convert, draw_A, draw_heads, fit_heads, parameter_groups
from lte.nn.division import divide, part_of, sizes_of
from lte.nn.embedding import LoRAEmbedding
from lte.nn.experts import (
    Experts,
    experts_split,
    has_split_experts,
    join_experts,
    places_in_stacks,
    split_experts,
)
from lte.nn.isolation import rehearse, watch_slices
from lte.nn.layouts import Layout, as_matrices, from_matrices, layouts
from lte.nn.linear import LoRALinear
from lte.nn.plan import (
    Plan,
    adapted_modules,
    dense_parameters,
    describe,
    difference,
    frozen_parameters,
    lora_of,
    plan,
    plan_of,
    without_heads,
)
from lte.nn.recompute import blocks, recompute_activations
from lte.nn.sites import HeadSpec, from_matrix, to_matrix

__all__ = [
    "Adapted",
    "Experts",
    "HeadSpec",
    "Layout",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "Plan",
    "adapted_modules",
    "as_matrices",
    "blocks",
    "changing_buffers",
    "constant_tensors",
    "convert",
    "dense_parameters",
    "describe",
    "difference",
    "divide",
    "draw_A",
    "draw_heads",
    "experts_split",
    "fit_heads",
    "from_matrices",
    "from_matrix",
    "frozen_parameters",
    "has_split_experts",
    "join_experts",
    "layouts",
    "lora_of",
    "mark_statistics",
    "parameter_groups",
    "part_of",
    "places_in_stacks",
    "plan",
    "plan_of",
    "recompute_activations",
    "rehearse",
    "sizes_of",
    "split_experts",
    "statistics",
    "to_matrix",
    "watch_slices",
    "without_heads",
]
