"""What travels in place of factors, dense deltas and bases, and what the receiver makes of it.

Both ends call the same functions, so that a worker knows to the bit what the server rebuilt. A
factor travels as its difference from the merged factor. What a codec leaves out of that difference
stays in it, and so is owed and sent by a later contribution (error feedback).

`fp32` leaves out nothing but a rounding; it is the only codec so far.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lte.quantize import Quantized

A, B, CODES, SCALES = "/A", "/B", "/codes", "/scales"
"""Endings of tensor names in messages: the factors and the base of the module named before them."""


def encode_difference(now: Tensor, merged: Tensor | None) -> Tensor:
    """What is sent for a factor or dense parameter `now` when the server holds `merged` of it."""
    return now if merged is None else now - merged


def rebuild(sent: Tensor, merged: Tensor | None) -> Tensor:
    """What the server, and the worker for its books, make of it: the merged value plus what came."""
    return sent if merged is None else merged + sent


def encode_base(module: str, base: Quantized) -> dict[str, Tensor]:
    """The tensors that publish one module's base: all codes and scales."""
    return {module + CODES: base.codes, module + SCALES: base.scales}


def decode_base(module: str, like: Quantized, received: Mapping[str, Tensor]) -> Quantized:
    """The base that these tensors publish, of the same format and shape as `like`."""
    return Quantized(like.quant, like.shape, received[module + CODES], received[module + SCALES])
