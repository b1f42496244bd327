"""A server and workers in processes of their own, with faults at scripted points.

Processes are forked from one that has torch loaded, which saves seconds each. A fault is told to the
process that meets it: at the n-th call of a function, before or after it, the process sends itself a
signal, say. So nothing is timed and nothing is awaited but facts.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from forks import fork

from lte import config, recipes, signals
from lte.config import Recipe
from lte.data import pack
from lte.relay import Relay
from lte.server import journal, recovery
from lte.server.checkpoint import Progress
from lte.server.master import Master
from lte.server.store import State, Store
from lte.track import METRICS, Records

ROUNDS = 6
TINY: dict[str, Any] = {
    "model.num_layers": 1,
    "model.width": 32,
    "model.num_attention_heads": 2,
    "model.mlp_width": 64,
    "model.context_tokens": 16,
    "base.quant": "int8",
    "lora.rank": 4,
    "lora.merge": "reset-less",
    "train.local_steps": 2,
    "train.workers": 2,
    "train.batch_size": 4,
    "optimizer.name": "adamw",
    "schedule.warmup_steps": 2,
    "server.keep_checkpoints": 1000,  # and with them the whole journal, for the audit
    "eval.every": 0,
    "eval.final_tokens": 64,
}
"""Settings of a run to disturb, whose folder, data and length are the test's."""
"""Of the run that is disturbed."""
ENDS_WITHIN_S = 100.0
"""Whatever must happen does; generous, as other jobs may share the machine."""


class Script(Protocol):
    """What happens to a process."""

    def install(self) -> None: ...


def _place_of(function: str) -> tuple[Any, str]:
    """Where "module:Class.name" is, and by which name."""
    module, _, path = function.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


@dataclass(frozen=True)
class Scripted:
    """Something that happens at the n-th call of `function` ("module:Class.name") whose arguments hold a
    value of the type named `given`, if any, before or after the call."""

    function: str
    call: int = 1
    given: str = ""
    after: bool = False

    def happen(self) -> None:
        raise NotImplementedError

    def install(self) -> None:
        owner, name = _place_of(self.function)
        original, calls = getattr(owner, name), 0

        def faulty(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            given = (*arguments, *named.values())
            calls += not self.given or any(type(value).__name__ == self.given for value in given)
            due = calls == self.call and (not self.given or self.given in {type(v).__name__ for v in given})
            if due and not self.after:
                self.happen()
            result = original(*arguments, **named)
            if due and self.after:
                self.happen()
            return result

        setattr(owner, name, faulty)


@dataclass(frozen=True)
class Counted:
    """Every call of `function` adds a byte to a file."""

    function: str
    path: Path

    def install(self) -> None:
        owner, name = _place_of(self.function)
        original = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            with self.path.open("ab") as file:
                file.write(b".")
            return original(*arguments, **named)

        setattr(owner, name, counted)


@dataclass(frozen=True)
class Fault(Scripted):
    """The process sends itself a signal, or several."""

    number: int = signal.SIGKILL
    numbers: Sequence[int] = ()

    def happen(self) -> None:
        for number in self.numbers or [self.number]:
            signal.raise_signal(number)


@dataclass(frozen=True)
class EveryCheckpoint:
    """Rounds wait for each checkpoint, so that none is left out because another is being written still."""

    def install(self) -> None:
        meanwhile = Store.save_meanwhile

        def waiting(store: Store, progress: Progress, state: State) -> None:
            meanwhile(store, progress, state)
            assert store._saving is not None
            store._saving.result()

        Store.save_meanwhile = waiting  # type: ignore[method-assign]


@dataclass(frozen=True)
class Run(Scripted):
    """The process runs commands."""

    commands: Sequence[Sequence[str]] = ()

    def happen(self) -> None:
        for command in self.commands:
            subprocess.run(command, check=True)


@dataclass(frozen=True)
class Wait(Scripted):
    """The process waits before a gate until the test opens it."""

    gate: Gate | None = None

    def happen(self) -> None:
        assert self.gate is not None
        self.gate.reached.touch()
        with self.gate.path.open("rb"):
            pass


class Gate:
    """Shut at first, for one process. `reached` is a file that is there when it waits."""

    def __init__(self, path: Path) -> None:
        self.path, self.reached = path, path.with_name(f"{path.name}-reached")
        os.mkfifo(path)

    def open(self) -> None:
        """Let who waits through, or who will come."""
        with self.path.open("wb"):
            pass


def _serve(settings: Mapping[str, Any], take_over: bool, faults: Sequence[Script], log: Path) -> None:
    _begin(faults, log)
    with recipes.make_server(config.replace(Recipe(), **settings), take_over=take_over) as server:
        server.stop_on_signals()
        raise SystemExit(0 if server.serve() else 3)


def _work(
    address: str, worker_id: str, own: Mapping[str, Any], folder: Path, faults: Sequence[Script], log: Path
) -> None:
    _begin(faults, log)
    try:
        recipes.work(address, worker_id=worker_id, folder=folder, wait_s=ENDS_WITHIN_S, **own)
    except signals.Ended as end:
        raise SystemExit(128 + end.number) from None


def _relay(server: str, listen: str, own: Mapping[str, Any], faults: Sequence[Script], log: Path) -> None:
    _begin(faults, log)
    with (
        Relay(server, listen, say=lambda line: print(line, flush=True), **own) as relay,
        signals.told(lambda number: relay.stop()),
    ):
        relay.serve()


def _begin(faults: Iterable[Script], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for fault in faults:
        fault.install()


@dataclass
class Cluster:
    """One run in a folder: its server at a socket there, and workers by name."""

    folder: Path
    settings: dict[str, Any]
    processes: list[BaseProcess] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def address(self) -> str:
        return f"ipc://{self.folder}/socket"

    def serve(self, *faults: Script, take_over: bool = False, **settings: Any) -> BaseProcess:
        own = {"run.dir": str(self.run), "server.address": self.address}
        settings = self.settings | own | {key.replace("__", "."): value for key, value in settings.items()}
        return self._start(_serve, settings, take_over, faults, self.folder / "server.log")

    def work(self, worker_id: str, *faults: Script, address: str = "", **own: Any) -> BaseProcess:
        """Start a worker; `own`: its keys, rank or scale, as `recipes.work` takes them."""
        log, state = self.folder / f"{worker_id}.log", self.state_of(worker_id)
        return self._start(_work, address or self.address, worker_id, own, state, faults, log)

    @property
    def relay_address(self) -> str:
        """Where workers behind the relay connect."""
        return f"ipc://{self.folder}/relay"

    def relay(self, *faults: Script, shelf_bytes: int = 1 << 24, **own: Any) -> BaseProcess:
        """Start a relay of the server, which runs until it is stopped; `own`: its keys, as `Relay` takes
        them."""
        own = {"server": self.address, "listen": self.relay_address, "shelf_bytes": shelf_bytes} | own
        return self._start(
            _relay, own.pop("server"), own.pop("listen"), own, faults, self.folder / "relay.log"
        )

    def state_of(self, worker_id: str) -> Path:
        """Where a worker keeps its state."""
        return self.folder / "workers" / worker_id

    def _start(self, target: Callable[..., None], *arguments: Any) -> BaseProcess:
        process = fork(target, *arguments)
        self.processes.append(process)
        return process

    def ended(self, process: BaseProcess, code: int) -> None:
        """Wait until a process has ended with this exit code; minus a signal's number if one ended it."""
        process.join(ENDS_WITHIN_S)
        assert process.exitcode == code, f"exit code {process.exitcode}, not {code}:\n{self.logs()}"

    def all_ended(self) -> None:
        for process in self.processes:
            process.join(ENDS_WITHIN_S)
            assert process.exitcode is not None, f"still runs:\n{self.logs()}"

    def first_ended(self, processes: Sequence[BaseProcess]) -> BaseProcess:
        ready = wait([process.sentinel for process in processes], ENDS_WITHIN_S)
        assert ready, f"none ended:\n{self.logs()}"
        return next(process for process in processes if process.sentinel in ready)

    def until(self, holds: Callable[[], object], what: str) -> None:
        """Wait for a fact about files, as long as somebody runs who may bring it about."""
        deadline_s = time.monotonic() + ENDS_WITHIN_S
        while not holds():
            assert time.monotonic() < deadline_s, f"no {what}:\n{self.logs()}"
            wait([process.sentinel for process in self.processes if process.is_alive()], 0.02)

    def stopped(self, process: BaseProcess) -> None:
        """Wait until a process has stopped itself."""
        stat = Path(f"/proc/{process.pid}/stat")
        self.until(lambda: stat.read_text().rpartition(") ")[2].startswith("T"), "process that stopped")

    def wake(self, process: BaseProcess) -> None:
        """Have a process that stops itself go on, but not before it has."""
        self.stopped(process)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGCONT)

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()

    # What it came to

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in Records.read(self.run / METRICS) if line["kind"] == kind]

    def master_digest(self) -> str:
        (done,) = self.lines("done")
        return str(done["master_digest"])

    def events(self, what: str) -> list[str]:
        return [line["message"] for line in self.lines("event") if line["what"] == what]


def audit(run: Path, num_rounds: int, workers: set[str]) -> None:
    """No contribution is merged twice, none that was merged is missing, and every version is there once."""
    kept: dict[tuple[int, int], journal.Kept] = {}
    merged = _merges(run)
    for segment in journal.history(run):
        assert not segment.fault or segment.fault.startswith("torn")
        for record in segment:
            if isinstance(record, journal.Kept):
                kept[record.version, record.incarnation] = record
    assert sorted(merged) == list(range(1, num_rounds + 1))
    for version, record in merged.items():
        names = Counter(kept[version - 1, incarnation].worker_id for incarnation in record.incarnations)
        assert names.keys() <= workers
        assert set(names.values()) == {1}, f"version {version} holds a worker twice: {names}"


def audit_arrivals(run: Path, least: int) -> int:
    """The same where contributions are merged on arrival: there are so many at least, and each is based on a
    version that holds the one before it of its worker. Returns how many versions they made."""
    newest: dict[int, journal.Kept] = {}
    based_on, merged_in, num_merged = dict[str, int](), dict[str, int](), 0
    for segment in journal.history(run):
        for record in segment:
            if isinstance(record, journal.Kept):
                newest[record.incarnation] = record
            elif isinstance(record, journal.Merged):
                for incarnation in record.incarnations:
                    kept = newest.pop(incarnation)
                    assert merged_in.get(kept.worker_id, 0) <= kept.version < record.version
                    assert based_on.get(kept.worker_id, -1) < kept.version, "merged twice"
                    merged_in[kept.worker_id], based_on[kept.worker_id] = record.version, kept.version
                    num_merged += 1
    assert num_merged >= least
    merged = _merges(run)
    assert sorted(merged) == list(range(1, len(merged) + 1))
    return len(merged)


def _merges(run: Path) -> dict[int, journal.Merged]:
    """What the journal says of each version."""
    merged: dict[int, journal.Merged] = {}
    for segment in journal.history(run):
        for record in segment:
            if isinstance(record, journal.Merged):
                assert record.version not in merged, "a version was merged twice"
                merged[record.version] = record
    return merged


def replayed(run: Path) -> str:
    """Digest of the master to which the journal leads from the initial weights, each version's checked."""
    copy = run.with_name("replayed")
    later = shutil.ignore_patterns("version-*[1-9]*")
    shutil.copytree(run, copy, ignore=later)
    recipe = config.load(copy / "config.yaml")
    master = Master(recipes.initial_model(recipe), recipe)
    found = recovery.recover(copy, master)
    assert found.faults == []
    return master.master_digest()


def shards(folder: Path) -> Path:
    """A little text, packed."""
    (folder / "text.txt").write_text("".join(f"{n} bottles of beer on the wall. " for n in range(700)))
    pack([folder / "text.txt"], folder / "shards", num_shards=2)
    return folder / "shards"
