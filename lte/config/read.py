"""Recipes from YAML and from `key=value` overrides, and back. All faults of one are reported together."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from lte.config import yaml12
from lte.config.describe import describe
from lte.config.faults import fault_line, missing_file, path_of, quoted
from lte.config.recipe import Recipe
from lte.config.rules import check
from lte.errors import ConfigError

_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)
_UNREADABLE = object()


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    complete: Callable[[dict[str, Any]], Sequence[str]] = lambda tree: (),
) -> Recipe:
    """Read a YAML recipe, with `key=value` overrides such as `train.rounds=20`.

    Args:
        complete: may add settings to the tree that was read, of sections, before it is checked; returns
            lines of faults.

    Raises:
        ConfigError: with one line for each fault of file and overrides.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([missing_file(Path(path))]) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise ConfigError([f"{path}: cannot be read ({reason})"]) from None
    try:
        tree = yaml12.read(text)
    except yaml.YAMLError as error:
        raise ConfigError([yaml12.fault_of(path, error)]) from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: must hold sections, such as train:, not {quoted(tree)}"])
    faults: list[str] = []
    for override in overrides:
        _override(tree, override, faults)
    faults += complete(tree)
    return from_dict(tree, faults)


def from_dict(tree: Mapping[str, Any], faults: Sequence[str] = ()) -> Recipe:
    """Check a nested mapping and make a recipe of it.

    Args:
        faults: lines found before, reported with those found here.

    Raises:
        ConfigError: with one line for each fault.
    """
    found = list(faults)
    # A section whose settings are all commented out is none in YAML.
    sections = {key: {} if value is None else value for key, value in tree.items()}
    wrong: set[str] = set()
    try:
        recipe = _ADAPTER.validate_python(sections)
    except ValidationError as error:
        found += [fault_line(fault) for fault in error.errors()]
        wrong = {".".join(path_of(fault)[:2]) for fault in error.errors()}
        # What is right is checked all the same, with defaults in place of what is wrong.
        recipe = _ADAPTER.validate_python(_without(sections, wrong))
    # But a rule about a setting that is wrong by itself says nothing.
    found += [line for line in check(recipe) if not any(_names(line, key) for key in wrong)]
    if found:
        raise ConfigError(found)
    return recipe


def checked(recipe: Recipe) -> Recipe:
    """The same recipe, for one that was made in Python: dataclasses alone take any value.

    Raises:
        ConfigError: with one line for each fault.
    """
    return from_dict(dataclasses.asdict(recipe))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as a nested mapping of plain values, which `from_dict` reads back."""
    return _ADAPTER.dump_python(recipe, mode="json")  # type: ignore[no-any-return]


def to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML with every setting, which `load` reads back."""
    return yaml12.dump(to_dict(recipe))


def replace(recipe: Recipe, **changes: Any) -> Recipe:
    """A copy with other values: `replace(recipe, **{"train.rounds": 20})`.

    Raises:
        ConfigError: with one line for each fault.
    """
    tree = to_dict(recipe)
    faults: list[str] = []
    for key, value in changes.items():
        _place(tree, key, copy.deepcopy(value), key, faults)  # a later change may be of what is in it
    return from_dict(tree, faults)


def differences(one: Recipe, other: Recipe, sections: Sequence[str]) -> list[str]:
    """Settings that differ, of these sections or of these names, as lines `train.rounds: 50 -> 60`."""
    left, right = dict(_leaves(to_dict(one))), dict(_leaves(to_dict(other)))
    return [
        f"{key}: {left.get(key)} -> {right.get(key)}"
        for key in sorted(left.keys() | right.keys())
        if {key, key.split(".")[0]} & {*sections} and left.get(key) != right.get(key)
    ]


def _override(tree: dict[str, Any], override: str, faults: list[str]) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        faults.append(f"{override!r}: an override is key=value, such as train.rounds=20")
        return
    try:
        value = yaml12.read(text)
    except yaml.YAMLError:
        value = _UNREADABLE
    if key in _text_keys() and not isinstance(value, str):  # a folder named 2024, a prompt "ROMEO:"
        value = text
    if value is _UNREADABLE:
        faults.append(f"{key}: {quoted(text)} cannot be read; lists are [a, b], text with signs in it 'a: b'")
        return
    _place(tree, key, value, override, faults)


def _place(tree: dict[str, Any], key: str, value: Any, met: str, faults: list[str]) -> None:
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            faults.append(f"{met}: {section!r} is a value, not a section")
            return
        node = child
    node[leaf] = value


def _without(sections: Mapping[str, Any], wrong: set[str]) -> dict[str, Any]:
    """The sections less the settings, or whole sections, that these keys name."""
    return {
        section: (
            {key: setting for key, setting in value.items() if f"{section}.{key}" not in wrong}
            if isinstance(value, Mapping)
            else value
        )
        for section, value in sections.items()
        if str(section) not in wrong
    }


def _names(line: str, key: str) -> bool:
    return re.search(rf"{re.escape(key)}\b", line) is not None


def _text_keys() -> set[str]:
    return {key for key, kind, *_ in describe() if kind in ("str", "str or none")}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
