"""Relays: what crosses the link once, what a relay keeps, whom it may speak for.

That it carries frames as any transport does is in `test_transport`; whole runs with faults are in
`faults/test_behind_a_relay`."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import TINY
from ends import WAIT_S, hear, hear_at
from hypothesis import given
from hypothesis import strategies as st
from processes import Family, done

from lte import transport, wire
from lte.errors import ConnectError, KeysError, WireError
from lte.relay import Relay
from lte.server.admission import not_vouched, vouched
from lte.transport import Frames, Peer, WorkerEndpoint, envelope, keys
from lte.transport.keys import AllowList
from lte.transport.lanes import SMALL_BYTES, SMALL_IN_A_ROW, Lanes
from lte.transport.shelf import MOST_PIECES, Shelf

PIECE = bytes(range(256)) * 100


class Site:
    """A server, a relay in a thread of this process, and workers behind it."""

    def __init__(self, shelf_bytes: int = 1 << 20, **options: Any) -> None:
        self.said: list[str] = []
        self._open = contextlib.ExitStack()
        at_server, at_relay = options.pop("at_server", {}), options.pop("at_relay", {})
        self.server = transport.bind("tcp://127.0.0.1:*", max_message_bytes=1 << 20, **at_server)
        self._open.callback(self.server.close)
        self.relay = Relay(
            self.server.address,
            "tcp://127.0.0.1:*",
            shelf_bytes=shelf_bytes,
            say=self.said.append,
            **at_relay,
        )
        self._open.callback(self.relay.close)
        self.fault: ConnectError | None = None
        serving = threading.Thread(target=self._serve)
        serving.start()
        self._open.callback(serving.join)
        self._open.callback(self.relay.stop)

    def _serve(self) -> None:
        try:
            self.relay.serve()
        except ConnectError as error:
            self.fault = error

    def connect(self, **at_worker: Path) -> WorkerEndpoint:
        worker = transport.connect(self.relay.address, **at_worker)
        self._open.callback(worker.close)
        return worker

    def joined(self, **at_worker: Path) -> tuple[WorkerEndpoint, Peer]:
        """A worker, and who it is to the server."""
        worker = self.connect(**at_worker)
        worker.send([b"hello"])
        peer, frames = hear(self.server)
        assert frames == [b"hello"]
        return worker, peer

    def sent(self, peer: Peer, frames: Frames) -> int:
        """Send; returns how many bytes went over the link."""
        before = self.server.sent_bytes
        self.server.send(peer, frames)
        return self.server.sent_bytes - before

    def close(self) -> None:
        self._open.close()


@pytest.fixture
def site() -> Iterator[Site]:
    with contextlib.closing(Site()) as opened:
        yield opened


# What crosses the link


def test_what_several_are_sent_crosses_once(site: Site) -> None:
    workers = [site.joined() for _ in range(8)]
    assert len({peer for _, peer in workers}) == 8
    crossed = [site.sent(peer, [b"header", PIECE]) for _, peer in workers]
    assert crossed[0] > len(PIECE)
    assert max(crossed[1:]) < 120
    assert all(hear_at(worker) == [b"header", PIECE] for worker, _ in workers)
    assert site.said == []


def test_equal_bytes_are_known_whatever_message_they_are_in(site: Site) -> None:
    """A snapshot for a later joiner comes in another stream: other headers, the same payloads."""
    (a, of_a), (b, of_b) = site.joined(), site.joined()
    site.sent(of_a, [b"one stream", PIECE])
    assert site.sent(of_b, [b"another stream", bytearray(PIECE)]) < 120
    assert hear_at(a) == [b"one stream", PIECE]
    assert hear_at(b) == [b"another stream", PIECE]


def test_what_is_not_kept_any_more_is_sent_again(site: Site) -> None:
    """Server and relay forget the same: nothing is missed, and the shelf is never larger than it may be."""
    (a, of_a), (b, of_b) = site.joined(), site.joined()
    pieces = [bytes([n]) * 200_000 for n in range(9)]
    for n in (0, 1, 2, 0, 3, 4, 5, 0, 6, 1, 7, 8, 0):
        before = site.server.sent_bytes
        for peer in (of_a, of_b):
            site.server.send(peer, [pieces[n]])
        assert site.server.sent_bytes - before < 200_000 * 2
        assert hear_at(a) == hear_at(b) == [pieces[n]]
        assert site.relay.shelf.num_bytes <= 1 << 20
    assert site.said == []


def test_what_is_larger_than_the_shelf_goes_through_it() -> None:
    with contextlib.closing(Site(shelf_bytes=1_000)) as site:
        worker, peer = site.joined()
        for _ in range(2):
            assert site.sent(peer, [PIECE]) > len(PIECE)
            assert hear_at(worker) == [PIECE]
        assert len(site.relay.shelf) == 0


def test_what_the_relay_lost_is_sent_when_it_is_asked_for_again(site: Site) -> None:
    (a, of_a), (b, of_b) = site.joined(), site.joined()
    site.sent(of_a, [PIECE])
    assert hear_at(a) == [PIECE]
    site.relay.shelf.drop(envelope.digest(PIECE))
    assert site.sent(of_b, [PIECE]) < 120, "the server does not know yet"
    site.sent(of_b, [b"what closes it"])
    assert hear_at(b) == [b"what closes it"]
    b.send([b"it did not come"])
    assert hear(site.server)[1] == [b"it did not come"], "behind the relay's word of what it misses"
    assert site.sent(of_b, [PIECE]) > len(PIECE)
    assert hear_at(b) == [PIECE]
    assert site.said == ["a message was dropped, as part of it is not here; its worker asks again"]


def test_workers_with_and_without_a_relay_are_told_apart(site: Site) -> None:
    behind, of_behind = site.joined()
    with contextlib.closing(transport.connect(site.server.address)) as direct:
        direct.send([b"hello"])
        of_direct, _ = hear(site.server)
        for peer, name in ((of_behind, b"behind"), (of_direct, b"direct")):
            site.server.send(peer, [name])
        assert (hear_at(behind), hear_at(direct)) == ([b"behind"], [b"direct"])


def test_relays_form_no_chains(site: Site) -> None:
    behind = Relay(site.relay.address, "tcp://127.0.0.1:*", shelf_bytes=1, say=site.said.append)
    with behind, contextlib.closing(transport.connect(behind.address)) as worker:
        serving = threading.Thread(target=behind.serve)
        serving.start()
        worker.send([b"hello"])
        site.joined()
        until(lambda: site.said)
        behind.stop()
        serving.join()
    assert site.said == ["another relay connects here and is not heard: relays form no chains"]


def until(holds: Any) -> None:
    for _ in range(2_000):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")


# Sizes


def test_what_the_server_would_not_accept_breaks_nobodys_connection(site: Site) -> None:
    """The server breaks the connection of all on a frame that is too large, at every try."""
    (a, _), (b, of_b) = site.joined(), site.joined()
    a.send([b"header", bytes((1 << 20) + 1)])
    a.send([b"behind it"])
    b.send([b"at the same time", bytes(1 << 20)])
    heard = [hear(site.server) for _ in range(2)]
    assert sorted(frames[0] for _, frames in heard) == [b"at the same time", b"behind it"]
    assert of_b in [peer for peer, _ in heard], "it is the connection of before"
    assert site.said == [
        "a message of a worker was dropped: 1,048,577 bytes in a frame, and the server accepts 1,048,576"
        " (server.max_message_bytes)"
    ]


def test_a_relay_that_accepts_less_than_its_server_says_so() -> None:
    with contextlib.closing(Site(at_relay={"max_message_bytes": 1_000_000})) as site:
        site.joined()
        until(lambda: site.said)
        (line,) = site.said
    assert "accepts frames of 1,000,000 bytes and the server of 1,048,576" in line
    assert "--max-message-bytes 1048576" in line


# Turns


def test_lanes_take_turns_and_small_messages_go_first() -> None:
    lanes, bulk = Lanes(), bytes(SMALL_BYTES)
    for lane, message in [("a", b"1"), ("a", b"2"), ("b", b"3"), ("a", b"4"), ("b", b"5"), ("c", b"6")]:
        lanes.put(lane.encode(), [message, bulk])
    lanes.put(b"c", [b"behind its own"])
    lanes.put(b"d", [b"small"])
    lanes.put(b"d", [b"small, too"])
    taken = [lanes.take()[0] for _ in range(len(lanes))]
    assert taken == [b"small", b"small, too", b"1", b"3", b"6", b"behind its own", b"2", b"5", b"4"]
    assert not lanes


def test_small_messages_without_end_let_large_ones_have_turns() -> None:
    """Of two lanes, too, where one of them never runs dry of small ones."""
    lanes, bulk = Lanes(), bytes(SMALL_BYTES)
    for n in range(3):
        lanes.put(b"bulk %d" % n, [b"bulk", bulk])
    taken = list[bytes]()
    for _ in range(3 * (SMALL_IN_A_ROW + 1) + 5):
        lanes.put(b"chatter", [b"small"])
        taken.append(bytes(lanes.take()[0]))
    assert taken == [*([b"small"] * SMALL_IN_A_ROW + [b"bulk"]) * 3, *[b"small"] * 5]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40))
def test_lanes_keep_order_and_lose_nothing(messages: Sequence[tuple[int, bool]]) -> None:
    lanes, bulk = Lanes(), bytes(SMALL_BYTES)
    for number, (lane, is_bulk) in enumerate(messages):
        lanes.put(b"%d" % lane, [b"%d" % number, bulk if is_bulk else b""])
    taken = [int(bytes(lanes.take()[0])) for _ in range(len(lanes))]
    assert sorted(taken) == list(range(len(messages)))
    for lane in range(4):
        of_lane = [number for number in taken if messages[number][0] == lane]
        assert of_lane == sorted(of_lane)


def test_what_waits_is_bounded_and_its_greatest_part_is_lost() -> None:
    lost = list[int]()
    lanes = Lanes(100_000, lost.append)
    lanes.put(b"a", [b"a's", bytes(SMALL_BYTES)])
    for n in range(30):
        lanes.put(b"flood", [b"%d" % n, bytes(9_998)])
        assert lanes.num_bytes <= 100_000
    lanes.put(b"b", [b"b's"])
    taken = [bytes(lanes.take()[0]) for _ in range(len(lanes))]
    assert taken == [b"b's", b"a's"]
    assert lost == [99_990, 100_000, 100_000]
    assert lanes.num_bytes == 0


def test_a_link_that_is_away_does_not_fill_the_relay() -> None:
    """Whoever sends most loses that, which is said; who waits beside it loses nothing."""
    with contextlib.closing(transport.bind("tcp://127.0.0.1:*", max_message_bytes=1 << 20)) as before:
        address = before.address
    said = list[str]()
    with Relay(
        address, "tcp://127.0.0.1:*", shelf_bytes=0, waiting_bytes=1_000_000, say=said.append
    ) as relay:
        serving = threading.Thread(target=relay.serve)
        serving.start()
        lanes = relay._up._lanes  # type: ignore[attr-defined]
        with (
            contextlib.closing(transport.connect(relay.address)) as flood,
            contextlib.closing(transport.connect(relay.address)) as other,
        ):
            flood.send([b"what the socket takes", bytes(100_000)])
            other.send([b"a contribution", bytes(100_000)])
            until(lambda: lanes.num_bytes > 90_000)
            for _ in range(149):
                flood.send([b"more", bytes(100_000)])
            flood.send([b"the last"])
            until(lambda: len(said) >= 149 // 10)
            with contextlib.closing(transport.bind(address, max_message_bytes=1 << 20)) as server:
                heard = [hear(server)[1][0]]
                while b"the last" not in heard or b"a contribution" not in heard:
                    heard.append(hear(server)[1][0])
        relay.stop()
        serving.join()
    assert len(heard) < 20
    assert "dropped, and it sends them again; let more wait (--queue)" in said[0]


def test_a_heartbeat_does_not_wait_for_others_contributions() -> None:
    """The link is down until all have sent: then one message of a worker is on its way already."""
    with contextlib.closing(transport.bind("tcp://127.0.0.1:*", max_message_bytes=1 << 20)) as before:
        address = before.address
    with Relay(address, "tcp://127.0.0.1:*", shelf_bytes=0) as relay:
        serving = threading.Thread(target=relay.serve)
        serving.start()
        with (
            contextlib.closing(transport.connect(relay.address)) as a,
            contextlib.closing(transport.connect(relay.address)) as b,
        ):
            for n in range(20):
                a.send([b"%d" % n, bytes(100_000)])
            until(lambda: len(relay._up._lanes) == 19)  # type: ignore[attr-defined]
            b.send([b"a heartbeat"])
            until(lambda: len(relay._up._lanes) == 20)  # type: ignore[attr-defined]
            with contextlib.closing(transport.bind(address, max_message_bytes=1 << 20)) as server:
                heard = [hear(server)[1][0] for _ in range(21)]
        relay.stop()
        serving.join()
    assert heard == [b"0", b"a heartbeat", *(b"%d" % n for n in range(1, 20))]


# The shelf and the envelopes


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60), st.integers(0, 40))
def test_two_shelves_of_one_size_hold_the_same(uses: Sequence[tuple[int, bool]], most_bytes: int) -> None:
    """Also where one of them held something before: of what the other holds nothing is missing."""
    fresh: Shelf[bool] = Shelf(most_bytes)
    old: Shelf[bytes] = Shelf(most_bytes)
    for n in range(20, 29):
        old.put(b"%d" % n, b"x" * (n % 7), n % 7)
    for n, drop in uses:
        name = b"%d" % n
        if drop:  # one lost it, and has told the other
            fresh.drop(name)
            old.drop(name)
        elif fresh.take(name):
            assert old.take(name) is not None
        else:
            fresh.put(name, True, n)
            old.put(name, b"x" * n, n)
        assert fresh.num_bytes <= most_bytes
        assert old.num_bytes <= most_bytes


def test_what_a_shelf_holds_is_bounded_in_number() -> None:
    shelf: Shelf[bool] = Shelf(1 << 40)
    for n in range(MOST_PIECES + 10):
        shelf.put(b"%d" % n, True, 1)
    assert (len(shelf), shelf.num_bytes) == (MOST_PIECES, MOST_PIECES)
    assert shelf.take(b"9") is None


@pytest.mark.parametrize(
    "said", [envelope.Passed(b"route", "alice", "10.0.0.7", 1 << 30), envelope.Missing((b"x" * 32,))]
)
def test_envelopes_are_read_as_they_were_written(said: envelope.FromRelay) -> None:
    frame = envelope.seal(said)
    assert envelope.is_sealed([frame])
    assert envelope.open_from_relay([memoryview(frame)]) == said
    with pytest.raises(WireError):
        envelope.open_from_server([frame])


@pytest.mark.parametrize("place", range(0, 30, 3))
def test_damaged_envelopes_are_refused(place: int) -> None:
    frame = bytearray(envelope.seal(envelope.Delivery(b"route", (b"", b"=" + b"d" * 32))))
    frame[place] ^= 4
    with pytest.raises(WireError):
        envelope.open_from_server([frame])


@given(st.binary(max_size=200))
def test_whatever_comes_is_an_envelope_or_refused(said: bytes) -> None:
    sealed = envelope.MAGIC + envelope.seal(envelope.Missing(()))[4:8] + said
    for frames in ([said], [envelope.MAGIC + said], [sealed]):
        for read in (envelope.open_from_relay, envelope.open_from_server):
            with contextlib.suppress(WireError):
                read(frames)


def test_a_message_of_the_protocol_is_no_envelope() -> None:
    frames = wire.encode(wire.Inquiry(schema=wire.SCHEMA), {"x": torch.zeros(1)})
    assert not envelope.is_sealed(frames)
    assert not envelope.is_sealed([])
    assert not envelope.is_sealed([b""])


def test_damage_between_server_and_relay_is_dropped_and_said() -> None:
    with contextlib.closing(transport.bind("tcp://127.0.0.1:*", max_message_bytes=1 << 20)) as server:
        with contextlib.closing(transport.connect(server.address)) as relay:
            for frames in ([envelope.MAGIC], [envelope.MAGIC + b"xxxxxxxx", b"hello"], [b"as a worker"]):
                relay.send(frames)
            assert hear(server)[1] == [b"as a worker"]
        assert len(server.notices()) == 2


def test_where_a_relay_says_that_a_worker_is_forges_no_line() -> None:
    """It is shown by `lte status`, and recorded."""
    said = "10.0.0.7\n10:00 alice left\x1b]0;title\x07\u202e"
    with contextlib.closing(transport.bind("tcp://127.0.0.1:*", max_message_bytes=1 << 20)) as server:
        with contextlib.closing(transport.connect(server.address)) as relay:
            relay.send([envelope.seal(envelope.Passed(b"route", "", said, 0)), b"hello"])
            hear(server)
            assert server.origin.isprintable()
            assert server.origin.startswith("10.0.0.7\N{REPLACEMENT CHARACTER}10:00 alice left")
            relay.send([envelope.MAGIC + envelope.seal(envelope.Missing(()))[4:8] + b"\x93\xa3\x1b[2J", b""])
            relay.send([b"as a worker"])
            hear(server)
        assert all(notice.isprintable() for notice in server.notices())


# Keys


class Ring:
    """Keys of a server, a relay, workers behind it, and lists."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = ("server", "relay", "alice", "bob", "mallory")
        self.pairs = {name: keys.create(folder / name) for name in names}
        self.allow("relay/site {relay} alice,site-*")
        self.write("site", "alice {alice}\nbob {bob}")

    def allow(self, text: str) -> None:
        self.write("allow", text)

    def write(self, name: str, text: str) -> None:
        """Replace a list at once."""
        new = self.folder / "new"
        new.write_text(text.format(**{name: pair.public for name, pair in self.pairs.items()}) + "\n")
        new.replace(self.folder / name)

    def site(self) -> Site:
        at_server = {"key": self.folder / "server.secret", "allow": self.folder / "allow"}
        at_relay = {"key": self.folder / "relay.secret", "server_key": self.folder / "server.public"}
        return Site(at_server=at_server, at_relay={**at_relay, "allow": self.folder / "site"})

    def files(self, name: str) -> dict[str, Path]:
        return {"key": self.folder / f"{name}.secret", "server_key": self.folder / "relay.public"}


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    return Ring(tmp_path)


def test_a_relay_speaks_for_the_workers_of_its_line_alone(ring: Ring) -> None:
    """Both are admitted by the relay's list. By the server's, bob is not of that site."""
    with contextlib.closing(ring.site()) as site:
        for name, sender in (("alice", "alice"), ("bob", "relay/site"), ("alice", "alice")):
            site.joined(**ring.files(name))
            assert (site.server.sender, site.server.key_owner) == (sender, "relay/site")
        ring.allow("relay/site {relay} alice,bob")
        site.joined(**ring.files("bob"))
        assert site.server.sender == "bob"
        ring.allow("alice {alice}")
        worker = site.connect(**ring.files("alice"))
        worker.send([b"hello"])
        assert site.server.receive(0.3) is None, "the relay's key was removed"


def test_a_stranger_is_not_let_in_by_the_relay(ring: Ring) -> None:
    with contextlib.closing(ring.site()) as site:
        stranger = site.connect(**ring.files("mallory"))
        stranger.send([b"let me in"])
        with pytest.raises(ConnectError, match="does not admit this key"):
            stranger.receive(WAIT_S)
        _, peer = site.joined(**ring.files("alice"))
        until(lambda: site.said)
        (line,) = site.said
        assert ring.pairs["mallory"].public in line
        assert peer


def test_a_relay_whose_key_is_not_listed_ends_with_one_line(ring: Ring) -> None:
    ring.allow("alice {alice}")
    with contextlib.closing(ring.site()) as site:
        until(lambda: site.fault)
        line = str(site.fault)
        assert ring.pairs["relay"].public in line
        assert "relay/NAME PUBLIC_KEY WORKER_ID" in line
        assert "\n" not in line


def test_a_workers_key_makes_no_relay(ring: Ring) -> None:
    """Whoever is behind it is that worker, or nobody."""
    ring.allow("carol {relay}")
    with contextlib.closing(ring.site()) as site:
        site.joined(**ring.files("alice"))
        assert site.server.sender == "carol"
        assert site.server.origin == "127.0.0.1", "where carol is, not where she says that others are"
        assert not site.server._shelves, "which are for relays"  # type: ignore[attr-defined]
        hello = wire.Hello(schema=wire.SCHEMA, worker_id="alice", session="s", model={}, heads=0)
        assert vouched(hello, site.server.sender) is None


def test_a_relay_is_no_worker_itself() -> None:
    for worker_id in ("", "alice", "relay/site"):
        hello = wire.Hello(schema=wire.SCHEMA, worker_id=worker_id, session="s", model={}, heads=0)
        assert vouched(hello, "relay/site") is None
    reason, cure = not_vouched("relay/site")
    assert "relay/site may not speak for it" in reason
    assert "allow-list" in cure
    inquiry = wire.Inquiry(schema=wire.SCHEMA)
    assert vouched(inquiry, "relay/site") is inquiry


@pytest.mark.parametrize(
    ("names", "worker_id", "may"),
    [
        ("alice,bob", "alice", True),
        ("alice,bob", "bob", True),
        ("alice,bob", "bobby", False),
        ("site-*", "site-7", True),
        ("site-*", "site-", True),
        ("site-*", "site", False),
        ("*", "anyone", True),
        ("*", "", False),
        ("*", "relay/other", False),
        ("*", "two words", False),
    ],
)
def test_whom_a_line_lets_a_relay_speak_for(ring: Ring, names: str, worker_id: str, may: bool) -> None:
    ring.allow(f"relay/site {{relay}} {names}   # a comment")
    allowed = AllowList(ring.folder / "allow", lambda line: None)
    assert allowed.worker_id(ring.pairs["relay"].public) == "relay/site"
    assert allowed.speaks_for("relay/site", worker_id) == may
    assert not allowed.speaks_for("relay/other", worker_id)
    assert not allowed.speaks_for("", worker_id)


@pytest.mark.parametrize(
    "line",
    [
        "relay/site {relay}",
        "relay/site {relay} # nobody",
        "relay/site {relay} alice bob",
        "relay/site {relay} alice,,bob",
        "relay/site {relay} al*ice",
        "relay/site {relay} relay/other",
        "relay/ {relay} alice",
        "relay/a/b {relay} alice",
        "relay/site alice",
        "alice {relay} bob",
    ],
)
def test_a_malformed_line_of_a_relay_is_one_line_of_complaint(ring: Ring, line: str) -> None:
    ring.allow(line)
    with pytest.raises(KeysError, match="line 1: ") as raised:
        AllowList(ring.folder / "allow", lambda said: None)
    assert "\n" not in str(raised.value)


# The command


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    with contextlib.closing(Family(tmp_path)) as opened:
        yield opened


def test_a_site_by_the_commands(family: Family, tmp_path: Path, shards: Path, ring: Ring) -> None:
    """alice is of this site; bob is not by the server's list, though by the relay's; mallory by none."""
    recipe = tmp_path / "recipe.yaml"
    settings = TINY | {
        "data.shards": str(shards),
        "train.rounds": 3,
        "train.workers": 1,
        "run.dir": str(tmp_path / "run"),
        "server.address": "tcp://127.0.0.1:*",
        "server.key": str(tmp_path / "server.secret"),
        "server.allow": str(tmp_path / "allow"),
    }
    recipe.write_text("")
    server = family.start("server", recipe, *(f"{name}={value}" for name, value in settings.items()))
    address = server.until_said(r"lte worker --server (tcp://\S+) --key")[1]
    listen = ("--listen", "tcp://127.0.0.1:*", "--allow", "site", "--key", "relay.secret")
    relay = family.start("relay", "--server", address, "--server-key", "server.public", *listen)
    at_site = relay.until_said(r"its workers: lte worker --server (tcp://\S+)")[1]
    to_relay = ("--server", at_site, "--server-key", "relay.public", "--key")
    refused = {
        "does not admit this key": family.start("worker", *to_relay, "mallory.secret"),
        "relay/site may not speak for it; have its name added": family.start(
            "worker", *to_relay, "bob.secret"
        ),
    }
    for says, worker in refused.items():
        assert worker.ended() == 2
        assert says in worker.err
        assert len(worker.err_lines) == 1
    asked = family.start("status", *to_relay, "alice.secret", "--json")
    assert asked.ended() == 0, asked.err
    assert json.loads(asked.out)["rounds"] == 3
    alice = family.start("worker", *to_relay, "alice.secret")
    assert (alice.ended(), server.ended()) == (0, 0)
    assert "alice joined" in alice.out
    assert done(tmp_path / "run")["rounds"] == 3
    relay.until_said(re.escape(ring.pairs["mallory"].public))
    relay.signal(signal.SIGTERM)
    assert relay.ended() == 128 + signal.SIGTERM
    gone = family.start("status", *to_relay, "alice.secret", "--wait", "1")
    assert gone.ended() == 2
    assert len(gone.err_lines) == 1


def test_mistakes_are_one_line(here: Callable[..., tuple[int, str, str]], ring: Ring) -> None:
    folder = ring.folder
    listen = ["--listen", "tcp://127.0.0.1:*"]
    server = ["--server", "tcp://127.0.0.1:1"]
    for arguments, says in [
        ([*server], "--listen"),
        ([*server, "--listen", "tcp://0.0.0.0:*"], "a relay's are --key, --server-key and --allow"),
        ([*server, "--listen", "nonsense"], "not an address"),
        (["--server", "tcp://*:5555", *listen], "* is for servers"),
        ([*server, *listen, "--allow", str(folder / "site")], "a relay with keys needs its own"),
        ([*server, *listen, "--key", str(folder / "relay.secret")], "give --key, --server-key and --allow"),
        ([*server, *listen, "--cache", "0"], "is not a number above 0"),
        ([*server, *listen, "--queue", "0"], "is not a number above 0"),
        ([*server, *listen, "--max-message-bytes", "1e6"], "is not a whole number"),
    ]:
        code, out, err = here("relay", *arguments)
        assert (code, out) == (2, "")
        assert says in err
        assert err.count("\n") == 1
        assert re.match("lte: ", err)
