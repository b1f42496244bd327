"""Decides for libzmq who may connect: the ZAP handler (RFC 27) of a server that has keys.

libzmq asks once a handshake, after the peer proved that it holds the secret of its public key. It is
told 200 and the key as the peer's User-Id, 400 for a key that is not allowed, or 500 for one from
an address that failed too often lately. A handler that fails, or is gone, admits nobody.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence

import zmq
from zmq.utils import z85

from lte.transport.keys import AllowList
from lte.transport.limits import Buckets

DOMAIN = "lte"
_ENDPOINT = "inproc://zeromq.zap.01"


class Gate:
    """Answers for one context, in a thread of its own, until the context is terminated."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], allowed: AllowList, report: Callable[[str], None]
    ) -> None:
        """Start.

        Args:
            report: told, in the gate's thread, of those turned away.
        """
        self._allowed, self._report = allowed, report
        # Failed attempts of one address that are looked into: ten, then one in five seconds.
        self.failures = Buckets(burst=10, per_s=0.2, most=1024)
        self._socket = context.socket(zmq.REP)
        self._socket.bind(_ENDPOINT)
        self._thread = threading.Thread(target=self._serve, name="lte-gate", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the end, which the end of the context brings."""
        self._thread.join()

    def _serve(self) -> None:
        with self._socket, contextlib.suppress(zmq.ContextTerminated):
            while True:
                version, number, _, *request = self._socket.recv_multipart()
                try:
                    status, text, user_id = self._judge(request)
                except Exception as error:  # whatever it is, it must not let anyone in
                    status, text, user_id = "500", "cannot be checked", ""
                    self._report(f"a key could not be checked, and was not admitted: {error!r}")
                words = (word.encode() for word in (status, text, user_id, ""))
                self._socket.send_multipart([version, number, *words])

    def _judge(self, request: Sequence[bytes]) -> tuple[str, str, str]:
        """Status, its reason, and User-Id for (address, routing id, mechanism, credentials...)."""
        address, _, mechanism, *credentials = request
        assert mechanism == b"CURVE", "libzmq asks for no other mechanism of a CURVE server"
        key = z85.encode(credentials[0]).decode()
        if self._allowed.worker_id(key):
            return "200", "OK", key
        where = address.decode()
        if not self.failures.take(where, time.monotonic()):
            return "500", "too many failed attempts", ""
        self._report(f"{where} was turned away: its key {key} is not in {self._allowed.path}")
        return "400", "this key is not allowed", ""
