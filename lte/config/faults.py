"""What is wrong with a recipe, in one line each: what was met, what was expected, what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lte.config.describe import describe
from lte.config.recipe import Override, Phase, Rate, Recipe

_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "finite_number": "finite",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "number": "a number",
    "string_too_short": "a name",
    "string_type": "text in quotes",
    "tuple_type": "a list, such as [a, b]",
}
"""What to say for pydantic's types of errors."""


_LISTED = {"lora.overrides": Override, "optimizer.rates": Rate, "train.phases": Phase}
"""What the lists hold whose entries have settings of their own."""


def path_of(fault: Any) -> list[str]:
    """Where one of pydantic's errors is, from the section down."""
    return [str(part) for part in fault["loc"] if part != "Recipe"]


def fault_line(fault: Any) -> str:
    """One line for one of pydantic's errors."""
    path = path_of(fault)
    key = ".".join(path)
    met = fault["input"]
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden", "invalid_key"):
        return f"{key}: unknown setting{_nearest(key)}"
    if fault["type"] in ("dataclass_type", "dataclass_exact_type", "model_type", "dict_type"):
        return f"{key or 'recipe'}: must be a section with settings of its own, not {quoted(met)}"
    if fault["type"] == "literal_error":
        expected = fault["ctx"]["expected"].replace("'", "")
        return f"{key}: {quoted(met)} is not one of {expected}{_nearest_choice(met, expected)}"
    expected = _EXPECTED.get(fault["type"], fault["msg"].removeprefix("Input should be "))
    return f"{key}: must be {expected}, not {quoted(met)}"


def quoted(met: object) -> str:
    """A value as a person wrote it, on one line of bearable length."""
    text = str(met).lower() if met is None or isinstance(met, bool) else repr(met)
    return text if len(text) <= 80 else text[:77] + "..."


def missing_file(path: Path) -> str:
    found = [file for folder in (path.parent, Path("configs")) for file in sorted(folder.glob("*.yaml"))]
    by_name = {file.stem: str(file) for file in reversed(found)}
    close = difflib.get_close_matches(path.stem, by_name, n=1, cutoff=0.5)
    if close:
        return f"{path}: no such file, did you mean {by_name[close[0]]}?"
    there = f"; there is: {', '.join(dict.fromkeys(map(str, found)))}" if found else ""
    return f"{path}: no such file{there}"


def _nearest(key: str) -> str:
    """What was meant, most likely: `, did you mean ...?`, or what there is."""
    *above, leaf = key.split(".")
    if listed := _LISTED.get(".".join(above[:2])):
        return _choose(leaf, [field.name for field in fields(listed)])
    known = [key for key, *_ in describe()]
    if namesakes := [name for name in known if name.split(".")[-1] == leaf]:
        close = difflib.get_close_matches(key, namesakes, n=1, cutoff=0.75)
        return f", did you mean {' or '.join(close or namesakes)}?"
    if not above:
        return _choose(leaf, [section.name for section in fields(Recipe)])
    siblings = {name.split(".")[-1]: name for name in known if name.startswith(f"{above[0]}.")}
    everywhere = {name.split(".")[-1]: name for name in reversed(known)}
    for names, cutoff in ((siblings, 0.6), (everywhere, 0.75)):
        if close := difflib.get_close_matches(leaf, names, n=1, cutoff=cutoff):
            return f", did you mean {names[close[0]]}?"
    return _choose(leaf, list(siblings))


def _choose(met: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(met, names, n=1)
    return f", did you mean {close[0]}?" if close else f"; known here: {', '.join(names)}"


def _nearest_choice(met: object, expected: str) -> str:
    choices = expected.replace(" or ", ", ").split(", ")
    close = difflib.get_close_matches(str(met), choices, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""
