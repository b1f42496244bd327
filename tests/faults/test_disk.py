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

import pytest
from cluster import ROUNDS, Cluster, audit

from lte.server import journal


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
