"""Bounds on the norms of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lte.config import Optimizer
from lte.nn import parameter_groups

_EPS = 1e-6
"""torch's, which keeps the quotient of bound and norm finite."""


def clip(model: nn.Module, settings: Optimizer) -> None:
    """Scale the gradients of a converted model down to `optimizer.clip_norm`, if that is not 0.

    One vector, whose norm is bounded, are by `optimizer.clip_by`: all gradients; those of lora_A, lora_B
    and dense parameters each; those of A and B of one head, in all modules, for each head, and the dense.
    """
    if not settings.clip_norm:
        return
    groups = parameter_groups(model)
    if settings.clip_by == "head":
        of_heads = [p.grad for kind in groups if kind != "dense" for p in groups[kind] if p.grad is not None]
        clip_heads(of_heads, settings.clip_norm)
        groups = {kind: parameters for kind, parameters in groups.items() if kind == "dense"}
    elif settings.clip_by == "all":
        groups = {"all": [p for parameters in groups.values() for p in parameters]}
    for parameters in groups.values():
        nn.utils.clip_grad_norm_(parameters, settings.clip_norm)


@torch.no_grad()
def clip_heads(gradients: Sequence[Tensor], most: float) -> None:
    """Scale, in place, the gradients of each head down to a norm.

    Args:
        gradients: (H, ...) of all factors; index h in all of them is one vector.
    """
    if not gradients:
        return
    norms = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients])
    factors = (most / (torch.linalg.vector_norm(norms, dim=0) + _EPS)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))
