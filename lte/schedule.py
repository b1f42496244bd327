"""The learning-rate schedule: a pure function of the local step, the same on server and workers."""

from __future__ import annotations

import math

from lte.config import Schedule


def join_factor(schedule: Schedule, own_step: int) -> float:
    """Further factor on the rates of heads that began in the middle of a run: their linear warmup.

    Args:
        own_step: local steps that these heads have taken.
    """
    return min(1.0, (own_step + 1) / max(1, schedule.join_warmup_steps))


def factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """Factor on all learning rates at a local step of the run: linear warmup, then the shape.

    Args:
        step: counted from 0 at the start of the run. total_steps: of the whole run.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    done = min((step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps), 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule.name == "cosine" else 1 - done
    return schedule.final + (1 - schedule.final) * shape
