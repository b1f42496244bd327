"""A holder: one shard of a divided master, in a process of its own, that does what its coordinator orders.

See `commit` for the protocol.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import nn

from lte import config, durable, transport, wire
from lte.config import Recipe
from lte.errors import FencedError, LTEError, RunError, UserError, WireError
from lte.server import assembly, commit, recovery, rounds
from lte.server.admission import Complaints, vouched
from lte.server.checkpoint import Progress
from lte.server.commit import Edition
from lte.server.intake import Intake
from lte.server.journal import GENERATION, Admitted, read_generation
from lte.server.master import Advance, Master
from lte.server.parts import MOST_WRITTEN, Parts
from lte.server.publisher import Publisher
from lte.server.shards import folder_of
from lte.server.store import Store
from lte.server.watch import Outliers
from lte.transport import Frames, Peer

_LONGEST_WAIT_S = 1.0
"""How often a holder whose disk is full tries again."""


def serve(link: Connection, shard: int, model: nn.Module | Callable[[], nn.Module], recipe: Recipe) -> int:
    """Be the holder of a shard until its coordinator needs it no more.

    Returns:
        The exit code of its process.
    """
    try:
        Holder(link, shard, model, recipe).serve()
    except (EOFError, ConnectionError):  # the coordinator has gone
        return 0
    except FencedError:
        return 0
    except (LTEError, OSError) as error:
        return _say_failed(link, str(error), is_users=isinstance(error, UserError))
    except Exception as error:
        traceback.print_exc()
        return _say_failed(link, f"{type(error).__name__}: {error}", is_users=False)
    return 0


def _say_failed(link: Connection, reason: str, *, is_users: bool) -> int:
    with contextlib.suppress(OSError):  # nobody may be there to hear it
        link.send_bytes(commit.encode(commit.Failed(reason=reason, is_users=is_users)))
    return 1


@dataclass(frozen=True)
class _Ahead:
    """A merge that is on disk and not decided yet: what its publishing needs."""

    incarnations: tuple[int, ...]
    advance: Advance
    progress: Progress


class Holder:
    """Master, journal, endpoint of one shard."""

    def __init__(
        self, link: Connection, shard: int, model: nn.Module | Callable[[], nn.Module], recipe: Recipe
    ) -> None:
        """Recover as the coordinator orders, and be ready.

        Raises:
            EOFError: the coordinator has gone. LTEError: this shard cannot go on.
        """
        self._link, self._shard, self._recipe = link, shard, recipe
        self._folder = folder_of(Path(recipe.run.dir), shard)
        self._complain = Complaints(self._say)
        self._members: dict[str, rounds.Member] = {}
        self._peers: dict[str, Peer] = {}
        self._parts = Parts()
        # What is to be told once all that was written is on disk: of these, of a merge.
        self._written: list[Edition] = []
        self._merged: commit.Prepared | None = None
        self._ahead: _Ahead | None = None
        # What is to be sent to workers as soon as they are heard here: the published model, the same bytes to
        # all who join a version.
        self._whole: dict[str, Callable[[Peer], None]] = {}
        self._published_whole: Callable[[Peer], None] | None = None
        self._bind()
        found = self._recover(model)
        self._open(found)
        self._report(commit.Ready(base_digest=self._publisher.base_digest))

    def _bind(self) -> None:
        """Bind the address, and fence who has had the folder."""
        order = commit.order_of(self._link.recv_bytes())
        assert isinstance(order, commit.Recover)
        torch.set_num_threads(1)
        self._generation = order.generation
        server = self._recipe.server
        self._endpoint = transport.bind(
            order.address,
            max_message_bytes=server.max_message_bytes,
            insecure=server.insecure,
            key=server.key,
            allow=server.allow,
        )
        self._endpoint.watch([self._link.fileno()])
        _raise_generation(self._folder, order.generation)

    def _recover(self, model: nn.Module | Callable[[], nn.Module]) -> recovery.Recovered:
        """Make the master, and bring it to the version that all shards have."""
        self.master, found = self._recovered(model, None)
        self._report(
            commit.Found(
                version=found.progress.version,
                address=self._endpoint.address,
                faults=tuple(found.faults),
            )
        )
        begin = commit.order_of(self._link.recv_bytes())
        assert isinstance(begin, commit.Begin)
        if found.progress.version != begin.version:  # its last merge was never decided
            self.master, found = self._recovered(model, begin.version)
        if found.progress.version != begin.version:
            raise RunError(
                f"{self._folder}: leads to version {found.progress.version}, the other shards to"
                f" {begin.version}; what is missing in it is damaged or was deleted"
            )
        return found

    def _open(self, found: recovery.Recovered) -> None:
        """Open what is sent by, checked with and written to."""
        version, num_merged = found.progress.version, found.progress.num_merged
        self._publisher = Publisher(
            self._endpoint,
            self.master,
            self._recipe,
            generation=self._generation,
            version=version,
            num_merged=num_merged,
        )
        self._progress = Progress(
            version=version,
            tokens=found.progress.tokens,
            master_digest=self.master.master_digest(),
            base_digest=self._publisher.base_digest,
            num_merged=num_merged,
        )
        self._intake = Intake(self.master, self._recipe, Outliers())
        self._store = Store(
            self._folder,
            self._generation,
            config.to_dict(self._recipe),
            keep=self._recipe.server.keep_checkpoints,
            say=self._say,
        )
        self._store.begin(self._progress, self.master.state(), found.follows)

    def _recovered(
        self, build: nn.Module | Callable[[], nn.Module], until: int | None
    ) -> tuple[Master, recovery.Recovered]:
        model = (build if isinstance(build, nn.Module) else build()).eval()
        master = Master(model, self._recipe, assembly.names(model, self._recipe)[self._shard])
        del model  # the part is taken, and its memory is wanted for what is recovered
        return master, recovery.recover(self._folder, master, until=until)

    def serve(self) -> None:
        """Hear workers and the coordinator, until that goes (EOFError)."""
        try:
            while True:
                received = self._endpoint.receive(_LONGEST_WAIT_S)
                # Orders first: whoever is heard here was admitted before.
                self._obey_all()
                while received is not None:
                    self._hear(*received)
                    self._obey_all()
                    received = self._endpoint.receive(0)
                self._settle()
                for notice in self._endpoint.notices():
                    self._complain("admission", notice)
        finally:
            self._endpoint.close()
            self._store.close()

    # The coordinator

    def _report(self, report: commit.Report) -> None:
        self._link.send_bytes(commit.encode(report))

    def _say(self, what: str, message: str, **_: str) -> None:
        self._report(commit.Happened(what=what, message=f"shard {self._shard}: {message}"))

    def _obey_all(self) -> None:
        while self._link.poll(0):
            self._obey(commit.order_of(self._link.recv_bytes()))

    def _obey(self, order: commit.Order) -> None:
        match order:
            case commit.Admit(worker=worker):
                self._admit(worker)
            case commit.Dismiss(worker_id=worker_id):
                for known in (self._members, self._peers, self._whole):
                    known.pop(worker_id, None)
                self._intake.drop(worker_id)
                self._parts.dismiss(worker_id)
            case commit.Counted(worker_id=worker_id, incarnation=incarnation):
                self._parts.count(worker_id, incarnation)
                self._intake.drop(worker_id)
            case commit.Merge():
                self._merge(order)
            case commit.Publish(told=told):
                self._publish(told)
            case commit.SendWhole(worker_id=worker_id):
                self._send_whole(worker_id)
            case commit.Save(is_awaited=True):
                saved = self._store.save(self._progress, self.master.state())
                self._report(commit.Saved(is_there=saved))
            case commit.Save():
                self._store.save_meanwhile(self._progress, self.master.state())
            case commit.Tell(which=which, names=names):
                self._report(commit.State(tensors=self._tensors(which, names)))
            case commit.Digest():
                self._report(commit.Digested(of_modules=self.master.digests()))
            case commit.Ping():
                self._report(commit.Pong(is_full=self._store.is_full))

    def _admit(self, worker: Admitted) -> None:
        last = self._members.get(worker.worker_id)
        if last is None or last.incarnation != worker.incarnation:
            self._peers.pop(worker.worker_id, None)
            self._intake.drop(worker.worker_id)
        self._members[worker.worker_id] = recovery.member(worker, 0.0)
        digest = self.master.merged_digest(worker.worker_id, worker.heads, worker.rank)
        self._report(commit.Remembered(merged_digest=digest))

    def _merge(self, order: commit.Merge) -> None:
        """Merge, and have the journal say so."""
        assert self._ahead is None and order.version == self._publisher.version + 1
        self._settle()
        self._written = []  # their round is over
        held = self._parts.take(order.incarnations)
        self._intake.clear()
        outcome = self.master.merge(held, order.num_missing_heads)
        advance = self.master.advance(order.version, order.remain, last=order.is_last)
        progress = Progress(
            version=order.version,
            tokens=order.tokens,
            master_digest=advance.master_digest,
            base_digest=advance.base_digest,
            num_merged=self._progress.num_merged + len(held),
        )
        self._store.write(order.journaled(advance.master_digest, advance.base_digest))
        self._ahead = _Ahead(order.incarnations, advance, progress)
        self._merged = commit.Prepared(
            base_digest=progress.base_digest, change=outcome.change, step=outcome.step
        )
        self._settle()

    def _publish(self, told: tuple[str, ...]) -> None:
        assert self._ahead is not None
        ahead, self._ahead = self._ahead, None
        self._progress, self._published_whole = ahead.progress, None
        peers = [self._peers[worker_id] for worker_id in told if worker_id in self._peers]
        changed = self._publisher.publish(peers, ahead.advance, ahead.incarnations)
        uplink, downlink, by_kind = self._publisher.close_round()
        self._report(
            commit.Published(
                changed=changed,
                num_parameters=self.master.plan.num_adapted_parameters,
                num_scales=sum(base.scales.numel() for base in self.master.base.values()),
                uplink_bytes=uplink,
                downlink_bytes=downlink,
                by_kind=by_kind,
            )
        )

    def _send_whole(self, worker_id: str) -> None:
        """Send it the published model, at once or when it is heard."""
        if self._published_whole is None:
            self._published_whole = self._publisher.whole()
        if worker_id in self._peers:
            self._published_whole(self._peers[worker_id])
        else:
            self._whole[worker_id] = self._published_whole

    def _tensors(self, which: str, names: Collection[str]) -> bytes:
        """These of the plain model, of parameters and constants."""
        tensors = self.master.parameters(which, names)
        tensors |= {name: self.master.constants[name] for name in names if name in self.master.constants}
        return save({name: tensor.contiguous() for name, tensor in tensors.items()})

    # Workers

    def _hear(self, peer: Peer, frames: Frames) -> None:
        try:
            message, entries = wire.decode_from_worker(frames)
        except WireError as error:
            self._complain("malformed", f"a message was dropped: {error}")
            return
        own = vouched(message, self._endpoint.sender)
        if not isinstance(own, wire.Part | wire.Contribution | wire.Heartbeat | wire.Behind | wire.Recall):
            return  # the rest is for the coordinator
        member = self._members.get(own.worker_id)
        is_current = member is not None and member.incarnation == own.incarnation
        if member is None or not is_current or own.generation != self._generation:
            return  # as the coordinator tells it
        match own:
            case wire.Heartbeat():
                self._follow(peer, own)
            case wire.Part() if own.version == self._publisher.version and self._ahead is None:
                if self._parts.is_counted(own.worker_id) or not self._parts.has_room(own.worker_id):
                    return
                self._publisher.count("uplink", self._intake.add(own, member, frames, entries))
            case wire.Contribution():
                self._contributed(peer, own, member)
            case wire.Behind() if own.version < self._publisher.version and self._ahead is None:
                self._publisher.bring_up(peer, own.version, ())
            case wire.Recall() if self._ahead is None:
                merged = self.master.merged_of(own.worker_id, member.heads, member.rank)
                self._publisher.send_factors(peer, merged)

    def _follow(self, peer: Peer, heartbeat: wire.Heartbeat) -> None:
        """Answer a worker where it was heard last, with what was to be sent first."""
        self._peers[heartbeat.worker_id] = peer
        if send := self._whole.pop(heartbeat.worker_id, None):
            send(peer)
        self._settle()
        version = self._publisher.version
        pulse = wire.Pulse(generation=self._generation, number=heartbeat.number, version=version)
        self._endpoint.send(peer, wire.encode(pulse))

    def _contributed(self, peer: Peer, message: wire.Contribution, member: rounds.Member) -> None:
        """Write a worker's part of a contribution to the published version."""
        worker_id = message.worker_id
        edition = Edition(worker_id, message.incarnation, message.version, message.stream, message.tokens)
        if message.version != self._publisher.version or self._ahead is not None:
            self._receipt(peer, edition, "superseded")
            return
        if self._parts.is_counted(worker_id):
            self._receipt(peer, edition, "held")
            return
        if self._parts.holds(edition):
            self._hold(peer, edition)
            return
        try:
            if not self._parts.has_room(worker_id):
                raise WireError(f"{MOST_WRITTEN} of its contributions to one round were not complete")
            offered = self._intake.close(message, member, self._publisher.base_digest)
        except WireError as error:
            self._report(commit.Refused(edition=edition, reason=str(error)))
            return
        if offered is None:
            return  # parts were lost: without a receipt they come again
        if self._parts.add(edition, offered):
            self._store.write(offered.kept())
        self._hold(peer, edition)

    def _hold(self, peer: Peer, edition: Edition) -> None:
        """Have its worker wait for the end of the round, and the coordinator be told once it is on disk."""
        self._receipt(peer, edition, "held")
        if edition not in self._written:
            self._written.append(edition)

    def _settle(self) -> None:
        """Tell of what is on disk now; nothing while the disk is full."""
        next_version = f"version {self._publisher.version + 1} is published"
        if not (self._written or self._merged) or not self._store.is_durable(
            next_version if self._merged else "contributions count"
        ):
            return
        written, self._written = self._written, []
        for edition in written:
            self._report(commit.Durable(edition=edition))
        merged, self._merged = self._merged, None
        if merged is not None:
            self._report(merged)

    def _receipt(self, peer: Peer, edition: Edition, status: Literal["held", "superseded"]) -> None:
        receipt = wire.Receipt(
            generation=self._generation,
            version=edition.version,
            stream=edition.stream,
            status=status,
            reason="",
        )
        self._endpoint.send(peer, wire.encode(receipt))


def _raise_generation(folder: Path, generation: int) -> None:
    """Have this generation be the newest of a holder's folder, durably.

    Raises:
        FencedError: a newer one is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / GENERATION
    if (newest := read_generation(path)) > generation:
        raise FencedError(f"generation {newest} of the server has taken this run over")
    durable.write(path, f"{generation}\n")
