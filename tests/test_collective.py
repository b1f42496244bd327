"""The collective transport: between real processes, with those that die, and what only it can do wrong.

That it is a transport like the others is the suite's to say (test_transport.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import TINY
from ends import WAIT_S, hear, hear_at, plain
from forks import fork
from processes import Family, done
from torch.distributed import ProcessGroupGloo, TCPStore

from lte import config, transport
from lte.config import Recipe
from lte.errors import ConnectError
from lte.transport import Peer, ServerEndpoint, WorkerEndpoint, collective, meeting, pair

ADDRESS = "collective://127.0.0.1:*"


@pytest.fixture
def opened() -> Iterator[contextlib.ExitStack]:
    """What is to be closed in the end."""
    with contextlib.ExitStack() as stack:
        yield stack


def bind(opened: contextlib.ExitStack, address: str = ADDRESS, **options: Any) -> ServerEndpoint:
    server = transport.bind(address, **{"max_message_bytes": 1 << 24, **options})
    opened.callback(server.close)
    return server


def connect(opened: contextlib.ExitStack, address: str) -> WorkerEndpoint:
    worker = transport.connect(address)
    opened.callback(worker.close)
    return worker


# Between processes


def work(address: str, name: bytes, num_messages: int, dies_after: int) -> None:
    """A worker: sends numbered messages, hears an answer to each, and kills itself after so many."""
    worker = transport.connect(address)
    for n in range(num_messages):
        worker.send([name, b"%d" % n, name * 30_000])
        received = worker.receive(WAIT_S)
        assert received is not None
        assert plain(received) == [name, b"%d" % n]
        if n + 1 == dies_after:
            worker.send([name, b"cut off", bytes(1 << 24)])
            os.kill(os.getpid(), signal.SIGKILL)
    worker.close()


def ended(process: BaseProcess) -> int:
    process.join(WAIT_S)
    assert process.exitcode is not None, "still runs"
    return process.exitcode


@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_in_processes_of_their_own_are_heard_and_answered(
    opened: contextlib.ExitStack, num_workers: int
) -> None:
    """Server and workers are two processes, or five. One of four is killed in the midst of a message."""
    server, names = bind(opened), [b"w%d" % k for k in range(num_workers)]
    dead = names[1] if num_workers > 1 else b""
    processes = {name: fork(work, server.address, name, 12, 5 if name == dead else 0) for name in names}
    expected = 12 * (num_workers - bool(dead)) + (5 if dead else 0)
    counts, peers = Counter[bytes](), dict[bytes, Peer]()
    for _ in range(expected):
        peer, (name, number, payload) = hear(server)
        assert (number, payload) == (b"%d" % counts[name], name * 30_000)
        assert peers.setdefault(name, peer) == peer
        counts[name] += 1
        server.send(peer, [name, number])
    codes = {name: ended(process) for name, process in processes.items()}
    assert codes == {name: -signal.SIGKILL if name == dead else 0 for name in names}
    for peer in peers.values():  # all are gone, which the server sees by itself
        until_unheard(server, peer)


def until_unheard(server: ServerEndpoint, peer: Peer) -> None:
    """Wait until what is sent to a peer is dropped."""
    deadline_s, before = time.monotonic() + WAIT_S, -1
    while server.sent_bytes != before:
        assert time.monotonic() < deadline_s, "a dead worker is not seen"
        before = server.sent_bytes
        server.send(peer, [b"more"])
        server.receive(0.02)


def serve(path: str, dies: bool) -> None:
    """A server: hears one message, answers with where it came from, and is killed, or closes."""
    server = transport.bind(Path(path).read_text() if Path(path).exists() else ADDRESS, max_message_bytes=99)
    Path(f"{path}.new").write_text(server.address)
    os.replace(f"{path}.new", path)
    received = server.receive(WAIT_S)
    assert received is not None
    server.send(received[0], [b"heard", *received[1], server.origin.encode()])
    if dies:
        server.receive(WAIT_S)
        os.kill(os.getpid(), signal.SIGKILL)
    server.close()


def test_a_server_that_was_killed_is_missed_and_its_successor_found(
    opened: contextlib.ExitStack, tmp_path: Path
) -> None:
    """By the address that its file tells; the messages that wait meanwhile are not lost."""
    path = tmp_path / "address"
    first = fork(serve, str(path), True)
    deadline_s = time.monotonic() + WAIT_S
    while not path.exists():
        assert time.monotonic() < deadline_s
        first.join(0.02)
    worker = connect(opened, f"file://{path}")
    worker.send([b"1"])
    assert hear_at(worker) == [b"heard", b"1", b"127.0.0.1"]
    worker.send([b"kills it"])
    assert ended(first) == -signal.SIGKILL
    assert worker.receive(0.1) is None
    second = fork(serve, str(path), False)
    answer = None
    while answer is None:  # the first may be lost with the connection
        assert time.monotonic() < deadline_s
        worker.send([b"2"])
        answer = worker.receive(1.0)
    assert plain(answer) == [b"heard", b"2", b"127.0.0.1"]
    assert ended(second) == 0


# The same run


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    monkeypatch.chdir(tmp_path)
    family = Family(tmp_path)
    yield family
    family.close()


def test_a_run_is_bit_for_bit_the_same_on_every_transport(
    family: Family, tmp_path: Path, shards: Path
) -> None:
    """Threads and queues; a server and two workers by zmq; a server and four by Gloo, against four by zmq."""
    digests: dict[tuple[str, int], str] = {}
    for name, address, workers in (
        ("threads", "inprocess://x", 2),
        ("zmq", "tcp://127.0.0.1:*", 2),
        ("gloo", ADDRESS, 2),
        ("zmq-4", "tcp://127.0.0.1:*", 4),
        ("gloo-4", ADDRESS, 4),
    ):
        settings = TINY | {
            "data.shards": str(shards),
            "run.dir": name,
            "server.address": address,
            "train.workers": workers,
            "server.quorum": workers,
            "train.rounds": 4,
        }
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(config.to_yaml(config.replace(Recipe(), **settings)))
        command = family.start("train", recipe)
        assert command.ended() == 0, command.err
        digests[name.partition("-")[0], workers] = str(done(tmp_path / name)["master_digest"])
    assert digests["threads", 2] == digests["zmq", 2] == digests["gloo", 2]
    assert digests["zmq", 4] == digests["gloo", 4]
    assert len(set(digests.values())) == 2


# What is refused


@pytest.mark.parametrize(
    "address", ["collective://0.0.0.0:*", "collective://*:*", "collective://10.0.0.1:5555"]
)
def test_only_loopback_is_bound_without_insisting(address: str) -> None:
    with pytest.raises(ConnectError, match="insecure=true") as raised:
        transport.bind(address, max_message_bytes=1_000)
    assert address in str(raised.value)
    assert "\n" not in str(raised.value)


def test_other_addresses_are_bound_by_those_who_insist(opened: contextlib.ExitStack) -> None:
    server = bind(opened, "collective://*:*", insecure=True)
    worker = connect(opened, f"collective://127.0.0.1:{server.address.rpartition(':')[2]}")
    worker.send([b"hello"])
    assert hear(server)[1] == [b"hello"]


def test_a_loopback_server_listens_nowhere_else(opened: contextlib.ExitStack) -> None:
    """torch's store, left to itself, listens on every interface."""
    port = int(bind(opened).address.rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5).close()


@pytest.mark.parametrize(
    ("address", "cure"),
    [
        ("collective://", "HOST:PORT"),
        ("collective://127.0.0.1", "HOST:PORT"),
        ("collective://127.0.0.1:port", "HOST:PORT"),
        ("collective://127.0.0.1:70000", "ports end at 65535"),
        ("collective://a..b:5555", "the host is no name"),
        ("collective://.:5555", "the host is no name"),
        (f"collective://{64 * 'a'}.org:5555", "between its dots are 1 to 63 characters"),
        ("collective://env", "torchrun"),
        ("collective://*:*", "give the host and port that the server prints"),
    ],
)
def test_a_malformed_address_is_one_line(address: str, cure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConnectError, match=cure) as raised:
        transport.connect(address)
    assert address in str(raised.value)
    assert "\n" not in str(raised.value)


def arrived(server: ServerEndpoint) -> ProcessGroupGloo:
    """A worker's bare group, to send it what no worker sends."""
    came = meeting.arrive(meeting.finder(server.address)())
    return pair.Pair(came.store, pair.WORKER, pair.device_at(came.worker_ip), most_bytes=None)._group


@pytest.mark.parametrize(
    "header",
    [
        [pair._MAGIC, 1, 1 << 50],
        [pair._MAGIC, 1 << 50, 8],
        [pair._MAGIC, 0, 0],
        [pair._MAGIC, 1, -5],
        [7, 1, 8],
    ],
    ids=["huge", "many frames", "none", "negative", "out of step"],
)
def test_sizes_are_bounded_before_memory_is_taken(opened: contextlib.ExitStack, header: list[int]) -> None:
    """What claims too much is disconnected, and others are heard."""
    server, group = bind(opened), None
    group = arrived(server)
    group.send([torch.tensor(header)], pair.SERVER, 0).wait()
    with pytest.raises(RuntimeError):  # the server broke the connection: nothing ever comes of it
        group.recv([torch.empty(1)], pair.SERVER, 0).wait()
    good = connect(opened, server.address)
    good.send([b"hello"])
    assert hear(server)[1] == [b"hello"]


@pytest.mark.parametrize("lengths", [[-1, 9], [1 << 40, 8 - (1 << 40)], [3, 4]])
def test_frames_that_do_not_add_up_are_refused(opened: contextlib.ExitStack, lengths: list[int]) -> None:
    server = bind(opened)
    group = arrived(server)
    payload = torch.cat([torch.tensor(lengths).view(torch.uint8), torch.zeros(8, dtype=torch.uint8)])
    for part in (torch.tensor([pair._MAGIC, 2, 8]), payload):
        group.send([part], pair.SERVER, 0).wait()
    with pytest.raises(RuntimeError):
        group.recv([torch.empty(1)], pair.SERVER, 0).wait()
    assert server.receive(0) is None


def test_who_draws_a_number_and_does_not_come_holds_up_nobody(opened: contextlib.ExitStack) -> None:
    """Nor the end: whoever waits for it hears that the store is gone."""
    server = bind(opened)
    place = meeting.finder(server.address)()
    TCPStore(*place, is_master=False, wait_for_workers=False).add("arrivals", 1)
    meeting.arrive(place)
    worker = connect(opened, server.address)
    worker.send([b"hello"])
    assert hear(server)[1] == [b"hello"]
    start_s = time.monotonic()
    server.close()
    assert time.monotonic() - start_s < 5


def test_a_worker_that_is_not_heard_is_held_up_and_loses_nothing(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever sends faster than a server hears would fill its memory."""
    monkeypatch.setattr("lte.transport.collective._MOST_WAITING", 3)
    server = opened.enter_context(
        contextlib.closing(collective.bind(ADDRESS, max_message_bytes=1 << 24, insecure=False))
    )
    worker = connect(opened, server.address)
    for n in range(20):
        worker.send([b"%d" % n])
    first = hear(server)
    assert server._inbox.qsize() <= 4
    assert [first[1], *(hear(server)[1] for _ in range(19))] == [[b"%d" % n] for n in range(20)]


def test_the_kernel_looks_after_connections(opened: contextlib.ExitStack) -> None:
    """A machine that is gone says no word; Gloo asks for no sign of life."""
    server = bind(opened)
    worker = connect(opened, server.address)
    worker.send([b"hello"])
    hear(server)
    looked_after = 0
    for descriptor, _ in pair._sockets():
        with socket.socket(fileno=os.dup(descriptor)) as found:
            looked_after += found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert looked_after >= 2


def test_what_is_no_socket_any_more_is_left_alone(tmp_path: Path) -> None:
    """A descriptor may be another file's by the time it is looked after."""
    num_before = len(os.listdir("/proc/self/fd"))
    with (tmp_path / "file").open("w") as other:
        pair._keep_alive({(other.fileno(), "socket:[1]")})
    assert len(os.listdir("/proc/self/fd")) == num_before


def test_a_store_that_does_not_answer_for_a_while_is_said_once_and_asked_again(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = bind(opened)
    fails, failed, ask = threading.Event(), threading.Semaphore(0), TCPStore.add

    def add(store: TCPStore, key: str, amount: int) -> int:
        if fails.is_set():
            failed.release()
            raise RuntimeError("a store that is busy")
        return ask(store, key, amount)

    fails.set()
    monkeypatch.setattr(TCPStore, "add", add)
    for _ in range(3):
        assert failed.acquire(timeout=WAIT_S)
    fails.clear()
    connect(opened, server.address).send([b"hello"])
    assert hear(server)[1] == [b"hello"]
    (notice,) = server.notices()
    assert "no worker can come until this passes: a store that is busy" in notice


# torchrun's store


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """The store of a torchrun, and its variables."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def test_torchruns_store_tells_where_the_server_is(opened: contextlib.ExitStack, agent: TCPStore) -> None:
    """Also one that is started anew, elsewhere: an older address does no harm."""
    worker = connect(opened, meeting.ENV)  # before any server
    worker.send([b"early"])
    server = bind(opened, meeting.ENV)
    assert server.address.startswith("collective://127.0.0.1:")
    assert hear(server)[1] == [b"early"]
    server.close()
    server = bind(opened, meeting.ENV)
    heard, deadline_s = None, time.monotonic() + WAIT_S
    while heard is None:
        assert time.monotonic() < deadline_s
        worker.send([b"again"])
        heard = server.receive(0.2)
    assert plain(heard[1]) == [b"again"]


def test_without_torchruns_store_the_server_keeps_its_own_at_the_port(
    opened: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    server = bind(opened, meeting.ENV)
    assert server.address == f"collective://127.0.0.1:{port}"
    worker = connect(opened, meeting.ENV)
    worker.send([b"hello"])
    assert hear(server)[1] == [b"hello"]
