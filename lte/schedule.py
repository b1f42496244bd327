"""The learning-rate schedule: a pure function of the local step, the same on server and workers."""

from __future__ import annotations

import math

from lte.config import Recipe, Schedule


def join_factor(schedule: Schedule, own_step: int) -> float:
    """Further factor on the rates of heads that began in the middle of a run: their linear warmup.

    Args:
        own_step: local steps that these heads have taken.
    """
    return min(1.0, (own_step + 1) / max(1, schedule.join_warmup_steps))


def factor_in(recipe: Recipe, number: int, local_step: int) -> float:
    """Factor on all learning rates at a local step of a round, both counted from 0."""
    settings, step = recipe.schedule, recipe.steps_before(number) + local_step
    last_restart = number - number % settings.restart_rounds
    return factor(settings, step, recipe.total_steps, recipe.steps_before(last_restart))


def factor(schedule: Schedule, step: int, total_steps: int, restart_step: int) -> float:
    """Factor on all learning rates at a local step of the run: linear warmup, then the shape.

    Args:
        step: counted from 0 at the start of the run. total_steps: of the whole run.
        restart_step: the first one since jagged-cosine's last restart; 0 before the first restart.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "jagged-cosine":
        return _jagged(schedule, step, total_steps, restart_step)
    return schedule.final + (1 - schedule.final) * _shape(schedule, step, total_steps)


def _shape(schedule: Schedule, step: int, total_steps: int) -> float:
    """What falls from 1, at the end of the warmup or later, to 0 at the end of the run."""
    decays_from = schedule.warmup_steps
    if schedule.name == "wsd":
        decays_from = max(decays_from, total_steps - round(schedule.decay_share * total_steps))
    done = min(max(0, step - decays_from) / max(1, total_steps - decays_from), 1.0)
    if schedule.name == "wsd":
        return 1 - (math.sqrt(done) if schedule.decay_shape == "1-sqrt" else done)
    return 1 - done if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def _jagged(schedule: Schedule, step: int, total_steps: int, restart_step: int) -> float:
    """ReLoRA's: a cosine to which the factor climbs anew, in a straight line, after each restart."""
    since = step - restart_step
    climb = schedule.restart_warmup_steps if restart_step else 0
    on_cosine = step if since >= climb else restart_step + climb - 1
    reached = schedule.final + (1 - schedule.final) * _shape(schedule, on_cosine, total_steps)
    return reached * min(1.0, (since + 1) / max(1, climb))
