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
import json
import random
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fleet import ROOT, Fleet, audit, send
from runs import header, records, row, shards_of

from launch.local import EXIT_RUN_ENDED
from lte import config, language
from lte.server import journal, recovery
from lte.server.master import Master

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
        print(
            f"{len(soak.faults)} faults, {fleet.version} versions, "
            f"{max(journal_generations(fleet.run))} servers\n",
            flush=True,
        )
        lasting = faults_table(fleet, soak.faults)
        is_good = outcome(fleet, soak, codes, lasting)
        rounds = fleet.version
    if not arguments.references:
        return 0 if is_good else 1
    losses = [evaluations(reference(out, settings, rounds, k)) for k in range(arguments.references)]
    losses_table(evaluations(fleet.run), losses, rounds)
    return 0 if is_good else 1


# What it came to


def journal_generations(run: Path) -> list[int]:
    return [segment.opened.generation for segment in journal.history(run) if segment.opened]


def merges(run: Path) -> tuple[dict[int, set[str]], int, int]:
    """Version -> who was merged into it; how many contributions were kept; how many of these count in
    no version, because the server that had them was replaced, and they were not sent to its successor.

    Within the life of one server each one that it kept is merged."""
    merged: dict[int, set[str]] = {}
    kept: dict[tuple[int, int], str] = {}
    unmerged: set[tuple[int, str]] = set()
    num_kept = generation = 0
    for record in itertools.chain.from_iterable(journal.history(run)):
        match record:
            case journal.Opened() if record.generation > generation:
                generation, kept = record.generation, {}
            case journal.Kept():
                num_kept += 1
                kept[record.version, record.incarnation] = record.worker_id
                unmerged.add((record.version, record.worker_id))
            case journal.Merged():
                held = {key: name for key, name in kept.items() if key[0] == record.version - 1}
                assert {key[1] for key in held} == set(record.incarnations), "a kept contribution was lost"
                merged[record.version] = set(held.values())
                unmerged -= {(record.version - 1, name) for name in held.values()}
    return merged, num_kept, len(unmerged)


def faults_table(fleet: Fleet, faults: Sequence[Fault]) -> list[Fault]:
    """How long the others waited for the next two versions at most, and the victim, once it was awake,
    for one that holds a contribution which it made after the fault. Returns faults whose victim made none."""
    lasting = []
    seen_s, merged = fleet.seen_s, merges(fleet.run)[0]
    stalls_s: dict[str, list[float]] = {}
    backs_s: dict[str, list[float]] = {}
    with (fleet.folder / "faults.jsonl").open("w") as file:
        for fault in faults:
            after = sorted(version for version in seen_s if version > fault.version)
            times_s = [fault.at_s, *(seen_s[version] for version in after[:2])]
            stall_s = max(later - earlier for earlier, later in itertools.pairwise(times_s))
            back_s = next(
                (
                    seen_s[version] - fault.back_s
                    for version in after
                    if seen_s[version] > fault.back_s
                    and (
                        fault.name == "server"
                        or (version > fault.version + 1 and fault.name in merged[version])
                    )
                ),
                None,
            )
            stalls_s.setdefault(fault.kind, []).append(stall_s)
            backs_s.setdefault(fault.kind, [])
            if back_s is None:
                lasting.append(fault)
            else:
                backs_s[fault.kind].append(back_s)
            line = {**asdict(fault), "stall_s": stall_s, "recovery_s": back_s}
            file.write(json.dumps(line) + "\n")
    titles = ["fault", "times", "others' wait, median s", "worst s", "recovery, median s", "worst s"]
    header(titles)
    every = [[*itertools.chain(*lists.values())] for lists in (stalls_s, backs_s)]
    for kind, stalls, backs in [
        *((kind, stalls_s[kind], backs_s[kind]) for kind in KINDS if kind in stalls_s),
        ("all", *every),
    ]:
        figures = [figure(times) for times in (stalls, backs) for figure in (statistics.median, max) if times]
        row([kind, len(stalls), *(f"{seconds:.2f}" for seconds in figures)])
    print()
    return lasting


def outcome(fleet: Fleet, soak: Soak, codes: Sequence[int | None], lasting: Sequence[Fault]) -> bool:
    """Audit the run, print what was found; returns whether all is as it should be."""
    lines = records(fleet.run)
    done = lines[-1]
    workers = {
        segment.worker_id
        for segment in itertools.chain.from_iterable(journal.history(fleet.run))
        if isinstance(segment, journal.Admitted)
    }
    audit(fleet.run, fleet.version, workers)
    merged, num_kept, num_unmerged = merges(fleet.run)
    versions = [line["version"] for line in lines if line["kind"] == "round"]
    is_replayed = replayed_digest(fleet) == done["master_digest"]
    said = Counter(line["what"] for line in lines if line["kind"] == "event")
    checks = {
        "each version is in the records once": versions == list(range(1, fleet.version + 1)),
        "the journal, replayed from the first checkpoint, gives the master's bits": is_replayed,
        "all end at the last version with exit code 0": set(codes) == {0},
        "nobody ended unasked": not soak.surprises,
        "every victim but those who left soon after contributed again": all(
            fault.name in soak.gone for fault in lasting
        ),
    }
    print(
        f"{num_kept} contributions were kept, {sum(map(len, merged.values()))} merged, none twice;"
        f" {num_unmerged} were kept by a server that was then replaced, and not sent again\n"
    )
    for check, holds in checks.items():
        print(f"* {'yes' if holds else 'NO'}: {check}")
    for surprise in soak.surprises:
        print(f"  * {surprise}")
    print("\nevents:", ", ".join(f"{what} {count}" for what, count in said.most_common()))
    print("workers that left by themselves:", dict(soak.reasons))
    memory_table(soak.memory_mb)
    return all(checks.values())


def memory_table(memory_mb: dict[int, list[float]]) -> None:
    """What servers held ten seconds after their start, and at their end."""
    lived = [samples for samples in memory_mb.values() if len(samples) > 20]
    growth = [samples[-1] - samples[10] for samples in lived]
    if growth:
        print(
            f"memory of {len(lived)} servers that lived for 20 s or more: {lived[0][10]:.0f} MB in the"
            f" first after 10 s; growth from then to its end {statistics.median(growth):.1f} MB in the"
            f" median, {max(growth):.1f} MB at most\n"
        )


def replayed_digest(fleet: Fleet) -> str:
    """The master that the journal makes of the first checkpoint."""
    alone = fleet.folder / "replay"
    first = min((fleet.run / "checkpoints").glob("version-*"))
    (alone / "checkpoints").mkdir(parents=True)
    (alone / "checkpoints" / first.name).symlink_to(first)
    (alone / "journal").symlink_to(fleet.run / "journal")
    recipe = config.load(fleet.run / "config.yaml")
    master = Master(language.initial_model(recipe), recipe)
    found = recovery.recover(alone, master)
    assert not found.faults, found.faults
    assert found.progress.version == fleet.version
    return master.master_digest()


# Losses


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


def evaluations(run: Path) -> dict[int, float]:
    """Version -> loss of the published model."""
    return {line["version"]: line["loss"] for line in records(run) if line["kind"] == "eval"}


def losses_table(disturbed: dict[int, float], others: list[dict[int, float]], rounds: int) -> None:
    """Mean losses in each tenth of the run, at versions that all runs evaluated."""
    common = sorted(set(disturbed).intersection(*others))
    print()
    header(["versions", "undisturbed, least", "most", "soak"])
    for tenth in range(10):
        versions = [v for v in common if tenth * rounds < 10 * v <= (tenth + 1) * rounds]
        if versions:
            means = [statistics.mean(run[v] for v in versions) for run in [*others, disturbed]]
            least, most = min(means[:-1]), max(means[:-1])
            row([f"{versions[0]} to {versions[-1]}", f"{least:.4f}", f"{most:.4f}", f"{means[-1]:.4f}"])


if __name__ == "__main__":
    sys.exit(main())
