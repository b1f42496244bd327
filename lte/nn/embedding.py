"""An embedding whose table is a frozen base plus H LoRA heads."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lte import quantize
from lte.config import LoRA
from lte.nn.adapted import Adapted, Tied
from lte.nn.sites import HeadSpec
from lte.quantize import Quant, Quantized


class LoRAEmbedding(Adapted):
    """y = deq(Q)[t] + s [(B - B')[t] A + B'[t] (A - A')] of tokens t; no product has the table's shape.

    The table's weight is (num_embeddings, width): out_features rows of in_features. Of tokens
    `lora.dropout` drops none.
    """

    def __init__(self, embedding: nn.Embedding, spec: HeadSpec, lora: LoRA, quant: Quant) -> None:
        """Take over the table (see `Adapted`) of an embedding that `can_adapt`."""
        assert can_adapt(embedding)
        super().__init__(embedding.weight, spec, lora, quant)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        with_heads = self.training or self.evaluates_heads
        return lookup(self, input, self.padding_idx, with_heads=with_heads)


class TiedEmbedding(Tied):
    """An embedding whose table another module has."""

    def __init__(self, embedding: nn.Embedding, adapted: Adapted) -> None:
        super().__init__(adapted)
        self.padding_idx = embedding.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        with_heads = self.training or self.adapted.evaluates_heads
        return lookup(self.adapted, input, self.padding_idx, with_heads=with_heads)


def lookup(of: Adapted, tokens: Tensor, padding_idx: int | None, *, with_heads: bool) -> Tensor:
    """deq(Q)[tokens] and, with heads, s (B A - B' A')[tokens], each slice of the batch by its own head.

    Args:
        padding_idx: a token whose row is not trained: its rows of B get no gradient, and stay zero.
    """
    y = _rows(of.base, tokens).to(of.lora_A.dtype)
    return y + _heads_product(of, tokens, padding_idx) if with_heads else y


def _heads_product(of: Adapted, tokens: Tensor, padding_idx: int | None) -> Tensor:
    # Row t of head h, where the heads' B lie one below the other; heads see their slices, or all the whole.
    first_rows = torch.arange(of.heads, device=tokens.device)[:, None] * of.out_features
    in_slices = of.sliced(tokens).reshape(of.num_slices, -1)
    index = in_slices + first_rows
    B = F.embedding(index, of.lora_B.flatten(0, 1))
    if padding_idx is not None:
        B = B.masked_fill((in_slices == padding_idx)[:, :, None], 0)
    if of.is_full:
        return of.alone(B).view(*tokens.shape, of.in_features)
    merged_B = None if of.merged_B is None else F.embedding(index, of.merged_B.flatten(0, 1))
    A, B = of.of_slices(of.lora_A, B, merged_B)
    return torch.bmm(B * of.scale, A).view(*tokens.shape, of.in_features)


def can_adapt(embedding: nn.Embedding) -> bool:
    """Whether its rows and their gradients are taken as they are."""
    return embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse


@torch.no_grad()
def _rows(base: Quantized, tokens: Tensor) -> Tensor:
    """deq(Q)[tokens]. Only these rows are dequantized, if no block lies in two rows.

    Tokens that occur twice are dequantized twice: the result holds them twice anyhow, and finding
    them costs more.
    """
    num_embeddings, width = base.shape
    flat = tokens.flatten()
    if base.quant == "none" or width % quantize.BLOCK:
        rows = quantize.dequantize(base).index_select(0, flat)
    else:
        # index_select, unlike indexing, refuses negative tokens.
        codes = base.codes.view(num_embeddings, -1).index_select(0, flat).flatten()
        scales = base.scales.view(num_embeddings, -1).index_select(0, flat).flatten()
        part = replace(base, shape=(flat.numel(), width), codes=codes, scales=scales)
        rows = quantize.dequantize(part)
    return rows.view(*tokens.shape, width)
