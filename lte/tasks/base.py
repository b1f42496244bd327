"""What a recipe trains: the contract that every task keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from lte.config import Recipe
from lte.server.evaluation import Measured


class Samples(Protocol):
    """What holds samples as dimension 0 of a tensor does."""

    def to(self, device: torch.device, /) -> Self: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Self:
        """Those of an index, int64 (n,), on the CPU."""


Batch = TypeVar("Batch", bound=Samples)
Read = TypeVar("Read", bound=Samples, covariant=True)


class Stream(Protocol[Read]):
    """A worker's endless training data."""

    def batch(self, step: int, /) -> Read:
        """Batch number `step`, counted from 0, on the CPU: a pure function of the stream and the step, so
        that a resumed worker goes on exactly."""


class Task(Protocol[Batch]):
    """Model, loss, data and evaluation of a recipe.

    A task is made of the recipe alone and keeps no state: server, workers and whoever uses the result
    afterwards make one each, on machines of their own. Nothing is read before it is asked for.

    Attributes:
        unit: of losses, in words: `nats a token`.
    """

    unit: str

    def __init__(self, recipe: Recipe) -> None: ...

    def build(self) -> nn.Module:
        """The plain model, on the meta device: shapes without memory.

        Raises:
            ConfigError: settings of which no model can be made.
        """

    def initialize(self, model: nn.Module, seed: int) -> None:
        """Give a model with memory its initial weights: a pure function of names, shapes and seed. Each
        tensor or module draws from a generator of its own, so that its values depend on no other's."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss in nats, with a graph: a mean over dimension 0 of all that the batch holds, its
        samples, which the H heads of a worker share out in equal slices."""

    def stream(self, slot: int) -> Stream[Batch]:
        """The training data of the worker in this slot; those of slots 0 to train.workers - 1 are disjoint.

        Raises:
            DataError: data that are missing, or too few.
        """

    def noise(self, num_samples: int, device: torch.device) -> Batch:
        """A batch of random numbers that the model can read, for trials without data."""

    def num_tokens(self, batch: Batch) -> int:
        """What the batch adds to the records' `tokens`: its samples where there are no tokens."""

    def evaluate(self, model: nn.Module, max_tokens: int) -> Measured:
        """Mean validation loss, and more that goes into the records, over at most so many tokens (0: all).

        Args:
            model: in eval mode, without gradients, and with memory.

        Raises:
            DataError: no validation data, or damaged ones.
        """

    def check(self) -> None:
        """Refuse data on this machine that the model cannot read.

        Raises:
            DataError: none there. ConfigError: they do not fit the model.
        """

    def check_run(self) -> None:
        """`check`, and refuse data that do not suffice for all workers or for the evaluation."""


AnyTask = Task[Any]


def micro_batches(batch: Batch, heads: int, num: int) -> Iterator[Batch]:
    """A batch in equal pieces, each with as much of every head's slice.

    Args:
        batch: n samples, of which heads take n / H each, in order. num: of pieces; divides n / H.

    Yields:
        n / num samples. The mean of their mean losses is the batch's.
    """
    if num == 1:
        yield batch
        return
    by_head = torch.arange(len(batch)).view(heads, num, -1)
    for k in range(num):
        yield batch[by_head[:, k].flatten()]
