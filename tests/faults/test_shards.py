"""A master divided among several processes: the same bits as one's, also when any of them is killed."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import ROUNDS, Cluster, Counted, Fault, audit

from lte import recipes, status, wire
from lte.errors import WireError
from lte.server import intake, journal, service
from lte.server.shards import folder_of
from lte.tasks import task_of
from lte.transport import keys
from lte.worker.session import Session

HOLDER = "lte.server.holder:Holder"


@dataclass(frozen=True)
class At(Fault):
    """A fault of one shard's process; 0 is the coordinator."""

    shard: int = 0

    def happen(self) -> None:
        if is_shard(self.shard):
            super().happen()


def is_shard(number: int) -> bool:
    """Whether this process is that one."""
    name = Path("/proc/self/comm").read_text().strip()
    return name == f"lte shard {number}" or (not number and not name.startswith("lte shard"))


@dataclass(frozen=True)
class ToldToStop(At):
    """The coordinator gets the signal, while a holder is at something that takes as long as it takes."""

    def happen(self) -> None:
        if is_shard(self.shard):
            os.kill(os.getppid(), self.number)


@pytest.mark.parametrize("num", [2, 4])
def test_several_shards_give_the_bits_of_one(cluster: Cluster, undisturbed: str, num: int) -> None:
    for process in (cluster.serve(server__shards=num), cluster.work("a"), cluster.work("b")):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    assert [line["version"] for line in cluster.lines("round")] == list(range(1, ROUNDS + 1))
    for shard in range(num):
        audit(folder_of(cluster.run, shard), ROUNDS, {"a", "b"})
    assert cluster.events("refused") == cluster.events("recalled") == cluster.events("superseded") == []


JOURNAL, PUBLISHER, SAVE = (
    "lte.server.journal:Journal",
    "lte.server.publisher:Publisher",
    "lte.server.checkpoint",
)
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


@pytest.mark.parametrize("after", [False, True])
def test_a_worker_killed_between_its_parts_goes_on_bit_for_bit(
    cluster: Cluster, undisturbed: str, after: bool
) -> None:
    """The third contribution has reached one shard, or both."""
    server, other = cluster.serve(server__shards=2), cluster.work("a")
    cluster.ended(
        cluster.work("b", Fault("lte.worker.session:Session._close_parts", call=6, after=after)),
        -signal.SIGKILL,
    )
    for process in (cluster.work("b"), server, other):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    for shard in range(2):
        audit(folder_of(cluster.run, shard), ROUNDS, {"a", "b"})
    assert cluster.events("refused") == cluster.events("recalled") == []


def test_a_worker_without_its_state_starts_over_at_all_shards(cluster: Cluster) -> None:
    server, other = cluster.serve(server__shards=2), cluster.work("a")
    cluster.ended(cluster.work("b", Fault("lte.worker.trainer:Trainer.step", call=6)), -signal.SIGKILL)
    shutil.rmtree(cluster.state_of("b"))
    for process in (cluster.work("b"), server, other):
        cluster.ended(process, 0)
    assert cluster.events("recalled") != []
    for shard in range(2):
        audit(folder_of(cluster.run, shard), ROUNDS, {"a", "b"})


def test_keys_are_for_all_shards_and_evaluations_see_all(
    cluster: Cluster, undisturbed: str, tmp_path: Path
) -> None:
    public = {name: keys.create(tmp_path / name).public for name in ("server", "a", "b")}
    (tmp_path / "allow").write_text("".join(f"{name} {public[name]}\n" for name in ("a", "b")))
    server = cluster.serve(
        server__shards=2,
        server__key=str(tmp_path / "server.secret"),
        server__allow=str(tmp_path / "allow"),
        server__address="tcp://127.0.0.1:*",
        eval__every=2,
    )
    cluster.until(lambda: cluster.events("started"), "server")
    address = cluster.events("started")[0].rpartition(" ")[2]
    known = {"server_key": tmp_path / "server.public"}
    workers = [
        cluster.work(name, address=address, key=tmp_path / f"{name}.secret", **known) for name in ("a", "b")
    ]
    for process in (server, *workers):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    assert [line["version"] for line in cluster.lines("eval")] == [2, 4, 6]
    (done,) = cluster.lines("done")
    model, recipe, version = recipes.load_run(cluster.run)
    assert version == ROUNDS
    with torch.no_grad():
        assert task_of(recipe).evaluate(model, 64).loss == pytest.approx(done["loss"])


def test_a_group_that_hangs_is_taken_over_and_writes_nothing_when_it_wakes(
    cluster: Cluster, undisturbed: str
) -> None:
    hangs = At(f"{LINKS}.prepared", call=3, after=True, number=signal.SIGSTOP)
    old = cluster.serve(hangs, server__shards=2)
    workers = [cluster.work(name, address=f"file://{cluster.run}/address") for name in ("a", "b")]
    cluster.stopped(old)
    new = cluster.serve(take_over=True, server__shards=2, server__address=f"{cluster.address}-2")
    for process in (new, *workers):
        cluster.ended(process, 0)
    cluster.wake(old)
    cluster.ended(old, 1)
    assert cluster.master_digest() == undisturbed
    for shard in range(2):
        audit(folder_of(cluster.run, shard), ROUNDS, {"a", "b"})


class NothingToMeasure:
    """The server has no `evaluate`, as `lte.Server` by default."""

    def install(self) -> None:
        made = service.Server.__init__

        def without(*arguments: Any, **named: Any) -> None:
            made(*arguments, **named | {"evaluate": None})

        service.Server.__init__ = without  # type: ignore[method-assign]


def test_the_last_digest_is_of_all_shards_where_nothing_is_measured(
    cluster: Cluster, undisturbed: str
) -> None:
    server = cluster.serve(NothingToMeasure(), server__shards=2)
    for process in (server, cluster.work("a"), cluster.work("b")):
        cluster.ended(process, 0)
    assert cluster.lines("done")[0]["loss"] is None
    assert cluster.master_digest() == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("at", [f"{HOLDER}._merge", f"{HOLDER}._contributed"])
def test_a_divided_server_that_is_told_to_stop_saves_all_shards(
    cluster: Cluster, undisturbed: str, at: str, number: int
) -> None:
    names = ("a", "b")
    workers = [cluster.work(name) for name in names]
    cluster.ended(cluster.serve(ToldToStop(at, call=3, shard=1, number=number), server__shards=2), 3)
    saved = [
        {path.name for path in (folder_of(cluster.run, shard) / "checkpoints").iterdir()} for shard in (0, 1)
    ]
    assert max(saved[0]) == max(saved[1]), "the last checkpoint is of one version"
    assert cluster.events("unsaved") == []
    if number == signal.SIGTERM:  # else it is to come back, and they wait
        for worker in workers:
            cluster.ended(worker, 1)
        workers = [cluster.work(name) for name in names]
    for process in (cluster.serve(server__shards=2), *workers):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    for shard in range(2):
        audit(folder_of(cluster.run, shard), ROUNDS, {"a", "b"})


class RefusedByOne:
    """The second shard takes no third contribution of a's, and the first word of that is lost."""

    def install(self) -> None:
        close, receipt, num_lost = intake.Intake.close, service.Server._receipt, 0

        def refusing(self: intake.Intake, message: wire.Contribution, *others: Any) -> Any:
            if is_shard(1) and (message.worker_id, message.stream) == ("a", 3):
                raise WireError("the second shard does not like it")
            return close(self, message, *others)

        def losing(self: service.Server, peer: Any, of: Any, status: Any, reason: str) -> None:
            nonlocal num_lost
            if status == "refused" and not num_lost:
                num_lost += 1
            else:
                receipt(self, peer, of, status, reason)

        intake.Intake.close, service.Server._receipt = refusing, losing  # type: ignore[method-assign]


def test_what_one_shard_refuses_counts_nowhere_and_its_worker_starts_over(cluster: Cluster) -> None:
    server = cluster.serve(RefusedByOne(), server__shards=2)
    for process in (cluster.work("a"), cluster.work("b"), server):
        cluster.ended(process, 0)
    (refused,) = cluster.events("refused")
    assert "a contribution of a was refused: the second shard does not like it" in refused
    assert len(cluster.events("recalled")) == 1
    for shard in range(2):
        audit(folder_of(cluster.run, shard), ROUNDS, {"a", "b"})


WAITS_FOR_SHARD_1 = "waiting for shard 1 of the server, which does not answer"


def test_a_holder_that_hangs_is_waited_for_and_said_and_then_ends_the_group(
    cluster: Cluster, undisturbed: str
) -> None:
    hangs = At(f"{HOLDER}._contributed", call=5, shard=1, number=signal.SIGSTOP)
    patience = {"worker__patience_s": 12.0, "server__silence_s": 6.0}
    server = cluster.serve(hangs, server__shards=2, **patience)
    workers = [cluster.work(name) for name in ("a", "b")]
    cluster.until(lambda: WAITS_FOR_SHARD_1 in cluster.logs(), "word of what is waited for")
    assert status.inquire(cluster.address).words == WAITS_FOR_SHARD_1
    cluster.ended(server, 1)
    assert "shard 1 of the server has not answered for 12 s" in cluster.logs()
    for process in (cluster.serve(server__shards=2, **patience), *workers):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    for shard in range(2):
        audit(folder_of(cluster.run, shard), ROUNDS, {"a", "b"})


class Flood:
    """A worker that sends what it contributes again and again."""

    def install(self) -> None:
        push = Session.push

        def pushing(self: Session, *arguments: Any, **named: Any) -> None:
            push(self, *arguments, **named)
            for _ in range(20):
                self._push_again()

        Session.push = pushing  # type: ignore[method-assign]


def test_what_comes_again_is_not_written_again(cluster: Cluster, undisturbed: str, tmp_path: Path) -> None:
    """Nor is the model encoded for each worker that joins."""
    encoded = tmp_path / "encoded"
    server = cluster.serve(Counted("lte.server.publisher:Publisher.whole", encoded), server__shards=2)
    for process in (cluster.work("a", Flood()), cluster.work("b"), server):
        cluster.ended(process, 0)
    assert cluster.master_digest() == undisturbed
    for shard in range(2):
        audit(folder_of(cluster.run, shard), ROUNDS, {"a", "b"})
        segments = journal.history(folder_of(cluster.run, shard))
        kept = [record for segment in segments for record in segment if isinstance(record, journal.Kept)]
        assert len(kept) == 2 * ROUNDS
    assert encoded.stat().st_size == 1


def test_a_worker_behind_a_relay_is_told_that_shards_are_not(cluster: Cluster) -> None:
    cluster.serve(server__shards=2)
    cluster.relay()
    cluster.ended(cluster.work("a", address=cluster.relay_address), 1)
    assert "a relay stands before one" in cluster.logs()
    (refused,) = cluster.events("refused")
    assert "divided among several servers (server.shards)" in refused
