"""What travels in place of factors, dense deltas and bases, and what the receiver makes of it.

Both ends call the same functions, so that a worker knows to the bit what the server rebuilt. All
that travels is named bytes: `MODULE/A` and `MODULE/B` for factors, `MODULE/codes` and `MODULE/scales`
for a base or its change, `PARAMETER/dense` for a dense parameter or its change (`/dense.0`,
`/dense.1` where several versions' changes come together), `NAME/constant` for what stays as it is.

    blockwise   codecs of small tensors
    factors     the change of factors; rank truncation; refitting B to a sent A
    changes     the change of a base's codes and scales
    constants   tensors that travel once, to the bit
    entropy     bytes squeezed by zstd
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lte.compress import blockwise, changes, constants, factors
from lte.compress.factors import A, B
from lte.quantize import Quantized

CODES, SCALES, DENSE, CONSTANT = "/codes", "/scales", "/dense", "/constant"
"""Endings of names: the base, the dense change and the constant of what is named before them."""

KINDS = ("factors", "dense", "codes", "scales")
"""What bytes are counted as; all others are control."""

__all__ = [
    "CODES",
    "CONSTANT",
    "DENSE",
    "KINDS",
    "SCALES",
    "A",
    "B",
    "blockwise",
    "changes",
    "constants",
    "factors",
    "kind_of",
    "tensors_of",
]


def kind_of(name: str) -> str:
    """What the bytes of this name are counted as; constants are with the dense."""
    ending = name.rpartition("/")[2].partition(".")[0]
    return {"A": "factors", "B": "factors", "constant": "dense"}.get(ending, ending)


def tensors_of(bases: Mapping[str, Quantized], dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is published, as named tensors in one order: for digests and checkpoints."""
    tensors: dict[str, Tensor] = {}
    for name, base in bases.items():
        tensors |= {name + CODES: base.codes, name + SCALES: base.scales}
    return tensors | {name + DENSE: tensor for name, tensor in dense.items()}
