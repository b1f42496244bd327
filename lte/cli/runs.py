"""Runs that are there: `lte status`, `report`, `rollback`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from lte import recipes, report, status
from lte.cli import pieces
from lte.server import rollback


def add(commands: pieces.Commands) -> None:
    """Add these commands."""
    _add_status(commands)
    _add_report(commands)
    _add_rollback(commands)


def _add_status(commands: pieces.Commands) -> None:
    command = pieces.command(
        commands,
        "status",
        "ask a server how its run is: version, workers, when they were seen, rates",
        "examples:\n"
        "  lte status --server tcp://127.0.0.1:5555\n"
        "  lte status --server tcp://10.0.0.1:5555 --key alice.secret --server-key server.public --json\n\n"
        "Exit code 0 if the server answers, 2 if none does: a health check. A server in the midst of a\n"
        "merge or of an evaluation answers after it: give it --wait.",
    )
    pieces.add_address(command)
    command.add_argument(
        "--wait",
        type=pieces.number,
        default=10.0,
        metavar="S",
        help="seconds to wait for an answer (default: 10)",
    )
    pieces.add_keys_of_worker(command, "a key that may join")
    command.add_argument("--json", action="store_true", help="print all of it as JSON")
    command.set_defaults(run=_status)


def _status(arguments: argparse.Namespace) -> int:
    found = status.inquire(
        arguments.server, wait_s=arguments.wait, key=arguments.key, server_key=arguments.server_key
    )
    if arguments.json:
        print(status.to_json(found))
    else:
        console = Console()
        console.print(status.to_text(found, console.width))
    return 0


def _add_report(commands: pieces.Commands) -> None:
    command = pieces.command(
        commands,
        "report",
        "tell what a run came to, or how far it is, and draw its losses",
        "examples:\n"
        "  lte report runs/quickstart                                  a summary, and loss.png in the run\n"
        "  lte report runs/quickstart --diagnostics heads.png\n"
        "  lte report runs/rank8 --overlap runs/rank64\n\n"
        "Diagnostics are recorded by runs with log.diagnostics_every: cosine and Grassmann distance between\n"
        "heads, ranks of the update, its amplification of W, quantization error, gradient noise.",
    )
    command.add_argument("folder", type=Path, metavar="RUN", help="run.dir of a run, also of one that goes")
    command.add_argument(
        "--diagnostics",
        type=pieces.figure,
        metavar="FILE",
        help="draw its diagnostics into a .png, .pdf or .svg",
    )
    command.add_argument(
        "--overlap",
        type=Path,
        metavar="RUN",
        help="another run, of another rank or seed, say: how far the subspaces of both updates\n"
        "hold each other (LoRA, section 7.2)",
    )
    command.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    folder = arguments.folder
    if arguments.diagnostics:
        report.plot_diagnostics(folder, arguments.diagnostics)
        print(arguments.diagnostics)
        return 0
    if arguments.overlap:
        found = recipes.compare_updates(folder, arguments.overlap)
        Console().print(report.overlap(folder, arguments.overlap, found))
        return 0
    if report.outcome(folder).rounds:
        report.plot(folder)
    Console().print(report.summary(folder))
    return 0


def _add_rollback(commands: pieces.Commands) -> None:
    command = pieces.command(
        commands,
        "rollback",
        "bring a stopped run back to an earlier version",
        "examples:\n"
        "  lte rollback runs/quickstart                  which versions there are\n"
        "  lte rollback runs/quickstart --version 60\n"
        "  lte train configs/quickstart.yaml optimizer.lr=5e-4     goes on from there\n\n"
        "What came after is kept in RUN/rolled-back-N. Workers start over from what is merged of them.",
    )
    command.add_argument("folder", type=Path, metavar="RUN", help="run.dir of a run that no server holds")
    command.add_argument(
        "--version", type=pieces.whole, metavar="V", help="to go back to (default: only tell what there is)"
    )
    command.set_defaults(run=_rollback)


def _rollback(arguments: argparse.Namespace) -> int:
    folder = arguments.folder
    if arguments.version is None:
        Console().print(report.versions(folder, rollback.versions(folder)))
        return 0
    done = recipes.roll_back(folder, arguments.version)
    print(
        f"{folder}: back at version {done.version}; what came after, up to version {done.last}, is in"
        f" {done.aside}. 'lte train' or 'lte server' goes on from here, also with another optimizer.lr."
    )
    return 0
