"""A linear layer whose weight is a frozen base plus H LoRA heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lte import quantize
from lte.config import LoRA
from lte.nn.adapted import Adapted, Tied
from lte.nn.sites import HeadSpec
from lte.quantize import Quant, Quantized

ALL = slice(None)


class _BaseProduct(torch.autograd.Function):
    """x deq(Q)^T. Keeps the codes, not the dequantized weight, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Quantized, rows: slice) -> Tensor:
        ctx.base, ctx.rows = base, rows
        return x @ quantize.dequantize(base)[rows].to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return grad @ quantize.dequantize(ctx.base)[ctx.rows].to(grad.dtype), None, None


def product(of: Adapted, x: Tensor, bias: Tensor | None, *, with_heads: bool, rows: slice = ALL) -> Tensor:
    """x deq(Q)^T + bias and, with heads, s x (B A - B' A')^T, each slice of the batch by its own head.

    Args:
        x: (..., in). rows: which outputs to compute; the bias is theirs.
    """
    y: Tensor
    if of.quant == "none":
        y = F.linear(x, quantize.dequantize(of.base)[rows].to(x.dtype), bias)
    else:
        y = _BaseProduct.apply(x, of.base, rows)  # type: ignore[no-untyped-call]
        if bias is not None:
            y = y + bias
    return y + _heads_product(of, x, rows) if with_heads else y


def _heads_product(of: Adapted, x: Tensor, rows: slice) -> Tensor:
    lora_B = of.lora_B[:, rows]
    if of.is_full and of.heads == 1:
        return F.linear(x, lora_B[0])
    if of.is_full:
        return torch.bmm(of.sliced(x).flatten(1, -2), of.alone(lora_B).mT).view(
            *x.shape[:-1], lora_B.shape[1]
        )
    merged_B = None if of.merged_B is None else of.merged_B[:, rows]
    A, B = of.of_slices(of.lora_A, lora_B, merged_B)
    if of.num_slices == 1:
        return ((of.dropped(x.unsqueeze(0))[0] @ A[0].T) * of.scale) @ B[0].T
    slices = of.dropped(of.sliced(x).flatten(1, -2))
    product = torch.bmm(torch.bmm(slices, A.mT) * of.scale, B.mT)
    return product.view(*x.shape[:-1], B.shape[1])


class LoRALinear(Adapted):
    """y = x deq(Q)^T + s [(x A^T)(B - B')^T + (x (A - A')^T) B'^T] + bias   (DESIGN, section 1).

    Attributes:
        bias: dense, or None.
    """

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, spec: HeadSpec, lora: LoRA, quant: Quant
    ) -> None:
        """Take over the weight (see `Adapted`) and bias of a linear layer."""
        super().__init__(weight, spec, lora, quant)
        self.bias = bias

    def forward(self, input: Tensor) -> Tensor:
        return product(self, input, self.bias, with_heads=self.training or self.evaluates_heads)


class TiedLinear(Tied):
    """A linear layer whose weight another module has; its bias is its own."""

    def __init__(self, linear: nn.Linear, adapted: Adapted) -> None:
        super().__init__(adapted)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        with_heads = self.training or self.adapted.evaluates_heads
        return product(self.adapted, input, self.bias, with_heads=with_heads)
