"""The journal's disk is full: nothing is published until there is room, and nothing is lost."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster import ROUNDS, Cluster, Counted, audit
from test_shards import is_shard

from lte.server import checkpoint, journal
from lte.server.checkpoint import Progress
from lte.server.shards import folder_of


@dataclass(frozen=True)
class FullWhenStopped:
    """The disk is full when the third merge is to be written, and the server is told to stop; then
    there is room."""

    def install(self) -> None:
        write, sync, merges = journal.Journal.write, journal.Journal.sync, 0

        def counting(self: journal.Journal, record: journal.AnyRecord) -> None:
            nonlocal merges
            merges += isinstance(record, journal.Merged)
            write(self, record)

        def full(self: journal.Journal) -> None:
            nonlocal merges
            if merges == 3:
                merges += 1
                signal.raise_signal(signal.SIGTERM)
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(self)

        journal.Journal.write, journal.Journal.sync = counting, full  # type: ignore[method-assign]


@dataclass(frozen=True)
class FullShard:
    """The disk of the second shard is full until a file is there: for its third merge, or for its last
    checkpoint."""

    room: Path
    at: str

    def install(self) -> None:
        save, write, sync, merges = checkpoint.save, journal.Journal.write, journal.Journal.sync, 0

        def look() -> None:
            if is_shard(1) and not self.room.exists():
                raise OSError(errno.ENOSPC, "No space left on device")

        def counting(self: journal.Journal, record: journal.AnyRecord) -> None:
            nonlocal merges
            merges += isinstance(record, journal.Merged)
            write(self, record)

        def full_at_merge(self: journal.Journal) -> None:
            if merges == 3:
                look()
            sync(self)

        def full_at_end(folder: Path, progress: Progress, *others: Any, **named: Any) -> None:
            if progress.version == ROUNDS:
                look()
            save(folder, progress, *others, **named)

        if self.at == "merge":
            journal.Journal.write, journal.Journal.sync = counting, full_at_merge  # type: ignore[method-assign]
        else:
            checkpoint.save = full_at_end  # type: ignore[assignment]


Resize = Callable[[str], None]


@contextmanager
def small_disk(place: Path, size: str, cluster: Cluster) -> Iterator[Resize]:
    """A disk of this size, where a cluster will write; gives it another size."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o"]
    if (
        os.geteuid() != 0
        or subprocess.run([*command, f"size={size}", "lte", place], capture_output=True).returncode
    ):
        pytest.skip("needs root, and leave to mount a tmpfs")
    try:
        yield lambda size: subprocess.run([*command, f"remount,size={size}", place], check=True)  # type: ignore
    finally:
        for process in cluster.processes:
            process.kill()
            process.join()
        subprocess.run(["umount", place], check=True)


@pytest.fixture(
    params=[("journal", "24k"), ("journal", "48k"), ("", "400k"), ("", "700k")],
    ids=["in the middle of the run", "at its end", "of the whole run", "of the whole run, later"],
)
def resize(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Resize]:
    """A small disk where the journal, or all that the server writes, will be."""
    inside, size = request.param
    with small_disk(cluster.run / inside, size, cluster) as resize:
        yield resize


def test_a_full_disk_is_waited_for(
    cluster: Cluster, undisturbed: str, resize: Resize, tmp_path: Path
) -> None:
    processes = [cluster.serve(), *(cluster.work(name) for name in ("a", "b"))]
    cluster.until(lambda: "has no room" in cluster.logs(), "word that the disk is full")
    assert not cluster.lines("done")
    resize("4m")
    for process in processes:
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    full, *others = cluster.events("disk")
    assert "has no room" in full
    assert "has room again" in others[-1]
    audit(cluster.run, ROUNDS, {"a", "b"})


def test_a_server_that_is_stopped_while_its_disk_is_full_saves_what_it_published(
    cluster: Cluster, undisturbed: str
) -> None:
    """A merge that waits for room is in the checkpoint and in the journal, or in neither."""
    workers = [cluster.work(name) for name in ("a", "b")]
    cluster.ended(cluster.serve(FullWhenStopped()), 3)
    for worker in workers:
        cluster.ended(worker, 1)
    for process in (cluster.serve(), *(cluster.work(name) for name in ("a", "b"))):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    audit(cluster.run, ROUNDS, {"a", "b"})


def test_a_worker_whose_disk_is_full_waits_for_room(cluster: Cluster, undisturbed: str) -> None:
    """Its signs of life go on, and the round waits for it."""
    with small_disk(cluster.state_of("b"), "64k", cluster) as resize:
        processes = [cluster.serve(), *(cluster.work(name) for name in ("a", "b"))]
        cluster.until(lambda: "no room for this worker's state" in cluster.logs(), "word of the full disk")
        assert len(cluster.lines("round")) < ROUNDS
        resize("4m")
        for process in processes:
            cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    audit(cluster.run, ROUNDS, {"a", "b"})


@pytest.mark.parametrize("at", ["merge", "last checkpoint"])
def test_a_full_disk_of_one_shard_is_waited_for(
    cluster: Cluster, undisturbed: str, tmp_path: Path, at: str
) -> None:
    """What its server does alone: that is said, and workers hear from all shards meanwhile."""
    room, heard = tmp_path / "room", tmp_path / "heard"
    server = cluster.serve(FullShard(room, at), server__shards=2)
    workers = [cluster.work("a", Counted("lte.worker.session:_Patience.heard", heard)), cluster.work("b")]
    cluster.until(lambda: cluster.events("disk"), "word that the disk is full")
    folder = folder_of(cluster.run, 1)
    cluster.until(lambda: f"waiting for room in {folder}" in cluster.logs(), "word of who waits")
    assert not cluster.lines("done")
    if at == "merge":
        num_heard = heard.stat().st_size
        cluster.until(lambda: heard.stat().st_size > num_heard + 50, "signs of life")
        assert len(cluster.lines("round")) == 2
    else:
        assert max(path.name for path in (cluster.run / "checkpoints").iterdir()).endswith(f"{ROUNDS}")
    room.touch()
    for process in (server, *workers):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    full, *others = cluster.events("disk")
    assert full.startswith("shard 1: ") and "has no room" in full
    assert "has room again" in others[-1]
    for shard in range(2):
        audit(folder_of(cluster.run, shard), ROUNDS, {"a", "b"})


def test_a_divided_server_that_is_stopped_while_a_disk_is_full_does_not_wait(
    cluster: Cluster, undisturbed: str, tmp_path: Path
) -> None:
    room = tmp_path / "room"
    server = cluster.serve(FullShard(room, "merge"), server__shards=2)
    workers = [cluster.work(name) for name in ("a", "b")]
    cluster.until(lambda: cluster.events("disk"), "word that the disk is full")
    assert server.pid is not None
    os.kill(server.pid, signal.SIGTERM)
    cluster.ended(server, 3)
    (unsaved,) = cluster.events("unsaved")
    assert f"no room for a last checkpoint in {folder_of(cluster.run, 1)}" in unsaved
    for worker in workers:
        cluster.ended(worker, 1)
    for process in (cluster.serve(server__shards=2), *(cluster.work(name) for name in ("a", "b"))):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    for shard in range(2):
        audit(folder_of(cluster.run, shard), ROUNDS, {"a", "b"})
