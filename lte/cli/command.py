"""The `lte` command. Mistakes of the person at the keyboard get one line each and exit code 2."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import textwrap
from collections.abc import Sequence

from launch import children, local
from launch.arguments import Parser
from lte import __version__, signals
from lte.cli import files, models, recipe, runs, start
from lte.errors import ConfigError, LTEError, RunEnded, UserError

EXIT_USER_ERROR = 2
EXIT_PIPE = 128 + signal.SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 for a failure; 2 for a mistake of the user's; 3 for a worker whose run
        ended before its last round; 128 and the signal's number if that ended the command.
    """
    try:
        with signals.raised():
            try:
                children.end_with_parent()
                arguments = _parser().parse_args(argv)
                return int(arguments.run(arguments))
            finally:
                sys.stdout.flush()  # here: at the interpreter's end nobody could catch a broken pipe
    except ConfigError as error:
        for line in error.faults:
            print(f"lte: {line}", file=sys.stderr)
        return EXIT_USER_ERROR
    except UserError as error:
        print(f"lte: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except RunEnded as error:
        print(f"lte: the run ended: {error}", file=sys.stderr)
        return 0 if error.finished else local.EXIT_RUN_ENDED
    except signals.Ended as error:
        print("lte: interrupted", file=sys.stderr)
        return 128 + error.number
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except (LTEError, OSError) as error:
        print(f"lte: {error}", file=sys.stderr)
        return 1


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
