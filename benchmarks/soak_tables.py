"""What a soak came to: an audit of its journal, and its tables."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fleet import Fleet, audit, replayed
from runs import header, records, row

from lte.server import journal

if TYPE_CHECKING:
    from soak import Fault, Soak


def merges(run: Path) -> tuple[dict[int, set[str]], int, int]:
    """Read who was merged; see that each contribution that a server kept is in the version that it made.

    Returns:
        Version -> worker_ids in it; how many contributions were kept; how many of these count in no
        version, because the server was replaced before, and its successor did not get them again.
    """
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
    for one that holds a contribution which it made after the fault; in faults.jsonl, too.

    Returns:
        Faults whose victim made none.
    """
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
        *((kind, stalls_s[kind], backs_s[kind]) for kind in sorted(stalls_s)),
        ("all", *every),
    ]:
        figures = [figure(times) for times in (stalls, backs) for figure in (statistics.median, max) if times]
        row([kind, len(stalls), *(f"{seconds:.2f}" for seconds in figures)])
    print()
    return lasting


def outcome(soak: Soak, codes: Sequence[int | None], lasting: Sequence[Fault]) -> bool:
    """Audit the run, print what was found; returns whether all is as it should be.

    Args:
        codes: with which all ended. lasting: faults whose victim did not contribute again.
    """
    fleet = soak.fleet
    lines = records(fleet.run)
    done = lines[-1]
    told = itertools.chain.from_iterable(journal.history(fleet.run))
    workers = {record.worker_id for record in told if isinstance(record, journal.Admitted)}
    audit(fleet.run, fleet.version, workers)
    merged, num_kept, num_unmerged = merges(fleet.run)
    versions = [line["version"] for line in lines if line["kind"] == "round"]
    is_replayed = replayed(fleet.run) == done["master_digest"]
    said = Counter(line["what"] for line in lines if line["kind"] == "event")
    checks = {
        "each version is in the records once": versions == list(range(1, fleet.version + 1)),
        "the journal, replayed from the initial weights, gives the master's bits": is_replayed,
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
