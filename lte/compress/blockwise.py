"""Codecs of small tensors: fp32, bf16, and blockwise int8, int4 and int2.

An integer codec cuts the flattened tensor into blocks of `BLOCK` elements with one bf16 scale each:

    int8   -127 ... 127, int4   -7 ... 7      times the scale, largest magnitude / 127 or / 7
    int2   -1.5, -0.5, 0.5, 1.5               times the scale, the block's root mean square

Decoding is one product of two rounded numbers an element, so every machine rebuilds the same bits.
Codes travel squeezed (see `entropy`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lte.compress.entropy import expand, squeeze
from lte.config import Codec
from lte.errors import WireError

BLOCK = 64
"""Elements that share one scale."""
_BITS: dict[Codec, int] = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "int2": 2}
_LARGEST: dict[Codec, int] = {"int8": 127, "int4": 7}


def max_bytes(num_elements: int, codec: Codec) -> int:
    """Most bytes that so many elements take."""
    blocks = -(-num_elements // BLOCK)
    if codec == "fp32":
        return num_elements * 4
    if codec == "bf16":
        return num_elements * 2 + 1
    return blocks * 2 + blocks * BLOCK * _BITS[codec] // 8 + 1


def encode(x: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Encode a tensor of any shape, fp32, on the CPU.

    Returns:
        The bytes (uint8, one dimension), and what `decode` makes of them.
    """
    flat = x.detach().reshape(-1)
    if codec == "fp32":
        return flat.clone().view(torch.uint8), x.detach().clone()
    if codec == "bf16":
        rounded = flat.to(torch.bfloat16)
        low, high = rounded.view(torch.uint8).view(-1, 2).unbind(1)  # the high bytes alone repeat
        return torch.cat([low, squeeze(high.contiguous())]), rounded.float().view(x.shape)
    padding = -flat.numel() % BLOCK
    blocks = torch.cat([flat, flat.new_zeros(padding)]).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    if codec == "int2":  # relative to the largest, whose square may be too small or too large for fp32
        sizes = torch.full_like(largest, BLOCK)
        sizes[-1:] -= padding
        squares = (blocks / torch.where(largest > 0, largest, 1)[:, None]).square().sum(1)
        scales = (largest * (squares / sizes).sqrt()).to(torch.bfloat16)
    else:
        scales = (largest / _LARGEST[codec]).to(torch.bfloat16)
    relative = blocks / torch.where(scales > 0, scales, 1).float()[:, None]
    if codec == "int2":
        codes = (relative.floor() + 2).clamp_(0, 3).to(torch.uint8)
    else:
        most = _LARGEST[codec]
        codes = (relative.round().clamp_(-most, most) + most).to(torch.uint8)
    blob = torch.cat([scales.view(torch.uint8), squeeze(_pack(codes.view(-1), _BITS[codec]))])
    return blob, _dequantized(codes, scales, codec, x.shape)


def decode(blob: Tensor, codec: Codec, shape: tuple[int, ...]) -> Tensor:
    """The fp32 tensor of this shape that these bytes stand for.

    Raises:
        WireError: no encoder made these bytes.
    """
    n = math.prod(shape)
    blocks = -(-n // BLOCK)
    if blob.numel() > max_bytes(n, codec):
        raise WireError(f"{blob.numel()} bytes for {n} elements in {codec}")
    if codec == "fp32":
        if blob.numel() != n * 4:
            raise WireError(f"{blob.numel()} bytes for {n} elements in fp32")
        return blob.clone().view(torch.float32).view(shape)
    if codec == "bf16":
        high = expand(blob[n:], n)
        return torch.stack([blob[:n], high], 1).view(-1).view(torch.bfloat16).float().view(shape)
    if blob.numel() < blocks * 2:
        raise WireError(f"{blob.numel()} bytes for {n} elements in {codec}")
    scales = blob[: blocks * 2].clone().view(torch.bfloat16)
    bits = _BITS[codec]
    codes = _unpack(expand(blob[blocks * 2 :], blocks * BLOCK * bits // 8), bits)
    return _dequantized(codes.view(-1, BLOCK), scales, codec, shape)


def _dequantized(codes: Tensor, scales: Tensor, codec: Codec, shape: tuple[int, ...]) -> Tensor:
    offset = 1.5 if codec == "int2" else float(_LARGEST[codec])
    values = (codes.float() - offset) * scales.float()[:, None]
    return values.view(-1)[: math.prod(shape)].view(shape)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of so many bits, the first in the highest ones of a byte."""
    packed = codes.view(-1, 8 // bits)
    return sum(
        (column << (8 - bits * (k + 1)) for k, column in enumerate(packed.unbind(1))),
        torch.zeros(len(packed), dtype=torch.uint8),
    )


def _unpack(packed: Tensor, bits: int) -> Tensor:
    shifts = [8 - bits * (k + 1) for k in range(8 // bits)]
    return torch.stack([(packed >> shift) & ((1 << bits) - 1) for shift in shifts], 1).view(-1)


# Matrices of which few rows changed

_WHOLE, _ROWS = torch.tensor([0], dtype=torch.uint8), torch.tensor([1], dtype=torch.uint8)
"""First byte: all rows follow, or a bitmap and the rows that it names."""
_SMALL = 1 / 64


def max_rows_bytes(shape: tuple[int, ...], codec: Codec) -> int:
    """Most bytes that `encode_rows` makes of a tensor of this shape."""
    return max_bytes(math.prod(shape), codec) + 1


def encode_rows(x: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Encode a tensor without the rows of a matrix that hold next to nothing.

    Left out are rows of zeros and, by lossy codecs, those below `_SMALL` of the largest element:
    embeddings of tokens that were not met. Returns as `encode` does.
    """
    if x.ndim == 2 and x.numel() and x.shape[0] > 1:
        largest = x.detach().abs().amax(1)
        kept = largest > (0 if codec == "fp32" else _SMALL * largest.max())
        # Where something is not finite all must go, for the receiver to see it.
        if 2 * int(kept.sum()) < len(kept) and bool(largest.isfinite().all()):
            bitmap = squeeze(torch.from_numpy(np.packbits(kept.numpy())))
            rows, rebuilt_rows = encode(x.detach()[kept], codec)
            length = torch.tensor([bitmap.numel()], dtype=torch.int32).view(torch.uint8)
            blob = torch.cat([_ROWS, length, bitmap, rows])
            if blob.numel() <= max_rows_bytes(tuple(x.shape), codec):
                rebuilt = torch.zeros_like(x)
                rebuilt[kept] = rebuilt_rows
                return blob, rebuilt
    blob, rebuilt = encode(x, codec)
    return torch.cat([_WHOLE, blob]), rebuilt


def decode_rows(blob: Tensor, codec: Codec, shape: tuple[int, ...]) -> Tensor:
    """The fp32 tensor of this shape that `encode_rows` made these bytes of.

    Raises:
        WireError: it did not.
    """
    if blob.numel() and blob[0] == _WHOLE[0]:
        return decode(blob[1:], codec, shape)
    if blob.numel() < 5 or blob[0] != _ROWS[0] or len(shape) != 2:
        raise WireError("a dense change that begins as none does")
    length = int(blob[1:5].clone().view(torch.int32))
    if not 0 < length <= blob.numel() - 5:
        raise WireError("a dense change whose list of rows ends beyond it")
    bitmap = expand(blob[5 : 5 + length], -(-shape[0] // 8)).numpy()
    kept = torch.from_numpy(np.unpackbits(bitmap, count=shape[0]).astype(bool))
    rebuilt = torch.zeros(shape)
    rebuilt[kept] = decode(blob[5 + length :], codec, (int(kept.sum()), shape[1]))
    return rebuilt
