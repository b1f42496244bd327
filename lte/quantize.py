"""The frozen base: blockwise 4-bit (NF4) and 8-bit codes, and the digest of what they hold.

A weight is read as blocks of `BLOCK` elements in row-major order (a block may span two rows), and
the last block is filled up with zeros. NF4 has bitsandbytes' layout: two codes a byte, the first
element in the high nibble.

Scales are bf16: rounded first, and codes are the nearest ones under the rounded scale. When a base is
brought up to its weight again (`requantize`) scales are sticky and codes may be, so a base depends on
its history and is part of every checkpoint.

The quantizers are our own; NF4's codes are counted by 15 comparisons, in numpy, a chunk of the cache's
size at a time (a dozen times bitsandbytes' speed on a CPU). Dequantizing NF4 is bitsandbytes' kernel, called
on (blocks, BLOCK) views only: on CPUs bitsandbytes <= 0.50 dequantizes blocks that straddle rows
wrongly. Codes and scales are bit for bit the same for any number of threads.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Quant = Literal["nf4", "int8", "none"]
BLOCK = 64
"""Elements that share one scale."""
_CHUNK = 2048
"""Blocks that are quantized at a time: their temporaries stay in the cache."""
# fmt: off
_NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])
# fmt: on
"""NF4's levels, shares of the scale (Dettmers et al. 2023, appendix E)."""
_NF4_BOUNDARIES = ((_NF4[1:] + _NF4[:-1]) / 2).tolist()
_INT8_MAX = 127
_LARGEST_SCALE = 2.0**120
"""So that 127 times it is finite."""
_SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny
"""Smaller ones are zero: processors differ in what they make of subnormal bf16 numbers."""


@dataclass(frozen=True)
class Quantized:
    """A weight as its base holds it.

    Attributes:
        quant: the format.
        shape: (out, in) of the weight.
        codes: `nf4` uint8 (ceil(n / BLOCK) * BLOCK / 2,), `int8` int8 (ceil(n / BLOCK) * BLOCK,),
            `none` the fp32 weight itself, (n,); n = out * in.
        scales: bf16, one a block: what code 15 of `nf4`, or code 1 of `int8`, stands for. Empty for
            `none`.
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


# Sizes


def num_blocks(shape: tuple[int, int]) -> int:
    """Blocks of a weight of this shape."""
    return -(-shape[0] * shape[1] // BLOCK)


def num_bytes(shape: tuple[int, int], quant: Quant) -> int:
    """Bytes of the codes and scales of a weight of this shape."""
    if quant == "none":
        return shape[0] * shape[1] * 4
    return num_blocks(shape) * ((BLOCK // 2 if quant == "nf4" else BLOCK) + 2)


def empty(shape: tuple[int, int], quant: Quant, device: torch.device | str) -> Quantized:
    """A base of zeros: right shapes and dtypes, to be filled from a server."""
    blocks = num_blocks(shape)
    if quant == "nf4":
        codes = torch.zeros(blocks * BLOCK // 2, dtype=torch.uint8, device=device)
    elif quant == "int8":
        codes = torch.zeros(blocks * BLOCK, dtype=torch.int8, device=device)
    else:
        codes = torch.zeros(shape[0] * shape[1], device=device)
    scales = torch.zeros(0 if quant == "none" else blocks, dtype=torch.bfloat16, device=device)
    return Quantized(quant, shape, codes, scales)


def step(base: Quantized) -> Tensor:
    """Mean distance of neighbouring levels, a block, in units of the weight: fp32 (blocks,)."""
    scales = base.scales.float()
    return scales * (2 / 15) if base.quant == "nf4" else scales


# Weight to base


def quantize(weight: Tensor, quant: Quant) -> Quantized:
    """Quantize a weight (out, in), fp32, finite, on the CPU: the nearest codes under new scales."""
    shape = _shape(weight)
    return _quantize(weight, empty(shape, quant, "cpu"), hysteresis=0.0, keep=None)


def requantize(
    weight: Tensor, previous: Quantized, *, hysteresis: float = 0.0, keep: tuple[float, float] = (0.8, 1.05)
) -> Quantized:
    """Bring a base up to its weight, with as few changes as the settings allow.

    Args:
        weight: (out, in), fp32, finite, on the CPU.
        previous: the base so far, of that shape. It is not changed.
        hysteresis: a code is kept unless its error is more than 1 + `hysteresis` times the nearest's.
        keep: a block keeps its scale while its largest magnitude is within these shares of the largest
            magnitude that the scale stands for.
    """
    assert _shape(weight) == previous.shape
    return _quantize(weight, previous, hysteresis=hysteresis, keep=keep)


def _shape(weight: Tensor) -> tuple[int, int]:
    out_features, in_features = weight.shape
    return out_features, in_features


@torch.no_grad()
def _quantize(
    weight: Tensor, previous: Quantized, *, hysteresis: float, keep: tuple[float, float] | None
) -> Quantized:
    """`requantize`; without `keep` all scales are new."""
    quant, shape = previous.quant, previous.shape
    flat = weight.reshape(-1)
    if quant == "none":
        return Quantized(quant, shape, flat.clone(), previous.scales.clone())
    codes, scales = torch.empty_like(previous.codes), torch.empty_like(previous.scales)
    codes_of_block = codes.numel() // max(scales.numel(), 1)
    for start in range(0, scales.numel(), _CHUNK):
        blocks = _blocks(flat[start * BLOCK : (start + _CHUNK) * BLOCK])
        here = slice(start, start + _CHUNK)
        there = slice(start * codes_of_block, (start + _CHUNK) * codes_of_block)
        scales[here] = _scales(blocks, previous.scales[here], quant, keep)
        nearest = _nearest(blocks, scales[here].float(), quant)
        if hysteresis:
            old = previous.codes[there]
            keeps = _keeps(blocks, scales[here].float(), old, nearest, quant, hysteresis)
            nearest ^= (nearest ^ old) & keeps
        codes[there] = nearest
    return Quantized(quant, shape, codes, scales)


def _blocks(flat: Tensor) -> Tensor:
    """Elements in blocks, (blocks, BLOCK), the last one filled up with zeros."""
    padding = -flat.numel() % BLOCK
    return (torch.cat([flat, flat.new_zeros(padding)]) if padding else flat).view(-1, BLOCK)


def _scales(blocks: Tensor, previous: Tensor, quant: Quant, keep: tuple[float, float] | None) -> Tensor:
    """The bf16 scale of each block: the previous one if it may be kept, else a new one."""
    unit = _INT8_MAX if quant == "int8" else 1
    largest = blocks.abs().amax(dim=1)
    new = (largest / unit).clamp_(max=_LARGEST_SCALE)
    new = torch.where(new < _SMALLEST_SCALE, 0, new).to(torch.bfloat16)
    if keep is None:
        return new
    reach = previous.double() * unit
    fits = (reach * keep[0] <= largest) & (largest <= reach * keep[1])
    return torch.where(fits, previous, new)


def _nearest(blocks: Tensor, scales: Tensor, quant: Quant) -> Tensor:
    """The codes, as a base holds them, nearest to (blocks, BLOCK) elements under fp32 scales."""
    relative = blocks / torch.where(scales > 0, scales, 1)[:, None]
    if quant == "int8":
        return relative.round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8).view(-1)
    x = relative.view(-1).numpy()
    codes = np.zeros(x.size, np.uint8)
    above = np.empty(x.size, np.bool_)
    for boundary in _NF4_BOUNDARIES:
        np.greater(x, np.float32(boundary), out=above)
        np.add(codes, above.view(np.uint8), out=codes)
    return torch.from_numpy(pack(codes))


def _keeps(
    blocks: Tensor, scales: Tensor, old: Tensor, nearest: Tensor, quant: Quant, hysteresis: float
) -> Tensor:
    """Bits set, in the layout of codes, where the old code's error is within the hysteresis."""
    allowed = _elements(nearest, scales, quant).sub_(blocks).abs_().mul_(1 + hysteresis)
    keeps = _elements(old, scales, quant).sub_(blocks).abs_() <= allowed
    if quant == "int8":
        return keeps.view(-1).view(torch.int8).neg_()
    return torch.from_numpy(pack(keeps.view(-1).view(torch.uint8).numpy())) * 15


def pack(nibbles: np.ndarray) -> np.ndarray:
    """Pairs of numbers below 16 as bytes, the first in the high nibble. uint8 (2 n,) to (n,)."""
    pairs = nibbles.view("<u2")  # the first of a pair is the low byte
    return (pairs << 4 | pairs >> 8).astype(np.uint8)


# Base to weight


def dequantize(base: Quantized) -> Tensor:
    """The weight (out, in), fp32, that a base stands for."""
    if base.quant == "none":
        return base.codes.view(base.shape)
    n = base.shape[0] * base.shape[1]
    flat = _elements(base.codes, base.scales.float(), base.quant).view(-1)
    return flat[:n].view(base.shape)


def _elements(codes: Tensor, scales: Tensor, quant: Quant) -> Tensor:
    """What codes stand for under fp32 scales, (blocks, BLOCK)."""
    blocks = scales.numel()
    if quant == "nf4":
        elements: Tensor = _kernels().dequantize_4bit.default(
            codes.view(-1, 1), scales, BLOCK, "nf4", (blocks, BLOCK), torch.float32
        )
        return elements
    return codes.view(blocks, BLOCK) * scales[:, None]


def digest(named: Iterable[tuple[str, Tensor]], *digests: str) -> str:
    """SHA-256, in hex, of other digests and of names, dtypes, shapes and bits of tensors, in order."""
    sha = hashlib.sha256("".join(digests).encode())
    for name, tensor in named:
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        host = tensor.detach().cpu().contiguous()
        # reshape: a 0-dimensional tensor has no other integer view
        sha.update(host.reshape(-1).view(torch.uint8).numpy().data if host.numel() else b"")
    return sha.hexdigest()
