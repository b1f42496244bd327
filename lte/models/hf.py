"""Any model of the transformers library, from scratch. The library is imported when one is asked for, and
nothing is ever fetched."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lte.config import Model
from lte.errors import ConfigError, UserError
from lte.lowrank import seed_of

Kind = Literal["text", "images"]

_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def build(config: Model, kind: Kind) -> nn.Module:
    """A causal language model, or a classifier of images, on the device that torch makes tensors on.

    Raises:
        ConfigError: no such architecture, settings that it does not know, or cannot be made a model of.
        UserError: transformers is not installed.
    """
    try:
        from transformers.models.auto import configuration_auto, modeling_auto
    except ImportError:
        raise UserError(
            "model.name: transformers needs the library of that name; pip install 'lte[hf]'"
        ) from None
    names: Iterable[str]
    auto: Any
    if kind == "text":
        names, auto = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.AutoModelForCausalLM
    else:
        names = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        auto = modeling_auto.AutoModelForImageClassification
    architecture = config.architecture or ""
    if architecture not in names:
        hint = _nearest(architecture, names)
        raise ConfigError([f"model.architecture: transformers has no {architecture!r} for {kind}{hint}"])
    config_class: Any = configuration_auto.CONFIG_MAPPING[architecture]
    settings = _settings(config, kind, config_class)
    try:
        made = config_class(**settings)
        model: nn.Module = auto.from_config(made)
    except Exception as error:  # whatever a model raises on settings that do not fit each other
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            [f"model.config: transformers can make no {architecture} of these settings ({reason[:300]})"]
        ) from None
    positions = getattr(made, "max_position_embeddings", None)
    if kind == "text" and isinstance(positions, int) and positions < config.context_tokens:
        raise ConfigError(
            [
                f"model.context_tokens: {config.context_tokens} is more than the {positions} positions of"
                f" this {architecture}; set model.config.max_position_embeddings={config.context_tokens}"
            ]
        )
    return model


def _settings(config: Model, kind: Kind, config_class: Any) -> dict[str, Any]:
    """What the model's config is made of: the recipe's, and defaults for training from scratch.

    Raises:
        ConfigError: settings that the config does not know.
    """
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    names = {*fields, *config_class.attribute_map}
    if unknown := [name for name in config.config if name not in names]:
        raise ConfigError(
            [
                f"model.config.{name}: unknown setting of {config.architecture}"
                f"{_nearest(name, names, 'model.config.')}"
                for name in unknown
            ]
        )
    if kind == "text":
        # Packed text has no special tokens; one that pads would have an embedding that is not trained.
        scratch: dict[str, Any] = dict.fromkeys(_SPECIAL_TOKENS)
        scratch |= {"vocab_size": config.vocab_size, "is_decoder": True}
    else:
        scratch = {"image_size": config.image_size, "num_channels": config.channels}
    scratch = {name: value for name, value in scratch.items() if name in names}
    scratch |= {
        name: 0.0 for name, default in fields.items() if "drop" in name and isinstance(default, float)
    }
    if kind == "images":
        scratch["num_labels"] = config.num_classes  # a property, not a field
    return scratch | config.config


def _nearest(met: str, names: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(met, sorted(names), n=1)
    return (
        f", did you mean {prefix}{close[0]}?"
        if close
        else f"; there are: {', '.join(sorted(names)[:12])}, ..."
    )


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """The library's own initialization, each module's from a seed of its own name.

    The library draws from torch's global generator, which is put back afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        for name, module, owner in _modules(model):
            torch.manual_seed(seed_of(seed, "init", name))
            owner._init_weights(module)  # type: ignore[operator]


def _modules(
    module: nn.Module, name: str = "", owner: nn.Module | None = None
) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, module, the innermost model around it, which knows how it begins), children first: some
    models give a child's weights their values by way of its parent."""
    if owner is None or hasattr(module, "_init_weights"):
        owner = module
    for child_name, child in module.named_children():
        yield from _modules(child, f"{name}.{child_name}".lstrip("."), owner)
    yield name, module, owner


def outputs(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits, and while training the loss that balances the experts of a mixture, times its weight, if
    its config asks for it (`output_router_logits`)."""
    given = {"use_cache": False} if model.main_input_name == "input_ids" else {}
    found = model(inputs, **given)
    auxiliary = getattr(found, "aux_loss", None)
    if auxiliary is None or not model.training:
        return found.logits, None
    settings: Any = model.config
    return found.logits, settings.router_aux_loss_coef * auxiliary
