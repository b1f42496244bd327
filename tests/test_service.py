"""Server and workers joined in one process, with faults by script: the master's bits tell."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import nn

from launch import local
from lte import cli, config, recipes, wire
from lte.config import Recipe
from lte.errors import RefusedError, RunError
from lte.server import checkpoint, recovery, rounds
from lte.server.evaluation import Measured
from lte.server.intake import Intake
from lte.server.master import Master
from lte.server.service import Server
from lte.tasks import Text
from lte.track import METRICS, Records
from lte.transport import Frames, Peer
from lte.transport.inprocess import InprocessServer

NAMES = itertools.count()
KINDS = {"uplink": {"factors", "dense"}, "downlink": {"dense", "codes", "scales"}}

Train = Callable[..., str]


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


@pytest.mark.parametrize("evaluate", ["loss alone", "and more"])
def test_what_an_evaluation_finds_beside_the_loss_is_recorded_of_both_weights(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, evaluate: str
) -> None:
    def measured(task: Text, model: nn.Module, max_tokens: int) -> Measured | float:
        size = float(sum(parameter.abs().sum() for parameter in model.parameters()))
        return Measured(2.0, {"size": size}) if evaluate == "and more" else 2.0

    monkeypatch.setattr(Text, "evaluate", measured)
    train(**{"eval.every": 5})
    (line,) = [line for line in Records.read(next(tmp_path.glob("*")) / METRICS) if line["kind"] == "eval"]
    assert line["loss"] == line["loss_master"] == 2.0
    if evaluate == "and more":
        assert line["size"] != line["size_master"], "each is of its own weights"
    else:
        assert "size" not in line


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


@pytest.mark.parametrize("merge", ["reset-less", "reset-b", "reset"])
@pytest.mark.parametrize(
    "kind", [wire.Part, wire.Contribution, wire.Receipt, wire.Update, wire.Begin], ids=lambda k: k.__name__
)
def test_a_lost_message_costs_an_arrival_nothing(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: type[wire.Message], merge: str
) -> None:
    """Every contribution is merged once, and no worker believes otherwise of its own."""
    lossy = Lossy(monkeypatch, kind)
    digest = train(**{"outer.when": "arrival", "lora.merge": merge, "base.quant": "int8"})
    assert len(lossy.lost) == 2, "each worker's connection lost one"
    (run,) = tmp_path.glob("run-*")
    lines = Records.read(run / METRICS)
    assert not [line for line in lines if line.get("what") in ("refused", "recalled")]
    rounds_of = [line for line in lines if line["kind"] == "round"]
    assert [line["version"] for line in rounds_of] == list(range(1, len(rounds_of) + 1))
    assert rounds_of[-1]["contributions"] == sum(line["num_merged"] for line in rounds_of) >= 10
    shutil.rmtree(checkpoint.newest(run))
    recipe = config.load(run / "config.yaml")
    master = Master(recipes.initial_model(recipe), recipe)
    assert recovery.recover(run, master).faults == []
    assert master.master_digest() == digest


def test_on_arrival_nobody_asks_for_what_others_made(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Versions that others are told of are no news for who has yet to be answered."""
    asked = list[str]()
    bring_up = Server._bring_up

    def noted(server: Server, peer: Peer, worker_id: str, version: int) -> None:
        asked.append(worker_id)
        bring_up(server, peer, worker_id, version)

    monkeypatch.setattr(Server, "_bring_up", noted)
    train(**{"outer.when": "arrival", "train.workers": 3, "train.rounds": 10, "worker.heartbeat_s": 0.001})
    assert asked == []
    (run,) = tmp_path.glob("run-*")
    lines = Records.read(run / METRICS)
    assert not [line for line in lines if line.get("what") == "superseded"]


@pytest.mark.parametrize(
    "settings",
    [
        {"lora.A": "rotating", "lora.moments": "transport", "lora.rotate_every": 2},
        {"train.overlap": True, "train.overlap_steps": 1},
        {"train.overlap": True, "lora.merge": "reset-less", "train.local_steps": 3},
        {"outer.name": "sgd", "outer.momentum": 0.5, "outer.ema": 0.9, "outer.publish_ema": True},
        {"server.quorum": 2, "outer.weights": "tokens", "outer.staleness": "inverse"},
        {"lora.modules": [], "train.workers": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_train_on_arrival(train: Train, tmp_path: Path, settings: dict[str, object]) -> None:
    train(**{"outer.when": "arrival", "log.diagnostics_every": 3, "eval.every": 2} | settings)
    (run,) = tmp_path.glob("run-*")
    lines = Records.read(run / METRICS)
    assert not [line for line in lines if line.get("what") in ("refused", "recalled")]
    (done,) = (line for line in lines if line["kind"] == "done")
    contributions = [line["contributions"] for line in lines if line["kind"] == "round"]
    workers = done["workers"]
    assert done["rounds"] == contributions[-1] // workers == 5
    evaluated = {line["version"] for line in lines if line["kind"] == "eval"}
    ends = [next(k for k, n in enumerate(contributions, 1) if n >= rounds * workers) for rounds in (2, 4, 5)]
    assert evaluated == {*ends}, "by rounds' worth of contributions"


def test_an_evaluation_longer_than_the_silence_costs_no_worker(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While the server is busy nobody is silent. The clock jumps at each evaluation."""
    undisturbed = train(**{"eval.every": 1})
    ahead_s = 0.0
    measure, now = Server._measure, Server._now_s

    def slow(server: Server, max_tokens: int) -> tuple[float | None, float | None]:
        nonlocal ahead_s
        measured = measure(server, max_tokens)
        if not server.finished:
            ahead_s += 1000.0
        return measured

    monkeypatch.setattr(Server, "_measure", slow)
    monkeypatch.setattr(Server, "_now_s", lambda server: now(server) + ahead_s)
    assert train(**{"eval.every": 1}) == undisturbed


@pytest.mark.parametrize(
    "settings",
    [
        {"model.tie_embeddings": True},
        {"lora.A": "rotating", "lora.moments": "transport", "lora.rotate_every": 2},
        {"lora.A": "frozen", "lora.subspace": "disjoint", "lora.merge": "reset-less"},
        {"lora.heads": 2, "lora.init": "xavier", "outer.weights": "tokens"},
        {"lora.modules": [], "train.workers": 1},
        {
            "lora.nested": "frozen",
            "lora.nested_ranks": [1, 2, 4],
            "lora.heads": 2,
            "optimizer.name": "adamw",
        },
        {
            "lora.dropout": 0.2,
            "train.accumulate": 2,
            "train.checkpoint_activations": True,
            "train.precision": "bf16",
        },
        {"optimizer.name": "muon", "optimizer.layer_decay": 0.8, "schedule.name": "wsd"},
        {"outer.name": "adam", "outer.lr": 0.01, "outer.dense": True, "outer.ema": 0.9},
        {"outer.name": "sgd", "outer.momentum": 0.5, "outer.dense": True, "outer.weight_decay": 0.1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_train_and_repeat(train: Train, settings: dict[str, object]) -> None:
    assert train(**settings) == train(**settings)
    assert train(**settings) != train(**settings, **{"run.seed": 1})


def test_the_average_is_recorded_published_last_and_measured_again(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(**{"outer.ema": 0.5, "outer.publish_ema": True, "base.quant": "none", "eval.every": 2})
    (run,) = tmp_path.glob("run-*")
    lines = Records.read(run / METRICS)
    evals, (done,) = ([line for line in lines if line["kind"] == kind] for kind in ("eval", "done"))
    assert [line["version"] for line in evals] == [2, 4, 5]
    assert all(len({line["loss"], line["loss_master"], line["loss_ema"]}) > 1 for line in evals)
    assert done["loss"] == pytest.approx(done["loss_ema"], abs=1e-3) != pytest.approx(done["loss_master"])
    capsys.readouterr()
    assert cli.main(["eval", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[2] == (
        f"ema        version 5  validation loss {done['loss_ema']:.4f} nats a token"
    )


def test_a_run_without_an_average_has_none_to_load(train: Train, tmp_path: Path) -> None:
    train()
    (run,) = tmp_path.glob("run-*")
    assert not any("loss_ema" in line for line in Records.read(run / METRICS))
    with pytest.raises(RunError, match="keeps no average"):
        recipes.load_run(run, "ema")


@pytest.mark.parametrize("merge", ["reset-less", "reset-b"])
def test_with_overlap_a_lost_message_changes_no_bit_either(
    train: Train, monkeypatch: pytest.MonkeyPatch, merge: str
) -> None:
    """The update is applied at the step that the recipe fixes, however late it comes."""
    settings = {"lora.merge": merge, "train.local_steps": 3, "train.overlap": True}
    undisturbed = train(**settings)
    assert train(**settings) == undisturbed
    assert train(**settings, **{"train.overlap_steps": 1}) != undisturbed
    assert train(**settings | {"train.overlap": False}) != undisturbed
    Lossy(monkeypatch, wire.Update)
    assert train(**settings) == undisturbed


@pytest.mark.parametrize("ahead", [1, 3])
def test_local_steps_go_on_while_an_update_is_under_way(
    train: Train, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """Updates are held back until heartbeats say that all steps ahead of them are taken."""
    held: dict[Peer, list[Frames]] = {}
    furthest: dict[int, int] = {}
    send, receive = InprocessServer.send, InprocessServer.receive

    def holding(server: InprocessServer, peer: Peer, frames: Frames) -> None:
        message, _ = wire.decode(frames)
        if isinstance(message, wire.Update) and message.since is not None and not message.last:
            held.setdefault(peer, []).append(frames)
        elif not held.get(peer):
            send(server, peer, frames)
        elif not isinstance(message, wire.Pulse):  # one that names the version must not overtake it
            held[peer].append(frames)

    def watching(server: InprocessServer, timeout_s: float | None) -> tuple[Peer, Frames] | None:
        received = receive(server, timeout_s)
        if received is not None:
            message, _ = wire.decode(received[1])
            waiting = held.get(received[0], [])
            if waiting and isinstance(message, wire.Heartbeat) and message.local_step == ahead:
                furthest[message.version] = ahead
                for frames in waiting:
                    send(server, received[0], frames)
                held[received[0]] = []
        return received

    settings = {"train.local_steps": 3, "train.overlap": True, "train.overlap_steps": ahead}
    undisturbed = train(**settings)
    monkeypatch.setattr(InprocessServer, "send", holding)
    monkeypatch.setattr(InprocessServer, "receive", watching)
    assert train(**settings) == undisturbed
    assert furthest == dict.fromkeys(range(4), ahead), "held back in every round but the last"


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
def test_a_worker_that_is_behind_gets_the_changes_folded_or_the_whole_model(
    train: Train, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    """One worker hears of no update until version 4, while the other goes on alone. What it gets then
    leads to the published digest, or the worker would have ended."""
    deaf: list[Peer] = []
    caught_up: list[wire.Update] = []
    send = InprocessServer.send

    def partly_deaf(server: InprocessServer, peer: Peer, frames: Frames) -> None:
        message, _ = wire.decode(frames)
        if isinstance(message, wire.Welcome) and not deaf:
            deaf.append(peer)
        version = getattr(message, "version", 0)
        if peer in deaf and 0 < version < 4 and not isinstance(message, wire.Welcome | wire.Receipt):
            return
        if peer in deaf and isinstance(message, wire.Update) and version >= 4:
            caught_up.append(message)
        send(server, peer, frames)

    monkeypatch.setattr(InprocessServer, "send", partly_deaf)
    train(**{"base.quant": quant, "server.grace_s": 0.0, "train.rounds": 40, "optimizer.lr": 1e-4})
    sinces = [update.since for update in caught_up]
    folded = [update for update in caught_up if update.since == 0]
    assert (quant == "none") == (not folded), f"updates on {sinces}"
    assert all(update.since is not None or update.version < 10 for update in caught_up)


def test_a_contribution_that_is_too_large_is_refused_and_not_asked_for_for_ever(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Master, "max_contribution", lambda master, heads, rank: dict.fromkeys(["output/B"], 10)
    )
    with pytest.raises(RefusedError, match="not of the model's heads and dense parameters"):
        train()


def test_parts_of_a_process_that_was_replaced_are_not_mixed_with_those_of_its_successor(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a worker is forgotten, what it had sent is forgotten with it."""
    forgotten: list[str] = []
    dropped: list[str] = []
    act, drop = Server._act, Intake.drop

    def watching(server: Server, action: rounds.Action, peer: Peer | None) -> None:
        dropped.clear()
        act(server, action, peer)
        if isinstance(action, rounds.Forget):
            forgotten.append(action.member.worker_id)
            assert dropped == [action.member.worker_id]

    def dropping(intake: Intake, worker_id: str) -> None:
        drop(intake, worker_id)
        dropped.append(worker_id)

    monkeypatch.setattr(Server, "_act", watching)
    monkeypatch.setattr(Intake, "drop", dropping)
    train()
    assert sorted(forgotten) == ["w0", "w1"]


def test_the_server_stays_until_its_workers_have_the_last_update(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a slow link that takes longer than a closing socket waits."""
    left = []
    farewell = Server._farewell
    monkeypatch.setattr(
        Server,
        "_farewell",
        lambda server, reason, **how: (
            left.append(len(server._state.members)) or farewell(server, reason, **how)
        ),
    )
    train()
    assert left == [0]


def test_what_was_merged_of_whom_is_forgotten_with_them(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A worker that the rounds know no more leaves no record of its merges, which strangers could fill."""
    take_up = Server._take_up

    def remembering(server: Server, found: recovery.Recovered, of_bases: Sequence[str]) -> None:
        take_up(server, found, of_bases)
        server._merged_in["long gone"] = (0, 7)

    monkeypatch.setattr(Server, "_take_up", remembering)
    train()
    (run,) = (path.parent for path in tmp_path.rglob(METRICS))
    progress, _ = checkpoint.load(checkpoint.newest(run))
    assert progress.merged_in.keys() == {"w0", "w1"}


def test_threads_change_no_bit(train: Train) -> None:
    assert train(**{"server.num_threads": 3}) == train()


def test_bytes_are_counted_by_direction_and_kind(train: Train, tmp_path: Path) -> None:
    train(**{"train.rounds": 3, "lora.embeddings": True, "compress.measure_entropy": True})
    (path,) = tmp_path.rglob(METRICS)
    rounds = [line for line in Records.read(path) if line["kind"] == "round"]
    for line in rounds:
        for direction, kinds in KINDS.items():
            parts = {kind: line[f"{direction}_{kind}_bytes"] for kind in kinds | {"control"}}
            assert sum(parts.values()) == line[f"{direction}_bytes"]
            assert all(num_bytes > 0 for num_bytes in parts.values())
        assert line["uplink_bits"] > 0
        assert 0 < line["codes_changed"] < 1
        assert line["merge_in_steps"] > 0
        assert 0 < line["entropy_bytes"] < line["changes_bytes"]
    for line in rounds[1:]:  # in the first, whole models were sent too
        down = line["downlink_codes_bytes"] + line["downlink_scales_bytes"]
        assert down == line["changes_bytes"] * line["num_told"]


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
    settings = {"worker.heartbeat_s": 3600.0, "server.silence_s": 20000.0, "worker.patience_s": 20000.0}
    train(**settings, **{"train.rounds": 30})
    assert updates == 30 * 2, "an update goes to each worker once"
