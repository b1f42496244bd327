"""`lte status`: a live server tells whoever asks how its run is, and nobody else, and not without end."""

from __future__ import annotations

import io
import json
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from test_wire import MESSAGES

from lte import config, recipes, status, transport, wire
from lte.cli import main
from lte.server import rounds
from lte.server.rounds import Rules, State
from lte.server.service import Server
from lte.server.status import Roll, in_words
from lte.transport import keys

RULES = Rules(workers=3, rounds=9, quorum=2, grace_s=5.0, deadline_s=60.0, silence_s=15.0, most_workers=2000)
(EXAMPLE,) = (message for message in MESSAGES if isinstance(message, wire.Status))
HELLO = next(message for message in MESSAGES if isinstance(message, wire.Hello))
CONTRIBUTION = next(message for message in MESSAGES if isinstance(message, wire.Contribution))


# What is told of rounds and workers


def opened(*names: str) -> State:
    """A round on version 0 that opened at 100 s to these workers."""
    state = State(rules=replace(RULES, workers=len(names)), version=0)
    for name in names:
        state, _ = rounds.step(state, rounds.Joined(name, f"process of {name}", 1, 4), 100.0)
    return state


def after(state: State, *events: rounds.Event, now_s: float) -> State:
    for event in events:
        state, _ = rounds.step(state, event, now_s)
    return state


def test_what_the_rounds_wait_for_in_words() -> None:
    alone = after(State(rules=RULES, version=0), rounds.Joined("a", "x", 1, 4), now_s=0.0)
    assert in_words(alone, 1.0) == "waiting for workers: 1 of 3 are there"
    state = opened("a", "b", "c")
    below = "round open for 3.2 s: 0 of 3 contributions held, below the quorum of 2"
    assert in_words(state, 103.2) == below
    state = after(state, rounds.Contributed("a", 1, 0), rounds.Contributed("b", 2, 0), now_s=104.0)
    assert in_words(state, 104.0) == "round open for 4.0 s: 2 of 3 contributions held"
    assert "waiting for room" in in_words(after(state, rounds.Contributed("c", 3, 0), now_s=105.0), 105.0)
    gone = after(opened("a", "b"), rounds.Ticked(), now_s=200.0)
    assert in_words(gone, 200.0) == "all workers are gone; the round is open to whoever joins"
    assert "finished" in in_words(State(rules=RULES, version=9, phase="finished"), 0.0)


def test_merged_on_arrival_the_words_say_how_far_the_run_is_and_how_far_behind_workers_are() -> None:
    state = State(rules=replace(RULES, workers=2, quorum=1, on_arrival=True), version=0)
    joins = (rounds.Joined(name, name, 1, 4) for name in "ab")
    state = after(state, *joins, rounds.Contributed("a", 1, 0), rounds.Ticked(), rounds.Merged(), now_s=1.0)
    said = "merging on arrival: 1 of 18 contributions; workers are 0.5 versions behind on average"
    assert in_words(state, 2.0) == said
    roll = Roll()
    for name, version in (("a", 1), ("b", 0)):
        roll.heard(name, version, 1, "")
    assert [worker.state for worker in roll.workers(state, 2.0, 5.0)] == ["training", "training"]
    file = io.StringIO()
    told = msgspec.structs.replace(EXAMPLE, on_arrival=True, version=7)
    Console(file=file, width=100, _environ={}).print(status.to_text(told, 100))
    assert "version     7\n" in "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def test_what_each_worker_is_at() -> None:
    roll, state = Roll(), opened("a", "b", "c", "d")
    state = after(state, rounds.Joined("e", "late", 1, 4), rounds.Contributed("a", 1, 0), now_s=101.0)
    state = after(state, *(rounds.Heard(name, n) for name, n in (("b", 2), ("c", 3))), now_s=108.0)
    roll.heard("a", 0, 2, "10.0.0.7")
    roll.heard("b", 0, 1, "")
    told = {worker.worker_id: worker for worker in roll.workers(state, 109.0, silent_after_s=8.5)}
    states = {name: worker.state for name, worker in told.items()}
    assert states == {"a": "contributed", "b": "training", "c": "behind", "d": "silent", "e": "waiting"}
    assert [worker.slot for worker in told.values()] == [0, 1, 2, 3, 4]
    assert (told["a"].address, told["a"].version, told["a"].local_step) == ("10.0.0.7", 0, 2)
    assert (told["c"].version, told["c"].heard_s, told["d"].heard_s) == (None, 1.0, 9.0)


def test_rates_are_those_of_the_last_contribution() -> None:
    roll, state = Roll(), opened("w0")
    roll.heard("w0", 0, 2, "")
    roll.merged(CONTRIBUTION, 4)
    roll.merged(msgspec.structs.replace(CONTRIBUTION, step_s=0.25), 4)
    (worker,) = roll.workers(state, 100.0, 5.0)
    assert (worker.rounds, worker.step_s, worker.tokens_per_s) == (2, 0.25, 4096.0)
    roll.merged(msgspec.structs.replace(CONTRIBUTION, worker_id="stranger"), 4)
    assert len(roll.workers(state, 100.0, 5.0)) == 1


def test_who_is_gone_is_remembered_for_a_while_and_who_is_back_is_not_gone() -> None:
    roll, state = Roll(), opened("a", "b")
    roll.left(state.members["a"], "interrupted")
    assert [worker.state for worker in roll.workers(state, 100.0, 5.0)] == ["behind", "behind"]
    left = after(state, rounds.Left("a", 1, "interrupted"), now_s=100.0)
    (_, a) = roll.workers(left, 130.0, 50.0)
    assert (a.worker_id, a.state, a.reason, a.heard_s) == ("a", "gone", "interrupted", 30.0)
    for _ in range(3):
        for n in range(1000):
            roll.left(replace(state.members["a"], worker_id=f"w{n}"), "silent")
    assert len(roll.workers(left, 130.0, 50.0)) == 1 + 32


def test_what_is_told_of_many_workers_is_bounded() -> None:
    names = [f"{'long-name' * 6}-{n}" for n in range(1000)]
    state, roll = opened(*names), Roll()
    for name in names:
        roll.heard(name, 0, 1, "10.10.10.10")
        roll.left(state.members[name], "r" * 64)
    told = roll.workers(after(state, *(rounds.Ticked(),), now_s=100.0), 100.0, 5.0)
    frames = wire.encode(msgspec.structs.replace(EXAMPLE, workers=told))
    assert wire.num_bytes(frames) < 100_000
    assert len(told) == 256


# How it is shown


@pytest.mark.parametrize("width", [30, 80, 200])
def test_it_can_be_read_at_any_width(width: int) -> None:
    gone = msgspec.structs.replace(EXAMPLE.workers[0], worker_id="alice", state="gone", reason="finished")
    shown = msgspec.structs.replace(EXAMPLE, folder="runs/[a]", workers=(*EXAMPLE.workers, gone))
    console = Console(width=width, file=io.StringIO())
    console.print(status.to_text(shown, width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    for words in ("runs/[a]", "3 of 5", "1,000/s"):
        assert words in text
    if width >= 80:
        assert "step 1 of 2" in text
        assert "gone: finished" in " ".join(text.split())


def test_json_holds_no_number_that_is_none() -> None:
    read = json.loads(status.to_json(msgspec.structs.replace(EXAMPLE, train_loss=float("nan"))))
    assert read["train_loss"] is None
    assert read["workers"][0]["state"] == "training"
    assert read.keys() == {field.name for field in msgspec.structs.fields(wire.Status)}


# A live server


Serve = Callable[..., Server]


@pytest.fixture
def serve(shards: Path, tmp_path: Path) -> Iterator[Serve]:
    """Start a server in a thread of its own."""
    running: list[tuple[Server, threading.Thread]] = []

    def start(**settings: Any) -> Server:
        small = {
            "run.dir": str(tmp_path / "run"),
            "model.num_layers": 1,
            "model.width": 32,
            "model.num_attention_heads": 2,
            "model.mlp_width": 64,
            "model.context_tokens": 16,
            "data.shards": str(shards),
            "train.rounds": 3,
            "train.local_steps": 2,
            "train.workers": 1,
            "train.batch_size": 4,
            "lora.rank": 4,
            "eval.every": 0,
            "eval.final_tokens": 64,
            "server.address": "tcp://127.0.0.1:*",
        }
        server = recipes.make_server(config.replace(config.Recipe(), **(small | settings)), display=False)
        thread = threading.Thread(target=server.serve)
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.stop("the test is over")
        thread.join()
        server.__exit__(None, None, None)


def test_a_server_tells_how_its_run_is(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve()
    assert main(["status", "--server", server.address]) == 0
    assert "waiting for workers: 0 of 1" in capsys.readouterr().out

    asked: queue.Queue[wire.Status] = queue.Queue()

    def ask(worker: object) -> None:  # in the worker's thread, before its first step
        asked.put(status.inquire(server.address))

    recipes.work(server.address, worker_id="alice", say=lambda line: None, began=ask)
    found = asked.get(timeout=0)
    assert (found.phase, found.version, found.num_members, found.num_gone) == ("collecting", 0, 1, 0)
    (alice,) = found.workers
    assert (alice.worker_id, alice.slot, alice.rounds) == ("alice", 0, 0)
    assert not [line for line in capsys.readouterr().err.splitlines() if line]


def test_json_and_the_exit_code_serve_as_a_health_check(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve()
    assert main(["status", "--server", server.address, "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert (read["phase"], read["version"], read["workers"]) == ("starting", 0, [])
    assert main(["status", "--server", "tcp://127.0.0.1:1", "--wait", "0.1", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lte: no server answers at tcp://127.0.0.1:1 after 0.1 s")
    assert err.count("\n") == 1


def test_whoever_asks_without_end_is_answered_at_a_bounded_rate(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not join: nothing of it stays."""
    monkeypatch.setattr(Server, "_now_s", lambda server: 0.0)
    server = serve()
    endpoint = transport.connect(server.address)
    for _ in range(100):
        endpoint.send(wire.encode(wire.Inquiry(schema=wire.SCHEMA)))
    # An answer to what comes after them says that all were heard.
    endpoint.send(wire.encode(msgspec.structs.replace(HELLO, schema="another")))
    answers = []
    while not answers or not isinstance(answers[-1], wire.Refusal):
        frames = endpoint.receive(20)
        assert frames is not None
        answers.append(wire.decode(frames)[0])
    late = [wire.decode(frames)[0] for frames in iter(lambda: endpoint.receive(0.5), None)]
    endpoint.close()
    assert [type(answer) for answer in answers + late].count(wire.Status) == 20
    assert not server._state.known


def test_another_version_of_lte_is_told_so(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    monkeypatch.setattr(wire, "SCHEMA", "another")
    endpoint = transport.connect(server.address)
    endpoint.send(wire.encode(wire.Inquiry(schema="older")))
    frames = endpoint.receive(20)
    endpoint.close()
    assert frames is not None
    assert isinstance(wire.decode(frames)[0], wire.Refusal)


def test_where_there_are_keys_only_an_allowed_one_is_answered(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = {name: keys.create(tmp_path / name) for name in ("server", "alice", "eve")}
    (tmp_path / "allow").write_text(f"alice {pairs['alice'].public}\n")
    server = serve(**{"server.key": str(tmp_path / "server.secret"), "server.allow": str(tmp_path / "allow")})

    def ask(name: str) -> int:
        own = ["--key", str(tmp_path / f"{name}.secret"), "--server-key", str(tmp_path / "server.public")]
        return main(["status", "--server", server.address, "--json", *own])

    assert ask("alice") == 0
    assert json.loads(capsys.readouterr().out)["phase"] == "starting"
    assert ask("eve") == 2
    assert "does not admit this key" in capsys.readouterr().err
    assert main(["status", "--server", server.address]) == 2
    assert "demands a key" in capsys.readouterr().err
