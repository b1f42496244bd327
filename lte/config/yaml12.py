"""YAML as recipes are written in it: the numbers and truth values of its version 1.2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML with the numbers and truth values of its version 1.2, and every key once.

    PyYAML's 1.1 reads `off` as false, `1e-3` as text and `10:00` as 600.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for n, key in enumerate(keys):
            if key.value in (other.value for other in keys[:n]):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} occurs twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what readers of either version would take for something else than text."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Line breaks that are not ASCII must be escaped, or they are read as spaces."""
        style = '"' if set(text) & set("\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)
_Loader.yaml_implicit_resolvers = {}
_NUMBER = r"(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", rf"[-+]?(?:{_NUMBER})|\.(?:nan|NaN|NAN)", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def read(text: str) -> Any:
    """The value of a text.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, lists in lists in lists
        raise yaml.YAMLError(str(error)) from None


def fault_of(path: str | Path, error: yaml.YAMLError) -> str:
    """What is wrong with a file, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{path}, line {error.problem_mark.line + 1}: {error.problem}"
    return f"{path}: not YAML ({' '.join(str(error).split())})"


def dump(value: Any, *, on_one_line: bool = False) -> str:
    """YAML of plain values, which `read` reads back."""
    return yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=on_one_line,
    )
