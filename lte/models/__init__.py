"""Reference models, and how a recipe names them."""

from lte.models.gpt import GPT, build

__all__ = ["GPT", "build"]
