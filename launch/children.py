"""`lte` commands as processes of this one, none of which outlives it (Linux: also when it is killed)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lte import signals

PARENT_VARIABLE = "LTE_PARENT_PID"
DEATH_VARIABLE = "LTE_PARENT_DEATH"
"""Environment of a child: number of the signal that it gets when its parent dies; else SIGTERM."""

Child = subprocess.Popen[bytes]


def end_with_parent() -> None:
    """Called first in a child, once its signals are handled: have the kernel send SIGTERM, or what
    `DEATH_VARIABLE` says, when the launcher dies, and let in the signals that it held back meanwhile."""
    parent = os.environ.pop(PARENT_VARIABLE, None)
    number = int(os.environ.pop(DEATH_VARIABLE, signal.SIGTERM))
    if parent is None:
        return
    signals.at_parents_death(number)
    if os.getppid() != int(parent):  # it died before the line above
        raise SystemExit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.ENDINGS)


def spawn(command: Sequence[str], environment: Mapping[str, str], **options: object) -> Child:
    """Start `lte COMMAND` with these variables beside this process's, `DEATH_VARIABLE` among them, say;
    options are Popen's."""
    # A session of its own: Ctrl-C reaches only this process, which then ends the run in order.
    # The child inherits that signals are held back, until it can handle them (`end_with_parent`).
    held = signal.pthread_sigmask(signal.SIG_BLOCK, signals.ENDINGS)
    try:
        process: Child = subprocess.Popen(
            [sys.executable, "-m", "lte", *command],
            stdin=subprocess.DEVNULL,
            env={**os.environ, PARENT_VARIABLE: str(os.getpid()), **environment},
            start_new_session=True,
            **options,  # type: ignore[call-overload]
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    return process


def ended(children: Sequence[Child], within_s: float) -> list[Child]:
    """Wait for children to end; returns those who did not."""
    left, deadline = [], time.monotonic() + within_s
    for child in children:
        try:
            child.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            left.append(child)
    return left


def send(child: Child, number: int) -> None:
    """Popen.send_signal would reap a process that has ended, and whoever waits for any would wait for
    another."""
    if child.returncode is None:
        os.kill(child.pid, number)


def log_of(logs: Path, k: int) -> Path:
    """Where worker k writes what it says."""
    return logs / f"worker-{k}.log"


def last_words(logs: Path, k: int, code: int) -> str:
    """Why worker k ended, in words: the last line that it wrote, or the signal that killed it."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = log_of(logs, k).read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("lte: ") if lines else f"exit code {code}"


def report_failures(reasons: Mapping[int, str], logs: Path) -> None:
    """Print one line for each reason that workers had to fail.

    Args:
        reasons: of each, by its number.
    """
    for reason in dict.fromkeys(reasons.values()):
        failed = sorted(k for k, words in reasons.items() if words == reason)
        names = f"worker{'s' if len(failed) > 1 else ''} {', '.join(map(str, failed))}"
        where = log_of(logs, failed[0]) if len(failed) == 1 else logs
        print(f"lte: {names} ended: {reason}; see {where}", file=sys.stderr)
