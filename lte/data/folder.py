"""What folders of packed data have in common, whatever is in them: WebDataset shards with digests, an
index that is written last, and who reads which part of them in which order."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import webdataset as wds  # type: ignore[import-untyped]
from pydantic import TypeAdapter, ValidationError

from lte.errors import DataError
from lte.lowrank import generator_of

INDEX = "index.json"
TOKENIZER = "tokenizer.json"

Kind = Literal["text", "images"]
_COMMANDS: dict[Kind, str] = {"text": "lte data pack TEXT", "images": "lte data pack-images IMAGES"}


class ShardFile(Protocol):
    """One tar file: its name in the folder and its sha256, in hex."""

    @property
    def file(self) -> str: ...
    @property
    def sha256(self) -> str: ...


class ShardIndex(Protocol):
    """What is in a folder: its shards."""

    @property
    def train(self) -> Sequence[ShardFile]: ...
    @property
    def valid(self) -> Sequence[ShardFile]: ...


Shard = TypeVar("Shard", bound=ShardFile)
Index = TypeVar("Index", bound=ShardIndex)


def cure(folder: Path, kind: Kind = "text") -> str:
    """What to do about a folder that is not as it was packed."""
    return f"copy the folder again, or make it again: {_COMMANDS[kind]} --out {folder} --force"


# Writing


def claim(out: Path, *, force: bool) -> None:
    """Make a folder to pack into.

    Raises:
        DataError: it cannot be made, or holds packed data that are not to be replaced.
    """
    if (out / INDEX).exists() and not force:
        raise DataError(f"{out}: holds packed data already; choose another folder, or use --force")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be made a folder ({error.strerror}); choose another") from None


def write_shard(path: Path, samples: Iterable[Mapping[str, str | bytes]]) -> str:
    """Write samples, each of bytes by extension and with its `__key__`, into a tar file; returns its
    sha256, which depends on nothing else."""
    # mtime: the clock must not get into the file
    with path.open("wb") as target, wds.TarWriter(target, encoder=False, mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(folder: Path, out: Path) -> None:
    """Move what was packed into its place, the index last."""
    if (out / INDEX).exists():
        (out / INDEX).unlink()  # first: without it the folder does not count as packed
        for old in (*out.glob("train-*.tar"), *out.glob("valid-*.tar"), *out.glob(TOKENIZER)):
            old.unlink()
    for path in (*sorted(folder.glob("*.tar")), *folder.glob(TOKENIZER), folder / INDEX):
        os.replace(path, out / path.name)


# Reading


def load_index(folder: Path, adapter: TypeAdapter[Index], kind: Kind) -> Index:
    """Read a folder's index and see that its shards are there.

    Raises:
        DataError: nothing packed there, or something of another kind, a damaged index, missing shards.
    """
    try:
        text = (folder / INDEX).read_bytes()
    except OSError:
        raise DataError(
            f"{folder}: no packed {kind} (no {INDEX}); make it: {_COMMANDS[kind]} --out {folder}"
        ) from None
    try:
        index = adapter.validate_json(text)
    except ValidationError as error:
        if (met := _kind_of(text)) not in (kind, None):
            raise DataError(
                f"{folder}: holds {met}, not {kind}; set data.kind={met}, or choose another folder"
            ) from None
        fault = error.errors()[0]
        where = "".join(f"{part}: " for part in fault["loc"])
        raise DataError(
            f"{folder / INDEX}: damaged, or of another version of lte ({where}{fault['msg']});"
            f" {cure(folder, kind)}"
        ) from None
    files = [shard.file for shard in (*index.train, *index.valid)]
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise DataError(
            f"{folder}: without {missing[0]} ({len(missing)} of {len(files)} shards are missing);"
            f" {cure(folder, kind)}"
        )
    return index


def _kind_of(index: bytes) -> Kind | None:
    """What a folder of this index holds; None where that cannot be read of it."""
    try:
        tree = json.loads(index)
    except ValueError:
        return None
    if not isinstance(tree, dict):
        return None
    return "images" if tree.get("kind") == "images" else "text" if "tokenizer" in tree else None


def read_shard(folder: Path, shard: ShardFile, kind: Kind) -> list[dict[str, Any]]:
    """The samples of a shard, each its bytes by extension.

    Raises:
        DataError: the file is not the one that was packed.
    """
    path = folder / shard.file
    try:
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != shard.sha256:
                raise DataError(f"{path}: damaged (its sha256 is not {INDEX}'s); {cure(folder, kind)}")
            stream.seek(0)
            # Not wds.WebDataset: it would read the path as a URL ("#" and "?" cut it), leave the file
            # open, draw from Python's global generator, and refuse to work where RANK is set.
            return list(
                wds.DataPipeline(
                    lambda: iter([{"url": shard.file, "stream": stream}]),
                    wds.tariterators.tar_file_expander,
                    wds.tariterators.group_by_keys,
                )
            )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {cure(folder, kind)}") from None


# Who reads what


def partition(num_shards: int, worker: int, num_workers: int) -> list[tuple[int, int, int]]:
    """A worker's part of the training data, as (shard, part, num_parts).

    Of each shard listed the worker reads items part, part + num_parts, ... With as many shards as
    workers, or more, each worker has shards of its own; with fewer, several share one. Workers 0 to
    num_workers - 1 have disjoint parts, which together are everything; one beyond them, who joined
    late, shares the part of worker % num_workers.
    """
    worker %= num_workers
    if num_shards >= num_workers:
        return [(shard, 0, 1) for shard in range(worker, num_shards, num_workers)]
    shard = worker % num_shards
    return [(shard, worker // num_shards, len(range(shard, num_workers, num_shards)))]


Part = tuple[Shard, range]
"""A shard, and the numbers of those of its items that a worker reads."""


class Epochs(Generic[Shard]):
    """In which order a worker reads the items of its part, epoch after epoch, without end.

    In an epoch it reads each item once: its shards are shuffled and taken in groups, which are in memory
    together; the items of a group are to be shuffled by whoever asks.

    Attributes:
        num_items: of an epoch of this worker.
    """

    def __init__(
        self,
        parts: Sequence[Part[Shard]],
        *,
        size: Callable[[Shard], int],
        most: int,
        seed: int,
        worker: int,
    ) -> None:
        """Make it.

        Args:
            size: how much of `most`, a group's limit, a shard takes; one shard at least is in a group.
        """
        self.num_items = sum(len(items) for _, items in parts)
        sizes = [size(shard) for shard, _ in parts]
        # Two epochs: a batch may reach into the next one.
        self._groups = lru_cache(2)(partial(_groups, tuple(parts), sizes, most, seed, worker))

    def find(self, number: int) -> tuple[int, tuple[Part[Shard], ...], int]:
        """Item `number`, counted over all epochs, as (epoch, its group, place in the group's order)."""
        epoch, place = divmod(number, self.num_items)
        for group in self._groups(epoch):
            size = sum(len(items) for _, items in group)
            if place < size:
                break
            place -= size
        return epoch, group, place


def _groups(
    parts: tuple[Part[Shard], ...], sizes: Sequence[int], most: int, seed: int, worker: int, epoch: int
) -> list[tuple[Part[Shard], ...]]:
    """A worker's shards in the order of an epoch, cut into groups that are shuffled together."""
    groups: list[tuple[Part[Shard], ...]] = []
    room = 0
    for number in permutation(len(parts), seed, worker, epoch):
        room -= sizes[number]
        if room < 0:
            groups.append(())
            room = most - sizes[number]
        groups[-1] += (parts[number],)
    return groups


def permutation(size: int, *seed: int | str) -> npt.NDArray[np.int64]:
    order: npt.NDArray[np.int64] = torch.randperm(size, generator=generator_of("data", *seed)).numpy()
    return order
