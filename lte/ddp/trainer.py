"""The local steps of one worker: a whole copy of the model, which all step alike."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lte import durable, optim, recipes, schedule
from lte.config import Recipe
from lte.ddp.exchange import Exchange
from lte.ddp.group import Group
from lte.errors import ConfigError, DivergedError, RunError
from lte.lowrank import seed_of
from lte.nn import changing_buffers, frozen_parameters, mark_statistics, recompute_activations, statistics
from lte.tasks import AnyTask, micro_batches, task_of
from lte.worker.state import Tally

_UNUSED = "find_unused_parameters"
"""What torch's words hold when a step left parameters without gradients."""
_FORMAT = "2"
"""Of what each worker writes for itself, and of the optimizer's tensors beside it."""


class Trainer:
    """One worker's model, optimizer and place in its data.

    What a forward pass draws, such as dropout's masks, is a function of run, worker and step; so are the
    batches. So a run that goes on from a checkpoint takes the steps that it would have taken.

    Attributes:
        model: the plain model. step_index: local steps taken since the run's start.
        tally: of those since the last round. step_s: seconds that they took.
    """

    def __init__(self, recipe: Recipe, group: Group) -> None:
        """Build the model, the same on all workers.

        Raises:
            ConfigError, DataError: see `check`.
        """
        torch.set_num_threads(recipe.worker.num_threads)
        self.recipe, self._group, self.task = recipe, group, task_of(recipe)
        self.step_index, self.tally, self.step_s = 0, Tally(), 0.0
        self._stream = self.task.stream(group.place.number)
        self.model = recipes.starting_model(recipe).to(group.device).train()
        freeze(self.model, recipe)
        self.optimizer = optim.make_optimizer(self.model, recipe.optimizer)
        self._peak_rates = [float(of["lr"]) for of in self.optimizer.param_groups]
        if recipe.train.checkpoint_activations:
            recompute_activations(self.model, recipe.train.checkpoint_modules)
        self.exchange = Exchange(recipe)
        with warnings.catch_warnings():
            # In 2.13 torch renames `broadcast_buffers`, but has no other name yet for what it means.
            warnings.simplefilter("ignore", FutureWarning)
            self._parallel = DistributedDataParallel(
                _Loss(self.model, self.task, recipe, group.device),
                broadcast_buffers=False,
                find_unused_parameters=recipe.ddp.find_unused,
                bucket_cap_mb=self.exchange.bucket_cap_mb(self.model, group.backend),
            )
        self.exchange.register(self._parallel)
        self._rehearse()

    def _rehearse(self) -> None:
        """Take half a step, which leaves no trace but one: torch then puts gradients into buckets in the
        order in which they came. Places in buckets decide the order of sums, and so bits: with this they
        are the same in every process that takes up a run."""
        held = [(buffer, buffer.clone()) for _, buffer in changing_buffers(self.model)]
        part = next(iter(micro_batches(self._stream.batch(0), 1, self.recipe.train.accumulate)))
        self._parallel(part.to(self._group.device)).backward()
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in held:
            buffer.copy_(before)
        self.exchange.load_state({})
        self._group.moved(self.exchange.payload_bytes())

    def step(self) -> None:
        """Take a local step: the gradients' mean over all workers' batches, clipped, and the optimizer.

        Raises:
            RuntimeError: from torch, when another worker is gone.
        """
        began_s = time.monotonic()
        recipe, group = self.recipe, self._group
        torch.manual_seed(seed_of(recipe.run.seed, "forward", group.place.number, self.step_index))
        batch = self._stream.batch(self.step_index)
        parts = list(micro_batches(batch.to(group.device), 1, recipe.train.accumulate))
        total = torch.zeros((), device=group.device)
        for number, part in enumerate(parts, start=1):
            with nullcontext() if number == len(parts) else self._parallel.no_sync():
                loss = self._forward(part) / len(parts)
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        for of, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            of["lr"] = peak * factor(recipe, self.step_index)
        optim.clip(self.model, recipe.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_index += 1
        self.tally = Tally(
            loss=self.tally.loss + float(total),
            batches=self.tally.batches + 1,
            tokens=self.tally.tokens + self.task.num_tokens(batch),
        )
        self.step_s += time.monotonic() - began_s

    def _forward(self, part: Any) -> Tensor:
        try:
            loss: Tensor = self._parallel(part)
        except RuntimeError as error:
            if _UNUSED not in str(error):
                raise
            raise ConfigError(
                ["ddp.find_unused: a step left some parameters without gradients; set ddp.find_unused=true"]
            ) from None
        return loss

    def close_round(self) -> Tally:
        """Bring statistics to their means over the workers, as merges do, and begin a new tally.

        Returns:
            The tally of the round.

        Raises:
            DivergedError: there are numbers that are not finite.
        """
        self._group.average(buffer for _, buffer in statistics(self.model))
        for name, tensor in self.model.named_parameters():
            if not bool(tensor.isfinite().all()):
                raise DivergedError(
                    f"training diverged by local step {self.step_index}: {name} is not finite; lower"
                    " optimizer.dense_lr"
                )
        tally, self.tally, self.step_s = self.tally, Tally(), 0.0
        return tally

    # State

    def optimizer_state(self) -> dict[str, Tensor]:
        """Tensors of the optimizer, the same on all workers."""
        return optim.flat(self.optimizer, self.model)[0]

    def save_own(self, path: Path) -> None:
        """Write what this worker alone knows, and numbers, durably.

        Raises:
            OSError: the disk.
        """
        buffers = {f"buffer/{name}": buffer for name, buffer in changing_buffers(self.model)}
        exchange = {f"exchange/{name}": tensor for name, tensor in self.exchange.state().items()}
        numbers = {
            "tally": [self.tally.loss, self.tally.batches, self.tally.tokens],
            "optimizer": optim.flat(self.optimizer, self.model)[1],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        described = {"format": _FORMAT, "numbers": json.dumps(numbers)}
        durable.save_tensors(buffers | exchange, partial, described)
        durable.name(partial, path)

    @torch.no_grad()
    def load(self, step_index: int, state: Mapping[str, Mapping[str, Tensor]], own: Path) -> str:
        """Go on from a checkpoint's tensors and from what this worker wrote with it.

        Returns:
            Which moments begin anew, and why, where the optimizer is another than then; else "".

        Raises:
            RunError: this worker's file is missing, damaged or of another version of lte.
        """
        try:
            with safe_open(own, "pt", device=str(self._group.device)) as file:
                described = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{own}: cannot be read ({error}); run.dir must be one that all workers share"
            ) from None
        if described.get("format") != _FORMAT:
            raise RunError(
                f"{own}: of another version of lte; choose another run.dir, or run.resume=never to move the"
                " run aside"
            )
        numbers = json.loads(described["numbers"])
        mine = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for kept in (state["master"], state["constants"], _group("buffer", tensors)):
            for name, tensor in kept.items():
                mine[name].copy_(tensor)
        anew = optim.load_flat(self.optimizer, self.model, state["optimizer"], numbers["optimizer"])
        self.exchange.load_state(_group("exchange", tensors))
        loss, batches, num_tokens = numbers["tally"]
        self.step_index, self.tally = step_index, Tally(loss=loss, batches=batches, tokens=num_tokens)
        return anew


class _Loss(nn.Module):
    """DistributedDataParallel wraps what is called."""

    def __init__(self, model: nn.Module, task: AnyTask, recipe: Recipe, device: torch.device) -> None:
        super().__init__()
        self.model, self._task, self._kind = model, task, device.type
        self._is_mixed = recipe.train.precision == "bf16"

    def forward(self, batch: Any) -> Tensor:
        with torch.autocast(self._kind, torch.bfloat16, enabled=self._is_mixed):
            return self._task.loss(self.model, batch)


def freeze(model: nn.Module, recipe: Recipe) -> None:
    """Have `lora.freeze` and `lora.statistics` hold of a plain model."""
    mark_statistics(model, recipe.lora.statistics)
    for name in frozen_parameters(model, recipe.lora):
        model.get_parameter(name).requires_grad_(False)


def factor(recipe: Recipe, step: int) -> float:
    """Factor on the rates of a local step, counted from 0."""
    return schedule.factor_in(recipe, *divmod(step, recipe.train.local_steps))


def _group(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(f"{kind}/"): t for n, t in tensors.items() if n.startswith(f"{kind}/")}
