"""Multi-head attention whose projections are frozen bases plus H LoRA heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lte.config import LoRA
from lte.nn.linear import ALL, LoRALinear, product
from lte.nn.sites import HeadSpec
from lte.quantize import Quant

_TAKEN_OVER = (
    "embed_dim",
    "kdim",
    "vdim",
    "_qkv_same_embed_dim",
    "num_heads",
    "dropout",
    "batch_first",
    "head_dim",
    "add_zero_attn",
)


class LoRAMultiheadAttention(nn.MultiheadAttention):
    """What `nn.MultiheadAttention` computes, of the same arguments.

    Those of its weights that get heads become modules: `in_proj_weight` becomes `in_proj`, say, where
    torch has no module. LoRA heads slice the batch, wherever `batch_first` puts it.

    torch's fused encoder layer, in eval mode and without gradients, reads `in_proj_weight` and
    `out_proj.weight`: it finds the published weights.
    """

    def __init__(
        self, plain: nn.MultiheadAttention, specs: Mapping[str, HeadSpec], lora: LoRA, quant: Quant
    ) -> None:
        """Take over the parameters and `out_proj` of an attention.

        Args:
            specs: heads of its own weights, by `.in_proj`, or `.q_proj`, `.k_proj` and `.v_proj`.
        """
        nn.Module.__init__(self)
        for name in _TAKEN_OVER:
            setattr(self, name, getattr(plain, name))
        self.bias_k = self.bias_v = None
        heads = {}
        for name, parameter in plain._parameters.items():
            site = name.removesuffix("_weight")
            if parameter is not None and f".{site}" in specs:
                heads[site] = LoRALinear(parameter, None, specs[f".{site}"], lora, quant)
            else:
                if name in ("bias_k", "bias_v"):
                    delattr(self, name)
                self.register_parameter(name, parameter)
        for site, linear in heads.items():
            self.add_module(site, linear)
        self.out_proj = plain.out_proj

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name.endswith("_proj_weight") and (heads := modules.get(name.removesuffix("_weight"))) is not None:
            return heads.weight
        return super().__getattr__(name)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is missing")
        is_batched = query.dim() == 3
        q, k, v = self._projected(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, -1)], 1)
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        # The hint is taken only where nothing else needs the mask itself.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if is_causal else self._mask(attn_mask, key_padding_mask, q, key)
        weights = None
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.mT
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        # As torch, which reads its weight and never calls it: no hook of out_proj is called.
        y = self.out_proj.forward(y.transpose(1, 2).flatten(2))
        if not is_batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, time, embed_dim); those of one input by one product."""
        q, k, v = (self._batch_first(x) for x in (query, key, value))
        if self._qkv_same_embed_dim and key is value:
            if query is key:
                return self._projection(q, 0, 3).chunk(3, -1)  # type: ignore[return-value]
            k, v = self._projection(k, 1, 3).chunk(2, -1)
            return self._projection(q, 0, 1), k, v
        return self._projection(q, 0, 1), self._projection(k, 1, 2), self._projection(v, 2, 3)

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _projection(self, x: Tensor, first: int, last: int) -> Tensor:
        """The first to last of the projections to queries, keys and values."""
        rows = slice(first * self.embed_dim, last * self.embed_dim)
        bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
        site = "in_proj"
        if not self._qkv_same_embed_dim:
            site, rows = ("q_proj", "k_proj", "v_proj")[first], ALL
        if (heads := self._modules.get(site)) is None:
            return F.linear(x, self.get_parameter(f"{site}_weight")[rows], bias)
        assert isinstance(heads, LoRALinear)
        with_heads = heads.training or heads.evaluates_heads
        return product(heads, x, bias, with_heads=with_heads, rows=rows)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, key: Tensor
    ) -> Tensor | None:
        """What is added to the scores (batch, num_attention_heads, targets, sources); None for nothing.

        Args:
            q: (batch, num_attention_heads, targets, ...). key: as it came in.
        """
        batch, heads, targets, _ = q.shape
        sources = key.shape[-2] if self.batch_first or key.dim() == 2 else key.shape[0]
        mask = None
        if attn_mask is not None:
            wanted = (targets, sources) if attn_mask.dim() == 2 else (batch * heads, targets, sources)
            if attn_mask.shape != wanted:
                raise RuntimeError(f"attn_mask: has the shape {tuple(attn_mask.shape)}, not {wanted}")
            of_heads = heads if attn_mask.dim() == 3 else 1
            mask = _additive(attn_mask, q.dtype).view(-1, of_heads, targets, sources)
        if key_padding_mask is not None:
            if key_padding_mask.numel() != batch * sources:
                wanted = (batch, sources)
                raise RuntimeError(f"key_padding_mask: {tuple(key_padding_mask.shape)}, not {wanted}")
            padding = _additive(key_padding_mask, q.dtype).view(batch, 1, 1, sources)
            mask = padding if mask is None else mask + padding
        added = int(self.bias_k is not None) + int(self.add_zero_attn)  # sources that no mask knows
        return F.pad(mask, (0, added)) if mask is not None and added else mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to scores, of one that may say True where there is nothing to see."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return mask.to(dtype)
