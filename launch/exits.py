"""What a command says when it fails, and the exit code it ends with."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable

from lte import signals
from lte.errors import LTEError, RunEnded, UserError

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_RUN_ENDED = 3
"""Exit code of a worker whose run ended before its last round, as the server told it."""
EXIT_PIPE = 128 + signal.SIGPIPE


def code_of(act: Callable[[], int]) -> int:
    """Do it; the first of the signals that end a command ends it in order.

    What is raised on purpose becomes lines on stderr, one for each mistake.

    Returns:
        The exit code: its own; 1 for a failure; 2 for a mistake of the user's; 3 for a worker whose run
        ended before its last round; 128 and the signal's number if that ended it.
    """
    try:
        with signals.raised():
            try:
                return act()
            finally:
                sys.stdout.flush()  # here: at the interpreter's end nobody could catch a broken pipe
    except UserError as error:
        for line in str(error).splitlines():
            print(f"lte: {line}", file=sys.stderr)
        return EXIT_USER_ERROR
    except RunEnded as error:
        print(f"lte: the run ended: {error}", file=sys.stderr)
        return 0 if error.finished else EXIT_RUN_ENDED
    except signals.Ended as error:
        print("lte: interrupted", file=sys.stderr)
        return 128 + error.number
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except (LTEError, OSError) as error:
        print(f"lte: {error}", file=sys.stderr)
        return EXIT_FAILURE


def failure(codes: Iterable[int]) -> int:
    """The exit code of a command whose processes failed with these: a user's mistake if all met one."""
    return EXIT_USER_ERROR if set(codes) == {EXIT_USER_ERROR} else EXIT_FAILURE
