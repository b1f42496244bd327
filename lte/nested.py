"""Smaller models out of one run: heads of nested ranks (DyLoRA), cut to any rank after training.

A run with `lora.nested` trains the first b rows of A and columns of B so that each b is a model. Where the
heads of its worker were never reset (reset-less, never), the weights hold s B A of them whole, and the server
knows A and B. What came before these heads, such as those of an earlier phase, stays whole.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lte import lowrank
from lte.compress import A, B
from lte.config import Override
from lte.errors import RunError
from lte.nn import from_matrix
from lte.server.master import Master


class Cuts:
    """Weights of a run, with each module's heads cut to a rank of its own.

    Attributes:
        ranks: lora_rank of each module's heads, by `MODULE`.
        features: numbers of each module's heads a rank: in + out, of each.
    """

    def __init__(self, master: Master) -> None:
        """Find the heads in a master that has been loaded.

        Raises:
            RunError: the run has no nested ranks, has merged them beyond recall, or the server knows the
                heads of no worker, or of several.
        """
        lora = master.recipe.lora
        if lora.nested == "none" or not lora.keeps_factors:
            raise RunError(
                f"ranks cannot be taken out of a run with lora.nested = {lora.nested}, lora.merge ="
                f" {lora.merge}: its heads must be nested (unfrozen, frozen) and kept (reset-less, never)"
            )
        if len(master.merged) != 1:
            names = f" ({', '.join(sorted(master.merged))})" if master.merged else ""
            raise RunError(
                f"the master holds heads of {len(master.merged)} workers{names}: ranks can be taken out of"
                " those of one alone"
            )
        self._master, self._lora = master, lora
        (self._heads,) = master.merged.values()
        # The worker's, which may be smaller than the recipe's.
        self.ranks = {name: self._heads[name + A].shape[1] for name in master.plan.adapted}
        self.features = {n: lora.heads * sum(spec.shape) for n, spec in master.plan.adapted.items()}

    def at(self, rank: int) -> dict[str, int]:
        """All heads cut to a rank; those that have no more of it stay whole.

        Raises:
            RunError: none has as much.
        """
        most = max(self.ranks.values(), default=0)
        if rank > most:
            raise RunError(f"there is no rank {rank} in heads of lora_rank {most}")
        return {name: min(rank, whole) for name, whole in self.ranks.items()}

    def rungs(self, name: str) -> tuple[int, ...]:
        """The ranks that a module's heads may be cut to in a search, ascending: those that were drawn in
        training; without `lora.nested_ranks` the least of them, powers of two, and the whole."""
        rank = self.ranks[name]
        drawn = sorted(set(self._lora.drawn_ranks(rank)))
        if self._lora.nested_ranks:
            return tuple(drawn)
        return tuple(b for b in drawn if b in (drawn[0], rank) or b.bit_count() == 1)

    def scale(self, name: str, rank: int) -> float:
        """lora_scale s of heads that are cut to this rank: lora_alpha stays."""
        return self._master.plan.adapted[name].scale * self._lora.nested_scale(self.ranks[name], rank)

    def weight(self, name: str, whole: Tensor, rank: int) -> Tensor:
        """A module's weight with its heads cut to a rank.

        Args:
            whole: the plain parameter with all of the heads.
        """
        if rank >= self.ranks[name]:
            return whole
        spec, lora_A, lora_B = self._master.plan.adapted[name], self._heads[name + A], self._heads[name + B]
        gates = torch.zeros(self.ranks[name])
        gates[:rank] = self._lora.nested_scale(self.ranks[name], rank)
        tail = lowrank.sum_of_heads(lora_A, lora_B * (1 - gates), spec.scale / len(lora_A))
        return whole - from_matrix(tail, spec)

    def overrides(self, ranks: Mapping[str, int]) -> tuple[Override, ...]:
        """`lora.overrides` of a recipe whose heads have these ranks from the start, and this lora_alpha."""
        scaled = self._lora.scaling == "given"
        chosen = (
            Override(
                modules=glob.escape(name),
                rank=rank,
                scale=self.scale(name, rank) if scaled else None,
            )
            for name, rank in ranks.items()
        )
        return (*self._lora.overrides, *chosen)

    @torch.no_grad()
    def fill(self, model: nn.Module, which: str, ranks: Mapping[str, int]) -> None:
        """Put the weights, `published` or `master`, into a plain model, with these ranks."""
        self._master.fill(model, which)
        for name, spec in self._master.plan.adapted.items():
            parameter = model.get_parameter(spec.parameter)
            parameter.copy_(self.weight(name, parameter, ranks[name]))
