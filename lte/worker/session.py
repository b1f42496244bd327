"""The worker's side of the protocol: joining, signs of life, contributions out, updates in."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from lte import transport, wire
from lte.errors import ConnectError, RefusedError, RunEnded

_ASK_AGAIN_S = 3.0
"""A Hello without an answer is sent again after this: no server may have been there."""
_WELCOME_S = 600.0
"""How long a welcome, which holds the model, may take to arrive once the server was heard."""
_LOOK_UP_S = 1.0
"""How often a waiting worker looks whether its patience is at its end."""

Named = TypeVar("Named", wire.Heartbeat, wire.Part, wire.Behind, wire.Leave)


def parting_words(kind: type[BaseException] | None, error: BaseException | None) -> str:
    """What a worker that ends by this exception, or by none, tells the server."""
    if kind is None:
        return "finished"
    return "interrupted" if issubclass(kind, KeyboardInterrupt) else f"{kind.__name__}: {error}"


class Session:
    """One worker's conversation with its server.

    Attributes:
        welcome: what the server said at the start. base: the bytes of the whole model that came
            with it; base_digest: of what they make.
    """

    def __init__(
        self,
        address: str,
        *,
        worker_id: str = "",
        model: Mapping[str, str] | None = None,
        heads: int = 0,
        wait_s: float = 30.0,
        key: str | Path | None = None,
        server_key: str | Path | None = None,
    ) -> None:
        """Join. Blocks until the server welcomed or refused this worker.

        Args:
            worker_id: a name to join by, or "" to be given one.
            model: description of a model built before joining (`nn.Plan.describe`); its heads.
            wait_s: how long to look for a server.
            key, server_key: files of keys, for a server that has some (see `transport.connect`).

        Raises:
            ConnectError: no server answered within `wait_s`, or keys do not fit. KeysError: the files
            of keys cannot be used.
            RefusedError: the server refused this worker.
        """
        self._endpoint = transport.connect(address, key=key, server_key=server_key)
        self._address = address
        self._progress = (0, 0)
        # A contribution without a receipt, and the last heartbeat that was sent before it.
        self._pushed: list[wire.Frames] = []
        self._pushed_version = self._pushed_after = self._number = 0
        # The last heartbeat before an update was asked for: what answers it or an earlier one is older.
        self._asked_after = -1
        self._assembly: wire.Assembly | None = None
        self._beating = threading.Lock()
        self._stopping = threading.Event()
        self._heartbeats: threading.Thread | None = None
        hello = wire.Hello(
            schema=wire.SCHEMA,
            worker_id=worker_id,
            session=secrets.token_hex(8),
            model=dict(model or {}),
            heads=heads,
        )
        try:
            self._join(wire.encode(hello), wait_s)
        except BaseException:
            self._endpoint.close()
            raise
        self._patience_s = float(self.welcome.settings["worker"]["patience_s"])
        interval_s = float(self.welcome.settings["worker"]["heartbeat_s"])
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
        self, version: int, blobs: Iterable[tuple[str, Tensor]], close: Callable[[int], wire.Contribution]
    ) -> None:
        """Send a contribution, in parts as they are made; `next_step` sends it again if it was lost.

        Args:
            version: on which it was trained. close: makes its message, given the number of parts.
        """
        part_bytes = int(self.welcome.settings["compress"]["part_bytes"])
        pushed: list[wire.Frames] = []
        for frames, _ in wire.in_parts(
            blobs, part_bytes, lambda index: self._named(wire.Part, version=version, index=index)
        ):
            pushed.append(frames)
            self._endpoint.send(frames)
        pushed.append(wire.encode(close(len(pushed))))
        self._pushed, self._pushed_version = pushed, version
        self._send_pushed(pushed[-1:])

    def next_step(self) -> tuple[wire.Begin | wire.Update, dict[str, Tensor]]:
        """Wait until a round opens or a version is published.

        Returns:
            The message, and the named bytes of an update.

        Raises:
            RefusedError: the server found a contribution wrong, or fenced this worker.
            ConnectError: the connection broke, and its key is not admitted any more.
            RunEnded: the server went, or is not heard any more.
        """
        heard_s, begin = time.monotonic(), None
        while begin is None or self._endpoint.pending():
            frames = self._endpoint.receive(_LOOK_UP_S)
            if frames is None:
                if time.monotonic() - heard_s > self._patience_s:
                    raise RunEnded(f"the server was not heard for {self._patience_s:g} s", finished=False)
                continue
            heard_s = time.monotonic()
            message, entries = self._decoded(frames)
            match message:
                case wire.Part():
                    self._take(message, frames, entries)
                case wire.Update() if message.version > self._progress[0]:
                    blobs = self._closed(message)
                    if blobs is not None and message.since in (None, self._progress[0]):
                        self._pushed = []
                        return message, blobs
                    self._fall_behind()
                case wire.Begin():
                    begin = message  # unless an update stands behind it
                case wire.Receipt() if message.version != self._pushed_version:
                    pass  # of a contribution before that one
                case wire.Receipt(status="refused"):
                    raise RefusedError(message.reason, "start the worker again")
                case wire.Receipt():
                    self._pushed = []
                case wire.Pulse() if self._pushed and message.number > self._pushed_after:
                    self._send_pushed(self._pushed)
                case wire.Pulse() if message.version > self._progress[0]:
                    if message.number > self._asked_after:
                        self._fall_behind()
        return begin, {}

    def _take(self, part: wire.Part, frames: wire.Frames, entries: Sequence[wire.TensorEntry]) -> None:
        """Stage a part. The server is trusted with its size: its model is to be trained here."""
        if part.index == 0:
            self._assembly = wire.Assembly(part.version)
        if self._assembly is not None:
            self._assembly.add(part, frames, entries)

    def _closed(self, update: wire.Update) -> dict[str, Tensor] | None:
        """All parts of an update, or None where some were lost."""
        assembly, self._assembly = self._assembly, None
        if assembly is None or assembly.version != update.version:
            assembly = wire.Assembly(update.version)
        return assembly.close(update.parts)

    def _fall_behind(self) -> None:
        with self._beating:
            self._asked_after = self._number
            self._endpoint.send(wire.encode(self._named(wire.Behind, version=self._progress[0])))

    def _send_pushed(self, pushed: Sequence[wire.Frames]) -> None:
        # Under the lock no heartbeat is numbered later than this and sent earlier.
        with self._beating:
            self._pushed_after = self._number
            for frames in pushed:
                self._endpoint.send(frames)

    def close(self, reason: str) -> None:
        """Say that this worker goes, and close. Closing again does nothing."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._heartbeats is not None:
            self._heartbeats.join()
        self._endpoint.send(wire.encode(self._named(wire.Leave, reason=reason)))
        self._endpoint.close()

    def _join(self, hello: wire.Frames, wait_s: float) -> None:
        deadline, is_welcome = time.monotonic() + wait_s, False
        asked_s = -float("inf")
        while (now := time.monotonic()) < deadline:
            if now - asked_s >= _ASK_AGAIN_S:
                self._endpoint.send(hello)
                asked_s = now
            frames = self._endpoint.receive(min(asked_s + _ASK_AGAIN_S, deadline) - now)
            if frames is None:
                continue
            message, entries = wire.decode(frames)
            match message:
                case wire.Refusal(reason=reason, cure=cure):
                    raise RefusedError(reason, cure)
                case wire.Farewell(reason=reason, finished=finished):
                    raise RunEnded(reason, finished=finished)
                case wire.Pulse():  # it is there; the model that comes next may be large
                    deadline = now + _WELCOME_S
                case wire.Welcome():
                    self.welcome, is_welcome = message, True
                case wire.Part() if is_welcome:
                    deadline = now + _WELCOME_S
                    self._take(message, frames, entries)
                case wire.Update(since=None) if is_welcome and (base := self._closed(message)) is not None:
                    self.base, self.base_digest = base, message.base_digest
                    self._progress = (message.version, 0)
                    return
        raise ConnectError(
            f"no server answers at {self._address} after {wait_s:g} s; start one with 'lte server CONFIG'"
            " and give the address that it prints"
        )

    def _decoded(self, frames: wire.Frames) -> tuple[wire.AnyMessage, tuple[wire.TensorEntry, ...]]:
        """A message of this generation of the server that does not end this worker."""
        message, entries = wire.decode(frames)
        if isinstance(message, wire.Refusal):
            raise RefusedError(message.reason, message.cure)
        if getattr(message, "generation", self.welcome.generation) != self.welcome.generation:
            raise RunEnded("another server has taken this address over", finished=False)
        if isinstance(message, wire.Farewell):
            raise RunEnded(message.reason, finished=message.finished)
        return message, entries

    def _beat(self, interval_s: float) -> None:
        while not self._stopping.wait(interval_s):
            version, local_step = self._progress
            with self._beating:
                self._number += 1
                heartbeat = self._named(
                    wire.Heartbeat, number=self._number, version=version, local_step=local_step
                )
                self._endpoint.send(wire.encode(heartbeat))

    def _named(self, kind: type[Named], **fields: Any) -> Named:
        """A message that says from whom it is, and to which generation of the server."""
        welcome = self.welcome
        return kind(
            generation=welcome.generation,
            worker_id=welcome.worker_id,
            incarnation=welcome.incarnation,
            **fields,
        )
