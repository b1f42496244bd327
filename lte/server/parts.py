"""What a holder keeps of the open round: workers' parts of contributions, bounded by worker. Pure."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lte.server.commit import Edition
from lte.server.intake import Offered
from lte.server.master import Received

MOST_WRITTEN = 8
"""Parts of one worker that a round's journal takes. One counts; others were refused by another shard, or are
of a process that ended before all shards had its contribution."""


@dataclass(frozen=True)
class _Part:
    edition: Edition
    received: Received
    digest: bytes


class Parts:
    """Parts of contributions to the open round, by worker and incarnation."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[int, _Part]] = {}
        self._num_written = Counter[str]()
        self._counted: set[str] = set()

    def is_counted(self, worker_id: str) -> bool:
        """Whether a contribution of this worker is complete at all shards: no other takes its place."""
        return worker_id in self._counted

    def holds(self, edition: Edition) -> bool:
        """Whether this very one is kept."""
        part = self._kept.get(edition.worker_id, {}).get(edition.incarnation)
        return part is not None and part.edition == edition

    def has_room(self, worker_id: str) -> bool:
        """Whether another one of this worker may be kept."""
        return self._num_written[worker_id] < MOST_WRITTEN

    def add(self, edition: Edition, offered: Offered) -> bool:
        """Keep a part, in the place of an earlier one of the same incarnation.

        Returns:
            Whether it is to be written to the journal: not if it is what was written before, sent again.
        """
        kept, digest = self._kept.setdefault(edition.worker_id, {}), _digest(offered)
        before = kept.get(edition.incarnation)
        if before is not None and before.digest == digest:
            kept[edition.incarnation] = replace(before, edition=edition)
            return False
        kept[edition.incarnation] = _Part(edition, offered.received, digest)
        self._num_written[edition.worker_id] += 1
        return True

    def count(self, worker_id: str, incarnation: int) -> None:
        """This one counts, and its worker's others never will."""
        self._counted.add(worker_id)
        kept = self._kept[worker_id]
        self._kept[worker_id] = {incarnation: kept[incarnation]}

    def dismiss(self, worker_id: str) -> None:
        """Forget a worker that is gone, unless it counts."""
        if worker_id not in self._counted:
            self._kept.pop(worker_id, None)

    def take(self, incarnations: Sequence[int]) -> list[Received]:
        """Those that are merged, in this order. The round is over: all are forgotten."""
        found = {k: part.received for kept in self._kept.values() for k, part in kept.items()}
        self._kept, self._counted = {}, set()
        self._num_written.clear()
        return [found[incarnation] for incarnation in incarnations]


def _digest(offered: Offered) -> bytes:
    """Of what the journal would hold."""
    message = offered.message
    found = hashlib.sha256(repr((message.version, message.draw, message.tokens, message.loss)).encode())
    for name, blob in sorted(offered.blobs.items()):
        found.update(f"{name}:{blob.numel()}:".encode())
        found.update(blob.numpy().data)
    return found.digest()
