"""What every module with heads owns: a frozen base, H LoRA heads, and what is merged of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lte import lowrank, quantize
from lte.config import LoRA
from lte.errors import ConfigError
from lte.nn.sites import HeadSpec, from_matrix, to_matrix
from lte.quantize import Quant, Quantized


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


class _Unsliced(torch.autograd.Function):
    """Identity on a weight that several heads share out among their slices, which has no gradient.

    A weight cannot know of which slice the rows are that it is multiplied with. That is told where the
    gradient would be wrong: code that asks for a weight's dtype or device alone goes on.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, lora_B: Tensor, adapted: Adapted) -> Tensor:
        ctx.adapted = adapted
        return matrix.view_as(matrix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        spec, heads = ctx.adapted.spec, ctx.adapted.heads
        raise ConfigError(
            [
                f"{spec.name}: this model computes with {spec.parameter} itself, not by calling the module,"
                f" so that {heads} heads cannot have a part of the batch each; name it in lora.exclude, or"
                " set lora.heads=1"
            ]
        )


class Adapted(nn.Module):
    """A weight (out, in) as deq(Q) + s (B A - B' A'); subclasses say what is computed with it.

    With H > 1 heads the first dimension of the input, which is to be the batch (see `isolation`), is cut into
    H equal slices, one head each; the loss is taken to be a mean over that dimension. Or all heads see the
    whole of it, and add 1 / H each: then they compute as one head of rank H r, and have its masks of dropout.

    In `eval()` mode the heads are left out, which gives the published model, unless they are never
    merged: then they are a part of it.

    Other code may compute with `weight` in place of calling the module, as `F.linear(x, module.weight)`; see
    there.

    Attributes:
        lora_A: (H, r, in), trained or not. lora_B: (H, out, r).
        merged_A, merged_B: A' and B', of the same shapes; None where they are zero (all modes
            but reset-less).
        evaluates_heads: they are never merged.
        num_slices: that the batch is cut into. scale: s, or s / H where all heads see the whole batch.
        codes, scales: the base (see `quantize.Quantized`), frozen.
        spec: of its site, by the name that it had when it was converted.
        is_full: heads are of full rank: A is the identity, and lora_A has no rows. s is 1.
        dropout_seeds: of each slice's masks of dropout; None: these come from torch's own generator.
        gates: (H, 1, r), what each column of B counts for in training (see `lora.nested`); None: all for 1.
    """

    codes: Tensor
    scales: Tensor
    merged_A: Tensor | None
    merged_B: Tensor | None
    gates: Tensor | None

    def __init__(self, plain: Tensor, spec: HeadSpec, lora: LoRA, quant: Quant) -> None:
        """Take over a plain parameter, which may be on the meta device.

        Heads start at zero; `lte.nn.draw_heads` draws A.

        Args:
            spec: of this site. lora: settings of all heads of the model.
        """
        super().__init__()
        self.spec, self.lora, self.heads, self.quant = spec, lora, lora.heads, quant
        self.out_features, self.in_features = spec.shape
        self.rank, self.init, self.num_slices = spec.rank, spec.init, lora.num_slices
        self.scale = self._scale_of(spec.scale)
        self.is_full = False
        self.evaluates_heads = lora.merge == "never"
        self.dropout_seeds: list[int] | None = None
        self.gates = None
        if plain.is_meta:
            device = torch.device("cpu")
            base = quantize.empty(spec.shape, quant, device)
        else:
            device = plain.device
            base = quantize.quantize(to_matrix(plain.detach().float(), spec), quant)
        # Not in state_dict: the base is the server's, and is saved with its version there.
        self.register_buffer("codes", base.codes, persistent=False)
        self.register_buffer("scales", base.scales, persistent=False)
        A_shape = (self.heads, spec.rank, self.in_features)
        B_shape = (self.heads, self.out_features, spec.rank)
        self.lora_A = nn.Parameter(torch.zeros(A_shape, device=device), requires_grad=lora.A == "trained")
        self.lora_B = nn.Parameter(torch.zeros(B_shape, device=device))
        reset_less = lora.merge == "reset-less"
        self.register_buffer("merged_A", torch.zeros(A_shape, device=device) if reset_less else None)
        self.register_buffer("merged_B", torch.zeros(B_shape, device=device) if reset_less else None)

    @property
    def weight(self) -> Tensor:
        """What the module computes with, in the plain weight's shape, fp32, made anew at each reading: for
        code that takes the weight without calling the module.

        In training, where gradients are computed, deq(Q) + s (B A - B' A'), through which A and B are trained
        (without `lora.dropout`); else `published_weight`. Whatever multiplies with it keeps it for the
        backward pass: one such matrix in full precision for each use, which calling the module costs nobody.

        Heads that see a slice of the batch each can be no part of it: the backward pass through it raises
        ConfigError.
        """
        published = self.published_weight
        if not (self.training and torch.is_grad_enabled() and self.lora_B.requires_grad):
            return published
        if self.num_slices > 1:
            same: Tensor = _Unsliced.apply(published, self.lora_B, self)  # type: ignore[no-untyped-call]
            return same
        with torch.autocast(published.device.type, enabled=False):
            return from_matrix(self._matrix_with_heads(), self.spec)

    def _matrix_with_heads(self) -> Tensor:
        """deq(Q) + s (B A - B' A'), (out, in), of heads that see the same samples."""
        matrix = quantize.dequantize(self.base)
        if self.is_full:
            assert self.heads == 1, "the recipe's checks let no more heads of full rank see the whole batch"
            return matrix + self.lora_B[0]
        right, left = self.of_slices(self.lora_A, self.lora_B, self.merged_B)
        return torch.addmm(matrix, left[0], right[0], alpha=self.scale)

    @property
    def published_weight(self) -> Tensor:
        """The published weight in its plain shape, fp32, dequantized anew; it asks for no gradient."""
        matrix = quantize.dequantize(self.base)
        if self.evaluates_heads:
            matrix = matrix + lowrank.sum_of_heads(self.lora_A.detach(), self.lora_B.detach(), self.scale)
        return from_matrix(matrix, self.spec)

    @property
    def base(self) -> Quantized:
        """The frozen base; its tensors are this module's buffers."""
        return Quantized(self.quant, self.spec.shape, self.codes, self.scales)

    def set_heads(self, rank: int, scale: float, *, are_kept: bool) -> None:
        """Have new heads, of this lora_rank and lora_scale, that are zero.

        Args:
            are_kept: merges keep the heads, so that there are merged factors.
        """
        self._replace_heads(rank, rank, scale)
        self.is_full = False
        self.merged_A = torch.zeros_like(self.lora_A) if are_kept else None
        self.merged_B = torch.zeros_like(self.lora_B) if are_kept else None

    def set_full_heads(self) -> None:
        """Have new heads of full rank, that are zero."""
        self._replace_heads(self.in_features, 0, 1.0)
        self.is_full = True
        self.merged_A = self.merged_B = None

    def _scale_of(self, scale: float) -> float:
        """The factor of each head's product, of lora_scale s."""
        return scale if self.num_slices == self.heads else scale / self.heads

    def _replace_heads(self, rank: int, rows: int, scale: float) -> None:
        """New parameters: a graph that is still held remembers the shapes of those before."""
        self.rank, self.scale, self.gates = rank, self._scale_of(scale), None
        A, B = self.lora_A, self.lora_B
        is_trained = self.lora.A == "trained" and rows > 0
        self.lora_A = nn.Parameter(A.new_zeros(self.heads, rows, self.in_features), is_trained)
        self.lora_B = nn.Parameter(B.new_zeros(self.heads, self.out_features, rank))

    def load_base(self, base: Quantized) -> None:
        """Take over the codes and scales of a base, which may be of another format."""
        if base.quant != self.quant:
            self.quant, device = base.quant, self.codes.device
            self.codes, self.scales = (
                torch.empty_like(base.codes, device=device),
                torch.empty_like(base.scales, device=device),
            )
        self.codes.copy_(base.codes)
        self.scales.copy_(base.scales)

    def sliced(self, batch: Tensor) -> Tensor:
        """A batch (n, ...) as its heads see it: in slices, (H, n / H, ...), or whole, (1, n, ...)."""
        if self.num_slices == 1:
            return batch.unsqueeze(0)
        if batch.shape[0] % self.heads:
            raise indivisible(self.spec.name, batch.shape[0], self.heads)
        return batch.reshape(self.heads, batch.shape[0] // self.heads, *batch.shape[1:])

    def dropped(self, slices: Tensor) -> Tensor:
        """What A is given of its inputs, (num_slices, ...): `lora.dropout` of them are 0, the others larger.

        The masks are a function of the seeds, so that a head has them on any worker, and again where its
        activations are computed anew.
        """
        share = self.lora.dropout
        if not share or not self.training:
            return slices
        if self.dropout_seeds is None:
            return F.dropout(slices, share)
        kept = torch.empty_like(slices, requires_grad=False)
        for of_head, seed in zip(kept, self.dropout_seeds, strict=True):
            generator = torch.Generator(slices.device).manual_seed(seed)
            of_head.bernoulli_(1 - share, generator=generator)
        return slices * kept / (1 - share)

    def of_slices(
        self, lora_A: Tensor, lora_B: Tensor, merged_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """By what each slice's input is multiplied, one after the other: right (num_slices, k, in) and left
        (num_slices, ..., k), where left right is B A - B' A' of the heads that see the slice.

        Args:
            lora_A: (H, r, in). lora_B, merged_B: (H, ..., r), rows of B and of B' that are the same.
        """
        right, left = self.alone(lora_A), self.alone(self._gated(lora_B))
        if self.merged_A is not None and merged_B is not None:
            left, right = lowrank.stacked(right, left, self.merged_A, merged_B)
        if self.num_slices < self.heads:
            left, right = (factor.unsqueeze(0) for factor in lowrank.side_by_side(right, left))
        return right, left

    def _gated(self, B: Tensor) -> Tensor:
        """Columns of B (H, ..., r), as they count in training."""
        return B if self.gates is None or not self.training else B * self.gates

    def alone(self, factor: Tensor) -> Tensor:
        """The same tensor, through which each head gets the gradient that it would have had alone."""
        if self.num_slices == 1:
            return factor
        same: Tensor = _HeadGradient.apply(factor, self.heads)  # type: ignore[no-untyped-call]
        return same

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank},"
            f" heads={self.heads}, scale={self.spec.scale:g}, base={self.quant}"
        )


def indivisible(site: str, batch: int, heads: int) -> ConfigError:
    """What a site whose input has so many samples is refused with."""
    return ConfigError(
        [
            f"{site}: a batch of {batch} cannot be cut into {heads} equal slices, one a head; what sees no"
            " batch, as position embeddings, or rows gathered from all samples, as experts, takes one head"
            " alone: name it in lora.exclude, or set lora.heads=1"
        ]
    )


class Tied(nn.Module):
    """A further module of a tied weight; it computes with the base and heads of the one that has them."""

    def __init__(self, adapted: Adapted) -> None:
        super().__init__()
        # In a tuple, where torch does not find it: base and heads have one name, and count once.
        self._adapted = (adapted,)

    @property
    def adapted(self) -> Adapted:
        """The module that has the base and the heads."""
        return self._adapted[0]

    @property
    def weight(self) -> Tensor:
        """As `Adapted.weight`."""
        return self.adapted.weight
