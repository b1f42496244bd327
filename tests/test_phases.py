"""Settings that change in the run, by round."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from simulation import Simulation, recipe
from test_algorithm import Net, batches, mse, seeded

from launch import local
from lte import config, quantize
from lte.config import Recipe
from lte.data import TrainingStream, pack
from lte.errors import ConfigError
from lte.track import METRICS, Records
from lte.worker.trainer import Trainer

NAMES = itertools.count()
Line = dict[str, Any]
Train = Callable[..., list[Line]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("".join(f"{n} bottles of beer on the wall. " for n in range(700)))
    pack([folder / "text.txt"], folder / "shards", num_shards=2)
    return folder / "shards"


@pytest.fixture
def train(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    """Train a tiny recipe of 6 rounds, with two workers as threads; returns the records."""

    def run(**settings: object) -> list[Line]:
        name = f"phases-{next(NAMES)}"
        small = {
            "run.dir": str(tmp_path / name),
            "model.num_layers": 1,
            "model.width": 32,
            "model.num_attention_heads": 2,
            "model.mlp_width": 64,
            "model.context_tokens": 16,
            "data.shards": str(shards),
            "train.rounds": 6,
            "train.local_steps": 2,
            "train.workers": 2,
            "train.batch_size": 4,
            "lora.rank": 4,
            "schedule.warmup_steps": 2,
            "server.address": f"inprocess://{name}",
            "worker.heartbeat_s": 0.02,
        }
        assert local.train_in_threads(config.replace(Recipe(), **(small | settings))) == 0
        return Records.read(tmp_path / name / METRICS)

    return run


def of_kind(lines: list[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


def phased(*phases: dict[str, Any], **settings: Any) -> Recipe:
    return config.replace(Recipe(), **{"train.rounds": 12, "train.phases": list(phases)} | settings)


def test_a_round_has_the_settings_of_the_last_phase_that_names_them() -> None:
    recipe = phased(
        {"from_round": 3, "local_steps": 2}, {"from_round": 5}, {"from_round": 9, "local_steps": 4}
    )
    lengths = [recipe.in_round(number).train.local_steps for number in range(14)]
    assert lengths == [10] * 3 + [2] * 6 + [4] * 5, "after the last round those of the last one hold"
    assert [recipe.steps_before(number) for number in range(14)] == [sum(lengths[:n]) for n in range(14)]
    assert recipe.total_steps == sum(lengths[:12])


def test_a_phase_may_begin_with_the_run() -> None:
    recipe = phased({"from_round": 0, "local_steps": 1}, {"from_round": 4, "local_steps": 8})
    assert [recipe.in_round(number).train.local_steps for number in (0, 3, 4)] == [1, 1, 8]
    assert recipe.steps_before(6) == 4 + 16


def test_the_settings_of_a_round_say_the_same_of_all_rounds() -> None:
    recipe = phased({"from_round": 3, "local_steps": 2}, {"from_round": 9, "local_steps": 4})
    for number in range(13):
        own = recipe.in_round(number)
        assert own.total_steps == recipe.total_steps
        assert [own.steps_before(n) for n in range(13)] == [recipe.steps_before(n) for n in range(13)]
        assert [own.in_round(n).train.local_steps for n in range(13)] == [
            recipe.in_round(n).train.local_steps for n in range(13)
        ]


def test_a_recipe_without_phases_is_the_same_in_every_round() -> None:
    recipe = Recipe()
    assert recipe.in_round(7) is recipe
    assert recipe.total_steps == 500
    assert recipe.steps_before(7) == 70


FAULTS = {
    "train.phases: their from_round must rise, not be 4, 4": [{"from_round": 4}, {"from_round": 4}],
    "train.phases: their from_round must rise, not be 4, 2": [{"from_round": 4}, {"from_round": 2}],
    "train.phases: round 12 does not come, as train.rounds is 12 (the first one is 0)": [{"from_round": 12}],
    "train.phases: from round 4 on: train.overlap_steps: 3 is more than train.local_steps (2)": [
        {"from_round": 4, "local_steps": 2},
        {"from_round": 6, "local_steps": 5},
    ],
    "train.phases.0.xyz: unknown setting; known here: from_round": [{"from_round": 4, "xyz": 1}],
}


@pytest.mark.parametrize("line", FAULTS)
def test_impossible_phases_are_one_line(line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        phased(*FAULTS[line], **{"train.overlap": True, "train.overlap_steps": 3})
    (met,) = raised.value.faults
    assert met.startswith(line)


# Local steps


@pytest.mark.parametrize(
    "overlap", [{}, {"train.overlap": True}, {"train.overlap": True, "train.overlap_steps": 1}]
)
def test_workers_take_the_steps_of_each_round_and_read_every_batch_once(
    train: Train, monkeypatch: pytest.MonkeyPatch, overlap: dict[str, object]
) -> None:
    read: dict[int, list[int]] = {}
    rates: dict[tuple[int, int], set[float]] = {}
    batch, step = TrainingStream.batch, Trainer.step

    def reading(stream: TrainingStream, number: int) -> object:
        read.setdefault(id(stream), []).append(number)
        return batch(stream, number)

    def stepping(trainer: Trainer) -> None:
        place = trainer.round, trainer.local_step
        step(trainer)
        rates.setdefault(place, set()).add(trainer.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(TrainingStream, "batch", reading)
    monkeypatch.setattr(Trainer, "step", stepping)
    phases = [{"from_round": 2, "local_steps": 5}, {"from_round": 4, "local_steps": 1}]
    lines = train(**{"train.phases": phases, "schedule.final": 0.0}, **overlap)
    lengths = [2, 2, 5, 5, 1, 1]
    assert list(read.values()) == [list(range(sum(lengths)))] * 2
    assert sorted(rates) == [(n, k) for n, length in enumerate(lengths) for k in range(length)]
    assert all(len(met) == 1 for met in rates.values()), "workers of one round have one rate"
    rounds = of_kind(lines, "round")
    tokens = [line["tokens"] for line in rounds]
    assert tokens == [2 * 4 * 16 * sum(lengths[: n + 1]) for n in range(6)]
    last = [rates[n, length - 1].pop() for n, length in enumerate(lengths)]
    assert [line["lr"] for line in rounds] == pytest.approx(last)
    assert last[-1] < 0.02 * max(last), "the run ends with its last step, not when 6 rounds of 2 would"


# The base's format


def test_a_base_in_another_format_is_made_anew_from_the_master() -> None:
    """fp32, then 4 bits, then 8: what 4 bits had rounded away comes back with more of them."""
    phases = [{"from_round": 2, "base_quant": "nf4"}, {"from_round": 4, "base_quant": "int8"}]
    settings = recipe(**{"train.phases": phases, "optimizer.lr": 0.05})
    simulation = Simulation(seeded(Net), settings, 2)
    master = simulation.master
    for version in range(1, 7):
        simulation.local_steps(mse, batches(2, 3, 8, seed=version))
        simulation.merge()
        quant = "none" if version < 2 else "nf4" if version < 4 else "int8"
        assert {base.quant for base in master.base.values()} == {quant}
        for trainer in simulation.trainers:
            assert trainer.base_digest() == master.base_digest()
            assert all(module.quant == quant for module in trainer.modules.values())
        if version in (2, 4):
            for name, weight in master.weights.items():
                fresh = quantize.quantize(weight, quant)
                assert torch.equal(master.base[name].codes, fresh.codes)
                assert torch.equal(master.base[name].scales, fresh.scales)
    x = torch.randn(16, 6)
    plain = seeded(Net)
    master.fill(plain, "published")
    model = simulation.trainers[0].model.eval()
    assert torch.allclose(model(x), plain.eval()(x), atol=1e-6)


def test_training_goes_on_by_the_new_base() -> None:
    """With fp32 all along, the same phase changes nothing; with fewer bits the workers see others."""
    masters = {}
    for quant in (None, "none", "nf4"):
        settings = recipe(**{"train.phases": [{"from_round": 1, "base_quant": quant}], "optimizer.lr": 0.05})
        simulation = Simulation(seeded(Net), settings, 2)
        for round_ in range(3):
            simulation.local_steps(mse, batches(2, 3, 8, seed=round_))
            simulation.merge()
        masters[quant] = simulation.master.master_digest()
    assert masters[None] == masters["none"] != masters["nf4"]


def test_the_model_is_sent_whole_once_when_its_format_changes(train: Train) -> None:
    phases = [{"from_round": 2, "base_quant": "int8"}, {"from_round": 4, "base_quant": "nf4"}]
    lines = train(**{"train.phases": phases, "eval.every": 1, "log.diagnostics_every": 1})
    changed = {line["version"]: line["codes_changed"] for line in of_kind(lines, "round")}
    assert [version for version, share in changed.items() if share == 1.0] == [2, 4]
    flipped = {
        line["version"]: {module["codes_flipped"] for module in line["modules"].values()}
        for line in of_kind(lines, "diagnostics")
    }
    assert [version for version, shares in flipped.items() if shares == {None}] == [2, 4]
    gaps = {line["version"]: abs(line["loss"] - line["loss_master"]) for line in of_kind(lines, "eval")}
    assert max(gaps[2], gaps[3]) < min(gaps[1], gaps[4], gaps[5]), "8 bits show the master better"
