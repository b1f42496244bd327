"""The losses of what is published, the master and its average, unless the server is told to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from lte.errors import StoppedError
from lte.server.master import Master


class Measured(NamedTuple):
    """Mean loss on validation data, or None where there is none to measure on, and what else is worth a
    record, by name, such as `accuracy`."""

    loss: float | None
    extras: Mapping[str, float] = {}


Evaluate = Callable[[nn.Module, int], Measured | float | None]
"""(model in eval mode, most tokens to use or 0 for all) -> what was measured, or its mean loss alone."""


class Losses(NamedTuple):
    """Mean losses of the published weights, the master and its average, None where there is nothing to
    measure, and `NAME`, `NAME_master` and `NAME_ema` of what else was measured of them."""

    published: float | None
    master: float | None
    ema: float | None = None
    extras: Mapping[str, float] = {}

    def recorded(self) -> dict[str, float | None]:
        """The losses as records name them: of the average where there is one."""
        average = {} if self.ema is None else {"loss_ema": self.ema}
        return {"loss": self.published, "loss_master": self.master, **average}


class Evaluation:
    """Measures on the server's own threads, with the master's model."""

    def __init__(
        self,
        model: nn.Module,
        master: Master,
        evaluate: Evaluate | None,
        *,
        num_threads: int,
        is_stopped: Callable[[], bool],
        fill_others: Callable[[nn.Module, str], None] | None = None,
    ) -> None:
        """Make it.

        Args:
            model: in eval mode; the weights are filled into it. master: what is measured.
            is_stopped: asked before every module that the model runs.
            fill_others: of a divided master, fills in which weights the other shards hold; StoppedError where
                that was given up.
        """
        # Where nothing is measured the model's memory is not kept.
        self._on = None if evaluate is None else (model, evaluate)
        self._master = master
        self._fill_others = fill_others
        self._num_threads, self._is_stopped = num_threads, is_stopped

    def losses(self, max_tokens: int) -> Losses | None:
        """The losses on so many tokens, or on all for 0; None if told to stop meanwhile."""
        if self._on is None:
            return Losses(None, None)
        model, evaluate = self._on
        measured = {}
        others = torch.get_num_threads()
        torch.set_num_threads(self._num_threads)
        try:
            weights = ("published", "master", "ema") if self._master.ema.tensors else ("published", "master")
            with self._given_up_when_stopped(model), torch.no_grad():
                for which in weights:
                    self._master.fill(model, which)
                    if self._fill_others:
                        self._fill_others(model, which)
                    found = evaluate(model, max_tokens)
                    measured[which] = found if isinstance(found, Measured) else Measured(found)
        except StoppedError:
            return None
        finally:
            torch.set_num_threads(others)
        extras = {
            name if which == "published" else f"{name}_{which}": value
            for which, found in measured.items()
            for name, value in found.extras.items()
        }
        return Losses(**{which: found.loss for which, found in measured.items()}, extras=extras)

    @contextmanager
    def _given_up_when_stopped(self, model: nn.Module) -> Iterator[None]:
        """Have the model raise `StoppedError` at its next module, whoever runs it, once told to stop."""

        def check(module: nn.Module, inputs: object) -> None:
            if self._is_stopped():
                raise StoppedError("told to stop")

        hooks = [module.register_forward_pre_hook(check) for module in model.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
