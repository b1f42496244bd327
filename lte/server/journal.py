"""The write-ahead journal: what was merged, in which order and with which weights, and who took part.

A run's `journal/` holds segments, GENERATION-NUMBER-VERSION.log: one more with each start of a server
and with each checkpoint. A segment is records back to back, each a length, a CRC-32 and msgpack.
Contributions are written as they are kept, and count from the `Merged` record on that names them, which
is on disk before any byte of its version leaves.

Generations fence servers. A server raises the generation on disk, then reads the journal, and its first
record says which segments it goes on from and how much of each was valid. One that was replaced looks at
the generation after it wrote and before it publishes: either it sees that it was replaced, or its
successor reads what it wrote. What it writes later counts for nobody.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec

from lte.durable import DISK_FULL, sync
from lte.errors import FencedError

GENERATION = "generation"
"""Name of the file in a run's folder that holds the generation of its newest server."""
_HEADER_BYTES = 8
_ENDING = ".log"


class Record(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of all records."""


class Opened(Record, frozen=True, kw_only=True):
    """A segment begins, at a published version.

    Attributes:
        settings: of the recipe, by which contributions after it are merged.
        follows: earlier segments that count, in order, with how many bytes of each; empty in a
            segment that goes on in the generation of the one before.
    """

    generation: int
    version: int
    settings: dict[str, Any]
    follows: dict[str, int]


class Admitted(Record, frozen=True, kw_only=True):
    """A worker was welcomed. `session` names its process; `rank` is the most that its heads have, `scale`
    their lora_scale, or 0 for the recipe's."""

    worker_id: str
    session: str
    incarnation: int
    slot: int
    heads: int
    rank: int
    scale: float = 0.0


class Gone(Record, frozen=True, kw_only=True):
    """A worker left, was replaced, or fell silent."""

    incarnation: int


class Kept(Record, frozen=True, kw_only=True):
    """A contribution to the round on `version`, found valid; `blobs` are the bytes that it came as."""

    version: int
    worker_id: str
    incarnation: int
    heads: int
    rank: int
    first_head: int
    draw: int
    tokens: int
    loss: float | None
    blobs: dict[str, bytes]
    scale: float = 0.0


class Merged(Record, frozen=True, kw_only=True):
    """The kept contributions of these incarnations, in this order, make `version`.

    Attributes:
        num_missing_heads: expected heads that did not come; they weigh in the mean.
        remain: worker_ids whose merged factors are remembered after it.
        tokens: trained on so far. master_digest, base_digest: of W and of what is published.
    """

    version: int
    incarnations: tuple[int, ...]
    num_missing_heads: int
    remain: tuple[str, ...]
    tokens: int
    master_digest: str
    base_digest: str


AnyRecord = Opened | Admitted | Gone | Kept | Merged

_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(AnyRecord)


class Journal:
    """The journal of one server, open for writing.

    Attributes:
        folder: of the segments. generation: this server's.
    """

    def __init__(self, run_folder: Path, generation: int) -> None:
        self.folder, self.generation = run_folder / "journal", generation
        self._generation_file = run_folder / GENERATION
        self._file: FileIO | None = None
        self._size = self._number = 0
        # Encoded, and not written yet: a full disk keeps what comes until there is room.
        self._waiting: list[memoryview] = []

    def begin(self, version: int, settings: dict[str, Any], follows: dict[str, int] | None = None) -> None:
        """Go on in a new segment, whose records come after this published version.

        Raises:
            OSError: the disk is full, say; the segment before goes on.
        """
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{self.generation:08d}-{self._number:06d}-{version:08d}{_ENDING}"
        opened = Opened(generation=self.generation, version=version, settings=settings, follows=follows or {})
        body = _ENCODER.encode(opened)
        if self._file is not None:
            self.sync()
        file = path.open("xb", buffering=0)
        try:
            if file.write(_header(body) + body) < _HEADER_BYTES + len(body):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
            sync(self.folder)
        except OSError:
            file.close()
            path.unlink()
            raise
        self.close()
        self._file, self._size, self._number = file, _HEADER_BYTES + len(body), self._number + 1

    def write(self, record: AnyRecord) -> None:
        """Append a record. It is on disk after the next `sync`; where the disk is full, later."""
        body = _ENCODER.encode(record)
        self._waiting += [memoryview(_header(body)), memoryview(body)]
        try:
            self._flush()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise

    def sync(self) -> None:
        """Return when all that was written is on disk and this server is the newest one.

        Raises:
            OSError: the disk is full, say; nothing is lost, and it may be called again.
            FencedError: a newer server has taken the run over.
        """
        assert self._file is not None
        self._flush()
        os.fsync(self._file.fileno())
        self.check_generation()

    def check_generation(self) -> None:
        """See that no newer server has taken the run over.

        Raises:
            FencedError: one has.
        """
        check_generation(self._generation_file, self.generation)

    def _flush(self) -> None:
        assert self._file is not None
        while self._waiting:
            written = os.pwrite(self._file.fileno(), self._waiting[0], self._size)
            self._size += written
            self._waiting[0] = self._waiting[0][written:]
            if not self._waiting[0]:
                del self._waiting[0]

    def prune(self, version: int) -> None:
        """Delete the segments that recovery from a checkpoint of this version, or a newer one, never
        reads: a segment begins at every checkpoint."""
        for path in self.folder.glob(f"*{_ENDING}"):
            if _version_of(path) < version:
                path.unlink()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Segment:
    """A segment as it was found on disk.

    Attributes:
        path: of the file. size: bytes of valid records. fault: what is wrong after these, or ''.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        """Read and check it.

        Args:
            limit: of this many bytes, which were valid once; None: all.
        """
        self.path, self.size, self.fault = path, 0, ""
        with path.open("rb") as file:
            data = memoryview(file.read() if limit is None else file.read(limit))
        self._bodies: list[memoryview] = []
        while self.size < len(data):
            body = _body(data[self.size :])
            if body is None:
                # A crash tears the last record. Behind one that is only damaged the next begins.
                is_torn = limit is None and _body(data[self.size + _length(data[self.size :]) :]) is None
                self.fault = f"{'torn' if is_torn else 'damaged'} at byte {self.size:,} of {len(data):,}"
                return
            self._bodies.append(body)
            self.size += _HEADER_BYTES + len(body)
        if limit is not None and self.size < limit:
            self.fault = f"damaged: {self.size:,} bytes of what were {limit:,}"

    @property
    def opened(self) -> Opened | None:
        """The first record, or None where a crash left none."""
        first = next(iter(self), None)
        return first if isinstance(first, Opened) else None

    def __iter__(self) -> Iterator[AnyRecord]:
        for body in self._bodies:
            yield _DECODER.decode(body)

    def end_of(self, version: int) -> int | None:
        """Bytes up to and with the merge that makes this version; None if it is not in here."""
        end = 0
        for body, record in zip(self._bodies, self, strict=True):
            end += _HEADER_BYTES + len(body)
            if isinstance(record, Merged) and record.version == version:
                return end
        return None


def history(run_folder: Path) -> list[Segment]:
    """The segments that count, in order. Nothing after one with a fault does."""
    folder = run_folder / "journal"
    found = {path.name: Segment(path) for path in sorted(folder.glob(f"*{_ENDING}"))}
    openings = {name: opened for name, segment in found.items() if (opened := segment.opened)}
    if not openings:
        return []
    newest = max(opened.generation for opened in openings.values())
    own = {name: opened for name, opened in openings.items() if opened.generation == newest}
    follows = next(iter(own.values())).follows
    earlier = [Segment(folder / name, size) for name, size in follows.items() if (folder / name).exists()]
    return [*earlier, *(found[name] for name in own)]


def until(segments: Sequence[Segment], version: int) -> list[Segment]:
    """These segments, which count in this order, as far as the merge that makes a version; none where
    they do not tell of it."""
    for k, segment in enumerate(segments):
        if (end := segment.end_of(version)) is not None:
            return [*segments[:k], Segment(segment.path, end)]
    return []


def read_generation(path: Path) -> int:
    return int(path.read_text()) if path.exists() else 0


def check_generation(path: Path, generation: int) -> None:
    """See that this generation is the one on disk.

    Raises:
        FencedError: a newer server has taken the run over.
    """
    newest = read_generation(path)
    if newest != generation:
        raise FencedError(
            f"generation {newest} of the server has taken this run over from generation {generation}; this"
            " one ends, and writes nothing more"
        )


def _header(body: bytes | memoryview) -> bytes:
    return len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little")


def _length(data: memoryview) -> int:
    """Of the record that these bytes begin with, header and body."""
    return _HEADER_BYTES + int.from_bytes(data[:4], "little")


def _body(data: memoryview) -> memoryview | None:
    """The record that these bytes begin with, or None where they begin with none that is whole."""
    body = data[_HEADER_BYTES : _length(data)]
    if len(data) < max(_HEADER_BYTES, _length(data)) or _header(body) != data[:_HEADER_BYTES]:
        return None
    return body


def _version_of(path: Path) -> int:
    return int(path.stem.split("-")[2])
