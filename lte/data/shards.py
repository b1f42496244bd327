"""Packed text: the index of its shards, and how training and evaluation read them.

A folder of packed text holds WebDataset shards `train-000000.tar`, ..., `valid-000000.tar`, ..., whose
samples are chunks of at most `CHUNK_TOKENS` tokens, raw and little-endian, under the extension u8, u16
or u32; `index.json`, written last; and `tokenizer.json`, if the tokenizer is not `bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, Field, TypeAdapter
from torch import Tensor

from lte.data.folder import INDEX, Epochs, Part, cure, load_index, partition, permutation
from lte.data.folder import read_shard as read_samples
from lte.errors import DataError
from lte.lowrank import generator_of

CHUNK_TOKENS = 65_536
"""Tokens of a sample; the last sample of a shard may be shorter."""
MIX_TOKENS = 1 << 26
"""Most tokens whose windows are shuffled together, and so are held in memory; at least one shard's."""

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file.

    Attributes:
        file: its name in the folder.
        num_tokens: tokens in it.
        num_bytes: bytes of the text that the tokens stand for.
        sha256: of the file, in hex.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    file: str
    num_tokens: Count
    num_bytes: Count
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """What a folder of packed text holds.

    Attributes:
        tokenizer: its name, `bytes`, `bpe:SIZE`, or `tokenizer.json` where it was given.
        vocab_size: number of distinct tokens that it knows.
        dtype: of the tokens, as numpy calls it.
        train, valid: shards in the order of the text; no valid ones if none was kept for validation.
        format: version of the layout.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    tokenizer: str
    vocab_size: Count
    dtype: Literal["uint8", "uint16", "uint32"]
    train: Annotated[tuple[Shard, ...], Field(min_length=1)]
    valid: tuple[Shard, ...]
    format: Literal[1] = 1

    @classmethod
    def load(cls, folder: str | Path) -> Index:
        """Read a folder's index and see that its shards are there.

        Raises:
            DataError: nothing packed there, a damaged index, or missing shards.
        """
        return load_index(Path(folder), _ADAPTER, "text")

    def dump(self) -> bytes:
        """The bytes of index.json."""
        return _ADAPTER.dump_json(self, indent=1) + b"\n"


_ADAPTER: TypeAdapter[Index] = TypeAdapter(Index)


def storage(dtype: str | np.dtype[Any]) -> tuple[np.dtype[Any], str]:
    """How tokens of a dtype lie in a shard: the little-endian dtype, and the samples' extension."""
    stored = np.dtype(dtype).newbyteorder("<")
    return stored, f"u{8 * stored.itemsize}"


def read_shard(folder: Path, dtype: str, shard: Shard) -> Tokens:
    """All tokens of a shard.

    Raises:
        DataError: the file is not the one that was packed.
    """
    stored, extension = storage(dtype)
    samples = read_samples(folder, shard, "text")
    tokens = np.concatenate([np.frombuffer(sample[extension], stored) for sample in samples])
    if len(tokens) != shard.num_tokens:
        raise DataError(
            f"{folder / shard.file}: {len(tokens)} tokens instead of {INDEX}'s {shard.num_tokens};"
            f" {cure(folder)}"
        )
    return tokens


# Training


class TrainingStream:
    """A worker's endless training data, by step.

    `batch(step)` depends on nothing but the arguments given here, the step and the packed text: a
    resumed worker goes on exactly, without reading what went before.

    In an epoch a worker reads each window of its part once, in an order of its own: its shards are
    shuffled and taken in groups of up to `MIX_TOKENS` tokens; the windows of a group are shuffled. A
    shard's windows are context_tokens apart, from an offset that is drawn anew for each epoch and is
    common to the workers that share the shard. The grid leaves out fewer than 2 * context_tokens tokens
    of a shard, others in each epoch. Memory: one group of shards.

    Args:
        folder: packed text.
        context_tokens: tokens that a window predicts; it holds one more.
        batch_size: windows of a batch.
        seed: the run's seed.
        worker: its number; see `partition` for numbers of num_workers and above.
        num_workers: how many parts the data is dealt into.

    Raises:
        DataError: no packed text, or a shard too short for a window; from `batch`, a damaged shard.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        context_tokens: int,
        batch_size: int,
        seed: int,
        worker: int,
        num_workers: int,
    ) -> None:
        folder = Path(folder)
        index = Index.load(folder)
        self.context_tokens = context_tokens
        self.batch_size = batch_size
        parts = [
            (index.train[number], range(part, _grid(index.train[number], context_tokens), num_parts))
            for number, part, num_parts in partition(len(index.train), worker, num_workers)
        ]
        for shard, windows in parts:
            if not windows:
                raise DataError(
                    f"{folder / shard.file}: {shard.num_tokens} tokens are too few for windows of"
                    f" {context_tokens} and {num_workers} workers; pack more text, or fewer shards, or"
                    " set a smaller model.context_tokens"
                )
        self._epochs = Epochs(
            parts, size=lambda shard: shard.num_tokens, most=MIX_TOKENS, seed=seed, worker=worker
        )
        self.num_windows = self._epochs.num_items
        """Windows of an epoch of this worker."""
        # Two orders: a batch may reach into the next group and the next epoch.
        self._order = lru_cache(2)(partial(_order, context_tokens, seed, worker))
        self._tokens = lru_cache(1)(partial(_read_group, folder, index.dtype))

    def batch(self, step: int) -> Tensor:
        """Batch number `step`, counted from 0: int64 (batch_size, context_tokens + 1)."""
        first = step * self.batch_size
        rows = [self._window(number) for number in range(first, first + self.batch_size)]
        return _stacked(rows)

    def _window(self, number: int) -> Tokens:
        """The worker's window `number`, counted over all epochs: (context_tokens + 1,)."""
        epoch, group, place = self._epochs.find(number)
        which, start = self._order(epoch, group)[place]
        tokens: Tokens = self._tokens(tuple(shard for shard, _ in group))[which]
        return tokens[start : start + self.context_tokens + 1]


def _grid(shard: Shard, context_tokens: int) -> int:
    """Windows of a shard: as many as fit at the largest offset, so that every epoch has as many."""
    return max(0, (shard.num_tokens - 1 - (context_tokens - 1)) // context_tokens)


def _order(
    context_tokens: int, seed: int, worker: int, epoch: int, group: tuple[Part[Shard], ...]
) -> npt.NDArray[np.int64]:
    """Windows of a group in the order in which a worker reads them: (windows, 2), shard and first token."""
    windows = []
    for which, (shard, numbers) in enumerate(group):
        # Without the worker's number: those who share the shard must have the same grid.
        generator = generator_of("data", seed, epoch, shard.file)
        offset = int(torch.randint(context_tokens, (), generator=generator))
        starts = offset + context_tokens * np.array(numbers)
        windows.append(np.stack([np.full_like(starts, which), starts], axis=1))
    order = permutation(sum(map(len, windows)), seed, worker, epoch, group[0][0].file)
    return np.concatenate(windows)[order]


def _read_group(folder: Path, dtype: str, shards: tuple[Shard, ...]) -> list[Tokens]:
    return [read_shard(folder, dtype, shard) for shard in shards]


# Evaluation


def validation_batches(
    folder: str | Path, *, context_tokens: int, batch_size: int, max_tokens: int = 0
) -> Iterator[Tensor]:
    """The validation text in windows, from its start: every token after the first is predicted once,
    but for a rest shorter than a window.

    Args:
        context_tokens: tokens that a window predicts; it holds one more, the window before's last.
        batch_size: windows of a batch; the last batch may have fewer.
        max_tokens: most tokens to predict, in whole windows spread evenly over the text and at least
            one; 0: all.

    Returns:
        Batches, int64 (at most batch_size, context_tokens + 1).

    Raises:
        DataError: no packed text, or no window of validation text; while iterating, a damaged shard.
    """
    folder = Path(folder)
    index = Index.load(folder)
    num_tokens = sum(shard.num_tokens for shard in index.valid)
    num_windows = (num_tokens - 1) // context_tokens
    if num_windows < 1:
        raise DataError(
            f"{folder}: {num_tokens} tokens of validation text, a window needs {context_tokens + 1};"
            " pack with a larger valid_fraction, or a validation text of its own"
        )
    wanted = min(num_windows, max(1, max_tokens // context_tokens)) if max_tokens else num_windows
    stride = num_windows // wanted
    return _validation_batches(folder, index, context_tokens, batch_size, range(0, wanted * stride, stride))


def _validation_batches(
    folder: Path, index: Index, context_tokens: int, batch_size: int, numbers: range
) -> Iterator[Tensor]:
    rest = np.empty(0, index.dtype)  # from the first token of window `first`
    first, batch = 0, []
    for shard in index.valid:
        rest = np.concatenate([rest, read_shard(folder, index.dtype, shard)])
        count = max(0, (len(rest) - 1) // context_tokens)
        for number in range(first, first + count):
            if number not in numbers:
                continue
            start = (number - first) * context_tokens
            batch.append(rest[start : start + context_tokens + 1])
            if len(batch) == batch_size:
                yield _stacked(batch)
                batch = []
        rest, first = rest[count * context_tokens :], first + count
    if batch:
        yield _stacked(batch)


def _stacked(windows: list[Tokens]) -> Tensor:
    return torch.from_numpy(np.stack(windows).astype(np.int64))
