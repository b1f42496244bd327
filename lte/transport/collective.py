"""torch.distributed: Gloo carries frames between the server and each of its workers.

Every connection is a group of two (see `pair`), which meets at the server's store (see `meeting`): a
group of all would break with the first of them that dies, and could be mended only by all together. So
workers come, go and come back one by one, as by zmq. Of each connection one thread sends and one
receives. Frames travel as tensors of bytes; nothing is pickled. There are no keys: all are trusted.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from lte.errors import ConnectError
from lte.printable import printable
from lte.transport import meeting
from lte.transport.base import Frames, Peer
from lte.transport.pair import SERVER, WORKER, Device, Pair, device_at

_LINGER_S = 1.0
_LOOK_EVERY_S = 0.03
"""How often the server looks whether a worker has come."""
_AGAIN_S, _AGAIN_MOST_S = 0.1, 2.0
"""After which a worker looks for its server again: first, and at most."""
_END_S = 2.0
"""A thread that looks for somebody who is gone ends by itself, later than anybody would wait."""
_MOST_WAITING = 1024
"""Messages of one connection that wait to be heard; then its sender waits."""


class _Outbox:
    """Messages that wait to be sent, in order."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Frames] = deque()
        self._num_open = 0  # waiting, or handed out and not `done`

    def put(self, frames: Frames) -> None:
        with self._changed:
            self._waiting.append(frames)
            self._num_open += 1
            self._changed.notify_all()

    def take(self, is_over: Callable[[], bool]) -> Frames | None:
        """The next message, once there is one; None once it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or is_over())
            return None if is_over() else self._waiting.popleft()

    def done(self) -> None:
        """What was taken last is sent, or lost."""
        with self._changed:
            self._num_open -= 1
            self._changed.notify_all()

    def wake(self) -> None:
        """Have `take` look whether it is over."""
        with self._changed:
            self._changed.notify_all()

    def until_sent(self, deadline_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._num_open, max(0.0, deadline_s - time.monotonic()))


class _Link:
    """A connection at work, until it breaks or is ended."""

    def __init__(self, pair: Pair, outbox: _Outbox, *, most_waiting: int | None = None) -> None:
        """Begin to send.

        Args:
            most_waiting: messages received and not `heard`, beyond which the other end is held up.
        """
        self.outbox = outbox
        self._pair, self._is_over = pair, False
        self._room = None if most_waiting is None else threading.Semaphore(most_waiting)
        self._sender = threading.Thread(target=self._send_all, name="lte-collective-send", daemon=True)
        self._sender.start()

    def receive_all(self, take: Callable[[list[memoryview]], None]) -> None:
        """Hand over what comes, until the end."""
        try:
            while not self._is_over:
                frames = self._pair.receive()
                if self._room is not None:
                    self._room.acquire()
                take(frames)
        except ConnectionError:
            pass  # whoever misses something asks again
        finally:
            self.end()
            self._sender.join()

    def heard(self) -> None:
        """One of the messages received makes room for another."""
        assert self._room is not None
        self._room.release()

    def end(self) -> None:
        """Break the connection; what is under way is lost."""
        self._is_over = True
        self._pair.abort()
        self.outbox.wake()
        if self._room is not None:
            self._room.release()

    def _send_all(self) -> None:
        while (frames := self.outbox.take(lambda: self._is_over)) is not None:
            try:
                self._pair.send(frames)
            except ConnectionError:
                self.end()
            finally:
                self.outbox.done()


class CollectiveServer:
    """See `base.ServerEndpoint`."""

    def __init__(self, address: str, *, max_message_bytes: int, insecure: bool) -> None:
        self._listener = meeting.Listener(address, insecure=insecure)
        self.address = self._listener.address
        self.received_bytes = self.sent_bytes = 0
        self.sender = self.key_owner = self.origin = ""
        self.is_relayed = False
        self._max_message_bytes = max_message_bytes
        self._inbox: queue.Queue[tuple[Peer, str, list[memoryview], _Link] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._links: dict[Peer, _Link] = {}
        self._devices: dict[str, Device] = {}
        self._threads: list[threading.Thread] = []
        self._notices: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._accepting = threading.Thread(target=self._accept, name="lte-collective", daemon=True)
        self._accepting.start()

    def send(self, peer: Peer, frames: Frames) -> None:
        with self._lock:
            if (link := self._links.get(peer)) is None or self._closing.is_set():
                return
            link.outbox.put(frames)
            self.sent_bytes += sum(memoryview(frame).nbytes for frame in frames)

    def receive(self, timeout_s: float | None) -> tuple[Peer, Frames] | None:
        try:
            got = self._inbox.get(timeout=None if timeout_s is None else max(timeout_s, 0))
        except queue.Empty:
            return None
        if got is None:
            return None
        peer, self.origin, frames, link = got
        link.heard()
        self.received_bytes += sum(map(len, frames))
        return peer, frames

    def watch(self, descriptors: Sequence[int]) -> None:
        assert not descriptors, "nothing but its own queue can be waited for"

    def speaks_for(self, worker_id: str) -> bool:
        return True

    def wake(self) -> None:
        self._inbox.put(None)

    def notices(self) -> list[str]:
        return [self._notices.get_nowait() for _ in range(self._notices.qsize())]

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        self._accepting.join()
        with self._lock:
            links = list(self._links.values())
        deadline_s = time.monotonic() + _LINGER_S
        for link in links:
            link.outbox.until_sent(deadline_s)
        for link in links:
            link.end()
        self._listener.close()
        for thread in self._threads:
            thread.join(_END_S)
        self._devices = {}

    def _accept(self) -> None:
        num_accepted, is_told = 0, False
        while not self._closing.wait(_LOOK_EVERY_S):
            try:
                num_arrivals = self._listener.num_arrivals()
            except ConnectionError as error:
                if not is_told:
                    reason = str(error).partition("\n")[0]  # what follows is for who debugs torch
                    self._notices.put(f"{self.address}: no worker can come until this passes: {reason}")
                is_told = True
                continue
            is_told = False
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            for number in range(num_accepted + 1, num_arrivals + 1):
                name = f"lte-collective-{number}"
                self._threads.append(
                    threading.Thread(target=self._hold, args=(number,), name=name, daemon=True)
                )
                self._threads[-1].start()
            num_accepted = num_arrivals

    def _hold(self, number: int) -> None:
        """One connection, from its begin to its end."""
        peer = b"%d" % number
        try:
            arrived = self._listener.arrived(number)
            with self._lock:
                ip = arrived.server_ip
                if (device := self._devices.get(ip)) is None:
                    device = self._devices[ip] = device_at(ip)
            pair = Pair(arrived.store, SERVER, device, most_bytes=self._max_message_bytes)
        except ConnectionError:
            return  # it comes again, if it lives
        with self._lock:
            if self._closing.is_set():
                pair.abort()
                return
            link = self._links[peer] = _Link(pair, _Outbox(), most_waiting=_MOST_WAITING)
        origin = printable(arrived.worker_ip)
        link.receive_all(lambda frames: self._inbox.put((peer, origin, frames, link)))
        with self._lock:
            del self._links[peer]


class CollectiveWorker:
    """See `base.WorkerEndpoint`. One thread looks for the server, and receives once it has found it."""

    def __init__(self, address: str) -> None:
        self.address, self._find = address, meeting.finder(address)
        self._inbox: queue.Queue[list[memoryview]] = queue.Queue()
        self._outbox = _Outbox()
        self._lock = threading.Lock()
        self._link: _Link | None = None
        self._is_closed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="lte-collective", daemon=True)
        self._thread.start()

    def send(self, frames: Frames, lane: bytes = b"") -> None:
        if not self._is_closed:
            self._outbox.put(frames)

    def receive(self, timeout_s: float) -> Frames | None:
        try:
            return self._inbox.get(timeout=max(timeout_s, 0))
        except queue.Empty:
            return None

    def pending(self) -> int:
        return self._inbox.qsize()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._outbox.until_sent(time.monotonic() + _LINGER_S)
        with self._lock:
            self._closing.set()
            link = self._link
        if link is not None:
            link.end()
        self._thread.join(_END_S)

    def _serve(self) -> None:
        again_s = _AGAIN_S
        while not self._closing.is_set():
            try:
                pair = self._meet()
            except (ConnectionError, ConnectError):  # nobody there yet, or gone again
                self._closing.wait(again_s)
                again_s = min(2 * again_s, _AGAIN_MOST_S)
                continue
            with self._lock:
                if self._closing.is_set():
                    pair.abort()
                    return
                self._link = _Link(pair, self._outbox)
            self._link.receive_all(self._inbox.put)
            self._link, again_s = None, _AGAIN_S

    def _meet(self) -> Pair:
        """Raises ConnectionError where no server is."""
        arrived = meeting.arrive(self._find())
        return Pair(arrived.store, WORKER, device_at(arrived.worker_ip), most_bytes=None)


def bind(address: str, *, max_message_bytes: int, insecure: bool) -> CollectiveServer:
    """See `transport.bind`."""
    return CollectiveServer(address, max_message_bytes=max_message_bytes, insecure=insecure)


def connect(address: str) -> CollectiveWorker:
    """See `transport.connect`."""
    return CollectiveWorker(address)
