"""The coordinator's end of a group of shards (see `commit`): starts holders, orders, hears them."""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import sys
from collections import deque
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TypeVar

from safetensors.torch import load
from torch import Tensor, nn

from lte import wire
from lte.clock import Watch
from lte.config import Recipe
from lte.errors import RunError, ShardError, StoppedError
from lte.server import commit, holder
from lte.server.journal import GENERATION, check_generation

Kind = TypeVar("Kind", bound=commit.Word)
_GIVEN_UP = (commit.State, commit.Digested)
"""What a server that is told to stop waits for no more."""
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_LOOK_EVERY_S = 1.0
"""How often who waits for a holder looks whether it is to stop, and who does not whether it lives."""
_SILENT_S = 5.0
"""A holder that does not answer for so long is spoken of."""
_LEAVE_S = 10.0
"""How long holders have to end once nobody needs them."""
_PORT = re.compile(r"(?P<host>tcp://.*):(?P<port>\d+)")


class Links:
    """Connections to the holders of shards 1 and on; none where there is one shard, and then nothing here
    does anything.

    Attributes:
        num: how many holders there are. addresses: where workers reach them. heard: what they said
            unasked, of each its shard, until somebody takes it. full: shards that wait for room on their
            disks.
    """

    def __init__(
        self, model: nn.Module | Callable[[], nn.Module], recipe: Recipe, is_stopped: Callable[[], bool]
    ) -> None:
        """Fork the holders, before this process has threads and sockets of its own.

        Args:
            is_stopped: whether the server was told to stop, so that nothing is evaluated any more.
        """
        self.num = recipe.server.shards - 1
        self.addresses: tuple[str, ...] = ()
        self.heard: deque[tuple[int, commit.Durable | commit.Refused | commit.Happened]] = deque()
        self.full: set[int] = set()
        self._is_stopped, self._patience_s = is_stopped, recipe.worker.patience_s
        self._generation_file, self._generation = Path(recipe.run.dir) / GENERATION, 0
        # What passed while this process was stopped or busy is nobody's silence.
        self._watch = Watch(2 * _LOOK_EVERY_S)
        # When each shard was asked for a sign of life that has not come, and gave the last one.
        self._asked_s, self._answered_s = dict[int, float](), dict[int, float]()
        # Those that have done the merge that was ordered last.
        self._prepared: dict[int, commit.Prepared] = {}
        self._ends: list[Connection] = []
        self._pids: list[int] = []
        for shard in range(1, recipe.server.shards):
            self._fork(shard, model, recipe)

    def _fork(self, shard: int, model: nn.Module | Callable[[], nn.Module], recipe: Recipe) -> None:
        ours, theirs = Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid:
            theirs.close()
            self._ends.append(ours)
            self._pids.append(pid)
            return
        code = 1
        try:
            for end in (*self._ends, ours):
                end.close()
            _be_holder(shard, parent)
            code = holder.serve(theirs, shard, model, recipe)
        finally:
            os._exit(code)

    @property
    def descriptors(self) -> list[int]:
        """That are readable when a holder has said something."""
        return [end.fileno() for end in self._ends]

    # Starting

    def recover(self, generation: int, address: str) -> list[commit.Found]:
        """Have the holders bind beside the server's address and find their last versions."""
        self._generation = generation
        found = self._ask(
            commit.Found,
            *(
                commit.Recover(generation=generation, address=_beside(address, shard))
                for shard in range(1, self.num + 1)
            ),
        )
        self.addresses = tuple(report.address for report in found)
        return found

    def begin(self, version: int) -> list[str]:
        """Have them go on from this version. Returns the digests of their bases."""
        return [ready.base_digest for ready in self._ask_all(commit.Ready, commit.Begin(version=version))]

    def placement(self, generation: int, names: Sequence[Sequence[str]]) -> wire.Placement:
        """What a worker must know of the group."""
        return wire.Placement(generation=generation, addresses=self.addresses, names=tuple(map(tuple, names)))

    # Orders

    def tell(self, order: commit.Order) -> None:
        """Give all holders an order that nobody answers, or one whose answer is awaited later."""
        if isinstance(order, commit.Merge):
            self._prepared.clear()
        for shard in range(1, self.num + 1):
            self._send(shard, order)

    def admit(self, order: commit.Admit) -> list[str]:
        """Returns the digests of what they have merged of that worker."""
        return [remembered.merged_digest for remembered in self._ask_all(commit.Remembered, order)]

    @property
    def are_prepared(self) -> bool:
        """Whether the merge that was ordered last is durable everywhere."""
        return len(self._prepared) == self.num

    def prepared(self) -> list[commit.Prepared]:
        """What that came to, once it is."""
        return [self._prepared[shard] for shard in range(1, self.num + 1)]

    @property
    def unprepared(self) -> list[int]:
        """Shards that are still at it."""
        return [shard for shard in range(1, self.num + 1) if shard not in self._prepared]

    def published(self) -> list[commit.Published]:
        """Wait until the update that was told of has left everywhere."""
        return self._answers(commit.Published)

    def save(self, shards: Collection[int]) -> None:
        """Have these write a checkpoint each; `unsaved` waits for it."""
        for shard in shards:
            self._send(shard, commit.Save(is_awaited=True))

    def unsaved(self, shards: Collection[int]) -> set[int]:
        """Which of these have no room on their disks for the checkpoint that was ordered."""
        self.full = {shard for shard in shards if not self._answer(shard, commit.Saved).is_there}
        return set(self.full)

    def tensors(self, shard: int, which: str, names: Sequence[str]) -> dict[str, Tensor]:
        """The plain model's tensors of these names that a shard has, as `assembly.Ask` is.

        Raises:
            StoppedError: the server was told to stop; these may be given up, unlike what is to be on disk.
        """
        self._send(shard, commit.Tell(which=which, names=tuple(names)))
        return load(self._answer(shard, commit.State).tensors)

    def digests(self) -> dict[str, str]:
        """Digests of W of all their modules, by name.

        Raises:
            StoppedError: as above.
        """
        parts = self._ask_all(commit.Digested, commit.Digest())
        return {name: digest for part in parts for name, digest in part.of_modules.items()}

    def listen(self) -> None:
        """Add what they have said to `heard`, and have those who said nothing lately give a sign of life.

        Raises:
            ShardError: one has ended, or hangs. RunError: it has said why, and a person can mend it.
            FencedError: a newer server has taken the run over, and ended it.
        """
        now_s = self._watch.now_s()
        for shard, end in enumerate(self._ends, 1):
            while end.poll(0):
                self._hear(shard, self._receive(shard))
            asked_s = self._asked_s.get(shard)
            if asked_s is None and now_s - self._answered_s.get(shard, 0.0) >= _LOOK_EVERY_S:
                self._send(shard, commit.Ping())
                self._asked_s[shard] = now_s
            elif asked_s is not None and now_s - asked_s > self._patience_s:
                raise self._hangs(shard)

    @property
    def silent(self) -> list[int]:
        """Shards that have not answered for some time."""
        now_s = self._watch.now_s()
        return [shard for shard, asked_s in self._asked_s.items() if now_s - asked_s > _SILENT_S]

    def _ask_all(self, kind: type[Kind], order: commit.Order) -> list[Kind]:
        return self._ask(kind, *[order] * self.num)

    def _ask(self, kind: type[Kind], *orders: commit.Order) -> list[Kind]:
        for shard, order in enumerate(orders, 1):
            self._send(shard, order)
        return self._answers(kind)

    def _answers(self, kind: type[Kind]) -> list[Kind]:
        return [self._answer(shard, kind) for shard in range(1, self.num + 1)]

    def _answer(self, shard: int, kind: type[Kind]) -> Kind:
        end, gives_up_s = self._ends[shard - 1], self._watch.now_s() + self._patience_s
        while True:
            if issubclass(kind, _GIVEN_UP) and self._is_stopped():
                raise StoppedError("told to stop")
            if not end.poll(_LOOK_EVERY_S):
                if self._watch.now_s() > gives_up_s:
                    raise self._hangs(shard)
                continue
            report = self._receive(shard)
            if isinstance(report, kind):
                return report
            self._hear(shard, report)

    def _hear(self, shard: int, report: commit.Report) -> None:
        """Take what a holder says unasked, or so late that nobody waits for it any more."""
        match report:
            case commit.Pong(is_full=is_full):
                self._asked_s.pop(shard, None)
                self._answered_s[shard] = self._watch.now_s()
                (self.full.add if is_full else self.full.discard)(shard)
            case commit.Prepared():
                self._prepared[shard] = report
            case commit.State() | commit.Digested():
                pass
            case _:
                assert isinstance(report, commit.Durable | commit.Refused | commit.Happened)
                self.heard.append((shard, report))

    def _send(self, shard: int, order: commit.Order) -> None:
        try:
            self._ends[shard - 1].send_bytes(commit.encode(order))
        except OSError:
            while True:  # it may have said why it ends; `_receive` raises in the end
                self._receive(shard)

    def _receive(self, shard: int) -> commit.Report:
        try:
            report = commit.report_of(self._ends[shard - 1].recv_bytes())
        except (EOFError, OSError):
            raise self._lost(shard) from None
        if isinstance(report, commit.Failed):
            kind = RunError if report.is_users else ShardError
            raise kind(f"shard {shard}: {report.reason}")
        if shard in self._asked_s:  # whatever it says is a sign of life
            self._asked_s[shard] = self._watch.now_s()
        return report

    def _lost(self, shard: int) -> ShardError:
        check_generation(self._generation_file, self._generation)  # a newer group ends the older one's
        return ShardError(
            f"shard {shard} of the server has ended, and with it this server; the same command goes on"
        )

    def _hangs(self, shard: int) -> ShardError:
        os.kill(self._pids[shard - 1], signal.SIGKILL)  # it would not end by itself
        return ShardError(
            f"shard {shard} of the server has not answered for {self._patience_s:g} s (worker.patience_s):"
            " does its disk hang? With it this server ends; the same command goes on"
        )

    def close(self) -> None:
        """Have the holders end, and wait for it."""
        for end in self._ends:
            end.close()
        for pid in self._pids:
            descriptor = os.pidfd_open(pid)
            try:
                if not (has_ended := _is_readable(descriptor, _LEAVE_S)):
                    os.kill(pid, signal.SIGKILL)
                    has_ended = _is_readable(descriptor, _LEAVE_S)  # not while its disk hangs; fenced by then
            finally:
                os.close(descriptor)
            if has_ended:
                os.waitpid(pid, 0)
        self._ends, self._pids = [], []


def _is_readable(descriptor: int, timeout_s: float) -> bool:
    return bool(select.select([descriptor], [], [], timeout_s)[0])


def _be_holder(shard: int, parent: int) -> None:
    """Be named as such, end with the coordinator, and leave the signals that end commands to it."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NAME, f"lte shard {shard}".encode())
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _beside(address: str, shard: int) -> str:
    """Where a holder binds: at the ports after the server's, or any where that is; at paths beside its."""
    if (tcp := _PORT.fullmatch(address)) is not None:
        return f"{tcp['host']}:{int(tcp['port']) + shard}"
    return address if address.startswith("tcp://") else f"{address}.{shard}"
