"""A convolution whose kernel is a frozen base plus H LoRA heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from lte import quantize
from lte.config import LoRA
from lte.nn.adapted import Adapted
from lte.nn.sites import HeadSpec, from_matrix
from lte.quantize import Quant, Quantized


class _BaseConvolution(torch.autograd.Function):
    """A convolution with deq(Q). Keeps the codes, not the dequantized kernel, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Quantized, spec: HeadSpec, manner: dict[str, Any]) -> Tensor:
        ctx.base, ctx.spec, ctx.manner, ctx.shape = base, spec, manner, x.shape
        return F.conv2d(x, _kernel(base, spec).to(x.dtype), **manner)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        kernel = _kernel(ctx.base, ctx.spec).to(grad.dtype)
        x_grad = conv2d_input(ctx.shape, kernel, grad, **ctx.manner)  # type: ignore[no-untyped-call]
        return x_grad, None, None, None


def _kernel(base: Quantized, spec: HeadSpec) -> Tensor:
    return from_matrix(quantize.dequantize(base), spec)


class LoRAConv2d(Adapted):
    """y = conv(x, deq(Q)) + s conv1x1(conv(x, A), B) + bias, where A (r, in / groups * kh * kw) is r kernels.

    In reset-less mode as ever with [B - B', B'] and [A; A - A']. With groups each applies A to its own
    channels, and its rows of B to what comes of that.

    Attributes:
        bias: dense, or None. stride, padding, dilation, groups, padding_mode: of the plain convolution.
    """

    def __init__(self, conv: nn.Conv2d, spec: HeadSpec, lora: LoRA, quant: Quant) -> None:
        """Take over the kernel (see `Adapted`) and bias of a convolution."""
        super().__init__(conv.weight, spec, lora, quant)
        self.bias = conv.bias
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode, self.groups = conv.padding, conv.padding_mode, conv.groups
        self._padding_around = list(conv._reversed_padding_repeated_twice)

    def forward(self, input: Tensor) -> Tensor:
        """The result (n, out, height, width) for an input (n, in, height, width), or both without the n."""
        if input.dim() == 3:
            return self._of_batch(input.unsqueeze(0)).squeeze(0)
        return self._of_batch(input)

    def _of_batch(self, x: Tensor) -> Tensor:
        padding: tuple[int, ...] = (0, 0) if isinstance(self.padding, str) else self.padding
        if self.padding_mode != "zeros" or self.padding == "same":  # once for the base and the heads
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._padding_around, mode=mode), (0, 0)
        manner: dict[str, Any] = {
            "stride": self.stride,
            "padding": padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }
        y: Tensor
        if self.quant == "none":
            y = F.conv2d(x, _kernel(self.base, self.spec).to(x.dtype), **manner)
        else:
            y = _BaseConvolution.apply(x, self.base, self.spec, manner)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            y = y + self.bias[:, None, None]
        return y + self._heads_product(x, manner) if self.training or self.evaluates_heads else y

    def _heads_product(self, x: Tensor, manner: dict[str, Any]) -> Tensor:
        if self.is_full:
            kernels = self.alone(self.lora_B).view(-1, *self.spec.plain_shape)
            pairs = zip(self.sliced(x), kernels, strict=True)
            return torch.cat([F.conv2d(own, kernel, **manner) for own, kernel in pairs])
        A, B = self.of_slices(self.lora_A, self.lora_B, self.merged_B)
        kernels = A.view(*A.shape[:2], *self.spec.plain_shape[1:]).repeat(1, self.groups, 1, 1, 1)
        products = []
        for own, kernel, B_of_own in zip(self.dropped(self.sliced(x)), kernels, B, strict=True):
            inner = F.conv2d(own, kernel, **manner) * self.scale
            products.append(F.conv2d(inner, B_of_own[:, :, None, None], groups=self.groups))
        return torch.cat(products)
