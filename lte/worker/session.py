"""The worker's side of the protocol: joining, signs of life, contributions out, updates in."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping
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

Named = TypeVar("Named", wire.Heartbeat, wire.Behind, wire.Leave)


def parting_words(kind: type[BaseException] | None, error: BaseException | None) -> str:
    """What a worker that ends by this exception, or by none, tells the server."""
    if kind is None:
        return "finished"
    return "interrupted" if issubclass(kind, KeyboardInterrupt) else f"{kind.__name__}: {error}"


class Session:
    """One worker's conversation with its server.

    Attributes:
        welcome: what the server said at the start, `base` the tensors that came with it.
    """

    def __init__(
        self,
        address: str,
        *,
        worker_id: str = "",
        model: Mapping[str, str] | None = None,
        heads: int = 0,
        wait_s: float = 30.0,
    ) -> None:
        """Join. Blocks until the server welcomed or refused this worker.

        Args:
            worker_id: a name to join by, or "" to be given one.
            model: description of a model built before joining (`nn.Plan.describe`); its heads.
            wait_s: how long to look for a server.

        Raises:
            ConnectError: no server answered within `wait_s`.
            RefusedError: the server refused this worker.
        """
        self._endpoint = transport.connect(address)
        self._address = address
        self._progress = (0, 0)
        # A contribution without a receipt, and the last heartbeat that was sent before it.
        self._pushed: wire.Frames | None = None
        self._pushed_after = self._number = 0
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
            self.welcome, self.base = self._join(wire.encode(hello), wait_s)
        except BaseException:
            self._endpoint.close()
            raise
        self._progress = (self.welcome.version, 0)
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

    def push(self, contribution: wire.Contribution, tensors: Mapping[str, Tensor]) -> None:
        """Send a contribution; `next_step` sends it again if it was lost."""
        self._pushed = wire.encode(contribution, tensors)
        self._push_again()

    def next_step(self) -> tuple[wire.Begin | wire.Update, dict[str, Tensor]]:
        """Wait until a round opens or a version is published.

        Raises:
            RefusedError: the server found a contribution wrong, or fenced this worker.
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
                case wire.Update() if message.version > self._progress[0]:
                    self._pushed = None
                    return message, wire.tensors(frames, entries)
                case wire.Begin():
                    begin = message  # unless an update stands behind it
                case wire.Receipt(status="refused"):
                    raise RefusedError(message.reason, "start the worker again")
                case wire.Receipt():
                    self._pushed = None
                case wire.Pulse() if self._pushed and message.number > self._pushed_after:
                    self._push_again()
                case wire.Pulse() if message.version > self._progress[0]:
                    behind = self._named(wire.Behind, version=self._progress[0])
                    self._endpoint.send(wire.encode(behind))
        return begin, {}

    def _push_again(self) -> None:
        assert self._pushed is not None
        # Under the lock no heartbeat is numbered later than this and sent earlier.
        with self._beating:
            self._pushed_after = self._number
            self._endpoint.send(self._pushed)

    def close(self, reason: str) -> None:
        """Say that this worker goes, and close. Closing again does nothing."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._heartbeats is not None:
            self._heartbeats.join()
        self._endpoint.send(wire.encode(self._named(wire.Leave, reason=reason)))
        self._endpoint.close()

    def _join(self, hello: wire.Frames, wait_s: float) -> tuple[wire.Welcome, dict[str, Tensor]]:
        deadline = time.monotonic() + wait_s
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
                    return message, wire.tensors(frames, entries)
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
