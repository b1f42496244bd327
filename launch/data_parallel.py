"""One machine: the workers of a data-parallel run, a process each.

The first draws the progress display and writes the records; what else they say goes to RUN/logs. They
cannot go on without each other: one that fails ends all. Nothing outlives this process.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launch.children import Child, ended, last_words, log_of, report_failures, send, spawn
from launch.exits import EXIT_RUN_ENDED, failure
from lte import signals
from lte.config import Recipe
from lte.ddp import Place
from lte.server.folder import Claim, claim

_LOOPBACK = {"linux": "lo", "darwin": "lo0"}
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_LEAVE_S = 2.0
"""How long workers have to end by themselves once another failed; then they get SIGTERM."""
_KILL_S = 5.0
"""How long they have after it. Nothing is lost: what they write is whole or not there."""


def train_in_processes(recipe: Recipe, arguments: Sequence[str]) -> int:
    """Run a recipe with `train.workers` processes, which find each other by a file and talk over loopback.

    Args:
        arguments: CONFIG and overrides, as the workers are to read them.

    Returns:
        The exit code of the run: 0 if it was finished.

    Raises:
        RunError: the run folder is in use, or holds another run.
    """
    return _Processes(recipe, arguments).run()


class _Processes:
    def __init__(self, recipe: Recipe, arguments: Sequence[str]) -> None:
        self.recipe, self.arguments = recipe, arguments
        self.folder = Path(recipe.run.dir)
        self.logs = self.folder / "logs"
        self.workers: list[Child] = []
        self.signal = 0  # that this process got first

    def run(self) -> int:
        for number in signals.ENDINGS:
            signal.signal(number, self._on_signal)
        with (
            claim(self.folder, self.recipe, take_over=False) as held,
            tempfile.TemporaryDirectory(prefix="lte-") as meeting,
        ):
            held.started()
            try:
                self._start(held, Path(meeting) / "workers")
                return self._supervise()
            finally:
                self._end()

    def _start(self, held: Claim, meeting: Path) -> None:
        self.logs.mkdir(exist_ok=True)
        size, interface = self.recipe.train.workers, _LOOPBACK.get(sys.platform, "")
        bound = {} if _GLOO_INTERFACE in os.environ or not interface else {_GLOO_INTERFACE: interface}
        for k in range(size):
            place = Place(number=k, size=size, local_number=k, local_size=size, meeting=str(meeting))
            with log_of(self.logs, k).open("wb") as log:
                # The folder stays claimed until the first worker is gone, whatever becomes of this process.
                streams = {"stderr": log, "pass_fds": held.descriptors} if k == 0 else {"stdout": log}
                command = ["train", *self.arguments]
                self.workers.append(spawn(command, bound | place.environment(), **{"stderr": log, **streams}))
            if self.signal:  # it came before there was anyone to pass it on to
                send(self.workers[-1], self.signal)

    def _supervise(self) -> int:
        """Wait for all to end, or for one to fail; and say why."""
        while any(worker.poll() is None for worker in self.workers):
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            if not self.signal and any(worker.poll() for worker in self.workers):
                ended(self.workers, _LEAVE_S)
                break
        codes = {k: worker.returncode for k, worker in enumerate(self.workers) if worker.returncode}
        if self.signal:
            return 128 + self.signal if codes else 0
        # Of those who only missed another, one is told of where nobody has a reason of its own.
        failed = {k: code for k, code in codes.items() if code != EXIT_RUN_ENDED} or dict(
            [*codes.items()][:1]
        )
        report_failures({k: last_words(self.logs, k, code) for k, code in failed.items()}, self.logs)
        return failure(failed.values()) if failed else 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass the first signal on to all workers; a second Ctrl-C ends all at once."""
        if self.signal and number == signal.SIGINT:
            for worker in self.workers:
                send(worker, signal.SIGKILL)
        elif not self.signal:
            self.signal = number
            for worker in self.workers:
                send(worker, number)

    def _end(self) -> None:
        """Leave nobody behind."""
        left = ended(self.workers, 0.0)
        for worker in left:
            send(worker, signal.SIGTERM)
        for worker in ended(left, _KILL_S):
            worker.kill()
            worker.wait()
