"""Going back to an earlier version of a run that no server holds. What came after is kept aside."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lte import config, durable
from lte.config import Recipe
from lte.errors import RunError
from lte.server import checkpoint, journal, recovery
from lte.server.checkpoint import Progress
from lte.server.folder import RUN_ID, lock, next_generation
from lte.server.journal import Admitted, Journal, Merged, Segment
from lte.server.master import Master
from lte.track import METRICS, Records

_KEPT = "rolled-back-"


@dataclass(frozen=True)
class RolledBack:
    """What was done.

    Attributes:
        version: at which the run is. last: at which it was. aside: where what came after is kept.
    """

    version: int
    last: int
    aside: Path


def versions(folder: Path) -> list[int]:
    """The versions to which a run can go back: of its checkpoints, and those that the journal leads to
    from one of them.

    Raises:
        RunError: it holds no run.
    """
    saved = checkpoint.versions(folder / "checkpoints")
    if not saved:
        raise RunError(f"{folder}: holds no checkpoint; is it the run.dir of a run that trained?")
    found = set(map(checkpoint.version_of, saved))
    reached = -1
    for segment in journal.history(folder):
        if segment.opened and segment.opened.version in found:
            reached = segment.opened.version
        for record in segment:
            if isinstance(record, Merged) and record.version == reached + 1:
                reached += 1
                found.add(reached)
        if segment.fault:
            break
    return sorted(found)


def ranges(versions: Sequence[int]) -> str:
    """Ascending versions in words, such as `0, 10 to 17`."""
    parts: list[list[int]] = []
    for version in versions:
        if parts and version == parts[-1][-1] + 1:
            parts[-1].append(version)
        else:
            parts.append([version])
    return ", ".join(f"{part[0]} to {part[-1]}" if part[1:] else f"{part[0]}" for part in parts)


def roll_back(folder: Path, version: int, make_master: Callable[[Recipe], Master]) -> RolledBack:
    """Bring a run back to a version, from which the next server goes on.

    Nothing is deleted, and whenever this is interrupted the run is at one of both versions: the journal's
    new segment, which says how much of the others counts, decides. The run gets a new name, so that no
    worker goes on from a state of what is abandoned.

    Args:
        make_master: a new master of the run's recipe.

    Raises:
        RunError: a server holds the run, it cannot go back so far, or what is left of it is damaged.
    """
    there = versions(folder)
    with lock(folder, cure="stop it first"):
        there = versions(folder)
        if version == there[-1]:
            raise RunError(f"{folder}: is at version {version} already")
        if version not in there:
            raise RunError(f"{folder}: cannot go back to version {version}; it can to {ranges(there[:-1])}")
        recipe = config.load(folder / "config.yaml")
        master = make_master(recipe)
        all_segments = journal.history(folder)
        found = recovery.recover(folder, master, until=version)
        if found.progress.version != version:
            raise RunError(f"{folder}: version {version} cannot be made again: {'; '.join(found.faults)}")
        progress = _with_all_workers(found.progress, folder, all_segments)
        generation = next_generation(folder)
        aside = _new_folder(folder)
        checkpoint.save(folder / "checkpoints", progress, master.state(), keep=None)
        later = [p for p in checkpoint.versions(folder / "checkpoints") if checkpoint.version_of(p) > version]
        _move(reversed(later), aside / "checkpoints")
        _move([path for path in [folder / RUN_ID] if path.exists()], aside)
        _cut_records(folder / METRICS, aside, version, there[-1])
        _begin_journal(folder, generation, version, config.to_dict(recipe), found.follows)
        dead = {path.name: path for path in (folder / "journal").iterdir()}
        counting = {segment.path.name for segment in journal.history(folder)}
        _move([path for name, path in sorted(dead.items()) if name not in counting], aside / "journal")
    return RolledBack(version, there[-1], aside)


def _with_all_workers(progress: Progress, folder: Path, segments: Iterable[Segment]) -> Progress:
    """Nobody takes part; but whoever ever did keeps its slot, and no incarnation is handed out twice."""
    newest = checkpoint.progress(checkpoint.newest(folder))
    admitted = [record for segment in segments for record in segment if isinstance(record, Admitted)]
    known = {worker.worker_id: worker for worker in (*progress.known, *newest.known, *admitted)}
    incarnations = (worker.incarnation + 1 for worker in known.values())
    return replace(
        progress,
        members=(),
        known=tuple(known.values()),
        next_incarnation=max(progress.next_incarnation, newest.next_incarnation, *incarnations, 1),
    )


def _new_folder(folder: Path) -> Path:
    """RUN/rolled-back-N, the first N that is free."""
    n = 1
    while (path := folder / f"{_KEPT}{n}").exists():
        n += 1
    path.mkdir()
    return path


def _move(paths: Iterable[Path], to: Path) -> None:
    for path in paths:
        to.mkdir(exist_ok=True)
        path.rename(to / path.name)
        durable.sync(path.parent)


def _cut_records(path: Path, aside: Path, version: int, last: int) -> None:
    """Have the records end at a version; the whole of them is kept aside."""
    shutil.copy2(path, aside)
    with Records(path, version=version) as records:
        times = [line["time_s"] for line in Records.read(path) if line["kind"] == "round"]
        message = f"back at version {version}; what came after, up to version {last}, is in {aside}"
        records.append(
            "event", time_s=times[-1] if times else 0.0, what="rolled-back", message=message, version=version
        )


def _begin_journal(
    folder: Path, generation: int, version: int, settings: dict[str, Any], follows: dict[str, int]
) -> None:
    with closing(Journal(folder, generation)) as own:
        own.begin(version, settings, follows)
