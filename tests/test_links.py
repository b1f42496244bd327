"""The coordinator's end of a group of shards, against holders that say what a test has them say."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lte import config
from lte.config import Recipe
from lte.errors import StoppedError
from lte.server import commit, holder
from lte.server.links import Links

Holder = Callable[[Connection], None]


def links(
    monkeypatch: pytest.MonkeyPatch, folder: Path, be_holder: Holder, *, is_stopped: bool = False
) -> Links:
    """Links to one holder that does this."""

    def serve(link: Connection, *_: object) -> int:
        be_holder(link)
        return 0

    monkeypatch.setattr(holder, "serve", serve)
    recipe = config.replace(Recipe(), **{"server.shards": 2, "run.dir": str(folder)})
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
    assert found.is_saved()
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
        found.states()
    while not found.heard:
        end.poll(20)
        found.listen()
    assert list(found.heard) == [(1, late[1])]
    found.close()
