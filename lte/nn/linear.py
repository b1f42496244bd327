"""A linear layer whose weight is a frozen base plus H LoRA heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lte import lowrank, quantize
from lte.config import LoRA
from lte.nn.adapted import Adapted
from lte.nn.sites import HeadSpec
from lte.quantize import Quant, Quantized


class _BaseProduct(torch.autograd.Function):
    """x deq(Q)^T. Keeps the codes, not the dequantized weight, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Quantized) -> Tensor:
        ctx.base = base
        return x @ quantize.dequantize(base).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return grad @ quantize.dequantize(ctx.base).to(grad.dtype), None


class LoRALinear(Adapted):
    """y = x deq(Q)^T + s [(x A^T)(B - B')^T + (x (A - A')^T) B'^T] + bias   (DESIGN, section 1).

    Attributes:
        bias: dense, or None.
    """

    def __init__(self, linear: nn.Linear, spec: HeadSpec, lora: LoRA, quant: Quant) -> None:
        """Take over the weight (see `Adapted`) and bias of a linear layer."""
        super().__init__(linear.weight, spec, lora, quant)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.quant == "none":
            y = F.linear(x, quantize.dequantize(self.base).to(x.dtype), self.bias)
        else:
            y = _BaseProduct.apply(x, self.base)  # type: ignore[no-untyped-call]
            if self.bias is not None:
                y = y + self.bias
        return y + self._heads_product(x) if self.training else y

    def _heads_product(self, x: Tensor) -> Tensor:
        """s x (B A - B' A')^T, each slice of the batch by its own head."""
        A, B = self.of_heads(self.lora_A), self.of_heads(self.lora_B)
        if self.merged_A is not None and self.merged_B is not None:
            B, A = lowrank.stacked(A, B, self.merged_A, self.merged_B)
        if self.heads == 1:
            return ((self.dropped(x.unsqueeze(0))[0] @ A[0].T) * self.scale) @ B[0].T
        slices = self.dropped(self.sliced(x).flatten(1, -2))
        product = torch.bmm(torch.bmm(slices, A.mT) * self.scale, B.mT)
        return product.view(*x.shape[:-1], self.out_features)
