"""Settings of a model that a recipe leaves out, taken from where its weights come from (`model.init_from`):
the config.json of a folder in transformers' layout, or the recipe of a run.

They become the recipe's own: a run needs the folder no more, and its workers, who never see it, are told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

from lte.config import Model
from lte.models import hf

CONFIG = "config.json"
"""Name of the settings of a folder in transformers' layout."""
_OWN = {"text": ("vocab_size",), "images": ("image_size", "channels", "num_classes")}
"""What the recipe's own settings say of a model of transformers, by what is read."""
_THERE = {"channels": "num_channels", "num_classes": "num_labels"}
"""Their names there, where those differ."""


@dataclass(frozen=True)
class Taken:
    """Settings that were found.

    Attributes:
        place: of them, for people. settings: by their names in the recipe's section `model`, without
            `config`. config: model.config.
    """

    place: str
    settings: Mapping[str, Any]
    config: Mapping[str, Any]


def from_folder(folder: Path, kind: str) -> Taken:
    """Settings of the model of a folder in transformers' layout. What changes nothing of what a trained model
    computes (dropouts, tokens with a meaning) is left to the recipe.

    Args:
        kind: of the data.

    Raises:
        ConfigError: its config cannot be read. UserError: transformers is not installed.
    """
    there = hf.config_of(folder)
    plain = there.to_dict()
    own = {name: _THERE.get(name, name) for name in _OWN.get(kind, ())}
    settings = {"architecture": there.model_type}
    for name, name_there in own.items():
        if (value := getattr(there, name_there, None)) is not None:
            settings[name] = _one(value)
    # The library writes a setting of several names under one of them.
    written = {name: there.attribute_map.get(name, name) for name in hf.computed(there)}
    config = {
        name: plain[as_written]
        for name, as_written in written.items()
        if as_written in plain and name not in own.values() and name not in _names_for(there, own)
    }
    return Taken(str(folder / CONFIG), settings, config)


def from_recipe(model: Model, kind: str, path: Path) -> Taken:
    """The same of the recipe of a run."""
    own = ("architecture", *_OWN.get(kind, ()))
    return Taken(str(path), {name: getattr(model, name) for name in own}, model.config)


def complete(tree: dict[str, Any], taken: Taken, say: Callable[[str], None]) -> list[str]:
    """Write settings into the section `model` of a recipe's tree that leaves them out.

    Args:
        say: prints a line for a person.

    Returns:
        A line for each setting that the recipe names otherwise.
    """
    model = tree["model"]
    named = {name: model[name] for name in taken.settings if model.get(name) not in (None, "none")}
    faults = [
        f"model.{name}: {value}, but {taken.place} says {taken.settings[name]}; leave it out to take that"
        for name, value in named.items()
        if value != taken.settings[name]
    ]
    if not faults:
        model |= {**taken.settings, "config": {**taken.config, **(model.get("config") or {})}}
        shown = ", ".join(f"{name} {value}" for name, value in taken.settings.items())
        say(f"model: {shown} and {len(taken.config)} settings of model.config are taken from {taken.place}")
    return faults


def leaves_out(model: Any) -> TypeGuard[dict[str, Any]]:
    """Whether the section `model` of a recipe's tree says where weights come from and, of a model of
    transformers, no settings that decide what it computes."""
    return (
        isinstance(model, dict)
        and model.get("name") == "transformers"
        and _is_free(model.get("config"))
        and isinstance(model.get("init_from"), str)
        and not {name for name in model if name not in {field.name for field in fields(Model)}}
    )


def _is_free(config: Any) -> bool:
    """Whether settings of `model.config` leave open what the model computes."""
    return not config or (isinstance(config, dict) and not any(hf.is_computed(str(name)) for name in config))


def _one(value: Any) -> Any:
    """One number for height and width where they are equal."""
    is_square = isinstance(value, list | tuple) and len(set(value)) == 1
    return value[0] if is_square else value


def _names_for(there: Any, own: Mapping[str, str]) -> set[str]:
    """Other names that the library has for settings which are the recipe's own."""
    return {there.attribute_map[name] for name in own.values() if name in there.attribute_map}
