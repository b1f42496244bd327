"""pyzmq: ROUTER on the server, DEALER on the workers, over TCP or ipc.

TCP addresses other than loopback are refused unless the caller insists: there are no keys yet.
"""

from __future__ import annotations

import ipaddress
import queue
import threading
from collections import deque

import zmq

from lte.errors import ConnectError
from lte.transport.base import Frames, Peer

# A peer that stops answering ZMTP pings is disconnected; the transport then reconnects.
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 2_000, 10_000
_LINGER_MS = 1_000


def _frame_bytes(frames: Frames) -> int:
    return sum(memoryview(frame).nbytes for frame in frames)


def _prepare(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    # No message is dropped for being one too many; the protocol has few in flight.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)


class ZmqServer:
    """See `base.ServerEndpoint`."""

    def __init__(self, address: str, *, max_message_bytes: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        _prepare(self._socket)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConnectError(_bind_fault(address, error)) from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.received_bytes = self.sent_bytes = 0

    def send(self, peer: Peer, frames: Frames) -> None:
        # Large frames are handed over without a copy; ROUTER drops what has no peer any more.
        self._socket.send_multipart([peer, *frames], copy=_frame_bytes(frames) < 65_536)
        self.sent_bytes += _frame_bytes(frames)

    def receive(self, timeout_s: float | None) -> tuple[Peer, Frames] | None:
        if not self._socket.poll(None if timeout_s is None else max(0, int(timeout_s * 1000) + 1)):
            return None
        peer, *frames = self._socket.recv_multipart(copy=False)
        views = [frame.buffer for frame in frames]
        self.received_bytes += _frame_bytes(views)
        return bytes(peer.buffer), views

    def close(self) -> None:
        self._context.destroy(linger=_LINGER_MS)


class ZmqWorker:
    """See `base.WorkerEndpoint`. One thread owns the socket; queues lead to and from it."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        _prepare(self._socket)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5_000)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConnectError(f"{address}: not an address to connect to ({error.strerror})") from None
        self._inbox: queue.Queue[list[memoryview]] = queue.Queue()
        self._outbox: deque[Frames | None] = deque()
        self._lock = threading.Lock()
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
        self._put(None)
        self._thread.join()
        self._context.destroy(linger=_LINGER_MS)

    def _put(self, item: Frames | None) -> None:
        with self._lock:  # the bell is a socket, which one thread at a time may use
            self._outbox.append(item)
            self._bell.send(b"")

    def _serve(self, bell: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(bell, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
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
    if not insecure and not _is_local(address):
        raise ConnectError(
            f"{address}: other machines reach this address and there are no keys; bind to 127.0.0.1 and"
            " tunnel (ssh -L), or set server.insecure=true on a network that you trust"
        )
    return ZmqServer(address, max_message_bytes=max_message_bytes)


def connect(address: str) -> ZmqWorker:
    """See `transport.connect`."""
    return ZmqWorker(address)


def _is_local(address: str) -> bool:
    scheme, _, rest = address.partition("://")
    if scheme == "ipc":
        return True
    host = rest.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind_fault(address: str, error: zmq.ZMQError) -> str:
    if error.errno == zmq.EADDRINUSE:
        return f"{address}: the port is in use; choose another, or * for a free one (server.address=tcp://127.0.0.1:*)"
    return f"{address}: cannot be bound ({error.strerror}); an address is tcp://HOST:PORT or ipc://PATH"
