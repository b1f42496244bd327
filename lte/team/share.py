"""Forward and backward passes of one process of a worker, or of the only one."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lte.config import Recipe
from lte.errors import ConfigError
from lte.nn import convert
from lte.tasks import AnyTask, Samples, micro_batches, task_of
from lte.worker.trainer import materialize


class Own(NamedTuple):
    """In what workers of a recipe differ.

    Attributes:
        slot: place among all workers. rank, heads, scale: of its heads; 0: as the recipe says.
    """

    slot: int
    rank: int
    heads: int
    scale: float


class Share:
    """The model of one process, and its share of each batch of its worker.

    With P processes and `train.accumulate` = K, gradients and losses of all are those of one process with
    K P pieces a batch, up to the order of sums: process p takes pieces p K to p K + K - 1.

    Attributes:
        model: converted, in memory, to be filled. device: where it is.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        own: Own,
        *,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        """Build the model.

        Args:
            own: the worker's.
            process: which of its processes this is.

        Raises:
            DataError: no data here.
        """
        torch.set_num_threads(recipe.worker.num_threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.device, self._recipe, self._task = device, recipe, task_of(recipe)
        self._process, self._processes = process, processes
        self._stream = self._task.stream(own.slot)
        self._num_slices = recipe.lora.capped(own.rank, own.heads).num_slices
        self.model = materialize(with_heads(recipe, own.rank, own.heads, own.scale), device)

    def backward(self, step: int) -> tuple[Tensor, int]:
        """Add the gradients of the mean loss of this share to the model's.

        Args:
            step: names the batch.

        Returns:
            The mean loss, and the tokens of the whole batch.
        """
        batch = self._stream.batch(step)
        shares = micro_batches(batch, self._num_slices, self._processes)
        share = next(islice(shares, self._process, None)).to(self.device)
        loss = backward(self.model, self._task, self._recipe, share, self._num_slices)
        return loss, self._task.num_tokens(batch)


def backward(model: nn.Module, task: AnyTask, recipe: Recipe, share: Samples, num_slices: int) -> Tensor:
    """Add the gradients of the mean loss of a share of a batch to the model's, in the recipe's precision and
    `train.accumulate` pieces.

    Args:
        share: on the model's device. num_slices: that heads cut it into.

    Returns:
        The mean loss.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for part in micro_batches(share, num_slices, recipe.train.accumulate):
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            loss = task.loss(model, part) / recipe.train.accumulate
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def with_heads(recipe: Recipe, rank: int, heads: int, scale: float) -> nn.Module:
    """The recipe's model with a worker's heads; no weight (out, in) takes memory.

    Args:
        rank: the most that they have. heads: how many there are, at most. scale: theirs in every module. 0:
            as the recipe says.
    """
    built = recipe.as_built
    return convert(task_of(recipe).build(), built.lora.capped(rank, heads, scale), built.base.quant)


def device_of(recipe: Recipe, number: int | None = None) -> torch.device:
    """The device that `worker.device` names.

    Args:
        number: of a process among those on this machine, which GPUs are shared out among; None: whichever
            of them is the current one.

    Raises:
        ConfigError: it is not on this machine.
    """
    name = recipe.worker.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if name == "cuda" and number is not None and torch.cuda.device_count():
            device = torch.device("cuda", number % torch.cuda.device_count())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError([f"worker.device: {name!r} is not on this machine; use auto or cpu"]) from None
    return device
