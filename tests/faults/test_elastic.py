"""Workers that come and go, more of them than at the start, with heads of another rank or scale than the
recipe's."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from cluster import ROUNDS, Cluster, Fault, audit

from lte import config, quantize
from lte.data import TrainingStream
from lte.server import checkpoint, journal
from lte.worker.trainer import Trainer

STEP = "lte.worker.trainer:Trainer.step"
PUSH = "lte.worker.session:Session.push"
EXACT = {"compress__factors": "fp32", "compress__dense": "fp32"}
"""What travels is what is merged, so that float64 from the journal is near."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Diary:
    """A worker writes down its rates and its batch at each local step; at its n-th it leaves."""

    path: Path
    leaves_at: int = 0

    def install(self) -> None:
        step, batch = Trainer.step, TrainingStream.batch
        read: list[torch.Tensor] = []
        taken = 0

        def reading(stream: TrainingStream, number: int) -> torch.Tensor:
            read.append(batch(stream, number))
            return read[-1]

        def stepping(trainer: Trainer) -> None:
            nonlocal taken
            taken += 1
            if taken == self.leaves_at:
                raise KeyboardInterrupt
            place = {"round": trainer.round, "local_step": trainer.local_step}
            step(trainer)
            rates = [group["lr"] for group in trainer.optimizer.param_groups]
            line = place | {"lr": rates, "batch": quantize.digest([("batch", read[-1])]), "taken": taken}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

        Trainer.step, TrainingStream.batch = stepping, reading  # type: ignore[method-assign]


def pages(path: Path) -> list[list[Line]]:
    """What each process of a worker wrote."""
    found: list[list[Line]] = []
    for line in map(json.loads, path.read_text().splitlines()):
        if line["taken"] == 1:
            found.append([])
        found[-1].append(line)
    return found


def rates_at(recipe: config.Recipe, step: int, own_step: int | None) -> list[float]:
    """Rates of A, B, dense matrices and vectors: peaks times warmup or cosine, times a joiner's warmup."""
    T, schedule = recipe.train.rounds * recipe.train.local_steps, recipe.schedule
    share = (step - schedule.warmup_steps) / (T - schedule.warmup_steps)
    factor = 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2
    if step < schedule.warmup_steps:
        factor = (step + 1) / schedule.warmup_steps
    if own_step is not None and own_step < schedule.join_warmup_steps:
        factor *= (own_step + 1) / schedule.join_warmup_steps
    lr, dense = recipe.optimizer.lr, recipe.optimizer.dense_lr
    return [rate * factor for rate in (lr, lr, dense, dense)]


@pytest.mark.parametrize(
    "overlap", [{}, {"train__overlap": True, "train__overlap_steps": 1}], ids=["in turn", "overlap"]
)
def test_workers_come_and_go_and_each_has_its_rate_and_its_data(
    cluster: Cluster, overlap: dict[str, Any]
) -> None:
    """a and b begin; c and d join; b leaves; c is killed and comes back without its state.

    Versions 1 to 3 are of two workers, 4 of four, the others of three. Each of this happens at the second
    step of a round: everybody has the update that opened it then, and the server what was pushed."""
    rounds = 9
    server = cluster.serve(
        train__rounds=rounds, schedule__join_warmup_steps=3, server__silence_s=500.0, **overlap, **EXACT
    )
    diaries = {name: cluster.folder / f"{name}.jsonl" for name in "abcd"}
    a = cluster.work("a", Diary(diaries["a"]), Fault(STEP, call=6, number=signal.SIGSTOP))
    b = cluster.work("b", Diary(diaries["b"], leaves_at=10))
    cluster.until(lambda: len(cluster.lines("round")) == 2, "round before a stops")
    c = cluster.work("c", Diary(diaries["c"]), Fault(STEP, call=8))
    joined(cluster, "c joined")
    d = cluster.work("d", Diary(diaries["d"]))
    joined(cluster, "d joined")
    assert a.pid is not None
    os.kill(a.pid, signal.SIGCONT)
    cluster.ended(b, 1)
    cluster.ended(c, -signal.SIGKILL)
    shutil.rmtree(cluster.state_of("c"))
    again = cluster.work("c", Diary(diaries["c"]))
    for process in (server, a, d, again):
        cluster.ended(process, 0)
    assert [line["num_merged"] for line in cluster.lines("round")] == [2, 2, 2, 4] + [3] * (rounds - 4)
    audit(cluster.run, rounds, set("abcd"))

    recipe = config.load(cluster.run / "config.yaml")
    known = [r for s in journal.history(cluster.run) for r in s if isinstance(r, journal.Admitted)]
    slots = {record.worker_id: record.slot for record in known}
    # Whoever is told first is first: a and b came at once.
    assert ({slots["a"], slots["b"]}, slots["c"], slots["d"]) == ({0, 1}, 2, 3)
    T = recipe.train.local_steps
    for name, path in diaries.items():
        stream = TrainingStream(
            recipe.data.shards,
            context_tokens=recipe.model.context_tokens,
            batch_size=recipe.train.batch_size,
            seed=recipe.run.seed,
            worker=slots[name],
            num_workers=2,
        )
        for page in pages(path):
            steps = [line["round"] * T + line["local_step"] for line in page]
            assert steps == list(range(steps[0], steps[0] + len(steps))), "none twice, none left out"
            is_late = steps[0] > 0
            for own_step, (step, line) in enumerate(zip(steps, page, strict=True)):
                expected = rates_at(recipe, step, own_step if is_late else None)
                assert line["lr"] == pytest.approx(expected), f"{name}, step {step}"
                assert line["batch"] == quantize.digest([("batch", stream.batch(step))]), f"{name}, {step}"
    began = {name: [page[0]["round"] for page in pages(path)] for name, path in diaries.items()}
    assert began == {"a": [0], "b": [0], "c": [3, 6], "d": [3]}
    assert all(pages(diaries[name])[-1][-1]["round"] == rounds - 1 for name in "acd")

    weights, expected_heads = naive.master(cluster.run)
    assert expected_heads == [2, 2, 2, 4] + [3] * (rounds - 4), "weights are 1 / expected"
    agrees(cluster.run, weights)


def agrees(run: Path, weights: dict[str, torch.Tensor]) -> None:
    """The master at the end of a run is this, as far as fp32 goes; and it moved."""
    _, first = checkpoint.load(run / "checkpoints" / "version-00000000")
    _, last = checkpoint.load(checkpoint.newest(run))
    for name, weight in last["master"].items():
        assert (weight.double() - weights[name]).abs().max() < 1e-6, name
        assert (weight - first["master"][name]).abs().max() > 1e-4, name


# Heads of different rank and scale

OTHER = {"rank": 2, "scale": 5.0}
"""The heads of b."""


def joined(cluster: Cluster, words: str, times: int = 1) -> None:
    """Wait until a worker has joined: whoever is first has the first slot, and the data of it."""
    cluster.until(lambda: cluster.events("joined").count(words) == times, f"word that {words}")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> str:
    """Digest of the master of workers of lora_rank 4 and 2, and of two scales, to which nothing happened."""
    cluster = Cluster(tmp_path_factory.mktemp("mixed"), settings)
    try:
        cluster.serve()
        cluster.work("a")
        joined(cluster, "a joined")
        cluster.work("b", **OTHER)
        cluster.all_ended()
        return cluster.master_digest()
    finally:
        cluster.close()


@pytest.mark.parametrize("call", [3, 4])
def test_heads_of_different_rank_and_scale_go_on_bit_for_bit(cluster: Cluster, mixed: str, call: int) -> None:
    """The worker of the smaller rank is killed when it has pushed, then the server between journal and
    publishing: it goes on from a checkpoint and a replay of one version or of two."""
    server = cluster.serve(Fault("lte.server.publisher:Publisher.publish", call=call))
    a = cluster.work("a")
    joined(cluster, "a joined")
    cluster.ended(cluster.work("b", Fault(PUSH, call=2, after=True), **OTHER), -signal.SIGKILL)
    b = cluster.work("b", **OTHER)
    cluster.ended(server, -signal.SIGKILL)
    server = cluster.serve()
    for process in (server, a, b):
        cluster.ended(process, 0)
    assert cluster.master_digest() == mixed
    audit(cluster.run, ROUNDS, {"a", "b"})
    assert "b joined with 1 head of lora_rank 2 and lora_scale 5" in cluster.events("joined")
    assert cluster.events("refused") == cluster.events("recalled") == cluster.events("reshaped") == []


def test_who_comes_back_with_another_rank_has_new_heads(cluster: Cluster) -> None:
    """b is killed when what it pushed is kept, which counts as it was. It does not go on from the state of
    other heads, and joins without one while the round is open still."""
    server = cluster.serve(server__silence_s=500.0, **EXACT)
    a, b = cluster.work("a", Fault(STEP, call=5, number=signal.SIGSTOP)), cluster.work("b")
    cluster.until(lambda: (2, "b") in kept(cluster), "contribution of b to the round of version 2")
    b.kill()
    cluster.ended(b, -signal.SIGKILL)
    cluster.ended(cluster.work("b", rank=2), 1)
    shutil.rmtree(cluster.state_of("b"))
    again = cluster.work("b", rank=2)
    joined(cluster, "b joined with 1 head of lora_rank 2", times=2)
    assert a.pid is not None
    os.kill(a.pid, signal.SIGCONT)
    for process in (server, a, again):
        cluster.ended(process, 0)
    complaint = (
        "the state of other heads, model or optimizer (blocks.0.attention.qkv had 1 heads of lora_rank 4,"
    )
    assert complaint in cluster.logs()
    assert set(cluster.events("reshaped")) == {"b had other heads before: 1 head of lora_rank 2 start anew"}
    assert cluster.events("recalled") == cluster.events("refused") == []
    weights, expected_heads = naive.master(cluster.run)
    assert expected_heads == [2] * ROUNDS
    agrees(cluster.run, weights)


def test_who_comes_back_with_another_scale_goes_on_from_what_is_merged(cluster: Cluster) -> None:
    """What b pushed before it was killed counts at its scale of then. Its state, which owes at that scale,
    is refused; without one b goes on from its merged factors, which are the same at any scale."""
    server = cluster.serve(server__silence_s=500.0, **EXACT)
    a = cluster.work("a", Fault(STEP, call=5, number=signal.SIGSTOP))
    joined(cluster, "a joined")
    b = cluster.work("b", scale=5.0)
    cluster.until(lambda: (2, "b") in kept(cluster), "contribution of b to the round of version 2")
    b.kill()
    cluster.ended(b, -signal.SIGKILL)
    cluster.ended(cluster.work("b"), 1)
    shutil.rmtree(cluster.state_of("b"))
    again = cluster.work("b", scale=7.0)
    joined(cluster, "b joined with 1 head of lora_rank 4 and lora_scale 7")
    assert a.pid is not None
    os.kill(a.pid, signal.SIGCONT)
    for process in (server, a, again):
        cluster.ended(process, 0)
    assert "they were of lora_scale 5, and are of the recipe's lora_scale" in cluster.logs()
    assert cluster.events("reshaped") == []
    # What it begins on is older than the contribution that is kept: it may have trained before it is told.
    late = (
        "a contribution of b was refused: it is encoded against merged factors that the server does not hold"
    )
    assert set(cluster.events("refused")) <= {late}
    weights, expected_heads = naive.master(cluster.run)
    assert expected_heads == [2] * ROUNDS
    agrees(cluster.run, weights)
    scales = {(c.version, c.worker_id): c.scale for c in contributions(cluster)}
    assert [scales[version, "b"] for version in range(ROUNDS)] == [5.0] * 3 + [7.0] * (ROUNDS - 3)
    assert {scales[version, "a"] for version in range(ROUNDS)} == {0.0}


def kept(cluster: Cluster) -> list[tuple[int, str]]:
    """Version and worker of the contributions that the journal holds."""
    return [(c.version, c.worker_id) for c in contributions(cluster)]


def contributions(cluster: Cluster) -> list[journal.Kept]:
    """The contributions that the journal holds."""
    records = (record for segment in journal.history(cluster.run) for record in segment)
    return [record for record in records if isinstance(record, journal.Kept)]
