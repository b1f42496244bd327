"""Diagnostics in the records of runs, and what they say of heads whose data or start are the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_diagnostics import whole

from launch import local
from lte import config, recipes
from lte.config import Recipe
from lte.errors import ConfigError, RunError
from lte.merge import HeadDelta
from lte.server.diagnosis import INITIAL, Diagnosis
from lte.server.master import Received
from lte.server.publisher import Publisher
from lte.server.service import Server
from lte.tasks import Text
from lte.track import METRICS, Records

NAMES = itertools.count()
RANK, ROUNDS = 4, 4
MODULES = [
    "blocks.0.attention.qkv",
    "blocks.0.attention.out",
    "blocks.0.mlp.up",
    "blocks.0.mlp.down",
    "output",
]

Run = Callable[..., Path]


@pytest.fixture
def run(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Train a tiny recipe, changed by settings, with workers as threads; returns the run's folder."""

    def run(name: str = "", **settings: object) -> Path:
        folder = tmp_path / (name or f"run-{next(NAMES)}")
        small = {
            "run.dir": str(folder),
            "model.num_layers": 1,
            "model.width": 32,
            "model.num_attention_heads": 2,
            "model.mlp_width": 64,
            "model.context_tokens": 16,
            "data.shards": str(shards),
            "train.rounds": ROUNDS,
            "train.local_steps": 2,
            "train.workers": 2,
            "train.batch_size": 4,
            "lora.rank": RANK,
            "schedule.warmup_steps": 2,
            "eval.every": 0,
            "server.address": f"inprocess://{folder.name}-{next(NAMES)}",
            "worker.heartbeat_s": 0.02,
            "log.diagnostics_every": 1,
        }
        assert local.train_in_threads(config.replace(Recipe(), **(small | settings))) == 0
        return folder

    return run


def lines(folder: Path, kind: str = "diagnostics") -> list[dict[str, Any]]:
    return [line for line in Records.read(folder / METRICS) if line["kind"] == kind]


# What the LTE paper found


def same_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers have the data of the first one."""
    stream = Text.stream
    monkeypatch.setattr(Text, "stream", lambda task, slot: stream(task, 0))


@pytest.mark.parametrize("merge", ["reset-b", "reset-less"])
def test_heads_are_near_orthogonal_unless_they_start_the_same(
    run: Run, monkeypatch: pytest.MonkeyPatch, merge: str
) -> None:
    """Of the same A and data they are one; of the same A alone alike; of other A near orthogonal."""
    found = {}
    for start, data in itertools.product(("same", "other"), repeat=2):
        with monkeypatch.context() as patch:
            if data == "same":
                same_data(patch)
            subspace = "shared" if start == "same" else "random"
            found[start, data] = lines(run(**{"lora.merge": merge, "lora.subspace": subspace}))
    for line in found["same", "same"]:
        assert (line["noise"], line["noise_scale"], line["noise_scale_dense"]) == pytest.approx((0, 0, 0))
        for of_module in line["modules"].values():
            assert of_module["cosine_mean"] == of_module["cosine_max"] == pytest.approx(1)
            assert of_module["grassmann_columns"] == pytest.approx(0, abs=1e-5)
            assert of_module["grassmann_rows"] == pytest.approx(0, abs=1e-5)
    for name in MODULES:
        first = {which: found[which][0]["modules"][name] for which in found}
        cosines = {which: of_module["cosine_mean"] for which, of_module in first.items()}
        assert max(abs(cosines["other", "other"]), abs(cosines["other", "same"])) < 0.3
        assert 0.3 < cosines["same", "other"] < 0.95
        assert first["same", "other"]["grassmann_rows"] < 0.1 < 2 < first["other", "other"]["grassmann_rows"]
        # Two heads reach further than one can.
        assert first["same", "same"]["round_effective_rank"] < RANK + 1e-3
        assert RANK + 1 < first["other", "other"]["round_effective_rank"] <= 2 * RANK


def test_the_accumulated_update_starts_as_the_first_rounds_and_outgrows_a_head(run: Run) -> None:
    told = lines(run(**{"lora.merge": "reset", "train.rounds": 8}))  # each round new subspaces
    for name in MODULES:
        first, last = (line["modules"][name] for line in (told[0], told[-1]))
        for quantity in ("effective_rank", "stable_rank"):
            assert first[quantity] == pytest.approx(first[f"round_{quantity}"], rel=1e-3)
        assert last["effective_rank"] > 2 * RANK >= last["round_effective_rank"] - 1e-3
        assert last["amplification"] > first["amplification"] > 0


# Records


def test_rounds_that_are_due_have_one_line_and_it_changes_no_bit(run: Run) -> None:
    without, every_other = run(**{"log.diagnostics_every": 0}), run(**{"log.diagnostics_every": 2})
    assert lines(without) == []
    assert not (without / INITIAL).exists()
    told = lines(every_other)
    tokens = {line["version"]: line["tokens"] for line in lines(every_other, "round")}
    assert [(line["version"], line["tokens"]) for line in told] == [(2, tokens[2]), (4, tokens[4])]
    assert [list(line["modules"]) for line in told] == [MODULES, MODULES]
    assert all(line["diagnose_s"] > 0 for line in told)
    (one,), (other,) = lines(without, "done"), lines(every_other, "done")
    assert one["master_digest"] == other["master_digest"]
    flipped = [line["modules"]["output"]["codes_flipped"] for line in told]
    assert all(0 < share < 1 for share in flipped)


@pytest.mark.parametrize(
    "settings",
    [
        {"base.quant": "none"},
        {"lora.A": "rotating", "lora.subspace": "disjoint"},
        {"lora.heads": 2, "outer.bound_norm": 1.0, "outer.weights": "tokens"},
        {"lora.embeddings": True, "server.num_threads": 2},
        {"train.workers": 1},
        {"lora.modules": []},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_are_diagnosed(run: Run, settings: dict[str, object]) -> None:
    told = lines(run(**settings, **{"train.rounds": 1}))
    (line,) = told
    undefined = {key for of_module in line["modules"].values() for key, n in of_module.items() if n is None}
    expected = set()
    if "base.quant" in settings:
        expected = {"quantization_error_steps"}
    elif "train.workers" in settings:
        expected = {"cosine_mean", "cosine_max", "grassmann_columns", "grassmann_rows"}
    assert undefined == expected
    assert (line["noise"] is None) == ("train.workers" in settings)
    if "lora.A" in settings:
        farthest = RANK**0.5 * math.pi / 2
        for of_module in line["modules"].values():
            assert of_module["cosine_max"] == pytest.approx(0, abs=1e-5)
            assert of_module["grassmann_rows"] == pytest.approx(farthest, abs=1e-3)


def test_patterns_choose_modules_and_must_match_one(run: Run) -> None:
    patterns = ["blocks.*.mlp.*", "output"]
    folder = run(**{"log.diagnostics_modules": patterns, "train.rounds": 1})
    assert [list(line["modules"]) for line in lines(folder)] == [MODULES[2:]]
    with pytest.raises(
        ConfigError, match=r"log\.diagnostics_modules: 'embedding' matches no module that has"
    ):
        run(**{"log.diagnostics_modules": ["output", "embedding"]})
    run(**{"log.diagnostics_modules": ["embedding"], "log.diagnostics_every": 0, "train.rounds": 1})


def test_the_initial_weights_are_the_runs_whatever_model_a_later_server_is_given(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever trains a model of their own need not make its first weights again."""
    uninterrupted = lines(run())
    run("interrupted", **{"train.rounds": 2, "schedule.name": "constant"})
    initial = recipes.initial_model
    monkeypatch.setattr(
        recipes, "initial_model", lambda recipe: initial(config.replace(recipe, **{"run.seed": 7}))
    )
    found = lines(run("interrupted", **{"schedule.name": "constant"}))
    assert [line["version"] for line in found] == [line["version"] for line in uninterrupted] == [1, 2, 3, 4]
    assert all(line["modules"]["output"]["amplification"] < 3 for line in found)
    assert found[2]["modules"]["output"]["effective_rank"] < 3 * 2 * RANK


def test_what_needs_the_initial_weights_is_left_out_where_they_are_not_known(run: Run) -> None:
    run("late", **{"log.diagnostics_every": 0, "train.rounds": 2})
    folder = run("late")
    told = lines(folder)
    assert [line["version"] for line in told] == [3, 4]
    for line in told:
        for of_module in line["modules"].values():
            undefined = {key for key, number in of_module.items() if number is None}
            assert undefined == {"effective_rank", "stable_rank", "amplification"}
    (event,) = [line for line in lines(folder, "event") if line["what"] == "diagnostics"]
    assert "initial weights are not known" in event["message"]


def test_the_error_of_a_published_average_is_that_of_the_average(run: Run) -> None:
    changes = {"outer.ema": 0.9, "outer.publish_ema": True, "base.quant": "int8", "optimizer.lr": 0.05}
    *_, before, last = lines(run(**changes))
    for name in MODULES:
        error, error_before = (line["modules"][name]["quantization_error"] for line in (last, before))
        assert 0 < error < 2 * error_before < 0.1


def test_damaged_initial_weights_are_one_line(run: Run) -> None:
    folder = run("damaged", **{"train.rounds": 1})
    (folder / INITIAL).write_bytes((folder / INITIAL).read_bytes()[:-100])
    with pytest.raises(RunError, match=r"initial\.safetensors: damaged .*; delete it to go on without"):
        run("damaged", **{"train.rounds": 2})


def test_a_server_that_is_told_to_stop_measures_no_more(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, asked = Diagnosis.measure, 0

    def stopped(*given: Any, **named: Any) -> dict[str, Any] | None:
        def is_stopped() -> bool:
            nonlocal asked
            asked += 1
            return asked == 3

        return measure(*given, **named | {"is_stopped": is_stopped})

    monkeypatch.setattr(Diagnosis, "measure", stopped)
    told = lines(run())
    assert [line["version"] for line in told] == [2, 3, 4]
    assert asked == 3 + 3 * len(MODULES)


def test_lines_of_a_future_that_is_no_more_are_measured_anew(run: Run) -> None:
    """As after damage, when a run goes back to an older version than its records tell of."""
    folder = run("back", **{"train.rounds": 2})
    with (folder / METRICS).open("a") as file:
        file.write('{"kind": "diagnostics", "version": 4, "tokens": 0, "time_s": 0.0}\n')
    told = lines(run("back"))
    assert [line["version"] for line in told] == [1, 2, 3, 4]
    assert told[-1]["modules"].keys() == set(MODULES)


@pytest.mark.parametrize("merge", ["reset-b", "reset-less"])
def test_a_lines_numbers_are_those_of_whole_matrices(
    run: Run, monkeypatch: pytest.MonkeyPatch, merge: str
) -> None:
    """Workers' deltas in full, in float64: each is the mean of its heads', at its lora_scale, with the dense
    ones beside it."""
    measure, work = Diagnosis.measure, recipes.work
    own = {"w0": 16.0, "w1": 3.0}
    monkeypatch.setattr(
        recipes,
        "work",
        lambda address, *, worker_id, **named: work(
            address, worker_id=worker_id, scale=own[worker_id], **named
        ),
    )
    naive: list[dict[str, float]] = []

    def measured(
        diagnosis: Diagnosis,
        version: int,
        tokens: int,
        contributions: Sequence[Received],
        heads: Mapping[str, Sequence[HeadDelta]],
        *rest: Any,
        **named: Any,
    ) -> dict[str, Any] | None:
        workers: list[list[np.ndarray]] = [[] for _ in contributions]
        for name, of_module in heads.items():
            scales = [own[contribution.worker_id] for contribution in contributions for _ in range(2)]
            deltas = [s * whole(head).numpy() for s, head in zip(scales, of_module, strict=True)]
            if name == "output":
                flat = np.stack([delta.ravel() / np.linalg.norm(delta) for delta in deltas])
                cosines = (flat @ flat.T)[np.triu_indices(len(flat), 1)]
                spectrum = np.linalg.svd(sum(deltas) / len(deltas), compute_uv=False)
            for k, worker in enumerate(workers):
                worker.append(sum(deltas[2 * k : 2 * k + 2]).ravel() / 2)
        for contribution, worker in zip(contributions, workers, strict=True):
            worker.extend(
                tensor.double().numpy().ravel()
                for name, tensor in contribution.tensors.items()
                if name.endswith("/dense")
            )
        flat = np.stack([np.concatenate(worker) for worker in workers])
        small = contributions[0].tokens
        of_small, of_big = (flat**2).sum(1).mean(), (flat.mean(0) ** 2).sum()
        share = spectrum / spectrum.sum()
        share = share[share > 1e-9]
        naive.append(
            {
                "signal": 2 * of_big - of_small,
                "noise": (of_small - of_big) / (1 / small - 1 / (2 * small)),
                "cosine_mean": cosines.mean(),
                "cosine_max": cosines.max(),
                "round_effective_rank": math.exp(-(share * np.log(share)).sum()),
            }
        )
        return measure(diagnosis, version, tokens, contributions, heads, *rest, **named)

    monkeypatch.setattr(Diagnosis, "measure", measured)
    told = lines(run(**{"lora.merge": merge, "lora.heads": 2, "train.rounds": 2}))
    for line, expected in zip(told, naive, strict=True):
        found = line | line["modules"]["output"]
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-3)


def test_a_round_is_measured_once_it_is_published_and_recorded(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is, the workers train already."""
    happened: list[str] = []

    def note(owner: type, name: str, what: str) -> None:
        original = getattr(owner, name)

        def noted(*given: Any, **named: Any) -> Any:
            happened.append(f"begins: {what}")
            result = original(*given, **named)
            happened.append(f"is done: {what}")
            return result

        monkeypatch.setattr(owner, name, noted)

    note(Publisher, "publish", "publishing")
    note(Server, "_record_round", "the round's line")
    note(Diagnosis, "measure", "measuring")
    run(**{"train.rounds": 1})
    order = ["publishing", "the round's line", "measuring"]
    assert happened == [f"{which}: {what}" for what in order for which in ("begins", "is done")]
