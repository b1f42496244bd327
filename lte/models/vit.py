"""A small vision transformer: pre-norm blocks, a class token, learnt positions, GELU MLP.

Shapes: B images, H height, W width, P patches, T = 1 + P tokens, C width of the residual stream, N
attention heads, D = C / N.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lte.config import Model
from lte.lowrank import generator_of


class Attention(nn.Module):
    """Self-attention of all tokens."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        qkv = self.qkv(x_BTC).view(B, T, 3, self.num_attention_heads, -1).permute(2, 0, 3, 1, 4)
        y_BNTD = F.scaled_dot_product_attention(*qkv.unbind(0))
        y: Tensor = self.out(y_BNTD.transpose(1, 2).reshape(B, T, C))
        return y


class MLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x_BTC)))
        return y


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC))
        x_BTC = x_BTC + self.mlp(self.mlp_norm(x_BTC))
        return x_BTC


class ViT(nn.Module):
    """Images to logits."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        num_patches = (config.image_size // config.patch_size) ** 2
        self.patches = nn.Linear(config.channels * config.patch_size**2, config.width)
        self.class_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.positions = nn.Parameter(torch.empty(1, 1 + num_patches, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.output = nn.Linear(config.width, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, channels, H, W), H = W = image_size."""
        # A convolution that strides by its own size, as a product: (B, channels * patch_size^2, P) first.
        patches = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        x_BPC = self.patches(patches)
        x_BTC = torch.cat([self.class_token.expand(len(x_BPC), -1, -1), x_BPC], dim=1) + self.positions
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits: Tensor = self.output(self.norm(x_BTC[:, 0]))
        return logits

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Truncated normals of standard deviation 0.02, biases of zero, norms of one.

        Each tensor has a generator of its own, so its values do not depend on the others.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            else:
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator_of(seed, "init", name))
