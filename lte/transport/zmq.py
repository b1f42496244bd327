"""pyzmq: ROUTER on the server, DEALER on the workers, over TCP or ipc.

TCP addresses other than loopback are refused without keys, unless the caller insists. With keys
everything travels by CURVE: encrypted, and only from those on the allow-list (see `gate`).
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import queue
import re
import resource
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from lte.errors import ConnectError
from lte.transport import keys, posted
from lte.transport.base import Frames, Peer, is_loopback
from lte.transport.gate import DOMAIN, Gate
from lte.transport.lanes import Lanes
from lte.transport.meeting import SCHEME

_LINGER_MS = 1_000
# The kernel looks after a peer whose machine is gone: it asks after so much silence, again after
# so long, so many times, and waits so long for what it sent to be acknowledged. ZMTP's own
# heartbeats are off: their answer queues behind a large frame, so they cut slow links in the middle.
_KEEPALIVE_IDLE_S, _KEEPALIVE_AGAIN_S, _KEEPALIVE_TIMES, _UNACKNOWLEDGED_MS = 10, 5, 4, 30_000
# A handshake takes four round trips. Who has not shown a key by then makes room for others.
_HANDSHAKE_MS = 10_000
# Until then it holds a descriptor. One address has fewer ports than this.
_NUM_DESCRIPTORS = 1 << 16
# Messages of one connection that wait to be heard; then its sender waits. So many parts hold a whole
# contribution: a connection that is blocked for longer than _UNACKNOWLEDGED_MS breaks.
_MOST_WAITING = 1024
# Where lanes take turns, of what the kernel holds (twice this, by its own count): a sign of life waits behind
# it. More lets fewer links be filled in one round trip; this does 80 Mbit/s at 100 ms.
_TAKEN_BYTES = 1 << 19
_NUM_NOTICES = 100
"""Kept until they are asked for; strangers cause them, so older ones make way."""
_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_NOT_ALLOWED = 400
_CURVE_BYTES = 33
"""How much larger a frame is that is encrypted."""
_HUNG_UP_S = 3.0
"""A server that hangs up in the handshake for so long has another key. Once, it may have been stopped."""
_NAMES_WITHIN_S = 2.0
_LOOK_UP_S = 1.0
"""How often a worker looks where its server is, if a file says so."""
_GREETING_BEGINS = b"\xff" + bytes(7) + b"\x01\x7f\x03"
_GREETING_BYTES, _MECHANISM = 64, slice(12, 32)
"""Of ZMTP 3: signature and major version, after which the other side sends its whole greeting."""

_TCP = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.]+(?:%\w+)?\]|[\w.-]+|\*):(?P<port>\*|\d{1,5})", re.ASCII)
_FORMS = "an address is tcp://HOST:PORT, ipc://PATH, collective://HOST:PORT or inprocess://NAME"


def _origin(frame: zmq.Frame) -> str:
    """The address that a message came from, or "" where its connection is gone already."""
    try:
        return str(frame.get("Peer-Address"))
    except zmq.ZMQError:
        return ""


def _frame_bytes(frames: Frames) -> int:
    return sum(memoryview(frame).nbytes for frame in frames)


def _prepare(socket: zmq.Socket[bytes], address: str) -> None:
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    # No message is dropped for being one too many; the protocol has few in flight.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_IDLE_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, _KEEPALIVE_AGAIN_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, _KEEPALIVE_TIMES)
    socket.setsockopt(zmq.TCP_MAXRT, _UNACKNOWLEDGED_MS)
    # Only where asked for: with it on, "localhost" would be ::1 and its server at 127.0.0.1.
    socket.setsockopt(zmq.IPV6, int(address.startswith("tcp://[")))


class ZmqServer:
    """See `base.ServerEndpoint`."""

    def __init__(
        self,
        address: str,
        *,
        max_message_bytes: int,
        key: str | Path | None = None,
        allow: str | Path | None = None,
    ) -> None:
        self._notices: deque[str] = deque(maxlen=_NUM_NOTICES)
        pair = keys.load_secret(key) if key is not None else None
        self._allowed = keys.AllowList(allow, self._notices.append) if allow is not None else None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        _prepare(self._socket, address)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes + (_CURVE_BYTES if pair else 0))
        self._socket.setsockopt(zmq.RCVHWM, _MOST_WAITING)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        self._gate = None
        # What makes `receive` return although nothing came; None once it is closed.
        self._bell: int | None = None
        self._waking, self._poller = threading.Lock(), zmq.Poller()
        if pair and self._allowed:
            _make_room()
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt_string(zmq.CURVE_SECRETKEY, pair.secret)
            self._socket.setsockopt_string(zmq.ZAP_DOMAIN, DOMAIN)
            # Without this, libzmq admits everyone when nobody answers for the keys.
            self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            self._gate = Gate(self._context, self._allowed, self._notices.append)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.setsockopt(zmq.LINGER, 0)
            self.close()
            raise ConnectError(_bind_fault(address, error)) from None
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._bell, zmq.POLLIN)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.received_bytes = self.sent_bytes = 0
        self.sender = self.key_owner = self.origin = ""
        self.is_relayed = False

    def send(self, peer: Peer, frames: Frames) -> None:
        if self._socket.closed:
            return
        try:  # large frames are handed over without a copy
            self._socket.send_multipart([peer, *frames], copy=_frame_bytes(frames) < 65_536)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
        else:
            self.sent_bytes += _frame_bytes(frames)

    def receive(self, timeout_s: float | None) -> tuple[Peer, Frames] | None:
        deadline_s = None if timeout_s is None else time.monotonic() + max(timeout_s, 0)
        while True:
            left_s = None if deadline_s is None else max(0, deadline_s - time.monotonic())
            ready = dict(self._poller.poll(None if left_s is None else int(left_s * 1000) + 1))
            if self._bell is not None and self._bell in ready:
                os.eventfd_read(self._bell)
                return None
            if self._socket not in ready:  # but what else is waited for
                return None
            peer, *frames = self._socket.recv_multipart(copy=False)
            if self._allowed is not None:
                # The key that the handshake proved, in words of the gate; its name is the list's of now.
                self.sender = self.key_owner = self._allowed.worker_id(str(peer.get("User-Id") or ""))
                if not self.sender:
                    continue
            self.origin = _origin(peer)
            views = [frame.buffer for frame in frames]
            self.received_bytes += _frame_bytes(views)
            return bytes(peer.buffer), views

    def watch(self, descriptors: Sequence[int]) -> None:
        for each in descriptors:
            self._poller.register(each, zmq.POLLIN)

    def speaks_for(self, worker_id: str) -> bool:
        return self._allowed is None or self._allowed.speaks_for(self.sender, worker_id)

    def wake(self) -> None:
        with self._waking:  # so that the bell is not closed, and its number another file's, meanwhile
            if self._bell is not None:
                os.eventfd_write(self._bell, 1)

    def notices(self) -> list[str]:
        return [self._notices.popleft() for _ in range(len(self._notices))]

    def close(self) -> None:
        with self._waking:
            bell, self._bell = self._bell, None
            if bell is not None:
                os.close(bell)
        self._socket.close()
        self._context.term()  # which ends the gate
        if self._gate is not None:
            self._gate.join()


class ZmqWorker:
    """See `base.WorkerEndpoint`. One thread owns the socket; lanes lead to it, and a queue from it."""

    def __init__(
        self,
        address: str,
        *,
        key: str | Path | None = None,
        server_key: str | Path | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self._pair = pair = keys.load_secret(key) if key is not None else None
        servers = keys.load_public(server_key) if server_key is not None else ""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5_000)
        if pair:
            self._socket.setsockopt_string(zmq.CURVE_SECRETKEY, pair.secret)
            self._socket.setsockopt_string(zmq.CURVE_PUBLICKEY, pair.public)
            self._socket.setsockopt_string(zmq.CURVE_SERVERKEY, servers)
        monitor = self._socket.get_monitor_socket(_HANDSHAKE_FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        # Without turns all go by one lane, in one order.
        self._lanes, self._take_turns = Lanes() if lanes is None else lanes, lanes is not None
        self._address, self._looked_up_s = "", -math.inf
        self._file = posted.file_of(address)
        try:
            if self._file is None:
                self._go_to(address)
            else:
                self._look_up(self._file)
        except ConnectError:
            monitor.close()
            self._socket.close(linger=0)
            self._context.term()
            raise
        self._inbox: queue.Queue[list[memoryview] | ConnectError] = queue.Queue()
        # Of the bell, which tells the thread that something waits, and of what is put there with it.
        self._lock, self._closed = threading.Lock(), False
        self._bell: int | None = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(
            target=self._serve, args=(self._bell, monitor), name="lte-zmq", daemon=True
        )
        self._thread.start()

    @property
    def address(self) -> str:
        return self._address

    def send(self, frames: Frames, lane: bytes = b"") -> None:
        with self._lock:
            if not self._closed:
                self._lanes.put(lane if self._take_turns else b"", frames)
                self._ring()

    def receive(self, timeout_s: float) -> Frames | None:
        try:
            received = self._inbox.get(timeout=max(timeout_s, 0))
        except queue.Empty:
            return None
        if isinstance(received, ConnectError):
            raise received
        return received

    def pending(self) -> int:
        return self._inbox.qsize()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._ring()
        self._thread.join()
        with self._lock:
            if self._bell is not None:
                os.close(self._bell)
            self._bell = None
        self._context.term()

    def _ring(self) -> None:
        if self._bell is not None:
            os.eventfd_write(self._bell, 1)

    def _go_to(self, address: str) -> None:
        """Connect there, and nowhere else. What is under way to the server that was there is lost.

        Raises:
            ConnectError: it is no address.
        """
        if self._address:
            self._socket.disconnect(self._address)
        self._address, self._handshakes = address, _Handshakes(address, self._pair)
        _prepare(self._socket, address)
        if self._take_turns:  # what the socket and the kernel have taken has had its turn
            self._socket.setsockopt(zmq.SNDHWM, 1)
            self._socket.setsockopt(zmq.SNDBUF, _TAKEN_BYTES)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            raise ConnectError(f"{address}: cannot connect ({_words(error)}); {_FORMS}") from None

    def _look_up(self, file: Path) -> None:
        """Follow the server to where a file says that it is now, if it is time to look.

        Raises:
            ConnectError: the file holds no address.
        """
        if time.monotonic() - self._looked_up_s < _LOOK_UP_S:
            return
        self._looked_up_s = time.monotonic()
        address = posted.read(file)
        if address not in ("", self._address) and not address.startswith(SCHEME):  # see `followed`
            _check_to_connect(address)
            self._go_to(address)

    def _serve(self, bell: int, monitor: zmq.Socket[bytes]) -> None:
        try:
            with self._socket, monitor:
                self._carry(bell, monitor)
        except Exception as error:  # who uses this would wait for ever
            fault = ConnectError(f"{self._address}: the connection's own thread ended ({error!r})")
            fault.__cause__ = error
            self._inbox.put(fault)
        finally:
            with self._lock:
                self._closed = True

    def _carry(self, bell: int, monitor: zmq.Socket[bytes]) -> None:
        """Hand over what comes and what is to go, until this is closed."""
        poller, is_closed = zmq.Poller(), False
        for each in (bell, monitor, self._socket):
            poller.register(each, zmq.POLLIN)
        while not is_closed:
            ready = dict(poller.poll(None if self._file is None else int(_LOOK_UP_S * 1000)))
            if self._file is not None:
                try:
                    self._look_up(self._file)
                except ConnectError as error:
                    self._inbox.put(error)
            if monitor in ready:
                event = recv_monitor_message(monitor)
                if fault := self._handshakes.fault(event["event"], event["value"], time.monotonic()):
                    self._inbox.put(ConnectError(fault))
            if ready.get(self._socket, 0) & zmq.POLLIN:
                frames = self._socket.recv_multipart(copy=False)
                self._inbox.put([frame.buffer for frame in frames])
            if bell in ready:
                os.eventfd_read(bell)
            is_closed = self._closed  # what was sent before that goes yet
            is_more = self._send_in_turn()
            poller.modify(self._socket, zmq.POLLIN | (zmq.POLLOUT if is_more else 0))

    def _send_in_turn(self) -> bool:
        """Send as much as is taken without waiting. Returns whether there is more."""
        while self._socket.poll(0, zmq.POLLOUT):
            with self._lock:
                if not self._lanes:
                    return False
                frames = self._lanes.take()
            # A connection that breaks just then takes the message with it.
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart(list(frames), zmq.NOBLOCK, copy=_frame_bytes(frames) < 65_536)
        with self._lock:
            return bool(self._lanes)


def _make_room() -> None:
    """Let strangers' connections leave descriptors to the files of the run, as far as that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _NUM_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _NUM_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Handshakes:
    """Tells from handshakes that failed whether waiting will mend them."""

    def __init__(self, address: str, pair: keys.KeyPair | None) -> None:
        self._address, self._pair = address, pair
        self._hung_up_s: float | None = None
        self._succeeded = False

    def fault(self, event: int, value: int, now_s: float) -> str:
        """What a person has to mend, or ""."""
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._succeeded = True
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return self._refused(value)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
                return self._mismatched()
        elif not self._succeeded:
            return self._hung_up(now_s)
        return ""

    def _hung_up(self, now_s: float) -> str:
        if _named_mechanism(self._address) not in ("", "CURVE" if self._pair else "NULL"):
            return self._mismatched()
        if not self._pair:  # a tunnel that leads to no server yet, say: such a one is waited for
            return ""
        self._hung_up_s = now_s if self._hung_up_s is None else self._hung_up_s
        if now_s - self._hung_up_s < _HUNG_UP_S:
            return ""
        return (
            f"{self._address}: the server hangs up in the handshake: its key is another than the given server"
            " key, or no server is behind this address; check both"
        )

    def _refused(self, status: int) -> str:
        if self._pair and status == _NOT_ALLOWED:
            return (
                f"{self._address}: the server does not admit this key; have this line added to its"
                f" allow-list (server.allow): WORKER_ID {self._pair.public}"
            )
        return (
            f"{self._address}: the server admits nobody unknown from here for now (too many were, or it"
            " fails to check keys, which its records say); try again later"
        )

    def _mismatched(self) -> str:
        if self._pair:
            return f"{self._address}: the server has no keys; leave --key and --server-key out"
        return (
            f"{self._address}: the server demands a key; make one with 'lte keys new NAME', have it added"
            " to the server's allow-list, and give --key NAME.secret --server-key SERVER.public"
        )


def _named_mechanism(address: str) -> str:
    """How the server at a TCP address secures connections, as it says itself; "" where nobody does.

    A busy server may read the whole greeting of a worker before it has sent its own: then it hangs up on
    one of another mechanism without a word of it. So this one is shown no more than the beginning.
    """
    if (tcp := _parse(address)) is None:
        return ""
    server = tcp["host"].strip("[]"), int(tcp["port"])
    try:
        with (
            socket.create_connection(server, _NAMES_WITHIN_S) as connection,
            connection.makefile("rb") as answer,
        ):
            connection.sendall(_GREETING_BEGINS)
            greeting = answer.read(_GREETING_BYTES)
    except OSError:  # it is away, or busy: then it is asked again when it has hung up again
        return ""
    return greeting[_MECHANISM].rstrip(b"\0").decode("ascii", "replace")


def bind(
    address: str,
    *,
    max_message_bytes: int,
    insecure: bool,
    key: str | Path | None,
    allow: str | Path | None,
) -> ZmqServer:
    """See `transport.bind`."""
    tcp = _parse(address)
    if tcp is None:
        _check_path(address)
    elif key is None and not insecure and not is_loopback(tcp["host"].strip("[]")):
        raise ConnectError(
            f"{address}: other machines reach this address and there are no keys; make them ('lte keys new"
            " keys/server') and set server.key and server.allow (a relay's are --key, --server-key and"
            " --allow), or bind to 127.0.0.1 and tunnel (ssh -L), or set server.insecure=true (a relay's is"
            " --insecure) on a network that you trust"
        )
    return ZmqServer(address, max_message_bytes=max_message_bytes, key=key, allow=allow)


def connect(
    address: str, *, key: str | Path | None, server_key: str | Path | None, lanes: Lanes | None
) -> ZmqWorker:
    """See `transport.connect`."""
    if posted.file_of(address) is None:
        _check_to_connect(address)
    return ZmqWorker(address, key=key, server_key=server_key, lanes=lanes)


def _check_to_connect(address: str) -> None:
    tcp = _parse(address)
    if tcp is not None and "*" in (tcp["host"], tcp["port"]):
        raise ConnectError(f"{address}: * is for servers; give the host and port that the server prints")


def _parse(address: str) -> re.Match[str] | None:
    """Host and port of a TCP address; None for ipc."""
    if address.startswith("ipc://") and len(address) > len("ipc://"):
        return None
    tcp = _TCP.fullmatch(address)
    if tcp is None:
        raise ConnectError(f"{address!r}: not an address; {_FORMS}")
    if tcp["port"] != "*" and int(tcp["port"]) > 65_535:
        raise ConnectError(f"{address}: ports end at 65535")
    return tcp


def _check_path(address: str) -> None:
    """libzmq deletes whatever is at an ipc path, a living server's socket included: refuse that.

    Raises:
        ConnectError: something is there that is not the leftover socket of a server that is gone.
    """
    path = Path(address.removeprefix("ipc://"))
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise ConnectError(f"{address}: {path} is there and no socket; choose another path")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return
    except OSError as error:
        raise ConnectError(f"{address}: cannot be bound ({error.strerror}); choose another path") from None
    raise ConnectError(f"{address}: in use by another server; choose another path")


def _bind_fault(address: str, error: zmq.ZMQError) -> str:
    if error.errno == zmq.EADDRINUSE:
        return (
            f"{address}: the port is in use; choose another, or * for a free one"
            " (server.address=tcp://127.0.0.1:*)"
        )
    if error.errno in (zmq.EADDRNOTAVAIL, errno.ENODEV):
        return f"{address}: this machine has no such address; use one of its own, or 127.0.0.1"
    return f"{address}: cannot be bound ({_words(error)}); {_FORMS}"


def _words(error: zmq.ZMQError) -> str:
    return zmq.strerror(error.errno or 0)
