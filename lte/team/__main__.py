"""What a leader starts: python -m lte.team DESCRIPTOR, of its end of a pipe."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

from lte import signals
from lte.errors import UserError
from lte.team import orders
from lte.team.follower import Follower
from lte.team.group import Group


def main(words: Sequence[str]) -> int:
    """Be a follower until the leader is gone. Signals that end commands were held back when this process was
    started, and stay so: they are for the leader.

    Returns:
        The exit code: 0; 1 for a failure, of which the leader is told.
    """
    signals.at_parents_death(signal.SIGKILL)
    connection = Connection(int(words[0]))
    try:
        begin = orders.order_of(connection.recv_bytes())
        assert isinstance(begin, orders.Begin)
        follower = Follower(begin)
        connection.send_bytes(orders.encode(orders.Ready()))
        group = Group(
            begin.backend, begin.meeting, begin.process, begin.processes, follower.recipe.worker.patience_s
        )
        follower.serve(connection, group)
    except EOFError:  # the leader went before it had said anything
        return 0
    except Exception as error:
        report = orders.Failed(reason=_words(error), is_users=isinstance(error, UserError))
        try:
            connection.send_bytes(orders.encode(report))
        except OSError:  # the leader is gone, and this failed because of that
            return 0
        return 1
    return 0


def _words(error: Exception) -> str:
    """What a person is told of an error: one line."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}"


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # at the interpreter's end Gloo's threads may still be waiting
