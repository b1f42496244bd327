"""The worker's side of the protocol: joining, signs of life, contributions out, updates in."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec
from torch import Tensor

from lte import config, wire
from lte.clock import Watch
from lte.compress.shards import Shards
from lte.errors import (
    AbsentError,
    ConnectError,
    JoinAnewError,
    RefusedError,
    RunEnded,
    StoppedError,
    WireError,
)
from lte.worker import state
from lte.worker.ends import Ends
from lte.worker.staging import Staging

_ASK_AGAIN_S = 3.0
"""A Hello without an answer is sent again after this: no server may have been there."""
_STALLED_S = 60.0
"""A welcome of which nothing more comes for so long is asked for once more, from its start."""
_WELCOME_S = 600.0
"""How long a welcome, which holds the model, may take to arrive once the server was heard."""
_LOOK_UP_S = 1.0
"""How often a waiting worker looks whether its patience is at its end."""
_UNHEARD_S = 5.0
"""A server that is not heard for so long is spoken of; three heartbeats at least, which it answers."""
_LONG_S = 60.0
"""A wait for others, who make no version, that is spoken of."""
_OF_THE_START = (
    "run.resume:",
    "server.address:",
    "server.host:",
    "server.place:",
    "server.key:",
    "server.allow:",
)
"""Settings in which a server may differ from the one before: they say how and where it is started."""

Named = TypeVar("Named", wire.Heartbeat, wire.Part, wire.Behind, wire.Recall, wire.Leave)
Step = wire.Begin | wire.Update | wire.Receipt | wire.Factors
"""What a worker waits for."""


def parting_words(kind: type[BaseException] | None, error: BaseException | None) -> str:
    """What a worker that ends by this exception, or by none, tells the server."""
    if kind is None:
        return "finished"
    return "interrupted" if issubclass(kind, KeyboardInterrupt) else f"{kind.__name__}: {error}"


class _Patience:
    """How long one wait may take, and what a person is told meanwhile."""

    def __init__(self, patience_s: float, unheard_s: float, say: Callable[[str], None]) -> None:
        """Begin to wait.

        Args:
            patience_s: for a server that is not heard. unheard_s: after which that is said.
        """
        self._patience_s, self._unheard_s, self._say = patience_s, unheard_s, say
        self._watch = Watch(_LOOK_UP_S)
        self._began_s = self._watch.now_s()
        self._is_long = False
        # When each shard was heard last, or first waited for; those of which it was said that they are not.
        self._heard_s, self._unheard = {0: self._began_s}, set[int]()

    def heard(self, shard: int) -> None:
        now_s = self._watch.now_s()
        if shard in self._unheard:
            silent_s = now_s - self._heard_s[shard]
            self._say(f"{_server(shard)} is heard again, after {silent_s:.0f} s")
            if not shard:  # the others were away with it
                self._heard_s = dict.fromkeys(self._heard_s, now_s)
        if now_s - self._began_s > _LONG_S and not self._is_long:
            self._say("still waiting for the others: the server lives, and has no new version yet")
            self._is_long = True
        self._heard_s[shard] = now_s
        self._unheard.discard(shard)

    def look(self, num_shards: int) -> None:
        """See who of so many shards is not heard.

        Raises:
            RunEnded: one is not, for too long.
        """
        now_s = self._watch.now_s()
        for shard in range(num_shards):
            silent_s = now_s - self._heard_s.setdefault(shard, now_s)
            # The first ends a run in which it does not hear another, and says so: it is given the time.
            patience_s = 2 * self._patience_s if shard else self._patience_s
            if silent_s > patience_s:
                raise RunEnded(f"{_server(shard)} was not heard for {patience_s:g} s", finished=False)
            if silent_s > self._unheard_s and not self._unheard & {0, shard}:
                self._unheard.add(shard)
                self._say(f"{_server(shard)} is not heard; waiting for it, {patience_s:g} s at most")


def _server(shard: int) -> str:
    return f"shard {shard} of the server" if shard else "the server"


class Session:
    """One worker's conversation with its server.

    Attributes:
        welcome: what the server said, at the start or when it was started anew.
        base: the bytes of the whole model that came with it. base_digest: of what the worker holds.
        step: local steps that the run has come to with that model.
        merged: incarnations of this worker's name whose contribution to the version that it said it
            had pushed to, or a later one, is in that model.
        scale: lora_scale of this worker's heads; 0: the recipe's.
        shards: which of the run's servers has what of the model. whole: those of them whose part of the
            last update was whole.
        folder: of this worker's state, or None. saved: what an earlier process left there, or None.
        num_damaged: messages that could not be read.
    """

    def __init__(
        self,
        address: str,
        *,
        worker_id: str = "",
        model: Mapping[str, str] | None = None,
        heads: int = 0,
        rank: int = 0,
        scale: float = 0.0,
        folder: str | Path | None = None,
        wait_s: float = 30.0,
        key: str | Path | None = None,
        server_key: str | Path | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """Join. Blocks until the server welcomed or refused this worker.

        Args:
            worker_id: a name to join by, or "" to be given one.
            model: description of a model built before joining (`nn.Plan.describe`). heads, rank: how
                many heads it trains, and the largest lora_rank of them; scale: their lora_scale. 0: the
                recipe's.
            folder: where this worker keeps its state; see `Worker`.
            wait_s: how long to look for a server.
            key, server_key: files of keys, for a server that has some (see `transport.connect`).
            say: told, in a line, when the server is not heard for long, and when it is again.

        Raises:
            ConnectError: no server answered within `wait_s`, keys do not fit, or of a run's servers
            (`server.shards`) one is not reached. KeysError: the files of keys cannot be used.
            RefusedError: the server refused this worker. RunError: the state in the folder is damaged.
        """
        self.folder = None if folder is None else Path(folder)
        self.saved: state.Saved | None = None
        version = self._read_state()
        self._ends = Ends(address, key=key, server_key=server_key)
        self._address, self._say, self.scale = address, say, scale
        self._progress = (0, 0)
        # A contribution until a version that follows it: its blobs and the message that closes them; the
        # shards whose receipts are due, and the last heartbeat that was sent before its part to each.
        self._pushed: tuple[dict[str, Tensor], wire.Contribution] | None = None
        # Whether the round that it is for was not open, or not for this worker; it may be opened yet.
        self._unanswered, self._came_too_early = set[int](), False
        self._pushed_after: dict[int, int] = {}
        self._number = self._stream = 0
        # When this worker last said Hello to a server that was started anew; None: it is welcome.
        self._asked_s: float | None = None
        # The last heartbeat before merged factors were asked for, of each shard until these come.
        self._recalled_after: dict[int, int] = {}
        # The last heartbeat before an update was asked for: what answers it or an earlier one is older.
        self._asked_after: dict[int, int] = {}
        self._place(Shards())
        self.num_damaged = 0
        self._is_welcome = False
        self._told_to_stop = False
        self._beating = threading.Lock()
        self._stopping = threading.Event()
        self._heartbeats: threading.Thread | None = None
        self._hello = wire.Hello(
            schema=wire.SCHEMA,
            worker_id=worker_id,
            session=secrets.token_hex(8),
            model=dict(model or {}),
            heads=heads,
            rank=rank,
            scale=scale,
            version=version,
        )
        try:
            self._join(wait_s)
        except BaseException as error:
            if self._is_welcome:  # who did not get to its place leaves it
                self._say_leave(parting_words(type(error), error))
            self._ends.close()
            raise
        recipe = config.from_dict(self.welcome.settings)
        interval_s, self._patience_s = recipe.heartbeat_s, recipe.worker.patience_s
        self._unheard_s = max(_UNHEARD_S, 3 * interval_s)
        self._heartbeats = threading.Thread(
            target=self._beat, args=(interval_s,), name="lte-heartbeat", daemon=True
        )
        self._heartbeats.start()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(parting_words(kind, error))

    def progress(self, version: int, local_step: int) -> None:
        """What the next heartbeat says about how far this worker is."""
        self._progress = (version, local_step)

    def push(
        self,
        version: int,
        blobs: Iterable[tuple[str, Tensor]],
        close: Callable[[int, dict[str, Tensor]], wire.Contribution],
    ) -> None:
        """Send a contribution, in parts as they are made; `next_step` sends it again if it was lost.

        Args:
            version: on which it was trained. close: makes its message, given the number of parts and
                all blobs; nothing counts as sent before it returns.
        """
        kept: dict[str, Tensor] = {}

        def keeping() -> Iterator[tuple[str, Tensor]]:
            for name, blob in blobs:
                kept[name] = blob
                yield name, blob

        self._stream += 1
        if self.shards.num == 1:
            num_parts = [self._send_parts(keeping(), version)]
        else:
            parts = self.shards.split(keeping())
            num_parts = [self._send_parts(part.items(), version, k) for k, part in enumerate(parts)]
        self._pushed = kept, close(num_parts[0], kept)
        for k, num in enumerate(num_parts):
            self._close_parts(num, k)  # not before `close` has returned

    def _send_parts(self, blobs: Iterable[tuple[str, Tensor]], version: int, shard: int = 0) -> int:
        """Send them to a shard, as its part of the stream at hand. Returns how many parts there were."""
        part_bytes, num_parts = int(self.welcome.settings["compress"]["part_bytes"]), 0

        def part(index: int) -> wire.Part:
            return self._named(wire.Part, version=version, stream=self._stream, index=index)

        for frames, _ in wire.in_parts(blobs, part_bytes, part):
            self._ends.send(frames, shard)
            num_parts += 1
        return num_parts

    def _close_parts(self, num_parts: int, shard: int) -> None:
        """Send a shard the message that closes the parts sent to it, and expect its receipt."""
        assert self._pushed is not None
        welcome, message = self.welcome, self._pushed[1]
        contribution = msgspec.structs.replace(
            message,
            generation=welcome.generation,
            incarnation=welcome.incarnation,
            stream=self._stream,
            parts=num_parts,
            base_digest=self.shards.parts_of(message.base_digest)[shard],
            merged_digest=self.shards.parts_of(message.merged_digest)[shard],
            given_digest=self.shards.parts_of(message.given_digest)[shard],
        )
        with self._beating:  # so that no heartbeat is numbered later than this and sent earlier
            self._pushed_after[shard] = self._number
            self._unanswered.add(shard)
            self._came_too_early = False
            self._ends.send(wire.encode(contribution), shard)

    def _push_again(self) -> None:
        self._stream += 1
        for shard in range(self.shards.num):
            self._push_part_again(shard)

    def _push_part_again(self, shard: int) -> None:
        """In the stream at hand: with the other shards' parts in that, it makes one contribution."""
        assert self._pushed is not None
        blobs, contribution = self._pushed
        part = self.shards.split(blobs.items())[shard]
        self._close_parts(self._send_parts(part.items(), contribution.version, shard), shard)

    def recall(self) -> None:
        """Ask for what the server has merged of this worker; `next_step` returns the answer."""
        self._staged_factors.clear()
        for shard in range(self.shards.num):
            self._recall_part(shard)

    def _recall_part(self, shard: int) -> None:
        with self._beating:
            self._recalled_after[shard] = self._number
            self._ends.send(wire.encode(self._named(wire.Recall)), shard)

    def next_step(self) -> tuple[Step, dict[str, Tensor]]:
        """Wait until a round opens, a version is published, a contribution is refused, or what was
        recalled comes.

        Returns:
            The message, and the named bytes of an update or of factors.

        Raises:
            RefusedError: the server fenced this worker.
            ConnectError: the connection broke, and its key is not admitted any more.
            RunEnded: the server went, or is not heard any more.
            StoppedError: `stop` was called.
        """
        patience, begin = _Patience(self._patience_s, self._unheard_s, self._say), None
        while begin is None or self._ends.pending():
            if self._told_to_stop:
                raise StoppedError
            if self._asked_s is not None and time.monotonic() - self._asked_s >= _ASK_AGAIN_S:
                self._say_hello()
            received = self._ends.receive(_LOOK_UP_S)
            if received is not None:
                patience.heard(received[0])
            patience.look(self._ends.num)
            if received is None:
                continue
            shard, frames = received
            message, entries = self._decoded(frames)
            if message is None or self._is_stale(message):
                continue
            match message:
                case wire.Refusal():
                    raise RefusedError(message.reason, message.cure)
                case wire.HelloAgain():
                    if self._asked_s is None:
                        self._say_hello()
                case wire.Farewell(returns=True):
                    self._say(f"the server went and is to come back ({message.reason})")
                case wire.Farewell():
                    raise RunEnded(message.reason, finished=message.finished)
                case wire.Placement() if self._asked_s is not None:
                    self._placed(message)
                case wire.Welcome() if self._asked_s is not None:
                    self._welcome_again(message)
                case wire.Part():
                    self._take(message, frames, entries, shard)
                case wire.Update() if message.version > self._progress[0]:
                    blobs = self._closed(message, shard)
                    if blobs is None or message.since not in (None, self._progress[0]):
                        self._fall_behind(shard)
                    elif whole := self._staged.add(shard, message, blobs):
                        self._pushed, self._came_too_early = None, False
                        self._unanswered.clear()
                        self._staged.clear()
                        return self._joined(*whole)
                case wire.Begin() if self._came_too_early and message.version == self._progress[0]:
                    self._push_again()  # a contribution of before the server, or this process, was restarted
                case wire.Begin():
                    begin = message  # unless an update stands behind it
                case wire.Receipt() if not self._pushed or message.stream != self._stream:
                    pass  # of a contribution before that one, or before it was sent again
                case wire.Receipt(status="refused"):
                    self._pushed = None
                    self._unanswered.clear()
                    return message, {}
                case wire.Factors() if shard in self._recalled_after:
                    if (factors := self._closed(message, shard)) is None:
                        self._recall_part(shard)
                    else:
                        del self._recalled_after[shard]
                        if recalled := self._staged_factors.add(shard, message, factors):
                            return recalled[0][0], recalled[1]
                        if not self._recalled_after:  # a merge came between their answers
                            for late in self._staged_factors.behind():
                                self._recall_part(late)
                case wire.Pulse() if shard in self._recalled_after:
                    if message.number > self._recalled_after[shard]:
                        self._recall_part(shard)
                case wire.Receipt():
                    self._unanswered.discard(shard)
                    if not shard:  # the first decides
                        self._came_too_early = message.status == "superseded"
                case wire.Pulse() if message.version > max(self._progress[0], self._staged.version(shard)):
                    if message.number > self._asked_after.get(shard, -1):
                        self._fall_behind(shard)
                case wire.Pulse() if shard in self._unanswered and not self._staged.version(shard):
                    if message.number > self._pushed_after[shard]:
                        self._stream += self.shards.num == 1
                        self._push_part_again(shard)
        return begin, {}

    def _joined(
        self, updates: Sequence[wire.Update], blobs: dict[str, Tensor]
    ) -> tuple[wire.Update, dict[str, Tensor]]:
        """The update that the shards' parts make, which all belong to one version."""
        self.whole = frozenset(k for k, update in enumerate(updates) if update.since is None)
        first = updates[0]
        since = first.since if not self.whole else None
        digest = " ".join(update.base_digest for update in updates)
        return msgspec.structs.replace(first, since=since, base_digest=digest), blobs

    def stop(self) -> None:
        """Make `next_step` end, within a second. May be called from a signal handler or another thread."""
        self._told_to_stop = True

    def _place(self, shards: Shards) -> None:
        """Go on with servers of which each one has this of the model."""
        self.shards, self.whole = shards, frozenset[int]()
        self._assemblies: list[wire.Assembly | None] = [None] * shards.num
        self._staged = Staging[wire.Update](shards.num)
        self._staged_factors = Staging[wire.Factors](shards.num)

    def _placed(self, placement: wire.Placement) -> bool:
        """Go to the other shards. Returns whether they are elsewhere than before."""
        is_new = self._ends.go_to(placement.addresses)
        self._place(Shards(placement.names))
        return is_new

    def _not_reached(self, shard: int) -> ConnectError:
        return ConnectError(
            f"{self._address} answers, and shard {shard} of the server at {self._ends.address_of(shard)} was"
            f" not heard for {_STALLED_S:g} s; with server.shards workers must reach the ports after the"
            " server's, too (is there a firewall, or NAT?)"
        )

    def _take(
        self, part: wire.Part, frames: wire.Frames, entries: Sequence[wire.TensorEntry], shard: int
    ) -> None:
        """Stage a part. The server is trusted with its size: its model is to be trained here."""
        assembly = self._assemblies[shard]
        if assembly is None or part.stream > assembly.stream:
            assembly = self._assemblies[shard] = wire.Assembly(part.stream, part.version)
        if part.stream == assembly.stream:
            assembly.add(part, frames, entries)

    def _closed(self, update: wire.Update | wire.Factors, shard: int) -> dict[str, Tensor] | None:
        """All parts of a shard's update or factors, or None where some were lost."""
        assembly = self._assemblies[shard]
        if assembly is None or assembly.stream != update.stream:
            return {} if not update.parts else None
        return assembly.close(update.parts)

    def _decoded(self, frames: wire.Frames) -> tuple[wire.AnyMessage | None, tuple[wire.TensorEntry, ...]]:
        """The message; None, and counted, if it was damaged on its way: what is missed comes again."""
        try:
            return wire.decode(frames)
        except WireError:
            self.num_damaged += 1
            return None, ()

    def _fall_behind(self, shard: int) -> None:
        with self._beating:
            self._asked_after[shard] = self._number
            self._ends.send(wire.encode(self._named(wire.Behind, version=self._progress[0])), shard)

    def close(self, reason: str) -> None:
        """Say that this worker goes, and close. Closing again does nothing."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._heartbeats is not None:
            self._heartbeats.join()
        self._say_leave(reason)
        self._ends.close()

    def _say_leave(self, reason: str) -> None:
        self._ends.send(wire.encode(self._named(wire.Leave, reason=reason[: wire.MAX_TEXT])))

    def _join(self, wait_s: float) -> None:
        """Say Hello until a whole welcome has come."""
        watch = Watch(_LOOK_UP_S)
        deadline, is_welcome = wait_s, False
        asked_s = -float("inf")
        heard_s, hello = float("inf"), self._hello
        # Shards that were told of and not heard since, and when.
        unheard, told_s = set[int](), 0.0
        while (now := watch.now_s()) < deadline:
            if unheard and now - told_s >= _STALLED_S:
                raise self._not_reached(min(unheard))
            if now - heard_s >= _STALLED_S:  # a part of its answer was lost
                hello = msgspec.structs.replace(hello, attempt=hello.attempt + 1)
                heard_s, asked_s, is_welcome = now, -float("inf"), False
                self._place(self.shards)
            if now - asked_s >= _ASK_AGAIN_S:
                self._ends.send(wire.encode(hello))
                asked_s = now
                if is_welcome and unheard:
                    self._send_heartbeat(unheard)
            wait_until = min(asked_s + _ASK_AGAIN_S, deadline, now + _LOOK_UP_S)
            received = self._ends.receive(max(0.0, wait_until - now))
            if received is None:
                continue
            shard, frames = received
            message, entries = self._decoded(frames)
            heard_s = now
            unheard.discard(shard)
            match message:
                case wire.Refusal(reason=reason, cure=cure):
                    raise RefusedError(reason, cure)
                case wire.Farewell(returns=True):
                    pass  # it may be there again in time
                case wire.Farewell(reason=reason, finished=finished):
                    raise RunEnded(reason, finished=finished)
                case wire.Pulse():  # it is there; the model that comes next may be large
                    deadline = now + _WELCOME_S
                case wire.Placement():
                    if self._placed(message):
                        unheard, told_s = set(range(1, self.shards.num)), now
                case wire.Welcome():
                    self.welcome, is_welcome, self._is_welcome = message, True, True
                    self._show_up()
                case wire.Part():
                    deadline = now + _WELCOME_S
                    self._take(message, frames, entries, shard)
                case wire.Update(since=None) if (
                    is_welcome and (part := self._closed(message, shard)) is not None
                ):
                    if (whole := self._staged.add(shard, message, part)) is None:
                        continue  # the other shards' are to come
                    self._staged.clear()
                    # Until it was fenced, a process that this one replaces may have gone on. What the server
                    # was told and what this worker goes on from must be the same state, and the last one.
                    if (version := self._read_state()) != hello.version:
                        hello = msgspec.structs.replace(hello, version=version, attempt=hello.attempt + 1)
                        asked_s, is_welcome = -float("inf"), False
                        continue
                    update, self.base = self._joined(*whole)
                    self.base_digest = update.base_digest
                    self.merged, self.step = frozenset(update.merged), update.step
                    self._progress = (update.version, 0)
                    return
                case wire.Update(since=None):
                    heard_s = -float("inf")
        raise AbsentError(
            f"no server answers at {self._address} after {wait_s:g} s; start one with 'lte server CONFIG'"
            " and give the address that it prints"
        )

    def _read_state(self) -> int:
        """Read this worker's state, unless what was read is the newest. Returns its version, 0 for none."""
        if self.folder is not None and not state.is_newest(self.folder, self.saved):
            self.saved = state.load(self.folder)
        return self.saved.version if self.saved else 0

    def _is_stale(self, message: wire.AnyMessage) -> bool:
        """Whether a message is not of the server that welcomed this worker. A newer one is asked to."""
        generation = getattr(message, "generation", 0)
        answers = wire.Welcome | wire.Placement | wire.Refusal | wire.HelloAgain | wire.Farewell
        if isinstance(message, answers) and generation >= self.welcome.generation:
            return False
        if generation > self.welcome.generation and self._asked_s is None:
            self._say_hello()
        return bool(generation != self.welcome.generation)

    def _say_hello(self) -> None:
        """Ask a server that knows this worker no more to go on with it."""
        self._asked_s = time.monotonic()
        hello = msgspec.structs.replace(
            self._hello,
            worker_id=self.welcome.worker_id,
            incarnation=self.welcome.incarnation,
            version=self._progress[0],
            base_digest=self.base_digest,
        )
        self._ends.send(wire.encode(hello))

    def _welcome_again(self, welcome: wire.Welcome) -> None:
        mine = self.welcome
        if welcome.run_id != mine.run_id:
            raise JoinAnewError("the server has gone back to an earlier version, or serves another run now")
        if welcome.slot != mine.slot:
            raise JoinAnewError("another has taken its place meanwhile")
        before, after = config.from_dict(mine.settings), config.from_dict(welcome.settings)
        differing = config.differences(before, after, list(config.to_dict(before)))
        if lasting := [line for line in differing if not line.startswith(_OF_THE_START)]:
            raise RunEnded(f"the server was started anew with other settings ({lasting[0]})", finished=False)
        held = self._progress[0]
        if welcome.version < held or (welcome.version == held and not welcome.holds):
            raise RunEnded(
                f"the server was started anew at version {welcome.version};"
                f" this worker's {held} is none of its own",
                finished=False,
            )
        with self._beating:
            self.welcome, self._asked_s = welcome, None
        self._place(self.shards)
        self._show_up()
        if self._pushed and welcome.holds:
            self._push_again()

    def _show_up(self) -> None:
        """Have the other shards know where this worker is, before the first of its heartbeats is due."""
        if self.shards.num > 1:
            self._send_heartbeat()

    def _beat(self, interval_s: float) -> None:
        while not self._stopping.wait(interval_s):
            self._send_heartbeat()

    def _send_heartbeat(self, shards: Iterable[int] | None = None) -> None:
        """Give a sign of life to these shards, or to all."""
        version, local_step = self._progress
        with self._beating:
            self._number += 1
            heartbeat = wire.encode(
                self._named(wire.Heartbeat, number=self._number, version=version, local_step=local_step)
            )
            for shard in range(self._ends.num) if shards is None else shards:
                self._ends.send(heartbeat, shard)

    def _named(self, kind: type[Named], **fields: Any) -> Named:
        """A message that says from whom it is, and to which generation of the server."""
        welcome = self.welcome
        return kind(
            generation=welcome.generation,
            worker_id=welcome.worker_id,
            incarnation=welcome.incarnation,
            **fields,
        )
