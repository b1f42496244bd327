"""One run's server and workers as real processes on this machine, to be disturbed and watched.

They are started as the fault suite starts its own, forked from one that has torch loaded, and run the
very `lte` commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

from cluster import audit, replayed  # noqa: E402  (these three are the fault suite's)
from forks import fork  # noqa: E402

from lte import cli, config  # noqa: E402
from lte.config import Recipe  # noqa: E402
from lte.track import METRICS  # noqa: E402

__all__ = ["ROOT", "Fleet", "audit", "replayed", "send"]

_LOOK_S = 0.02
_END_S = 120.0
"""How long the processes of a run that ends in order may take."""

TINY: dict[str, Any] = {
    "model.num_layers": 1,
    "model.width": 32,
    "model.num_attention_heads": 2,
    "model.mlp_width": 128,
    "model.context_tokens": 32,
    "lora.rank": 8,
    "train.local_steps": 2,
    "train.batch_size": 8,
    "base.quant": "nf4",
    "optimizer.name": "adamw",
    "optimizer.lr": 2e-3,
    "schedule.name": "constant",
    "eval.tokens": 8192,
    "eval.sample_tokens": 0,
}
"""So small that several workers a core do several rounds a second."""


def _command(arguments: list[str], log: Path) -> None:
    """Be an `lte` command whose words go to a log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    raise SystemExit(cli.main(arguments))


class Fleet:
    """One run in a folder.

    Attributes:
        run: its run.dir. server: its newest server. workers: by name. seen_s: version -> when its round
            line was seen first, of time.monotonic.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.run = folder, folder / "run"
        self.settings = {
            **TINY,
            "run.dir": str(self.run),
            "server.address": f"ipc://{folder}/socket",
            **settings,
        }
        if folder.exists():
            raise SystemExit(f"{folder}: is there already; choose another folder, or delete it")
        folder.mkdir(parents=True)
        self.server: BaseProcess
        self.workers: dict[str, BaseProcess] = {}
        self.seen_s: dict[int, float] = {}
        self._started: list[BaseProcess] = []
        self._records, self._rest = None, b""

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.kill()
            process.join()

    def serve(self, **changes: Any) -> None:
        """Start the server, with other settings from here on if any are given."""
        self.settings |= {key.replace("__", "."): value for key, value in changes.items()}
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(config.to_yaml(config.replace(Recipe(), **self.settings)))
        self.server = self._start(["server", str(recipe)], "server")

    def work(self, name: str) -> BaseProcess:
        """Start a worker, which goes on from its state if it has some."""
        arguments = ["worker", "--server", str(self.settings["server.address"]), "--id", name]
        arguments += ["--state", str(self.state_of(name)), "--wait", f"{_END_S:g}"]
        self.workers[name] = self._start(arguments, name)
        return self.workers[name]

    def state_of(self, name: str) -> Path:
        return self.folder / "workers" / name

    def _start(self, arguments: list[str], log: str) -> BaseProcess:
        process = fork(_command, arguments, self.folder / f"{log}.log")
        self._started.append(process)
        return process

    def look(self, timeout_s: float = _LOOK_S) -> None:
        """Wait a little, or until a process ends; then see which versions there are."""
        alive = [process for process in [self.server, *self.workers.values()] if process.exitcode is None]
        wait([process.sentinel for process in alive], timeout_s)
        path = self.run / METRICS
        if not path.exists():
            return
        # A server that is started anew writes the file anew.
        if self._records is None or os.fstat(self._records.fileno()).st_ino != path.stat().st_ino:
            self._records, self._rest = path.open("rb"), b""
        *lines, self._rest = (self._rest + self._records.read()).split(b"\n")
        for line in map(json.loads, lines):
            if line["kind"] == "round":
                self.seen_s.setdefault(line["version"], time.monotonic())

    @property
    def version(self) -> int:
        """The newest version that was seen."""
        return max(self.seen_s, default=0)

    def until_version(self, version: int, patience_s: float = _END_S) -> None:
        deadline_s = time.monotonic() + patience_s
        while self.version < version:
            assert time.monotonic() < deadline_s, f"{self.folder}: stuck at version {self.version}"
            self.look()

    def until_ended(self) -> list[int | None]:
        """Wait for the end of all; returns their exit codes, the server's first."""
        processes = [self.server, *self.workers.values()]
        deadline_s = time.monotonic() + _END_S
        while any(process.exitcode is None for process in processes) and time.monotonic() < deadline_s:
            self.look()
        return [process.exitcode for process in processes]

    def memory_mb(self) -> float:
        """What the server holds in memory now, or 0."""
        try:
            lines = Path(f"/proc/{self.server.pid}/status").read_text().splitlines()
        except OSError:  # it has ended
            return 0.0
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def send(process: BaseProcess, number: signal.Signals) -> None:
    """A signal to a process, unless it has ended."""
    assert process.pid is not None
    if process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):  # it has ended this very moment
            os.kill(process.pid, number)
