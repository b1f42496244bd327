"""The worker's side of the protocol: joining, signs of life, contributions out, updates in."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping
from types import TracebackType

from torch import Tensor

from lte import transport, wire
from lte.errors import ConnectError, RefusedError, RunEnded

_ASK_AGAIN_S = 3.0
"""A question without an answer is asked again after this; every question may be repeated."""


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
        self._pushed: wire.Frames = []
        self._pushed_version, self._received = -1, False
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
        """Send a contribution; `next_step` sends it again if it seems lost."""
        self._pushed = wire.encode(contribution, tensors)
        self._pushed_version, self._received = contribution.version, False
        self._endpoint.send(self._pushed)

    def next_step(self) -> tuple[wire.Begin | wire.Update, dict[str, Tensor]]:
        """Wait until a round opens or a version is published.

        Raises:
            RefusedError: the server found a contribution wrong, or fenced this worker.
            RunEnded: the server went, or is not heard any more.
        """
        heard_s = asked_s = time.monotonic()
        published, begin = -1, None
        while True:
            if begin is not None and not self._endpoint.pending():
                return begin, {}
            frames = self._endpoint.receive(_ASK_AGAIN_S)
            now = time.monotonic()
            if frames is not None:
                heard_s = now
                message, entries = self._decoded(frames)
                if isinstance(message, wire.Update):
                    return message, wire.tensors(frames, entries)
                if isinstance(message, wire.Begin):
                    begin = message  # unless an update stands behind it
                if isinstance(message, wire.Receipt) and message.version == self._pushed_version:
                    if message.status == "refused":
                        raise RefusedError(message.reason, "start the worker again")
                    self._received = True
                if isinstance(message, wire.Pulse):
                    published = message.version
            # Either the contribution seems lost, or the update that answers it.
            lost = not self._received or published > self._pushed_version
            if self._pushed and lost and now - asked_s >= _ASK_AGAIN_S:
                self._endpoint.send(self._pushed)
                asked_s = now
            if now - heard_s > self._patience_s:
                raise RunEnded(f"the server was not heard for {self._patience_s:g} s", finished=False)

    def close(self, reason: str) -> None:
        """Say that this worker goes, and close. Closing again does nothing."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._heartbeats is not None:
            self._heartbeats.join()
        leave = wire.Leave(
            worker_id=self.welcome.worker_id, incarnation=self.welcome.incarnation, reason=reason
        )
        self._endpoint.send(wire.encode(leave))
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
            if isinstance(message, wire.Refusal):
                raise RefusedError(message.reason, message.cure)
            if isinstance(message, wire.Farewell):
                raise RunEnded(message.reason, finished=message.finished)
            if isinstance(message, wire.Welcome):
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
            heartbeat = wire.Heartbeat(
                generation=self.welcome.generation,
                worker_id=self.welcome.worker_id,
                incarnation=self.welcome.incarnation,
                version=version,
                local_step=local_step,
            )
            self._endpoint.send(wire.encode(heartbeat))
