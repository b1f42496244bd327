"""A loss that rises for good is told from noise, whatever its unit; and a run says so."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

import lte
from lte import config
from lte.config import Recipe
from lte.server.watch import Divergence, Rise, typical
from lte.track import METRICS, Records

NOISE = 0.03


def falling(rounds: int, seed: int = 0, noise: float = NOISE) -> list[float]:
    """From 5 towards 1.7, as a language model's loss falls."""
    chance = random.Random(seed)
    return [1.7 + 3.3 * math.exp(-k / 12) + chance.gauss(0, noise) for k in range(rounds)]


def rises(
    losses: Iterable[float | None], share: float | None = 0.1, window: int = 3
) -> list[tuple[int, Rise]]:
    watch = Divergence(share, window)
    found = ((version, watch.saw(version, loss)) for version, loss in enumerate(losses, start=1))
    return [(version, rise) for version, rise in found if rise is not None]


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.3])
def test_noise_is_no_divergence(noise: float) -> None:
    assert [seed for seed in range(200) if rises(falling(150, seed, noise))] == []


def test_one_worker_cannot_make_a_run_seem_to_diverge() -> None:
    assert typical([1.7, 90.0, 1.8, 1.6]) == 1.7
    assert typical([1.7, math.nan, 1.8]) == 1.8
    assert typical([1.7, math.nan]) == 1.7
    assert typical([math.nan, math.nan, 1.7]) == math.inf
    assert typical([]) is None


def test_a_single_bad_round_is_none_either() -> None:
    losses = falling(60)
    losses[40] = 8.0
    assert rises(losses) == []


def test_a_loss_that_does_not_fall_at_first_is_none() -> None:
    """As in a long warmup."""
    assert rises([5.5 + 0.01 * math.sin(k) for k in range(30)] + falling(60)) == []


@pytest.mark.parametrize(("unit", "offset"), [(1.0, 0.0), (1e-3, 0.0), (100.0, -500.0)])
def test_a_rise_is_said_once_within_a_few_rounds(unit: float, offset: float) -> None:
    losses = falling(50) + [1.8 + 0.2 * k for k in range(30)]
    ((version, rise),) = rises([offset + unit * loss for loss in losses])
    assert 53 <= version <= 56
    assert 40 <= rise.version <= 51
    assert (rise.best - offset) / unit == pytest.approx(1.75, abs=0.06)
    assert (rise.now - offset) / unit > 2.0


def test_a_slow_rise_is_said_too() -> None:
    losses = falling(60, noise=0.01) + [1.75 + 0.01 * k for k in range(100)]
    ((version, _),) = rises(losses)
    assert 80 < version < 110


def test_it_is_said_again_after_the_loss_was_lower_than_ever() -> None:
    up = [3.0] * 10
    assert len(rises([*falling(50), *up, *([1.9] * 30), *up])) == 1
    assert len(rises([*falling(50), *up, *([1.0] * 30), *up])) == 2


def test_a_loss_that_is_not_finite_is_said_at_once() -> None:
    assert [version for version, _ in rises([math.nan, math.nan])] == [1]
    ((version, rise),) = rises([*falling(20), math.inf, math.inf])
    assert version == 21
    assert rise.now == math.inf
    assert rise.version > 10


def test_rounds_without_a_loss_say_nothing_and_it_can_be_switched_off() -> None:
    assert rises([None] * 10) == []
    assert rises([*falling(50), *([9.0] * 10)], share=None) == []


def test_a_run_says_that_it_diverges_with_the_cure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The losses that a worker reports are given; a server that goes on has not forgotten the good ones."""
    losses = iter([*falling(12, noise=0.0), *([5.0] * 10)])
    name = tmp_path.name
    recipe = config.replace(
        Recipe(),
        **{
            "run.dir": str(tmp_path / "run"),
            "train.local_steps": 1,
            "train.workers": 1,
            "train.rounds": 12,
            "server.address": f"inprocess://{name}",
            "server.checkpoint_every": 2,
            "lora.rank": 2,
        },
    )
    for rounds in (12, 22):
        train(config.replace(recipe, **{"train.rounds": rounds}), losses)
    lines = Records.read(tmp_path / "run" / METRICS)
    (event,) = [line for line in lines if line.get("what") == "diverging"]
    assert event["version"] == 14
    assert event["message"].startswith("the training loss diverges: 5.000, after 3.")
    assert f"lte rollback {tmp_path / 'run'} --version 12" in event["message"]
    assert "the training loss diverges" in capsys.readouterr().out


def train(recipe: Recipe, losses: Iterable[float]) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 8))

    def work() -> None:
        net = lte.convert(model(), recipe.lora)
        with lte.Worker(net, server=recipe.server.address) as worker:
            for loss in losses:
                net(torch.ones(2, 64)).sum().backward()
                if not worker.step(loss, tokens=2):
                    return

    with lte.Server(model, recipe) as server:
        worker = threading.Thread(target=work)
        worker.start()
        server.serve()
        worker.join()
