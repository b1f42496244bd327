"""A forward pass before a run begins: whether a model of transformers runs at all, and on text predicts from
the left alone. Numbers alone tell: an index that is too large has no shape."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lte import models
from lte.config import Recipe
from lte.errors import ConfigError
from lte.lowrank import generator_of
from lte.models.hf import in_a_line

_FEW_TOKENS = 32
_MOST_ROUNDING = 1e-4
"""Of the largest logit. Rounding makes 1e-6, where it makes any: shapes are the same. A model that looks
ahead makes 1e-3 and more, also one of width 32 that begins with weights of 0.02."""


@torch.no_grad()
def try_out(model: nn.Module, recipe: Recipe) -> None:
    """Refuse a model of transformers that cannot be trained. A few tokens are enough, or two images.

    Args:
        model: with the weights that its run starts from. It is left as it is.

    Raises:
        ConfigError: it cannot run, or predicts tokens from those after them.
    """
    # By running some models keep what they have computed, which is no weight.
    copied = copy.deepcopy(model).eval()
    generator = generator_of(recipe.run.seed, "trial")
    if recipe.data.kind == "images":
        shape = (2, recipe.model.channels, recipe.model.image_size, recipe.model.image_size)
        try:
            _logits(copied, torch.randn(shape, generator=generator))
        except Exception as error:  # any, of whatever model
            raise _refusal(recipe, error) from None
        return
    vocab_size, context_tokens = recipe.model.vocab_size, recipe.model.context_tokens
    tokens = torch.randint(vocab_size, (1, context_tokens), generator=generator)
    reason: Exception | None = None
    for num_tokens in (_FEW_TOKENS, context_tokens):  # some run at one length alone
        try:
            looks_ahead = _looks_ahead(copied, tokens[:, :num_tokens], vocab_size)
        except Exception as error:  # any, of whatever model
            reason = error
            continue
        if looks_ahead:
            raise ConfigError(
                [
                    f"model.config: this {recipe.model.architecture} predicts tokens from those after them;"
                    " choose an architecture that does not, or the setting that makes it causal, as"
                    " causal=true of xlm and attn_type=uni of xlnet"
                ]
            )
        return
    assert reason is not None
    raise _refusal(recipe, reason)


def _looks_ahead(model: nn.Module, tokens: Tensor, vocab_size: int) -> bool:
    """Whether logits depend on tokens after theirs.

    Args:
        tokens: (1, n).
    """
    half = tokens.shape[1] // 2
    other = tokens.clone()
    other[:, half:] = (other[:, half:] + 1) % vocab_size
    one, two = (_logits(model, given)[:, :half] for given in (tokens, other))
    return half > 0 and bool((one - two).abs().max() > _MOST_ROUNDING * one.abs().max())


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Drawn by the same random numbers each time, where it draws some."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.outputs(model, inputs)[0]


def _refusal(recipe: Recipe, error: Exception) -> ConfigError:
    reason = f"{type(error).__name__}: {in_a_line(error)}"
    return ConfigError([f"model.config: this {recipe.model.architecture} cannot run ({reason})"])
