"""The signals that end a command: the first in order, a Ctrl-C after it at once.

At once is the kernel's doing: no handler runs, so it holds in the midst of a long computation or of a
write to disk, too. Whatever a run writes survives that. Another SIGTERM or SIGUSR1 changes nothing:
batch systems send several.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is how batch systems warn of a preemption (SLURM: --signal=USR1@60)."""


_PR_SET_PDEATHSIG = 1


def at_parents_death(number: int) -> None:
    """Have the kernel send this process a signal when its parent dies (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


class Ended(KeyboardInterrupt):
    """One of `ENDINGS` came.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


@contextmanager
def raised() -> Iterator[None]:
    """Have the first of `ENDINGS` raise `Ended` where this process stands. A SIGINT that was ignored
    stays so: scripts start what goes on in the background like that."""

    def end(number: int) -> NoReturn:
        raise Ended(number)

    with _handled(end, [number for number in ENDINGS if signal.getsignal(number) != signal.SIG_IGN]):
        yield


@contextmanager
def told(stop: Callable[[int], None]) -> Iterator[None]:
    """Have the first of `ENDINGS` call `stop` with its number, wherever this process stands."""
    with _handled(stop, ENDINGS):
        yield


@contextmanager
def _handled(first: Callable[[int], None], numbers: Sequence[int]) -> Iterator[None]:
    """Only the main thread may handle signals; in others this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal came
        if signal.SIGINT in numbers:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not came:
            came = True
            first(number)

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
