"""The exponential average of the master over versions: what a noisy end of a run settles around."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_WEIGHT = "/weight"
"""Name of the sum of weights among the tensors of a state; no module or parameter has it."""


class Average:
    """e <- decay e + (1 - decay) W after every merge, divided by the sum of the weights in it.

    Attributes:
        tensors: the average so corrected, by name; empty before the first merge.
        weight: that sum, 1 - decay^n after n merges.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.weight = 0.0

    def include(self, now: Mapping[str, Tensor], decay: float) -> None:
        """Take the weights after a merge in. Makes new tensors: those before may be written meanwhile."""
        self.weight = decay * self.weight + (1 - decay)
        share = (1 - decay) / self.weight
        self.tensors = {
            name: torch.lerp(self.tensors.get(name, tensor), tensor, share) for name, tensor in now.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint; none where nothing is averaged."""
        if not self.tensors:
            return {}
        return self.tensors | {_WEIGHT: torch.tensor(self.weight, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        self.tensors = {name: tensor.clone() for name, tensor in state.items() if name != _WEIGHT}
        self.weight = float(state[_WEIGHT]) if state else 0.0
