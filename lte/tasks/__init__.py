"""What recipes train: model, loss, data and evaluation.

base        the contract
text        next tokens of packed text
images      classes of packed images
regression  a linear map, of which the solution is known
trial       whether a model of transformers runs, and looks ahead
"""

from __future__ import annotations

from lte.config import Recipe
from lte.tasks.base import AnyTask, Samples, Stream, Task, micro_batches
from lte.tasks.images import Classes
from lte.tasks.regression import Regression
from lte.tasks.text import Text
from lte.tasks.trial import try_out

__all__ = [
    "AnyTask",
    "Classes",
    "Regression",
    "Samples",
    "Stream",
    "Task",
    "Text",
    "micro_batches",
    "task_of",
    "try_out",
]

_KINDS: dict[str, type[AnyTask]] = {"text": Text, "images": Classes, "regression": Regression}


def task_of(recipe: Recipe) -> AnyTask:
    """The task that a recipe names, by `data.kind`."""
    return _KINDS[recipe.data.kind](recipe)
