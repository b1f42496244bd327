"""Every setting in words, as `--help` and faults name it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lte.config import yaml12
from lte.config.recipe import Recipe


def describe() -> Iterator[tuple[str, str, str, str]]:
    """Every setting as (key, type, default, description), in the order of the recipe."""
    for section in fields(Recipe):
        kind = get_type_hints(Recipe)[section.name]
        hints = get_type_hints(kind)
        for leaf in fields(kind):
            default = leaf.default
            if leaf.default_factory is not dataclasses.MISSING:
                default = leaf.default_factory()
            yield (
                f"{section.name}.{leaf.name}",
                _type_name(hints[leaf.name]),
                _show(default),
                leaf.metadata["doc"],
            )


def _show(value: Any) -> str:
    """A default as it is written in an override."""
    if isinstance(value, tuple | dict):
        return yaml12.dump(list(value) if isinstance(value, tuple) else value, on_one_line=True).strip()
    if isinstance(value, str):
        return value if value.strip() else json.dumps(value)
    return "none" if value is None else str(value).lower()


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is dict:
        return "mapping"
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        return "list" if is_dataclass(inner) else f"list of {_type_name(inner)}"
    options = [option for option in get_args(hint) if option is not type(None)]
    if options and type(None) in get_args(hint):
        return f"{_type_name(options[0])} or none"
    return getattr(hint, "__name__", str(hint))
