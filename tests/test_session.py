"""The worker's side of the protocol against a server that loses messages by script."""

import queue
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

import msgspec
import pytest
import torch

from lte import config, transport, wire
from lte.config import Recipe
from lte.errors import ConnectError, JoinAnewError, RefusedError, RunEnded
from lte.transport import Frames, Peer, ServerEndpoint
from lte.worker.session import Session

NAMES = count()


@pytest.fixture
def endpoint() -> Iterator[ServerEndpoint]:
    address = f"inprocess://session-{next(NAMES)}"
    server = transport.bind(address, max_message_bytes=1 << 20)
    yield server
    server.close()


class Script:
    """A server that answers as a test says. Runs the worker's side in a thread of its own."""

    def __init__(self, endpoint: ServerEndpoint) -> None:
        self.endpoint = endpoint
        self.session: Session | None = None
        self.errors: list[BaseException] = []
        self.words: queue.Queue[str] = queue.Queue()

    def until_said(self, words: str) -> None:
        """Wait until the worker says this to a person."""
        assert self.words.get(timeout=20) == words

    def hear(self, kind: type[wire.Message]) -> tuple[Peer, wire.Message]:
        while True:
            received = self.endpoint.receive(20)
            assert received is not None, f"no {kind.__name__} came"
            message, _ = wire.decode(received[1])
            if isinstance(message, kind):
                return received[0], message

    def say(self, peer: Peer, message: wire.Message, **tensors: torch.Tensor) -> None:
        self.endpoint.send(peer, wire.encode(message, tensors))

    def join(self) -> Peer:
        """A worker joins; returns once it has."""
        settings = config.to_dict(config.replace(Recipe(), **{"worker.heartbeat_s": 0.02}))
        joined = threading.Event()

        def work() -> None:
            self.session = Session(self.endpoint.address, say=self.words.put)
            joined.set()

        threading.Thread(target=work).start()
        peer, _ = self.hear(wire.Hello)
        welcome = self.welcome_of(settings)
        self.welcome = welcome
        self.say(peer, welcome)
        self.say(peer, msgspec.structs.replace(UPDATE, version=0, since=None))
        assert joined.wait(20)
        return peer

    @staticmethod
    def welcome_of(settings: dict[str, Any]) -> wire.Welcome:
        return wire.Welcome(
            generation=1,
            worker_id="w0",
            incarnation=1,
            slot=0,
            version=0,
            settings=settings,
            model={},
            holds=False,
            run_id="run",
            merged_digest="",
        )


FAREWELL = wire.Farewell(generation=1, reason="stopped", finished=False, returns=False)
CONTRIBUTION = wire.Contribution(
    generation=1,
    worker_id="w0",
    incarnation=1,
    version=0,
    stream=1,
    parts=1,
    draw=0,
    tokens=1,
    loss=None,
    lost=0.0,
    step_s=0.0,
    encode_s=0.0,
    apply_s=0.0,
    base_digest="",
    merged_digest="",
    given_digest="",
)
UPDATE = wire.Update(
    generation=1, version=1, since=0, step=0, stream=1, parts=0, merged=(1,), base_digest="", last=False
)


def in_thread(session: Session, script: Script) -> tuple[threading.Thread, list[wire.Message]]:
    heard: list[wire.Message] = []

    def wait() -> None:
        try:
            heard.append(session.next_step()[0])
        except BaseException as error:
            script.errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, heard


def test_a_lost_contribution_is_sent_again_and_a_slow_one_is_not(endpoint: ServerEndpoint) -> None:
    """Lost is what a later heartbeat overtook; answers to earlier heartbeats prove nothing."""
    script = Script(endpoint)
    peer = script.join()
    session = script.session
    assert session is not None
    _, before = script.hear(wire.Heartbeat)
    session.push(0, [("x", torch.ones(3, dtype=torch.uint8))], lambda parts, blobs: CONTRIBUTION)
    thread, heard = in_thread(session, script)
    assert script.hear(wire.Contribution)[1] == CONTRIBUTION
    for _ in range(3):
        script.say(peer, wire.Pulse(generation=1, number=before.number, version=0))
    sent_since = []
    while not sent_since or sent_since[-1].number < before.number + 5:  # heartbeats, and nothing else
        received = endpoint.receive(20)
        assert received is not None
        sent_since.append(wire.decode(received[1])[0])
    assert {type(message) for message in sent_since} == {wire.Heartbeat}
    script.say(peer, wire.Pulse(generation=1, number=sent_since[-1].number, version=0))
    assert script.hear(wire.Part)[1].index == 0, "its parts come again, too"
    assert script.hear(wire.Contribution)[1] == msgspec.structs.replace(CONTRIBUTION, stream=2)
    script.say(peer, wire.Receipt(generation=1, version=0, stream=2, status="held", reason=""))
    script.say(peer, UPDATE)
    thread.join(20)
    assert heard == [UPDATE]
    session.close("enough")


def test_a_lost_update_is_asked_for(endpoint: ServerEndpoint) -> None:
    script = Script(endpoint)
    peer = script.join()
    session = script.session
    assert session is not None
    thread, heard = in_thread(session, script)
    script.say(peer, wire.Pulse(generation=1, number=0, version=0))  # nothing to miss yet
    script.say(peer, wire.Pulse(generation=1, number=0, version=1))  # version 1 went astray
    assert script.hear(wire.Behind)[1] == wire.Behind(generation=1, version=0, worker_id="w0", incarnation=1)
    script.say(peer, UPDATE)
    thread.join(20)
    assert heard == [UPDATE]
    session.close("enough")


def test_one_lost_update_is_asked_for_once(endpoint: ServerEndpoint) -> None:
    """Pulses pile up while a worker computes; each answer to a question would be a whole update."""
    script = Script(endpoint)
    peer = script.join()
    session = script.session
    assert session is not None
    _, before = script.hear(wire.Heartbeat)
    for _ in range(5):
        script.say(peer, wire.Pulse(generation=1, number=before.number, version=1))
    thread, heard = in_thread(session, script)
    asked = [wire.decode(frames)[0] for _, frames in (endpoint.receive(20) for _ in range(12))]
    assert sum(isinstance(message, wire.Behind) for message in asked) == 1
    last = max(message.number for message in asked if isinstance(message, wire.Heartbeat))
    script.say(peer, wire.Pulse(generation=1, number=last, version=1))  # what was asked for is lost, too
    assert script.hear(wire.Behind)[1].version == 0
    script.say(peer, UPDATE)
    thread.join(20)
    assert heard == [UPDATE]
    session.close("enough")


@pytest.mark.parametrize("torn", ["first part", "last part", "all parts", "of another stream"])
def test_an_update_that_is_not_whole_is_asked_for_again(endpoint: ServerEndpoint, torn: str) -> None:
    script = Script(endpoint)
    peer = script.join()
    session = script.session
    assert session is not None
    thread, heard = in_thread(session, script)
    blobs = [("x", torch.arange(150, dtype=torch.uint8))]

    def parts(stream: int) -> list[Frames]:
        def part(index: int) -> wire.Part:
            return wire.Part(generation=1, worker_id="", incarnation=0, version=1, stream=stream, index=index)

        return [frames for frames, _ in wire.in_parts(blobs, 64, part)]

    first, again = parts(2), parts(3)
    lacking = {"first part": first[1:], "last part": first[:-1], "all parts": []}
    for frames in lacking.get(torn, parts(1)):
        endpoint.send(peer, frames)
    script.say(peer, msgspec.structs.replace(UPDATE, stream=2, parts=len(first)))
    assert script.hear(wire.Behind)[1].version == 0
    for frames in [*again, first[0]]:  # of the first stream one comes late
        endpoint.send(peer, frames)
    whole = msgspec.structs.replace(UPDATE, stream=3, parts=len(again))
    script.say(peer, whole)
    thread.join(20)
    assert heard == [whole]
    session.close("enough")


@pytest.mark.parametrize(
    ("message", "error", "says"),
    [
        (wire.Refusal(generation=1, reason="replaced", cure="go"), RefusedError, "replaced"),
        (FAREWELL, RunEnded, "stopped"),
    ],
)
def test_what_ends_a_worker(
    endpoint: ServerEndpoint, message: wire.Message, error: type[Exception], says: str
) -> None:
    script = Script(endpoint)
    peer = script.join()
    assert script.session is not None
    script.session.push(0, [], lambda parts, blobs: CONTRIBUTION)
    thread, heard = in_thread(script.session, script)
    script.say(peer, message)
    thread.join(20)
    assert heard == []
    (met,) = script.errors
    assert isinstance(met, error)
    assert says in str(met)
    script.session.close("enough")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_server_that_was_started_anew_is_said_hello_to_again(
    endpoint: ServerEndpoint, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """What was pushed goes to it once more, in its generation; what an old server says counts no more."""
    monkeypatch.setattr("lte.worker.session._ASK_AGAIN_S", 0.01)
    monkeypatch.setattr("lte.worker.session._LOOK_UP_S", 0.01)
    script = Script(endpoint)
    peer = script.join()
    session = script.session
    assert session is not None
    session.push(0, [("x", torch.ones(3, dtype=torch.uint8))], lambda parts, blobs: CONTRIBUTION)
    thread, heard = in_thread(session, script)
    script.hear(wire.Contribution)
    script.say(peer, wire.HelloAgain(generation=3))
    for _ in range(lost + 1):
        _, hello = script.hear(wire.Hello)
    assert (hello.worker_id, hello.incarnation) == ("w0", 1)
    assert (hello.version, hello.base_digest) == (0, UPDATE.base_digest)
    script.say(peer, msgspec.structs.replace(script.welcome, generation=3, holds=True))
    assert script.hear(wire.Part)[1].generation == 3
    assert script.hear(wire.Contribution)[1] == msgspec.structs.replace(CONTRIBUTION, generation=3, stream=2)
    script.say(peer, wire.Receipt(generation=3, version=0, stream=2, status="held", reason=""))
    for message in (UPDATE, wire.Refusal(generation=1, reason="fenced", cure="go"), FAREWELL):
        script.say(peer, message)  # a ghost's
    script.say(peer, msgspec.structs.replace(UPDATE, generation=3))
    thread.join(20)
    assert heard == [msgspec.structs.replace(UPDATE, generation=3)]
    session.close("enough")


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"run_id": "another"}, JoinAnewError, "gone back to an earlier version, or serves another run"),
        ({"slot": 1}, JoinAnewError, "another has taken its place"),
        ({"settings": {}}, RunEnded, "other settings (worker.heartbeat_s: 0.02 -> None)"),
        ({"holds": False}, RunEnded, "this worker's 0 is none of its own"),
    ],
)
def test_a_server_that_cannot_go_on_with_a_worker_is_left(
    endpoint: ServerEndpoint, fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    script = Script(endpoint)
    peer = script.join()
    assert script.session is not None
    thread, _ = in_thread(script.session, script)
    script.say(peer, wire.HelloAgain(generation=2))
    script.hear(wire.Hello)
    script.say(peer, msgspec.structs.replace(script.welcome, generation=2, **{"holds": True} | fields))
    thread.join(20)
    (met,) = script.errors
    assert isinstance(met, error)
    assert says in str(met)
    script.session.close("enough")


@pytest.mark.parametrize("lost", ["Welcome", "Part", "Update", "damaged"])
def test_a_welcome_that_is_not_whole_is_asked_for_again(
    endpoint: ServerEndpoint, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.setattr("lte.worker.session._STALLED_S", 0.2)
    script = Script(endpoint)
    asked: list[int] = []

    def answer(peer: Peer, hello: wire.Hello) -> bool:
        """Whether this attempt is answered whole."""
        asked.append(hello.attempt)
        stream = len(asked)
        part = wire.Part(generation=1, worker_id="", incarnation=0, version=0, stream=stream, index=0)
        messages = {
            "Welcome": wire.encode(script.welcome_of(config.to_dict(Recipe()))),
            "Part": wire.encode(part, {"x": torch.ones(3, dtype=torch.uint8)}),
            "Update": wire.encode(
                msgspec.structs.replace(UPDATE, version=0, since=None, stream=stream, parts=1)
            ),
        }
        whole = hello.attempt > 0
        for name, frames in messages.items():
            if whole or name != lost:
                damaged = lost == "damaged" and name == "Part" and not whole
                endpoint.send(peer, [bytes(frames[0])[:-1] + b"?", *frames[1:]] if damaged else frames)
        return whole

    sessions: list[Session] = []
    thread = threading.Thread(target=lambda: sessions.append(Session(endpoint.address)))
    thread.start()
    while not answer(*script.hear(wire.Hello)):
        pass
    thread.join(20)
    assert set(asked) == {0, 1}
    assert sessions[0].num_damaged == (lost == "damaged")
    assert list(sessions[0].base) == ["x"]
    sessions[0].close("enough")


def test_a_server_that_falls_silent_is_left(
    endpoint: ServerEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lte.worker.session._LOOK_UP_S", 0.01)
    script = Script(endpoint)
    script.join()
    assert script.session is not None
    script.session._patience_s = 0.05
    thread, _ = in_thread(script.session, script)
    thread.join(20)
    assert "not heard for 0.05 s" in str(script.errors[0])
    script.session.close("enough")


def test_a_server_that_is_not_heard_is_waited_for_and_spoken_of(
    endpoint: ServerEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lte.worker.session._LOOK_UP_S", 0.01)
    monkeypatch.setattr("lte.worker.session._LONG_S", 0.0)
    script = Script(endpoint)
    peer = script.join()
    assert script.session is not None
    script.session._unheard_s = 0.05
    thread, heard = in_thread(script.session, script)
    script.until_said("the server is not heard; waiting for it, 600 s at most")
    script.say(peer, wire.Pulse(generation=1, number=0, version=0))
    script.until_said("the server is heard again, after 0 s")
    script.until_said("still waiting for the others: the server lives, and has no new version yet")
    script.say(peer, wire.Begin(generation=1, version=0))
    thread.join(20)
    assert heard == [wire.Begin(generation=1, version=0)]
    assert script.words.empty(), "each is said once"
    script.session.close("enough")


def test_a_server_that_is_to_come_back_is_waited_for(endpoint: ServerEndpoint) -> None:
    """It was preempted; the one after it has a generation of its own, and goes on with this worker."""
    script = Script(endpoint)
    peer = script.join()
    assert script.session is not None
    thread, heard = in_thread(script.session, script)
    script.say(peer, msgspec.structs.replace(FAREWELL, returns=True))
    script.until_said("the server went and is to come back (stopped)")
    _, beat = script.hear(wire.Heartbeat)
    assert beat.generation == 1
    script.say(peer, wire.HelloAgain(generation=2))
    _, hello = script.hear(wire.Hello)
    assert (hello.worker_id, hello.incarnation, hello.version) == ("w0", 1, 0)
    script.say(peer, msgspec.structs.replace(script.welcome, generation=2, holds=True))
    script.say(peer, wire.Begin(generation=2, version=0))
    thread.join(20)
    assert heard == [wire.Begin(generation=2, version=0)]
    script.session.close("enough")


class Group:
    """A server of two shards, each with an endpoint, that answers as a test says."""

    NAMES = (("a",), ("b",))

    def __init__(self, endpoints: tuple[ServerEndpoint, ServerEndpoint]) -> None:
        self.ends = [Script(endpoint) for endpoint in endpoints]
        self.peers: list[Peer] = []
        self.words = self.ends[0].words

    def placement(self, address: str) -> wire.Placement:
        return wire.Placement(generation=1, addresses=(address,), names=self.NAMES)

    def join(self, **settings: float) -> Session:
        """A worker joins. It is never heard by itself: what it sends is for the test to hear."""
        first, second = self.ends
        sessions: list[Session] = []
        thread = threading.Thread(
            target=lambda: sessions.append(Session(first.endpoint.address, say=self.words.put))
        )
        thread.start()
        peer, _ = first.hear(wire.Hello)
        recipe = config.replace(Recipe(), **{"worker.heartbeat_s": 0.02} | settings)
        first.say(peer, self.placement(second.endpoint.address))
        first.say(peer, Script.welcome_of(config.to_dict(recipe)))
        self.peers = [peer, second.hear(wire.Heartbeat)[0]]
        self.say_all(msgspec.structs.replace(UPDATE, version=0, since=None))
        thread.join(20)
        return sessions[0]

    def say(self, shard: int, message: wire.Message, **tensors: torch.Tensor) -> None:
        self.ends[shard].say(self.peers[shard], message, **tensors)

    def say_all(self, message: wire.Message) -> None:
        for shard in range(2):
            self.say(shard, message)

    def hear(self, shard: int, kind: type[wire.Message]) -> Any:
        return self.ends[shard].hear(kind)[1]

    def answer_a_heartbeat(self, shard: int, version: int = 0) -> None:
        """One that is sent from now on."""
        self.hear(shard, wire.Heartbeat)
        while self.ends[shard].endpoint.receive(0):
            pass
        number = self.hear(shard, wire.Heartbeat).number
        self.say(shard, wire.Pulse(generation=1, number=number, version=version))

    def sent(self, shard: int, num: int) -> list[wire.Message]:
        """The next messages to a shard that are no heartbeats, before so many of these."""
        found: list[wire.Message] = []
        while num:
            received = self.ends[shard].endpoint.receive(20)
            assert received is not None
            message, _ = wire.decode(received[1])
            num -= isinstance(message, wire.Heartbeat)
            found += [] if isinstance(message, wire.Heartbeat) else [message]
        return found


@pytest.fixture
def group() -> Iterator[Group]:
    number = next(NAMES)
    first, second = (
        transport.bind(f"inprocess://group-{number}.{shard}", max_message_bytes=1 << 20) for shard in (0, 1)
    )
    yield Group((first, second))
    first.close()
    second.close()


BLOBS = [("a", torch.ones(3, dtype=torch.uint8)), ("b", torch.ones(2, dtype=torch.uint8))]


def ends_with_the_update(session: Session, thread: threading.Thread, heard: list[wire.Message]) -> None:
    """What a session of two shards was waiting for has come from both."""
    thread.join(20)
    assert heard == [msgspec.structs.replace(UPDATE, base_digest=" ")]
    session.close("enough")


def test_a_part_that_one_shard_has_not_got_goes_to_it_again_and_to_no_other(group: Group) -> None:
    session = group.join()
    session.push(0, BLOBS, lambda parts, blobs: CONTRIBUTION)
    thread, heard = in_thread(session, group.ends[0])
    for shard in range(2):
        assert group.hear(shard, wire.Contribution).stream == 1
    group.say(0, wire.Receipt(generation=1, version=0, stream=1, status="held", reason=""))
    for shard in range(2):  # what went to the second was lost
        group.answer_a_heartbeat(shard)
    assert group.hear(1, wire.Part).index == 0
    assert group.hear(1, wire.Contribution).stream == 1, "with the other's part it makes one contribution"
    assert group.sent(0, 3) == []
    group.say(1, wire.Receipt(generation=1, version=0, stream=1, status="held", reason=""))
    group.say_all(UPDATE)
    ends_with_the_update(session, thread, heard)


def test_a_refusal_is_of_the_contribution_that_it_names(group: Group) -> None:
    """It was said twice, as the first time it was lost; meanwhile the worker has started over."""
    session = group.join()
    session.push(0, BLOBS, lambda parts, blobs: CONTRIBUTION)
    refused = wire.Receipt(generation=1, version=0, stream=1, status="refused", reason="wrong")
    for _ in range(2):
        group.say(0, refused)
    assert session.next_step()[0] == refused
    session.push(0, BLOBS, lambda parts, blobs: CONTRIBUTION)
    thread, heard = in_thread(session, group.ends[0])
    group.say_all(UPDATE)
    ends_with_the_update(session, thread, heard)


def test_a_part_of_an_update_that_was_lost_is_asked_for_where_it_was(group: Group) -> None:
    session = group.join()
    thread, heard = in_thread(session, group.ends[0])
    group.say(0, UPDATE)
    for shard in range(2):  # the second's part went astray
        group.answer_a_heartbeat(shard, version=1)
    assert group.hear(1, wire.Behind).version == 0
    assert group.sent(0, 3) == []
    group.say(1, UPDATE)
    ends_with_the_update(session, thread, heard)


def test_factors_of_two_versions_are_asked_for_again_where_they_are_older(group: Group) -> None:
    """A merge came between the answers of two shards."""
    session = group.join()
    session.recall()
    thread, heard = in_thread(session, group.ends[0])
    for shard in range(2):
        group.hear(shard, wire.Recall)
        group.say(shard, wire.Factors(generation=1, version=shard, stream=2, parts=0))
    group.hear(0, wire.Recall)
    group.say(0, wire.Factors(generation=1, version=1, stream=3, parts=0))
    thread.join(20)
    assert heard == [wire.Factors(generation=1, version=1, stream=3, parts=0)]
    assert group.sent(1, 3) == []
    session.close("enough")


def test_a_shard_that_is_not_reached_ends_a_join(
    group: Group, endpoint: ServerEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall lets the first port through only."""
    monkeypatch.setattr("lte.worker.session._STALLED_S", 0.3)
    monkeypatch.setattr("lte.worker.session._ASK_AGAIN_S", 0.02)
    monkeypatch.setattr("lte.worker.session._LOOK_UP_S", 0.02)
    first, errors = group.ends[0], list[BaseException]()

    def work() -> None:
        try:
            Session(first.endpoint.address)
        except ConnectError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    answered, message = -1, None
    while not isinstance(message, wire.Leave):  # each attempt is answered whole
        received = first.endpoint.receive(20)
        assert received is not None
        peer, (message, _) = received[0], wire.decode(received[1])
        if isinstance(message, wire.Hello) and message.attempt > answered:
            answered = message.attempt
            first.say(peer, group.placement("tcp://127.0.0.1:9"))
            first.say(peer, Script.welcome_of(config.to_dict(Recipe())))
            first.say(peer, msgspec.structs.replace(UPDATE, version=0, since=None, stream=answered + 1))
    thread.join(20)
    (error,) = errors
    assert "shard 1 of the server at tcp://127.0.0.1:9 was not heard for 0.3 s; with server.shards" in str(
        error
    )
    assert message.reason.startswith("ConnectError"), "it is no member any more"


def test_a_shard_that_falls_silent_is_left_and_named(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first server's signs of life do not speak for it."""
    monkeypatch.setattr("lte.worker.session._LOOK_UP_S", 0.01)
    session = group.join()
    session._patience_s, session._unheard_s = 0.5, 0.1
    thread, _ = in_thread(session, group.ends[0])
    while thread.is_alive():
        if group.ends[0].endpoint.receive(0.1):
            group.say(0, wire.Pulse(generation=1, number=0, version=0))
    assert group.words.get() == "shard 1 of the server is not heard; waiting for it, 1 s at most"
    assert "shard 1 of the server was not heard for 1 s" in str(group.ends[0].errors[0])
    session.close("enough")


def test_no_server_at_all() -> None:
    with pytest.raises(ConnectError, match="no server answers at tcp"):
        Session("tcp://127.0.0.1:1", wait_s=0.1)
