"""The server: hears its workers, lets the rounds decide, merges, publishes, records, saves."""

from __future__ import annotations

import errno
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lte import config, schedule, transport, wire
from lte.compress import CODES, KINDS, SCALES, changes, kind_of
from lte.config import Recipe
from lte.errors import FencedError, WireError
from lte.nn import difference
from lte.quantize import Quantized
from lte.server import checkpoint, folder, recovery, rounds
from lte.server.admission import Complaints, vouched
from lte.server.checkpoint import Progress
from lte.server.journal import DISK_FULL, Admitted, Gone, Journal, Kept, Merged
from lte.server.master import Master, Received
from lte.track import METRICS, Records, Tracker
from lte.transport import Frames, Peer

Evaluate = Callable[[nn.Module, int], float | None]
"""(model in eval mode, most tokens to use or 0 for all) -> mean loss, or None where there is none."""

_WORKER_ID = re.compile(r"[\w.-]{0,64}", re.ASCII)
_LONGEST_WAIT_S = 1.0
"""The service looks at clock and signals at least this often."""


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
        recipe = config.checked(recipe)
        self.folder = Path(recipe.run.dir)
        self._resources = ExitStack()
        try:
            self._endpoint = transport.bind(
                recipe.server.address,
                max_message_bytes=recipe.server.max_message_bytes,
                insecure=recipe.server.insecure,
                key=recipe.server.key,
                allow=recipe.server.allow,
            )
            self._resources.callback(self._endpoint.close)
            self.address = self._endpoint.address
            self._resources.enter_context(folder.claim(self.folder, recipe, take_over=take_over))
            if announce:
                announce(self.address)
            torch.set_num_threads(1)  # the master shares layers out among threads of its own
            self.recipe = recipe
            self._evaluate = evaluate
            self._model = (model if isinstance(model, nn.Module) else model()).eval()
            self.master = Master(self._model, recipe)
            self._described = self.master.plan.describe(recipe.lora)
            # Raised before the journal is read: from here on nobody else adds to what counts of it.
            self.generation = folder.next_generation(self.folder)
            self.run_id = folder.run_id(self.folder)
            found = recovery.recover(self.folder, self.master)
            (self.folder / "config.yaml").write_text(config.to_yaml(recipe))
            tracker = Tracker(self.folder, recipe, version=found.progress.version, display=display)
            self._tracker = self._resources.enter_context(tracker)
            self._journal = Journal(self.folder, self.generation)
            self._resources.callback(self._journal.close)
            self._saving: Future[None] | None = None
            self._saver = ThreadPoolExecutor(1, thread_name_prefix="lte-checkpoint")
            self._resources.callback(self._saver.shutdown)
            self._complain = Complaints(self._event)
            self._take_up(found)
        except BaseException:
            self._resources.close()
            raise
        self._peers: dict[str, Peer] = {}
        # The contribution at hand, until the rounds say whether it is kept; and those kept.
        self._offered: tuple[Received, wire.Contribution] | None = None
        self._held: dict[str, tuple[Received, wire.Contribution]] = {}
        # The blobs of the contribution at hand, for the journal.
        self._offered_blobs: dict[str, Tensor] = {}
        # A merge that is not in the journal yet, and so not published: what is left to do then.
        self._unpublished: Callable[[], None] | None = None
        self._disk_is_full = False
        # Of the open round: parts that have come of contributions, by worker_id; bytes, by kind.
        self._staged: dict[str, wire.Assembly] = {}
        self._bytes, self._num_told, self._stream = _no_bytes(), 0, 0
        # worker_id -> the attempt at which its last welcome was sent.
        self._attempts: dict[str, int] = {}
        self._accounted_bytes = (0, 0)
        # The bytes of the last updates, each on the one before, for who is behind.
        self._history: deque[dict[str, Tensor]] = deque()
        self._whole_bytes = _size(self.master.snapshot())
        self._published_s = self._now_s()
        self._stop_reason: str | None = None
        self.stopped_by = 0
        self._said = ""
        self._event(
            "started",
            f"generation {self.generation} of the server at {self.address}",
            num_parameters=self.master.plan.num_parameters,
            num_adapted_parameters=self.master.plan.num_adapted_parameters,
        )
        for fault in found.faults:
            self._event("damaged", fault)

    def _take_up(self, found: recovery.Recovered) -> None:
        """Go on from what was recovered: its records, its workers, a journal and checkpoint of its own."""
        progress, recipe = found.progress, self.recipe
        told = {line["version"] for line in Records.read(self.folder / METRICS) if line["kind"] == "round"}
        for line in found.rounds:  # of versions that a crash kept from the records
            if line["version"] not in told:
                lr = self._rate(int(line["version"] or 0))
                self._tracker.record("round", **line, downlink_bytes=0, merge_s=0.0, wait_s=0.0, lr=lr)
        self._tokens = progress.tokens
        self._base_digest, self._master_digest = self.master.base_digest(), self.master.master_digest()
        # worker_id -> the version that its last merged contribution is in, and which incarnation's it was.
        self._merged_in = dict(progress.merged_in)
        members = {member.worker_id: _member(member, self._now_s()) for member in progress.members}
        self._state = rounds.resumed(
            rounds.State(
                rules=_rules(recipe),
                version=progress.version,
                members=members,
                known={member.worker_id: _member(member, self._now_s()) for member in progress.known},
                next_incarnation=progress.next_incarnation,
            ),
            self._now_s(),
        )
        self._write(self._progress(), self.master.state())
        self._journal.begin(self.version, config.to_dict(recipe), found.follows)

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
        """Serve until the last round is merged or `stop` is called.

        Returns:
            Whether the run is finished. Either way what was trained is saved.
        """
        if self.finished:  # ended after its last merge and before its last line
            self._finish()
            return True
        reason = "the server failed"
        try:
            while not self.finished and self._stop_reason is None:
                self._journal.check_generation()
                self._publish_if_durable()
                self._say_waiting()
                received = self._endpoint.receive(self._patience_s())
                while received is not None:  # all that has come: an evaluation made it wait, not silent
                    self._hear(*received)
                    received = None if self.finished else self._endpoint.receive(0)
                for notice in self._endpoint.notices():
                    self._complain("admission", notice)
                self._happened(rounds.Ticked())
            self._see_off()
            reason = self._stop_reason or "the run is finished"
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # Whoever read the progress has gone (a pipe's reader, a terminal): as if by SIGPIPE, in order.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            reason, self.stopped_by = "its output was closed", signal.SIGPIPE
        except FencedError:
            self._peers = {}  # they are another server's now
            raise
        finally:
            self._broadcast(wire.encode(self._farewell(reason)))
        self._save()
        if self.finished:
            self._finish()
        else:
            self._event("stopped", reason)
        return self.finished

    def _see_off(self) -> None:
        """Hear the workers until all have gone: over a slow link the last update takes its time."""
        while self.finished and self._state.members and self._stop_reason is None:
            if received := self._endpoint.receive(self._patience_s()):
                self._hear(*received)
            self._happened(rounds.Ticked())

    def stop(self, reason: str) -> None:
        """Make `serve` save and return; may be called from a signal handler or another thread."""
        self._stop_reason = reason

    def stop_on_signals(self) -> None:
        """SIGINT and SIGTERM stop the server, until it is closed; a second SIGINT ends it at once."""

        def handle(number: int, _: FrameType | None) -> None:
            if self._stop_reason is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stopped_by = number
            self.stop(f"stopped by {signal.Signals(number).name}")

        assert threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.signal(number, handle)
            self._resources.callback(signal.signal, number, previous or signal.SIG_DFL)

    def _hear(self, peer: Peer, frames: Frames) -> None:
        """Turn a message into an event, having checked all that the rounds need not know of."""
        try:
            message, entries = wire.decode(frames)
        except WireError as error:
            self._complain("malformed", f"a message was dropped: {error}")
            return
        sender, kind = self._endpoint.sender, type(message).__name__
        if (own := vouched(message, sender)) is None:
            reason = f"its key is {sender}'s, and it speaks as another worker"
            self._complain("refused", f"a {kind} was refused: {reason}")
            cure = f"join as {sender}, or by another key"
            self._send(peer, wire.Refusal(generation=self.generation, reason=reason, cure=cure))
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
                    self._pulse(peer, message.number)
                    if message.version == self.version and message.local_step == 0:
                        self._remind(peer, message.worker_id)
            case wire.Behind():
                if not self._is_stale(peer, message.generation):
                    self._happened(rounds.Heard(message.worker_id, message.incarnation), peer)
                    self._bring_up(peer, message.worker_id, message.version)
                    self._remind(peer, message.worker_id)
            case wire.Recall():
                if not self._is_stale(peer, message.generation):
                    self._happened(rounds.Heard(message.worker_id, message.incarnation), peer)
                    said = f"{message.worker_id} starts over from what was merged of it"
                    self._event("recalled", said, worker_id=message.worker_id)
                    self._send_factors(peer, message.worker_id)
            case wire.Leave():
                self._happened(rounds.Left(message.worker_id, message.incarnation, message.reason), peer)
            case _:
                self._complain("malformed", f"a {type(message).__name__} is not for the server")

    def _hear_hello(self, peer: Peer, hello: wire.Hello) -> None:
        if self.finished:
            self._send(peer, self._farewell("the run is finished"))
            return
        refusal = None
        if hello.schema != wire.SCHEMA:
            refusal = wire.Refusal(
                generation=self.generation,
                reason="it speaks another version of the protocol",
                cure="install the server's version of lte on every machine",
            )
        elif hello.model and (differs := difference(hello.model, self._described)):
            refusal = wire.Refusal(
                generation=self.generation,
                reason=f"it trains another model ({differs})",
                cure="use the server's recipe, or leave the recipe out to get it from the server",
            )
        elif self.master.plan.adapted and hello.heads not in (0, self.recipe.lora.heads):
            refusal = wire.Refusal(
                generation=self.generation,
                reason=f"it trains {hello.heads} heads, the server expects {self.recipe.lora.heads}",
                cure="convert its model with the server's lora.heads",
            )
        elif not _WORKER_ID.fullmatch(hello.worker_id):
            refusal = wire.Refusal(
                generation=self.generation,
                reason="its name is not of letters, digits, '.', '_' and '-', 64 at most",
                cure="choose another, or none to be given one",
            )
        if refusal is not None:
            self._complain("refused", f"a worker was refused: {refusal.reason}")
            self._send(peer, refusal)
            return
        self._hello = hello
        heads = self.recipe.lora.heads
        joined = rounds.Joined(hello.worker_id, hello.session, heads, hello.incarnation)
        self._happened(joined, peer)

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
        if member is None or not is_current or part.version != self.version:
            return
        staged = self._staged.get(part.worker_id)
        if staged is None or part.stream > staged.stream:
            most = self.master.max_contribution(member.heads)
            staged = self._staged[part.worker_id] = wire.Assembly(part.stream, part.version, most)
        if part.stream == staged.stream:
            self._count("uplink", staged.add(part, frames, entries))

    def _hear_contribution(self, peer: Peer, message: wire.Contribution) -> None:
        if self._is_stale(peer, message.generation):
            return
        member = self._state.members.get(message.worker_id)
        self._offered = None
        if member is not None and member.incarnation == message.incarnation:
            assembly = self._staged.get(message.worker_id)
            if assembly is None or assembly.stream != message.stream:
                assembly = wire.Assembly(message.stream, message.version)
            if message.version == self.version:
                tensors: dict[str, Tensor] = {}
                fault = self._fault_of(message, member)
                if not fault:
                    try:
                        blobs = assembly.close(message.parts)
                        if blobs is None:
                            return  # parts were lost: without a receipt they come again
                        self._staged.pop(message.worker_id, None)
                        tensors = self.master.decode(blobs, message.worker_id, member.heads)
                        self._offered_blobs = blobs
                    except WireError as error:
                        fault = str(error)
                if fault:
                    self._event("refused", f"a contribution of {message.worker_id} was refused: {fault}")
                    self._receipt(peer, message.version, "refused", fault)
                    return
                received = Received(
                    worker_id=message.worker_id,
                    heads=member.heads,
                    first_head=member.slot * member.heads,
                    draw=message.draw,
                    tokens=message.tokens,
                    tensors=tensors,
                )
                self._offered = (received, message)
        event = rounds.Contributed(message.worker_id, message.incarnation, message.version)
        self._happened(event, peer)

    def _fault_of(self, message: wire.Contribution, member: rounds.Member) -> str:
        """What is wrong with a contribution before its tensors are looked at, or ''."""
        if message.base_digest != self._base_digest:
            return f"its base is not bit for bit the published version {self.version}"
        if message.merged_digest != self.master.merged_digest(member.worker_id):
            return "it is encoded against merged factors that the server does not hold"
        if message.draw > message.version:
            return "it counts more draws of its A than there were merges"
        if self.recipe.outer.weights == "tokens" and not message.tokens:
            return "it counts no tokens, by which it would be weighted (worker.step(loss, tokens=...))"
        given = self.master.given_digest(member.slot * member.heads, member.heads, message.draw)
        if message.given_digest != given:
            return (
                "its A is not what the server draws from the seed; use lora.A=trained between such machines"
            )
        return ""

    def _is_stale(self, peer: Peer, generation: int) -> bool:
        if generation == self.generation:
            return False
        if generation > self.generation:
            self._journal.check_generation()
        self._send(peer, wire.HelloAgain(generation=self.generation))
        return True

    def _happened(self, event: rounds.Event, peer: Peer | None = None) -> None:
        self._state, actions = rounds.step(self._state, event, self._now_s())
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
                self._pulse(peer, number=0)  # so that a slow link does not look like no server
                if not again:
                    self._journal.write(_admitted(member))
                    self._event("joined", f"{member.worker_id} joined", worker_id=member.worker_id)
                if self._is_durable("who joins is welcomed"):  # else it asks again
                    self._peers[member.worker_id] = peer
                    self._welcome(peer, member)
            case rounds.Open(worker_ids):
                for worker_id in worker_ids:
                    if worker_id in self._peers:  # else it will say Hello: this server was started anew
                        begin = wire.Begin(generation=self.generation, version=self.version)
                        self._send(self._peers[worker_id], begin)
            case rounds.Keep(worker_id):
                assert peer is not None
                assert self._offered is not None
                self._held[worker_id] = self._offered
                self._journal_kept(worker_id)
                self._receipt(peer, self.version, "held", "")
            case rounds.Answer(worker_id, status, reason):
                assert peer is not None
                self._receipt(peer, self.version, status, reason)
                if status == "superseded":
                    self._event("superseded", f"{worker_id} came too late: {reason}", worker_id=worker_id)
            case rounds.Fence(worker_id, reason):
                assert peer is not None
                self._event("fenced", f"a process of {worker_id} was fenced: {reason}", worker_id=worker_id)
                cure = "start the worker again"
                self._send(peer, wire.Refusal(generation=self.generation, reason=reason, cure=cure))
            case rounds.Ask(_):
                assert peer is not None
                self._send(peer, wire.HelloAgain(generation=self.generation))
            case rounds.Forget(member, reason):
                self._peers.pop(member.worker_id, None)
                self._staged.pop(member.worker_id, None)
                self._journal.write(Gone(incarnation=member.incarnation))
                if not self.finished:
                    self._event("left", f"{member.worker_id} is gone: {reason}", worker_id=member.worker_id)
            case rounds.Merge(worker_ids, num_missing_heads):
                self._merge(worker_ids, num_missing_heads)
        self._tracker.alive(len(self._state.members))

    # A round's end: collect, merge, publish, record

    def _merge(self, worker_ids: tuple[str, ...], num_missing_heads: int) -> None:
        """Merge, and have the journal say so; then publish, at once or when the disk has room again."""
        closed_s = self._now_s()
        held = [self._held[worker_id] for worker_id in worker_ids]
        self._held, self._staged = {}, {}
        merge_in_steps = self.master.merge([received for received, _ in held], num_missing_heads)
        merged_s = self._now_s()
        before = self.master.requantize()
        dense = self.master.publish_dense()
        self._base_digest = self.master.base_digest()
        self._master_digest = self.master.master_digest()
        requantized_s = self._now_s()
        version = self.version + 1
        incarnations = [message.incarnation for _, message in held]
        recent = version - self.recipe.server.remember_rounds
        absent = {who for who, (merged_in, _) in self._merged_in.items() if merged_in > recent}
        remain = sorted(absent.union(self._state.members))
        self.master.keep_only(remain)
        self._tokens += sum(message.tokens for _, message in held)
        self._journal.write(
            Merged(
                version=version,
                incarnations=tuple(incarnations),
                num_missing_heads=num_missing_heads,
                remain=tuple(remain),
                tokens=self._tokens,
                master_digest=self._master_digest,
                base_digest=self._base_digest,
            )
        )

        def publish() -> None:
            journaled_s = self._now_s()
            self._merged_in |= {message.worker_id: (version, message.incarnation) for _, message in held}
            changed = self._publish(version, before, dense, incarnations)
            wait_s, self._published_s = closed_s - self._published_s, self._now_s()
            if self.recipe.compress.measure_entropy:
                pairs = ((before[name], now) for name, now in self.master.base.items())
                changed["entropy_bytes"] = sum(changes.entropy_bytes(*pair) for pair in pairs)
            self._happened(rounds.Merged())
            self._record_round(
                [message for _, message in held],
                **changed,
                merge_in_steps=merge_in_steps,
                merge_s=requantized_s - closed_s,
                requantize_s=requantized_s - merged_s,
                journal_s=journaled_s - requantized_s,
                pack_s=self._published_s - journaled_s,
                wait_s=wait_s,
            )

        self._unpublished = publish
        self._publish_if_durable()

    def _publish_if_durable(self) -> None:
        """Publish what was merged, if the journal holds it."""
        if self._unpublished and self._is_durable(f"version {self.version + 1} is published"):
            publish, self._unpublished = self._unpublished, None
            publish()

    def _is_durable(self, what_next: str) -> bool:
        """Whether all that the journal was told is on disk. A full disk is waited for, and said once."""
        try:
            self._journal.sync()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self._is_full(what_next)
            return False
        if self._disk_is_full:
            self._disk_is_full = False
            self._event("disk", f"{self._journal.folder} has room again")
        return True

    def _is_full(self, what_next: str) -> None:
        if not self._disk_is_full:
            self._disk_is_full = True
            self._event("disk", f"{self._journal.folder} has no room: {what_next} once it has")

    def _journal_kept(self, worker_id: str) -> None:
        """Write the contribution at hand ahead: it counts once a merge of it is in the journal."""
        received, message = self._held[worker_id]
        self._journal.write(
            Kept(
                version=message.version,
                worker_id=worker_id,
                incarnation=message.incarnation,
                heads=received.heads,
                first_head=received.first_head,
                draw=received.draw,
                tokens=received.tokens,
                loss=message.loss,
                blobs={name: blob.numpy().tobytes() for name, blob in self._offered_blobs.items()},
            )
        )
        self._offered_blobs = {}

    def _publish(
        self, version: int, before: dict[str, Quantized], dense: dict[str, Tensor], merged: list[int]
    ) -> dict[str, float]:
        """Send a new version to all, each layer as soon as it is encoded, and remember its bytes.

        Returns:
            `codes_changed` and `scales_changed`, the shares that did; `changes_bytes` of their change.
        """
        blobs: dict[str, Tensor] = {}
        codes = scales = num_bytes = 0

        def encoded() -> Iterator[tuple[str, Tensor]]:
            nonlocal codes, scales, num_bytes
            for name, change in self.master.changes_since(before):
                codes, scales = codes + change.codes_changed, scales + change.scales_changed
                num_bytes += change.codes.numel() + change.scales.numel()
                for ending, blob in ((CODES, change.codes), (SCALES, change.scales)):
                    blobs[name + ending] = blob
                    yield name + ending, blob
            blobs.update(dense)
            yield from dense.items()

        self._num_told = len(self._peers)
        self._send_update(list(self._peers.values()), version, self.version, encoded(), merged)
        self._history.append(blobs)
        # More of them would be no smaller than the whole model.
        while sum(map(_size, self._history)) > self._whole_bytes:
            self._history.popleft()
        num_scales = sum(base.scales.numel() for base in self.master.base.values())
        return {
            "codes_changed": codes / max(self.master.plan.num_adapted_parameters, 1),
            "scales_changed": scales / max(num_scales, 1),
            "changes_bytes": num_bytes,
        }

    def _send_update(
        self,
        peers: Sequence[Peer],
        version: int,
        since: int | None,
        blobs: Iterable[tuple[str, Tensor]],
        merged: Sequence[int],
    ) -> None:
        """Send an update to these peers in parts, then the message that closes them."""

        stream, num_parts = self._send_parts(peers, version, blobs)
        update = wire.Update(
            generation=self.generation,
            version=version,
            since=since,
            stream=stream,
            parts=num_parts,
            merged=tuple(merged),
            base_digest=self._base_digest,
            last=version >= self.recipe.train.rounds,
        )
        for peer in peers:
            self._send(peer, update)

    def _send_factors(self, peer: Peer, worker_id: str) -> None:
        """Send what is merged of a worker."""
        merged = self.master.merged.get(worker_id, {})
        blobs = ((name, tensor.reshape(-1).view(torch.uint8)) for name, tensor in merged.items())
        stream, num_parts = self._send_parts([peer], self.version, blobs)
        factors = wire.Factors(
            generation=self.generation, version=self.version, stream=stream, parts=num_parts
        )
        self._send(peer, factors)

    def _send_parts(
        self, peers: Sequence[Peer], version: int, blobs: Iterable[tuple[str, Tensor]]
    ) -> tuple[int, int]:
        """Send named bytes in parts, each as soon as it is full. Returns the stream and how many."""
        self._stream += 1
        stream = self._stream

        def part(index: int) -> wire.Part:
            return wire.Part(
                generation=self.generation,
                worker_id="",
                incarnation=0,
                version=version,
                stream=stream,
                index=index,
            )

        num_parts = 0
        for frames, sizes in wire.in_parts(blobs, self.recipe.compress.part_bytes, part):
            num_parts += 1
            for peer in peers:
                sent_bytes = self._endpoint.sent_bytes
                self._endpoint.send(peer, frames)
                if self._endpoint.sent_bytes > sent_bytes:  # not to one that is gone
                    self._count("downlink", sizes)
        return stream, num_parts

    def _count(self, direction: str, sizes: Mapping[str, int]) -> None:
        """Add to the bytes of this round, by direction and kind. Factors that are recalled are control."""
        for name, num_bytes in sizes.items():
            if (kind := f"{direction}_{kind_of(name)}_bytes") in self._bytes:
                self._bytes[kind] += num_bytes

    def _record_round(self, contributions: list[wire.Contribution], **measured: float) -> None:
        losses = [message.loss for message in contributions if message.loss is not None]
        bytes_now = (self._endpoint.received_bytes, self._endpoint.sent_bytes)
        uplink, downlink = (
            now - before for now, before in zip(bytes_now, self._accounted_bytes, strict=True)
        )
        self._accounted_bytes = bytes_now
        by_kind, self._bytes = self._bytes, _no_bytes()
        for direction, total in (("uplink", uplink), ("downlink", downlink)):
            known = sum(n for key, n in by_kind.items() if key.startswith(direction))
            by_kind[f"{direction}_control_bytes"] = total - known
        bits = 8 / self.master.plan.num_parameters
        self._tracker.record(
            "round",
            version=self.version,
            tokens=self._tokens,
            train_loss=sum(losses) / len(losses) if losses else None,
            num_merged=len(contributions),
            num_told=self._num_told,
            uplink_bytes=uplink,
            downlink_bytes=downlink,
            **by_kind,
            uplink_bits=uplink * bits / len(contributions),
            downlink_bits=downlink * bits / max(self._num_told, 1),
            lost=max(message.lost for message in contributions),
            step_s=statistics.median(message.step_s for message in contributions),
            encode_s=statistics.median(message.encode_s for message in contributions),
            apply_s=statistics.median(message.apply_s for message in contributions),
            lr=self._rate(self.version),
            **measured,
        )
        # From here on the workers train already, on the version that was just published.
        every = self.recipe.eval.every
        if not self.finished and every and self.version % every == 0:
            self._measure(self.recipe.eval.tokens)
        if not self.finished and self.version % self.recipe.server.checkpoint_every == 0:
            self._save_meanwhile()

    def _rate(self, version: int) -> float:
        """Learning rate of the last local step before a version."""
        step = version * self.recipe.train.local_steps - 1
        return self.recipe.optimizer.lr * schedule.factor(self.recipe.schedule, step, self.recipe.total_steps)

    def _measure(self, max_tokens: int) -> tuple[float | None, float | None]:
        """Evaluate the published model and the master, and record both."""
        if self._evaluate is None:
            return None, None
        losses = []
        torch.set_num_threads(self.recipe.server.num_threads)
        for which in ("published", "master"):
            self.master.fill(self._model, which)
            with torch.no_grad():
                losses.append(self._evaluate(self._model, max_tokens))
        torch.set_num_threads(1)
        self._tracker.record(
            "eval", version=self.version, tokens=self._tokens, loss=losses[0], loss_master=losses[1]
        )
        return losses[0], losses[1]

    def _finish(self) -> None:
        loss, loss_master = self._measure(self.recipe.eval.final_tokens)
        self._tracker.record(
            "done",
            rounds=self.version,
            tokens=self._tokens,
            workers=self.recipe.train.workers,
            num_parameters=self.master.plan.num_parameters,
            num_adapted_parameters=self.master.plan.num_adapted_parameters,
            uplink_bytes=self._tracker.uplink_bytes,
            downlink_bytes=self._tracker.downlink_bytes,
            loss=loss,
            loss_master=loss_master,
            master_digest=self._master_digest,
        )

    # Messages out

    def _welcome(self, peer: Peer, member: rounds.Member) -> None:
        welcome = wire.Welcome(
            run_id=self.run_id,
            generation=self.generation,
            worker_id=member.worker_id,
            incarnation=member.incarnation,
            slot=member.slot,
            version=self.version,
            settings=config.to_dict(self.recipe),
            model=self._described,
            holds=(self._hello.version, self._hello.base_digest) == (self.version, self._base_digest),
            merged_digest=self.master.merged_digest(member.worker_id),
        )
        self._send(peer, welcome)
        if not welcome.holds:
            merged = self._merged_since(member.worker_id, self._hello.version)
            self._send_update([peer], self.version, None, self.master.snapshot().items(), merged)

    def _bring_up(self, peer: Peer, worker_id: str, version: int) -> None:
        """Send the published version to a worker that holds an older one and missed what came since:
        the changes folded into one, or the whole model where that is smaller.

        Its contribution to the round on `version`, if that was merged, counts as merged in this update.
        """
        behind = self.version - version
        if behind <= 0:
            return
        blobs, since = self.master.snapshot(), None
        if behind <= len(self._history):
            folded = self._folded(behind)
            if folded is not None and _size(folded) < _size(blobs):
                blobs, since = folded, version
        merged = self._merged_since(worker_id, version)
        self._send_update([peer], self.version, since, blobs.items(), merged)

    def _merged_since(self, worker_id: str, version: int) -> tuple[int, ...]:
        """The incarnation of the worker of which a contribution was merged last, if after this version."""
        merged_in, incarnation = self._merged_in.get(worker_id, (0, 0))
        return (incarnation,) if merged_in > version else ()

    def _folded(self, behind: int) -> dict[str, Tensor] | None:
        """The last changes as one, or None where one of them was so large that it came in full."""
        try:
            return self.master.folded(list(self._history)[-behind:])
        except ValueError:
            return None

    def _farewell(self, reason: str) -> wire.Farewell:
        return wire.Farewell(generation=self.generation, reason=reason, finished=self.finished)

    def _pulse(self, peer: Peer, number: int) -> None:
        self._send(peer, wire.Pulse(generation=self.generation, number=number, version=self.version))

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
            self._send(peer, wire.Begin(generation=self.generation, version=self.version))

    def _receipt(
        self, peer: Peer, version: int, status: Literal["held", "superseded", "refused"], reason: str
    ) -> None:
        receipt = wire.Receipt(generation=self.generation, version=version, status=status, reason=reason)
        self._send(peer, receipt)

    def _send(self, peer: Peer, message: wire.AnyMessage) -> None:
        self._endpoint.send(peer, wire.encode(message))

    def _broadcast(self, frames: list[bytes | memoryview]) -> None:
        for peer in self._peers.values():
            self._endpoint.send(peer, frames)

    # Time, words, disk

    def _patience_s(self) -> float:
        deadline_s = rounds.next_deadline(self._state)
        if deadline_s is None:
            return _LONGEST_WAIT_S
        return min(_LONGEST_WAIT_S, max(0.0, deadline_s - self._now_s()))

    def _now_s(self) -> float:
        return time.monotonic()

    def _say_waiting(self) -> None:
        members, needed = len(self._state.members), self._state.rules.workers
        said = ""
        if self._state.phase == "starting":
            said = f"waiting for workers: {members} of {needed}; {self._how_to_join()}"
        elif not members:
            said = f"all workers are gone; {self._how_to_join()} goes on"
        if self._disk_is_full:
            said = f"waiting for room in {self._journal.folder}"
        if said != self._said:
            self._said = said
            self._tracker.waiting(said)

    def _how_to_join(self) -> str:
        with_keys = " --key NAME.secret --server-key SERVER.public" if self.recipe.server.key else ""
        return f"lte worker --server {self.address}{with_keys}"

    def _event(self, what: str, message: str, **fields: Any) -> None:
        self._tracker.record("event", what=what, message=message, version=self.version, **fields)

    def _progress(self) -> Progress:
        return Progress(
            version=self.version,
            tokens=self._tokens,
            master_digest=self._master_digest,
            base_digest=self._base_digest,
            members=tuple(_admitted(member) for member in self._state.members.values()),
            known=tuple(_admitted(member) for member in self._state.known.values()),
            next_incarnation=self._state.next_incarnation,
            merged_in=dict(self._merged_in),
        )

    def _save(self) -> None:
        """Write a checkpoint of a run that ends, after the one that is being written. Its workers go.

        A full disk is waited for, unless the server was told to stop: the journal holds what was merged.
        """
        if self._saving is not None:
            self._saving.exception()
        for member in self._state.members.values():
            self._journal.write(Gone(incarnation=member.incarnation))
        while True:
            try:
                self._publish_if_durable()  # else the master would be ahead of the version it is saved as
                self._journal.begin(self.version, config.to_dict(self.recipe))
                self._write(replace(self._progress(), members=()), self.master.state())
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                if self._stop_reason is not None:
                    self._event(
                        "unsaved", f"no room for a last checkpoint in {self.folder}; free some and go on"
                    )
                    return
                self._is_full("the last checkpoint is written")
                self._endpoint.receive(_LONGEST_WAIT_S)
            else:
                self._is_durable("")
                return

    def _save_meanwhile(self) -> None:
        """Have a checkpoint written while the rounds go on, unless one is being written. What comes
        after it goes to a new segment of the journal."""
        if self._saving is not None:
            if not self._saving.done():
                return
            if error := self._saving.exception():
                self._event("unsaved", f"the last checkpoint could not be written: {error}")
        try:
            self._journal.begin(self.version, config.to_dict(self.recipe))
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self._is_full("the next checkpoint is written")
            return
        self._saving = self._saver.submit(self._write, self._progress(), self.master.state())

    def _write(self, progress: Progress, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        saved = self.folder / "checkpoints"
        checkpoint.save(saved, progress, state, keep=self.recipe.server.keep_checkpoints)
        self._journal.prune(checkpoint.version_of(checkpoint.versions(saved)[0]))


def _member(admitted: Admitted, now_s: float) -> rounds.Member:
    return rounds.Member(
        worker_id=admitted.worker_id,
        session=admitted.session,
        incarnation=admitted.incarnation,
        slot=admitted.slot,
        heads=admitted.heads,
        heard_s=now_s,
    )


def _admitted(member: rounds.Member) -> Admitted:
    return Admitted(
        worker_id=member.worker_id,
        session=member.session,
        incarnation=member.incarnation,
        slot=member.slot,
        heads=member.heads,
    )


def _rules(recipe: Recipe) -> rounds.Rules:
    return rounds.Rules(
        workers=recipe.train.workers,
        rounds=recipe.train.rounds,
        quorum=recipe.server.quorum,
        grace_s=recipe.server.grace_s,
        deadline_s=recipe.server.deadline_s,
        silence_s=recipe.server.silence_s,
    )


def _size(blobs: Mapping[str, Tensor]) -> int:
    return sum(blob.numel() for blob in blobs.values())


def _no_bytes() -> dict[str, int]:
    """Bytes by direction and kind, none yet."""
    up, down = KINDS[:2], KINDS[1:]
    return {f"uplink_{kind}_bytes": 0 for kind in up} | {f"downlink_{kind}_bytes": 0 for kind in down}
