"""Steps of an optimizer that move chosen elements alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def moving_only(optimizer: torch.optim.Optimizer, moving: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Give all other elements of these parameters, and their moments, back what they were before the steps
    taken meanwhile.

    A gradient of zero is not enough: AdamW and momentum would move what is not used in a step by what they
    remember, and forget it meanwhile. As with torch's SparseAdam all elements share one count of steps, by
    which AdamW corrects its moments.

    Args:
        optimizer: keeps, of each parameter, tensors of its shape or none that a step changes by element.
        moving: by parameter, bool, in a shape that broadcasts to its own: which elements may move. The
            gradients of the others are zero.
    """
    before = {
        parameter: [(tensor, tensor.clone()) for tensor in _by_element(optimizer, parameter)]
        for parameter in moving
    }
    yield
    with torch.no_grad():
        for parameter, kept in before.items():
            for tensor, old in kept:
                tensor.copy_(torch.where(moving[parameter], tensor, old))


def _by_element(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Iterator[Tensor]:
    """A parameter and what the optimizer keeps of each of its elements."""
    yield parameter.detach()
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            yield value
