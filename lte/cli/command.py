"""The `lte` command. Mistakes of the person at the keyboard get one line each and exit code 2."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence

from launch import children
from launch.arguments import Parser
from launch.exits import code_of
from lte import __version__
from lte.cli import files, models, recipe, runs, start


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code (launch/exits.py).
    """

    def act() -> int:
        children.end_with_parent()
        arguments = _parser().parse_args(argv)
        return int(arguments.run(arguments))

    return code_of(act)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lte",
        description="Pretrain neural networks from scratch with LoRA workers and a parameter server.",
        epilog=textwrap.dedent("""\
            examples:
              lte data pack book.txt --out data/book       text -> WebDataset shards
              lte train configs/quickstart.yaml            server and workers on this machine
              lte generate runs/quickstart --prompt "O "   let the result write
            'lte COMMAND --help' tells more of each."""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lte {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for part in (start, runs, models, recipe, files):
        part.add(commands)
    return parser
