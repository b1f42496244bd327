"""Local training: heads, their optimizer, what is sent of them and what an update does to them.

No socket and no clock: a trainer is a function of its batches and of the updates it is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lte import lowrank, optim, quantize, schedule
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
from lte.compress.shards import Shards
from lte.config import Codec, Recipe
from lte.errors import ConfigError, DigestError, DivergedError, WireError
from lte.nn import (
    Adapted,
    adapted_modules,
    changing_buffers,
    constant_tensors,
    dense_parameters,
    draw_A,
    draw_heads,
    fit_heads,
    plan_of,
    recompute_activations,
    statistics,
    watch_slices,
)
from lte.optim import prune
from lte.printable import some
from lte.quantize import Quantized
from lte.worker import draws

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class _Published:
    """A version as the server published it, on the CPU.

    Attributes:
        bases: by module. averaged: dense parameters and statistics. constants: those that came with it.
        constants_digests: see `compress.shards.Shards.digests_of_constants`.
    """

    bases: Mapping[str, Quantized]
    averaged: dict[str, Tensor]
    constants: Mapping[str, Tensor]
    constants_digests: tuple[str, ...]


ONE_SHARD = Shards()
"""One server has the whole model."""


class Trainer:
    """Trains the heads and dense parameters of one converted model.

    Attributes:
        recipe: with the settings of the round on the version at hand.
        version: of the base. round: the one that local steps belong to: the version's, or the next
            one where steps are taken ahead of the update that opens it; where contributions are merged on
            arrival, rounds are this worker's own. local_step: taken in it.
        is_ahead: whether steps are taken ahead of an update.
        heads, rank: how many heads it trains, and the largest lora_rank of them in any round; the
            recipe's or less. scale: their lora_scale; 0: the recipe's.
        draw: which draw of A the heads have; see `_draw_now`.
        revision: rises where more of the model has changed than what local steps train.
        lost: share of the heads' change that the last contribution, or the merge of the one before,
            left out and no later one owes. Without error feedback it is not measured in reset-less.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        slot: int,
        version: int,
        base: Mapping[str, Tensor],
        base_digest: str,
        step: int | None = None,
        scale: float = 0.0,
        optimizer: torch.optim.Optimizer | MakeOptimizer | None = None,
        shards: Shards = ONE_SHARD,
    ) -> None:
        """Fill the model from a base and draw its heads.

        Args:
            model: converted; with memory (see `materialize`).
            slot: place among all workers; its heads are the global heads slot * H ..., H the recipe's.
            base, base_digest: the whole model as published with `version`, in bytes.
            step: local steps that the run has come to with it; None: those of as many rounds.
            scale: lora_scale of the model's heads, where it is not the recipe's; else 0.
            optimizer: over the model's parameters, or what makes one; None: the recipe's.
            shards: which of the servers has what; digests are of each one's part.

        Raises:
            DigestError: the base does not have its digest.
        """
        self.model, self.recipe, self._shards = model, recipe.in_round(version), shards
        recipe = self.recipe
        self._come_to(version, step)
        self.round, self.local_step, self.lost = self._round_done, 0, 0.0
        self.is_ahead = False
        self.revision = 0
        # Local steps of heads that began, with empty moments, in the middle of the run; None of others.
        self._own_steps = 0 if version else None
        self.draw = self._draw_now()
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            materialize(model, torch.device("cpu"))
        self.modules: dict[str, Adapted] = dict(adapted_modules(model))
        self.heads = next((m.heads for m in self.modules.values()), 1)
        self.rank = max((m.rank for m in self.modules.values()), default=0)
        self.scale = scale
        self.first_head = recipe.lora.first_head(slot)
        self.dense = dict(dense_parameters(model))
        # Factors that all workers have in common: dense parameters like others.
        self._common_factors: dict[str, nn.Parameter] = {}
        if recipe.averages_factors:
            self._common_factors = {
                name: model.get_parameter(name) for name in plan_of(model).factors(recipe.lora)
            }
            self.dense |= self._common_factors
        self._of_statistics = frozenset(self._statistics)
        self._constants = {name: tensor for name, tensor, _ in constant_tensors(model)}
        self._constants_digests: tuple[str, ...] = ("",) * shards.num
        self._has_merged = False
        # Of the dense parameters, then of the statistics: in the order of digests.
        self._published = {name: torch.zeros(t.shape) for name, t in self._averaged()}
        # What the last contribution came to at the server, and the A that it was sent with.
        self._sent: dict[str, Tensor] = {}
        self._sent_with: dict[str, Tensor] = {}
        # What the server remembers of the factors beside what the modules subtract: A where
        # `factors.remembers_A`, A and B where they are never merged.
        self._known: dict[str, Tensor] = {}
        # Squared norms of what the last merge dropped of heads that had moved on, and of what it took.
        self._lost_ahead = (0.0, 0.0)
        self._load(self._staged(base, base_digest, version, whole=True))
        self._make_optimizer: MakeOptimizer | None = None
        if isinstance(optimizer, torch.optim.Optimizer):
            self.optimizer = optimizer
        else:
            self._make_optimizer = optimizer or (lambda model: optim.make_optimizer(model, recipe.optimizer))
            self.optimizer = self._make_optimizer(model)
        if recipe.train.checkpoint_activations:
            recompute_activations(model, recipe.train.checkpoint_modules)
        if recipe.lora.dropout:
            model.register_forward_pre_hook(lambda *_: self._seed_dropout())
        if recipe.lora.nested != "none":
            model.register_forward_pre_hook(lambda *_: self._gate())
        watch_slices(model, self.modules)
        # Forward passes since the last local step: micro-batches have masks of their own.
        self._num_forwards = 0
        self._peak_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        if recipe.train.full_rank or not recipe.has_heads_of(recipe.as_built):
            self._refit_heads()
        draw_heads(model, recipe.lora, seed=recipe.run.seed, first_head=self.first_head, draw=self.draw)
        for name, tensor in self._averaged():
            with torch.no_grad():
                tensor.copy_(self._published[name])
        # Buffers that the server takes for constants, until the first step shows whether they are.
        self._unmoved = {name: buffer.clone() for name, buffer in self._constant_buffers()}

    @property
    def _statistics(self) -> dict[str, Tensor]:
        """By name; a model may put another tensor in the place of one."""
        return dict(statistics(self.model))

    def _constant_buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor, constant in constant_tensors(self.model):
            if constant.is_buffer and tensor.is_floating_point():
                yield name, tensor

    def _averaged(self) -> Iterator[tuple[str, Tensor]]:
        """The dense parameters, then the statistics, by name."""
        yield from self.dense.items()
        yield from self._statistics.items()

    # Local steps

    def step(self) -> None:
        """Clip the gradients, let the optimizer step at its scheduled rates, clear the gradients."""
        factor = self._factor()
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * factor
        moving = self._moving()
        for parameter, elements in moving.items():
            if parameter.grad is not None:
                parameter.grad.mul_(elements)
        optim.clip(self.model, self.recipe.optimizer)
        with optim.moving_only(self.optimizer, moving):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._unmoved:
            self._check_constants()
        self.local_step, self._num_forwards = self.local_step + 1, 0
        if self._own_steps is not None:
            self._own_steps += 1

    def _check_constants(self) -> None:
        """Warn of buffers that training changes and nobody averages."""
        before, self._unmoved = self._unmoved, {}
        moved = [
            name
            for name, now in self._constant_buffers()
            if name in before and not torch.equal(now.nan_to_num(), before[name].nan_to_num())
        ]
        if moved:
            warnings.warn(
                f"{some(moved, 6)}: training changes {'this buffer' if len(moved) == 1 else 'these buffers'},"
                " which the server keeps as at the start; to have what workers come to averaged, name"
                f" {'it' if len(moved) == 1 else 'them'} in lora.statistics",
                stacklevel=3,
            )

    def without_gradient(self) -> list[str]:
        """The modules whose heads the local step at hand does not train: nothing that its loss is made of
        computed with them."""
        return [name for name, module in self.modules.items() if module.lora_B.grad is None]

    def _seed_dropout(self) -> None:
        """Choose the masks of the next forward pass."""
        draws.seed_dropout(
            self.modules,
            self.recipe,
            first_head=self.first_head,
            step=self.step_of_run,
            forward=self._num_forwards,
        )
        self._num_forwards += 1

    # Nested ranks

    def _ranks(self) -> list[int]:
        """Rank b of each head in this local step."""
        return draws.ranks(self.modules, self.recipe, first_head=self.first_head, step=self.step_of_run)

    def _gate(self) -> None:
        if self.recipe.draws_ranks:
            draws.gate(self.modules, self.recipe, self._ranks())

    def _moving(self) -> dict[nn.Parameter, Tensor]:
        """The elements of factors that this local step trains; empty where it trains all.

        With b = 8, of ranks 4 and 8: rows and columns 0 to 7 unfrozen, 4 to 7 frozen. Nothing else moves, nor
        do its moments: see `optim.moving_only`. The published DyLoRA leaves that to the optimizer, which has
        zeros for gradients there, and moves it on by its momentum.
        """
        if not self.recipe.draws_ranks:
            return {}
        last = torch.tensor(self._ranks())
        first = torch.zeros_like(last)
        if self.recipe.lora.nested == "frozen":
            ranks = draws.drawn_ranks(self.modules, self.recipe)
            first = torch.tensor([max((rank for rank in ranks if rank < b), default=0) for b in last])
        moving = dict[nn.Parameter, Tensor]()
        for module in self.modules.values():
            rows = torch.arange(module.rank)
            moves = ((first[:, None] <= rows) & (rows < last[:, None])).to(module.lora_B.device)
            moving[module.lora_B] = moves[:, None, :]
            if module.lora_A.requires_grad:
                moving[module.lora_A] = moves[:, :, None]
        return moving

    @property
    def constants_digests(self) -> tuple[str, ...]:
        """Of the constants that the model holds, of each shard's part; see `Shards.digests_of_constants`."""
        return self._constants_digests

    @property
    def step_of_run(self) -> int:
        """Local steps of this worker before the one at hand."""
        return self.recipe.steps_before(self.round) + self.local_step

    def _factor(self) -> float:
        """Factor on the rates of the next local step, by how far the run is and how old these heads are."""
        number, local_step = self.round, self.local_step
        if self.recipe.merges_on_arrival:
            local_steps = self.recipe.train.local_steps
            number, begun = divmod(self._base_step, local_steps)
            local_step += begun + self.is_ahead * local_steps
        factor = schedule.factor_in(self.recipe, number, local_step)
        if self._own_steps is None:
            return factor
        return factor * schedule.join_factor(self.recipe.schedule, self._own_steps)

    def go_ahead(self) -> None:
        """Begin the local steps of the next round; the update that opens it is still to come."""
        self.round, self.local_step, self.is_ahead = self.round + 1, 0, True

    def _come_to(self, version: int, step: int | None) -> None:
        """Have another base, with which the run has come to so many local steps."""
        self.version = version
        self._base_step = self.recipe.steps_before(version) if step is None else step

    @property
    def _round_done(self) -> int:
        """Rounds that the run has done with the version at hand."""
        if not self.recipe.merges_on_arrival:
            return self.version
        return self._base_step // self.recipe.train.local_steps

    def _enter_round(self) -> None:
        """Begin the local steps that follow an update, unless they are begun: they are taken ahead, or belong
        to a round of this worker's own that no contribution tells of yet."""
        if not self.recipe.merges_on_arrival:
            if self.round < self.version:
                self.round, self.local_step = self.version, 0
        elif not self.is_ahead and self._sent:
            self.round, self.local_step = self.round + 1, 0
        self.is_ahead = False

    # Contributions

    @torch.no_grad()
    def contribution(self) -> Iterator[tuple[str, Tensor]]:
        """The bytes that tell the server what was learnt beyond what it has merged, as they are made.

        What the server makes of them is remembered until the next update: it is what an update that
        merged them takes away here.

        Raises:
            DivergedError: there are numbers that are not finite.
        """
        self._check_finite()
        self._sent, self._sent_with = {}, {}
        left_out, total = self._lost_ahead
        feedback, lora = self.recipe.compress.error_feedback, self.recipe.lora
        forgets = factors.refits(self.recipe) or (not feedback and not lora.keeps_factors)
        for name, module in self._contributing():
            old_A, old_B = module.lora_A.to("cpu", copy=True), module.lora_B.to("cpu", copy=True)
            if module.lora_A.requires_grad:
                yield name + A, self._encode_A(name, module)
            yield name + B, self._encode_B(name, module)
            if forgets:
                old_A, kept_B, kept_A = _or_identity(module, old_A), *self._kept(name, module)
                lost, moved = factors.lost(old_B, old_A, kept_B, _or_identity(module, kept_A))
                left_out, total = left_out + lost, total + moved
            if self.recipe.train.overlap:
                self._sent_with[name] = module.lora_A.clone()
        self.lost = (left_out / total) ** 0.5 if total else 0.0
        for name, tensor in self._averaged():
            ahead = tensor.detach().cpu() - self._published[name]
            if name in self._of_statistics and self.recipe.merges_on_arrival:
                # Added up, changes since versions of then would lead beyond what the workers have.
                ahead = tensor.detach().cpu()
            blob, self._sent[name] = blockwise.encode_rows(ahead, self._codec(name))
            yield name + DENSE, blob

    def _codec(self, name: str) -> Codec:
        """By which what is averaged travels; see `Master`."""
        if name in self._of_statistics:
            return "fp32"
        settings = self.recipe.compress
        return settings.factors if name in self._common_factors else settings.dense

    def _contributing(self) -> Iterator[tuple[str, Adapted]]:
        """The modules whose heads are this worker's own."""
        if not self._common_factors:
            yield from self.modules.items()

    def _check_finite(self) -> None:
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        for name, tensor in (*trained, *self._statistics.items()):
            if not bool(tensor.isfinite().all()):
                raise DivergedError(
                    f"training diverged at local step {self.local_step} of version {self.version}: {name} is"
                    " not finite; lower optimizer.lr or optimizer.dense_lr"
                )

    def _encode_A(self, name: str, module: Adapted) -> Tensor:
        """Send A, and set A to what was sent where the product would be wrong otherwise."""
        known = self._known_of(name, module)[0]
        codec, truncate_rank = factors.codec_of(name + A, self.recipe, is_known=known is not None)
        now = module.lora_A.detach().cpu()
        blob, sent = factors.encode(now if known is None else now - known, codec, truncate_rank)
        self._sent[name + A] = sent
        if factors.refits(self.recipe):
            sent_A = sent if known is None else known + sent
            taken_over = factors.refit(module.lora_B.cpu(), now - sent_A, sent_A, factors.DAMPING)
            module.lora_B.add_(taken_over.to(module.lora_B.device))
            module.lora_A.copy_(sent_A)
        return blob

    def _encode_B(self, name: str, module: Adapted) -> Tensor:
        known = self._known_of(name, module)[1]
        codec, truncate_rank = factors.codec_of(name + B, self.recipe, is_known=known is not None)
        now = module.lora_B.detach().cpu()
        blob, self._sent[name + B] = factors.encode(
            now if known is None else now - known, codec, truncate_rank
        )
        return blob

    def _known_of(self, name: str, module: Adapted) -> tuple[Tensor | None, Tensor | None]:
        """A and B as the server knows them, on the CPU; None where it knows nothing or zeros."""
        if self._has_merged and module.merged_A is not None and module.merged_B is not None:
            return module.merged_A.cpu(), module.merged_B.cpu()
        return self._known.get(name + A), self._known.get(name + B)

    def _kept(self, name: str, module: Adapted) -> tuple[Tensor, Tensor]:
        """The B and A that hold what was sent and what is still owed."""
        owes = self.recipe.lora.merge == "reset-b" and self.recipe.compress.error_feedback
        return module.lora_B.cpu() if owes else self._sent[name + B], module.lora_A.cpu()

    def base_digest(self) -> str:
        """Digest of the base and the published dense parameters that this model holds."""
        bases = {name: module.base for name, module in self.modules.items()}
        published = tensors_of(bases, self._published)
        return self._shards.digest(published.items(), self._constants_digests)

    def merged_digest(self) -> str:
        """Digest of the factors that the server remembers of this worker."""
        merged = dict(self._known)
        if self._has_merged:
            for name, module in self.modules.items():
                assert module.merged_A is not None and module.merged_B is not None
                merged[name + A], merged[name + B] = module.merged_A, module.merged_B
        return self._shards.digest(sorted(merged.items()))

    def given_digest(self) -> str:
        """Digest of A where it is not sent, because the server draws it too; else ''."""
        if not self.recipe.is_A_given or not self.modules:
            return ""
        given = self._shards.split((name + A, module.lora_A) for name, module in self.modules.items())
        return " ".join(quantize.digest(part.items()) if part else "" for part in given)

    # Updates

    @torch.no_grad()
    def apply(
        self,
        version: int,
        blobs: Mapping[str, Tensor],
        base_digest: str,
        *,
        merged: bool,
        whole: bool | Collection[int],
        step: int | None = None,
    ) -> None:
        """Take over a published version whole, or not at all.

        Args:
            blobs: the change from the version at hand, or the `whole` model; of several servers those are
                named whose parts are whole.
            merged: whether the last `contribution` is in it. Only then do the heads change; what
                was not merged stays in them and is sent by the next contribution.
            step: local steps that the run has come to with this version; None: those of as many rounds.

        Raises:
            DigestError: the update does not lead to its digest; nothing was changed.
        """
        self._take(self._staged(blobs, base_digest, version, whole=whole), version, step, merged)

    def _take(self, published: _Published, version: int, step: int | None, merged: bool) -> None:
        self.revision += 1
        for name, parameter in self.dense.items():
            # d <- d_new + (d - d_old - own merged part)
            ahead = parameter - self._published[name].to(parameter.device)
            if merged:
                ahead = ahead - self._sent[name].to(parameter.device)
                if not self.recipe.compress.error_feedback:
                    ahead.zero_()
            parameter.copy_(published.averaged[name].to(parameter.device) + ahead)
        # Of statistics nothing is owed: they are no sums, and forward passes soon forget the old ones.
        for name, statistic in self._statistics.items():
            statistic.copy_(published.averaged[name])
        self._load(published)
        self._come_to(version, step)
        self._enter_round()
        if merged:
            self._settle_heads()
        elif not any(bool(module.lora_B.any()) for module in self.modules.values()):
            self._follow_draw()  # a joiner that waited for this version owes nothing by an older A
        self._sent, self._sent_with = {}, {}
        self._enter(version)

    def _enter(self, version: int) -> None:
        """Have the settings of the round on a version, once what was merged is settled by those before."""
        before, self.recipe = self.recipe, self.recipe.in_round(version)
        if not self.recipe.has_heads_of(before):
            self._remake_heads()

    def _remake_heads(self) -> None:
        """Have heads of the settings at hand. The server forgets what it knows of the old ones, so the new
        ones hold what these owe, s (B A - B' A'), as far as the rows of A can.

        A that is trained keeps its first rows. Rows that stay keep their moments.
        """
        olds = {name: (module.lora_A.detach().cpu(), *_owed(module)) for name, module in self.modules.items()}
        self._refit_heads()
        for name, module in self.modules.items():
            old_A, owed_B, owed_A = olds[name]
            new_A, owed_B = self._draw_A(name, module), owed_B / module.scale
            num_kept = min(old_A.shape[1], new_A.shape[1])
            if self.recipe.is_A_sent:
                new_A[:, :num_kept] = old_A[:, :num_kept]
            if module.is_full:
                new_B = owed_B @ owed_A
            else:
                new_B = factors.refit(owed_B, owed_A, new_A)
                left_out, total = factors.lost(owed_B, owed_A, new_B, new_A)
                self._lost_ahead = (self._lost_ahead[0] + left_out, self._lost_ahead[1] + total)
            module.lora_A.copy_(new_A)
            module.lora_B.copy_(new_B)
            stays = torch.equal(new_A[:, :num_kept], old_A[:, :num_kept])
            self._resize_moments(module.lora_A, -2, stays=stays)
            self._resize_moments(module.lora_B, -1, stays=stays)
        self._known, self._has_merged = {}, False

    def _refit_heads(self) -> None:
        """Give the model new heads, zero, by the settings at hand. The optimizer steps them in place of those
        before, whose state it keeps; where heads become of full rank, or are so no more, it is made anew,
        and the heads have none."""
        olds = [(module.lora_A, module.lora_B, module.is_full) for module in self.modules.values()]
        fit_heads(
            self.model,
            self.recipe.lora,
            self.rank,
            own_scale=self.scale,
            full_rank=self.recipe.train.full_rank,
        )
        replaced = dict[Tensor, Tensor]()
        for (old_A, old_B, was_full), module in zip(olds, self.modules.values(), strict=True):
            if module.is_full == was_full:
                replaced |= {old_A: module.lora_A, old_B: module.lora_B}
        states = {replaced.get(old, old): state for old, state in self.optimizer.state.items()}
        if olds and not replaced:
            if self._make_optimizer is None:
                what = "train.full_rank: changes which parameters have which rates"
                raise ConfigError([f"{what}; give lte.Worker a function that makes the optimizer, not one"])
            self.optimizer = self._make_optimizer(self.model)
            self._peak_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
            self._own_steps = 0 if self.version else None
        for group in self.optimizer.param_groups:
            group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
        stepped = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        self.optimizer.state.clear()
        self.optimizer.state.update({p: state for p, state in states.items() if p in stepped})

    def _draw_A(self, name: str, module: Adapted) -> Tensor:
        """A as it was drawn last, (H, r, in), on the CPU."""
        recipe = self.recipe
        return draw_A(
            name, module, recipe.lora, seed=recipe.run.seed, first_head=self.first_head, draw=self.draw
        )

    def _resize_moments(self, factor: Tensor, dim: int, *, stays: bool) -> None:
        """Have the optimizer's state of a factor fit it again along its lora_rank, new elements being zero.

        Args:
            stays: the rows of A do; a state of others is cleared, and one that cannot be cut or filled up.
        """
        state = self.optimizer.state.get(factor, {})
        moments = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim}
        if not stays or not all(m.is_floating_point() and m.ndim == factor.ndim for m in moments.values()):
            self.optimizer.state.pop(factor, None)
            return
        for key, moment in moments.items():
            state[key] = lowrank.resized(moment, dim, factor.shape[dim])

    def factor_shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the factor `MODULE/A` or `MODULE/B` of this model; None of any other name."""
        module = self.modules.get(name[: -len(A)])
        if module is None:
            return None
        return {A: tuple(module.lora_A.shape), B: tuple(module.lora_B.shape)}.get(name[-len(A) :])

    @torch.no_grad()
    def adopt(self, merged: Mapping[str, Tensor]) -> None:
        """Start the heads over from what the server has merged of this worker: nothing of them is owed
        then. Their moments are cleared.

        Args:
            merged: the factors that the server remembers, fp32, by `MODULE/A` and `MODULE/B`; empty
                where it remembers none.
        """
        seed, self.revision = self.recipe.run.seed, self.revision + 1
        draw_heads(self.model, self.recipe.lora, seed=seed, first_head=self.first_head, draw=self.draw)
        for name, parameter in self._common_factors.items():
            parameter.copy_(self._published[name])
        self._known, self._has_merged = {}, False
        self._sent, self._sent_with, self._lost_ahead = {}, {}, (0.0, 0.0)
        for name, module in self.modules.items():
            for parameter in (module.lora_A, module.lora_B):
                self.optimizer.state.pop(parameter, None)
            if (known_A := merged.get(name + A)) is None:
                continue
            known_B = merged.get(name + B)
            module.lora_A.copy_(known_A)
            if known_B is not None:
                module.lora_B.copy_(known_B)
            if known_B is None or module.merged_A is None or module.merged_B is None:
                self._known |= {n: merged[n] for n in (name + A, name + B) if n in merged}
                continue
            module.merged_A.copy_(known_A)
            module.merged_B.copy_(known_B)
            self._has_merged = True
        # A worker's own round is over where steps of it were taken: its batches have been seen.
        own = self.round + bool(self.local_step)
        self.round = own if self.recipe.merges_on_arrival else self.version
        self.local_step, self.is_ahead, self._own_steps = 0, False, 0

    def _settle_heads(self) -> None:
        """The heads' contribution is in the base now: take it out of them, by the merge mode."""
        lora, feedback = self.recipe.lora, self.recipe.compress.error_feedback
        self._lost_ahead = (0.0, 0.0)
        for name, module in self._contributing():
            known_A, known_B = self._known_of(name, module)
            sent_B = self._sent[name + B]
            now_B = sent_B if known_B is None else known_B + sent_B
            now_A = module.lora_A.detach()
            if name + A in self._sent:
                sent_A = self._sent[name + A]
                now_A = sent_A if known_A is None else known_A + sent_A
            if lora.keeps_factors:
                if module.merged_A is not None and module.merged_B is not None:
                    module.merged_A.copy_(now_A)
                    module.merged_B.copy_(now_B)
                else:
                    self._known |= {name + A: now_A.to("cpu", copy=True), name + B: now_B}
                if not feedback:
                    module.lora_A.copy_(now_A)
                    module.lora_B.copy_(now_B)
            elif lora.merge == "reset-b" and feedback:
                self._take_out(name, module, sent_B.to(module.lora_B.device))
            else:
                module.lora_B.zero_()
            if factors.remembers_A(self.recipe):
                self._known[name + A] = now_A
        self._has_merged = lora.merge == "reset-less"
        self._follow_draw()

    def _take_out(self, name: str, module: Adapted, sent_B: Tensor) -> None:
        """B without what was merged of it; what compression left out stays owed.

        Merged was sent_B times the A of then. Where A has moved on since, in steps taken ahead, the
        difference sent_B (A - A_then) is kept as far as the rows of A can hold it.
        """
        module.lora_B.sub_(sent_B)
        then = self._sent_with.get(name)
        if then is not None and module.lora_A.requires_grad:
            sent_B, moved, A_now = sent_B.cpu(), (module.lora_A - then).cpu(), module.lora_A.cpu()
            kept = factors.refit(sent_B, moved, A_now)
            module.lora_B.add_(kept.to(module.lora_B.device))
            self._lose(factors.lost(sent_B, moved, kept, A_now)[0], sent_B, then.cpu())

    def _lose(self, left_out: float, sent_B: Tensor, sent_A: Tensor) -> None:
        """Count the squared norm of what a merge of sent_B sent_A leaves that the heads cannot hold."""
        total = factors.lost(sent_B, sent_A, sent_B, sent_A)[1]
        self._lost_ahead = (self._lost_ahead[0] + left_out, self._lost_ahead[1] + total)

    def _draw_now(self) -> int:
        """Which draw of A belongs to the version at hand: the same on all workers that hold it, also on late
        and new ones, so that disjoint subspaces stay disjoint."""
        if self.recipe.lora.A == "rotating":
            return self._round_done // self.recipe.lora.rotate_every
        return self.recipe.last_reset(self.version)

    def _follow_draw(self) -> None:
        """Have the A that belongs to the version."""
        if (draw := self._draw_now()) != self.draw:
            self.draw = draw
            if not self.recipe.train.full_rank:
                self._redraw()

    def _redraw(self) -> None:
        """New A, and with the optimizer's moments what `lora.moments` says. What B owes by the old A, which
        compression left out of what was sent, it keeps as far as the rows of the new one can hold it."""
        lora, seed = self.recipe.lora, self.recipe.run.seed
        for name, module in self.modules.items():
            new_A = draw_A(name, module, lora, seed=seed, first_head=self.first_head, draw=self.draw)
            if bool(module.lora_B.any()):
                owed_B, old_A = module.lora_B.cpu(), module.lora_A.cpu()
                new_B = factors.refit(owed_B, old_A, new_A)
                self._lose(factors.lost(owed_B, old_A, new_B, new_A)[0], self._sent[name + B], old_A)
                module.lora_B.copy_(new_B)
            new_A = new_A.to(module.lora_A.device)
            if lora.moments == "transport":
                for head in range(module.heads):
                    self._transport_moments(module, head, new_A[head])
            module.lora_A.copy_(new_A)
            for factor, parameter in ((A, module.lora_A), (B, module.lora_B)):
                if lora.moments == "clear":
                    self.optimizer.state.pop(parameter, None)
                elif lora.prune is not None:
                    self._prune_moments(name + factor, parameter, lora.prune)

    def _prune_moments(self, name: str, parameter: nn.Parameter, share: float) -> None:
        """Set a share of each head's moments to zero, and with a second moment its first one: without it, and
        while A's gradient is zero since B is, the first one would be divided by nothing but epsilon."""
        state = self.optimizer.state.get(parameter, {})
        for moments in state.values():
            if not isinstance(moments, Tensor) or moments.shape != parameter.shape:
                continue  # a count of steps, say
            for head, of_head in enumerate(moments, start=self.first_head):
                if self.recipe.lora.moments == "prune-magnitude":
                    prune.by_magnitude(of_head, share)
                else:
                    seed = (self.recipe.run.seed, "prune", name, head, self.draw)
                    prune.at_random(of_head, share, lowrank.generator_of(*seed))
        if (second := state.get("exp_avg_sq")) is not None:
            state["exp_avg"].mul_(second != 0)

    def _transport_moments(self, module: Adapted, head: int, new_A: Tensor) -> None:
        state = self.optimizer.state.get(module.lora_B, {})
        first, second = state.get("exp_avg"), state.get("exp_avg_sq")
        if first is None:  # SGD's and Muon's momentum is linear in the gradient, too
            first = state.get("momentum_buffer")
        if first is None:
            return
        squares = torch.zeros_like(first[head]) if second is None else second[head]
        moved, moved_squares = lowrank.transport(first[head], squares, module.lora_A[head], new_A)
        first[head].copy_(moved)
        if second is not None:
            second[head].copy_(moved_squares)

    # State

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that this worker alone knows between two local steps, or when it has encoded a contribution:
        tensors and numbers.

        Raises:
            ConfigError: the optimizer keeps what is neither.
        """
        numbers: dict[str, Any] = {
            "version": self.version,
            "round": self.round,
            "local_step": self.local_step,
            "is_ahead": self.is_ahead,
            "draw": self.draw,
            "lost": self.lost,
            "lost_ahead": list(self._lost_ahead),
            "has_merged": self._has_merged,
            "own_steps": self._own_steps,
            "scale": self.scale,
        }
        tensors = {f"parameter/{n}": p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        tensors |= {f"buffer/{name}": buffer for name, buffer in changing_buffers(self.model)}
        groups = {"published": self._published, "sent": self._sent, "known": self._known}
        groups["sent_with"] = self._sent_with
        for group, held in groups.items():
            tensors |= {f"{group}/{name}": tensor for name, tensor in held.items()}
        for name, module in self.modules.items():
            if module.merged_A is not None and module.merged_B is not None:
                tensors |= {f"merged/{name}{A}": module.merged_A, f"merged/{name}{B}": module.merged_B}
        moments, numbers["optimizer"] = optim.flat(self.optimizer, self.model)
        tensors |= {f"optimizer/{path}": moment for path, moment in moments.items()}
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
        return tensors, numbers

    @torch.no_grad()
    def resume(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], *, merged: bool) -> str:
        """Go on from the `state` of an earlier process, with the base at hand, which may be newer: the
        local steps of a round that is over count as none of the new one, but stay in the heads.

        Args:
            merged: whether the contribution that the state was saved with is in the base at hand.

        Returns:
            Which moments begin anew, and why, where the optimizer is another than that of the state; their
            rates warm up then as those of heads that begin in the middle of the run. Else "".

        Raises:
            KeyError, ValueError: it is not a state of this model.
        """
        if (scale := numbers.get("scale", 0.0)) != self.scale:
            had, has = (f"lora_scale {s:g}" if s else "the recipe's lora_scale" for s in (scale, self.scale))
            raise ValueError(f"they were of {had}, and are of {has}")
        self.revision += 1
        published, version, step = self._published, self.version, self._base_step
        self.version, self.round = int(numbers["version"]), int(numbers["round"])
        self.draw = int(numbers["draw"])
        made_for, self.recipe = self.recipe, self.recipe.in_round(self.version)
        if not self.recipe.has_heads_of(made_for):
            self._refit_heads()
        if self.recipe.is_A_given:  # it is in no state: what was drawn can be drawn again
            for name, module in self.modules.items():
                module.lora_A.copy_(self._draw_A(name, module))
        for name, module in self.modules.items():
            heads, _, rank = tensors[f"parameter/{name}.lora_B"].shape
            if (heads, rank) != (module.heads, module.rank):
                own = f"{module.heads} of lora_rank {module.rank}"
                raise ValueError(f"{name} had {heads} heads of lora_rank {rank}, and has {own}")
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[f"parameter/{name}"])
        for name, buffer in changing_buffers(self.model):
            buffer.copy_(tensors[f"buffer/{name}"])

        def group(kind: str) -> dict[str, Tensor]:
            return {n.removeprefix(f"{kind}/"): t for n, t in tensors.items() if n.startswith(f"{kind}/")}

        held_published = group("published")
        self._published = {name: held_published[name] for name, _ in self._averaged()}
        self._sent, self._sent_with, self._known = group("sent"), group("sent_with"), group("known")
        for name, module in self.modules.items():
            if module.merged_A is not None and module.merged_B is not None:
                module.merged_A.copy_(tensors[f"merged/{name}{A}"])
                module.merged_B.copy_(tensors[f"merged/{name}{B}"])
        anew = optim.load_flat(self.optimizer, self.model, group("optimizer"), numbers["optimizer"])
        torch.set_rng_state(tensors["rng/cpu"])
        if "rng/cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng/cuda"])
        self.local_step, self.is_ahead = int(numbers["local_step"]), bool(numbers["is_ahead"])
        self.lost, self._has_merged = float(numbers["lost"]), bool(numbers["has_merged"])
        self._own_steps = None if numbers["own_steps"] is None else int(numbers["own_steps"])
        if anew and version:
            self._own_steps = 0
        self._lost_ahead = (float(numbers["lost_ahead"][0]), float(numbers["lost_ahead"][1]))
        if version > self.version:
            self._take(_Published({}, published, {}, self._constants_digests), version, step, merged)
        return anew

    # The base

    def _staged(
        self, blobs: Mapping[str, Tensor], base_digest: str, version: int, *, whole: bool | Collection[int]
    ) -> _Published:
        """A version, complete and with the right digest."""
        quant = self.recipe.in_round(version).base.quant
        left = dict(blobs)
        bases, published, found = dict[str, Quantized](), dict[str, Tensor](), dict[str, Tensor]()
        digests = list(self._constants_digests)

        def is_whole(name: str) -> bool:
            return whole if isinstance(whole, bool) else self._shards.of(name) in whole

        try:
            for name, module in self.modules.items():
                held = _on_cpu(module.base)
                if is_whole(name):
                    held = quantize.empty(held.shape, quant, "cpu")
                bases[name] = changes.apply(held, left.pop(name + CODES), left.pop(name + SCALES))
            for name, now in self._published.items():
                shape, k = tuple(now.shape), 0
                if is_whole(name):
                    published[name] = blockwise.decode(left.pop(name + DENSE), "fp32", shape)
                    continue
                while (blob := left.pop(f"{name}{DENSE}.{k}", None)) is not None:
                    now, k = now + blockwise.decode_rows(blob, self._codec(name), shape), k + 1
                published[name] = now
            for name, tensor in self._constants.items():
                if is_whole(name):
                    blob = left.pop(name + CONSTANT)
                    found[name] = constants.decode(blob, tuple(tensor.shape), tensor.dtype)
            for k, digest in enumerate(self._shards.digests_of_constants(found)):
                digests[k] = digest or digests[k]
        except (KeyError, WireError) as error:
            raise DigestError(f"what arrived of the server's version cannot be read ({error})") from None
        if left:
            raise DigestError(f"the server published what this model does not have ({next(iter(left))})")
        if self._shards.digest(tensors_of(bases, published).items(), digests) != base_digest:
            raise DigestError("what arrived of the server's version differs from what it published")
        return _Published(bases, published, found, tuple(digests))

    @torch.no_grad()
    def _load(self, published: _Published) -> None:
        for name, base in published.bases.items():
            self.modules[name].load_base(base)
        constants.fill(self._constants, published.constants)
        self._published, self._constants_digests = published.averaged, published.constants_digests


def _or_identity(module: Adapted, A: Tensor) -> Tensor:
    """The A (H, r, in) of a module, on the CPU; the identity for heads of full rank."""
    return torch.eye(module.in_features).expand(module.heads, -1, -1) if module.is_full else A


def _owed(module: Adapted) -> tuple[Tensor, Tensor]:
    """What heads hold beyond what is merged, s (B A - B' A'), as factors (H, out, k), (H, k, in)."""
    A, B = _or_identity(module, module.lora_A.detach().cpu()), module.lora_B.detach().cpu() * module.scale
    if module.merged_A is None or module.merged_B is None:
        return B, A
    return lowrank.stacked(A, B, module.merged_A.cpu(), module.merged_B.cpu() * module.scale)


def _on_cpu(base: Quantized) -> Quantized:
    return replace(base, codes=base.codes.cpu(), scales=base.scales.cpu())


def materialize(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device, with memory for parameters and buffers that are on the meta device.

    Parameters are undefined and buffers zero until somebody fills them. In a converted model no weight
    (out, in) that is adapted is among them: the base took its place in `lte.convert`.
    """
    made: dict[Tensor, Tensor] = {}  # what is tied stays one
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                if parameter not in made:
                    real = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    made[parameter] = nn.Parameter(real, requires_grad=parameter.requires_grad)
                setattr(module, name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                if buffer not in made:
                    made[buffer] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
                setattr(module, name, made[buffer])
    return model.to(device)
