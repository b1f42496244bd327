"""One worker of a data-parallel run, from finding the others to its last step."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from pathlib import Path

from lte import recipes, signals
from lte.config import Recipe
from lte.ddp.group import Group
from lte.ddp.keeper import STEP, Keeper
from lte.ddp.place import Place
from lte.ddp.trainer import Trainer, freeze
from lte.errors import RunError
from lte.nn import blocks, plan
from lte.optim.groups import groups
from lte.server import checkpoint
from lte.server.folder import claim
from lte.tasks import task_of


def check(recipe: Recipe) -> None:
    """Refuse what cannot be trained, before any process starts.

    Raises:
        DataError: the data are missing or too few. ConfigError: settings that do not fit the model.
    """
    task = task_of(recipe)
    recipes.check_start(recipe)
    task.check_run()
    model = task.build()
    plan(model, recipe.lora, recipe.base.quant)
    freeze(model, recipe)
    groups(model, recipe.optimizer)
    if recipe.train.checkpoint_activations:
        blocks(model, recipe.train.checkpoint_modules)
    recipes.tried_start(recipe)


def train(recipe: Recipe, place: Place, *, claimed: bool, display: bool = True) -> int:
    """Train as one worker of all, until the last step or a signal, which stops all of them after the step
    at hand. The same call goes on from the last checkpoint, bit for bit.

    Args:
        claimed: the run folder is this run's already, by whoever started this process.
        display: show progress, if this is the first worker.

    Returns:
        The number of the signal that stopped the run, or 0 if it is finished.

    Raises:
        RunError: the run folder is in use, holds another run, or is not the one of the others.
        RunEnded: another worker is gone. DivergedError: numbers are not finite any more.
    """
    folder, came = Path(recipe.run.dir), list[int]()
    with ExitStack() as stack:
        if place.is_first and not claimed:
            stack.enter_context(claim(folder, recipe, take_over=False)).started()
        group = stack.enter_context(Group(recipe, place))
        trainer = Trainer(recipe, group)
        found = _newest(folder, group)
        keeper = None
        if place.is_first:
            keeper = stack.enter_context(
                Keeper(recipe, group, found=found, display=display, is_stopped=lambda: bool(came))
            )
        if found:
            _, state = checkpoint.load(found)
            step_index = int(state["ddp"][STEP])
            anew = trainer.load(step_index, state, _own(folder, place, step_index))
            if keeper and anew:
                keeper.began_anew(anew)
        stack.enter_context(signals.told(came.append))
        if not found:
            _save(trainer, group, keeper)
        stopped = _steps(trainer, group, keeper, came)
        if keeper and not stopped:
            stopped = 0 if keeper.finish() else came[0]
        elif keeper:
            keeper.stopped(f"stopped by {signal.Signals(stopped).name}")
    return stopped


def _newest(folder: Path, group: Group) -> Path | None:
    """The checkpoint that the first worker finds, for all of them.

    Raises:
        RunError: another worker does not find it.
    """
    there = checkpoint.versions(folder / "checkpoints")
    mine = checkpoint.version_of(there[-1]) if there else -1
    version = group.largest(mine if group.place.is_first else -1)()
    found = [path for path in there if checkpoint.version_of(path) == version]
    if version >= 0 and not found:
        raise RunError(
            f"{folder}: the checkpoint of version {version} is missing here; run.dir must be one that all"
            " workers share"
        )
    return found[0] if found else None


def _steps(trainer: Trainer, group: Group, keeper: Keeper | None, came: list[int]) -> int:
    """Take the run's local steps that are left, and save at its end.

    Returns:
        The number of a signal that came to any of the workers, or 0.
    """
    recipe, stopped = trainer.recipe, 0
    while trainer.step_index < recipe.total_steps and not stopped:
        told = group.largest(came[0] if came else 0)  # travels while this step computes
        trainer.step()
        stopped = told()
        if trainer.step_index % recipe.train.local_steps == 0:
            _close_round(trainer, group, keeper)
            version = trainer.step_index // recipe.train.local_steps
            is_last = version == recipe.train.rounds
            if keeper and recipe.eval.every and version % recipe.eval.every == 0 and not is_last:
                keeper.evaluate(recipe.eval.tokens)
            if version % recipe.server.checkpoint_every == 0 and not is_last:
                _save(trainer, group, keeper)
    _save(trainer, group, keeper)
    return stopped


def _close_round(trainer: Trainer, group: Group, keeper: Keeper | None) -> None:
    """Record what every worker did since the round before."""
    began_s, step_s = time.monotonic(), trainer.step_s
    tally = trainer.close_round()
    payload_bytes = trainer.exchange.payload_bytes()
    moved = group.moved(payload_bytes)
    told = group.gathered(tally.loss / tally.batches, tally.tokens, *moved, step_s)
    if keeper:
        keeper.close_round(trainer.model, told, payload_bytes, time.monotonic() - began_s)


def _save(trainer: Trainer, group: Group, keeper: Keeper | None) -> None:
    """Write a checkpoint: first what each worker alone knows, then, once all have, the first worker all
    the rest, by which it counts."""
    recipe, folder = trainer.recipe, Path(trainer.recipe.run.dir)
    own = _own(folder, group.place, trainer.step_index)
    trainer.save_own(own)
    group.wait_for_all()
    if keeper:
        keeper.save(trainer.optimizer_state(), trainer.step_index, trainer.model)
    # One more than there are checkpoints: the newest of these may not be written yet.
    for old in sorted(own.parent.glob("step-*"))[: -recipe.server.keep_checkpoints - 1]:
        old.unlink()


def _own(folder: Path, place: Place, step_index: int) -> Path:
    """Where a worker writes what it alone knows."""
    return folder / "workers" / f"w{place.number}" / f"step-{step_index:08d}.safetensors"
