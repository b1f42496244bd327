"""Transports: one suite for all of them, on real sockets, and what only zmq can do wrong."""

from __future__ import annotations

import contextlib
import gc
import operator
import os
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from ends import WAIT_S, hear, hear_at, plain

from lte import transport
from lte.errors import ConnectError
from lte.relay import Relay
from lte.transport import Frames, Peer, ServerEndpoint, WorkerEndpoint, keys
from lte.transport import zmq as zmq_transport

PROMPT_S = 3.0
"""What does not wait takes less; a linger of one second is in it."""
MAX_MESSAGE_BYTES = 64 << 20
SHELF_BYTES = 40 << 20
"""Of relays: less than the tests send in all."""


class Link:
    """Opens endpoints of one transport, and closes them in the end."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.has_keys = kind, "curve" in kind
        self.at_server: dict[str, Path] = {}
        self.at_relay: dict[str, Path] = {}
        self.at_worker: dict[str, Path] = {}
        if self.has_keys:
            pairs = {name: keys.create(folder / name) for name in ("server", "relay", "alice")}
            allowed = f"alice {pairs['alice'].public}\n"
            (folder / "site").write_text(allowed)
            spoken_for = f"relay/site {pairs['relay'].public} alice\n"
            (folder / "allow").write_text(spoken_for if "relay" in kind else allowed)
            self.at_server = {"key": folder / "server.secret", "allow": folder / "allow"}
            self.at_relay = {"key": folder / "relay.secret", "server_key": folder / "server.public"}
            self.at_relay["allow"] = folder / "site"
            whose = "relay" if "relay" in kind else "server"
            self.at_worker = {"key": folder / "alice.secret", "server_key": folder / f"{whose}.public"}
        self.address = {
            "inprocess": f"inprocess://{uuid.uuid4()}",
            "ipc": f"ipc://{folder}/socket",
            "collective": "collective://127.0.0.1:*",
        }.get(kind, "tcp://127.0.0.1:*")
        self.relay: Relay | None = None
        self._max_message_bytes = MAX_MESSAGE_BYTES
        self._open, self._lock = contextlib.ExitStack(), threading.Lock()

    def bind(self, max_message_bytes: int = MAX_MESSAGE_BYTES) -> ServerEndpoint:
        server = transport.bind(self.address, max_message_bytes=max_message_bytes, **self.at_server)
        self.address, self._max_message_bytes = server.address, max_message_bytes
        self._open.callback(server.close)
        return server

    def connect(self) -> WorkerEndpoint:
        with self._lock:
            if "relay" in self.kind and self.relay is None:
                self.relay = self._start_relay()
        worker = transport.connect(self.relay.address if self.relay else self.address, **self.at_worker)
        self._open.callback(worker.close)
        return worker

    def _start_relay(self) -> Relay:
        relay = Relay(
            self.address,
            "tcp://127.0.0.1:*",
            shelf_bytes=SHELF_BYTES,
            max_message_bytes=self._max_message_bytes,
            **self.at_relay,
        )
        self._open.callback(relay.close)
        serving = threading.Thread(target=relay.serve, name="relay")
        serving.start()
        self._open.callback(serving.join)
        self._open.callback(relay.stop)
        return relay

    def pair(self) -> tuple[ServerEndpoint, WorkerEndpoint]:
        return self.bind(), self.connect()

    def close(self) -> None:
        self._open.close()


@pytest.fixture(params=["inprocess", "tcp", "ipc", "curve", "collective", "relay", "relay, curve"])
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Link]:
    with contextlib.closing(Link(request.param, tmp_path)) as opened:
        yield opened


@pytest.fixture(params=["inprocess", "tcp", "ipc", "curve", "collective"])
def direct(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Link]:
    """As `link`, without relays."""
    with contextlib.closing(Link(request.param, tmp_path)) as opened:
        yield opened


@pytest.fixture(params=["tcp", "ipc", "curve", "collective"])
def sockets(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Link]:
    """As `link`, but only those between processes."""
    with contextlib.closing(Link(request.param, tmp_path)) as opened:
        yield opened


def all_together(*jobs: Callable[[], None]) -> None:
    """Run these at once, one thread each; an assertion that fails in one fails the test."""
    failures: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


# The suite


def test_messages_keep_their_order_both_ways(link: Link) -> None:
    server, worker = link.pair()
    for n in range(500):
        worker.send([b"%d" % n])
    heard = [hear(server) for _ in range(500)]
    assert [frames for _, frames in heard] == [[b"%d" % n] for n in range(500)]
    (peer,) = {peer for peer, _ in heard}
    for n in range(500):
        server.send(peer, [b"%d" % n])
    assert [hear_at(worker) for _ in range(500)] == [[b"%d" % n] for n in range(500)]


def test_the_sender_is_known_where_there_are_keys(link: Link) -> None:
    server, worker = link.pair()
    assert server.sender == ""
    for _ in range(2):
        worker.send([b"hello"])
        hear(server)
        assert server.sender == ("alice" if link.has_keys else "")
    assert server.notices() == []


@pytest.mark.parametrize(
    "frames",
    [
        [b"a"],
        [b""],
        [b"", b"a", b""],
        [b"a", b"b" * 100_000],
        [b"x"] * 100,
        [bytearray(b"a"), memoryview(b"b")],
    ],
    ids=["one", "empty", "empty ones around", "large second", "many", "buffers"],
)
def test_frames_arrive_as_they_were_cut(link: Link, frames: Frames) -> None:
    server, worker = link.pair()
    worker.send(frames)
    peer, heard = hear(server)
    assert heard == plain(frames)
    server.send(peer, frames)
    assert hear_at(worker) == plain(frames)


def test_big_messages_arrive_bit_for_bit(link: Link) -> None:
    server, worker = link.pair()
    payload = torch.randint(-(2**62), 2**62, (4 << 20,)).numpy().view("u1").data  # 32 MiB
    worker.send([b"header", payload])
    worker.send([b"next"])
    peer, heard = hear(server)
    assert heard[0] == b"header"
    assert heard[1] == payload
    assert hear(server)[1] == [b"next"]
    server.send(peer, [b"header", payload])
    server.send(peer, [b"next"])
    assert hear_at(worker)[1] == payload
    assert hear_at(worker) == [b"next"]


def test_several_workers_at_once_are_told_apart(link: Link) -> None:
    """Messages of many frames, so that one torn apart would show; each worker gets its own answers."""
    server, num_workers, num_messages = link.bind(), 5, 60

    def work(name: bytes) -> None:
        worker = link.connect()
        for n in range(num_messages):
            worker.send([name, b"%d" % n, name * 9_000, b"%d" % n])
        for n in range(num_messages):
            assert hear_at(worker) == [name, b"%d" % n]
        assert worker.pending() == 0

    def serve() -> None:
        counts: Counter[bytes] = Counter()
        names: dict[Peer, bytes] = {}
        for _ in range(num_workers * num_messages):
            peer, (name, number, payload, again) = hear(server)
            assert payload == name * 9_000
            assert number == again == b"%d" % counts[name]
            assert names.setdefault(peer, name) == name
            counts[name] += 1
            server.send(peer, [name, number])
        assert len(names) == num_workers

    all_together(serve, *(lambda n=n: work(b"worker-%d" % n) for n in range(num_workers)))


def test_a_worker_may_send_from_one_thread_while_another_waits(link: Link) -> None:
    """As heartbeats do. The answer comes only because the heartbeat went out."""
    server, worker = link.pair()
    received: list[list[bytes]] = []
    waiting = threading.Thread(target=lambda: received.append(hear_at(worker)))
    waiting.start()
    worker.send([b"heartbeat"])
    peer, heard = hear(server)
    server.send(peer, [b"answer to", *heard])
    waiting.join()
    assert received == [[b"answer to", b"heartbeat"]]


def test_threads_that_send_at_once_lose_nothing(link: Link) -> None:
    server, worker = link.pair()

    def send(name: bytes) -> None:
        for n in range(300):
            worker.send([name, b"%d" % n])

    numbers: dict[bytes, list[int]] = {b"a": [], b"b": [], b"c": []}

    def collect() -> None:
        for _ in range(900):
            name, number = hear(server)[1]
            numbers[name].append(int(number))

    all_together(collect, *(lambda name=name: send(name) for name in numbers))
    assert all(found == list(range(300)) for found in numbers.values())


def test_bytes_are_counted_the_same_on_every_transport(direct: Link) -> None:
    server, workers = direct.bind(), [direct.connect(), direct.connect()]
    assert (server.received_bytes, server.sent_bytes) == (0, 0)
    peers = []
    for worker in workers:
        worker.send([b"12", b"", b"3" * 70_000])
        peers.append(hear(server)[0])
    assert (server.received_bytes, server.sent_bytes) == (140_004, 0)
    server.send(peers[0], [b"12345"])
    server.send(peers[1], [memoryview(torch.zeros(25_000).numpy()).cast("B"), b"6"])
    server.send(b"nobody", [b"dropped"])
    assert [len(hear_at(worker)) for worker in workers] == [1, 2]
    assert (server.received_bytes, server.sent_bytes) == (140_004, 100_006)


def test_waiting_ends_at_the_timeout(link: Link) -> None:
    server, worker = link.pair()
    for timeout_s in (0.0, 0.02, -1.0):
        start_s = time.monotonic()
        assert server.receive(timeout_s) is None
        assert worker.receive(timeout_s) is None
        assert max(timeout_s, 0) <= time.monotonic() - start_s < PROMPT_S


def test_pending_counts_what_was_not_received_yet(link: Link) -> None:
    server, worker = link.pair()
    assert worker.pending() == 0
    worker.send([b"hello"])
    peer, _ = hear(server)
    for n in range(3):
        server.send(peer, [b"%d" % n])
    assert hear_at(worker) == [b"0"]
    deadline_s = time.monotonic() + WAIT_S
    while worker.pending() < 2 and time.monotonic() < deadline_s:
        server.receive(0.01)
    assert worker.pending() == 2
    hear_at(worker)
    assert worker.pending() == 1


def test_sending_to_a_worker_that_is_gone_does_nothing(direct: Link) -> None:
    server, gone, other = direct.bind(), direct.connect(), direct.connect()
    gone.send([b"hello"])
    peer, _ = hear(server)
    gone.close()
    start_s = time.monotonic()
    server.send(peer, [bytes(8 << 20)])
    assert time.monotonic() - start_s < PROMPT_S
    deadline_s, before = time.monotonic() + WAIT_S, -1
    while server.sent_bytes != before and time.monotonic() < deadline_s:  # until the break is seen
        before = server.sent_bytes
        server.send(peer, [b"more"])
        server.receive(0.01)
    assert server.sent_bytes == before, "what is dropped at once is not counted"
    other.send([b"still here"])
    peer, heard = hear(server)
    assert heard == [b"still here"]
    server.send(peer, [b"so am I"])
    assert hear_at(other) == [b"so am I"]


def test_what_was_sent_before_closing_arrives(link: Link) -> None:
    server, worker = link.pair()
    payload = bytes(8 << 20)
    worker.send([b"hello"])
    peer, _ = hear(server)
    server.send(peer, [b"welcome", payload])
    server.send(peer, [b"farewell"])
    server.close()
    assert hear_at(worker) == [b"welcome", payload]
    assert hear_at(worker) == [b"farewell"]
    server = link.bind()
    leaving = link.connect()
    leaving.send([b"hello", payload])
    leaving.send([b"leave"])
    all_together(leaving.close, lambda: [hear(server) for _ in range(2)] and None)


def test_closing_leaves_no_thread_and_no_file(link: Link, tmp_path: Path) -> None:
    """Kernel threads, so that libzmq's are among them."""
    if link.kind == "collective":  # torch begins what lasts as long as the process with the first connection
        with contextlib.closing(Link(link.kind, tmp_path)) as first:
            first.pair()[1].send([b"hello"])
    gc.collect()
    gc.freeze()  # only what comes from now on is looked through

    def held() -> tuple[int, int]:
        gc.collect()  # a socket that was left open would complain here
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    before = held()
    server, workers = link.bind(), [link.connect() for _ in range(3)]
    for worker in workers:
        worker.send([b"hello"])
        peer, _ = hear(server)
        server.send(peer, [b"welcome"])
        hear_at(worker)
    assert link.kind == "inprocess" or min(map(operator.sub, held(), before)) > 0, "the test is blind"
    start_s = time.monotonic()
    for endpoint in (*workers, server):
        endpoint.close()
    assert time.monotonic() - start_s < PROMPT_S
    del server, workers, worker, endpoint, peer
    link.close()
    deadline_s = time.monotonic() + WAIT_S  # a thread that was joined is listed a moment longer
    while max(map(operator.sub, held(), before)) > 0:
        assert time.monotonic() < deadline_s, "something is left"
    gc.unfreeze()


def test_an_endpoint_may_be_closed_twice_and_then_sends_nothing(link: Link) -> None:
    server, worker = link.pair()
    worker.send([b"hello"])
    peer, _ = hear(server)
    worker.close()
    worker.close()
    worker.send([b"too late"])
    assert server.receive(0.05) is None
    server.close()
    server.close()
    server.send(peer, [b"too late"])


def test_closing_does_not_wait_for_a_server_that_is_not_there(sockets: Link) -> None:
    sockets.bind().close()
    worker = sockets.connect()
    worker.send([b"hello", bytes(1 << 20)])
    start_s = time.monotonic()
    worker.close()
    assert time.monotonic() - start_s < PROMPT_S


def test_a_worker_may_come_before_its_server(sockets: Link) -> None:
    sockets.bind().close()  # for the port that it got
    worker = sockets.connect()
    worker.send([b"hello"])
    server = sockets.bind()
    peer, heard = hear(server)
    assert heard == [b"hello"]
    server.send(peer, [b"welcome"])
    assert hear_at(worker) == [b"welcome"]


def test_a_server_that_starts_again_is_found_again(link: Link) -> None:
    server, worker = link.pair()
    worker.send([b"first"])
    assert hear(server)[1] == [b"first"]
    server.close()
    server = link.bind()
    deadline_s, heard = time.monotonic() + WAIT_S, None
    while heard is None and time.monotonic() < deadline_s:  # a message may be lost with the connection
        worker.send([b"second"])
        heard = server.receive(0.1)
    assert heard is not None
    assert plain(heard[1]) == [b"second"]
    server.send(heard[0], [b"welcome back"])
    assert hear_at(worker) == [b"welcome back"]


@pytest.mark.parametrize("kind", ["tcp", "relay"])
def test_a_connection_that_breaks_as_it_is_sent_to_loses_a_message_and_no_more(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket takes no message any more that it would have taken when it was asked."""
    with contextlib.closing(Link(kind, tmp_path)) as link:
        server, worker = link.pair()
        fates, send = [zmq.Again], zmq.Socket.send_multipart
        num_frames = 2 if link.relay else 1  # so that it is the relay's connection to the server

        def breaks(self: Any, frames: Frames, *options: Any, **more: Any) -> Any:
            if fates and b"lost" in frames and len(frames) == num_frames:
                raise fates.pop()
            return send(self, frames, *options, **more)

        monkeypatch.setattr(zmq.Socket, "send_multipart", breaks)
        worker.send([b"lost"])
        worker.send([b"not lost"])
        assert hear(server)[1] == [b"not lost"]
        assert not fates


def test_who_uses_a_connection_whose_thread_ended_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a relay, say, would go on for ever, and hear nothing."""
    with contextlib.closing(transport.connect("tcp://127.0.0.1:1")) as worker:

        def fails(*_: Any, **__: Any) -> None:
            raise OSError("a fault")

        monkeypatch.setattr(zmq.Socket, "send_multipart", fails)
        worker.send([b"hello"])
        with pytest.raises(ConnectError, match=r"the connection's own thread ended .*a fault"):
            worker.receive(WAIT_S)
        worker.send([b"is not taken"])


def test_larger_messages_than_allowed_do_not_arrive(link: Link) -> None:
    server = link.bind(max_message_bytes=1_000)
    good, bad = link.connect(), link.connect()
    good.send([b"x" * 1_000])
    peer, heard = hear(server)
    assert heard == [b"x" * 1_000]
    bad.send([b"header", b"x" * 1_001])
    bad.send([b"x" * 3_000_000])
    assert server.receive(0.2) is None
    server.send(peer, [b"still here"])
    assert hear_at(good) == [b"still here"]
    good.send([b"so am I"])
    assert hear(server) == (peer, [b"so am I"])
    envelopes_bytes = 2 * 60 if link.relay else 0
    assert 1_007 <= server.received_bytes <= 1_007 + envelopes_bytes
    server.send(peer, [b"y" * 5_000])  # the limit is the server's own; a base is larger than a contribution
    assert hear_at(good) == [b"y" * 5_000]


@pytest.mark.parametrize("kind", ["tcp", "ipc"])
def test_a_connection_that_is_not_heard_is_held_up_and_loses_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever sends faster than a server hears would fill its memory."""
    monkeypatch.setattr(zmq_transport, "_MOST_WAITING", 10)
    with contextlib.closing(Link(kind, tmp_path)) as link, zmq.Context() as context:
        server = link.bind()
        with context.socket(zmq.DEALER) as flood:
            flood.setsockopt(zmq.SNDHWM, 1)
            flood.connect(link.address)
            num_sent = 0
            while flood.poll(1000, zmq.POLLOUT) and num_sent < 1000:
                flood.send(b"%6d" % num_sent + bytes(100_000))
                num_sent += 1
            assert 10 < num_sent < 1000, "what is beyond ten waits in the kernel's buffers"
            heard = [hear(server)[1][0][:6] for _ in range(num_sent)]
            assert heard == [b"%6d" % n for n in range(num_sent)]


def test_an_address_in_use_is_refused_and_its_server_goes_on(link: Link) -> None:
    server, worker = link.pair()
    with pytest.raises(ConnectError, match=r"in use.*; choose another|in use; choose another") as raised:
        transport.bind(link.address, max_message_bytes=1)
    assert link.address in str(raised.value)
    assert "\n" not in str(raised.value)
    worker.send([b"hello"])
    assert hear(server)[1] == [b"hello"]
    newcomer = link.connect()
    newcomer.send([b"hello, too"])
    assert hear(server)[1] == [b"hello, too"]


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        "tcp://0.0.0.0:*",
        "tcp://*:*",
        "tcp://*:5555",
        "tcp://192.168.1.7:5555",
        "tcp://10.0.0.1:*",
        "tcp://a-machine:5555",
        "tcp://a-machine.example.org:5555",
        "tcp://eth0:5555",
        "tcp://[::]:*",
        "tcp://[fe80::1]:5555",
        "tcp://127.0.0.1.example.org:5555",
        "tcp://localhost.example.org:5555",
    ],
)
def test_only_loopback_is_bound_without_insisting(address: str) -> None:
    with pytest.raises(ConnectError, match="insecure=true") as raised:
        transport.bind(address, max_message_bytes=1_000)
    assert address in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:*", "tcp://*:*"])
def test_other_addresses_are_bound_by_those_who_insist(address: str) -> None:
    server = transport.bind(address, max_message_bytes=1_000, insecure=True)
    port = server.address.rpartition(":")[2]
    worker = transport.connect(f"tcp://127.0.0.1:{port}")
    with contextlib.closing(server), contextlib.closing(worker):
        worker.send([b"hello"])
        assert hear(server)[1] == [b"hello"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.9", "[::1]"])
def test_every_name_of_this_machine_alone_is_bound(host: str) -> None:
    if host == "[::1]":
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("no IPv6 here")
    server = transport.bind(f"tcp://{host}:*", max_message_bytes=1_000)
    port = server.address.rpartition(":")[2]
    with contextlib.closing(server):
        for address in (server.address, f"tcp://{host}:{port}"):
            with contextlib.closing(transport.connect(address)) as worker:
                worker.send([b"hello"])
                assert hear(server)[1] == [b"hello"]


MALFORMED = [
    "",
    "127.0.0.1:5555",
    "127.0.0.1",
    "http://127.0.0.1:5555",
    "tcp:/127.0.0.1:5555",
    "tcp//127.0.0.1:5555",
    "tcp://",
    "tcp://127.0.0.1",
    "tcp://127.0.0.1:",
    "tcp://127.0.0.1:port",
    "tcp://127.0.0.1:99999",  # zmq takes it, modulo 65536
    "tcp://127.0.0.1:-5",  # this, too
    "tcp://127.0.0.1:65536",
    "tcp://127.0.0.1:5555/x",
    "tcp://:5555",
    "tcp://127.0.0.1: 5555",
    " tcp://127.0.0.1:5555",
    "tcp://127.0.0.1:5555\n",
    "tcp://::1:5555",
    "tcp://[::1:5555",
    "tcp://me@127.0.0.1:5555",
    "ipc://",
    "ipc://" + "long" * 100,
    "pgm://127.0.0.1:5555",
    "inproc://x",
]


@pytest.mark.parametrize("address", MALFORMED)
@pytest.mark.parametrize("open_", [lambda a: transport.bind(a, max_message_bytes=1), transport.connect])
def test_a_malformed_address_is_one_line(
    address: str, open_: Callable[[str], ServerEndpoint | WorkerEndpoint]
) -> None:
    with pytest.raises(ConnectError) as raised:
        open_(address)
    line = str(raised.value)
    assert address.strip() in line
    assert "\n" not in line
    assert any(cure in line for cure in ("tcp://HOST:PORT", "ports end at 65535", "choose another path"))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "tcp://*:5555"])
def test_a_worker_needs_a_real_address(address: str) -> None:
    with pytest.raises(ConnectError, match="give the host and port that the server prints"):
        transport.connect(address)


def test_a_server_of_this_process_must_be_there_first() -> None:
    with pytest.raises(ConnectError, match="no server of this process"):
        transport.connect("inprocess://nobody")


def test_an_address_of_another_machine_cannot_be_bound() -> None:
    """192.0.2.0/24 is nobody's: RFC 5737."""
    with pytest.raises(ConnectError, match="this machine has no such address"):
        transport.bind("tcp://192.0.2.1:*", max_message_bytes=1, insecure=True)


def test_an_ipc_path_replaces_nothing_but_a_socket_that_was_left(tmp_path: Path) -> None:
    """libzmq deletes whatever is there, were it a recipe or the socket of a server that lives."""
    note = tmp_path / "recipe.yaml"
    note.write_text("train:")
    for path in (note, tmp_path):
        with pytest.raises(ConnectError, match="is there and no socket"):
            transport.bind(f"ipc://{path}", max_message_bytes=1)
    assert note.read_text() == "train:"
    with pytest.raises(ConnectError, match="No such file or directory"):
        transport.bind(f"ipc://{tmp_path}/missing/socket", max_message_bytes=1)
    left = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(left))
    server = transport.bind(f"ipc://{left}", max_message_bytes=1_000)
    worker = transport.connect(f"ipc://{left}")
    with contextlib.closing(server), contextlib.closing(worker):
        worker.send([b"hello"])
        assert hear(server)[1] == [b"hello"]


# A slow link


class SlowLink:
    """A TCP proxy that lets so many bytes pass, then holds the rest until it is told to go on."""

    def __init__(self, port: int, after_bytes: int) -> None:
        self._port, self._after_bytes = port, after_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.holding, self.go_on = threading.Event(), threading.Event()
        self.num_connections = 0
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self.go_on.set()
        for opened in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for opened in (self._listener, *self._open):
            opened.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                worker, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self.num_connections += 1
                self._open += [worker, server]
                for job in ((worker, server, self._after_bytes), (server, worker, 1 << 62)):
                    self._threads.append(threading.Thread(target=self._pump, args=job))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, target: socket.socket, left: int) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(65_536):
                target.sendall(chunk)
                left -= len(chunk)
                if left < 0 and not self.go_on.is_set():
                    self.holding.set()
                    self.go_on.wait()
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_a_message_that_takes_long_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ZMTP's heartbeats, a pong waits behind the frame under way, and the link is cut at the timeout:
    with 10 s, no 100 MB ever arrived at 10 MB/s. Whatever is asked of them goes 50 times faster here.
    """
    setsockopt = zmq.Socket.setsockopt

    def hurried(self: zmq.Socket[bytes], option: int, value: int) -> None:
        is_time = option in (zmq.HEARTBEAT_IVL, zmq.HEARTBEAT_TIMEOUT, zmq.HEARTBEAT_TTL)
        setsockopt(self, option, -(-value // 50) if is_time else value)

    monkeypatch.setattr(zmq.Socket, "setsockopt", hurried)
    with contextlib.closing(transport.bind("tcp://127.0.0.1:*", max_message_bytes=1 << 30)) as server:
        link = SlowLink(int(server.address.rpartition(":")[2]), after_bytes=1 << 20)
        with contextlib.closing(link), contextlib.closing(transport.connect(link.address)) as worker:
            payload = bytes(8 << 20)
            worker.send([b"header", payload])
            assert link.holding.wait(WAIT_S)
            assert server.receive(0.5) is None, "half a message"
            link.go_on.set()
            assert hear(server)[1] == [b"header", payload]
            assert link.num_connections == 1
