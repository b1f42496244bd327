"""Which of a run's servers has what of the model, where `server.shards` divides it among several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import Tensor

from lte import quantize
from lte.compress import constants

Value = TypeVar("Value")


class Shards:
    """The division of a model. Everything belongs to shard 0 where nothing is said.

    Digests of what is divided are those of the shards' parts, in their order, with blanks between: of one
    shard it is the digest of everything, as if there were no shards.

    Attributes:
        num: how many there are.
    """

    def __init__(self, names: Iterable[Iterable[str]] = ()) -> None:
        """Args: names: modules with heads, and other tensors, of each shard."""
        divided = list(names)
        self.num = max(len(divided), 1)
        self._shard_of = {name: k for k, some in enumerate(divided) for name in some}

    def of(self, name: str) -> int:
        """The shard of a module or tensor, or of what travels of it (`MODULE/A`).

        Raises:
            KeyError: no shard has it.
        """
        if self.num == 1:
            return 0
        found = self._shard_of.get(name)
        return self._shard_of[name.rpartition("/")[0]] if found is None else found

    def split(self, named: Iterable[tuple[str, Value]]) -> list[dict[str, Value]]:
        """What is named, by shard."""
        parts: list[dict[str, Value]] = [{} for _ in range(self.num)]
        for name, value in named:
            parts[self.of(name)][name] = value
        return parts

    def digest(self, named: Iterable[tuple[str, Tensor]], of_constants: Iterable[str] = ()) -> str:
        """Digest of named tensors.

        Args:
            of_constants: what `digests_of_constants` gave, where these belong to it.
        """
        begin = list(of_constants) or [""] * self.num
        parts = self.split(named)
        return " ".join(
            quantize.digest(part.items(), first) for part, first in zip(parts, begin, strict=True)
        )

    def parts_of(self, digest: str) -> list[str]:
        """The digest of each shard's part; '' where there is none."""
        return digest.split(" ") if digest else [""] * self.num

    def digests_of_constants(self, named: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Of each shard's, with which the digest of what it publishes begins; '' where it has none."""
        return tuple("".join(constants.digests(part)) for part in self.split(named.items()))
