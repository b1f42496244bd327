"""How dense weights lie as matrices, for an optimizer that steps these as such."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lte.nn.kinds import is_depthwise, kind_of

Layout = Literal["matrices", "kernel", "transposed"]
"""Matrices (..., out, in); or one as (out, in, ...); or one as (in, out, ...)."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def layouts(model: nn.Module) -> dict[nn.Parameter, Layout]:
    """The layout of each weight that is a matrix and does not lie as (out, in).

    Kernels are matrices as heads see them, also of groups: (out, in / groups * kh * kw); a transposed
    convolution's is (out / groups * kh * kw, in). Depthwise kernels are none: each of their channels has a
    vector of its own.
    """
    found: dict[nn.Parameter, Layout] = {}
    for module in model.modules():
        if isinstance(module, _CONVOLUTIONS + _TRANSPOSED):
            weight = module._parameters.get("weight")  # none where torch computes it of others
            if weight is not None and not is_depthwise(module):
                found[weight] = "transposed" if isinstance(module, _TRANSPOSED) else "kernel"
        elif (kind := kind_of(module)) is not None:
            found |= {
                module.get_parameter(slot.attribute): "transposed"
                for slot in kind.slots(module)
                if slot.transposed
            }
    return found


def as_matrices(weight: Tensor, layout: Layout) -> Tensor:
    """A weight, or what is of its shape, as matrices (..., out, in)."""
    if layout == "matrices":
        return weight
    return weight.flatten(1) if layout == "kernel" else weight.flatten(1).mT


def from_matrices(matrices: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
    """What has a weight's shape and these matrices; undoes `as_matrices`."""
    return (matrices.mT if layout == "transposed" else matrices).reshape(shape)
