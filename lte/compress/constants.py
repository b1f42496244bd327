"""Tensors of any type that travel once, to the bit."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lte import quantize
from lte.compress.entropy import expand, squeeze
from lte.errors import WireError


def encode(tensor: Tensor) -> Tensor:
    """The bytes of a tensor on the CPU. Masks and positions are squeezed; of floating-point numbers these
    are the tensor's own memory, where it is contiguous."""
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    return raw if _is_noise(tensor.dtype) else squeeze(raw)


def decode(blob: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that `encode` made these bytes of.

    Raises:
        WireError: it did not.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = blob.clone() if _is_noise(dtype) else expand(blob, num_bytes)  # a clone is aligned
    if raw.numel() != num_bytes:
        raise WireError(f"{raw.numel()} bytes where {num_bytes} are due")
    return raw.view(dtype).view(shape)


def digests(named: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What a digest of the published model begins with: a digest of the constants, where there are any."""
    return (quantize.digest(named.items()),) if named else ()


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> None:
    """Copy constants into a model's tensors of these names. One that is right is left alone: it may be
    many views of one element."""
    for name, constant in constants.items():
        here = constant.to(tensors[name].device)
        if not torch.equal(tensors[name], here):
            tensors[name].copy_(here)


def _is_noise(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
