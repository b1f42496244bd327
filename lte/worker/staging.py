"""What the servers of a run send, each its part, until it is whole. No socket and no clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from torch import Tensor

from lte import wire

Kind = TypeVar("Kind", wire.Update, wire.Factors)


class Staging(Generic[Kind]):
    """Messages with their named bytes, the newest of each shard, until all shards' are of one version."""

    def __init__(self, num_shards: int) -> None:
        self._num = num_shards
        self._parts: dict[int, tuple[Kind, Mapping[str, Tensor]]] = {}

    def version(self, shard: int) -> int:
        """Of what is staged of a shard; 0 where nothing is."""
        return self._parts[shard][0].version if shard in self._parts else 0

    def add(
        self, shard: int, message: Kind, blobs: Mapping[str, Tensor]
    ) -> tuple[list[Kind], dict[str, Tensor]] | None:
        """Stage a shard's part.

        Returns:
            The messages of all shards in their order and all that came with them, if these are whole now.
        """
        if message.version >= self.version(shard):
            self._parts[shard] = message, blobs
        found = [self._parts[k] for k in range(self._num) if k in self._parts]
        if len(found) < self._num or len({part.version for part, _ in found}) > 1:
            return None
        return [part for part, _ in found], {n: blob for _, some in found for n, blob in some.items()}

    def behind(self) -> list[int]:
        """The shards of which an older version is staged than of another."""
        newest = max(part.version for part, _ in self._parts.values())
        return [shard for shard, (part, _) in self._parts.items() if part.version < newest]

    def clear(self) -> None:
        """Forget all of it."""
        self._parts = {}
