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


JOURNAL, PUBLISHER, SAVE = "lte.server.journal:Journal", "lte.server.publisher:Publisher", "lte.server.checkpoint"
LINKS, SERVER = "lte.server.links:Links", "lte.server.service:Server"
KILLED = {
    "a holder before its first checkpoint": At(f"{SAVE}:save", call=1, shard=1),
    "the coordinator before its first checkpoint": At(f"{SAVE}:save", call=1),
    "a holder before a contribution is kept": At(f"{HOLDER}._contributed", call=5, shard=1),
    "a holder when one is written": At(f"{HOLDER}._contributed", call=5, after=True, shard=1),
    "a holder when one is durable": At(f"{HOLDER}._settle", call=9, after=True, shard=1),
    "the coordinator before one counts": At(f"{SERVER}._keep", call=5),
    "the coordinator when one counts": At(f"{SERVER}._keep", call=5, after=True),
    "the coordinator when a merge is ordered": At(f"{LINKS}.tell", call=3, given="Merge", after=True),
    "a holder before it merges": At(f"{HOLDER}._merge", call=3, shard=1),
    "a holder before its merge is in its journal": At(f"{JOURNAL}.write", call=3, given="Merged", shard=1),
    "a holder when that is written": At(f"{JOURNAL}.write", call=3, given="Merged", after=True, shard=1),
    "a holder when it is prepared": At(f"{HOLDER}._merge", call=3, after=True, shard=1),
    "the coordinator when all are prepared": At(f"{LINKS}.prepared", call=3, after=True),
    "the coordinator when it has decided": At(f"{JOURNAL}.write", call=3, given="Merged", after=True),
    "the coordinator before anyone publishes": At(f"{LINKS}.tell", call=3, given="Publish"),
    "the coordinator when a holder may publish": At(f"{LINKS}.tell", call=3, given="Publish", after=True),
    "the coordinator between two workers": At(f"{PUBLISHER}._send", call=7, given="Update"),
    "the coordinator when its part is out": At(f"{PUBLISHER}.publish", call=3, after=True),
    "a holder before it publishes": At(f"{HOLDER}._publish", call=3, shard=1),
    "a holder between two workers": At(f"{PUBLISHER}._send", call=7, given="Update", shard=1),
    "a holder when its part is out": At(f"{HOLDER}._publish", call=3, after=True, shard=1),
    "a holder before the last part is out": At(f"{HOLDER}._publish", call=ROUNDS, shard=1),
    "the coordinator before the last part is out": At(f"{PUBLISHER}.publish", call=ROUNDS),
    "a holder in a checkpoint": At(f"{SAVE}:_name", call=2, shard=1),
    "a holder after a checkpoint": At(f"{SAVE}:_name", call=2, after=True, shard=1),
    "the coordinator in a checkpoint": At(f"{SAVE}:_name", call=2),
}


@pytest.mark.parametrize("fault", KILLED.values(), ids=KILLED.keys())
def test_a_killed_shard_loses_nothing(cluster: Cluster, undisturbed: str, fault: At) -> None:
    workers = [cluster.work(name) for name in ("a", "b")]
    killed = cluster.serve(fault, server__shards=2)
    # Where a holder is killed, its coordinator ends by itself.
    cluster.ended(killed, 1 if fault.shard else -signal.SIGKILL)
    cluster.ended(cluster.serve(server__shards=2), 0)
    for worker in workers:
        cluster.ended(worker, 0)
    assert cluster.master_digest() == undisturbed
    assert [line["version"] for line in cluster.lines("round")] == list(range(1, ROUNDS + 1))
    for shard in range(2):
        audit(folder_of(cluster.run, shard), ROUNDS, {"a", "b"})
    assert cluster.events("damaged") == cluster.events("refused") == cluster.events("recalled") == []
