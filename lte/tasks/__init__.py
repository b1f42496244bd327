"""What recipes train: model, loss, data and evaluation.

base    the contract
text    next tokens of packed text
images  classes of packed images
"""

from __future__ import annotations

from lte.config import Recipe
from lte.tasks.base import AnyTask, Stream, Task, micro_batches
from lte.tasks.images import Classes
from lte.tasks.text import Text

__all__ = ["AnyTask", "Classes", "Stream", "Task", "Text", "micro_batches", "task_of"]


def task_of(recipe: Recipe) -> AnyTask:
    """The task that a recipe names, by `data.kind`."""
    return Classes(recipe) if recipe.data.kind == "images" else Text(recipe)
