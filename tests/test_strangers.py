"""What strangers and members can make a server do is bounded: what it sends, records, keeps and waits for.

The state of the rounds has bounds of its own, see `tests/test_rounds.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lte import config, transport, wire
from lte.config import Recipe
from lte.server import Server, rounds
from lte.server.admission import Inquiries, Joins
from lte.track import METRICS, Records
from lte.transport import Peer, WorkerEndpoint

WAIT_S = 50.0
NAMES = itertools.count()
Serve = Callable[..., contextlib.AbstractContextManager[Server]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """A server in a thread, until the end of the block."""

    @contextlib.contextmanager
    def serve(**settings: object) -> Iterator[Server]:
        plain: dict[str, object] = {
            "run.dir": str(tmp_path / "run"),
            "train.rounds": 3,
            "train.local_steps": 2,
            "base.quant": "int8",
            "lora.rank": 2,
            "schedule.warmup_steps": 0,
            "server.address": f"inprocess://strangers-{next(NAMES)}",
        }
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        recipe = config.replace(Recipe(), **(plain | settings))
        with Server(model, recipe, display=False) as server:
            thread = threading.Thread(target=server.serve, daemon=True)
            thread.start()
            try:
                yield server
            finally:
                server.stop("the test is over")
                thread.join(WAIT_S)
                assert not thread.is_alive()

    return serve


def heard(worker: WorkerEndpoint) -> wire.AnyMessage:
    frames = worker.receive(WAIT_S)
    assert frames is not None, "the server does not answer"
    return wire.decode(frames)[0]


def hello(worker_id: str, session: str = "", **fields: object) -> list[bytes | memoryview]:
    message = wire.Hello(
        schema=wire.SCHEMA, worker_id=worker_id, session=session or worker_id, model={}, heads=0, **fields
    )
    return wire.encode(message)


def joined(server: Server, worker_id: str) -> tuple[WorkerEndpoint, wire.Welcome]:
    worker = transport.connect(server.address)
    worker.send(hello(worker_id))
    return worker, next(m for m in iter(lambda: heard(worker), None) if isinstance(m, wire.Welcome))


def events(folder: Path, what: str) -> list[str]:
    lines = Records.read(folder / "run" / METRICS)
    return [line["message"] for line in lines if line["kind"] == "event" and line["what"] == what]


NOBODY = {"generation": 1, "worker_id": "nobody", "incarnation": 7}


@pytest.mark.parametrize(
    "message", [wire.Behind(**NOBODY, version=0), wire.Recall(**NOBODY)], ids=lambda m: type(m).__name__
)
def test_who_is_no_worker_is_sent_no_model(serve: Serve, message: wire.AnyMessage) -> None:
    """A hundred bytes must not be answered by gigabytes."""
    with serve(**{"train.workers": 2}) as server:
        server.master.merged["nobody"] = {"0/B": torch.zeros(1, 16, 2)}
        joined(server, "a")
        server._state = replace(server._state, version=1)
        stranger = transport.connect(server.address)
        stranger.send(wire.encode(message))
        stranger.send(hello("x" * 70))
        assert [type(heard(stranger)) for _ in range(2)] == [wire.Refusal, wire.Refusal]


def test_floods_of_strangers_and_members_are_recorded_at_a_bounded_rate(serve: Serve, tmp_path: Path) -> None:
    with serve(**{"train.workers": 1}) as server:
        worker, welcome = joined(server, "a")
        own = {"generation": 1, "worker_id": "a", "incarnation": welcome.incarnation}
        late = wire.Contribution(
            **own,
            version=0,
            stream=1,
            parts=0,
            draw=0,
            tokens=1,
            loss=None,
            **dict.fromkeys(("lost", "step_s", "encode_s", "apply_s"), 0.0),
            **dict.fromkeys(("base_digest", "merged_digest", "given_digest"), "another"),
        )
        stranger = wire.Heartbeat(**NOBODY, number=1, version=0, local_step=0)
        for _ in range(300):
            for message in (late, wire.Recall(**own), stranger):
                worker.send(wire.encode(message))
        while not isinstance(heard(worker), wire.Refusal):
            pass
        for _ in range(299):
            while not isinstance(heard(worker), wire.Refusal):
                pass
    for what in ("refused", "recalled", "fenced"):
        assert 50 <= len(events(tmp_path, what)) < 60


def test_a_refusal_repeats_little_of_what_a_stranger_says(serve: Serve) -> None:
    with serve() as server:
        stranger = transport.connect(server.address)
        model = {"0.weight": "x" * 1_000_000}
        stranger.send(
            wire.encode(wire.Hello(schema=wire.SCHEMA, worker_id="", session="s", model=model, heads=1))
        )
        answer = heard(stranger)
        assert isinstance(answer, wire.Refusal)
        assert "trains another model (0.weight is xxx" in answer.reason
        assert len(answer.reason) < 1000


def test_a_flood_does_not_keep_the_server_from_its_clock(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages that never end: a worker that says nothing is found out all the same, and so is `stop`."""
    left = threading.Event()
    with serve(**{"train.workers": 2, "server.silence_s": 1.0, "worker.heartbeat_s": 0.2}) as server:
        joined(server, "a")
        receive, act = server._endpoint.receive, server._act

        def watching(action: rounds.Action, peer: Peer | None) -> None:
            act(action, peer)
            if isinstance(action, rounds.Forget):
                left.set()

        nonsense = (b"a stranger", [b"nonsense"])
        monkeypatch.setattr(server, "_act", watching)
        monkeypatch.setattr(server._endpoint, "receive", lambda timeout_s: receive(0) or nonsense)
        assert left.wait(WAIT_S), "it was silent"


def test_workers_beyond_the_most_are_turned_away(serve: Serve, tmp_path: Path) -> None:
    with serve(**{"train.workers": 2, "server.max_workers": 2}) as server:
        (first, _), _ = joined(server, "a"), joined(server, "b")
        third = transport.connect(server.address)
        third.send(hello("c"))
        answer = heard(third)
        assert isinstance(answer, wire.Refusal)
        assert answer.reason == "there are 2 workers, and no more may join"
        assert "server.max_workers" in answer.cure
        first.send(hello("a"))  # who is in is not asked to leave
        assert server._state.members.keys() == {"a", "b"}
    assert events(tmp_path, "refused") == ["a worker was refused: there are 2 workers, and no more may join"]


def test_ever_new_workers_join_at_a_bounded_rate() -> None:
    now_s = 0.0
    joins = Joins(most_workers=3, now_s=lambda: now_s)
    assert [joins.may("", "") for _ in range(8)] == [True] * 6 + [False] * 2
    assert joins.may("alice", "alice"), "by a key of her own"
    now_s = 2.0
    assert [joins.may("", "") for _ in range(3)] == [True, True, False]


def test_the_names_of_one_relay_have_no_more_than_one_key_together() -> None:
    joins = Joins(most_workers=3, now_s=lambda: 0.0)
    assert [joins.may(f"site-{n}", "relay/site") for n in range(300)] == [True] * 6 + [False] * 294
    assert joins.may("alice", "alice")
    inquiries = Inquiries()
    assert sum(inquiries.may(f"site-{n}", "relay/site", 0.0) for n in range(300)) == 20
    assert inquiries.may("alice", "alice", 0.0)


def test_one_name_does_not_use_up_what_its_site_has() -> None:
    joins = Joins(most_workers=3, now_s=lambda: 0.0)
    num_joins = [sum(joins.may("roams", relay) for _ in range(300)) for relay in ("relay/a", "relay/b")]
    assert num_joins == [6, 0]
    assert [joins.may(f"site-{n}", "relay/b") for n in range(7)] == [True] * 6 + [False]


def test_ever_new_workers_fill_neither_journal_nor_records(serve: Serve, tmp_path: Path) -> None:
    with serve(**{"train.workers": 2, "server.max_workers": 2}) as server:
        stranger = transport.connect(server.address)
        for n in range(100):
            stranger.send(hello("s", session=f"{n}"))
        refusals = 0
        while refusals < 90:
            refusals += isinstance(heard(stranger), wire.Refusal)
    assert len(events(tmp_path, "joined")) < 10
    assert len(events(tmp_path, "left")) < 10
    assert events(tmp_path, "refused")[0] == "a worker was refused: too many workers have joined lately"


def test_a_worker_that_stays_does_not_keep_a_finished_run_from_its_end(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is waited for as long as a round may take, though it gives signs of life. The clock is ours."""
    now_s = 0.0
    monkeypatch.setattr(Server, "_now_s", lambda server: now_s)
    with serve(**{"train.workers": 1, "server.deadline_s": 100.0}) as server:
        worker, welcome = joined(server, "a")
        server._state = replace(server._state, phase="finished")
        beat = wire.Heartbeat(
            generation=1, worker_id="a", incarnation=welcome.incarnation, number=1, version=0, local_step=0
        )
        message: wire.AnyMessage = welcome
        while not isinstance(message, wire.Farewell) and now_s < 1000:
            now_s += 10
            worker.send(wire.encode(beat))
            while not isinstance(message := heard(worker), wire.Pulse | wire.Farewell):
                pass
        assert 100 <= now_s <= 130
