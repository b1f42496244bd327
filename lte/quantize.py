"""The frozen base: blockwise 4-bit (NF4) and 8-bit codes, and the digest of what they hold.

NF4 has bitsandbytes' layout and uses its kernels: the weight is read as blocks of `BLOCK` elements
in row-major order (a block may span two rows), two codes a byte with the first element in the high
nibble, and one fp32 scale, the largest magnitude, a block. The kernels are called on (n / BLOCK,
BLOCK) views only: on CPUs bitsandbytes <= 0.50 dequantizes blocks that straddle rows wrongly.
Codes and scales are bit for bit the same for any number of threads.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Quant = Literal["nf4", "int8", "none"]
BLOCK = 64
"""Elements that share one scale."""


@dataclass(frozen=True)
class Quantized:
    """A weight as its base holds it.

    Attributes:
        quant: the format.
        shape: (out, in) of the weight.
        codes: `nf4` uint8 (ceil(n / BLOCK) * BLOCK / 2,), `int8` int8 (ceil(n / BLOCK) * BLOCK,),
            `none` the fp32 weight itself, (n,); n = out * in.
        scales: fp32, one a block; empty for `none`.
    """

    quant: Quant
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor


@cache
def _kernels() -> Any:
    """bitsandbytes' operators. Imported late: it takes 2 s that `none` and `int8` need not pay."""
    # On import it complains about an optional kernel package that nothing here calls.
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    import bitsandbytes  # noqa: F401

    logger.setLevel(level)
    return torch.ops.bitsandbytes


def num_blocks(shape: tuple[int, int]) -> int:
    """Blocks of a weight of this shape; the last one is filled up with zeros."""
    return -(-shape[0] * shape[1] // BLOCK)


def empty(shape: tuple[int, int], quant: Quant, device: torch.device | str) -> Quantized:
    """A base of zeros: right shapes and dtypes, to be filled from a server."""
    blocks = num_blocks(shape)
    if quant == "nf4":
        codes = torch.zeros(blocks * BLOCK // 2, dtype=torch.uint8, device=device)
    elif quant == "int8":
        codes = torch.zeros(blocks * BLOCK, dtype=torch.int8, device=device)
    else:
        codes = torch.zeros(shape[0] * shape[1], device=device)
    scales = torch.zeros(0 if quant == "none" else blocks, device=device)
    return Quantized(quant, shape, codes, scales)


def quantize(weight: Tensor, quant: Quant) -> Quantized:
    """Quantize a weight (out, in) of dtype fp32."""
    out_features, in_features = weight.shape
    shape = (out_features, in_features)
    if quant == "none":
        return Quantized(quant, shape, weight.detach().reshape(-1).clone(), weight.new_zeros(0))
    flat = weight.detach().reshape(-1)
    padding = num_blocks(shape) * BLOCK - flat.numel()
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    blocks = flat.reshape(-1, BLOCK)
    if quant == "nf4":
        codes, scales = _kernels().quantize_4bit.default(blocks, BLOCK, "nf4", torch.uint8)
        return Quantized(quant, shape, codes.reshape(-1), scales)
    scales = blocks.abs().amax(dim=1) / 127
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    int8 = torch.round(blocks / safe[:, None]).to(torch.int8).reshape(-1)
    return Quantized(quant, shape, int8, scales)


def dequantize(base: Quantized) -> Tensor:
    """The weight (out, in), fp32, that a base stands for."""
    if base.quant == "none":
        return base.codes.view(base.shape)
    blocks = base.scales.numel()
    if base.quant == "nf4":
        flat = _kernels().dequantize_4bit.default(
            base.codes.view(-1, 1), base.scales, BLOCK, "nf4", (blocks, BLOCK), torch.float32
        )
    else:
        flat = base.codes.view(blocks, BLOCK).to(torch.float32) * base.scales[:, None]
    n = base.shape[0] * base.shape[1]
    weight: Tensor = flat.view(-1)[:n].view(base.shape)
    return weight


def digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256, in hex, of names, dtypes, shapes and bits of tensors, in the given order."""
    sha = hashlib.sha256()
    for name, tensor in named:
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        host = tensor.detach().cpu().contiguous()
        # reshape: a 0-dimensional tensor has no other integer view
        sha.update(host.reshape(-1).view(torch.uint8).numpy().data if host.numel() else b"")
    return sha.hexdigest()
