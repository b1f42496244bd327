"""The first process of a worker: starts the others, leads them, ends them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import torch
from torch import Tensor
from torch.distributed import is_nccl_available

from lte import config, signals
from lte.config import Recipe
from lte.errors import ProcessError, RunError
from lte.team import mirror, orders
from lte.team.group import Backend, Group
from lte.team.share import Own
from lte.worker.trainer import Trainer

_REASON_S = 10.0
"""How long after a broken connection to wait for the news of whose it was."""


@dataclass(frozen=True)
class _Lost:
    """A process that has ended: in words, and whether a person can mend it."""

    words: str
    is_users: bool


class Team:
    """The processes of a worker, led by this one; a context manager. Of one process it is empty, and does
    nothing.

    None of them outlives this one (Linux: also when it is killed), and none is missed: the first that ends
    ends the worker. `ProcessError` is raised then, or RunError where a person can mend it.

    Attributes:
        processes: how many, with this one.
    """

    def __init__(
        self,
        recipe: Recipe,
        processes: int,
        own: Own,
        *,
        number: int = 0,
        stop: Callable[[], None],
    ) -> None:
        """Start the others, who build their models.

        Args:
            recipe: the server's. own: the worker's.
            number: of this worker among those on this machine, which GPUs are shared out among.
            stop: called, by a thread, when one of the others has ended: whatever this process waits for
                is to be given up.
        """
        self.processes, self._patience_s = processes, recipe.worker.patience_s
        self._backend = _backend(recipe, processes)
        # What the others hold of the trainer's model.
        self._revision, self._constants = -1, tuple[str, ...]()
        self._group: Group | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._folder: Path | None = None
        self._news = threading.Condition()
        self._num_ready, self._stop, self._is_closing = 0, stop, False
        self._lost: _Lost | None = None
        self._watching: list[threading.Thread] = []
        if processes == 1:
            return
        self._folder = Path(tempfile.mkdtemp(prefix="lte-worker-"))
        try:
            for process in range(1, processes):
                self._start(
                    orders.Begin(
                        settings=config.to_dict(recipe),
                        **own._asdict(),
                        process=process,
                        processes=processes,
                        number=number * processes + process,
                        backend=self._backend,
                        meeting=str(self._folder / "meeting"),
                    )
                )
        except BaseException:
            self.close()
            raise

    def _start(self, begin: orders.Begin) -> None:
        ours, theirs = Pipe()
        # Signals that end commands are held back in it, for good: they are this process's affair.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, signals.ENDINGS)
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "lte.team", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env=dict(os.environ),
                pass_fds=(theirs.fileno(),),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            theirs.close()
        self._children.append(child)
        self._pipes.append(ours)
        watching = threading.Thread(
            target=self._watch, args=(begin.process, child, ours), name="lte-process", daemon=True
        )
        watching.start()
        self._watching.append(watching)
        with self._missed():
            ours.send_bytes(orders.encode(begin))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def meet(self) -> None:
        """Wait until all are there, and form their group."""
        if self.processes == 1:
            return
        with self._news:
            enough = self.processes - 1
            self._news.wait_for(lambda: self._lost or self._num_ready == enough, self._patience_s)
            is_there = self._num_ready == enough
        self.check()
        if not is_there:
            raise ProcessError(f"the processes of this worker were not there within {self._patience_s:g} s")
        assert self._folder is not None
        with self._missed():
            meeting = str(self._folder / "meeting")
            self._group = Group(self._backend, meeting, 0, self.processes, self._patience_s)

    def call_when_lost(self, stop: Callable[[], None]) -> None:
        """Call this, in place of the `stop` of before, when one of the others has ended."""
        with self._news:
            self._stop, is_late = stop, self._lost is not None
        if is_late:
            stop()

    def lead(self, trainer: Trainer) -> None:
        """Have the others take the trainer's next local step with this process, which now computes the
        gradients of its own share."""
        if self._group is None:
            return
        model, constants = trainer.model, trainer.constants_digests
        order = orders.Step(
            step=trainer.step_of_run,
            version=trainer.version,
            whole=trainer.revision != self._revision,
            constants=constants != self._constants or self._revision < 0,
            num_bytes=0,
        )
        coming = mirror.tensors(model, order)
        order = msgspec.structs.replace(order, num_bytes=mirror.num_bytes(coming))
        with self._missed():
            for pipe in self._pipes:
                pipe.send_bytes(orders.encode(order))
            self._group.broadcast(coming)
        if self._revision < 0 and self._backend == "gloo":  # NCCL goes on using it
            self._forget_meeting()
        self._revision, self._constants = trainer.revision, constants

    def mean(self, trainer: Trainer, loss: Tensor) -> Tensor:
        """Have the trainer's model hold the mean gradients of all processes.

        Args:
            loss: the mean over this process's share.

        Returns:
            The mean over the batch.
        """
        if self._group is None:
            return loss
        sums = mirror.summands(trainer.model, loss)
        with self._missed():
            self._group.sum(sums)
        return mirror.take_means(trainer.model, sums, self.processes)

    def check(self) -> None:
        """Raise what the first process that has ended means, if one has."""
        with self._news:
            lost = self._lost
        if lost is not None:
            raise (RunError if lost.is_users else ProcessError)(lost.words)

    def close(self) -> None:
        """End the others, who have nothing to lose, and wait for it."""
        with self._news:
            self._is_closing = True
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()
        for watching, pipe in zip(self._watching, self._pipes, strict=True):
            watching.join()
            pipe.close()
        self._forget_meeting()

    def _forget_meeting(self) -> None:
        """Remove the file by which the processes met: all have."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def _missed(self) -> Iterator[None]:
        """Say whose end broke the connections that are used within this."""
        try:
            yield
        except (RuntimeError, OSError) as error:  # torch.distributed's, and a pipe's
            with self._news:
                self._news.wait_for(lambda: self._lost, _REASON_S)
            self.check()
            words = str(error).strip().splitlines()[-1]
            raise ProcessError(f"the processes of this worker have lost each other ({words})") from error

    def _watch(self, process: int, child: subprocess.Popen[bytes], pipe: Connection) -> None:
        """Hear what a process says until it ends."""
        failed: orders.Failed | None = None
        try:
            while True:
                report = orders.report_of(pipe.recv_bytes())
                if isinstance(report, orders.Failed):
                    failed = report
                    continue
                with self._news:
                    self._num_ready += 1
                    self._news.notify_all()
        except (EOFError, OSError):
            code = child.wait()
        with self._news:
            if self._is_closing or self._lost is not None:
                return
            self._lost = _Lost(
                _ended(process, self.processes, code, failed), bool(failed and failed.is_users)
            )
            self._news.notify_all()
            stop = self._stop
        if self._group is not None:
            self._group.abort()
        stop()


def _ended(process: int, processes: int, code: int, failed: orders.Failed | None) -> str:
    """In words: which process of a worker ended, and why."""
    if failed is not None:
        why = f"ended: {failed.reason}"
    elif code < 0:
        why = f"was killed by {signal.Signals(-code).name}"
    else:
        why = f"ended with exit code {code}"
    return f"process {process} of this worker's 0 to {processes - 1} {why}"


def _backend(recipe: Recipe, processes: int) -> Backend:
    """NCCL where every process has a GPU of its own, which it cannot do without."""
    is_shared_out = recipe.worker.device in ("auto", "cuda")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return "nccl" if is_shared_out and processes <= num_gpus and is_nccl_available() else "gloo"
