"""pyzmq: ROUTER on the server, DEALER on the workers, over TCP or ipc.

TCP addresses other than loopback are refused unless the caller insists: there are no keys yet.
"""

from __future__ import annotations

import errno
import ipaddress
import queue
import re
import socket
import stat
import threading
from collections import deque
from pathlib import Path

import zmq

from lte.errors import ConnectError
from lte.transport.base import Frames, Peer

_LINGER_MS = 1_000
# The kernel looks after a peer whose machine is gone: it asks after so much silence, again after
# so long, so many times, and waits so long for what it sent to be acknowledged. ZMTP's own
# heartbeats are off: their answer queues behind a large frame, so they cut slow links in the middle.
_KEEPALIVE_IDLE_S, _KEEPALIVE_AGAIN_S, _KEEPALIVE_TIMES, _UNACKNOWLEDGED_MS = 10, 5, 4, 30_000

_TCP = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.]+(?:%\w+)?\]|[\w.-]+|\*):(?P<port>\*|\d{1,5})", re.ASCII)
_FORMS = "an address is tcp://HOST:PORT, ipc://PATH or inprocess://NAME"


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

    def __init__(self, address: str, *, max_message_bytes: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        _prepare(self._socket, address)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close(linger=0)
            self._context.term()
            raise ConnectError(_bind_fault(address, error)) from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.received_bytes = self.sent_bytes = 0

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
        if not self._socket.poll(None if timeout_s is None else max(0, int(timeout_s * 1000) + 1)):
            return None
        peer, *frames = self._socket.recv_multipart(copy=False)
        views = [frame.buffer for frame in frames]
        self.received_bytes += _frame_bytes(views)
        return bytes(peer.buffer), views

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class ZmqWorker:
    """See `base.WorkerEndpoint`. One thread owns the socket; queues lead to and from it."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        _prepare(self._socket, address)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5_000)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.close(linger=0)
            self._context.term()
            raise ConnectError(f"{address}: cannot connect ({_words(error)}); {_FORMS}") from None
        self._inbox: queue.Queue[list[memoryview]] = queue.Queue()
        self._outbox: deque[Frames | None] = deque()
        self._lock, self._closed = threading.Lock(), False
        self._bell, bell = (self._context.socket(zmq.PAIR) for _ in range(2))
        bell.bind("inproc://outbox")
        self._bell.connect("inproc://outbox")
        self._thread = threading.Thread(target=self._serve, args=(bell,), name="lte-zmq", daemon=True)
        self._thread.start()

    def send(self, frames: Frames) -> None:
        self._put(frames)

    def receive(self, timeout_s: float) -> Frames | None:
        try:
            return self._inbox.get(timeout=max(timeout_s, 0))
        except queue.Empty:
            return None

    def pending(self) -> int:
        return self._inbox.qsize()

    def close(self) -> None:
        self._put(None)  # nothing is taken after it
        self._thread.join()
        self._bell.close()
        self._context.term()

    def _put(self, item: Frames | None) -> None:
        with self._lock:  # the bell is a socket, which one thread at a time may use
            if self._closed:
                return
            self._closed = item is None
            self._outbox.append(item)
            self._bell.send(b"")

    def _serve(self, bell: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(bell, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        with bell, self._socket:
            while True:
                ready = dict(poller.poll())
                if self._socket in ready:
                    frames = self._socket.recv_multipart(copy=False)
                    self._inbox.put([frame.buffer for frame in frames])
                if bell in ready:
                    bell.recv()
                    item = self._outbox.popleft()
                    if item is None:
                        return
                    self._socket.send_multipart(list(item), copy=_frame_bytes(item) < 65_536)


def bind(address: str, *, max_message_bytes: int, insecure: bool) -> ZmqServer:
    """See `transport.bind`."""
    tcp = _parse(address)
    if tcp is None:
        _check_path(address)
    elif not insecure and not _is_loopback(tcp["host"].strip("[]")):
        raise ConnectError(
            f"{address}: other machines reach this address and there are no keys; bind to 127.0.0.1 and"
            " tunnel (ssh -L), or set server.insecure=true on a network that you trust"
        )
    return ZmqServer(address, max_message_bytes=max_message_bytes)


def connect(address: str) -> ZmqWorker:
    """See `transport.connect`."""
    tcp = _parse(address)
    if tcp is not None and "*" in (tcp["host"], tcp["port"]):
        raise ConnectError(f"{address}: * is for servers; give the host and port that the server prints")
    return ZmqWorker(address)


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


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
