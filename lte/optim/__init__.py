"""A worker's own (inner) optimizer, as the recipe has it. Its state never leaves the worker.

    groups      learning rates and decays of a converted model's parameters
    muon        orthogonalized momentum for matrices, AdamW for the rest
    clip        bounds on gradients
    partial     steps that move chosen elements alone
    state       what is remembered, for a file

All of it acts on models with heads, dense ones among them; the outer optimizer is in `lte.merge`.
"""

from __future__ import annotations

import torch
from torch import nn

from lte.config import Optimizer
from lte.errors import ConfigError
from lte.optim.clip import clip
from lte.optim.groups import Group, check_patterns, groups
from lte.optim.muon import Muon
from lte.optim.partial import moving_only
from lte.optim.state import flat, load_flat

__all__ = ["check_patterns", "clip", "flat", "load_flat", "make_optimizer", "moving_only"]


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """The recipe's optimizer for a converted model.

    Raises:
        ConfigError: a pattern matches no parameter, or the optimizer needs what this machine does not have.
    """
    chosen, betas = groups(model, settings), (settings.beta1, settings.beta2)
    if settings.name == "sgd":
        return torch.optim.SGD(chosen, lr=settings.lr, momentum=settings.momentum)
    if settings.name == "muon":
        return Muon(
            chosen,
            lr=settings.lr,
            momentum=settings.muon_momentum,
            dtype=torch.bfloat16 if settings.muon_dtype == "bf16" else torch.float32,
            scale=settings.muon_scale,
            betas=betas,
            eps=settings.eps,
        )
    if settings.name == "adamw":
        return torch.optim.AdamW(chosen, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
    return _of_8_bits(chosen, settings)


def _of_8_bits(chosen: list[Group], settings: Optimizer) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, whose moments take a byte an element; paged: in memory of the host where a GPU's
    is full."""
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit  # takes 2 s

    is_paged = settings.name == "paged-adamw8bit"
    if is_paged and any(p.device.type == "cpu" for group in chosen for p in group["params"]):
        raise ConfigError(["optimizer.name: paged-adamw8bit needs a GPU; use adamw8bit on a CPU"])
    made: torch.optim.Optimizer = (PagedAdamW8bit if is_paged else AdamW8bit)(
        chosen, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps
    )
    return made
