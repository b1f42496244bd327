"""The coordinator's end of a group of shards, against holders that say what a test has them say."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from lte import config
from lte.config import Recipe
from lte.errors import FencedError, RunError, ShardError, StoppedError
from lte.server import commit, holder
from lte.server.journal import GENERATION
from lte.server.links import Links

PATIENCE = {"worker.patience_s": 0.5, "server.silence_s": 0.3, "worker.heartbeat_s": 0.05}
Holder = Callable[[Connection], None]


def links(
    monkeypatch: pytest.MonkeyPatch, folder: Path, be_holder: Holder, *, is_stopped: bool = False
) -> Links:
    """Links to one holder that does this."""

    def serve(link: Connection, *_: object) -> int:
        be_holder(link)
        return 0

    monkeypatch.setattr(holder, "serve", serve)
    settings = {"server.shards": 2, "run.dir": str(folder), **PATIENCE}
    recipe = config.replace(Recipe(), **settings)
    return Links(lambda: pytest.fail("nobody builds it"), recipe, lambda: is_stopped)


def answers(*reports: commit.Report) -> Holder:
    """Obeys one order, and says this."""

    def answer(link: Connection) -> None:
        link.recv_bytes()
        for report in reports:
            link.send_bytes(commit.encode(report))
        with pytest.raises(EOFError):
            link.recv_bytes()

    return answer


def listen(found: Links, *, until: Callable[[], bool]) -> None:
    while not until():
        found.listen()


class LooksFirst:
    """A link at which nothing is to be heard the first times that somebody looks."""

    def __init__(self, link: Connection, num_looks: int) -> None:
        self._link, self._left = link, num_looks

    def poll(self, timeout_s: float) -> bool:
        self._left -= 1
        return self._left < 0 and self._link.poll(timeout_s)

    def __getattr__(self, name: str) -> object:
        return getattr(self._link, name)


def test_a_server_that_is_told_to_stop_waits_for_what_is_to_be_on_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lte.server.links._LEAVE_S", 0.0)
    found = links(monkeypatch, tmp_path, answers(commit.Saved(is_there=True)), is_stopped=True)
    found._ends = [LooksFirst(end, 20) for end in found._ends]  # type: ignore[misc]
    found.save([1])
    assert found.unsaved([1]) == set()
    monkeypatch.undo()
    found.close()


def test_a_server_that_is_told_to_stop_gives_up_what_it_would_evaluate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What comes of it later is nobody's."""
    late = commit.State(tensors=b""), commit.Happened(what="disk", message="full")
    found = links(monkeypatch, tmp_path, answers(*late), is_stopped=True)
    (end,) = found._ends
    found._ends = [LooksFirst(end, 1)]  # type: ignore[list-item]
    with pytest.raises(StoppedError):
        found.tensors(1, "master", ["a"])
    while not found.heard:
        end.poll(20)
        found.listen()
    assert list(found.heard) == [(1, late[1])]
    found.close()


def test_tensors_and_digests_come_as_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensors = {"a": torch.ones(3), "b": torch.arange(4)}
    found = links(monkeypatch, tmp_path, answers(commit.State(tensors=save(tensors))))
    met = found.tensors(1, "master", ["a", "b"])
    found.close()
    assert met.keys() == tensors.keys()
    assert all(torch.equal(met[name], tensors[name]) for name in met)
    of_modules = {"a": "1f", "b": "2e"}
    found = links(monkeypatch, tmp_path, answers(commit.Digested(of_modules=of_modules)))
    assert found.digests() == of_modules
    found.close()


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [({}, [[]]), ({"a": 9}, [["a"]]), ({"a": 1, "b": 9, "c": 2, "d": 2}, [["a"], ["b"], ["c", "d"]])],
)
def test_parts_have_at_most_so_many_bytes(sizes: dict[str, int], parts: list[list[str]]) -> None:
    assert commit.in_parts(sizes, 4) == parts


def test_a_holder_that_hangs_ends_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is spoken of first."""
    monkeypatch.setattr("lte.server.links._LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("lte.server.links._SILENT_S", 0.1)
    found = links(monkeypatch, tmp_path, lambda link: signal.pause())
    assert found.silent == []
    listen(found, until=lambda: found.silent == [1])
    with pytest.raises(ShardError, match=r"shard 1 .* not answered for 0\.5 s .*the same command goes on"):
        listen(found, until=lambda: False)
    found.close()


def test_a_holder_that_is_busy_lives_when_it_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lte.server.links._LOOK_EVERY_S", 0.0)
    found = links(monkeypatch, tmp_path, answers(commit.Pong(is_full=True)))
    listen(found, until=lambda: bool(found.full))
    assert (found.full, found.silent) == ({1}, [])
    found.close()


FAILED = commit.Failed(
    reason="/run/shards/1: cannot be written (Input/output error); mend the disk", is_users=True
)


def fail(link: Connection) -> None:
    link.send_bytes(commit.encode(FAILED))


@pytest.mark.parametrize("is_fenced", [False, True])
@pytest.mark.parametrize("is_failed", [False, True])
def test_why_a_holder_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_failed: bool, is_fenced: bool
) -> None:
    """Also to who gives it an order before anything is heard of it."""
    found = links(monkeypatch, tmp_path, fail if is_failed else lambda link: None)
    (pid,) = found._pids
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    (tmp_path / GENERATION).write_text("4\n")
    found._generation = 3 if is_fenced else 4
    kind, says = (RunError, "mend the disk") if is_failed else (ShardError, "the same command goes on")
    if is_fenced and not is_failed:
        kind, says = FencedError, "has taken this run over"
    with pytest.raises(kind, match=says):
        found.tell(commit.Dismiss(worker_id="a"))
    found.close()
