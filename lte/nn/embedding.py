"""An embedding whose table is a frozen base plus H LoRA heads."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lte import lowrank, quantize
from lte.config import LoRA
from lte.nn.adapted import Adapted
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

    def forward(self, tokens: Tensor) -> Tensor:
        y = _rows(self.base, tokens).to(self.lora_A.dtype)
        return y + self._heads_product(tokens) if self.training else y

    def _heads_product(self, tokens: Tensor) -> Tensor:
        """s (B A - B' A')[tokens], each slice of the batch by its own head."""
        # Row t of head h, where the heads' B lie one below the other.
        first_rows = torch.arange(self.heads, device=tokens.device)[:, None] * self.out_features
        index = self.sliced(tokens).reshape(self.heads, -1) + first_rows
        A, B = self.of_heads(self.lora_A), self.of_heads(F.embedding(index, self.lora_B.flatten(0, 1)))
        if self.merged_A is not None and self.merged_B is not None:
            merged_B = F.embedding(index, self.merged_B.flatten(0, 1))
            B, A = lowrank.stacked(A, B, self.merged_A, merged_B)
        return torch.bmm(B * self.scale, A).view(*tokens.shape, self.in_features)


def can_adapt(embedding: nn.Embedding) -> bool:
    """Whether it is a plain table: no row or gradient of it is treated apart from the others."""
    return (
        embedding.padding_idx is None
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding.sparse
    )


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
