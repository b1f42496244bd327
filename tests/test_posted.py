"""A server that is started elsewhere is found by the address that it posts."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

import pytest

from lte import transport
from lte.errors import ConnectError
from lte.transport import ServerEndpoint, WorkerEndpoint, keys, posted

WAIT_S = 20.0


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        ("tcp://0.0.0.0:5555", "tcp://node3:5555"),
        ("tcp://[::]:5555", "tcp://node3:5555"),
        ("tcp://10.0.0.1:5555", "tcp://10.0.0.1:5555"),
        ("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5555"),
        ("ipc:///run/socket", "ipc:///run/socket"),
    ],
)
def test_what_is_posted_is_what_others_reach(tmp_path: Path, bound: str, expected: str) -> None:
    posted.post(tmp_path, bound, "node3")
    assert posted.read(tmp_path / posted.NAME) == expected


def test_a_machine_is_known_by_its_hostname(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    posted.post(tmp_path, "tcp://0.0.0.0:5555", None)
    assert posted.read(tmp_path / posted.NAME) == "tcp://node7:5555"


def heard(server: ServerEndpoint, worker: WorkerEndpoint) -> None:
    """Say something until the server hears it: what is sent while nobody is there is lost."""
    ends_s = time.monotonic() + WAIT_S
    while (received := server.receive(0.05)) is None:
        assert time.monotonic() < ends_s, "the server hears nothing"
        worker.send([b"hello"])
    assert bytes(received[1][0]) == b"hello"


@pytest.mark.parametrize("has_keys", [False, True], ids=["open", "with keys"])
def test_a_worker_waits_for_an_address_and_follows_it(tmp_path: Path, has_keys: bool) -> None:
    at_server: dict[str, Path] = {}
    at_worker: dict[str, Path] = {}
    if has_keys:
        keys.create(tmp_path / "server")
        (tmp_path / "allow").write_text(f"alice {keys.create(tmp_path / 'alice').public}")
        at_server = {"key": tmp_path / "server.secret", "allow": tmp_path / "allow"}
        at_worker = {"key": tmp_path / "alice.secret", "server_key": tmp_path / "server.public"}
    address = f"file://{tmp_path / posted.NAME}"
    with contextlib.closing(transport.connect(address, **at_worker)) as worker:
        for _ in range(2):  # the second while the first is there: who posts last counts
            server = transport.bind("tcp://127.0.0.1:*", max_message_bytes=1 << 20, **at_server)
            with contextlib.closing(server):
                posted.post(tmp_path, server.address, None)
                heard(server, worker)


def test_what_is_posted_decides_on_the_transport(tmp_path: Path) -> None:
    """The worker is there first; then a server of each transport is, one after the other."""
    with contextlib.closing(transport.connect(f"file://{tmp_path / posted.NAME}")) as worker:
        assert worker.address == ""
        for scheme in ("collective", "tcp", "collective"):
            server = transport.bind(f"{scheme}://127.0.0.1:*", max_message_bytes=1 << 20)
            with contextlib.closing(server):
                posted.post(tmp_path, server.address, None)
                answered(server, worker)


def answered(server: ServerEndpoint, worker: WorkerEndpoint) -> None:
    """Say something until the server has heard it and the worker its answer."""
    ends_s, answer = time.monotonic() + WAIT_S, None
    while answer is None:
        assert time.monotonic() < ends_s, "no answer"
        worker.send([b"hello"])
        if (received := server.receive(0.05)) is not None:
            server.send(received[0], [b"welcome"])
        answer = worker.receive(0.05)
    assert bytes(answer[0]) == b"welcome"


def test_a_worker_with_keys_follows_nobody_to_where_there_are_none(tmp_path: Path) -> None:
    """Else who can write the file could have it join another server than the one that it insists on."""
    address = f"file://{tmp_path / posted.NAME}"
    for name in ("server", "alice"):
        keys.create(tmp_path / name)
    files = {"key": tmp_path / "alice.secret", "server_key": tmp_path / "server.public"}
    with contextlib.closing(transport.connect(address, **files)) as worker:
        posted.post(tmp_path, "collective://127.0.0.1:5555", None)
        with pytest.raises(ConnectError, match="a transport without keys; leave --key"):
            worker.receive(WAIT_S)
    with pytest.raises(ConnectError, match="a transport without keys; leave --key"):
        transport.connect(address, **files)


@pytest.mark.parametrize("text", ["node3:5555", "tcp://*:5555", "Straße"])
def test_a_file_without_an_address_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / posted.NAME).write_text(text, encoding="utf-8")
    with pytest.raises(ConnectError, match=r"not an address|is for servers"):
        transport.connect(f"file://{tmp_path / posted.NAME}")


def test_a_folder_is_one_line_too(tmp_path: Path) -> None:
    """Such as the run's."""
    with pytest.raises(ConnectError, match=r"cannot be read \(Is a directory\).* in address"):
        transport.connect(f"file://{tmp_path}")


def test_a_file_that_is_being_replaced_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: Path, **_: object) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "read_text", stale)
    assert posted.read(tmp_path / posted.NAME) == ""
