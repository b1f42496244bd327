"""The master weights and what is published of them. No socket, disk or clock."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lte import compress, lowrank, merge, quantize
from lte.compress import A, B
from lte.config import Outer, Recipe
from lte.errors import ConfigError
from lte.nn import adapted_modules, plan


@dataclass(frozen=True)
class Received:
    """One worker's contribution, decoded and found valid.

    Attributes:
        incarnation: of the worker that sent it. heads: how many heads it trains.
        first_head: index of its first head among all workers'. draw: redraws of its A so far.
        tensors: `MODULE/A` (H, r, in) unless A is given, `MODULE/B` (H, out, r), dense deltas.
    """

    incarnation: int
    heads: int
    first_head: int
    draw: int
    tokens: int
    tensors: dict[str, Tensor]


class Master:
    """W in fp32, the base Q that is published of it, the outer optimizer's state, and every
    worker's merged factors.

    W starts as deq(Q_0): from scratch that costs nothing, and what is published is the master then.

    Attributes:
        weights: W of every adapted module, by `MODULE`. dense: every dense parameter, by name.
        base: Q, by `MODULE`. momentum: of the outer optimizer, by module or parameter name.
        merged: incarnation -> MODULE/A, MODULE/B -> merged factors (H, r, in), (H, out, r); only in
            reset-less mode.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        """Take the initial weights of a plain (unconverted) model, which is not changed.

        Raises:
            ConfigError: the model is converted, or the recipe's patterns do not fit it.
        """
        if any(adapted_modules(model)):
            raise ConfigError(["the server needs the plain model; this one was converted"])
        self.recipe = recipe
        self.plan = plan(model, recipe.lora, recipe.base.quant)
        parameters = dict(model.named_parameters())
        # On the CPU, where contributions arrive and where merges give the same bits everywhere.
        initial = {name: parameters[f"{name}.weight"].detach().cpu() for name in self.plan.adapted}
        self.base = {name: quantize.quantize(w, recipe.base.quant) for name, w in initial.items()}
        self.weights = {name: quantize.dequantize(base).clone() for name, base in self.base.items()}
        self.dense = {name: parameters[name].detach().cpu().clone() for name in self.plan.dense}
        self.momentum: dict[str, Tensor] = {}
        self.merged: dict[int, dict[str, Tensor]] = {}
        self._given: dict[int, tuple[int, dict[str, Tensor]]] = {}

    # Contributions

    def expected_tensors(self, heads: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes (all fp32) that a contribution of this many heads must have."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, spec in self.plan.adapted.items():
            out_features, in_features = spec.shape
            if self.recipe.lora.A == "trained":
                shapes[name + A] = (heads, spec.rank, in_features)
            shapes[name + B] = (heads, out_features, spec.rank)
        return shapes | self.plan.dense

    def keep_only(self, incarnations: Collection[int]) -> None:
        """Drop the merged factors of all other workers: their heads are gone."""
        self.merged = {who: held for who, held in self.merged.items() if who in incarnations}

    def merged_digest(self, incarnation: int) -> str:
        """Digest of a worker's merged factors; of nothing while these are zero."""
        return quantize.digest(sorted(self.merged.get(incarnation, {}).items()))

    # Merging

    @torch.no_grad()
    def merge(self, contributions: Sequence[Received], num_missing_heads: int) -> dict[str, float]:
        """Fold contributions into W and the dense parameters, and requantize W into Q.

        Returns:
            `codes_changed`, the share of codes of Q that this merge changed.
        """
        shares = merge.shares(
            [c.heads for c in contributions],
            [c.tokens for c in contributions],
            num_missing_heads,
            self.recipe.outer.weights,
        )
        outer, changed, total = self.recipe.outer, 0, 0
        for name, spec in self.plan.adapted.items():
            heads = [
                merge.HeadDelta(*factors, spec.scale * share)
                for contribution, share in zip(contributions, shares, strict=True)
                for factors in self._factors(name, contribution)
            ]
            self._step(name, self.weights, merge.mean_delta(heads), outer)
            base = quantize.quantize(self.weights[name], self.plan.quant)
            changed += int((base.codes != self.base[name].codes).sum())
            total += base.codes.numel()
            self.base[name] = base
        # The decay is of adapted weights alone.
        average = replace(outer, weight_decay=0.0) if outer.dense else Outer()
        for name in self.plan.dense:
            delta = torch.zeros_like(self.dense[name])
            for contribution, share in zip(contributions, shares, strict=True):
                delta += contribution.tensors[name] * (share * contribution.heads)
            self._step(name, self.dense, delta, average)
        if self.recipe.lora.merge == "reset-less":
            for contribution in contributions:
                self.merged[contribution.incarnation] = self._rebuilt(contribution)
        return {"codes_changed": changed / max(total, 1)}

    def _step(self, name: str, weights: dict[str, Tensor], delta: Tensor, outer: Outer) -> None:
        weights[name], momentum = merge.outer_step(weights[name], delta, self.momentum.get(name), outer)
        if momentum is not None:
            self.momentum[name] = momentum

    def _rebuilt(self, contribution: Received) -> dict[str, Tensor]:
        """The worker's factors as the server knows them: what it sent on top of the merged ones."""
        held = self.merged.get(contribution.incarnation, {})
        rebuilt = {}
        for name in self.plan.adapted:
            sent_B = contribution.tensors[name + B]
            rebuilt[name + B] = compress.rebuild(sent_B, held.get(name + B))
            rebuilt[name + A] = self._A_of(name, contribution, held.get(name + A))
        return rebuilt

    def _factors(
        self, name: str, contribution: Received
    ) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
        """A, B, A', B' of each of the worker's heads on one module."""
        held = self.merged.get(contribution.incarnation, {})
        merged_A, merged_B = held.get(name + A), held.get(name + B)
        now_B = compress.rebuild(contribution.tensors[name + B], merged_B)
        now_A = self._A_of(name, contribution, merged_A)
        return [
            (
                now_A[h],
                now_B[h],
                None if merged_A is None else merged_A[h],
                None if merged_B is None else merged_B[h],
            )
            for h in range(contribution.heads)
        ]

    def given_A(self, first_head: int, heads: int, draw: int) -> dict[str, Tensor]:
        """A frozen or rotating A of one worker, MODULE/A -> (H, r, in), drawn as the worker did."""
        known = self._given.get(first_head)
        if known is None or known[0] != draw or any(len(A) != heads for A in known[1].values()):
            known = (draw, {name + A: self._draw(name, first_head, heads, draw) for name in self.base})
            self._given[first_head] = known
        return known[1]

    def given_digest(self, first_head: int, heads: int, draw: int) -> str:
        """Digest of what the worker must have drawn; '' where A is sent."""
        if self.recipe.lora.A == "trained" or not self.base:
            return ""
        return quantize.digest(self.given_A(first_head, heads, draw).items())

    def _draw(self, name: str, first_head: int, heads: int, draw: int) -> Tensor:
        spec = self.plan.adapted[name]
        return lowrank.draw_A_of_heads(
            spec.rank,
            spec.shape[1],
            init=spec.init,
            subspace=self.recipe.lora.subspace,
            seed=self.recipe.run.seed,
            module=name,
            heads=range(first_head, first_head + heads),
            draw=draw,
        )

    def _A_of(self, name: str, contribution: Received, merged_A: Tensor | None) -> Tensor:
        if self.recipe.lora.A == "trained":
            return compress.rebuild(contribution.tensors[name + A], merged_A)
        return self.given_A(contribution.first_head, contribution.heads, contribution.draw)[name + A]

    # Publishing

    def published(self) -> dict[str, Tensor]:
        """The tensors of an update: every module's base, every dense parameter."""
        tensors: dict[str, Tensor] = {}
        for name, base in self.base.items():
            tensors |= compress.encode_base(name, base)
        return tensors | self.dense

    def base_digest(self) -> str:
        """Digest of what is published, which every worker must reach."""
        return quantize.digest(self.published().items())

    def master_digest(self) -> str:
        """Digest of the bits of W and of the dense parameters."""
        return quantize.digest([*sorted(self.weights.items()), *sorted(self.dense.items())])

    def parameters(self, which: str) -> dict[str, Tensor]:
        """Parameters of the plain model, by name: `published` (deq(Q)) or `master` (W)."""
        if which == "master":
            adapted = {f"{name}.weight": weight for name, weight in self.weights.items()}
        else:
            adapted = {f"{n}.weight": quantize.dequantize(base) for n, base in self.base.items()}
        return adapted | self.dense

    @torch.no_grad()
    def fill(self, model: nn.Module, which: str) -> None:
        """Copy these `parameters` into a plain model of the same names."""
        parameters = dict(model.named_parameters())
        for name, tensor in self.parameters(which).items():
            parameters[name].copy_(tensor)

    # State

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a checkpoint must hold, as named groups of tensors."""
        base: dict[str, Tensor] = {}
        for name, quantized in self.base.items():
            base |= compress.encode_base(name, quantized)
        return {
            "master": {f"{name}.weight": weight for name, weight in self.weights.items()} | self.dense,
            "base": base,
            "momentum": self.momentum,
        }

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `state` returned. Workers start with new heads, so none are merged."""
        for name in self.weights:
            self.weights[name] = state["master"][f"{name}.weight"].clone()
            self.base[name] = compress.decode_base(name, self.base[name], state["base"])
        self.dense = {name: state["master"][name].clone() for name in self.dense}
        self.momentum = {name: tensor.clone() for name, tensor in state["momentum"].items()}
        self.merged = {}
