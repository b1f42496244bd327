"""Random and mutated frames against the codec and a living server: it neither crashes, hangs nor grows.

    python benchmarks/fuzz.py [--frames 120000] [--seed 0] [--only codec strangers floods members keys]

    codec       frames of whole contributions, in this process, through lte.wire to the master's decoders
    strangers   whoever speaks in nobody's name, repeats what was recorded, or sends what is no message
    floods      ever new workers join, and leave or fall silent
    members     workers that were welcomed send contributions with mutated bytes and messages with mutated
                fields, in the honest workers' names, too
    keys        a server with keys; one who has a key sends all of the above, in every name but its own

In the last four two honest workers train over real sockets meanwhile. Strangers, floods and those with
another's key must not change a bit of the master: its digest is that of an undisturbed run. A member may
(what it sends may be valid, and without keys anyone may be anyone): there the run folder must hold what
the journal says. Everywhere the server's memory must stay below a bound that is printed, it must answer,
its records must stay small, and it must end when it is told to.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zmq
from mutations import Frames, Mutations, kind_of, renamed
from runs import header, packed_bottles, row
from torch import nn
from watched import Watched

from launch import local
from lte import config, quantize, recipes, wire
from lte.compress import DENSE, blockwise, changes, factors
from lte.config import Recipe
from lte.errors import WireError
from lte.server import folder, recovery
from lte.server.master import Master
from lte.track import METRICS, Records
from lte.transport import keys
from lte.transport.inprocess import InprocessServer

HONEST = ("w0", "w1")
RANK = 4
MAX_WORKERS = 64
ROUNDS = 12
MAX_MESSAGE_BYTES = 2 << 20
SETTINGS: dict[str, Any] = {
    "model.num_layers": 1,
    "model.width": 32,
    "model.num_attention_heads": 2,
    "model.mlp_width": 64,
    "model.context_tokens": 16,
    "base.quant": "int8",
    "lora.rank": RANK,
    "lora.merge": "reset-less",
    "train.rounds": ROUNDS,
    "train.local_steps": 2,
    "train.workers": len(HONEST),
    "train.batch_size": 4,
    "schedule.warmup_steps": 2,
    "compress.part_bytes": 16384,
    "server.quorum": len(HONEST),
    "server.grace_s": 600.0,
    "server.deadline_s": 600.0,
    "server.max_workers": MAX_WORKERS,
    "server.max_message_bytes": MAX_MESSAGE_BYTES,
    "server.silence_s": 10.0,
    "server.checkpoint_every": 4,
    "worker.heartbeat_s": 0.1,
    "eval.every": 0,
    "eval.final_tokens": 64,
    "eval.sample_tokens": 0,
}
ANSWERS_WITHIN_S = 20.0
"""For each probe during an attack; the cores are shared with the attack, the workers and other jobs."""
ENDS_WITHIN_S = 120.0
RECORDS_BYTES = 1 << 20
"""metrics.jsonl of a run under attack may have this much."""
WAITING = 1024
"""Messages of a connection that the server takes before it hears them (`transport.zmq`)."""
SLACK_BYTES = 64 << 20
"""What allocators keep, and a header of the largest size takes while it is read."""


# The codec, in this process


@dataclass
class Target:
    """A master and the frames of one contribution to it, in one part."""

    master: Master
    frames: Frames
    is_known: bool

    def take(self, frames: Sequence[bytes]) -> str:
        """All that a server does with a part, and with what closes it. Returns how far it came."""
        try:
            message, entries = wire.decode(frames)
            if not isinstance(message, wire.Part):
                wire.tensors(frames, entries)
                return "a message"
            assembly = wire.Assembly(message.stream, message.version, self.master.max_contribution(1, RANK))
            assembly.add(message, frames, entries)
            blobs = assembly.close(1)
            if blobs is None:
                return "a message"
            self.master.decode(blobs, HONEST[0] if self.is_known else "", 1, RANK)
        except WireError:
            return "refused"
        return "a contribution"


CODECS: list[dict[str, Any]] = [
    {"compress.factors": factors_, "compress.dense": dense, "compress.truncate_rank": rank}
    for factors_, dense, rank in [
        ("fp32", "fp32", None),
        ("bf16", "bf16", None),
        ("int8", "int8", None),
        ("int4", "int8", None),
        ("int2", "int4", None),
        ("int8", "int2", 2),
        ("fp32", "int8", 2),
    ]
]


def target(settings: Mapping[str, Any], *, is_known: bool) -> Target:
    """A small model's contribution, as a worker encodes it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(300, 24), nn.Linear(24, 40), nn.Linear(40, 20))
    recipe = config.replace(Recipe(), **{"lora.rank": RANK, "base.quant": "int8", "lora.merge": "reset-less"})
    master = Master(model, config.replace(recipe, **settings))
    blobs = {}
    for name, spec in master.plan.adapted.items():
        for ending, shape in (
            (factors.A, (1, spec.rank, spec.shape[1])),
            (factors.B, (1, spec.shape[0], spec.rank)),
        ):
            codec = factors.codec_of(name + ending, master.recipe, is_known=is_known)
            blobs[name + ending], _ = factors.encode(torch.randn(shape), *codec)
            if is_known:
                master.merged.setdefault(HONEST[0], {})[name + ending] = torch.randn(shape)
    for name, shape in master.plan.dense.items():
        change = torch.randn(shape)
        change[len(change) // 4 :] = 0  # rows of tokens that were not met
        blobs[name + DENSE], _ = blockwise.encode_rows(change, master.recipe.compress.dense)
    part = wire.Part(generation=1, worker_id=HONEST[0], incarnation=1, version=0, stream=1, index=0)
    ((frames, _),) = wire.in_parts(iter(blobs.items()), 1 << 20, lambda index: part)
    return Target(master, [bytes(frame) for frame in frames], is_known)


def fuzz_codec(num_frames: int, chance: random.Random) -> Counter[tuple[str, str]]:
    """Mutated contributions of every codec. Returns how far the frames of each kind came.

    Raises:
        Exception: whatever the codec raises beside WireError: a bug.
    """
    targets = [target(settings, is_known=known) for settings in CODECS for known in (False, True)]
    plain = [[bytes(f) for f in wire.encode(message)] for message in ordinary()]
    makers = [Mutations([each.frames, *plain], chance) for each in targets]
    counts: Counter[tuple[str, str]] = Counter()
    kinds = list(makers[0].kinds)
    for n in range(num_frames):
        which = n % len(targets)
        # Most bytes of a contribution are looked at by the decoders alone.
        kind = "blobs mutated" if chance.randrange(2) else chance.choice(kinds)
        counts[kind, targets[which].take(makers[which].make(kind))] += 1
    return counts


def fuzz_changes(num_changes: int, chance: random.Random) -> Counter[str]:
    """Mutated changes of bases, which a worker takes from its server and a server from its own past."""
    counts: Counter[str] = Counter()
    pairs = []
    for quant in ("nf4", "int8", "none"):
        for share in (0.0, 0.01, 0.5):
            old = torch.randn(40, 52)
            new = old + torch.randn(40, 52) * (torch.rand(40, 52) < share)
            base = quantize.quantize(old, quant)
            after = quantize.requantize(new, base)
            pairs += [(base, changes.encode(base, after)), (base, changes.full(after))]
    for _ in range(num_changes):
        base, change = chance.choice(pairs)
        blobs = [bytearray(blob.numpy().tobytes()) for blob in (change.codes, change.scales)]
        for blob in blobs:
            fate = chance.randrange(4)
            if fate == 0 and blob:
                blob[chance.randrange(min(len(blob), 10))] = chance.randrange(256)
            elif fate == 1 and blob:
                blob[chance.randrange(len(blob))] ^= 1 << chance.randrange(8)
            elif fate == 2:
                del blob[chance.randrange(len(blob) + 1) :]
            else:
                blob += chance.randbytes(chance.choice([0, 1, 100]))
        codes, scales = (
            torch.frombuffer(blob or bytearray(1), dtype=torch.uint8)[: len(blob)] for blob in blobs
        )
        try:
            changes.apply(base, codes, scales)
            counts["taken"] += 1
        except WireError:
            counts["refused"] += 1
    return counts


def ordinary() -> Iterator[wire.AnyMessage]:
    """Messages without tensors that a worker sends."""
    named: dict[str, Any] = {"generation": 1, "worker_id": "w0", "incarnation": 1}
    yield wire.Hello(schema=wire.SCHEMA, worker_id="w0", session="5e55", model={"a": "dense 3x4"}, heads=1)
    yield wire.Heartbeat(**named, number=7, version=3, local_step=9)
    yield wire.Behind(**named, version=2)
    yield wire.Recall(**named)
    yield wire.Leave(**named, reason="finished")
    yield wire.Contribution(
        **named,
        version=3,
        stream=1,
        parts=2,
        draw=0,
        tokens=4096,
        loss=1.5,
        lost=0.01,
        step_s=0.5,
        encode_s=0.1,
        apply_s=0.1,
        base_digest="d1",
        merged_digest="d2",
        given_digest="",
    )


# An undisturbed run, recorded


@dataclass(frozen=True)
class Recorded:
    """What honest workers sent in an undisturbed run, and what it came to."""

    frames: list[Frames]
    digest: str


def record(settings: Mapping[str, Any], run: Path) -> Recorded:
    """Train in threads of this process: the bits are those of processes and sockets."""
    frames: list[Frames] = []
    receive = InprocessServer.receive

    def recording(server: InprocessServer, timeout_s: float | None) -> Any:
        if received := receive(server, timeout_s):
            frames.append([bytes(frame) for frame in received[1]])
        return received

    own = {"run.dir": str(run), "server.address": f"inprocess://{run}"}
    InprocessServer.receive = recording  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            assert local.train_in_threads(config.replace(Recipe(), **(dict(settings) | own))) == 0
    finally:
        InprocessServer.receive = receive  # type: ignore[method-assign]
    # Incarnations as of workers that join in the order of their names.
    named = [
        renamed(each, incarnation=1 + HONEST.index(worker_id))
        if (worker_id := getattr(wire.decode(each)[0], "worker_id", "")) and kind_of(each) != "Hello"
        else each
        for each in frames
    ]
    return Recorded(named, str(Records.read(run / METRICS)[-1]["master_digest"]))


# Attacks


class Attacker:
    """A connection to a server that sends what it likes, and one that asks whether the server answers."""

    def __init__(self, address: str, key: tuple[keys.KeyPair, str] | None = None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._key = key
        self._socket, self._probe = self._connected(address), self._connected(address)
        self._last = deque[int](maxlen=WAITING)
        self.num_sent, self.waiting_bytes = 0, 0
        self.answers_s: list[float] = []
        self.heard = deque[wire.AnyMessage](maxlen=10_000)
        self.published = 0

    def _connected(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDTIMEO, int(ANSWERS_WITHIN_S * 1000))
        if self._key:
            pair, servers = self._key
            socket.setsockopt_string(zmq.CURVE_SECRETKEY, pair.secret)
            socket.setsockopt_string(zmq.CURVE_PUBLICKEY, pair.public)
            socket.setsockopt_string(zmq.CURVE_SERVERKEY, servers)
        socket.connect(address)
        return socket

    def send(self, frames: Frames) -> None:
        """Send; waits while the server does not take more, and fails if that lasts."""
        self._socket.send_multipart(frames)
        self.num_sent += 1
        size = sum(map(len, frames)) + 256 * (1 + len(frames))
        self._last.append(size)
        if size <= MAX_MESSAGE_BYTES:
            self.waiting_bytes = max(self.waiting_bytes, sum(self._last) if self.num_sent % 64 == 0 else 0)
        self._hear()

    def _hear(self) -> None:
        while self._socket.poll(0):
            message, _ = wire.decode(self._socket.recv_multipart())
            self.heard.append(message)
            if isinstance(message, wire.Pulse):
                self.published = max(self.published, message.version)

    def ask(self) -> None:
        """See that the server answers somebody else, and how soon."""
        hello = wire.Hello(schema="another", worker_id="", session="probe", model={}, heads=0)
        began_s = time.monotonic()
        self._probe.send_multipart([bytes(frame) for frame in wire.encode(hello)])
        assert self._probe.poll(int(ANSWERS_WITHIN_S * 1000)), f"no answer within {ANSWERS_WITHIN_S:g} s"
        self._probe.recv_multipart()
        self.answers_s.append(time.monotonic() - began_s)

    def close(self) -> None:
        self._socket.close()
        self._probe.close()
        self._context.term()


def message_of(frames: Frames) -> wire.AnyMessage | None:
    """What a server would read, or None."""
    try:
        return wire.decode(frames)[0]
    except WireError:
        return None


def harmless(frames: Frames, published: int | None) -> Frames:
    """The same, unless it would have an effect by right: to join, or to speak as an honest worker.

    Args:
        published: of a repeated message, the version that the server has published; None of others. What
            an honest worker has said to an earlier version may be repeated. To say first what it is about
            to say, as another run's recording could, is to speak as it.
    """
    message = message_of(frames)
    if isinstance(message, wire.Hello):
        return renamed(frames, schema="another")
    worker_id = getattr(message, "worker_id", "")
    is_early = isinstance(message, wire.Part | wire.Contribution) and message.version >= (published or 0)
    if worker_id in HONEST and (published is None or is_early or isinstance(message, wire.Leave)):
        return renamed(frames, worker_id="stranger")
    return frames


def strangers(attacker: Attacker, recorded: Recorded, chance: random.Random) -> Iterator[str]:
    """Send one message after another; yields their kinds."""
    mutations = Mutations(recorded.frames, chance)
    kinds = list(mutations.kinds)
    while True:
        kind = chance.choice(kinds)
        if not chance.randrange(2_000):
            attacker.send([bytes(64 << 20)])
            yield "64 MiB"
        if not chance.randrange(100):
            for frames in chance.sample(recorded.frames, 8):
                attacker.send(harmless(frames, attacker.published))
                yield "reordered"
        attacker.send(harmless(mutations.make(kind), attacker.published if kind == "replayed" else None))
        yield kind


def impostors(attacker: Attacker, recorded: Recorded, chance: random.Random) -> Iterator[str]:
    """All of it, in whatever name: a server with keys takes none of it."""
    mutations = Mutations(recorded.frames, chance)
    kinds = list(mutations.kinds)
    while True:
        kind = chance.choice(kinds)
        attacker.send(mutations.make(kind))
        yield kind


def floods(attacker: Attacker, recorded: Recorded, chance: random.Random) -> Iterator[str]:
    """Ever new workers; some leave at once, some come again as another process, the rest is silent."""
    n = 0
    while True:
        n += 1
        name = chance.choice([f"flood-{n}", "", "flood"])
        hello = wire.Hello(schema=wire.SCHEMA, worker_id=name, session=f"{n:x}", model={}, heads=0)
        attacker.send([bytes(frame) for frame in wire.encode(hello)])
        yield "Hello floods"
        while attacker.heard:
            welcome = attacker.heard.popleft()
            if isinstance(welcome, wire.Welcome) and chance.randrange(2):
                gone = wire.Leave(
                    generation=welcome.generation,
                    worker_id=welcome.worker_id,
                    incarnation=welcome.incarnation,
                    reason="x" * chance.choice([0, 1000]),
                )
                attacker.send([bytes(frame) for frame in wire.encode(gone)])
                yield "Leaves"


class Member:
    """A worker that was welcomed, and what it knows of the run."""

    def __init__(self, attacker: Attacker, name: str) -> None:
        self._attacker, self.name = attacker, name
        self.own: dict[str, Any] = {}  # what names it in a message, once it was welcomed
        self.version = self.stream = 0
        self.base_digest = ""
        hello = wire.Hello(schema=wire.SCHEMA, worker_id=name, session=name, model={}, heads=0)
        attacker.send([bytes(frame) for frame in wire.encode(hello)])

    def look(self) -> None:
        """Take in what the server said."""
        while self._attacker.heard:
            message = self._attacker.heard.popleft()
            if isinstance(message, wire.Welcome) and message.worker_id == self.name:
                self.own = {
                    "worker_id": self.name,
                    "incarnation": message.incarnation,
                    "generation": message.generation,
                }
            elif isinstance(message, wire.Update):
                self.version, self.base_digest = message.version, message.base_digest


def members(attacker: Attacker, recorded: Recorded, chance: random.Random) -> Iterator[str]:
    """Contributions of a member with mutated bytes under a message that is right, and mutated messages in
    its own and in honest names."""
    mutations = Mutations(recorded.frames, chance)
    kinds = [kind for kind in mutations.kinds if kind != "replayed"]
    groups = _contributions(recorded)
    nothing = quantize.digest([])
    count = 0
    while True:
        count += 1
        member = Member(attacker, f"m{count}")
        yield "Hello"
        for _ in range(400):
            member.look()
            if not member.own:
                heartbeat = wire.Heartbeat(
                    generation=1, number=1, worker_id=member.name, incarnation=0, version=0, local_step=1
                )
                attacker.send([bytes(frame) for frame in wire.encode(heartbeat)])
                yield "fields mutated"
                attacker.ask()  # by then it is welcomed, or refused
                continue
            if chance.randrange(3):
                member.stream += 1
                own = member.own | {"version": member.version, "stream": member.stream}
                digests = {"base_digest": member.base_digest, "merged_digest": nothing}
                for frames in chance.choice(groups):
                    if len(frames) == 2:
                        frames = mutations.blob(frames) if chance.randrange(3) else frames
                        attacker.send(renamed(frames, **own))
                        yield "blobs mutated"
                    else:
                        extreme = {"parts": 2**50} if not chance.randrange(20) else {}
                        if not chance.randrange(20):
                            extreme["tokens"] = 2**64 - 1
                        attacker.send(renamed(frames, **own, **digests, draw=0, **extreme))
                        yield "Contributions of members"
            else:
                kind = chance.choice(kinds)
                frames = mutations.make(kind)
                if chance.randrange(2) and message_of(frames) is not None:
                    frames = renamed(frames, **member.own)
                attacker.send(frames)
                yield kind


def _contributions(recorded: Recorded) -> list[list[Frames]]:
    """Parts and what closes them, of each contribution of the first honest worker."""
    groups: dict[int, list[Frames]] = {}
    for frames in recorded.frames:
        message = message_of(frames)
        if isinstance(message, wire.Part | wire.Contribution) and message.worker_id == HONEST[0]:
            groups.setdefault(message.stream, []).append(frames)
    return [group for group in groups.values() if len(group[-1]) == 1]


# A living server under attack


@dataclass
class Outcome:
    """What an episode came to. `faults` must be empty."""

    frames: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    rounds: int = 0
    answers_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    waiting_bytes: int = 0
    records_bytes: int = 0
    digest: str = ""
    faults: list[str] = field(default_factory=list)


Attack = Callable[[Attacker, Recorded, random.Random], Iterator[str]]


class Episode:
    """One run by real processes, from its start to its end, and an attack on it meanwhile."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, with_keys: bool = False) -> None:
        self.folder, self.run = folder, folder / "run"
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text("")
        self.settings = dict(settings) | {"run.dir": str(self.run), "server.address": "tcp://127.0.0.1:*"}
        self._with_keys = with_keys
        self.key: tuple[keys.KeyPair, str] | None = None
        if with_keys:
            for name in ("server", "mallory", *HONEST):
                keys.create(folder / name)
            public = {
                name: keys.load_public(folder / f"{name}.public") for name in ("server", "mallory", *HONEST)
            }
            lines = [f"{name} {public[name]}" for name in ("mallory", *HONEST)]
            (folder / "allow").write_text("\n".join(lines) + "\n")
            self.settings |= {
                "server.key": str(folder / "server.secret"),
                "server.allow": str(folder / "allow"),
            }
            self.key = keys.load_secret(folder / "mallory.secret"), public["server"]

    def go(
        self, attack: Attack | None, recorded: Recorded, num_frames: int, chance: random.Random
    ) -> Outcome:
        """Run it. With an attack, until so many messages are sent or the run is finished."""
        outcome = Outcome()
        reading, writing = os.pipe()
        overrides = [f"{key}={value}" for key, value in self.settings.items()]
        command = ["server", str(self.folder / "recipe.yaml"), *overrides, "--announce", str(writing)]
        server = self._start(command, "server", pass_fds=(writing,))
        os.close(writing)
        with os.fdopen(reading) as announced:
            address = announced.readline().strip()
        assert address, self._said("server")
        watched = Watched(server.pid)
        workers: dict[str, subprocess.Popen[bytes]] = {}
        attacker = Attacker(address, self.key) if attack else None
        began_s = time.monotonic()
        try:
            sending = attack(attacker, recorded, chance) if attack and attacker else iter(())
            ends_s = began_s + ENDS_WITHIN_S + num_frames / 100
            while server.poll() is None and time.monotonic() < ends_s:
                self._supervise(workers, address)
                if attack in (members, floods) and not self._has_joined(HONEST[1]):
                    time.sleep(0.1)  # the first round is of the honest
                elif attacker and attacker.num_sent < num_frames:
                    for _ in range(200):
                        outcome.frames[next(sending)] += 1
                    attacker.ask()
                elif attack is members:  # which may have spoilt the run for the honest
                    server.send_signal(signal.SIGTERM)
                    server.wait(ENDS_WITHIN_S)
                else:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        server.wait(0.1)
        except (AssertionError, zmq.ZMQError, subprocess.TimeoutExpired) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may be about to end
                server.wait(ENDS_WITHIN_S)
            if server.returncode != 0:
                outcome.faults.append(f"{error}; the server's exit code is {server.poll()}")
        finally:
            outcome.seconds = time.monotonic() - began_s
            watched.close()
            if attacker:
                attacker.close()
                outcome.answers_s, outcome.waiting_bytes = attacker.answers_s, attacker.waiting_bytes
            if server.poll() is None:
                outcome.faults.append("the server did not end by itself")
                server.kill()
            server.wait()
            for worker in workers.values():
                worker.kill()
                worker.wait()
        outcome.peak_bytes = watched.peak_bytes
        self._look(server.returncode, outcome)
        return outcome

    def _supervise(self, workers: dict[str, subprocess.Popen[bytes]], address: str) -> None:
        """Start the honest workers one after another, and again what the attack made end."""
        for name in HONEST:
            worker = workers.get(name)
            if worker is not None and worker.poll() is None:
                continue
            if name != HONEST[0] and not self._has_joined(HONEST[0]):
                break
            own = [
                "--key",
                f"{self.folder / name}.secret",
                "--server-key",
                f"{self.folder / 'server'}.public",
            ]
            command = [
                "worker",
                "--server",
                address,
                "--id",
                name,
                "--state",
                str(self.folder / f"{name}.state"),
            ]
            workers[name] = self._start([*command, *(own if self._with_keys else [])], name)

    def _has_joined(self, name: str) -> bool:
        lines = Records.read(self.run / METRICS)
        return any(line.get("what") == "joined" and line.get("worker_id") == name for line in lines)

    def _start(self, command: Sequence[str], name: str, **options: Any) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "lte", *command],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                **options,
            )

    def _said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]

    def _look(self, code: int, outcome: Outcome) -> None:
        """What the run's folder holds."""
        lines = Records.read(self.run / METRICS)
        outcome.records_bytes = (self.run / METRICS).stat().st_size
        outcome.rounds = sum(line["kind"] == "round" for line in lines)
        if "Traceback" in self._said("server") or code not in (0, 128 + signal.SIGTERM):
            outcome.faults.append(f"the server ended with {code}: {self._said('server')[-600:]}")
            return
        outcome.digest = str(lines[-1].get("master_digest", ""))
        # The folder is what a next server goes on from: the checkpoint and the journal agree.
        recipe = config.load(self.run / "config.yaml")
        master = Master(recipes.initial_model(recipe), recipe)
        found = recovery.recover(self.run, master)
        outcome.faults += found.faults
        if outcome.digest and found.progress.master_digest != outcome.digest:
            outcome.faults.append("another master is recovered than the run ended with")
        folder.next_generation(self.run)


SCENARIOS: dict[str, tuple[Attack, dict[str, Any], bool]] = {
    "strangers": (strangers, {}, False),
    # Nobody waits for those who joined and are silent longer than this, and none of them is missed.
    "floods": (floods, {"server.silence_s": 5.0, "train.rounds": 4}, False),
    "members": (members, {"lora.merge": "reset", "server.grace_s": 0.2, "server.silence_s": 5.0}, False),
    "keys": (impostors, {}, True),
}


def live(name: str, num_frames: int, chance: random.Random, folder: Path, shards: Path) -> list[str]:
    """Episodes of a scenario until so many frames were sent. Prints a row; returns the faults."""
    attack, own, with_keys = SCENARIOS[name]
    settings = SETTINGS | {"data.shards": str(shards)} | own
    recorded = record(settings, folder / f"{name}-recorded")
    calm = Episode(folder / f"{name}-calm", settings, with_keys=with_keys).go(None, recorded, 0, chance)
    faults = calm.faults
    if calm.digest != recorded.digest:
        faults.append("two undisturbed runs differ")
    episodes: list[Outcome] = []
    sent = 0
    while sent < num_frames and not faults:
        episode = Episode(folder / f"{name}-{len(episodes)}", settings, with_keys=with_keys)
        outcome = episode.go(attack, recorded, num_frames - sent, chance)
        episodes.append(outcome)
        sent += outcome.frames.total()
        faults += outcome.faults
        if name != "members" and outcome.digest != recorded.digest:
            faults.append(f"the master is {outcome.digest or 'not there'}, undisturbed {recorded.digest}")
        if outcome.records_bytes > RECORDS_BYTES:
            faults.append(f"{outcome.records_bytes:,} bytes of records")
    recipe = config.replace(Recipe(), **settings)
    master = Master(recipes.initial_model(recipe), recipe)
    staged = 2 * sum(master.max_contribution(1, RANK).values())
    whole = sum(blob.numel() for blob in master.snapshot().values())
    waiting = max((each.waiting_bytes for each in episodes), default=0)
    # What a calm server takes; what waits to be heard; of each worker what it has staged, and of each that
    # may join at once, twice as many, the model on its way.
    bound = calm.peak_bytes + waiting + MAX_WORKERS * (staged + 2 * whole) + SLACK_BYTES
    peak = max((each.peak_bytes for each in episodes), default=0)
    if peak > bound:
        faults.append(f"{peak / 1e6:.0f} MB of memory, more than {bound / 1e6:.0f}")
    answers = sorted(seconds for each in episodes for seconds in each.answers_s) or [0.0]
    digests = {each.digest == recorded.digest for each in episodes}
    seconds = sum(each.seconds for each in episodes)
    row(
        [
            name,
            f"{sent:,}",
            len(episodes),
            sum(each.rounds for each in episodes),
            f"{sent / max(seconds, 1e-9):,.0f}",
            f"{answers[len(answers) // 2] * 1e3:.0f} / {answers[-1] * 1e3:.0f}",
            f"{calm.peak_bytes / 1e6:.0f} / {peak / 1e6:.0f} / {bound / 1e6:.0f}",
            f"{max((each.records_bytes for each in episodes), default=0) / 1e3:.0f}",
            "may differ" if name == "members" else "the same" if digests == {True} else "ANOTHER",
            "; ".join(faults) or "none",
        ]
    )
    by_kind = sum((each.frames for each in episodes), Counter[str]())
    print("   " + ", ".join(f"{kind} {count:,}" for kind, count in by_kind.most_common()), file=sys.stderr)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the codec and a living server.")
    parser.add_argument("--frames", type=int, default=120_000, help="for the codec and for the server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=["codec", *SCENARIOS], default=["codec", *SCENARIOS])
    parser.add_argument("--keep", type=Path, help="folder for the runs; else they are deleted")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    faults = []
    if "codec" in arguments.only:
        began_s = time.monotonic()
        counts = fuzz_codec(arguments.frames, random.Random(arguments.seed))
        changed = fuzz_changes(arguments.frames // 10, random.Random(arguments.seed))
        header(["frames for the codec", "refused", "messages", "contributions"])
        for kind in sorted({kind for kind, _ in counts}):
            row([kind, *(f"{counts[kind, end]:,}" for end in ("refused", "a message", "a contribution"))])
        row(["changes of bases", changed["refused"], "", changed["taken"]])
        print(f"\n{arguments.frames / (time.monotonic() - began_s):,.0f} frames a second\n")
    with contextlib.ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        shards = packed_bottles(folder)
        shares = {"strangers": 0.5, "floods": 0.1, "members": 0.2, "keys": 0.2}
        names = [name for name in SCENARIOS if name in arguments.only]
        if names:
            header(
                [
                    "server",
                    "frames",
                    "runs",
                    "rounds",
                    "frames/s",
                    "answers: median / worst ms",
                    "memory: undisturbed / attacked / bound MB",
                    "records kB",
                    "master",
                    "faults",
                ]
            )
        for name in names:
            share = shares[name] if len(names) > 1 else 1.0
            seeded = random.Random(f"{arguments.seed} {name}")
            faults += live(name, int(arguments.frames * share), seeded, folder, shards)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
