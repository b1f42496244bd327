"""The `lte` command as a process; `python -m lte` is the same."""

import os
import sys
from typing import NoReturn

from lte import ddp
from lte.cli import main


def run() -> NoReturn:
    """Runs the command, and ends the process with its exit code."""
    code = main()
    if ddp.has_left():
        # At the interpreter's end Gloo's threads may still be waiting for Python's lock, to free a tensor;
        # that would end the process by std::terminate, after all was done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    run()
