"""A linear layer whose weight is a frozen base plus H LoRA heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lte import lowrank, quantize
from lte.config import LoRA
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


class _HeadGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by the number of heads.

    A head sees 1/H of the batch. A loss that is the mean over the batch is 1/H of the sum of the
    slices' means, of which each head gets the gradient that it would have had alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_heads: int) -> Tensor:
        ctx.num_heads = num_heads
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.num_heads, None


class LoRALinear(nn.Module):
    """y = x deq(Q)^T + s [(x A^T)(B - B')^T + (x (A - A')^T) B'^T] + bias   (DESIGN, section 1).

    With H > 1 heads the first dimension of x is cut into H equal slices, one head each; the loss
    is taken to be a mean over that dimension. In `eval()` mode the layer computes the published
    model, x deq(Q)^T + bias.

    Attributes:
        lora_A: (H, r, in), trained or not. lora_B: (H, out, r).
        merged_A, merged_B: A' and B', of the same shapes; None where they are zero (all modes
            but reset-less).
        bias: dense, or None.
        codes, scales: the base (see `quantize.Quantized`), frozen.
    """

    codes: Tensor
    scales: Tensor
    merged_A: Tensor | None
    merged_B: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        lora: LoRA,
        quant: Quant,
        *,
        rank: int,
        scale: float,
        init: lowrank.Init,
    ) -> None:
        """Take over the weight and bias of a linear layer; its weight may be on the meta device.

        Heads start at zero; `lte.nn.draw_heads` draws A.

        Args:
            lora: settings of all heads of the model; rank, scale and init are this module's own.
        """
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.lora, self.heads, self.quant = lora, lora.heads, quant
        self.rank, self.scale, self.init = rank, scale, init
        self.bias = linear.bias
        weight = linear.weight
        shape = (self.out_features, self.in_features)
        if weight.is_meta:
            device = torch.device("cpu")
            base = quantize.empty(shape, quant, device)
        else:
            device = weight.device
            base = quantize.quantize(weight.detach().float(), quant)
        # Not in state_dict: the base is the server's, and is saved with its version there.
        self.register_buffer("codes", base.codes, persistent=False)
        self.register_buffer("scales", base.scales, persistent=False)
        A_shape = (self.heads, rank, self.in_features)
        B_shape = (self.heads, self.out_features, rank)
        self.lora_A = nn.Parameter(torch.zeros(A_shape, device=device), requires_grad=lora.A == "trained")
        self.lora_B = nn.Parameter(torch.zeros(B_shape, device=device))
        reset_less = lora.merge == "reset-less"
        self.register_buffer("merged_A", torch.zeros(A_shape, device=device) if reset_less else None)
        self.register_buffer("merged_B", torch.zeros(B_shape, device=device) if reset_less else None)

    @property
    def weight(self) -> Tensor:
        """The published weight (out, in), fp32, dequantized anew: for code that looks at it."""
        return quantize.dequantize(self.base)

    @property
    def base(self) -> Quantized:
        """The frozen base; its tensors are this module's buffers."""
        return Quantized(self.quant, (self.out_features, self.in_features), self.codes, self.scales)

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
        A: Tensor = self.lora_A
        B: Tensor = self.lora_B
        if self.heads > 1:
            if x.shape[0] % self.heads:
                raise ValueError(
                    f"a batch of {x.shape[0]} cannot be cut into {self.heads} equal slices, one a head"
                )
            A = _HeadGradient.apply(A, self.heads)  # type: ignore[no-untyped-call]
            B = _HeadGradient.apply(B, self.heads)  # type: ignore[no-untyped-call]
        if self.merged_A is not None and self.merged_B is not None:
            B, A = lowrank.stacked(A, B, self.merged_A, self.merged_B)
        if self.heads == 1:
            return ((x @ A[0].T) * self.scale) @ B[0].T
        slices = x.reshape(self.heads, -1, self.in_features)
        product = torch.bmm(torch.bmm(slices, A.mT) * self.scale, B.mT)
        return product.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank},"
            f" heads={self.heads}, scale={self.scale:g}, base={self.quant}"
        )
