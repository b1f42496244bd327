"""Methods without heads: local SGD and DiLoCo, against naive loops of torch's own optimizers."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from simulation import Simulation, recipe
from test_algorithm import Net, batches, mse, seeded
from torch import Tensor, nn

from launch import local
from lte import config, recipes, report
from lte.cli import main
from lte.config import Recipe
from lte.errors import ConfigError
from lte.track import METRICS, Records

N, T, ROUNDS, LR = 3, 4, 5, 0.02
WARMUP, FINAL, DECAY, CLIP, EMA = 6, 0.1, 0.05, 0.3, 0.8

FULL_RANK = {
    "lora.modules": [],
    "train.workers": N,
    "train.local_steps": T,
    "train.rounds": ROUNDS,
    "optimizer.name": "adamw",
    "optimizer.dense_lr": LR,
    "optimizer.dense_weight_decay": DECAY,
    "optimizer.clip_norm": CLIP,
    "schedule.name": "cosine",
    "schedule.warmup_steps": WARMUP,
    "schedule.final": FINAL,
    "outer.ema": EMA,
}
DILOCO = {"outer.name": "sgd", "outer.lr": 0.7, "outer.momentum": 0.9, "outer.dense": True}


class Naive:
    """N models, an AdamW each, and a master that torch's SGD steps by the mean of what they changed."""

    def __init__(self, outer: dict[str, Any]) -> None:
        self.master = seeded(Net)
        self.models = [copy.deepcopy(self.master) for _ in range(N)]
        self.inner = [
            torch.optim.AdamW(
                [
                    {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
                    {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
                ],
                lr=LR,
                betas=(0.9, 0.95),
            )
            for model in self.models
        ]
        self.outer = torch.optim.SGD(self.master.parameters(), **(outer or {"lr": 1.0}))
        self.ema = [torch.zeros_like(p) for p in self.master.parameters()]
        self.losses: list[float] = []

    def round(self, number: int, data: list[Any]) -> None:
        for model, optimizer, own in zip(self.models, self.inner, data, strict=True):
            model.load_state_dict(self.master.state_dict())
            for k, batch in enumerate(own):
                loss = mse(model, batch)
                self.losses.append(float(loss.detach()))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                for group in optimizer.param_groups:
                    group["lr"] = LR * rate(number * T + k)
                optimizer.step()
        for weights in zip(self.master.parameters(), *(m.parameters() for m in self.models), strict=True):
            weights[0].grad = -(sum(w.detach() for w in weights[1:]) / N - weights[0].detach())
        self.outer.step()
        for average, weight in zip(self.ema, self.master.parameters(), strict=True):
            average.mul_(EMA).add_(weight.detach(), alpha=(1 - EMA))


def rate(step: int) -> float:
    """Linear warmup, then half a cosine down to FINAL."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / (ROUNDS * T - WARMUP)
    return FINAL + (1 - FINAL) * 0.5 * (1 + math.cos(math.pi * done))


@pytest.mark.parametrize(
    ("settings", "outer"),
    [({}, {}), (DILOCO, {"lr": 0.7, "momentum": 0.9, "nesterov": True})],
    ids=["localsgd", "diloco"],
)
def test_rounds_are_those_of_a_naive_loop(settings: dict[str, Any], outer: dict[str, Any]) -> None:
    """Losses of every local step, the master after every merge, and its average. Tolerance: fp32 rounding of
    weights of size 1 over 20 steps of 0.02."""
    naive = Naive(outer)
    simulation = Simulation(seeded(Net), recipe(**(FULL_RANK | settings)), N)
    assert simulation.master.weights == {}
    losses = list[float]()

    def loss(model: nn.Module, batch: object) -> Tensor:
        value = mse(model, batch)
        losses.append(float(value.detach()))
        return value

    for number in range(ROUNDS):
        data = batches(N, T, 8, seed=number)
        naive.round(number, data)
        simulation.local_steps(loss, data)
        simulation.merge()
        for name, weight in naive.master.named_parameters():
            assert torch.allclose(simulation.master.dense[name], weight, rtol=0, atol=5e-6), name
    assert losses == pytest.approx(naive.losses, abs=1e-5)
    average = simulation.master.parameters("ema")
    for (name, _), expected in zip(naive.master.named_parameters(), naive.ema, strict=True):
        assert torch.allclose(average[name], expected / (1 - EMA**ROUNDS), rtol=0, atol=5e-6), name


def test_int8_owes_what_it_leaves_out() -> None:
    """Over many rounds the master of int8 stays nearer to fp32's than one that forgets."""

    def master(codec: str, error_feedback: bool) -> Tensor:
        settings = {"train.rounds": 20, "compress.dense": codec, "compress.error_feedback": error_feedback}
        simulation = Simulation(seeded(Net), recipe(**(FULL_RANK | settings | {"optimizer.name": "sgd"})), N)
        for number in range(20):
            simulation.local_steps(mse, batches(N, T, 8, seed=number))
            simulation.merge()
        return torch.cat([tensor.flatten() for tensor in simulation.master.dense.values()])

    exact = master("fp32", True)
    owed, forgotten = (float((master("int8", feedback) - exact).norm()) for feedback in (True, False))
    assert 0 < owed < forgotten / 2


# Whole runs

Train = Callable[..., Path]


@pytest.fixture
def train(shards: Path, tmp_path: Path) -> Train:
    """Train a tiny GPT without heads, workers as threads; returns the run's folder."""

    def run(name: str, **settings: object) -> Path:
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
            "lora.modules": [],
            "base.quant": "none",
            "schedule.warmup_steps": 2,
            "server.address": f"inprocess://{name}",
            "server.checkpoint_every": 2,
            "worker.heartbeat_s": 0.02,
            "eval.every": 2,
        }
        assert local.train_in_threads(config.replace(Recipe(), **(small | settings))) == 0
        return tmp_path / name

    return run


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in Records.read(run / METRICS) if line["kind"] == kind]


@pytest.mark.parametrize("outer", [{}, DILOCO], ids=["localsgd", "diloco"])
@pytest.mark.parametrize(("codec", "bytes_a_parameter"), [("fp32", 4.0), ("int8", 1.0)])
def test_a_run_without_heads(
    train: Train, outer: dict[str, Any], codec: str, bytes_a_parameter: float
) -> None:
    """What travels is recorded as it is: 4 bytes a parameter each way, or about 1, and nothing of the rows of
    the embedding whose bytes were not met."""
    run = train("run", **outer, **{"compress.dense": codec})
    (done,) = lines(run, "done")
    assert done["num_adapted_parameters"] == 0
    assert done["loss"] == pytest.approx(done["loss_master"], abs=0 if codec == "fp32" else 0.05)
    first, *_, last = lines(run, "eval")
    assert last["loss"] < first["loss"], "it does not learn"
    always = 1 - 256 * 32 / done["num_parameters"]
    for line in lines(run, "round")[1:]:  # the first has what workers get when they join
        for way in ("uplink_bytes", "downlink_bytes"):
            met = line[way] / (2 * done["num_parameters"])
            assert always * bytes_a_parameter <= met < 1.25 * bytes_a_parameter
    assert report.outcome(run).loss == done["loss"]
    model, _, version = recipes.load_run(run)
    assert version == 6
    assert sum(p.numel() for p in model.parameters()) == done["num_parameters"]


def test_a_run_without_heads_goes_on_where_it_stopped(train: Train) -> None:
    settings = {**DILOCO, "outer.ema": 0.9, "schedule.name": "constant"}
    whole = train("whole", **settings)
    train("parts", **settings, **{"train.rounds": 4})
    parts = train("parts", **settings)
    assert [line["version"] for line in lines(parts, "round")] == [1, 2, 3, 4, 5, 6]
    # Its workers are new ones, with moments of their own.
    assert lines(parts, "round")[3]["train_loss"] == lines(whole, "round")[3]["train_loss"]
    assert lines(parts, "round")[-1]["train_loss"] < lines(parts, "round")[0]["train_loss"]


def test_plans_reports_and_tables_of_a_recipe_without_heads(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(train("run"))
    recipe = f"{run}/config.yaml"
    capsys.readouterr()
    assert main(["plan", recipe, "--bandwidth", "10mbit", "--rtt", "50ms", "--from", run, "--json"]) == 0
    lte, *_ = json.loads(capsys.readouterr().out)["methods"]
    assert lte["uplink_bytes"]["factors"] == 0
    assert lte["uplink_bytes"]["dense"] > 0
    assert main(["plan", recipe, "--bandwidth", "10mbit", "--rtt", "50ms", "--probe"]) == 0
    assert main(["convert", recipe, "--dry-run"]) == 0
    assert main(["report", run]) == 0
    assert main(["eval", run]) == 0
    assert main(["generate", run, "--tokens", "5"]) == 0


def test_an_outer_optimizer_that_has_nothing_to_act_on_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"outer.name: sgd acts on adapted weights.*outer.dense=true"):
        recipe(**(FULL_RANK | DILOCO | {"outer.dense": False}))
