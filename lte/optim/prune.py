"""Moments of which a share is set to zero, in place: what ReLoRA does to its optimizer at a restart."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def by_magnitude(moments: Tensor, share: float) -> None:
    """Set the smallest to zero: all that are no larger than the quantile `share` of all magnitudes."""
    magnitudes = moments.abs()
    at_most = magnitudes.flatten().kthvalue(math.floor(share * (moments.numel() - 1)) + 1).values
    moments.mul_(magnitudes > at_most)


def at_random(moments: Tensor, share: float, generator: torch.Generator) -> None:
    """Set each to zero with the probability `share`. The draws are a CPU's, on any device."""
    kept = torch.rand(moments.shape, generator=generator) >= share
    moments.mul_(kept.to(moments.device))
