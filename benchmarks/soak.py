"""A soak: 8 workers and their server are killed, stopped and replaced at random for 20 minutes.

    python benchmarks/soak.py [--minutes 20] [--faults-per-minute 11] [--seed 0] [--out runs/soak]

What happens when, and to whom, is drawn from the seed beforehand. A supervisor starts again whoever
ended. Then the run is given a few more rounds in peace and ends in order; its journal is audited; and
undisturbed runs of as many rounds tell what its losses would have been. Every fault is a line of
faults.jsonl. The exit code is 1 if anything was lost or ended as it should not.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fleet import ROOT, Fleet, send
from runs import shards_of
from soak_tables import evaluations, faults_table, losses_table, outcome

from launch.exits import EXIT_RUN_ENDED

WORKERS, LAST_ROUNDS = 8, 20
SILENCE_S, GRACE_S, PATIENCE_S = 5.0, 2.0, 15.0
SETTLED_ROUNDS = 30
"""After the last fault, before the run is ended."""
STUCK_S = 120.0
"""Without a new version for so long the soak has failed."""
SETTINGS: dict[str, Any] = {
    "train.workers": WORKERS,
    "train.rounds": 1_000_000,  # until it is stopped
    "server.quorum": WORKERS // 2,
    "server.grace_s": GRACE_S,
    "server.silence_s": SILENCE_S,
    "server.keep_checkpoints": 1_000_000,  # and with them the whole journal, for the audit
    "worker.patience_s": PATIENCE_S,
    "eval.every": 25,
}

BRIEFLY, TOO_LONG, VISIT = (0.3, 3.0), (SILENCE_S + 0.5, SILENCE_S + 4), (5.0, 20.0)
"""Seconds, least and most, that a stop or a visit lasts."""
KINDS: dict[str, tuple[int, tuple[float, float]]] = {
    "worker killed": (28, (0, 0)),
    "worker killed, its state lost": (8, (0, 0)),
    "worker stopped briefly": (14, BRIEFLY),
    "worker stopped past the silence": (16, TOO_LONG),
    "worker stopped, replaced, woken": (6, TOO_LONG),
    "worker leaves, another joins": (8, (0, 0)),
    "one more worker joins, and leaves": (6, VISIT),
    "server killed": (9, (0, 0)),
    "server ended in order": (2, (0, 0)),
    "server stopped briefly": (3, BRIEFLY),
    "server stopped past the silence": (2, TOO_LONG),
    "server stopped past the patience": (1, (PATIENCE_S + 2, PATIENCE_S + 4)),
}
"""Kind -> how often, relatively, and for how long, in seconds."""


@dataclass(frozen=True)
class Due:
    """A fault as it was drawn: seconds after the start, kind, victim as a share of those there are,
    and how long it lasts."""

    at_s: float
    kind: str
    victim: float
    lasts_s: float


@dataclass
class Fault:
    """A fault as it happened.

    Attributes:
        at_s, back_s: of time.monotonic: when it happened, and when the victim, or who came for it, was
            awake again. version: the newest one then. name: who came back, or "server".
    """

    at_s: float
    kind: str
    version: int
    name: str
    back_s: float


def drawn(seed: int, minutes: float, per_minute: float) -> list[Due]:
    chance = random.Random(seed)
    count = round(minutes * per_minute)
    times_s = sorted(chance.uniform(0, 60 * minutes) for _ in range(count))
    kinds = chance.choices(list(KINDS), [weight for weight, _ in KINDS.values()], k=count)
    return [
        Due(at_s, kind, chance.random(), chance.uniform(*KINDS[kind][1]))
        for at_s, kind in zip(times_s, kinds, strict=True)
    ]


class Soak:
    """Disturbs a fleet, and starts again whoever ends.

    Attributes:
        faults: that happened. members: names of the workers that there should be; visitors: of those
            who come on top for a while; gone: of those who left. surprises: ends that nobody asked
            for. reasons: for which workers left by themselves, and how often. memory_mb: of servers
            by process id, once a second.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.faults: list[Fault] = []
        self.members = [f"w{k}" for k in range(WORKERS)]
        self.visitors: list[str] = []
        self.gone: set[str] = set()
        self.surprises: list[str] = []
        self.reasons: Counter[str] = Counter()
        self.memory_mb: dict[int, list[float]] = {}
        self._numbers = itertools.count(WORKERS)
        self._stopped: set[str] = set()
        self._ghosts: list[tuple[str, BaseProcess]] = []
        self._doubled: set[str] = set()
        self._sent: dict[int | None, set[signal.Signals]] = {}
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def run(self, dues: Iterable[Due]) -> None:
        """Have everything happen that is due, and what follows from it."""
        self.fleet.serve()
        for name in self.members:
            self.fleet.work(name)
        self.fleet.until_version(3)
        start_s = time.monotonic()
        for due in dues:
            self._at(start_s + due.at_s, lambda due=due: self._happen(due))
        moved_s, version, sampled_s = start_s, 0, 0.0
        while self._later or self._ghosts or self.fleet.version < self.faults[-1].version + SETTLED_ROUNDS:
            self.fleet.look()
            now_s = time.monotonic()
            self._supervise()
            while self._later and self._later[0][0] <= now_s:
                heapq.heappop(self._later)[2]()
            if self.fleet.version > version:
                moved_s, version = now_s, self.fleet.version
            assert now_s - moved_s < STUCK_S, f"no version after {version}: see {self.fleet.folder}"
            if now_s - sampled_s > 1 and (memory_mb := self.fleet.memory_mb()):
                sampled_s = now_s
                self.memory_mb.setdefault(self.fleet.server.pid or 0, []).append(memory_mb)

    def _at(self, at_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._later, (at_s, next(self._order), what))

    def _happen(self, due: Due) -> None:
        """Have a fault happen, or later if nobody is there whom it could happen to."""
        fleet, now_s = self.fleet, time.monotonic()
        awake = [name for name in self.members if name not in self._stopped]
        if not awake if "worker" in due.kind else "server" in self._stopped:
            self._at(now_s + 1, lambda: self._happen(due))
            return
        name = "server" if due.kind.startswith("server") else awake[int(due.victim * len(awake))]
        process = fleet.server if name == "server" else fleet.workers[name]
        fault = Fault(now_s, due.kind, fleet.version, name, now_s)
        self.faults.append(fault)
        match due.kind:
            case "worker killed" | "server killed":
                self._send(process, signal.SIGKILL)
            case "worker killed, its state lost":
                self._send(process, signal.SIGKILL)
                process.join()
                shutil.rmtree(fleet.state_of(name), ignore_errors=True)
            case "worker leaves, another joins":
                self.members[self.members.index(name)] = fault.name = f"w{next(self._numbers)}"
                self.gone.add(name)
                self._send(process, signal.SIGTERM)
                fleet.work(fault.name)
            case "one more worker joins, and leaves":
                fault.name = f"w{next(self._numbers)}"
                self.visitors.append(fault.name)
                fleet.work(fault.name)
                self._at(now_s + due.lasts_s, lambda: self._dismiss(fault.name))
            case "worker stopped, replaced, woken":
                self._send(process, signal.SIGSTOP)
                fleet.work(name)
                self._ghosts.append((name, process))
                self._doubled.add(name)  # stopped before it had joined, it is the newer one
                self._at(now_s + due.lasts_s, lambda: self._send(process, signal.SIGCONT))
            case "server ended in order":
                self._send(process, signal.SIGTERM)
            case _:
                self._send(process, signal.SIGSTOP)
                self._stopped.add(name)
                fault.back_s = now_s + due.lasts_s
                self._at(fault.back_s, lambda: self._wake(name, process))

    def _wake(self, name: str, process: BaseProcess) -> None:
        self._stopped.remove(name)
        self._send(process, signal.SIGCONT)

    def _dismiss(self, name: str) -> None:
        self.visitors.remove(name)
        self.gone.add(name)
        self._send(self.fleet.workers[name], signal.SIGTERM)

    def _send(self, process: BaseProcess, number: signal.Signals) -> None:
        self._sent.setdefault(process.pid, set()).add(number)
        send(process, number)

    def _supervise(self) -> None:
        """Start again who should be there and is not; note how it ended."""
        fleet = self.fleet
        if fleet.server.exitcode is not None:
            self._note("server", fleet.server)
            fleet.serve()
        for name, process in list(fleet.workers.items()):
            if process.exitcode is not None:
                self._note(name, process)
                del fleet.workers[name]
                if name in self.members or name in self.visitors:
                    fleet.work(name)
        for name, process in list(self._ghosts):
            if process.exitcode is not None:
                self._ghosts.remove((name, process))
                self._note(name, process)

    def _note(self, name: str, process: BaseProcess) -> None:
        code, sent = process.exitcode, self._sent.get(process.pid, set())
        assert code is not None
        if -code in sent or code - 128 in sent:
            return
        said = (self.fleet.folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
        words = said[-1] if said else ""
        if code == 2 and name in self._doubled:
            self.reasons["one of two processes of a name was fenced"] += 1
        elif code == EXIT_RUN_ENDED:
            self.reasons[words] += 1
        else:
            self.surprises.append(f"version {self.fleet.version}: {name} ended with {code}: {words}")

    def end(self) -> list[int | None]:
        """Stop the run in order, give it some more rounds in peace; returns all exit codes."""
        fleet = self.fleet
        for process in [fleet.server, *fleet.workers.values()]:
            send(process, signal.SIGTERM)
        fleet.until_ended()
        fleet.workers.clear()
        fleet.serve(train__rounds=fleet.version + LAST_ROUNDS)
        for name in self.members:
            fleet.work(name)
        return fleet.until_ended()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--faults-per-minute", type=float, default=11)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--references", type=int, default=3, help="undisturbed runs, each with a seed of its own"
    )
    parser.add_argument("--text", default=str(ROOT / "data/tinyshakespeare/input.txt.gz"))
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # and the fleet ends with it
    out: Path = arguments.out.absolute()
    settings = {**SETTINGS, "data.shards": str(shards_of(arguments.text, out))}
    with Fleet(out / f"seed-{arguments.seed}", settings) as fleet:
        soak = Soak(fleet)
        soak.run(drawn(arguments.seed, arguments.minutes, arguments.faults_per_minute))
        codes = soak.end()
        print(f"{len(soak.faults)} faults in {fleet.version} versions\n", flush=True)
        lasting = faults_table(fleet, soak.faults)
        is_good = outcome(soak, codes, lasting)
        rounds = fleet.version
    if not arguments.references:
        return 0 if is_good else 1
    losses = [evaluations(reference(out, settings, rounds, k)) for k in range(arguments.references)]
    losses_table(evaluations(fleet.run), losses, rounds)
    return 0 if is_good else 1


def reference(out: Path, settings: dict[str, Any], rounds: int, seed: int) -> Path:
    """An undisturbed run; returns its folder."""
    changes = {"train.rounds": rounds, "run.seed": seed, "server.keep_checkpoints": 2}
    with Fleet(out / f"undisturbed-{rounds}-{seed}", {**settings, **changes}) as fleet:
        fleet.serve()
        for k in range(WORKERS):
            fleet.work(f"w{k}")
        memory_mb = []
        while fleet.server.exitcode is None:
            fleet.look(1.0)
            memory_mb.append(fleet.memory_mb())
        assert set(fleet.until_ended()) == {0}
        memory_mb = [sample for sample in memory_mb if sample]
        tenth = len(memory_mb) // 10
        print(
            f"undisturbed, seed {seed}: {len(memory_mb)} s, server's memory {memory_mb[tenth]:.0f} MB after a"
            f" tenth, {memory_mb[-tenth]:.0f} MB at the end",
            flush=True,
        )
        return fleet.run


if __name__ == "__main__":
    sys.exit(main())
