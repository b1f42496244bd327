"""A relay: stands before the workers of a site that share one slow link, and has what is the same for all of
them come over it once.

    workers --- their own network --- relay --- slow link --- server

Workers use the relay's address as the server's and notice nothing else. The relay has one connection to the
server; on it messages travel as they are, each in an envelope that names the worker's connection here
(`transport.envelope`). It never decodes them: rounds, incarnations, generations, checksums and digests
stay between worker and server, so a relay can lose a message but not change one unnoticed.

What the server sends to several workers, the parts of updates and of the whole model, it sends once, to be
kept on a shelf here; from then on it names the bytes by their digest (`transport.relayed`, which says
what happens when they are not on the shelf after all). Nothing is kept on disk and nothing is acknowledged
here: a relay may be killed at any time, and to the workers that is a broken connection.

On the way up workers take turns, and small messages go first: heartbeats do not wait until all others have
contributed, which on a slow link could take longer than `server.silence_s`. What waits for the link is
bounded: beyond that whoever has most of it waiting loses that, as by a broken connection, and nobody else
loses anything. What a worker has sent before it ended goes yet. On the way down all is in order.

One thread owns the workers' side and the shelf; another waits for the server and hands over what comes.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from lte import transport
from lte.config import Server as ServerSettings
from lte.errors import ConnectError, KeysError, WireError
from lte.transport import Frames, Peer, envelope
from lte.transport.lanes import Lanes
from lte.transport.limits import Buckets
from lte.transport.shelf import Shelf

WAITING_BYTES = 1_000_000_000
"""Most that waits for the link unless told otherwise."""
_LOOK_UP_S = 0.1
"""Both threads look at least this often whether they are to end."""
_MOST_IN_A_ROW = 100
"""Messages of workers before those of the server are looked at."""


class Relay:
    """One site's relay.

    Attributes:
        address: where the site's workers connect. shelf: what is kept here, by digest; for its own thread.
    """

    def __init__(
        self,
        server: str,
        listen: str,
        *,
        shelf_bytes: int,
        waiting_bytes: int = WAITING_BYTES,
        key: str | Path | None = None,
        server_key: str | Path | None = None,
        allow: str | Path | None = None,
        insecure: bool = False,
        max_message_bytes: int = ServerSettings().max_message_bytes,
        say: Callable[[str], None] = print,
    ) -> None:
        """Bind and connect. `serve` then passes messages on until `stop`.

        Args:
            server: its address, as of `transport.connect`. listen: where workers connect, as of
                `transport.bind`.
            shelf_bytes: most bytes of messages that are kept in memory for other workers.
            waiting_bytes: most bytes of workers' messages that wait in memory for the link; best above what
                all of them send in a round.
            key: file of the relay's secret key, to server and workers; server_key: of the server's public
                key; allow: the list of the site's workers. All three or none: the server takes the
                relay's word for who its workers are.
            insecure: listen where other machines reach it, without keys.
            max_message_bytes: larger frames of workers are not accepted: best as the server's
                `server.max_message_bytes`. What is larger than that is not passed on.
            say: told, in a line, of strangers and of what was damaged or lost here.

        Raises:
            ConnectError: an address cannot be used. KeysError: files of keys cannot be used, or
            some of the three are missing.
        """
        if len({key is None, server_key is None, allow is None}) > 1:
            raise KeysError(
                "a relay with keys needs its own, the server's public key and a list of its workers, as the"
                " server takes its word for who they are; give --key, --server-key and --allow, or none"
            )
        self._shelf_bytes, self._say = shelf_bytes, say
        self.shelf: Shelf[bytes] = Shelf(shelf_bytes)
        self._down = transport.bind(
            listen,
            max_message_bytes=max_message_bytes,
            insecure=insecure,
            key=key,
            allow=allow,
            relays=False,
        )
        self.address = self._down.address
        self._said = Buckets(burst=20, per_s=0.2, most=16)
        lanes = Lanes(waiting_bytes, self._overflown)
        try:
            self._up = transport.connect(server, key=key, server_key=server_key, lanes=lanes)
        except BaseException:
            self._down.close()
            raise
        self._stopped = threading.Event()
        self._come: deque[Frames] = deque()  # from the server, not handed out yet
        self._fault: ConnectError | None = None
        self._max_message_bytes, self._server_accepts = max_message_bytes, math.inf
        self._waiting = threading.Thread(target=self._wait, name="lte-relay", daemon=True)
        self._waiting.start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop, and hand what was passed on to the network, for at most a second each way."""
        self.stop()
        self._waiting.join()
        self._up.close()
        self._down.close()

    def stop(self) -> None:
        """Make `serve` return. May be called from a signal handler or another thread."""
        self._stopped.set()
        self._down.wake()

    def serve(self) -> None:
        """Pass messages on until `stop` is called.

        Raises:
            ConnectError: the server does not admit the relay's key, or has another itself.
        """
        while not self._stopped.is_set():
            wait_s = 0.0 if self._come else _LOOK_UP_S
            for _ in range(_MOST_IN_A_ROW):
                if (received := self._down.receive(wait_s)) is None:
                    break
                self._pass_up(*received)
                wait_s = 0.0
            for _ in range(len(self._come)):
                self._hand_out(self._come.popleft())
            for notice in self._down.notices():
                self._tell("stranger", notice)
            if self._fault is not None:
                raise self._fault

    def _wait(self) -> None:
        """Wait for the server's messages, in a thread of its own."""
        while not self._stopped.is_set():
            try:
                frames = self._up.receive(_LOOK_UP_S)
            except ConnectError as error:
                line = "the line of a relay there is relay/NAME PUBLIC_KEY WORKER_ID,WORKER_ID,..."
                self._fault = ConnectError(f"{error} ({line})")
                self._down.wake()
                return
            if frames is not None:
                self._come.append(frames)
                self._down.wake()

    def _pass_up(self, peer: Peer, frames: Frames) -> None:
        if envelope.is_sealed(frames):
            self._tell("chain", "another relay connects here and is not heard: relays form no chains")
            return
        if (largest := max((memoryview(each).nbytes for each in frames), default=0)) > self._server_accepts:
            self._tell(
                "large",
                f"a message of a worker was dropped: {largest:,} bytes in a frame, and the server accepts"
                f" {self._server_accepts:,} (server.max_message_bytes)",
            )
            return
        passed = envelope.Passed(peer, self._down.sender, self._down.origin, self._shelf_bytes)
        self._up.send([envelope.seal(passed), *frames], lane=peer)

    def _hand_out(self, frames: Frames) -> None:
        """Send a worker what the server says is for it; nothing where a piece of it is missing."""
        try:
            delivery = envelope.open_from_server(frames)
            if isinstance(delivery, envelope.Accepts):
                self._heed(delivery)
                return
        except WireError as error:
            self._tell("damaged", f"a message of the server was dropped: {error}")
            return
        following, whole, missing = iter(frames[1:]), list[bytes | memoryview](), list[bytes]()
        for entry in delivery.frames:
            digest = entry[1:]
            if entry.startswith(envelope.HELD):
                piece: bytes | memoryview | None = self.shelf.take(digest)
            elif (sent := next(following, None)) is None:
                piece = None
            else:
                piece = memoryview(sent) if not digest else self._shelved(digest, bytes(sent))
            if piece is None:
                missing.append(digest)
            else:
                whole.append(piece)
        if missing:
            self._up.send([envelope.seal(envelope.Missing(tuple(missing)))], lane=delivery.route)
            self._tell("missing", "a message was dropped, as part of it is not here; its worker asks again")
        else:
            self._down.send(delivery.route, whole)

    def _heed(self, server: envelope.Accepts) -> None:
        """Take note of how large a frame may be; say so where workers' connections would break on less."""
        self._server_accepts = server.max_message_bytes
        if self._max_message_bytes < server.max_message_bytes:
            self._tell(
                "small",
                f"this relay accepts frames of {self._max_message_bytes:,} bytes and the server of"
                f" {server.max_message_bytes:,}: on what lies between, workers' connections break; start it"
                f" with --max-message-bytes {server.max_message_bytes}",
            )

    def _shelved(self, digest: bytes, piece: bytes) -> bytes | None:
        """Keep a piece, unless it was damaged on its way."""
        if envelope.digest(piece) != digest:
            return None
        self.shelf.put(digest, piece, len(piece))
        return piece

    def _overflown(self, lost_bytes: int) -> None:
        """Too much waits for the link."""
        self._tell(
            "overflow",
            f"the link does not keep up: {lost_bytes / 1e6:,.1f} MB of a worker's messages were dropped, and"
            " it sends them again; let more wait (--queue), or have workers send less (compress, lora.rank)",
        )

    def _tell(self, what: str, line: str) -> None:
        """Say something that others can cause as often as they like."""
        if self._said.take(what, time.monotonic()):
            self._say(line)
