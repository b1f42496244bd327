"""What the first worker does beside training, and LTE's server else: records, evaluations, checkpoints."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from lte import config, durable, recipes
from lte.config import Recipe
from lte.ddp.group import Group
from lte.ddp.trainer import factor
from lte.server import checkpoint
from lte.server.checkpoint import Progress
from lte.server.evaluation import Evaluation, Losses
from lte.server.master import Master
from lte.tasks import task_of
from lte.track import Tracker

STEP = "step"
"""Name of the tensor of a checkpoint that says how many local steps are in it."""
COUNTED = 5
"""How many numbers each worker tells of a round."""


class Keeper:
    """Keeps one run; a context manager.

    The checkpoints are those of LTE's server: the fp32 weights are the master, and published is what
    `base.quant` makes of them in the modules that the recipe would adapt, the nearest codes each time.
    With `outer.ema` their average over rounds is kept, too.

    Attributes:
        version: rounds done.
    """

    def __init__(
        self,
        recipe: Recipe,
        group: Group,
        *,
        found: Path | None,
        display: bool,
        is_stopped: Callable[[], bool],
    ) -> None:
        """Go on from a checkpoint, or from the start.

        Args:
            is_stopped: asked in the midst of evaluations, which are given up then.
        """
        self.recipe, self.folder, self._group = recipe, Path(recipe.run.dir), group
        model = recipes.starting_model(recipe).eval()
        self._master = Master(model, recipe)
        self.version, self._tokens = 0, 0
        if found is None:
            self._master.take(model, as_version=False)
        else:
            progress, state = checkpoint.load(found)
            self._master.load_state(state)
            self.version, self._tokens = progress.version, progress.tokens
        self._evaluation = Evaluation(
            model,
            self._master,
            task_of(recipe).evaluate,
            num_threads=recipe.server.num_threads,
            is_stopped=is_stopped,
        )
        durable.write(self.folder / "config.yaml", config.to_yaml(recipe))
        self._tracker = Tracker(self.folder, recipe, version=self.version, display=display)

    def __enter__(self) -> Self:
        self._tracker.__enter__()
        plan, place = self._master.plan, self._group.place
        self._event(
            "started",
            f"{place.size} data-parallel workers, {self._group.backend} on {self._group.device}",
            num_parameters=plan.num_parameters,
            num_adapted_parameters=0,
        )
        for line in config.idle(self.recipe):
            self._event("idle", line)
        self._tracker.alive(place.size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracker.__exit__(kind, error, trace)

    def began_anew(self, words: str) -> None:
        """Record which moments a run that goes on with another optimizer does not go on with."""
        self._event("moments", words)

    def close_round(self, model: nn.Module, told: Tensor, payload_bytes: int, merge_s: float) -> None:
        """Take a round's weights, and record it.

        Args:
            told: fp64 (workers, COUNTED), of each worker: mean loss, tokens, bytes sent and received,
                seconds of its local steps.
            payload_bytes: that one worker handed to all-reduce.
            merge_s: that the round's end took so far.
        """
        self._master.take(model, as_version=True)
        self.version += 1
        local_steps, workers = self.recipe.train.local_steps, len(told)
        losses, tokens, sent, received, seconds = told.T.tolist()
        self._tokens += int(sum(tokens))
        uplink, downlink = int(sum(sent)), int(sum(received))
        bits = 8 / (self._master.plan.num_parameters * workers)
        last_step = self.version * local_steps - 1
        self._tracker.record(
            "round",
            version=self.version,
            tokens=self._tokens,
            train_loss=sum(losses) / workers,
            typical_loss=statistics.median(losses),
            num_merged=workers,
            num_told=workers,
            uplink_bytes=uplink,
            downlink_bytes=downlink,
            payload_bytes=payload_bytes,
            uplink_bits=uplink * bits,
            downlink_bits=downlink * bits,
            step_s=statistics.median(seconds) / local_steps,
            merge_s=merge_s,
            wait_s=max(seconds),
            lr=self.recipe.optimizer.dense_lr * factor(self.recipe, last_step),
        )

    def evaluate(self, max_tokens: int, *, last: bool = False) -> Losses | None:
        """Measure the weights as published, in fp32 and on average, and record it; None if told to stop
        meanwhile.

        Args:
            max_tokens: validation tokens to use, or 0 for all.
        """
        self._master.publish_nearest(last=last)
        losses = self._evaluation.losses(max_tokens)
        if losses is not None:
            self._tracker.record(
                "eval",
                version=self.version,
                tokens=self._tokens,
                **losses.recorded(),
                **losses.extras,
            )
        return losses

    def save(self, optimizer: Mapping[str, Tensor], step_index: int, model: nn.Module) -> None:
        """Write a checkpoint of the weights that the model has by now.

        Raises:
            OSError: the disk.
        """
        self._master.take(model, as_version=False)
        self._master.publish_nearest(last=self.version >= self.recipe.train.rounds)
        progress = Progress(
            version=self.version,
            tokens=self._tokens,
            master_digest=self._master.master_digest(),
            base_digest=self._master.base_digest(),
        )
        state = {**self._master.state(), "optimizer": optimizer, "ddp": {STEP: torch.tensor(step_index)}}
        keep = self.recipe.server.keep_checkpoints
        checkpoint.save(self.folder / "checkpoints", progress, state, keep=keep)

    def finish(self) -> bool:
        """Measure the result and write the last line of the records; False if told to stop before it."""
        if (measured := self.evaluate(self.recipe.eval.final_tokens, last=True)) is None:
            self.stopped("before the last evaluation was done")
            return False
        self._tracker.record(
            "done",
            rounds=self.version,
            version=self.version,
            tokens=self._tokens,
            workers=self.recipe.train.workers,
            num_parameters=self._master.plan.num_parameters,
            num_adapted_parameters=0,
            uplink_bytes=self._tracker.uplink_bytes,
            downlink_bytes=self._tracker.downlink_bytes,
            **measured.recorded(),
            master_digest=self._master.master_digest(),
        )
        return True

    def stopped(self, words: str) -> None:
        """Record that the run was stopped."""
        self._event("stopped", words)

    def _event(self, what: str, message: str, **fields: Any) -> None:
        self._tracker.record("event", what=what, message=message, version=self.version, **fields)
