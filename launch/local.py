"""One machine: a server process and N worker processes, or threads for `inprocess://` addresses.

The server draws the progress display and writes the records; workers write to RUN/logs. Nothing
outlives this process: children are told to end when it is, also when it is killed (Linux).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from lte import language
from lte.config import Recipe
from lte.errors import LTEError, RunEnded

PARENT_VARIABLE = "LTE_PARENT_PID"
_LEAVE_S = 15.0
"""How long children have to leave by themselves once the server is gone."""
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Called first in a child: have the kernel send SIGTERM when the launcher dies."""
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before the line above
        raise SystemExit(1)


def train_in_processes(recipe: Recipe, arguments: Sequence[str]) -> int:
    """Run a recipe with one server process and `train.workers` worker processes.

    Args:
        arguments: CONFIG and overrides, as the server process is to read them.

    Returns:
        The exit code of the run: the server's.
    """
    return _Processes(recipe, arguments).run()


class _Processes:
    def __init__(self, recipe: Recipe, arguments: Sequence[str]) -> None:
        self.recipe, self.arguments = recipe, arguments
        self.logs = Path(recipe.run.dir) / "logs"
        self.server: subprocess.Popen[bytes] | None = None
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self.failures: list[str] = []
        self.num_signals = 0

    def run(self) -> int:
        self.logs.mkdir(parents=True, exist_ok=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            address = self._start_server()
            if address:
                for k in range(self.recipe.train.workers):
                    self._start_worker(k, address)
            return self._supervise()
        finally:
            self._end_children()

    def _start_server(self) -> str:
        """Start the server; returns the address that it announces, or '' if it ended instead."""
        reading, writing = os.pipe()
        command = ["server", *self.arguments, "--announce", str(writing)]
        self.server = self._spawn(command, pass_fds=(writing,))
        os.close(writing)
        with os.fdopen(reading) as announcements:
            return announcements.readline().strip()

    def _start_worker(self, k: int, address: str) -> None:
        with (self.logs / f"worker-{k}.log").open("wb") as log:
            self.workers[k] = self._spawn(["worker", "--server", address], stdout=log, stderr=log)

    def _spawn(self, command: list[str], **options: object) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C reaches only this process, which then ends the run in order.
        process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-m", "lte", *command],
            stdin=subprocess.DEVNULL,
            env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
            start_new_session=True,
            **options,  # type: ignore[call-overload]
        )
        return process

    def _supervise(self) -> int:
        """Wait for the server to end, or for the last worker to fail."""
        assert self.server is not None
        while self.server.poll() is None:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            for k, worker in list(self.workers.items()):
                if worker.poll() is not None:
                    del self.workers[k]
                    if worker.returncode != 0:
                        self.failures.append(f"worker {k} ended ({self._last_words(k, worker.returncode)})")
            if not self.workers and self.server.poll() is None:
                if not self.failures:
                    self.server.wait()  # all workers left in order: the server is about to end
                else:
                    self.server.terminate()
                    self.server.wait()
        code = self.server.returncode
        for failure in self.failures:
            print(f"lte: {failure}", file=sys.stderr)
        if code < 0:
            print(f"lte: the server was ended by {signal.Signals(-code).name}", file=sys.stderr)
            return 1
        if self.failures and not self.workers and not self.num_signals:
            return 1
        return code

    def _last_words(self, k: int, code: int) -> str:
        path = self.logs / f"worker-{k}.log"
        if code < 0:
            return f"by {signal.Signals(-code).name}; see {path}"
        lines = path.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else f'exit code {code}'}; see {path}"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.num_signals += 1
        if self.num_signals == 1:
            if self.server is not None and self.server.poll() is None:
                self.server.send_signal(number)
        else:
            for child in self._children():
                child.kill()

    def _children(self) -> list[subprocess.Popen[bytes]]:
        return [*self.workers.values(), *([self.server] if self.server else [])]

    def _end_children(self) -> None:
        for child in self._children():
            try:
                child.wait(timeout=_LEAVE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def train_in_threads(recipe: Recipe) -> bool:
    """Run a recipe with server and workers as threads of this process.

    Returns:
        Whether the run was finished.

    Raises:
        LTEError: what ended a worker before its time.
    """
    failures: list[LTEError] = []

    def work(address: str) -> None:
        try:
            language.work(address, say=lambda line: None)
        except RunEnded:
            pass  # the server was stopped, and says so itself
        except LTEError as error:
            failures.append(error)
            server.stop(str(error))

    with language.make_server(recipe) as server:
        if threading.current_thread() is threading.main_thread():
            server.stop_on_signals()
        threads = [
            threading.Thread(target=work, args=(server.address,), name=f"worker-{k}")
            for k in range(recipe.train.workers)
        ]
        for thread in threads:
            thread.start()
        try:
            finished = server.serve()
        finally:
            for thread in threads:
                thread.join()
    if failures:
        raise failures[0]
    return finished
