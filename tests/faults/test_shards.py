"""A master divided among several processes: the same bits as one's, also when any of them is killed."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import ROUNDS, Cluster, Fault, audit

from lte.server.shards import folder_of

HOLDER = "lte.server.holder:Holder"


@dataclass(frozen=True)
class At(Fault):
    """A fault of one shard's process; 0 is the coordinator."""

    shard: int = 0

    def happen(self) -> None:
        name = Path("/proc/self/comm").read_text().strip()
        if name == f"lte shard {self.shard}" or (not self.shard and not name.startswith("lte shard")):
            super().happen()


@pytest.mark.parametrize("num", [2, 4])
def test_several_shards_give_the_bits_of_one(cluster: Cluster, undisturbed: str, num: int) -> None:
    for process in (cluster.serve(server__shards=num), cluster.work("a"), cluster.work("b")):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    assert [line["version"] for line in cluster.lines("round")] == list(range(1, ROUNDS + 1))
    for shard in range(num):
        audit(folder_of(cluster.run, shard), ROUNDS, {"a", "b"})
    assert cluster.events("refused") == cluster.events("recalled") == cluster.events("superseded") == []
