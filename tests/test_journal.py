"""The journal's bytes and what recovery makes of them; see tests/faults for processes that are killed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from lte.errors import FencedError
from lte.server.folder import next_generation
from lte.server.journal import AnyRecord, Gone, Journal, Kept, Merged, Opened, history

Start = Callable[..., Journal]


def kept(version: int) -> Kept:
    return Kept(
        version=version,
        worker_id="a",
        incarnation=1,
        heads=1,
        rank=4,
        first_head=0,
        draw=0,
        tokens=8,
        loss=1.5,
        blobs={"x/B": bytes(range(200))},
    )


def merged(version: int) -> Merged:
    return Merged(
        version=version,
        incarnations=(1,),
        num_missing_heads=0,
        remain=("a",),
        tokens=8 * version,
        master_digest="m",
        base_digest="b",
    )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start one more server of the run: its journal."""
    with ExitStack() as stack:

        def begin(version: int = 0) -> Journal:
            journal = Journal(tmp_path, next_generation(tmp_path))
            stack.callback(journal.close)
            follows = {segment.path.name: segment.size for segment in history(tmp_path)}
            journal.begin(version, {"outer": {"lr": 0.5}}, follows)
            return journal

        yield begin


def told(folder: Path) -> list[AnyRecord]:
    return [record for segment in history(folder) for record in segment if not isinstance(record, Opened)]


def only_segment(folder: Path) -> Path:
    (path,) = (folder / "journal").iterdir()
    return path


def test_what_is_written_is_read_again_in_order(tmp_path: Path, start: Start) -> None:
    journal = start()
    records = [kept(0), merged(1), Gone(incarnation=1)]
    for record in records[:2]:
        journal.write(record)
    journal.begin(1, {})
    journal.write(records[2])
    journal.sync()
    journal.close()
    assert told(tmp_path) == records
    opened = [segment.opened for segment in history(tmp_path)]
    assert [(o.version, o.settings) for o in opened if o] == [(0, {"outer": {"lr": 0.5}}), (1, {})]
    assert history(tmp_path / "nothing here") == []


@pytest.mark.parametrize("lost", [1, 5, 100, 250])
def test_a_torn_tail_costs_the_last_record_alone(tmp_path: Path, start: Start, lost: int) -> None:
    journal = start()
    for record in (merged(1), kept(1)):
        journal.write(record)
    journal.close()
    path = only_segment(tmp_path)
    os.truncate(path, path.stat().st_size - lost)
    (segment,) = history(tmp_path)
    assert segment.fault.startswith("torn at byte")
    assert told(tmp_path) == [merged(1)]


def test_every_flipped_bit_is_seen(tmp_path: Path, start: Start) -> None:
    """Nothing from the damaged record on counts; what is told is a beginning of what was written."""
    journal = start()
    records = [kept(0), merged(1)]
    for record in records:
        journal.write(record)
    journal.close()
    path, met = only_segment(tmp_path), set()
    good = path.read_bytes()
    for k in range(0, len(good), 3):
        path.write_bytes(good[:k] + bytes([good[k] ^ (1 << k % 8)]) + good[k + 1 :])
        found = told(tmp_path)
        assert found == records[: len(found)]
        assert len(found) < len(records)
        met |= {segment.fault.partition(" ")[0] for segment in history(tmp_path)}
    assert met == {"damaged", "torn"}


def test_a_replaced_server_writes_for_nobody(tmp_path: Path, start: Start) -> None:
    old = start()
    old.write(merged(1))
    old.sync()
    new = start(1)
    old.write(merged(2))
    with pytest.raises(FencedError, match="generation 2 of the server has taken this run over"):
        old.sync()
    with pytest.raises(FencedError):
        old.begin(2, {})
    other = msgspec.structs.replace(merged(2), tokens=99)
    new.write(other)
    new.sync()
    assert told(tmp_path) == [merged(1), other]


def test_what_was_written_before_the_successor_read_counts(tmp_path: Path, start: Start) -> None:
    """The old server sees that it is replaced, and does not publish; its successor has the merge."""
    old = start()
    generation = next_generation(tmp_path)
    old.write(merged(1))
    with pytest.raises(FencedError):
        old.sync()
    new = Journal(tmp_path, generation)
    new.begin(1, {}, {segment.path.name: segment.size for segment in history(tmp_path)})
    new.close()
    assert told(tmp_path) == [merged(1)]


def test_damage_to_what_an_earlier_server_wrote_is_seen(tmp_path: Path, start: Start) -> None:
    old = start()
    old.write(merged(1))
    old.close()
    start(1).close()
    path = min((tmp_path / "journal").iterdir())
    os.truncate(path, path.stat().st_size - 1)
    assert [segment.fault.partition(" ")[0] for segment in history(tmp_path)] == ["damaged", ""]


def test_a_start_that_a_crash_cut_short_counts_for_nothing(tmp_path: Path, start: Start) -> None:
    old = start()
    old.write(merged(1))
    old.close()
    start(1).close()
    path = max((tmp_path / "journal").iterdir())
    os.truncate(path, 9)
    assert told(tmp_path) == [merged(1)]


def test_a_full_disk_keeps_what_comes_until_there_is_room(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, room, pwrite = start(), 500, os.pwrite

    def small(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = pwrite(descriptor, data[:room], offset)
        room -= written
        return written

    monkeypatch.setattr(os, "pwrite", small)
    for record in (kept(0), kept(0), merged(1)):
        journal.write(record)
    with pytest.raises(OSError, match="No space"):
        journal.sync()
    with pytest.raises(OSError, match="No space"):
        journal.begin(1, {})
    assert told(tmp_path) == [kept(0)]
    room = 1 << 20
    journal.sync()
    journal.close()
    assert told(tmp_path) == [kept(0), kept(0), merged(1)]


def test_any_other_fault_of_the_disk_is_raised(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = start()

    def broken(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OSError, match="Input/output"):
        journal.write(merged(1))


def test_old_segments_are_deleted_once_no_checkpoint_needs_them(tmp_path: Path, start: Start) -> None:
    journal = start()
    for version in (1, 2, 3):
        journal.write(merged(version))
        journal.begin(version, {})
    journal.prune(2)
    assert [segment.opened.version for segment in history(tmp_path) if segment.opened] == [2, 3]
    again = start(3)
    again.prune(3)
    assert told(tmp_path) == []
