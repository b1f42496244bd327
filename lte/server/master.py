"""The master weights and what is published of them. No socket, disk or clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lte import lowrank, merge, optim, quantize
from lte.compress import (
    CODES,
    CONSTANT,
    DENSE,
    SCALES,
    A,
    B,
    blockwise,
    changes,
    constants,
    factors,
    tensors_of,
)
from lte.config import Codec, Outer, Recipe
from lte.errors import ConfigError, WireError
from lte.merge import HeadDelta, Robust
from lte.nn import Plan, adapted_modules, blocks, from_matrix, part_of, plan, to_matrix
from lte.quantize import Quantized
from lte.server.average import Average

Result = TypeVar("Result")

_RUN = "*"
"""In place of a worker's name, which it cannot be: whose heads are that are never merged."""


@dataclass(frozen=True)
class Received:
    """One worker's contribution, decoded and found valid.

    Attributes:
        worker_id: of who sent it. heads: how many heads it trains. rank: the most that they have.
        scale: their lora_scale; 0: the recipe's.
        first_head: index of its first head among all workers'. draw: redraws of its A so far.
        tensors: changes of `MODULE/A` (H, r, in) unless A is given, of `MODULE/B` (H, out, r), and
            of dense parameters and statistics, `NAME/dense`; statistics themselves, not their changes,
            where contributions are merged on arrival.
    """

    worker_id: str
    heads: int
    rank: int
    first_head: int
    draw: int
    tokens: int
    tensors: dict[str, Tensor]
    scale: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a merge came to.

    Attributes:
        change: length of the change of W. step: that of one where each weight changes by a step of its
            base's quantization; 0 for a base without any.
        bounded: worker_id -> share of its contribution's length that was merged, where bounds cut it.
        trimmed: workers whose contribution was left out of the change, though it counts as merged.
        heads: by module, the weighted deltas of all heads, where they were to be kept.
    """

    change: float
    step: float
    bounded: dict[str, float]
    trimmed: tuple[str, ...]
    heads: dict[str, list[HeadDelta]] = field(default_factory=dict)

    @property
    def in_steps(self) -> float:
        """Root mean square of the change of W, in steps of the base's quantization; 0 without any."""
        return self.change / self.step if self.step else 0.0

    @property
    def held_down(self) -> dict[str, Any]:
        """What the records say of robust merging."""
        return {
            "num_bounded": len(self.bounded),
            "num_trimmed": len(self.trimmed),
            "bounded": self.bounded,
            "trimmed": self.trimmed,
        }


@dataclass(frozen=True)
class Advance:
    """What a new version brought.

    Attributes:
        before: the base of the version before, which `changes_since` needs.
        dense: the bytes that tell workers of dense parameters and statistics, by `NAME/dense.0`.
        base_digest, master_digest: of what was published, and of the master.
    """

    before: dict[str, Quantized]
    dense: dict[str, Tensor]
    base_digest: str
    master_digest: str


class Master:
    """W in fp32, the base Q that is published of it, the outer optimizer's state, and every
    worker's merged factors.

    W starts as deq(Q_0): from scratch that costs nothing, and what is published is the master then. Weights
    that were trained before stay in W as they are (`Recipe.keeps_initial`), and Q_0 is what is rounded.
    Q is requantized from what it was, so it depends on its history, as does what is published of the
    dense parameters when a codec leaves something out.

    Heads may differ between workers: each has so many of them, of a rank that is in every module the
    recipe's or the worker's own, whichever is smaller, and of the recipe's scales or one of its own.

    Where heads are never merged Q stays Q_0. W, which is published then, is deq(Q_0) with the heads as the
    server knows them. Where factors are averaged these are dense parameters, and what is published of them
    makes what is published of W.

    Of a model that is divided among several servers (`server.shards`) each one's master holds its part:
    names and merges are of that part alone.

    Attributes:
        recipe: with the settings of the round on the version at hand. plan: what becomes of the model, or
            of this part, by them; built: what becomes of a whole one that joins, before its worker brings
            it to these.
        weights: W of every adapted module, by `MODULE`. dense: every dense parameter and statistic, by
            name, and the factors where these are averaged. averaged: the shapes of all these.
        constants: all that stays as it is, by name.
        base: Q, by `MODULE`. published_dense: the dense parameters and statistics that workers hold.
        outer_state: of the outer optimizer, by module or parameter name; see `merge.outer_step`.
        ema: average of weights and dense parameters over versions, with `outer.ema`. Statistics are not in
            it, as they are averages themselves: with it go the master's.
        merged: worker_id -> MODULE/A, MODULE/B -> merged factors (H, r, in), (H, out, r) in
            reset-less mode, and under `_RUN` where they are never merged; in reset-b MODULE/A alone, the A
            that was sent last (B' is zero), where A is trained and sent lossily.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, names: Collection[str] | None = None) -> None:
        """Take the initial weights of a plain (unconverted) model, which is not changed.

        Args:
            names: of the modules with heads, and other tensors, that are this master's; None: all.

        Raises:
            ConfigError: the model is converted, or the recipe's patterns do not fit it.
        """
        if any(adapted_modules(model)):
            raise ConfigError(["the server needs the plain model; this one was converted"])
        self.recipe = recipe = recipe.in_round(0)
        self.built = plan(model, recipe.as_built.lora, recipe.as_built.base.quant)
        self._names = names
        self.plan = self.plan_in(0)
        optim.check_patterns(self.built, recipe.optimizer)
        if recipe.train.checkpoint_activations:
            blocks(model, recipe.train.checkpoint_modules)  # raises where there are none
        parameters = named_tensors(model)
        self._given: dict[int, tuple[tuple[int, int, int], dict[str, Tensor]]] = {}
        # On the CPU, where contributions arrive and where merges give the same bits everywhere.
        initial = {
            name: to_matrix(parameters[spec.parameter].detach().cpu(), spec)
            for name, spec in self.plan.adapted.items()
        }
        self.base = {name: quantize.quantize(W, recipe.base.quant) for name, W in initial.items()}
        self.weights = {
            name: (W if recipe.keeps_initial else quantize.dequantize(self.base[name])).clone()
            for name, W in initial.items()
        }
        self._common_factors = self.plan.factors(recipe.lora) if recipe.averages_factors else {}
        self.averaged = self.plan.dense | self._common_factors | self.plan.statistics
        parameters |= {name: self._start_of(name) for name in self._common_factors}
        self.dense = {name: parameters[name].detach().cpu().clone() for name in self.averaged}
        self.published_dense = {name: tensor.clone() for name, tensor in self.dense.items()}
        self.constants = {
            name: parameters[name].detach().cpu().clone(memory_format=torch.contiguous_format)
            for name in self.plan.constants
        }
        self._constants_digests = constants.digests(self.constants)
        self.outer_state: dict[str, dict[str, Tensor]] = {}
        self.ema = Average()
        self.merged: dict[str, dict[str, Tensor]] = {}

    def enter(self, version: int, recipe: Recipe | None = None) -> None:
        """Have the settings of the round on a version: after the merge that makes it and before it is
        published, or before a state of it is loaded.

        Args:
            recipe: another one than so far.
        """
        before, self.recipe = self.recipe, (recipe or self.recipe).in_round(version)
        # From then on the workers' heads hold what they owe, and nothing of them is merged.
        if not self.recipe.has_heads_of(before):
            self.merged, self._given = {}, {}
        self.plan = self.plan_in(version)

    def plan_in(self, number: int) -> Plan:
        """The plan by the settings of a round."""
        recipe = self.recipe.in_round(number)
        whole = self.built.of_settings(recipe.lora, recipe.base.quant, full_rank=recipe.train.full_rank)
        return whole if self._names is None else part_of(whole, self._names)

    # Contributions

    def max_contribution(self, heads: int, rank: int) -> dict[str, int]:
        """The names that a contribution of such heads holds, with the most bytes of each."""
        shapes = self._factor_shapes(heads, rank)
        most = {name: factors.max_bytes(name, shape, self.recipe) for name, shape in shapes.items()}
        return most | {
            name + DENSE: blockwise.max_rows_bytes(shape, self._codec(name))
            for name, shape in self.averaged.items()
        }

    def decode(self, blobs: Mapping[str, Tensor], worker_id: str, heads: int, rank: int) -> dict[str, Tensor]:
        """The tensors of a contribution, as `Received` has them, finite and of the right shapes.

        Raises:
            WireError: it holds other names, malformed bytes, or numbers that are not finite.
        """
        shapes = self._factor_shapes(heads, rank)
        expected = {*shapes, *(name + DENSE for name in self.averaged)}
        if blobs.keys() != expected:
            raise WireError("its tensors have other names than the model's heads and dense parameters")
        known = self.merged_of(worker_id, heads, rank)
        tensors = {}
        for name, shape in shapes.items():
            codec, truncate_rank = factors.codec_of(name, self.recipe, is_known=name in known)
            tensors[name] = factors.decode(blobs[name], codec, shape, truncate_rank)
        for name, shape in self.averaged.items():
            tensors[name + DENSE] = blockwise.decode_rows(blobs[name + DENSE], self._codec(name), shape)
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise WireError("it holds numbers that are not finite (a learning rate too high?)")
        return tensors

    def _codec(self, name: str) -> Codec:
        """By which what is averaged travels. A variance that is rounded may be negative."""
        if name in self.plan.statistics:
            return "fp32"
        settings = self.recipe.compress
        return settings.factors if name in self._common_factors else settings.dense

    def _factor_shapes(self, heads: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what a worker of such heads sends of its factors, by name; nothing where they are dense
        parameters."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self._common_factors:
            return shapes
        for name, spec in self.plan.capped(rank).adapted.items():
            out_features, in_features = spec.shape
            if self.recipe.is_A_sent:
                shapes[name + A] = (heads, spec.rank, in_features)
            shapes[name + B] = (heads, out_features, spec.rank)
        return shapes

    def keep_only(self, worker_ids: Collection[str]) -> None:
        """Drop the merged factors of all other workers: their heads are gone."""
        self.merged = {who: held for who, held in self.merged.items() if who in worker_ids or who == _RUN}

    def merged_of(self, worker_id: str, heads: int, rank: int) -> dict[str, Tensor]:
        """The merged factors of a worker; nothing where what was merged of it were other heads than these:
        who comes back with another rank has new heads."""
        held, adapted = self.merged.get(self._owner(worker_id), {}), self.plan.capped(rank).adapted
        if any(held[name + A].shape[:2] != (heads, spec.rank) for name, spec in adapted.items() if held):
            return {}
        return held

    def _owner(self, worker_id: str) -> str:
        """Whose a worker's merged factors are."""
        return _RUN if self.recipe.lora.merge == "never" else worker_id

    def merged_digest(self, worker_id: str, heads: int, rank: int) -> str:
        """Digest of a worker's merged factors; of nothing while these are zero."""
        return quantize.digest(sorted(self.merged_of(worker_id, heads, rank).items()))

    # Merging

    @torch.no_grad()
    def merge(
        self,
        contributions: Sequence[Received],
        num_missing_heads: int,
        *,
        staleness: Sequence[int] | None = None,
        keep_heads: bool = False,
    ) -> Outcome:
        """Fold contributions into W and the dense parameters. What is published stays.

        Args:
            num_missing_heads: of those expected that are not among these.
            staleness: of each contribution, the versions published since the one that it is based on,
                where they are merged on arrival; None: they make a round, and there is none.
            keep_heads: return the heads' deltas, which cannot be made again afterwards.
        """
        shares = merge.shares(
            [c.heads for c in contributions],
            [c.tokens for c in contributions],
            num_missing_heads,
            self.recipe.outer.weights,
        )
        outer, of_round = self.recipe.outer, 1.0
        if staleness is not None:
            shares = [s * merge.staleness_weight(k, outer) for s, k in zip(shares, staleness, strict=True)]
            num_heads = sum(c.heads for c in contributions)
            of_round = num_heads / (num_heads + num_missing_heads)
        for c in contributions:
            if not self.merged_of(c.worker_id, c.heads, c.rank):  # it had other heads once, or none
                self.merged.pop(self._owner(c.worker_id), None)
        robust = self._robust(contributions, shares)
        rebuilt = {self._owner(c.worker_id): self._rebuilt(c) for c in contributions}
        # The decay is of adapted weights alone.
        average = replace(outer, weight_decay=0.0) if outer.dense else Outer()
        for name in self.averaged:
            delta = torch.zeros_like(self.dense[name])
            factors = robust.factors[name] if robust else [1.0] * len(contributions)
            is_statistic = name in self.plan.statistics
            for contribution, share, factor in zip(contributions, shares, factors, strict=True):
                ahead = contribution.tensors[name + DENSE]
                if is_statistic and staleness is not None:
                    ahead = ahead - self.dense[name]
                delta += ahead * (share * contribution.heads * factor)
            # Statistics stay between those of the workers: no momentum, and no change of what was once.
            self._step(name, self.dense, delta, Outer() if is_statistic else average, of_round)
        heads_of_run = self._common_heads(self.dense) if self._common_factors else rebuilt.get(_RUN, {})
        kept: dict[str, list[HeadDelta]] = {}

        def merge_into(name: str) -> tuple[float, float]:
            heads = self._heads(name, contributions, shares)
            if robust:
                factors = robust.factors[name]
                heads = [replace(h, weight=h.weight * f) for h, f in zip(heads, factors, strict=True)]
            if keep_heads:
                kept[name] = heads
            before = self.weights[name]
            if self.recipe.lora.merge == "never":
                self.weights[name] = self._with_heads(name, heads_of_run)
            else:
                self._step(name, self.weights, merge.mean_delta(heads), outer, of_round)
            steps = quantize.step(self.base[name])
            return float(torch.dist(self.weights[name], before)), float(steps.norm()) * quantize.BLOCK**0.5

        measured = list(self._of_each(merge_into))
        self._include_in_average(of_round)
        self.merged |= {owner: held for owner, held in rebuilt.items() if held}
        change, step = (math.hypot(*sizes) for sizes in zip((0.0, 0.0), *measured, strict=True))
        who = [contribution.worker_id for contribution in contributions]
        return Outcome(
            change=change,
            step=step,
            bounded={w: kept for w, kept in zip(who, robust.kept, strict=True) if kept < 1} if robust else {},
            trimmed=tuple(w for k, w in enumerate(who) if robust and k in robust.trimmed),
            heads=kept,
        )

    @torch.no_grad()
    def take(self, model: nn.Module, *, as_version: bool) -> None:
        """Have the weights of a plain model, which was trained as it is, in place of a merge. What is
        published stays.

        Args:
            as_version: they are a version's, and belong into the average over versions.
        """
        tensors = named_tensors(model)
        self.weights = {
            name: to_matrix(tensors[spec.parameter].detach().cpu(), spec).clone()
            for name, spec in self.plan.adapted.items()
        }
        self.dense = {name: tensors[name].detach().cpu().clone() for name in self.plan.averaged}
        if as_version:
            self._include_in_average(1.0)

    def _include_in_average(self, of_round: float) -> None:
        """Args: of_round: see `merge`."""
        if self.recipe.outer.ema is None:
            self.ema = Average()
        else:
            trained = {name: self.dense[name] for name in self.plan.dense}
            self.ema.include(self.weights | trained, self.recipe.outer.ema**of_round)

    def _heads(
        self, name: str, contributions: Sequence[Received], shares: Sequence[float]
    ) -> list[HeadDelta]:
        """The weighted deltas of one module, of each head of each contribution."""
        return [
            HeadDelta(*pair, self.plan.scale_at(name, contribution.scale) * share)
            for contribution, share in zip(contributions, shares, strict=True)
            for pair in self._factors(name, contribution)
        ]

    def _robust(self, contributions: Sequence[Received], shares: Sequence[float]) -> Robust | None:
        """Factors on the weights, a function of contributions and recipe alone: a replay finds them again."""
        outer = self.recipe.outer
        if outer.bound_norm is None:
            return None

        def products(name: str) -> Tensor:
            heads = self._heads(name, contributions, shares)
            if outer.trim is None:
                return torch.diag(torch.cat([merge.products([head])[0] for head in heads]))
            return merge.products(heads)

        found = dict(zip(self.base, self._of_each(products), strict=True))
        of_heads = [k for k, contribution in enumerate(contributions) for _ in range(contribution.heads)]
        owners = dict.fromkeys(found, of_heads)
        weights = [
            share * contribution.heads for share, contribution in zip(shares, contributions, strict=True)
        ]
        for name in self.averaged:
            deltas = [contribution.tensors[name + DENSE] for contribution in contributions]
            found[name] = merge.dense_products(deltas, weights)
            owners[name] = list(range(len(contributions)))
        return merge.robust(found, owners, outer, self.recipe.server.quorum, self.plan.statistics)

    def _step(
        self, name: str, weights: dict[str, Tensor], delta: Tensor, outer: Outer, of_round: float
    ) -> None:
        held = self.outer_state.get(name, {})
        weights[name], state = merge.outer_step(weights[name], delta, held, outer, of_round)
        if state:
            self.outer_state[name] = state

    def _rebuilt(self, contribution: Received) -> dict[str, Tensor]:
        """What the server must remember of the worker's factors, as it knows them now."""
        keeps_factors = self.recipe.lora.keeps_factors and not self._common_factors
        if not keeps_factors and not factors.remembers_A(self.recipe):
            return {}
        rebuilt = {}
        for name in self.plan.adapted:
            rebuilt[name + A], now_B, _, _ = self._pair(name, contribution)
            if keeps_factors:
                rebuilt[name + B] = now_B
        return rebuilt

    def _with_heads(self, name: str, held: Mapping[str, Tensor]) -> Tensor:
        """deq(Q) with the mean of these heads, of one module."""
        scale = self.plan.adapted[name].scale / self.recipe.lora.heads
        heads = lowrank.sum_of_heads(held[name + A], held[name + B], scale)
        return quantize.dequantize(self.base[name]) + heads

    def _factors(
        self, name: str, contribution: Received
    ) -> Iterator[tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]]:
        """A (None: the identity), B, A', B' of each of the worker's heads on one module."""
        if self.recipe.train.full_rank:
            for B_of_head in contribution.tensors[name + B]:
                yield None, B_of_head, None, None
            return
        now_A, now_B, merged_A, merged_B = self._pair(name, contribution)
        for h in range(contribution.heads):
            if merged_A is None or merged_B is None:  # of zeros, or an A that is only remembered
                yield now_A[h], now_B[h], None, None
            else:
                yield now_A[h], now_B[h], merged_A[h], merged_B[h]

    def _pair(self, name: str, contribution: Received) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """A, B, A', B' of all of the worker's heads on one module: what it sent and what is known."""
        known, sent = self.merged.get(self._owner(contribution.worker_id), {}), contribution.tensors
        if self._common_factors:
            known = self._common_heads(self.published_dense)
            sent = self._common_heads({n: sent[n + DENSE] for n in self._common_factors})
        merged_A, merged_B = known.get(name + A), known.get(name + B)
        if self.recipe.is_A_sent:
            sent_A = sent[name + A]
            now_A = sent_A if merged_A is None else merged_A + sent_A
        else:
            given = self.given_A(
                contribution.first_head, contribution.heads, contribution.rank, contribution.draw
            )
            now_A = given[name + A]
        sent_B = sent[name + B]
        return now_A, sent_B if merged_B is None else merged_B + sent_B, merged_A, merged_B

    def _of_each(self, work: Callable[[str], Result]) -> Iterator[Result]:
        """The results of work on each adapted module, in their order, on `server.num_threads` threads.

        Each module is one thread's, so that their number changes no bit.
        """
        if self.recipe.server.num_threads == 1:
            yield from map(work, self.base)
            return
        with ThreadPoolExecutor(self.recipe.server.num_threads) as pool:
            yield from pool.map(work, list(self.base))

    # Factors that are averaged, A that is not sent

    def _start_of(self, name: str) -> Tensor:
        """A factor as all workers have it at the start, by its parameter's name."""
        site, _, factor = name.rpartition(".")
        lora = self.recipe.lora
        if factor == "lora_B":
            return torch.zeros(self._common_factors[name])
        return self._draw(site, lora.first_head(0), lora.heads, self.plan.rank, 0)

    def _common_heads(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The heads that all workers have in common, MODULE/A and MODULE/B, from dense parameters or what is
        published of them."""
        lora = self.recipe.lora
        held = {}
        if lora.A != "trained":
            held = dict(self.given_A(lora.first_head(0), lora.heads, self.plan.rank, 0))
        for name in self._common_factors:
            site, _, factor = name.rpartition(".")
            held[site + (A if factor == "lora_A" else B)] = dense[name]
        return held

    def given_A(self, first_head: int, heads: int, rank: int, draw: int) -> dict[str, Tensor]:
        """A frozen or rotating A of one worker, MODULE/A -> (H, r, in), drawn as the worker did."""
        which = (heads, rank, draw)
        known = self._given.get(first_head)
        if known is None or known[0] != which:
            known = (which, {name + A: self._draw(name, first_head, *which) for name in self.base})
            self._given[first_head] = known
        return known[1]

    def given_digest(self, first_head: int, heads: int, rank: int, draw: int) -> str:
        """Digest of what the worker must have drawn; '' where A is sent, or none."""
        if not self.recipe.is_A_given or not self.base:
            return ""
        return quantize.digest(self.given_A(first_head, heads, rank, draw).items())

    def _draw(self, name: str, first_head: int, heads: int, rank: int, draw: int) -> Tensor:
        spec = self.plan.adapted[name]
        return lowrank.draw_A_of_heads(
            min(spec.rank, rank),
            spec.shape[1],
            init=spec.init,
            subspace=self.recipe.lora.subspace,
            seed=self.recipe.run.seed,
            module=name,
            heads=range(first_head, first_head + heads),
            draw=draw,
            share=spec.rank,
        )

    # Publishing

    def advance(self, version: int, remain: Collection[str], *, last: bool) -> Advance:
        """Make what was merged a version: by its settings, requantized, with nothing left of workers that do
        not remain.

        Args:
            remain: worker_ids. last: whether the run ends with this version.
        """
        self.enter(version)
        before = self.requantize(last=last)
        dense = self.publish_dense(last=last)
        self.keep_only(remain)
        return Advance(before, dense, self.base_digest(), self.master_digest())

    def to_publish(self, *, last: bool) -> dict[str, Tensor]:
        """What a version publishes, before codes and codecs, by module or name: W and dense, or their
        averages in the run's last version with `outer.publish_ema`."""
        averages = self.ema.tensors if last and self.recipe.outer.publish_ema else {}
        return self.weights | self.dense | averages

    @torch.no_grad()
    def requantize(self, *, last: bool = False) -> dict[str, Quantized]:
        """Bring Q up to W, or what else is `to_publish`; in another format it is made anew. Where heads are
        never merged it stays.

        Returns:
            The Q of before, which `changes_since` needs.
        """
        settings, before = self.recipe.base, self.base
        if self.recipe.lora.merge == "never":
            return before
        keep = (settings.keep_scale_from, settings.keep_scale_to)
        weights = self.to_publish(last=last)

        def requantize(name: str) -> Quantized:
            weight, hysteresis = weights[name], settings.hysteresis
            if before[name].quant != settings.quant:
                return quantize.quantize(weight, settings.quant)
            return quantize.requantize(weight, before[name], hysteresis=hysteresis, keep=keep)

        self.base = dict(zip(before, self._of_each(requantize), strict=True))
        return before

    @torch.no_grad()
    def publish_nearest(self, *, last: bool = False) -> None:
        """Publish what is `to_publish` as nearly as the base's format can: without history, and without
        codecs."""
        weights, quant = self.to_publish(last=last), self.recipe.base.quant
        self.base = {name: quantize.quantize(weights[name], quant) for name in self.base}
        self.published_dense = {name: weights[name].clone() for name in self.dense}

    @torch.no_grad()
    def publish_dense(self, *, last: bool = False) -> dict[str, Tensor]:
        """Bring the published dense parameters and statistics up to what is `to_publish`, but for what the
        codec leaves out.

        Returns:
            The bytes that tell workers, by `NAME/dense.0`.
        """
        blobs = {}
        dense = self.to_publish(last=last)
        for name in self.dense:
            ahead = dense[name] - self.published_dense[name]
            blob, sent = blockwise.encode_rows(ahead, self._codec(name))
            self.published_dense[name] = self.published_dense[name] + sent
            blobs[f"{name}{DENSE}.0"] = blob
        return blobs

    def changes_since(self, before: Mapping[str, Quantized]) -> Iterator[tuple[str, changes.Change]]:
        """The change of each module's base since then, as soon as it is encoded; in the same format."""
        yield from zip(
            self.base, self._of_each(lambda name: changes.encode(before[name], self.base[name])), strict=True
        )

    def folded(self, history: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """One update in place of the last ones.

        Args:
            history: the bytes of those updates, each version's on the one before, the newest last.
        """
        blobs: dict[str, Tensor] = {}
        for name, base in self.base.items():
            then = base
            for update in reversed(history):
                then = changes.revert(then, update[name + CODES], update[name + SCALES])
            change = changes.encode(then, base)
            blobs |= {name + CODES: change.codes, name + SCALES: change.scales}
        for name in self.dense:  # in their order: fp32 sums of lossy changes have no other one
            for k, update in enumerate(history):
                blobs[f"{name}{DENSE}.{k}"] = update[f"{name}{DENSE}.0"]
        return blobs

    def snapshot(self) -> dict[str, Tensor]:
        """The bytes of the whole published model: every code and scale, dense parameters in fp32, and
        constants, which only these bytes hold."""
        blobs: dict[str, Tensor] = {}
        for name, base in self.base.items():
            whole = changes.full(base)
            blobs |= {name + CODES: whole.codes, name + SCALES: whole.scales}
        for name, tensor in self.published_dense.items():
            blobs[name + DENSE], _ = blockwise.encode(tensor, "fp32")
        return blobs | {name + CONSTANT: constants.encode(t) for name, t in self.constants.items()}

    # Digests and state

    def base_digest(self) -> str:
        """Digest of what is published, which every worker must reach."""
        published = tensors_of(self.base, self.published_dense)
        return quantize.digest(published.items(), *self._constants_digests)

    def digests(self) -> dict[str, str]:
        """Digest of the bits of W of each module, by name."""
        found = self._of_each(lambda name: quantize.digest([(name, self.weights[name])]))
        return dict(zip(self.base, found, strict=True))

    def master_digest(self) -> str:
        """Digest of the bits of W and of the dense parameters: of each module's, in their order."""
        return quantize.digest(sorted(self.dense.items()), *self.digests().values())

    def parameters(self, which: str, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Parameters that are trained, and statistics, of the plain model, by name: `published` (deq(Q), or W
        where heads are never merged), `master` (W) or `ema`, its mean.

        Args:
            names: of modules, dense parameters and statistics; None: all.
        """
        return dict(self._parameters(which, names))

    def _parameters(self, which: str, names: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
        """The same, each as it is asked for: a whole model in fp32 need not be there at once."""
        averages = self.ema.tensors if which == "ema" else {}
        dense = self.published_dense if which == "published" else self.dense | averages
        heads = self._common_heads(dense) if which == "published" and self._common_factors else {}

        def weight(name: str) -> Tensor:
            if which != "published":
                return averages[name] if which == "ema" else self.weights[name]
            if heads:
                return self._with_heads(name, heads)
            is_merged = self.recipe.lora.merge != "never"
            return quantize.dequantize(self.base[name]) if is_merged else self.weights[name]

        for name, spec in self.plan.adapted.items():
            if names is None or name in names:
                yield spec.parameter, from_matrix(weight(name), spec)
        for name in self.plan.averaged:
            if names is None or name in names:
                yield name, dense[name]

    @torch.no_grad()
    def fill(self, model: nn.Module, which: str) -> None:
        """Copy these `parameters`, and constants, into a plain model of the same names."""
        tensors = named_tensors(model)
        for name, tensor in self._parameters(which, None):
            tensors[name].copy_(tensor)
        constants.fill(tensors, self.constants)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a checkpoint must hold, as named groups of tensors.

        Merging makes new tensors and changes none of these, so they may be written meanwhile.
        """
        return {
            "master": self.parameters("master") | self.dense,
            "base": tensors_of(self.base, self.published_dense),
            "constants": dict(self.constants),
            "momentum": {
                name if kind == "momentum" else f"{name}/{kind}": tensor
                for name, state in self.outer_state.items()
                for kind, tensor in state.items()
            },
            **({"ema": average} if (average := self.ema.state()) else {}),
            "merged": {
                f"{worker_id}/{name}": factor
                for worker_id, held in self.merged.items()
                for name, factor in held.items()
            },
        }

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `state` returned, of the version that was entered."""
        for name, base in self.base.items():
            spec = self.plan.adapted[name]
            self.weights[name] = to_matrix(state["master"][spec.parameter], spec).clone()
            codes, scales = state["base"][name + CODES].clone(), state["base"][name + SCALES].clone()
            self.base[name] = Quantized(self.plan.quant, base.shape, codes, scales)
        self.dense = {name: state["master"][name].clone() for name in self.dense}
        self.published_dense = {name: state["base"][name + DENSE].clone() for name in self.dense}
        self.constants = {name: state["constants"][name].clone() for name in self.constants}
        self._constants_digests = constants.digests(self.constants)
        self.outer_state = {}
        for key, tensor in state["momentum"].items():
            name, _, kind = key.partition("/")
            self.outer_state.setdefault(name, {})[kind or "momentum"] = tensor.clone()
        self.ema.load_state(state.get("ema", {}))
        self.merged = {}
        for key, factor in state["merged"].items():
            worker_id, _, name = key.partition("/")
            self.merged.setdefault(worker_id, {})[name] = factor.clone()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a model."""
    return dict(model.named_parameters()) | dict(model.named_buffers())
