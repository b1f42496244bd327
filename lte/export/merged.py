"""A run's merged model, in transformers' layout or as plain safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lte
from lte import config, durable, quantize, recipes
from lte.config import Recipe
from lte.data import ImageIndex, tokenizer
from lte.errors import DataError, UserError
from lte.models import hf, weights
from lte.models.counterparts import counterpart_of
from lte.nn import experts_split, has_split_experts
from lte.worker.trainer import materialize

_BILINEAR = 2
"""Pillow's number of this way of resizing."""


def to_transformers(run: Path, out: Path, which: str, rank: int | None = None) -> str:
    """Write a run's model as a folder that transformers' `from_pretrained` loads: config, weights, for text
    the generation config and tokenizer, for images the names of classes and the preprocessor's config. A
    reference model becomes its counterpart there.

    Args:
        which: weights, `published`, `master` or `ema`. out: a folder that is not there, or empty.
        rank: cut nested heads to it, see `recipes.load_run`.

    Returns:
        What was left out, in words, or ''.

    Raises:
        RunError: no such run, or rank. UserError: `out` holds something, or transformers is not installed.
    """
    model, recipe, _ = recipes.load_run(run, which, rank)
    theirs = in_transformers(model, recipe)
    with written_whole(out) as folder, hf.quiet():
        if recipe.data.kind == "images":
            left_out = _save_reading(recipe, theirs.config, folder)
        else:
            left_out = _save_tokenizer(recipe, folder)
        theirs.save_pretrained(folder)
        return left_out


def in_transformers(model: nn.Module, recipe: Recipe) -> Any:
    """A recipe's model as one of transformers, in eval mode: itself, if it is one as the library has it, or
    a reference model's counterpart.

    Raises:
        UserError: transformers is not installed.
    """
    if recipe.model.name == "transformers" and not has_split_experts(model):
        return model
    counterpart = counterpart_of(recipe.model)
    with torch.device("meta"):
        theirs = hf.build(counterpart.model, recipe.data.kind)
    materialize(theirs, torch.device("cpu"))
    hf.initialize(theirs, seed=0)  # buffers that no state dict holds
    with experts_split(theirs):
        counterpart.fill(theirs.state_dict(), model.state_dict())
    return theirs.eval()


def _save_reading(recipe: Recipe, settings: Any, folder: Path) -> str:
    """Write how images become the model's input, and into its config the names of their classes."""
    try:
        index = ImageIndex.load(recipe.data.shards)
    except DataError as error:
        return f"without names of classes and preprocessor_config.json ({error})"
    # A model may have more classes than its data.
    unnamed = {place: f"LABEL_{place}" for place in range(settings.num_labels)}
    settings.id2label = unnamed | dict(enumerate(index.classes))
    settings.label2id = {name: place for place, name in settings.id2label.items()}
    described = {
        "image_processor_type": "ViTImageProcessor",  # which does this and no more, for whichever model
        "do_convert_rgb": index.channels == 3,
        "do_resize": True,  # which leaves those of the right size alone
        "size": {"height": index.height, "width": index.width},
        "resample": _BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": index.mean,
        "image_std": index.std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(described, indent=2) + "\n")
    return ""


def _save_tokenizer(recipe: Recipe, folder: Path) -> str:
    if recipe.data.kind != "text":
        return ""
    import transformers

    try:
        own = tokenizer.load(Path(recipe.data.shards))
    except DataError as error:
        return f"without its tokenizer ({error})"
    library: Any = transformers
    library.PreTrainedTokenizerFast(
        tokenizer_object=own.of_library(), model_max_length=recipe.model.context_tokens
    ).save_pretrained(folder)
    return ""


def to_safetensors(run: Path, out: Path, which: str, rank: int | None = None) -> None:
    """Write a run's model as `out/model.safetensors`: its state dict, what is tied by its first name. At the
    file's head: the recipe as JSON, version, which weights, and a digest of the tensors.

    Args:
        which: weights, `published`, `master` or `ema`. out: a folder that is not there, or empty.
        rank: cut nested heads to it, see `recipes.load_run`.

    Raises:
        RunError: no such run, or rank. UserError: `out` holds something.
    """
    model, recipe, version = recipes.load_run(run, which, rank)
    tensors = {names[0]: tensor.detach() for names, tensor in weights.held(model)}
    described = {
        "format": "pt",  # transformers' files say so, and it asks for it
        "lte.version": lte.__version__,
        "lte.recipe": json.dumps(config.to_dict(recipe)),
        "lte.weights": f"{which} of version {version}" + (f", heads cut to rank {rank}" if rank else ""),
        weights.DIGEST: quantize.digest(sorted(tensors.items())),
    }
    with written_whole(out) as folder:
        durable.save_tensors(tensors, folder / weights.FILE, described)


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder to write, which becomes `out` when all is written.

    Raises:
        UserError: `out` holds something.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is there already; choose another --out, or remove it")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed here
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    try:
        yield partial
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial)
        raise
