"""One machine: a server process and N worker processes, or threads for `inprocess://` addresses.

The server draws the progress display and writes the records; workers write to RUN/logs. Nothing
outlives this process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launch.children import Child, ended, last_words, log_of, report_failures, send, spawn
from launch.exits import EXIT_FAILURE, EXIT_RUN_ENDED, failure
from lte import cost, inventory, recipes, signals
from lte.config import Recipe
from lte.errors import RunEnded, RunError
from lte.track import METRICS, Records
from lte.worker import Worker

KEY_VARIABLE, SERVER_KEY_VARIABLE = "LTE_KEY", "LTE_SERVER_KEY"
"""Environment of batch jobs: what `lte worker` takes where --key and --server-key are not given."""
_LEAVE_S = 2.0
"""How long workers have to leave by themselves once the server is gone; then they get SIGTERM."""
_KILL_S = 30.0
"""How long a worker has to save and end after its signal; then it is killed, and the steps since its
last contribution are lost."""


def train_in_processes(recipe: Recipe, arguments: Sequence[str]) -> int:
    """Run a recipe with one server process and `train.workers` worker processes.

    A worker that fails once the first round is merged is missed by the others, who go on. One that
    fails before, or the last one, ends the run.

    Args:
        arguments: CONFIG and overrides, as the server process is to read them.

    Returns:
        The exit code of the run: 0 if it was finished.
    """
    return _Processes(recipe, arguments).run()


class _Processes:
    def __init__(self, recipe: Recipe, arguments: Sequence[str]) -> None:
        self.recipe, self.arguments = recipe, arguments
        self.folder = Path(recipe.run.dir)
        self.logs = self.folder / "logs"
        self.server: Child | None = None
        self.workers: dict[int, Child] = {}
        self.failures: dict[int, tuple[int, str]] = {}  # worker: its exit code, and why
        self.num_finished = 0
        self.signal = 0  # that this process got first

    def run(self) -> int:
        for number in signals.ENDINGS:
            signal.signal(number, self._on_signal)
        try:
            address = self._start_server()
            if address and not self.signal:
                self._start_workers(address)
            return self._supervise()
        finally:
            self._end_children()

    def _start_server(self) -> str:
        """Start the server; returns the address that it announces, or '' if it ended instead."""
        reading, writing = os.pipe()
        command = ["server", *self.arguments, "--announce", str(writing)]
        self.server = self._spawn(command, pass_fds=(writing,))
        if self.signal:  # it came before there was anyone to pass it on to
            send(self.server, self.signal)
        os.close(writing)
        with os.fdopen(reading) as announcements:
            return announcements.readline().strip()

    def _start_workers(self, address: str) -> None:
        # Not before the server has claimed the folder, and moved an older run's logs aside if asked to.
        try:
            self.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.logs}: cannot be made a folder ({error.strerror})") from None
        for k in range(self.recipe.train.workers):
            with log_of(self.logs, k).open("wb") as log:
                # By name, so that after a crash it takes the place of the one that it replaces.
                state = self.folder / "workers" / f"w{k}"
                command = ["worker", "--server", address, "--id", f"w{k}", "--state", str(state)]
                command += ["--local-number", str(k)]
                self.workers[k] = self._spawn(command, stdout=log, stderr=log)

    def _spawn(self, command: list[str], **options: object) -> Child:
        # The server has no keys here, so workers must not use any that lie about.
        return spawn(command, {KEY_VARIABLE: "", SERVER_KEY_VARIABLE: ""}, **options)

    def _supervise(self) -> int:
        """Wait for the server to end; end it when no worker is left, or the first round cannot come."""
        assert self.server is not None
        while self.server.poll() is None:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            self._reap_workers()
            if self._is_hopeless() and not self.signal:
                self.server.terminate()
                self.server.wait()
        code = self.server.returncode
        if self.signal:
            return 128 + self.signal if code else 0
        report_failures({k: words for k, (_, words) in self.failures.items()}, self.logs)
        if code < 0:
            name = signal.Signals(-code).name
            print(
                f"lte: the server was ended by {name}; the same command goes on where it was",
                file=sys.stderr,
            )
            return EXIT_FAILURE
        if code and self._is_hopeless():
            return failure(failed for failed, _ in self.failures.values())
        return code

    def _is_hopeless(self) -> bool:
        """Whether workers failed and nobody is left to go on, or too few for the first round."""
        return bool(self.failures) and not self.num_finished and not (self.workers and self._has_begun())

    def _reap_workers(self) -> None:
        for k, worker in list(self.workers.items()):
            if worker.poll() is not None:
                del self.workers[k]
                self.num_finished += worker.returncode == 0
                if worker.returncode not in (0, EXIT_RUN_ENDED):
                    self.failures[k] = worker.returncode, last_words(self.logs, k, worker.returncode)

    def _has_begun(self) -> bool:
        """Whether a round was merged since the server started."""
        for line in reversed(Records.read(self.folder / METRICS)):
            if line["kind"] == "round":
                return True
            if line["kind"] == "event" and line["what"] == "started":
                return False
        return False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass the first signal on to the server, and to the workers when it is gone: if they left
        before, it would merge rounds without them. A second Ctrl-C ends all at once."""
        if self.signal and number == signal.SIGINT:
            for child in self._children():
                send(child, signal.SIGKILL)
        elif not self.signal:
            self.signal = number
            if self.server is not None:
                send(self.server, number)

    def _children(self) -> list[Child]:
        return [*self.workers.values(), *([self.server] if self.server else [])]

    def _end_children(self) -> None:
        """Leave nobody behind: workers that were told leave by themselves, those who still look for
        the server do not."""
        if self.server is not None and self.server.poll() is None:  # this process failed
            self.server.terminate()
        left = ended(self._children(), 0.0 if self.signal else _LEAVE_S)
        for child in left:
            send(child, self.signal or signal.SIGTERM)
        for child in ended(left, _KILL_S):
            child.kill()
            child.wait()


def warn(recipe: Recipe) -> None:
    """Say on stderr what of a model is trained in full, where that is most of it."""
    first = recipe.in_round(0)
    if line := inventory.left_out(cost.plan_of(first), first):
        print(f"lte: {line}", file=sys.stderr)


def train_in_threads(recipe: Recipe) -> int:
    """Run a recipe with server and workers as threads of this process.

    Returns:
        The exit code of the run: 0 if it was finished, 128 and the number of the signal that stopped it.

    Raises:
        Exception: what ended a worker before its time.
    """
    failures: list[Exception] = []
    workers: list[Worker] = []

    def work(address: str, worker_id: str) -> None:
        try:
            folder = Path(recipe.run.dir) / "workers" / worker_id
            recipes.work(
                address, worker_id=worker_id, folder=folder, say=lambda line: None, began=workers.append
            )
        except RunEnded:
            pass  # the server was stopped, and says so itself
        except Exception as error:
            failures.append(error)
            server.stop(str(error))

    with recipes.make_server(recipe) as server:
        warn(recipe)
        if threading.current_thread() is threading.main_thread():
            server.stop_on_signals()
        threads = [
            threading.Thread(target=work, args=(server.address, f"w{k}"), name=f"worker-{k}")
            for k in range(0 if server.finished else recipe.train.workers)
        ]
        for thread in threads:
            thread.start()
        try:
            finished = server.serve()
        finally:
            for worker in workers:  # who is in the midst of a round hears of the end only after it
                worker.stop()
            for thread in threads:
                thread.join()
    if failures:
        raise failures[0]
    return 0 if finished else 128 + server.stopped_by
