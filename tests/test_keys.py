"""Keys: who gets in, who is heard, who may speak for whom. docs/security.md names these tests."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
import zmq
from processes import Family, done, lines
from torch import nn

import lte
from lte import config, transport, wire
from lte.cli import main
from lte.config import Recipe
from lte.data import pack
from lte.errors import ConfigError, ConnectError, KeysError, RefusedError
from lte.server.admission import Complaints, vouched
from lte.server.service import Server
from lte.track import METRICS, Records
from lte.transport import ServerEndpoint, WorkerEndpoint, keys
from lte.transport.gate import Gate
from lte.transport.keys import AllowList
from lte.transport.limits import Buckets
from lte.transport.zmq import _Handshakes

WAIT_S = 20.0
MAX_MESSAGE_BYTES = 1 << 20


class Ring:
    """A folder with keys of a server and of workers, an allow-list, and endpoints that use them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.allow = folder, folder / "allow"
        self._open = contextlib.ExitStack()
        self.pairs = {name: keys.create(folder / name) for name in ("server", "alice", "bob", "mallory")}
        self.write("alice", "bob")

    def write(self, *names: str, also: str = "") -> None:
        """Replace the allow-list at once, as by an editor: these names' keys, and lines of one's own."""
        new = self.allow.with_suffix(".new")
        new.write_text("".join(f"{name} {self.pairs[name].public}\n" for name in names) + also)
        new.replace(self.allow)

    def bind(self, **options: Any) -> ServerEndpoint:
        key = self.folder / "server.secret"
        options = {"key": key, "allow": self.allow, "max_message_bytes": MAX_MESSAGE_BYTES} | options
        server = transport.bind("tcp://127.0.0.1:*", **options)
        self._open.callback(server.close)
        return server

    def connect(self, server: ServerEndpoint | str, name: str, server_key: str = "server") -> WorkerEndpoint:
        address = server if isinstance(server, str) else server.address
        worker = transport.connect(address, **self.files(name, server_key))
        self._open.callback(worker.close)
        return worker

    def files(self, name: str, server_key: str = "server") -> dict[str, Path]:
        return {"key": self.folder / f"{name}.secret", "server_key": self.folder / f"{server_key}.public"}

    def close(self) -> None:
        self._open.close()


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    (tmp_path / "keys").mkdir()
    with contextlib.closing(Ring(tmp_path / "keys")) as opened:
        yield opened


def hear(server: ServerEndpoint) -> tuple[str, bytes]:
    """Who the next message is from, and its one frame."""
    received = server.receive(WAIT_S)
    assert received is not None, "nothing arrived"
    (frame,) = received[1]
    return server.sender, bytes(frame)


def refused(worker: WorkerEndpoint) -> str:
    """The line by which a worker learns that it is not let in."""
    with pytest.raises(ConnectError) as raised:
        worker.receive(WAIT_S)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def only_good_ones_are_heard(ring: Ring, server: ServerEndpoint) -> None:
    """A good peer still gets in, and nothing stands before its message."""
    good = ring.connect(server, "bob")
    good.send([b"good"])
    assert hear(server) == ("bob", b"good")
    assert server.receive(0) is None


# Who gets in


def test_known_keys_get_in_and_their_names_are_known(ring: Ring) -> None:
    server = ring.bind()
    workers = {name: ring.connect(server, name) for name in ("alice", "bob")}
    for _ in range(3):
        for name, worker in workers.items():
            worker.send([name.encode()])
            received = server.receive(WAIT_S)
            assert received is not None
            assert server.sender == name == bytes(received[1][0]).decode()
            server.send(received[0], [b"welcome", name.encode()])
            answer = worker.receive(WAIT_S)
            assert answer is not None
            assert [bytes(frame) for frame in answer] == [b"welcome", name.encode()]
    assert server.notices() == []


def test_an_unknown_key_does_not_get_in(ring: Ring) -> None:
    server = ring.bind()
    stranger = ring.connect(server, "mallory")
    stranger.send([b"let me in"])
    line = refused(stranger)
    assert f"WORKER_ID {ring.pairs['mallory'].public}" in line, "what to add to the list"
    assert "does not admit this key" in line
    (notice,) = server.notices()
    assert ring.pairs["mallory"].public in notice
    assert "127.0.0.1" in notice
    only_good_ones_are_heard(ring, server)


def knock(stranger: zmq.Socket[bytes]) -> None:
    """Ask to be let in, unless it is refused already: libzmq would wait for a connection to send it to."""
    with contextlib.suppress(zmq.Again):
        stranger.send(b"let me in", zmq.NOBLOCK)


def test_a_peer_without_a_key_does_not_get_in(ring: Ring) -> None:
    server = ring.bind()
    stranger = transport.connect(server.address)
    with contextlib.closing(stranger):
        stranger.send([b"let me in"])
        assert "the server demands a key" in refused(stranger)
        only_good_ones_are_heard(ring, server)


@pytest.mark.parametrize(
    ("has_keys", "own", "says"),
    [
        (True, "", "the server demands a key"),
        (False, "alice", "the server has no keys"),
        (True, "alice", ""),
        (False, "", ""),
    ],
)
def test_a_server_that_hung_up_before_it_had_said_why_is_asked(
    ring: Ring, monkeypatch: pytest.MonkeyPatch, has_keys: bool, own: str, says: str
) -> None:
    """As a busy one does whose mechanism is another."""
    monkeypatch.setattr("lte.transport.zmq._NAMES_WITHIN_S", WAIT_S)
    server = ring.bind() if has_keys else ring.bind(key=None, allow=None)
    handshakes = _Handshakes(server.address, ring.pairs.get(own))
    fault = handshakes.fault(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, 0, now_s=0.0)
    assert (bool(fault), says in fault) == (bool(says), True)
    assert server.notices() == []
    if has_keys:
        only_good_ones_are_heard(ring, server)


def test_a_tunnel_that_leads_to_no_server_yet_is_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as tunnel:
        handshakes = _Handshakes(f"tcp://127.0.0.1:{tunnel.getsockname()[1]}", None)
        hanging_up = threading.Thread(target=lambda: tunnel.accept()[0].close())
        hanging_up.start()
        assert handshakes.fault(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, 0, now_s=100.0) == ""
        hanging_up.join()


@pytest.mark.parametrize("mechanism", ["NULL", "PLAIN"])
def test_another_mechanism_does_not_get_in(ring: Ring, mechanism: str) -> None:
    """A peer of pyzmq's own, so that nothing of ours stands between."""
    server = ring.bind()
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        if mechanism == "PLAIN":
            stranger.setsockopt(zmq.PLAIN_USERNAME, b"alice")
            stranger.setsockopt(zmq.PLAIN_PASSWORD, b"open sesame")
        failed = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        with stranger.get_monitor_socket(failed) as monitor:
            stranger.connect(server.address)
            knock(stranger)
            assert monitor.poll(WAIT_S * 1000), "it was let in"
            only_good_ones_are_heard(ring, server)
            stranger.disable_monitor()


# ZMTP 1.0 and 2.0, which know no keys, and 3.0 with the mechanism NULL: greetings, with the least
# bytes of the server's answer that a peer waits for, and a message behind them.
GREETINGS = {
    "ZMTP 1": ((b"\x01\x00", 10), (b"\x06\x00hello", 0)),
    "ZMTP 2": ((b"\xff" + bytes(7) + b"\x01\x7f\x01\x05", 12), (b"\x00\x00\x00\x05hello", 0)),
    "ZMTP 3": (
        (b"\xff" + bytes(7) + b"\x01\x7f\x03\x00NULL" + bytes(48), 64),
        (b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER", 1),
        (b"\x00\x05hello", 0),
    ),
}


@pytest.mark.parametrize("has_keys", [True, False])
@pytest.mark.parametrize("protocol", GREETINGS)
def test_older_protocols_do_not_get_in(ring: Ring, protocol: str, has_keys: bool) -> None:
    """The server hangs up, and not for want of time. Without keys they do get in."""
    server = ring.bind() if has_keys else ring.bind(key=None, allow=None)
    port = int(server.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
        say(stranger, *GREETINGS[protocol])
        if not has_keys:
            assert hear(server) == ("", b"hello"), "the test is blind"
            return
        until_hung_up(stranger)
    only_good_ones_are_heard(ring, server)


def say(server: socket.socket, *said: tuple[bytes | bytearray, int]) -> None:
    """Speak bare bytes to a server; after each, wait for so many of its answer, or until it hangs up."""
    with contextlib.suppress(ConnectionError):
        for part, num_answered in said:
            server.sendall(part)
            while num_answered > 0 and (answer := server.recv(num_answered)):
                num_answered -= len(answer)


def until_hung_up(server: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        while server.recv(4096):
            pass


def test_a_worker_finds_out_that_the_server_is_another(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lte.transport.zmq._HUNG_UP_S", 0.2)
    server = ring.bind()
    worker = ring.connect(server, "alice", server_key="mallory")
    worker.send([b"a secret"])
    assert "its key is another than the given server key" in refused(worker)
    only_good_ones_are_heard(ring, server)


def test_a_worker_with_a_key_is_told_that_the_server_has_none(ring: Ring) -> None:
    """And what it had to say was not said in the clear."""
    server = ring.bind(key=None, allow=None)
    worker = ring.connect(server, "alice")
    worker.send([b"a secret"])
    assert "the server has no keys" in refused(worker)
    assert server.receive(0) is None
    worker.send([b"a heartbeat"])
    worker.close()  # which would wait for the heartbeat, if that waited for the server


def test_a_server_that_is_away_is_waited_for(ring: Ring) -> None:
    """Nobody listening is no question of keys."""
    server = ring.bind()
    address = server.address
    server.close()
    worker = ring.connect(address, "alice")
    worker.send([b"hello"])
    assert worker.receive(0.3) is None
    port = address.rpartition(":")[2]
    again = transport.bind(
        f"tcp://127.0.0.1:{port}",
        key=ring.folder / "server.secret",
        allow=ring.allow,
        max_message_bytes=MAX_MESSAGE_BYTES,
    )
    with contextlib.closing(again):
        assert hear(again) == ("alice", b"hello")


class Tap:
    """A TCP proxy that keeps a copy of all that passes."""

    def __init__(self, address: str) -> None:
        self._port = int(address.rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.up, self.down = bytearray(), bytearray()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(WAIT_S)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ends = (self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._port)))
                for copy, (source, target) in ((self.up, ends), (self.down, ends[::-1])):
                    self._threads.append(threading.Thread(target=self._pump, args=(source, target, copy)))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, target: socket.socket, copy: bytearray) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(65_536):
                copy += chunk
                target.sendall(chunk)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()


@pytest.mark.parametrize("has_keys", [True, False])
def test_who_listens_on_the_way_learns_nothing_where_there_are_keys(ring: Ring, has_keys: bool) -> None:
    server = ring.bind() if has_keys else ring.bind(key=None, allow=None)
    with contextlib.closing(Tap(server.address)) as tap:
        worker = transport.connect(tap.address, **(ring.files("alice") if has_keys else {}))
        with contextlib.closing(worker):
            worker.send([b"the weights of my model"])
            received = server.receive(WAIT_S)
            assert received is not None
            server.send(received[0], [b"an update of the model"])
            assert worker.receive(WAIT_S) is not None
        server.close()
    for said in (b"weights of my model", b"update of the model", ring.pairs["alice"].secret.encode()):
        assert (said in tap.up + tap.down) == (not has_keys and b"model" in said)
    assert min(len(tap.up), len(tap.down)) > 64


@pytest.mark.parametrize("has_keys", [True, False])
def test_what_was_recorded_on_the_way_cannot_be_said_again(ring: Ring, has_keys: bool) -> None:
    server = ring.bind() if has_keys else ring.bind(key=None, allow=None)
    with contextlib.closing(Tap(server.address)) as tap:
        worker = transport.connect(tap.address, **(ring.files("alice") if has_keys else {}))
        with contextlib.closing(worker):
            worker.send([b"once"])
            assert hear(server) == ("alice" if has_keys else "", b"once")
        port = int(server.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as again:
            ready = 64 + 2 + tap.up[65]  # a greeting, and a command with its length in a byte
            say(again, (tap.up[:64], 64), (tap.up[64:ready], 1), (tap.up[ready:], 0))
            if not has_keys:
                assert hear(server) == ("", b"once"), "the test is blind"
                return
            until_hung_up(again)
    only_good_ones_are_heard(ring, server)


# The list, while the server runs


def test_a_key_added_to_the_list_gets_in(ring: Ring) -> None:
    ring.write("bob")
    server = ring.bind()
    assert "does not admit this key" in refused(ring.connect(server, "alice"))
    ring.write("bob", "alice")
    ring.connect(server, "alice").send([b"hello"])
    assert hear(server) == ("alice", b"hello")
    turned_away, read_again = server.notices()
    assert "turned away" in turned_away
    assert "read again, keys allowed: 2" in read_again


def test_a_key_removed_from_the_list_is_not_heard_from_then_on(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the connection that it has, and on a new one."""
    asked: list[str] = []
    look_up = AllowList.worker_id

    def watched(allowed: AllowList, key: str) -> str:
        asked.append(look_up(allowed, key))
        return asked[-1]

    monkeypatch.setattr(AllowList, "worker_id", watched)
    server = ring.bind()
    alice = ring.connect(server, "alice")
    alice.send([b"before"])
    assert hear(server) == ("alice", b"before")
    received_bytes = server.received_bytes
    ring.write("bob")
    alice.send([b"late"])
    deadline_s = time.monotonic() + WAIT_S
    while "" not in asked:  # the message came, and was dropped
        assert server.receive(0.02) is None, "it was heard"
        assert time.monotonic() < deadline_s
    assert server.received_bytes == received_bytes
    assert server.sender == ""
    assert "does not admit this key" in refused(ring.connect(server, "alice"))
    ring.write("bob", "alice")
    alice.send([b"allowed again"])
    assert hear(server) == ("alice", b"allowed again")


def test_what_a_removed_key_sends_holds_nobody_up(ring: Ring) -> None:
    """All that has come must be heard before anybody is called silent (see Server.serve)."""
    server = ring.bind()
    alice, bob = ring.connect(server, "alice"), ring.connect(server, "bob")
    for worker in (alice, bob):
        worker.send([b"hello"])
    assert {hear(server)[0], hear(server)[0]} == {"alice", "bob"}
    ring.write("bob")
    for n in range(100):
        alice.send([b"%d" % n])
    bob.send([b"still here"])
    assert hear(server) == ("bob", b"still here")


def test_a_key_that_changes_hands_has_its_new_name_at_once(ring: Ring) -> None:
    server = ring.bind()
    alice = ring.connect(server, "alice")
    alice.send([b"one"])
    assert hear(server) == ("alice", b"one")
    ring.write(also=f"carol {ring.pairs['alice'].public}\n")
    alice.send([b"two"])
    assert hear(server) == ("carol", b"two")


def test_a_worker_may_have_several_keys(ring: Ring) -> None:
    """To change them without a pause."""
    ring.write("alice", also=f"alice {ring.pairs['mallory'].public}\n")
    server = ring.bind()
    for name in ("alice", "mallory"):
        ring.connect(server, name).send([b"hello"])
        assert hear(server) == ("alice", b"hello")


@pytest.mark.parametrize("broken", ["nonsense", "alice", "missing", "binary"])
def test_a_broken_list_leaves_the_last_good_one_and_is_reported_once(ring: Ring, broken: str) -> None:
    server = ring.bind()
    if broken == "missing":
        ring.allow.unlink()
    elif broken == "binary":
        ring.allow.write_bytes(b"\xff\xfe")
    else:
        ring.write("mallory", also=f"{broken} is not a key\n")
    alice = ring.connect(server, "alice")
    for _ in range(5):
        alice.send([b"hello"])
        assert hear(server) == ("alice", b"hello")
    assert "does not admit this key" in refused(ring.connect(server, "mallory"))
    reported, turned_away = server.notices()
    assert re.match(rf"{ring.allow}(, line 2)?: .*the list as it was before stays in force", reported)
    assert "turned away" in turned_away
    ring.write("mallory")
    ring.connect(server, "mallory").send([b"hello"])
    assert hear(server) == ("mallory", b"hello")
    assert any("read again" in notice for notice in server.notices())


LISTS = {
    "alice {a}\n\n# people\n  bob\t{b}   # his laptop\n": {"a": "alice", "b": "bob"},
    "": {},
    "# {a}\n": {},
    "alice {a} #{b}\n": {"a": "alice"},
}


@pytest.mark.parametrize("text", LISTS)
def test_lists_are_read(ring: Ring, text: str) -> None:
    public = {"a": ring.pairs["alice"].public, "b": ring.pairs["bob"].public}
    ring.allow.write_text(text.format(**public))
    allowed = AllowList(ring.allow, print)
    assert {key: allowed.worker_id(public[key]) for key in public} == {"a": "", "b": ""} | LISTS[text]
    assert allowed.worker_id("") == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("alice", "line 1: not 'WORKER_ID PUBLIC_KEY'"),
        ("alice {a}\nbob {b} laptop", "line 2: not 'WORKER_ID PUBLIC_KEY'"),
        ("alice {a}x", "line 1: not"),
        ("alice " + "~" * 40, "line 1: not"),
        ("alice " + "#" * 40, "line 1: not"),  # digits of z85, but five of them are more than 32 bits
        ("ali/ce {a}", "line 1: not"),
        ("alice {a}\nbob {a}", "line 2: this key is alice's already"),
        ("{a} alice", "line 1: not"),
    ],
)
def test_a_server_does_not_start_on_a_broken_list(ring: Ring, text: str, says: str) -> None:
    ring.allow.write_text(text.format(a=ring.pairs["alice"].public, b=ring.pairs["bob"].public))
    with pytest.raises(KeysError, match=re.escape(f"{ring.allow}, {says}")):
        ring.bind()


# The gate


def test_nobody_gets_in_when_keys_cannot_be_checked(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(gate: Gate, request: object) -> tuple[str, str, str]:
        raise OSError("no such luck")

    server = ring.bind()
    monkeypatch.setattr(Gate, "_judge", fails)
    worker = ring.connect(server, "alice")
    worker.send([b"hello"])
    assert "admits nobody unknown from here for now" in refused(worker)
    assert server.receive(0) is None
    assert "no such luck" in server.notices()[0]
    monkeypatch.undo()
    only_good_ones_are_heard(ring, server)


@pytest.mark.parametrize("how", ["gone", "silent"])
def test_nobody_gets_in_without_a_gate(ring: Ring, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr("lte.transport.zmq._HUNG_UP_S", 0.2)
    monkeypatch.setattr("lte.transport.zmq._HANDSHAKE_MS", 200)

    def dead(gate: Gate) -> None:
        with gate._socket, contextlib.suppress(zmq.ContextTerminated):
            while how == "silent":
                gate._socket.poll()
                gate._socket.recv_multipart()
                gate._socket.poll()

    monkeypatch.setattr(Gate, "_serve", dead)
    server = ring.bind()
    worker = ring.connect(server, "alice")
    worker.send([b"hello"])
    assert "hangs up in the handshake" in refused(worker)
    assert server.receive(0) is None


def test_a_flood_of_strangers_leaves_room_for_others(ring: Ring) -> None:
    """Real handshakes with keys that nobody knows, from the very address of the good peer."""
    server, num_strangers = ring.bind(), 60
    with zmq.Context() as context, contextlib.ExitStack() as open_:
        statuses: list[int] = []
        for _ in range(num_strangers):
            stranger = open_.enter_context(context.socket(zmq.DEALER))
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
            stranger.curve_serverkey = ring.pairs["server"].public.encode()
            monitor = open_.enter_context(stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH))
            stranger.connect(server.address)
            knock(stranger)
            assert monitor.poll(WAIT_S * 1000)
            statuses.append(int.from_bytes(monitor.recv_multipart()[0][2:6], "little"))
            stranger.disable_monitor()
        only_good_ones_are_heard(ring, server)
        assert set(statuses[:10]) == {400}
        assert statuses.count(500) >= num_strangers / 2, "what comes too often is not looked into"
        assert len(server.notices()) == statuses.count(400)
        assert "admits nobody unknown from here for now" in refused(ring.connect(server, "mallory"))


def test_a_handshake_that_is_not_finished_in_time_is_ended(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was sent of it; and while hundreds hang, a good peer gets in."""
    monkeypatch.setattr("lte.transport.zmq._HANDSHAKE_MS", 500)
    server = ring.bind()
    port = int(server.address.rpartition(":")[2])
    signature = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(47)
    with contextlib.ExitStack() as open_:
        half = []
        for n in range(200):
            half.append(open_.enter_context(socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)))
            half[-1].sendall(signature[: n % (len(signature) + 1)])
        only_good_ones_are_heard(ring, server)
        for stranger in half:
            until_hung_up(stranger)


def test_connections_of_strangers_leave_descriptors_to_the_run(ring: Ring, tmp_path: Path) -> None:
    """More of them than a process may usually hold; both ends of each are this one's."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        server = ring.bind()
        port = int(server.address.rpartition(":")[2])
        with contextlib.ExitStack() as open_:
            for _ in range(few):
                open_.enter_context(socket.create_connection(("127.0.0.1", port), timeout=WAIT_S))
            only_good_ones_are_heard(ring, server)
            (tmp_path / "checkpoint").write_text("saved")
        server.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_closing_a_server_with_keys_leaves_no_thread(ring: Ring) -> None:
    before = threading.active_count()
    server = ring.bind()
    assert threading.active_count() == before + 1, "the test is blind"
    server.close()
    server.close()
    assert threading.active_count() == before


def test_what_strangers_cause_is_bounded() -> None:
    buckets = Buckets(burst=3, per_s=0.5, most=100)
    assert [buckets.take("a", 0.0) for _ in range(5)] == [True, True, True, False, False]
    assert buckets.take("b", 0.0)
    assert [buckets.take("a", now_s) for now_s in (1.9, 2.0, 3.9, 4.1)] == [False, True, False, True]
    assert [buckets.take("a", 1000.0) for _ in range(5)] == [True, True, True, False, False]
    for n in range(10_000):
        buckets.take(f"address {n}", 1000.0)
        assert not buckets.take("a", 1000.0), "who keeps asking is not forgotten"
    assert len(buckets) == 100


def test_complaints_are_recorded_at_a_bounded_rate() -> None:
    now_s = 0.0
    recorded: list[tuple[str, str]] = []
    complain = Complaints(lambda what, message: recorded.append((what, message)), lambda: now_s)
    for n in range(10_000):
        complain("refused", f"{n}")
    complain("malformed", "of another kind")
    assert recorded[:50] == [("refused", f"{n}") for n in range(50)]
    assert recorded[50:] == [("malformed", "of another kind")]
    now_s = 10.5
    complain("refused", "later")
    complain("refused", "too soon")
    assert recorded[51:] == [("refused", "later (9950 more were not recorded)")]


# Files


def test_keys_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    pair = keys.create(tmp_path / "new" / "alice")
    secret, public = tmp_path / "new" / "alice.secret", tmp_path / "new" / "alice.public"
    assert (secret.stat().st_mode & 0o777, secret.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert public.read_text() == f"{pair.public}\n"
    assert keys.load_secret(secret) == pair
    assert keys.load_public(public) == pair.public
    assert pair.secret not in repr(pair)
    assert zmq.curve_public(pair.secret.encode()).decode() == pair.public
    assert keys.create(tmp_path / "bob") != pair


@pytest.mark.parametrize("there", ["alice.secret", "alice.public"])
def test_keys_are_never_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("precious")
    with pytest.raises(KeysError, match=re.escape(f"{tmp_path / there}: is there already")):
        keys.create(tmp_path / "alice")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(there, "precious")]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o644])
def test_a_secret_that_others_may_read_is_refused(ring: Ring, mode: int) -> None:
    for name in ("alice", "server"):
        (ring.folder / f"{name}.secret").chmod(mode)
    secret = ring.folder / "alice.secret"
    with pytest.raises(KeysError, match=re.escape(f"chmod 600 {secret}")):
        ring.connect("tcp://127.0.0.1:1", "alice")
    with pytest.raises(KeysError, match="chmod 600"):
        ring.bind()
    secret.chmod(0o400)
    ring.connect("tcp://127.0.0.1:1", "alice")


def test_one_kind_of_key_is_not_taken_for_the_other(ring: Ring) -> None:
    folder = ring.folder
    (folder / "note").write_text("a note")
    (folder / "cut.secret").write_text((folder / "alice.secret").read_text()[:30])
    for load, name, says in [
        (keys.load_secret, "alice.public", "a public key; the file NAME.secret"),
        (keys.load_secret, "note", "no key; the file NAME.secret"),
        (keys.load_secret, "cut.secret", "a damaged secret key"),
        (keys.load_secret, "missing", "no such key; make a pair with 'lte keys new NAME'"),
        (keys.load_secret, ".", "cannot be read"),
        (keys.load_public, "alice.secret", "a secret key, which must stay with its owner"),
        (keys.load_public, "note", "no key; the file NAME.public"),
        (keys.load_public, "missing", "no such key"),
    ]:
        with pytest.raises(KeysError, match=re.escape(says)) as raised:
            load(folder / name)
        assert str(raised.value).startswith(str(folder / name))
        assert "\n" not in str(raised.value)
        assert ring.pairs["alice"].secret not in str(raised.value)


def test_half_of_the_keys_are_refused(ring: Ring) -> None:
    files = ring.files("alice")
    for only in files:
        with pytest.raises(KeysError, match="go together, and one is missing"):
            transport.connect("tcp://127.0.0.1:1", **{only: files[only]})
    for missing in ("key", "allow"):
        with pytest.raises(KeysError, match="go together"):
            ring.bind(**{missing: None})
    for address in ("ipc://x", "inprocess://x"):
        with pytest.raises(KeysError, match="keys are for tcp://"):
            transport.connect(address, **files)


def test_with_keys_other_machines_may_reach_the_server(ring: Ring) -> None:
    with pytest.raises(ConnectError, match="lte keys new"):
        transport.bind("tcp://0.0.0.0:*", max_message_bytes=1)
    server = transport.bind(
        "tcp://0.0.0.0:*",
        max_message_bytes=MAX_MESSAGE_BYTES,
        key=ring.folder / "server.secret",
        allow=ring.allow,
    )
    with contextlib.closing(server):
        port = server.address.rpartition(":")[2]
        ring.connect(f"tcp://127.0.0.1:{port}", "alice").send([b"hello"])
        assert hear(server) == ("alice", b"hello")
        assert "does not admit" in refused(ring.connect(f"tcp://127.0.0.1:{port}", "mallory"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"server.key": "x"}, "server.key, server.allow: the server's key and the list"),
        ({"server.allow": "x"}, "server.key, server.allow: "),
        ({"server.key": "x", "server.allow": "y", "server.address": "ipc://z"}, "keys are for tcp://"),
        ({"server.key": "x", "server.allow": "y", "server.address": "inprocess://z"}, "keys are for tcp://"),
    ],
)
def test_settings_of_keys_must_fit(settings: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        config.replace(Recipe(), **settings)


# Who may speak for whom


HELLO = wire.Hello(schema=wire.SCHEMA, worker_id="", session="s", model={}, heads=0)


def spoken_as(worker_id: str) -> list[wire.AnyMessage]:
    """Every message in which a worker says who it is."""
    said = {"generation": 1, "worker_id": worker_id, "incarnation": 1}
    measured = {"lost": 0.0, "step_s": 0.0, "encode_s": 0.0, "apply_s": 0.0}
    digests = {"base_digest": "", "merged_digest": "", "given_digest": ""}
    return [
        wire.Hello(schema=wire.SCHEMA, worker_id=worker_id, session="s", model={}, heads=0),
        wire.Heartbeat(**said, number=1, version=0, local_step=0),
        wire.Part(**said, version=0, stream=1, index=0),
        wire.Contribution(
            **said, version=0, stream=1, parts=0, draw=0, tokens=1, loss=None, **measured, **digests
        ),
        wire.Behind(**said, version=0),
        wire.Recall(**said),
        wire.Leave(**said, reason="bye"),
    ]


def test_every_message_of_a_worker_is_listed_above() -> None:
    named = {kind for kind in wire.Message.__subclasses__() if "worker_id" in kind.__struct_fields__}
    assert {type(message) for message in spoken_as("bob")} == named - {wire.Welcome}


def test_a_message_speaks_for_the_owner_of_its_key() -> None:
    for message in spoken_as("bob"):
        assert vouched(message, "bob") is message
        assert vouched(message, "") is message, "without keys"
        assert vouched(message, "alice") is None
        assert vouched(message, "Bob") is None
    assert vouched(HELLO, "alice") == wire.Hello(
        schema=wire.SCHEMA, worker_id="alice", session="s", model={}, heads=0
    )
    for message in spoken_as("")[1:]:
        assert vouched(message, "alice") is None


def small_recipe(folder: Path, ring: Ring | None, **settings: object) -> Recipe:
    plain: dict[str, object] = {
        "run.dir": str(folder / "run"),
        "train.rounds": 3,
        "train.local_steps": 2,
        "train.workers": 2,
        "lora.rank": 2,
        "schedule.warmup_steps": 0,
        "server.address": "tcp://127.0.0.1:*",
        "worker.heartbeat_s": 0.05,
    }
    if ring:
        plain |= {"server.key": str(ring.folder / "server.secret"), "server.allow": str(ring.allow)}
    return config.replace(Recipe(), **(plain | settings))


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))


@contextlib.contextmanager
def serving(recipe: Recipe) -> Iterator[Server]:
    """A server that serves in a thread until the end of the block."""
    with Server(tiny(), recipe, display=False) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.stop("the test is over")
            thread.join(WAIT_S)


def events(folder: Path, what: str) -> list[str]:
    return [
        line["message"]
        for line in Records.read(folder / "run" / METRICS)
        if line["kind"] == "event" and line["what"] == what
    ]


def test_the_key_of_alice_may_not_speak_as_bob(ring: Ring, tmp_path: Path) -> None:
    """Bob is a worker of the run; nothing that alice says in his name touches him."""
    with serving(small_recipe(tmp_path, ring, **{"train.workers": 3})) as server:
        bob = ring.connect(server.address, "bob")
        bob.send(wire.encode(HELLO))
        welcome = next(message for message in heard(bob) if isinstance(message, wire.Welcome))
        assert welcome.worker_id == "bob", "the name of its key"
        alice = ring.connect(server.address, "alice")
        for message in spoken_as("bob"):
            alice.send(wire.encode(message))
            answer = next(heard(alice))
            assert isinstance(answer, wire.Refusal), f"a {type(message).__name__} was heard"
            assert "its key is alice's" in answer.reason
            assert "join as alice" in answer.cure
        with pytest.raises(RefusedError, match="its key is alice's"):
            lte.Worker(
                lte.convert(tiny(), lte.LoRA(rank=2)),
                server.address,
                worker_id="bob",
                **ring.files("alice"),
            )
    assert len(events(tmp_path, "refused")) == len(spoken_as("bob")) + 1
    assert events(tmp_path, "joined") == ["bob joined"]
    assert events(tmp_path, "left") == []


def test_messages_to_an_earlier_server_are_not_taken(ring: Ring, tmp_path: Path) -> None:
    """Generations: also the owner of a key is heard only in the run of now."""
    with serving(small_recipe(tmp_path, ring)) as server:
        bob = ring.connect(server.address, "bob")
        server.generation += 1
        for message in spoken_as("bob")[1:-1]:
            bob.send(wire.encode(message))
            answer = next(heard(bob))
            asked = isinstance(answer, wire.HelloAgain)
            assert asked or isinstance(answer, wire.Refusal), f"a {type(message).__name__} was heard"
        assert server.version == 0


def heard(worker: WorkerEndpoint) -> Iterator[wire.AnyMessage]:
    while True:
        frames = worker.receive(WAIT_S)
        assert frames is not None, "the server does not answer"
        yield wire.decode(frames)[0]


def test_a_stranger_cannot_fill_the_disk(ring: Ring, tmp_path: Path) -> None:
    with serving(small_recipe(tmp_path, ring)) as server:
        alice = ring.connect(server.address, "alice")
        for _ in range(300):
            alice.send(wire.encode(HELLO.__class__(**{**fields(HELLO), "worker_id": "bob"})))
            alice.send([b"nonsense"])
        for _ in range(300):
            assert isinstance(next(heard(alice)), wire.Refusal)
        with pytest.raises(ConnectError):
            ring.connect(server.address, "mallory").receive(WAIT_S)
    for what in ("refused", "malformed"):
        assert 50 <= len(events(tmp_path, what)) < 60
    assert ring.pairs["mallory"].public in events(tmp_path, "admission")[0]


def fields(message: wire.Message) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__struct_fields__}


def test_workers_of_a_library_train_with_keys(ring: Ring, tmp_path: Path) -> None:
    names: dict[str, str] = {}
    finished: list[bool] = []

    def work(name: str, address: str) -> None:
        model = lte.convert(tiny(), lte.LoRA(rank=2))
        with lte.Worker(model, address, **ring.files(name)) as worker:
            names[name] = worker.worker_id
            while not worker.done:
                loss = model(torch.ones(4, 8)).square().mean()
                loss.backward()
                worker.step(loss, tokens=4)

    recipe = small_recipe(tmp_path, ring)
    with Server(tiny(), recipe, display=False) as server:
        threads = [threading.Thread(target=work, args=(name, server.address)) for name in ("alice", "bob")]
        for thread in threads:
            thread.start()
        finished.append(server.serve())
        for thread in threads:
            thread.join(WAIT_S)
    assert finished == [True]
    assert names == {"alice": "alice", "bob": "bob"}
    assert no_secret_in(tmp_path / "run", ring)


def no_secret_in(folder: Path, ring: Ring) -> bool:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert any(str(ring.folder / "server.secret").encode() in path.read_bytes() for path in files), (
        "the test is blind: the recipe names the file of the secret"
    )
    return not any(
        pair.secret.encode() in path.read_bytes() for path in files for pair in ring.pairs.values()
    )


def test_every_test_that_the_threat_model_names_is_there() -> None:
    root = Path(__file__).parent.parent
    said = (root / "docs" / "security.md").read_text()
    tests = "".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", said)
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in tests] == []
    known = {key for key, *_ in config.describe()}
    assert set(re.findall(r"`((?:server|worker)\.\w+)`", said)) <= known


# Commands


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in this process, in a folder of the test: its code, output and complaints."""
    monkeypatch.chdir(tmp_path)
    for variable in ("LTE_KEY", "LTE_SERVER_KEY"):
        monkeypatch.delenv(variable, raising=False)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    started = Family(tmp_path)
    yield started
    started.close()


def test_keys_new_says_what_to_do_next(run: Run, tmp_path: Path) -> None:
    code, out, err = run("keys", "new", "keys/alice")
    assert (code, err) == (0, "")
    pair = keys.load_secret(tmp_path / "keys" / "alice.secret")
    assert f"\n  alice {pair.public}\n" in out
    for part in (
        "server.allow",
        "--key keys/alice.secret",
        "server.key=keys/alice.secret",
        "keys/alice.public",
    ):
        assert part in out
    assert pair.secret not in out
    code, out, err = run("keys", "new", "keys/alice")
    assert (code, out) == (2, "")
    assert err.startswith("lte: keys/alice.secret: is there already")
    assert err.count("\n") == 1
    assert keys.load_secret(tmp_path / "keys" / "alice.secret") == pair
    for name, says in [("keys/a lice", "names a worker"), ("/proc/alice", "cannot be written")]:
        code, out, err = run("keys", "new", name)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert says in err


def write_recipe(folder: Path, **server: str) -> Path:
    text = folder / "text.txt"
    text.write_text("".join(f"{n} bottles of beer on the wall. " for n in range(700)))
    pack([text], folder / "data", num_shards=2)
    recipe = {
        "run": {"dir": "run"},
        "model": {
            "num_layers": 1,
            "width": 32,
            "num_attention_heads": 2,
            "mlp_width": 64,
            "context_tokens": 16,
        },
        "data": {"shards": "data"},
        "train": {"rounds": 3, "local_steps": 2, "workers": 2, "batch_size": 4},
        "lora": {"rank": 4},
        "schedule": {"warmup_steps": 0},
        "server": {"address": "tcp://127.0.0.1:*", **server},
        "eval": {"every": 0, "sample_tokens": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_server_and_workers_by_the_commands(run: Run, family: Family, tmp_path: Path) -> None:
    """Strangers and impostors get a line each; neither run folder nor output holds a secret."""
    told = {name: run("keys", "new", f"keys/{name}")[1] for name in ("server", "alice", "bob", "mallory")}
    added = [re.search(rf"^  ({name} .*)$", told[name], re.M) for name in ("alice", "bob")]
    (tmp_path / "allow").write_text("".join(f"{line[1]}\n" for line in added if line))
    server = family.start("server", write_recipe(tmp_path, key="keys/server.secret", allow="allow"))
    joining = server.until_said(
        r"lte worker --server (tcp://\S+) --key NAME.secret --server-key SERVER.public"
    )
    to_server = ("worker", "--server", joining[1], "--server-key", "keys/server.public")
    outcomes = {
        "does not admit this key": run(*to_server, "--key", "keys/mallory.secret"),
        "the server demands a key": run("worker", "--server", joining[1]),
        "its key is alice's, and it speaks": run(*to_server, "--key", "keys/alice.secret", "--id", "bob"),
        "a public key; the file NAME.secret": run(*to_server, "--key", "keys/alice.public"),
        "one is missing": run(*to_server),
    }
    for says, (code, out, err) in outcomes.items():
        assert (code, out) == (2, "")
        assert err.startswith("lte: ")
        assert err.count("\n") == 1
        assert says in err
    bob = {"LTE_KEY": "keys/bob.secret", "LTE_SERVER_KEY": "keys/server.public"}
    alice = family.start(*to_server, "--key", "keys/alice.secret", LTE_KEY="keys/mallory.secret")
    by_environment = family.start("worker", "--server", joining[1], **bob)
    assert (alice.ended(), by_environment.ended(), server.ended()) == (0, 0, 0)
    assert "alice joined" in alice.out, "the argument is stronger than the environment"
    assert "bob joined" in by_environment.out
    assert done(tmp_path / "run")["rounds"] == 3
    assert {"joined", "admission", "refused"} <= {line["what"] for line in lines(tmp_path / "run", "event")}
    secrets = [keys.load_secret(path).secret.encode() for path in (tmp_path / "keys").glob("*.secret")]
    assert len(secrets) == 4
    for path in [*(tmp_path / "run").rglob("*"), *tmp_path.glob("*.out"), *tmp_path.glob("*.err")]:
        assert path.is_dir() or not any(secret in path.read_bytes() for secret in secrets), path


def test_train_tells_that_its_workers_have_no_keys(run: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, key="keys/server.secret", allow="allow")
    code, out, err = run("train", recipe)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "'lte server'" in err
    assert "server.key=none server.allow=none" in err
    assert not (tmp_path / "run").exists()


def test_train_is_not_disturbed_by_keys_in_the_environment(family: Family, tmp_path: Path) -> None:
    keys_ = {"LTE_KEY": "keys/bob.secret", "LTE_SERVER_KEY": "keys/server.public"}
    train = family.start(
        "train",
        write_recipe(tmp_path, key="x", allow="y"),
        "server.key=none",
        "server.allow=none",
        **keys_,
    )
    assert train.ended() == 0, train.err
    assert done(tmp_path / "run")["rounds"] == 3
