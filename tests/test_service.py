"""Server and workers joined in one process, with faults by script: the master's bits tell."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import local
from lte import config, wire
from lte.config import Recipe
from lte.data import pack
from lte.track import METRICS, Records
from lte.transport import Frames, Peer
from lte.transport.inprocess import InprocessServer

NAMES = itertools.count()

Train = Callable[..., str]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("".join(f"{n} bottles of beer on the wall. " for n in range(700)))
    pack([folder / "text.txt"], folder / "shards", num_shards=2)
    return folder / "shards"


@pytest.fixture
def train(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    """Train a tiny recipe, changed by settings, with workers as threads; returns the master's digest."""

    def run(**settings: object) -> str:
        name = f"run-{next(NAMES)}"
        small = {
            "run.dir": str(tmp_path / name),
            "model.num_layers": 1,
            "model.width": 32,
            "model.num_attention_heads": 2,
            "model.mlp_width": 64,
            "model.context_tokens": 16,
            "data.shards": str(shards),
            "train.rounds": 5,
            "train.local_steps": 2,
            "train.workers": 2,
            "train.batch_size": 4,
            "lora.rank": 4,
            "schedule.warmup_steps": 2,
            "server.address": f"inprocess://{name}",
            "worker.heartbeat_s": 0.02,
        }
        assert local.train_in_threads(config.replace(Recipe(), **(small | settings))) == 0
        (done,) = [line for line in Records.read(tmp_path / name / METRICS) if line["kind"] == "done"]
        return str(done["master_digest"])

    return run


class Lossy:
    """Loses the first message of a kind to or from each connection, and nothing else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[wire.Message]) -> None:
        self.kind, self.lost = kind, set[Peer]()
        send, receive = InprocessServer.send, InprocessServer.receive

        def lossy_send(server: InprocessServer, peer: Peer, frames: Frames) -> None:
            if not self.loses(peer, frames):
                send(server, peer, frames)

        def lossy_receive(server: InprocessServer, timeout_s: float | None) -> tuple[Peer, Frames] | None:
            received = receive(server, timeout_s)
            return None if received is not None and self.loses(*received) else received

        monkeypatch.setattr(InprocessServer, "send", lossy_send)
        monkeypatch.setattr(InprocessServer, "receive", lossy_receive)

    def loses(self, peer: Peer, frames: Frames) -> bool:
        message, _ = wire.decode(frames)
        # On a living connection nothing of a welcome is lost; on a broken one Hello comes again.
        welcome = isinstance(message, wire.Update | wire.Part) and message.version == 0
        if isinstance(message, wire.Part) and message.worker_id:
            welcome = False
        if not isinstance(message, self.kind) or welcome or peer in self.lost:
            return False
        self.lost.add(peer)
        return True


@pytest.mark.parametrize("merge", ["reset-less", "reset-b", "reset"])
@pytest.mark.parametrize(
    "kind", [wire.Part, wire.Contribution, wire.Receipt, wire.Update, wire.Begin], ids=lambda k: k.__name__
)
def test_a_lost_message_changes_no_bit(
    train: Train, monkeypatch: pytest.MonkeyPatch, kind: type[wire.Message], merge: str
) -> None:
    """Nothing is merged twice and nothing is lost: the master is that of the undisturbed run."""
    settings = {"lora.merge": merge, "base.quant": "int8"}
    undisturbed = train(**settings)
    lossy = Lossy(monkeypatch, kind)
    assert train(**settings) == undisturbed
    assert len(lossy.lost) == 2, "each worker's connection lost one"


def test_an_evaluation_longer_than_the_silence_costs_no_worker(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What has come is heard before anybody is called silent. The clock jumps at each evaluation."""
    from lte.server.service import Server

    undisturbed = train(**{"eval.every": 1})
    ahead_s = 0.0
    measure, now = Server._measure, Server._now_s

    def slow(server: Server, max_tokens: int) -> tuple[float | None, float | None]:
        nonlocal ahead_s
        measured = measure(server, max_tokens)
        if not server.finished:
            while server._endpoint.inbox.qsize() < 4:  # type: ignore[attr-defined]
                pass  # until signs of life of both workers wait
            ahead_s += 1000.0
        return measured

    monkeypatch.setattr(Server, "_measure", slow)
    monkeypatch.setattr(Server, "_now_s", lambda server: now(server) + ahead_s)
    settings = {"eval.every": 1, "server.deadline_s": 1e9, "server.grace_s": 1e9, "train.rounds": 5}
    assert train(**settings) == undisturbed


@pytest.mark.parametrize(
    "settings",
    [
        {"model.tie_embeddings": True},
        {"lora.A": "rotating", "lora.moments": "transport", "lora.rotate_every": 2},
        {"lora.A": "frozen", "lora.subspace": "disjoint", "lora.merge": "reset-less"},
        {"lora.heads": 2, "lora.init": "xavier", "outer.weights": "tokens"},
        {"lora.modules": [], "train.workers": 1},
        {"outer.name": "sgd", "outer.momentum": 0.5, "outer.dense": True, "outer.weight_decay": 0.1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_train_and_repeat(train: Train, settings: dict[str, object]) -> None:
    assert train(**settings) == train(**settings)
    assert train(**settings) != train(**settings, **{"run.seed": 1})


def test_no_round_waits_for_a_heartbeat(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Undisturbed, every word comes once: with heartbeats an hour apart a run ends all the same."""
    updates = 0
    send = InprocessServer.send

    def counting(server: InprocessServer, peer: Peer, frames: Frames) -> None:
        nonlocal updates
        message, _ = wire.decode(frames)
        updates += isinstance(message, wire.Update) and message.since is not None
        send(server, peer, frames)

    monkeypatch.setattr(InprocessServer, "send", counting)
    train(**{"worker.heartbeat_s": 3600.0, "server.silence_s": 20000.0, "train.rounds": 30})
    assert updates == 30 * 2, "an update goes to each worker once"
