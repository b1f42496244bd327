"""The `lte` command.

pieces      options that several commands have, readers of numbers
start       train, server, worker, relay
runs        status, report, rollback
models      eval, generate, export, ranks
recipe      plan, simulate, convert
files       data, keys
command     all of them, and exit codes
"""

from lte.cli.command import main

__all__ = ["main"]
