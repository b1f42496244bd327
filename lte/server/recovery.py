"""What a server goes on from: the newest good checkpoint of its run, and the journal since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lte import config
from lte.errors import RunError
from lte.server import checkpoint, journal, rounds
from lte.server.checkpoint import Progress
from lte.server.diagnosis import Diagnosis
from lte.server.master import Master, Received
from lte.server.watch import typical


@dataclass
class Recovered:
    """How far a run was, and how that was found out.

    Attributes:
        progress: of the master now. follows: the journal's segments, and how much of each counts.
        rounds: of the versions that were replayed, what the records say of them.
        diagnostics: the same, by version, of those whose diagnostics were due and are not in the records.
        faults: what was damaged, in words for a person.
    """

    progress: Progress = field(
        default_factory=lambda: Progress(version=0, tokens=0, master_digest="", base_digest="")
    )
    follows: dict[str, int] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: dict[int, dict[str, Any]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def recover(
    folder: Path, master: Master, *, until: int | None = None, diagnosis: Diagnosis | None = None
) -> Recovered:
    """Bring a new master to the last version that the run in this folder has merged.

    Args:
        until: to this version instead, or as near to it as what is left leads.
        diagnosis: measures what is replayed and was not measured before the crash.

    Raises:
        RunError: no checkpoint is good; or what the journal holds does not make the master that it
            says, so this machine's arithmetic is not that of the one that wrote it.
    """
    found = Recovered()
    checkpoints = checkpoint.versions(folder / "checkpoints")
    segments = journal.history(folder)
    if until is not None:
        checkpoints = [path for path in checkpoints if checkpoint.version_of(path) <= until]
        segments = journal.until(segments, until)
    for path in reversed(checkpoints):
        try:
            found.progress, state = checkpoint.load(path)
            master.enter(found.progress.version)
            master.load_state(state)
            _check(master, found.progress.master_digest, found.progress.base_digest, str(path))
            break
        except RunError as error:
            if path == checkpoints[0]:
                raise
            found.faults.append(f"{error.args[0].partition(';')[0]}; the one before it is used")
    found.follows = {segment.path.name: segment.size for segment in segments}
    _replay_all(segments, master, found, folder, diagnosis)
    return found


def _replay_all(
    segments: list[journal.Segment],
    master: Master,
    found: Recovered,
    folder: Path,
    diagnosis: Diagnosis | None,
) -> None:
    """Merge what segments from the checkpoint's on say, as far as they can be read."""
    versions = [opened.version if (opened := segment.opened) else -1 for segment in segments]
    if found.progress.version not in versions:
        if segments:
            found.faults.append(
                f"{folder / 'journal'}: says nothing of version {found.progress.version}, which the"
                " checkpoint holds, and is not used"
            )
        return
    replay = _Replay(master, found, folder, diagnosis)
    recipe = master.recipe
    for segment in segments[versions.index(found.progress.version) :]:
        for record in segment:
            replay.take(record)
        if segment.fault:
            found.faults.append(
                f"{segment.path}: {segment.fault}; version {found.progress.version} is the last that it tells"
            )
            break
    master.enter(found.progress.version, recipe)


class _Replay:
    """Records of a journal, taken one after another."""

    def __init__(self, master: Master, found: Recovered, folder: Path, diagnosis: Diagnosis | None) -> None:
        self._master, self._found, self._folder = master, found, folder
        self._diagnosis = diagnosis
        self._kept: dict[int, journal.Kept] = {}

    def take(self, record: journal.AnyRecord) -> None:
        progress = self._found.progress
        match record:
            case journal.Opened():
                self._master.enter(progress.version, config.from_dict(record.settings))
            case journal.Admitted():
                told = {}
                if self._master.recipe.merges_on_arrival:
                    told[record.worker_id] = (progress.version, progress.base_digest)
                members = {member.worker_id: member for member in progress.members}
                known = {member.worker_id: member for member in progress.known}
                members[record.worker_id] = known[record.worker_id] = record
                self._found.progress = replace(
                    progress,
                    members=tuple(members.values()),
                    known=tuple(known.values()),
                    told=progress.told | told,
                    next_incarnation=max(progress.next_incarnation, record.incarnation + 1),
                )
            case journal.Gone():
                left = tuple(m for m in progress.members if m.incarnation != record.incarnation)
                self._found.progress = replace(progress, members=left)
            case journal.Kept():
                self._kept[record.incarnation] = record
            case journal.Merged():
                self._merge(record)

    def _merge(self, merged: journal.Merged) -> None:
        kept = [self._kept[incarnation] for incarnation in merged.incarnations]
        self._kept = {}  # none is held while others are merged
        master, progress = self._master, self._found.progress
        assert merged.version == progress.version + 1
        contributions = [received(master, record) for record in kept]
        is_due = self._diagnosis is not None and self._diagnosis.is_due(merged.version)
        on_arrival = master.recipe.merges_on_arrival
        staleness = [progress.version - record.version for record in kept]
        outcome = master.merge(
            contributions,
            merged.num_missing_heads,
            staleness=staleness if on_arrival else None,
            keep_heads=is_due,
        )
        num_merged = progress.num_merged + len(kept)
        is_last = master.recipe.round_of(merged.version, num_merged) >= master.recipe.train.rounds
        advance = master.advance(merged.version, merged.remain, last=is_last)
        where = f"{self._folder / 'journal'}: version {merged.version}"
        _check(master, merged.master_digest, merged.base_digest, where)
        self._found.progress = replace(
            progress,
            version=merged.version,
            tokens=merged.tokens,
            master_digest=merged.master_digest,
            base_digest=merged.base_digest,
            merged_in=progress.merged_in
            | {record.worker_id: (merged.version, record.incarnation) for record in kept},
            num_merged=num_merged,
            told=progress.told
            | {record.worker_id: (merged.version, merged.base_digest) for record in kept if on_arrival},
        )
        if self._diagnosis is not None and is_due:
            measured = self._diagnosis.measure(
                merged.version, merged.tokens, contributions, outcome.heads, advance.before, last=is_last
            )
            if measured is not None:
                self._found.diagnostics[merged.version] = measured
        losses = [record.loss for record in kept if record.loss is not None]
        self._found.rounds.append(
            {
                "version": merged.version,
                "tokens": merged.tokens,
                "train_loss": sum(losses) / len(losses) if losses else None,
                "typical_loss": typical(losses),
                "num_merged": len(kept),
                **(in_arrival(num_merged, staleness) if on_arrival else {}),
                "uplink_bytes": sum(len(blob) for record in kept for blob in record.blobs.values()),
                **(outcome.held_down if master.recipe.outer.bound_norm else {}),
            }
        )


def member(admitted: journal.Admitted, now_s: float) -> rounds.Member:
    """A worker as the rounds know it, heard now."""
    return rounds.Member(
        worker_id=admitted.worker_id,
        session=admitted.session,
        incarnation=admitted.incarnation,
        slot=admitted.slot,
        heads=admitted.heads,
        rank=admitted.rank,
        scale=admitted.scale,
        heard_s=now_s,
    )


def in_arrival(contributions: int, staleness: Sequence[int]) -> dict[str, Any]:
    """What the records say of a merge on arrival: contributions so far, and how far its own were behind."""
    mean = sum(staleness) / len(staleness)
    return {"contributions": contributions, "staleness_mean": mean, "staleness_max": max(staleness)}


def received(master: Master, kept: journal.Kept) -> Received:
    """A contribution, decoded again from the bytes that it came as."""
    blobs = {
        name: torch.from_numpy(np.frombuffer(blob, np.uint8).copy()) for name, blob in kept.blobs.items()
    }
    return Received(
        worker_id=kept.worker_id,
        heads=kept.heads,
        rank=kept.rank,
        scale=kept.scale,
        first_head=kept.first_head,
        draw=kept.draw,
        tokens=kept.tokens,
        tensors=master.decode(blobs, kept.worker_id, kept.heads, kept.rank),
    )


def _check(master: Master, master_digest: str, base_digest: str, where: str) -> None:
    if (master.master_digest(), master.base_digest()) != (master_digest, base_digest):
        raise RunError(
            f"{where}: gives another master or base here than its digest says; go on where it was written,"
            " with the same library versions (arithmetic differs between machines)"
        )
