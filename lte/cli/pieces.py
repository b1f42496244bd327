"""What commands have in common: options, readers of numbers."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

from launch import local
from launch.arguments import Parser
from lte import config, recipes, report
from lte.config import Recipe
from lte.errors import UserError

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""Where a parser's commands are added."""
Read = TypeVar("Read")


def command(commands: Commands, name: str, help: str, epilog: str) -> Parser:
    return commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=textwrap.dedent(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="YAML recipe, such as configs/quickstart.yaml")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's"
    )


def read_recipe(arguments: argparse.Namespace, *, quietly: bool = False) -> Recipe:
    """The recipe of `add_recipe`'s arguments. What it takes from a checkpoint is said, but where something
    reads what the command prints.

    Raises:
        UserError: see `recipes.load`.
    """
    quietly = quietly or getattr(arguments, "json", False)
    say = (lambda line: None) if quietly else partial(print, flush=True)
    return recipes.load(arguments.config, arguments.overrides, say=say)


def add_address(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--server",
        required=True,
        metavar="ADDRESS",
        help="as printed by 'lte server', or file://RUN/address where that folder is seen",
    )


def add_rank(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--rank",
        type=count,
        metavar="B",
        help="cut its heads to this lora_rank, in a run with lora.nested (default: whole)",
    )


def add_keys_of_worker(command: argparse.ArgumentParser, which: str) -> None:
    command.add_argument(
        "--key",
        metavar="FILE",
        default=os.environ.get(local.KEY_VARIABLE) or None,
        help=f"{which}, from 'lte keys new' (default: ${local.KEY_VARIABLE})",
    )
    command.add_argument(
        "--server-key",
        metavar="FILE",
        default=os.environ.get(local.SERVER_KEY_VARIABLE) or None,
        help=f"the server's public key (default: ${local.SERVER_KEY_VARIABLE})",
    )


def settings_help() -> str:
    lines, section = [], ""
    for key, kind, default, text in config.describe():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines.append("")
        lines.append(f"  {key} ({kind}, {default})")
        lines += textwrap.wrap(text, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def counts(text: str) -> list[int]:
    return [count(word) for word in text.split(",")]


def figure(text: str) -> Path:
    path = Path(text)
    if path.suffix not in report.FORMATS or not path.parent.is_dir():
        kinds = ", ".join(report.FORMATS)
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in a folder that exists, ending in {kinds}")
    return path


def unit(read: Callable[[str], Read]) -> Callable[[str], Read]:
    """A reader of numbers with units, for argparse."""

    def read_or_complain(text: str) -> Read:
        try:
            return read(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read_or_complain


def positive(text: str) -> float:
    if not (value := number(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value
