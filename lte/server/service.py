"""The server: hears its workers, lets the rounds decide, merges, publishes, records, saves."""

from __future__ import annotations

import errno
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from lte import config, durable, schedule, signals, transport, wire
from lte.clock import Watch
from lte.compress import changes
from lte.config import Recipe
from lte.errors import FencedError, RunError, StoppedError, WireError
from lte.quantize import Quantized
from lte.server import assembly, commit, folder, recovery, rounds
from lte.server.admission import Complaints, Inquiries, Joins, not_vouched, vouched
from lte.server.checkpoint import Progress
from lte.server.diagnosis import Diagnosis
from lte.server.evaluation import Evaluate, Evaluation, Losses
from lte.server.intake import BEHIND_A_RELAY, OTHER_VERSION, Intake, Offered, objection, so_many
from lte.server.journal import Admitted, Gone
from lte.server.links import Links
from lte.server.master import Advance, Master, Outcome, Received
from lte.server.publisher import Publisher
from lte.server.shards import folder_of
from lte.server.status import Roll, in_words
from lte.server.store import Store
from lte.server.watch import Divergence, Outliers, Rise, typical
from lte.track import METRICS, Records, Tracker
from lte.transport import Frames, Peer, posted

_LONGEST_WAIT_S = 1.0
"""The service looks at clock and signals at least this often."""
_MOST_AT_ONCE = 1000
"""Messages heard before the clock is looked at: a flood must not stop it. Connections take turns, so
that the first messages of all honest ones are among them."""


@dataclass(frozen=True, kw_only=True)
class _Ahead:
    """A merge that is not published.

    Attributes:
        order: whose contributions, and which version they make; the other shards have it.
        held: the contributions, and the messages that they came with. staleness: in versions, of each.
        is_diagnosed: whether the round is to be measured. outcome, advance: of merging, of this shard.
        closed_s, merged_s, requantized_s: when the round was closed, and these were done.
        prepared: what the other shards say of theirs. is_decided: whether they have, all of them.
    """

    order: commit.Merge
    held: list[tuple[Received, wire.Contribution]]
    staleness: list[int]
    is_diagnosed: bool
    outcome: Outcome
    advance: Advance
    closed_s: float
    merged_s: float
    requantized_s: float
    prepared: Sequence[commit.Prepared] = ()
    is_decided: bool = False

    @property
    def messages(self) -> list[wire.Contribution]:
        return [message for _, message in self.held]

    def decided(self, prepared: Sequence[commit.Prepared]) -> _Ahead:
        """On disk everywhere else: from here on it stands."""
        outcome = assembly.outcome(self.outcome, prepared)
        return replace(self, prepared=prepared, outcome=outcome, is_decided=True)


class Server:
    """One run's parameter server.

    Constructing it binds the address, claims the run folder and, as `run.resume` says, takes up the
    run that it holds; `serve` then merges rounds until the last one or until it is stopped.

    Attributes:
        address: where workers connect. recipe: with the defaults filled in. master: the weights.
        folder: the run's. run_id: its name, whichever server serves it. stopped_by: number of the
            signal that stopped it, or 0.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        recipe: Recipe,
        *,
        evaluate: Evaluate | None = None,
        display: bool = True,
        announce: Callable[[str], None] | None = None,
        take_over: bool = False,
    ) -> None:
        """Bind and prepare.

        Args:
            model: the plain model with its initial weights, or a function that builds it.
            evaluate: measures the published and the master weights on validation data.
            display: show progress on standard output.
            announce: called with the address as soon as workers may connect to it.
            take_over: claim the run folder although another server has it, which is fenced: it can
                neither write nor move a worker any more.

        Raises:
            ConnectError: the address cannot be bound. KeysError: the files of server.key or
            server.allow cannot be used. RunError: the run folder is in use, holds
            another run, or holds none where one must be resumed. ConfigError: the recipe's
            patterns do not fit the model.
        """
        self.recipe = recipe = config.checked(recipe)
        self.folder = Path(recipe.run.dir)
        self.stopped_by = 0
        self._resources = ExitStack()
        self._stop_reason: str | None = None
        self._said = ""
        self._peers: dict[str, Peer] = {}
        # The contribution at hand, and with its bytes, until the rounds say whether it is kept; those kept.
        self._answered: wire.Contribution
        self._offered: Offered | None = None
        self._held: dict[str, tuple[Received, wire.Contribution]] = {}
        self._ahead: _Ahead | None = None
        # worker_id -> the attempt at which its last welcome was sent.
        self._attempts: dict[str, int] = {}
        self._merged_s: float | None = None
        # What is told to whoever asks how the run is; who does.
        self._roll, self._inquiries, self._asking = Roll(), Inquiries(), list[Peer]()
        # Of a divided model: which parts of contributions are durable; this shard's, until all are; the
        # last one of each worker that was refused.
        self._gathering = commit.Gathering(recipe.server.shards)
        self._parked: dict[str, tuple[Peer, Offered]] = {}
        self._refused: dict[str, commit.Edition] = {}
        try:
            claim = self._bind(model, take_over=take_over)
            if announce:
                announce(self.address)
            torch.set_num_threads(1)  # the master shares layers out among threads of its own
            self._build(model, evaluate)
            found, of_bases = self._recover()
            left_out = self._diagnosis.begin(found.progress.version)
            self._open(found.progress, display=display)
            self._take_up(found, of_bases)
            if not self.address.startswith("inprocess://"):
                posted.post(self.folder, self.address, recipe.server.host)
            claim.started()
        except BaseException:
            self._resources.close()
            raise
        self._published_s = self._now_s()
        self._event(
            "started",
            f"generation {self.generation} of the server at {self.address}",
            num_parameters=self.master.built.num_parameters,
            num_adapted_parameters=self.master.built.num_adapted_parameters,
        )
        for line in config.idle(recipe):
            self._event("idle", line)
        for fault in found.faults:
            self._event("damaged", fault)
        if left_out:
            self._event("diagnostics", left_out)

    def _bind(self, model: nn.Module | Callable[[], nn.Module], *, take_over: bool) -> folder.Claim:
        """Start the other shards, bind the address, claim the folder."""
        server = self.recipe.server
        self._links = Links(model, self.recipe, lambda: self._stop_reason is not None)
        self._resources.callback(self._links.close)
        self._endpoint = transport.bind(
            server.address,
            max_message_bytes=server.max_message_bytes,
            insecure=server.insecure,
            key=server.key,
            allow=server.allow,
        )
        self._resources.callback(self._endpoint.close)
        self.address = self._endpoint.address
        claim = folder.claim(self.folder, self.recipe, take_over=take_over)
        return self._resources.enter_context(claim)

    def _build(self, model: nn.Module | Callable[[], nn.Module], evaluate: Evaluate | None) -> None:
        """Make the master, or this shard's part of it, and what measures it."""
        model = (model if isinstance(model, nn.Module) else model()).eval()
        self._names = assembly.names(model, self.recipe)
        self.master = Master(model, self.recipe, self._names[0] if self._names else None)
        self._evaluation = Evaluation(
            model,
            self.master,
            evaluate,
            num_threads=self.recipe.server.num_threads,
            is_stopped=lambda: self._stop_reason is not None,
            fill_others=self._fill_others if self._links.num else None,
        )
        self._diagnosis = Diagnosis(self.folder, self.master)

    def _recover(self) -> tuple[recovery.Recovered, list[str]]:
        """Find the version that this shard and the others lead to.

        Returns:
            What was recovered here, and the digests of the others' bases.
        """
        # Raised before the journal is read: from here on nobody else adds to what counts of it.
        self.generation = folder.next_generation(self.folder)
        self.run_id = folder.run_id(self.folder)
        of_others = self._links.recover(self.generation, self.recipe.server.address)
        found = recovery.recover(self.folder, self.master, diagnosis=self._diagnosis)
        found.faults += [fault for other in of_others for fault in other.faults]
        version = commit.agreed([found.progress.version, *(other.version for other in of_others)])
        if found.progress.version != version:
            raise RunError(
                f"{self.folder}: its shards lead to version {version}, its own journal to"
                f" {found.progress.version}; what is missing in them is damaged or was deleted"
            )
        of_bases = self._links.begin(version)
        self._endpoint.watch(self._links.descriptors)
        return found, of_bases

    def _open(self, progress: Progress, *, display: bool) -> None:
        """Open what is written to, sent by and checked with."""
        recipe = self.recipe
        durable.write(self.folder / "config.yaml", config.to_yaml(recipe))
        tracker = Tracker(self.folder, recipe, version=progress.version, display=display)
        self._tracker = self._resources.enter_context(tracker)
        self._store = Store(
            self.folder,
            self.generation,
            config.to_dict(recipe),
            keep=recipe.server.keep_checkpoints,
            say=self._event,
        )
        self._resources.callback(self._store.close)
        self._publisher = Publisher(
            self._endpoint,
            self.master,
            recipe,
            generation=self.generation,
            version=progress.version,
            num_merged=progress.num_merged,
        )
        self._complain = Complaints(self._event)
        self._joins, self._outliers = Joins(recipe.server.max_workers), Outliers()
        self._intake = Intake(self.master, recipe, self._outliers)
        rise = recipe.server.diverging
        self._train_losses, self._eval_losses = Divergence(rise, window=3), Divergence(rise, window=2)
        # The rounds' clock: what passed while this server was stopped or busy is nobody's silence.
        self._watch = Watch(min(_LONGEST_WAIT_S, recipe.server.silence_s / 2), self._now_s)

    def _take_up(self, found: recovery.Recovered, of_bases: Sequence[str]) -> None:
        """Go on from what was recovered: its records, its workers, a journal and checkpoint of its own."""
        progress, recipe = found.progress, self.recipe
        recorded = set()
        for earlier in Records.read(self.folder / METRICS):
            if earlier["kind"] == "round":
                recorded.add(earlier["version"])
                self._train_losses.saw(earlier["version"], earlier.get("typical_loss"))
            elif earlier["kind"] == "eval":
                self._eval_losses.saw(earlier["version"], earlier["loss"])
        for line in found.rounds:  # of versions that a crash kept from the records
            if line["version"] not in recorded:
                lr = self._rate(line["version"], line.get("contributions", 0))
                self._tracker.record("round", **line, downlink_bytes=0, merge_s=0.0, wait_s=0.0, lr=lr)
            if measured := found.diagnostics.get(line["version"]):
                self._tracker.record("diagnostics", **measured)
        self._tokens = progress.tokens
        self._master_digest = self.master.master_digest()
        # worker_id -> the version that its last merged contribution is in, and which incarnation's it was.
        self._merged_in = dict(progress.merged_in)
        told = progress.told if recipe.merges_on_arrival else {}
        # Digests of the version that is published, and of those that members were told last.
        digest = " ".join([self._publisher.base_digest, *of_bases])
        self._digests = {**dict(told.values()), progress.version: digest}
        now_s = self._watch.now_s()
        members = {member.worker_id: recovery.member(member, now_s) for member in progress.members}
        self._state = rounds.resumed(
            rounds.State(
                rules=_rules(recipe),
                version=progress.version,
                num_merged=progress.num_merged,
                told={who: version for who, (version, _) in told.items() if who in members},
                members=members,
                known={member.worker_id: recovery.member(member, now_s) for member in progress.known},
                contributed=frozenset(progress.merged_in),
                next_incarnation=progress.next_incarnation,
            ),
            self._watch.now_s(),
        )
        self._store.begin(self._progress(), self.master.state(), found.follows)

    @property
    def version(self) -> int:
        """Merges done."""
        return self._state.version

    @property
    def finished(self) -> bool:
        """Whether the last round is merged."""
        return self._state.phase == "finished"

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.__exit__(kind, error, trace)

    # The loop: hear, let the rounds decide, act

    def serve(self) -> bool:
        """Serve until the last round is merged and measured, or `stop` is called.

        Returns:
            Whether the run is finished. Either way what was trained is saved.
        """
        if self.finished:  # the one before ended after its last merge and before its last line
            self._see_off()
            return self._finish()
        reason, returns = "the server failed", True
        try:
            while not self.finished and (self._stop_reason is None or self._is_merging):
                self._store.check_generation()
                self._publish_if_durable()
                self._say_waiting()
                received = self._endpoint.receive(self._patience_s())
                self._hear_shards()
                num_heard = 0
                while received is not None:  # all that has come: an evaluation made it wait, not silent
                    self._hear(*received)
                    num_heard += 1
                    enough = self.finished or self._stop_reason is not None or num_heard >= _MOST_AT_ONCE
                    received = None if enough else self._endpoint.receive(0)
                self._answer_inquiries()
                for notice in self._endpoint.notices():
                    self._complain("admission", notice)
                self._happened(rounds.Ticked())
            self._see_off()
            reason, returns = self._stop_reason or "the run is finished", self.stopped_by == signal.SIGUSR1
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # Whoever read the progress has gone (a pipe's reader, a terminal): as if by SIGPIPE, in order.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            reason, returns, self.stopped_by = "its output was closed", False, signal.SIGPIPE
        except FencedError:
            self._peers = {}  # they are another server's now
            raise
        finally:
            # A finished run needs its workers no more; with threads of this process no server comes back.
            is_apart = not self.address.startswith("inprocess://")
            returns = returns and is_apart and not self.finished
            self._broadcast(wire.encode(self._farewell(reason, returns=returns)))
        self._save()
        if self.finished:
            return self._finish()
        self._event("stopped", reason)
        return False

    def _see_off(self) -> None:
        """Hear the workers until all have gone: over a slow link the last update takes its time. Who
        stays longer than a round may take does not want to go."""
        ends_s = self._now_s() + self.recipe.server.deadline_s
        while self.finished and self._state.members and self._stop_reason is None and self._now_s() < ends_s:
            if received := self._endpoint.receive(self._patience_s()):
                self._hear(*received)
                self._answer_inquiries()
            self._hear_shards()
            self._happened(rounds.Ticked())

    def stop(self, reason: str) -> None:
        """Make `serve` save and return: an evaluation is given up, a merge under way is not. May be
        called from a signal handler or another thread."""
        self._stop_reason = reason

    def stop_on_signals(self) -> None:
        """Until it is closed, SIGINT, SIGTERM and SIGUSR1 stop the server; a SIGINT after one of them
        ends it at once."""

        def stop(number: int) -> None:
            self.stopped_by = number
            self.stop(f"stopped by {signal.Signals(number).name}")

        self._resources.enter_context(signals.told(stop))

    def _hear(self, peer: Peer, frames: Frames) -> None:
        """Turn a message into an event, having checked all that the rounds need not know of."""
        try:
            message, entries = wire.decode_from_worker(frames)
        except WireError as error:
            self._complain("malformed", f"a message was dropped: {error}")
            return
        sender, kind = self._endpoint.sender, type(message).__name__
        if (own := vouched(message, sender)) is None:
            reason, cure = not_vouched(sender)
            self._complain("refused", f"a {kind} was refused: {reason}")
            self._refuse(peer, reason, cure)
            return
        match message := own:
            case wire.Hello():
                self._hear_hello(peer, message)
            case wire.Part():
                self._hear_part(peer, message, frames, entries)
            case wire.Contribution():
                self._hear_contribution(peer, message)
            case wire.Heartbeat():
                # Of an earlier generation, too: incarnations are never handed out twice.
                self._happened(rounds.Heard(message.worker_id, message.incarnation), peer)
                if self._is_member(message.worker_id, message.incarnation) and not self._is_stale(
                    peer, message.generation
                ):
                    self._follow(peer, message.worker_id, message.incarnation)
                    self._roll.heard(
                        message.worker_id, message.version, message.local_step, self._endpoint.origin
                    )
                    # Who has missed an update asks for it; whom none was sent must not. A later version
                    # than was told is of the server before this one.
                    told = self._state.version_of(message.worker_id)
                    self._pulse(peer, message.number, told if message.version <= told else self.version)
                    if message.version == told and message.local_step == 0:
                        self._remind(peer, message.worker_id)
            case wire.Behind():
                if not self._is_stale(peer, message.generation):
                    self._happened(rounds.Heard(message.worker_id, message.incarnation), peer)
                    if self._is_member(message.worker_id, message.incarnation):
                        self._bring_up(peer, message.worker_id, message.version)
                        self._remind(peer, message.worker_id)
            case wire.Recall():
                if not self._is_stale(peer, message.generation):
                    self._happened(rounds.Heard(message.worker_id, message.incarnation), peer)
                    self._recall(peer, message.worker_id, message.incarnation)
            case wire.Leave():
                self._happened(rounds.Left(message.worker_id, message.incarnation, message.reason), peer)
            case wire.Inquiry():
                self._hear_inquiry(peer, message)

    def _hear_hello(self, peer: Peer, hello: wire.Hello) -> None:
        is_new = not rounds.is_member(self._state, hello.session)
        if self.finished and is_new:
            self._send(peer, self._farewell("the run is finished"))
            return
        plan, lora = self.master.built, self.recipe.as_built.lora
        refusal = objection(hello, plan, lora)
        if not refusal and self._links.num and self._endpoint.is_relayed:
            refusal = BEHIND_A_RELAY
        if not refusal and is_new and not self._joins.may(self._endpoint.sender, self._endpoint.key_owner):
            refusal = "too many workers have joined lately", "try again in a minute"
        if refusal:
            self._complain("refused", f"a worker was refused: {refusal[0]}")
            self._refuse(peer, *refusal)
            return
        self._hello = hello
        rank, heads = hello.rank or plan.rank, hello.heads or lora.heads
        joined = rounds.Joined(hello.worker_id, hello.session, heads, rank, hello.scale, hello.incarnation)
        self._happened(joined, peer)

    def _described(self, member: rounds.Member) -> dict[str, str]:
        """The model as a worker must have it."""
        own = self.master.built.capped(member.rank, member.scale)
        return own.describe(self.recipe.as_built.lora)

    def _hear_inquiry(self, peer: Peer, inquiry: wire.Inquiry) -> None:
        if not self._inquiries.may(self._endpoint.sender, self._endpoint.key_owner, self._now_s()):
            return
        if inquiry.schema != wire.SCHEMA:
            self._refuse(peer, *OTHER_VERSION)
        else:
            self._asking.append(peer)

    def _answer_inquiries(self) -> None:
        """Tell how the run is, once all that had come is heard: else living workers seem silent."""
        if self._asking:
            status = self._status()
            for peer in self._asking:
                self._send(peer, status)
            self._asking = []

    def _hear_part(
        self, peer: Peer, part: wire.Part, frames: Frames, entries: tuple[wire.TensorEntry, ...]
    ) -> None:
        """Stage a part of a contribution. Of what nobody waits for only the first part is answered."""
        member = self._state.members.get(part.worker_id)
        is_current = member is not None and member.incarnation == part.incarnation
        if part.index and not (is_current and part.generation == self.generation):
            return
        if self._is_stale(peer, part.generation):
            return
        self._happened(rounds.Heard(part.worker_id, part.incarnation), peer)
        if member is None or not is_current or not self._state.expects(part.worker_id, part.version):
            return
        self._publisher.count("uplink", self._intake.add(part, member, frames, entries))

    def _hear_contribution(self, peer: Peer, message: wire.Contribution) -> None:
        if self._is_stale(peer, message.generation):
            return
        member = self._state.members.get(message.worker_id)
        self._offered = None
        is_current = member is not None and member.incarnation == message.incarnation
        if is_current and self._state.awaits(message.worker_id, message.version):
            assert member is not None
            try:
                base_digest = self._digests[message.version].partition(" ")[0]  # of this shard's part
                self._offered = self._intake.close(message, member, base_digest)
            except WireError as error:
                self._refuse_contribution(peer, _edition(message), str(error))
                return
            if self._offered is None:
                return  # parts were lost: without a receipt they come again
            if self._links.num:
                self._parked[message.worker_id] = (peer, self._offered)
                self._receipt(peer, message, "held", "")
                self._is_durable_at(0, _edition(message))
                return
        self._answered = message
        event = rounds.Contributed(message.worker_id, message.incarnation, message.version)
        self._happened(event, peer)

    def _refuse_contribution(self, peer: Peer, edition: commit.Edition, reason: str) -> None:
        """Say so: to people once, whichever shards refuse it and how often it comes; to the worker each
        time, which may have missed it."""
        worker_id = edition.worker_id
        if not self._links.num or self._refused.get(worker_id) != edition:
            self._refused[worker_id] = edition
            self._complain("refused", f"a contribution of {worker_id} was refused: {reason}")
            self._outliers.started_over(worker_id)
        self._receipt(peer, edition, "refused", reason)

    def _hear_shards(self) -> None:
        """Hear what the holders have said unasked."""
        self._links.listen()
        while self._links.heard:
            shard, report = self._links.heard.popleft()
            match report:
                case commit.Durable(edition=edition):
                    self._is_durable_at(shard, edition)
                case commit.Refused(edition=edition, reason=reason):
                    peer = self._peers.get(edition.worker_id)
                    is_member = self._is_member(edition.worker_id, edition.incarnation)
                    if peer is not None and is_member and edition.version == self.version:
                        self._refuse_contribution(peer, edition, reason)
                case commit.Happened(what=what, message=message):
                    self._event(what, message)

    def _is_durable_at(self, shard: int, edition: commit.Edition) -> None:
        """A shard has its part of a contribution: it counts if all do."""
        worker_id, incarnation, version, _, _ = edition
        if version != self.version or not self._is_member(worker_id, incarnation):
            return
        if self._gathering.durable(shard, edition) and worker_id in self._parked:
            peer, self._offered = self._parked.pop(worker_id)
            self._answered = self._offered.message
            self._happened(rounds.Contributed(worker_id, incarnation, version), peer)

    def _is_stale(self, peer: Peer, generation: int) -> bool:
        if generation == self.generation:
            return False
        if generation > self.generation:
            self._store.check_generation()
        self._send(peer, wire.HelloAgain(generation=self.generation))
        return True

    def _happened(self, event: rounds.Event, peer: Peer | None = None) -> None:
        self._state, actions = rounds.step(self._state, event, self._watch.now_s())
        for action in actions:
            self._act(action, peer)

    def _act(self, action: rounds.Action, peer: Peer | None) -> None:
        match action:
            case rounds.Admit(member, again):
                assert peer is not None
                attempt = self._attempts.get(member.worker_id)
                if again and self._peers.get(member.worker_id) == peer and attempt == self._hello.attempt:
                    return  # its welcome is on the way, on this very connection
                self._attempts[member.worker_id] = self._hello.attempt
                self._pulse(peer, 0, self.version)  # so that a slow link does not look like no server
                if not again:
                    self._store.write(_admitted(member))
                    self._say_joined(member)
                # Else it asks again.
                may = not self._is_ahead and not self._links.silent
                if self._store.is_durable("who joins is welcomed") and may:
                    self._peers[member.worker_id] = peer
                    self._welcome(peer, member)
            case rounds.Open(worker_ids):
                for worker_id in worker_ids:
                    if worker_id in self._peers:  # else it will say Hello: this server was started anew
                        self._begin(self._peers[worker_id], worker_id)
            case rounds.Keep(worker_id):
                assert peer is not None
                assert self._offered is not None
                self._keep(self._offered)
                self._receipt(peer, self._offered.message, "held", "")
            case rounds.Drop(worker_id):
                del self._held[worker_id]
            case rounds.Renew(worker_id):
                assert peer is not None
                self._bring_up(peer, worker_id, self._state.version_of(worker_id))
                self._remind(peer, worker_id)
            case rounds.Answer(worker_id, status, reason):
                assert peer is not None
                self._receipt(peer, self._answered, status, reason)
                if status == "superseded" and not self.finished:
                    self._complain("superseded", f"{worker_id} came too late: {reason}", worker_id=worker_id)
            case rounds.Fence(worker_id, reason):
                assert peer is not None
                self._complain(
                    "fenced", f"a process of {worker_id} was fenced: {reason}", worker_id=worker_id
                )
                cure = "start it again if the newer one does not go on"
                self._refuse(peer, reason, cure)
            case rounds.Decline(reason):
                assert peer is not None
                self._complain("refused", f"a worker was refused: {reason}")
                cure = "try again when some have left, or raise server.max_workers"
                self._refuse(peer, reason, cure)
            case rounds.Ask(_):
                assert peer is not None
                self._send(peer, wire.HelloAgain(generation=self.generation))
            case rounds.Forget(member, reason):
                self._peers.pop(member.worker_id, None)
                self._roll.left(member, reason)
                self._intake.drop(member.worker_id)
                self._attempts.pop(member.worker_id, None)
                self._parked.pop(member.worker_id, None)
                self._gathering.drop(member.worker_id)
                self._links.tell(commit.Dismiss(worker_id=member.worker_id))
                self._store.write(Gone(incarnation=member.incarnation))
                if not self.finished:
                    self._event("left", f"{member.worker_id} is gone: {reason}", worker_id=member.worker_id)
            case rounds.Merge(worker_ids, num_missing_heads):
                self._merge(worker_ids, num_missing_heads)
        self._tracker.alive(len(self._state.members))

    # A round's end: collect, merge, publish, record

    def _merge(self, worker_ids: tuple[str, ...], num_missing_heads: int) -> None:
        """Merge, and have the journal say so; then publish, at once or when the disk has room again."""
        closed_s, on_arrival = self._now_s(), self.recipe.merges_on_arrival
        held, self._held = [self._held[worker_id] for worker_id in worker_ids], {}
        if not on_arrival:  # parts of what others send belong to the round that is over
            self._intake.clear()
        self._parked = {}
        self._gathering.clear()
        version, num_merged = self.version + 1, self._state.num_merged + len(held)
        self._tokens += sum(message.tokens for _, message in held)
        order = commit.Merge(
            version=version,
            incarnations=tuple(message.incarnation for _, message in held),
            num_missing_heads=num_missing_heads,
            remain=self._remaining(version, worker_ids),
            tokens=self._tokens,
            is_last=self.recipe.round_of(version, num_merged) >= self.recipe.train.rounds,
        )
        self._links.tell(order)
        staleness = [self.version - message.version for _, message in held]
        is_diagnosed = self._diagnosis.is_due(version)
        outcome = self.master.merge(
            [received for received, _ in held],
            num_missing_heads,
            staleness=staleness if on_arrival else None,
            keep_heads=is_diagnosed,
        )
        merged_s = self._now_s()
        advance = self.master.advance(version, order.remain, last=order.is_last)
        self._ahead = _Ahead(
            order=order,
            held=held,
            staleness=staleness,
            is_diagnosed=is_diagnosed,
            outcome=outcome,
            advance=advance,
            closed_s=closed_s,
            merged_s=merged_s,
            requantized_s=self._now_s(),
        )
        self._publish_if_durable()

    def _remaining(self, version: int, worker_ids: Sequence[str]) -> tuple[str, ...]:
        """Whose merged factors a version keeps: of those who contribute, are here, or were merged lately."""
        # A round's contributions that are merged on arrival make so many versions at most.
        most_versions = self.recipe.train.workers if self.recipe.merges_on_arrival else 1
        recent = version - self.recipe.server.remember_rounds * most_versions
        absent = {who for who, (merged_in, _) in self._merged_in.items() if merged_in > recent}
        return tuple(sorted(absent.union(self._state.members, worker_ids)))

    @property
    def _is_ahead(self) -> bool:
        """Whether the master is ahead of what is published."""
        return self._ahead is not None

    @property
    def _is_merging(self) -> bool:
        """Whether it is for a short time: not until somebody makes room on a disk."""
        return self._is_ahead and not self._full

    @property
    def _full(self) -> set[int]:
        """The shards whose disks have no room."""
        return self._links.full | ({0} if self._store.is_full else set())

    def _publish_if_durable(self) -> None:
        """Publish what was merged, if the journals hold it: all others' first, which decides it."""
        if self._ahead and not self._ahead.is_decided and self._links.are_prepared:
            self._ahead = ahead = self._ahead.decided(self._links.prepared())
            self._store.write(ahead.order.journaled(ahead.advance.master_digest, ahead.advance.base_digest))
        if (
            self._ahead
            and self._ahead.is_decided
            and self._store.is_durable(f"version {self.version + 1} is published")
        ):
            ahead, self._ahead = self._ahead, None
            self._publish(ahead)

    def _publish(self, ahead: _Ahead) -> None:
        """Tell workers of the next version, then the records, then see what is due."""
        journaled_s, order, advance = self._now_s(), ahead.order, ahead.advance
        merged_now = {m.worker_id: (order.version, m.incarnation) for m in ahead.messages}
        still_known = self._merged_in | merged_now
        self._merged_in = {who: last for who, last in still_known.items() if who in self._state.known}
        self._master_digest = advance.master_digest
        of_shards = (shard.base_digest for shard in ahead.prepared)
        self._digests[order.version] = " ".join([advance.base_digest, *of_shards])
        round_before, num_merged = self._round, self._state.num_merged + len(ahead.held)
        num_told, changed, published = self._tell_update(ahead)
        wait_s, self._published_s = ahead.closed_s - self._published_s, self._now_s()
        self._merged_s = self._published_s
        for message in ahead.messages:
            self._roll.merged(message, self.recipe.in_round(order.version - 1).train.local_steps)
        if self.recipe.compress.measure_entropy:
            changed |= _entropy(advance.before, self.master.base)
        self._happened(rounds.Merged())
        needed = {order.version, *self._state.told.values()}
        self._digests = {v: digest for v, digest in self._digests.items() if v in needed}
        on_arrival = self.recipe.merges_on_arrival
        typical_loss = self._record_round(
            ahead.messages,
            num_told,
            published,
            **changed,
            **(recovery.in_arrival(num_merged, ahead.staleness) if on_arrival else {}),
            merge_in_steps=ahead.outcome.in_steps,
            **self._held_down(ahead),
            merge_s=ahead.requantized_s - ahead.closed_s,
            requantize_s=ahead.requantized_s - ahead.merged_s,
            journal_s=journaled_s - ahead.requantized_s,
            pack_s=self._published_s - journaled_s,
            wait_s=wait_s,
        )
        # From here on the workers train already, on the version that was just published.
        if ahead.is_diagnosed:
            self._diagnose(ahead)
        self._look_back(round_before, typical_loss)

    def _tell_update(self, ahead: _Ahead) -> tuple[int, dict[str, float], list[commit.Published]]:
        """Send the next version to those who are to have it now.

        Returns:
            How many these are; what of the base changed; and what the other shards published.
        """
        order, told = ahead.order, dict(self._peers)
        on_arrival = self.recipe.merges_on_arrival
        if on_arrival and not order.is_last:  # others hear of it when they are done with what they have
            merged = {message.worker_id for message in ahead.messages}
            told = {who: peer for who, peer in told.items() if who in merged}
        self._links.tell(commit.Publish(told=tuple(told)))
        peers = [] if on_arrival else list(told.values())
        changed = self._publisher.publish(peers, ahead.advance, order.incarnations)
        published = self._links.published()
        if on_arrival:
            bases = {**self._state.told, **{message.worker_id: message.version for message in ahead.messages}}
            for who, peer in told.items():
                self._publisher.bring_up(peer, bases[who], self._merged_since(who, bases[who]))
        return len(told), assembly.changed(self.master, changed, published), published

    def _held_down(self, ahead: _Ahead) -> dict[str, Any]:
        """What the records say of robust merging."""
        if self.recipe.outer.bound_norm is None:
            return {}
        worker_ids, outcome = tuple(message.worker_id for message in ahead.messages), ahead.outcome
        for what, worker_id, words in self._outliers.saw(worker_ids, outcome.bounded, outcome.trimmed):
            self._event(what, words, worker_id=worker_id)
        return outcome.held_down

    def _keep(self, offered: Offered) -> None:
        """Hold a contribution, and write it ahead: it counts once a merge of it is in the journal."""
        received, message = offered.received, offered.message
        self._held[received.worker_id] = (received, message)
        self._links.tell(commit.Counted(worker_id=received.worker_id, incarnation=message.incarnation))
        self._store.write(offered.kept())

    def _record_round(
        self,
        merged: list[wire.Contribution],
        num_told: int,
        published: Sequence[commit.Published],
        **measured: Any,
    ) -> float | None:
        """Write the round's line. Returns the typical training loss."""
        losses = [message.loss for message in merged if message.loss is not None]
        uplink, downlink, by_kind = assembly.traffic(self._publisher.close_round(), published)
        bits = 8 / self.master.built.num_parameters
        train_loss, typical_loss = sum(losses) / len(losses) if losses else None, typical(losses)
        self._tracker.record(
            "round",
            version=self.version,
            tokens=self._tokens,
            train_loss=train_loss,
            typical_loss=typical_loss,
            num_merged=len(merged),
            num_told=num_told,
            uplink_bytes=uplink,
            downlink_bytes=downlink,
            **by_kind,
            uplink_bits=uplink * bits / len(merged),
            downlink_bits=downlink * bits / max(num_told, 1),
            lost=max(message.lost for message in merged),
            step_s=statistics.median(message.step_s for message in merged),
            encode_s=statistics.median(message.encode_s for message in merged),
            apply_s=statistics.median(message.apply_s for message in merged),
            lr=self._rate(self.version, self._state.num_merged),
            **measured,
        )
        return typical_loss

    def _diagnose(self, ahead: _Ahead) -> None:
        """Measure the round and record it, unless told to stop meanwhile. Before a checkpoint of it is
        written: a server that is started anew makes up for what is due since the last one."""
        line = self._diagnosis.measure(
            self.version,
            self._tokens,
            [received for received, _ in ahead.held],
            ahead.outcome.heads,
            ahead.advance.before,
            last=self.finished,
            is_stopped=lambda: self._stop_reason is not None,
        )
        if line is not None:
            self._tracker.record("diagnostics", **line)

    def _look_back(self, round_before: int, typical_loss: float | None) -> None:
        """See whether the run diverges, evaluate and save it, as it is time to.

        Args:
            round_before: how many rounds were done before the merge; on arrival it may end none, or some.
        """

        def is_due(every: int) -> bool:
            return self._round // every > round_before // every

        self._warn("training", self._train_losses.saw(self.version, typical_loss))
        every = self.recipe.eval.every
        if not self.finished and every and is_due(every):
            valid = self._measure(self.recipe.eval.tokens)
            self._warn("validation", self._eval_losses.saw(self.version, valid and valid.published))
        if self.finished or self._stop_reason is not None:
            return  # a checkpoint of the end follows
        if is_due(self.recipe.server.checkpoint_every):
            self._links.tell(commit.Save(is_awaited=False))
            self._store.save_meanwhile(self._progress(), self.master.state())

    def _warn(self, which: str, rise: Rise | None) -> None:
        """Say that a loss diverges, and the cure."""
        if rise is None or self.finished:
            return
        back_to = max(rise.version, self._store.oldest)
        self._event(
            "diverging",
            f"the {which} loss diverges: {rise.now:.3f}, after {rise.best:.3f} at version {rise.version}."
            f" To go back: stop, lte rollback {self.folder} --version {back_to}, go on with a lower rate",
        )

    @property
    def _round(self) -> int:
        """Rounds done."""
        return self.recipe.round_of(self.version, self._state.num_merged)

    def _rate(self, version: int, num_merged: int) -> float:
        """B's rate, or that of dense parameters where no head of a rank is trained, in the last local step
        before a version."""
        if self.recipe.merges_on_arrival:
            last_step = max(0, self.recipe.step_of(version, num_merged) - 1)
            number, last_step = divmod(last_step, self.recipe.train.local_steps)
        else:
            number, last_step = version - 1, self.recipe.in_round(version - 1).train.local_steps - 1
        has_heads = self.master.built.adapted and not self.recipe.in_round(number).train.full_rank
        peak = self.recipe.optimizer.lr if has_heads else self.recipe.optimizer.dense_lr
        return peak * schedule.factor_in(self.recipe, number, last_step)

    def _fill_others(self, model: nn.Module, which: str) -> None:
        """Have a plain model hold what the other shards do.

        Raises:
            StoppedError: told to stop before all had come.
        """
        assembly.fill_others(model, which, self.master.built, self._names, self._links.tensors)

    def _whole_digest(self) -> str:
        """Digest of the master, with all shards' parts.

        Raises:
            StoppedError: told to stop before all had come.
        """
        if not self._links.num:
            return self._master_digest
        digests = self._links.digests()
        return assembly.master_digest(self.master, self._names, digests, self._links.tensors)

    def _measure(self, max_tokens: int) -> Losses | None:
        """Measure the published model and the master, and record both; None if told to stop meanwhile."""
        losses = self._evaluation.losses(max_tokens)
        if losses and losses.published is not None:
            self._tracker.record(
                "eval",
                version=self.version,
                tokens=self._tokens,
                **losses.recorded(),
                **losses.extras,
            )
        return losses

    def _finish(self) -> bool:
        """Measure the result and write the last line of the records; False if told to stop before it:
        the next server does so then."""
        try:
            measured = self._measure(self.recipe.eval.final_tokens)
            digest = self._whole_digest() if measured else ""
        except StoppedError:
            measured = None
        if measured is None:
            self._event("stopped", f"{self._stop_reason} before the last evaluation was done")
            return False
        self._tracker.record(
            "done",
            rounds=self._round,
            version=self.version,
            tokens=self._tokens,
            workers=self.recipe.train.workers,
            num_parameters=self.master.built.num_parameters,
            num_adapted_parameters=self.master.built.num_adapted_parameters,
            uplink_bytes=self._tracker.uplink_bytes,
            downlink_bytes=self._tracker.downlink_bytes,
            **measured.recorded(),
            master_digest=digest,
        )
        return True

    # Messages out

    def _welcome(self, peer: Peer, member: rounds.Member) -> None:
        held = self._hello.version
        is_known = self._state.expects(member.worker_id, held) and held in self._digests
        of_others = self._links.admit(commit.Admit(worker=_admitted(member)))
        merged_digest = self.master.merged_digest(member.worker_id, member.heads, member.rank)
        if self._links.num:
            self._send(peer, self._links.placement(self.generation, self._names))
        welcome = wire.Welcome(
            run_id=self.run_id,
            generation=self.generation,
            worker_id=member.worker_id,
            incarnation=member.incarnation,
            slot=member.slot,
            version=self.version,
            settings=config.to_dict(self.recipe),
            model=self._described(member),
            holds=is_known and self._hello.base_digest == self._digests[held],
            merged_digest=" ".join([merged_digest, *of_others]),
        )
        self._send(peer, welcome)
        if not welcome.holds:
            merged = self._merged_since(member.worker_id, self._hello.version)
            self._links.tell(commit.SendWhole(worker_id=member.worker_id))
            self._publisher.send_whole(peer, merged)
            self._happened(rounds.Told(member.worker_id))

    def _recall(self, peer: Peer, worker_id: str, incarnation: int) -> None:
        """Send a member what is merged of it."""
        if self._is_member(worker_id, incarnation) and not self._is_ahead:  # else it asks again
            said = f"{worker_id} starts over from what was merged of it"
            self._complain("recalled", said, worker_id=worker_id)
            member = self._state.members[worker_id]
            merged = self.master.merged_of(worker_id, member.heads, member.rank)
            self._publisher.send_factors(peer, merged)

    def _bring_up(self, peer: Peer, worker_id: str, version: int) -> None:
        """Send the published version to a worker that holds an older one and missed what came since.

        Its contribution to the round on `version`, if that was merged, counts as merged in this update.
        """
        is_held = self.recipe.merges_on_arrival and worker_id in self._state.held  # an update follows it
        if version < self.version and not self._is_ahead and not is_held:
            self._publisher.bring_up(peer, version, self._merged_since(worker_id, version))
            self._happened(rounds.Told(worker_id))

    def _merged_since(self, worker_id: str, version: int) -> tuple[int, ...]:
        """The incarnation of the worker of which a contribution was merged last, if after this version."""
        merged_in, incarnation = self._merged_in.get(worker_id, (0, 0))
        return (incarnation,) if merged_in > version else ()

    def _farewell(self, reason: str, *, returns: bool = False) -> wire.Farewell:
        return wire.Farewell(
            generation=self.generation, reason=reason, finished=self.finished, returns=returns
        )

    def _pulse(self, peer: Peer, number: int, version: int) -> None:
        self._send(peer, wire.Pulse(generation=self.generation, number=number, version=version))

    def _begin(self, peer: Peer, worker_id: str) -> None:
        version = self._state.version_of(worker_id)
        self._send(peer, wire.Begin(generation=self.generation, version=version))

    def _is_member(self, worker_id: str, incarnation: int) -> bool:
        member = self._state.members.get(worker_id)
        return member is not None and member.incarnation == incarnation

    def _follow(self, peer: Peer, worker_id: str, incarnation: int) -> None:
        """Answer a worker where it was heard last: a broken connection comes back as another peer."""
        if self._is_member(worker_id, incarnation):
            self._peers[worker_id] = peer

    def _remind(self, peer: Peer, worker_id: str) -> None:
        """Tell a worker that the open round waits for it, in case it missed the word."""
        expected = self._state.expected - self._state.held
        if self._state.phase == "collecting" and worker_id in expected:
            self._begin(peer, worker_id)

    def _receipt(
        self,
        peer: Peer,
        contribution: wire.Contribution | commit.Edition,
        status: Literal["held", "superseded", "refused"],
        reason: str,
    ) -> None:
        receipt = wire.Receipt(
            generation=self.generation,
            version=contribution.version,
            stream=contribution.stream,
            status=status,
            reason=reason,
        )
        self._send(peer, receipt)

    def _refuse(self, peer: Peer, reason: str, cure: str) -> None:
        self._send(peer, wire.Refusal(generation=self.generation, reason=reason, cure=cure))

    def _send(self, peer: Peer, message: wire.AnyMessage) -> None:
        self._endpoint.send(peer, wire.encode(message))

    def _broadcast(self, frames: list[bytes | memoryview]) -> None:
        for peer in self._peers.values():
            self._endpoint.send(peer, frames)

    def _status(self) -> wire.Status:
        now_s, state, standing = self._watch.now_s(), self._state, self._tracker.standing
        silent_after_s = max(3 * self.recipe.heartbeat_s, self.recipe.server.silence_s / 3)
        is_undecided = self._ahead is not None and not self._ahead.is_decided
        merging = [f"shard {shard}" for shard in self._links.unprepared if is_undecided]
        words = self._hindrance() or (
            f"merging at {', '.join(merging)}" if merging else in_words(state, now_s)
        )
        return wire.Status(
            generation=self.generation,
            run_id=self.run_id,
            folder=str(self.folder),
            phase=state.phase,
            words=words,
            version=self.version,
            rounds=self.recipe.train.rounds,
            on_arrival=self.recipe.merges_on_arrival,
            local_steps=self.recipe.in_round(self.version).train.local_steps,
            train_loss=standing.train_loss,
            valid_loss=standing.valid_loss,
            tokens=self._tokens,
            tokens_per_s=standing.tokens_per_s,
            uplink_bytes=standing.uplink_bytes,
            downlink_bytes=standing.downlink_bytes,
            merged_s=None if self._merged_s is None else self._now_s() - self._merged_s,
            elapsed_s=standing.elapsed_s,
            left_s=standing.left_s,
            num_members=len(state.members),
            num_gone=len(state.known.keys() - state.members.keys()),
            workers=self._roll.workers(state, now_s, silent_after_s),
        )

    # Time, words, disk

    def _patience_s(self) -> float:
        deadline_s = rounds.next_deadline(self._state)
        if deadline_s is None:
            return self._watch.most_s
        return min(self._watch.most_s, max(0.0, deadline_s - self._watch.now_s()))

    def _now_s(self) -> float:
        return time.monotonic()

    def _say_waiting(self) -> None:
        members, needed = len(self._state.members), self._state.rules.workers
        said = ""
        if self._state.phase == "starting":
            said = f"waiting for workers: {members} of {needed}; {self._how_to_join()}"
        elif not members:
            said = f"all workers are gone; {self._how_to_join()} goes on"
        elif self._state.held == self._state.expected and self._state.phase == "collecting":
            held, quorum = len(self._state.held), self._state.rules.quorum
            said = f"{held} of a quorum of {quorum} contributions, and no more to come; {self._how_to_join()}"
        self._say(self._hindrance() or said)

    def _hindrance(self) -> str:
        """What keeps this server, or the others of a divided model, from going on; '' where nothing does."""
        if full := self._full:
            return f"waiting for room in {folder_of(self.folder, min(full))}"
        if silent := self._links.silent:
            return f"waiting for shard {silent[0]} of the server, which does not answer"
        return ""

    def _say(self, said: str) -> None:
        if said != self._said:
            self._said = said
            self._tracker.waiting(said)

    def _how_to_join(self) -> str:
        with_keys = " --key NAME.secret --server-key SERVER.public" if self.recipe.server.key else ""
        return f"lte worker --server {self.address}{with_keys}"

    def _say_joined(self, member: rounds.Member) -> None:
        who, own = member.worker_id, so_many(member.heads, member.rank, member.scale)
        usual = own == so_many(self.recipe.lora.heads, self.master.built.rank)
        said = f"{who} joined" if usual else f"{who} joined with {own}"
        self._event("joined", said, worker_id=who)
        if who in self.master.merged and not self.master.merged_of(who, member.heads, member.rank):
            self._event("reshaped", f"{who} had other heads before: {own} start anew", worker_id=who)

    def _event(self, what: str, message: str, **fields: Any) -> None:
        self._tracker.record("event", what=what, message=message, version=self.version, **fields)

    def _progress(self) -> Progress:
        return Progress(
            version=self.version,
            tokens=self._tokens,
            master_digest=self._master_digest,
            base_digest=self._publisher.base_digest,
            members=tuple(_admitted(member) for member in self._state.members.values()),
            known=tuple(_admitted(member) for member in self._state.known.values()),
            next_incarnation=self._state.next_incarnation,
            merged_in=dict(self._merged_in),
            num_merged=self._state.num_merged,
            told={who: (version, self._digests[version]) for who, version in self._state.told.items()},
        )

    def _save(self) -> None:
        """Write a checkpoint of a run that ends. Its workers go.

        A full disk is waited for, unless the server was told to stop: the journal holds what was merged.
        """
        for member in self._state.members.values():
            self._store.write(Gone(incarnation=member.incarnation))
        left = set(range(self._links.num + 1))
        while left := self._unsaved(left):
            if self._stop_reason is not None and not self._is_merging:
                full = folder_of(self.folder, min(self._full or left))
                self._event("unsaved", f"no room for a last checkpoint in {full}; free some and go on")
                return
            self._say(self._hindrance())
            self._endpoint.receive(_LONGEST_WAIT_S)

    def _unsaved(self, shards: set[int]) -> set[int]:
        """Have these shards write a checkpoint. Returns those of which none is there: there is no room for
        it, or the master is ahead of the version that it would be saved as."""
        self._hear_shards()
        self._publish_if_durable()
        if self._is_ahead:
            return shards
        self._links.save(shards - {0})
        own = replace(self._progress(), members=())
        is_full = 0 in shards and not self._store.save(own, self.master.state())
        left = self._links.unsaved(shards - {0})
        self._hear_shards()
        return left | {0} if is_full else left


def _admitted(member: rounds.Member) -> Admitted:
    return Admitted(
        worker_id=member.worker_id,
        session=member.session,
        incarnation=member.incarnation,
        slot=member.slot,
        heads=member.heads,
        rank=member.rank,
        scale=member.scale,
    )


def _edition(message: wire.Contribution) -> commit.Edition:
    return commit.Edition(
        message.worker_id, message.incarnation, message.version, message.stream, message.tokens
    )


def _entropy(before: Mapping[str, Quantized], now: Mapping[str, Quantized]) -> dict[str, float]:
    """`entropy_bytes`: the least that a change of the base can have (`compress.measure_entropy`)."""
    if changes.is_reformatted(before, now):
        return {}
    return {"entropy_bytes": sum(changes.entropy_bytes(before[name], base) for name, base in now.items())}


def _rules(recipe: Recipe) -> rounds.Rules:
    has_one_worker = recipe.lora.merge == "never" and not recipe.averages_factors
    return rounds.Rules(
        workers=recipe.train.workers,
        rounds=recipe.train.rounds,
        quorum=recipe.server.quorum,
        on_arrival=recipe.merges_on_arrival,
        max_staleness=recipe.outer.max_staleness,
        grace_s=recipe.grace_s,
        deadline_s=recipe.server.deadline_s,
        silence_s=recipe.server.silence_s,
        most_workers=1 if has_one_worker else recipe.server.max_workers,
    )
