"""A small GPT: pre-norm blocks, rotary positions, GELU MLP, no biases.

Shapes: B sequences, T tokens, C width, N attention heads, D = C / N.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lte.config import Model
from lte.lowrank import seed_of


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        B, T, C = x_BTC.shape
        qkv = self.qkv(x_BTC).view(B, T, 3, self.num_attention_heads, -1).permute(2, 0, 3, 1, 4)
        q_BNTD, k_BNTD, v_BNTD = qkv.unbind(0)
        q_BNTD, k_BNTD = _rotate(q_BNTD, rotation), _rotate(k_BNTD, rotation)
        y_BNTD = F.scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD, is_causal=True)
        y: Tensor = self.out(y_BNTD.transpose(1, 2).reshape(B, T, C))
        return y


class MLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x_BTC)))
        return y


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), rotation)
        x_BTC = x_BTC + self.mlp(self.mlp_norm(x_BTC))
        return x_BTC


class GPT(nn.Module):
    """Tokens to logits."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, vocab_size) of the token after each of tokens (B, T)."""
        x_BTC = self.embedding(tokens_BT)
        rotation = _rotation(tokens_BT.shape[1], self.config, x_BTC)
        for block in self.blocks:
            x_BTC = block(x_BTC, rotation)
        logits: Tensor = self.output(self.norm(x_BTC))
        return logits

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Normal weights of standard deviation 1/sqrt(in); residual outputs by 1/sqrt(2 layers) less.

        Each tensor has a generator of its own, so its values do not depend on the others.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            std = 0.02 if name == "embedding.weight" else 1 / math.sqrt(parameter.shape[1])
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                std /= math.sqrt(2 * self.config.num_layers)
            generator = torch.Generator().manual_seed(seed_of(seed, "init", name))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def _rotation(num_tokens: int, config: Model, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D / 2) of the rotary angles t * 10000^(-2i / D)."""
    half = config.width // config.num_attention_heads // 2
    frequency = 10000.0 ** (-torch.arange(half, device=like.device, dtype=torch.float32) / half)
    angle = torch.arange(num_tokens, device=like.device, dtype=torch.float32)[:, None] * frequency
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotate(x_BNTD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    left, right = x_BNTD.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)
