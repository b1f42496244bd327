"""Ranks taken out of a run with nested heads, and the search for the smallest of each module."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from simulation import Simulation, recipe
from test_algorithm import Net, batches, mse, seeded
from test_nested import NESTED, R, S

from launch import local
from lte import config, ranks, recipes
from lte.cli import main
from lte.config import Recipe
from lte.data import pack
from lte.errors import RunError, UserError
from lte.nested import Cuts
from lte.server.master import Master

# Ranks taken out of a master


def trained(**settings: Any) -> Simulation:
    simulation = Simulation(seeded(Net), recipe(**(NESTED | settings)), 1)
    for round_ in range(3):
        simulation.local_steps(mse, batches(1, 5, 8, seed=round_))
        simulation.merge()
    return simulation


@pytest.mark.parametrize(
    "kept",
    [
        {"lora.merge": "reset-less"},
        {"lora.merge": "never"},
        {"lora.merge": "never", "lora.heads": 2, "lora.batch": "whole"},
        {"lora.merge": "reset-less", "lora.heads": 2, "lora.batch": "whole"},
    ],
    ids=["reset-less", "never", "never, two heads", "reset-less, two heads"],
)
@pytest.mark.parametrize("scaling", ["given", "rank-stabilized"])
@pytest.mark.parametrize("b", [1, 3, 4])
def test_a_rank_taken_out_is_the_model_that_was_trained_with_it(
    kept: dict[str, Any], scaling: str, b: int
) -> None:
    alpha = {"lora.scaling": scaling, "lora.alpha": 4.0} if scaling == "rank-stabilized" else {}
    simulation = trained(**kept, **alpha)
    (trainer,) = simulation.trainers
    cuts, model, start = Cuts(simulation.master), seeded(Net), seeded(Net)
    cuts.fill(model, "master", cuts.at(b))
    s = 4.0 / b**0.5 if alpha else S * R / b
    for name, module in trainer.modules.items():
        delta = s * (module.lora_B[..., :b] @ module.lora_A[:, :b]).mean(0)
        expected = start.get_parameter(f"{name}.weight") + delta
        assert torch.allclose(model.get_parameter(f"{name}.weight"), expected, atol=1e-5)
        assert delta.abs().max() > 1e-2
    trainer._ranks = lambda: [b] * trainer.heads  # type: ignore[method-assign]
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(model(x), trainer.model(x), atol=1e-5)
    if kept["lora.merge"] == "never":  # with its heads, all of each
        cuts.fill(model, "published", cuts.ranks)
        assert torch.allclose(model(x), trainer.model.eval()(x), atol=1e-5)


@pytest.mark.parametrize(
    "before", [{"rank": 2}, {"merge": "reset-b"}, {"merge": "reset-b", "full_rank": True}]
)
def test_what_came_before_the_phase_of_the_heads_stays_whole(before: dict[str, Any]) -> None:
    """Ranks are taken out of the last phase's heads, as it trained them on what was there."""
    now = {"rank": R, "merge": "reset-less", "full_rank": False}
    phases = [{"from_round": 0, **before}, {"from_round": 2, **now}]
    simulation = trained(**{"train.phases": phases})
    (trainer,) = simulation.trainers
    cuts, model = Cuts(simulation.master), seeded(Net)
    cuts.fill(model, "master", cuts.at(1))
    trainer._ranks = lambda: [1]  # type: ignore[method-assign]
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(model(x), trainer.model(x), atol=1e-5)
    cut = model(x)
    cuts.fill(model, "master", cuts.ranks)
    assert (model(x) - cut).abs().max() > 1e-3


def test_modules_of_less_than_is_drawn_are_whole_at_the_last_rung() -> None:
    small = [{"modules": "down", "rank": 3}]
    cuts = Cuts(trained(**{"lora.nested_ranks": [2, 4, 4], "lora.overrides": small}).master)
    assert {name: cuts.rungs(name) for name in cuts.ranks} == {"up": (2, 4), "down": (2, 3)}


def test_overrides_of_ranks_are_heads_of_the_same_product() -> None:
    simulation = trained()
    cuts = Cuts(simulation.master)
    overrides = cuts.overrides({"up": 1, "down": 3})
    text = ranks.to_yaml(overrides)
    own = config.replace(recipe(), **{"lora.overrides": config.yaml12.read(text)["lora"]["overrides"]})
    plan = Master(seeded(Net), own).plan
    found = {name: (spec.rank, spec.scale) for name, spec in plan.adapted.items()}
    assert found == {"up": (1, S * R), "down": (3, pytest.approx(S * R / 3))}


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"lora.nested": "none"}, "lora.nested = none"),
        ({"lora.merge": "reset-b"}, "lora.merge = reset-b"),
        ({"lora.nested": "none", "lora.merge": "never"}, "lora.nested = none"),
    ],
)
def test_runs_without_nested_heads_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(RunError, match=fault):
        Cuts(trained(**settings).master)


def test_heads_of_two_workers_and_ranks_that_are_not_there_are_refused() -> None:
    master = trained().master
    with pytest.raises(RunError, match="no rank 5 in heads of lora_rank 4"):
        Cuts(master).at(5)
    master.merged["another"] = master.merged["w0"]
    with pytest.raises(RunError, match=r"heads of 2 workers \(another, w0\)"):
        Cuts(master)
    master.merged.clear()
    with pytest.raises(RunError, match="heads of 0 workers: "):
        Cuts(master)


# The search


RUNGS = {"a": (1, 2, 4), "b": (1, 2, 4), "c": (1, 2, 4)}
FEATURES = {"a": 10, "b": 10, "c": 100}
PRICES = {"a": {4: 0.0, 2: 0.001, 1: 0.5}, "b": {4: 0.0, 2: 0.2, 1: 0.3}, "c": {4: 0.0, 2: 0.01, 1: 0.02}}


def additive(chosen: ranks.Ranks) -> float:
    return 2.0 + sum(PRICES[name][rank] for name, rank in chosen.items())


def size(chosen: ranks.Ranks) -> int:
    return sum(FEATURES[name] * rank for name, rank in chosen.items())


@pytest.mark.parametrize("bound", [0.0, 0.005, 0.02, 0.0211, 0.25, 0.4, 5.0])
def test_the_search_stays_within_the_bound_and_is_no_worse_than_it_says(bound: float) -> None:
    calls = []

    def loss(chosen: ranks.Ranks) -> float:
        calls.append(dict(chosen))
        return additive(chosen)

    found = ranks.search(RUNGS, FEATURES, loss, most_increase=bound)
    assert found.loss == additive(found.ranks) <= 2.0 + bound
    assert found.num_parameters == size(found.ranks)
    assert found.whole_parameters == 480
    assert len(calls) == found.num_evaluations <= ranks.most_evaluations(RUNGS)
    expected = {
        0.0: {"a": 4, "b": 4, "c": 4},
        0.005: {"a": 2, "b": 4, "c": 4},
        0.02: {"a": 2, "b": 4, "c": 2},
        0.0211: {"a": 2, "b": 4, "c": 1},
        0.25: {"a": 2, "b": 4, "c": 1},
        0.4: {"a": 2, "b": 1, "c": 1},
        5.0: {"a": 1, "b": 1, "c": 1},
    }
    assert found.ranks == expected[bound]


@pytest.mark.parametrize("budget", [480, 400, 200, 151, 120])
def test_a_budget_is_kept(budget: int) -> None:
    found = ranks.search(RUNGS, FEATURES, additive, most_parameters=budget)
    assert found.num_parameters <= budget
    sizes = itertools.product(*RUNGS.values())
    fitting = [dict(zip(RUNGS, each, strict=True)) for each in sizes]
    best = min(additive(chosen) for chosen in fitting if size(chosen) <= budget)
    assert found.loss <= best + 0.2


def test_a_budget_below_the_least_ranks_is_refused() -> None:
    with pytest.raises(UserError, match="the least ranks have 120 parameters, more than the budget of 119"):
        ranks.search(RUNGS, FEATURES, additive, most_parameters=119)


def test_where_to_stop_is_measured_where_increases_do_not_add_up() -> None:
    """Three cuts that are nearly free alone cost much together."""

    def loss(chosen: ranks.Ranks) -> float:
        num_cuts = 12 - sum(chosen.values())
        return 2.0 + (0.001, 0.3)[num_cuts > 1] * num_cuts

    rungs = dict.fromkeys("abc", (3, 4))
    found = ranks.search(rungs, dict.fromkeys("abc", 1), loss, most_increase=0.1)
    assert sum(found.ranks.values()) == 11
    assert found.loss == 2.001


# The commands


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT trained with nested ranks, which its last phase keeps."""
    folder = tmp_path_factory.mktemp("nested")
    (folder / "text.txt").write_text("".join(f"{n} bottles of beer on the wall. " for n in range(700)))
    pack([folder / "text.txt"], folder / "shards", num_shards=2)
    settings = {
        "run.dir": str(folder / "run"),
        "model.num_layers": 1,
        "model.width": 32,
        "model.num_attention_heads": 2,
        "model.mlp_width": 64,
        "model.context_tokens": 16,
        "data.shards": str(folder / "shards"),
        "train.rounds": 6,
        "train.local_steps": 4,
        "train.workers": 1,
        "train.batch_size": 8,
        "train.phases": [{"from_round": 2, "rank": 8, "merge": "reset-less"}],
        "lora.rank": 4,
        "lora.nested": "unfrozen",
        "lora.merge": "reset-b",
        "base.quant": "none",
        "optimizer.name": "adamw",
        "schedule.warmup_steps": 2,
        "server.address": "inprocess://nested",
        "worker.heartbeat_s": 0.02,
        "eval.every": 0,
        "eval.tokens": 512,
    }
    assert local.train_in_threads(config.replace(Recipe(), **settings)) == 0
    return folder / "run"


Answer = tuple[int, str, str]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The command in this process."""

    def call(*arguments: object) -> Answer:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_eval_and_generate_of_any_rank(run: Path, told: Callable[..., Answer]) -> None:
    losses = {}
    for rank in (None, 8, 1):
        code, out, _ = told("eval", run, "--json", *([] if rank is None else ["--rank", rank]))
        assert code == 0
        published, master = json.loads(out)
        assert (published["weights"], master["weights"], master["rank"]) == ("published", "master", rank)
        losses[rank] = master["loss"]
    assert losses[None] == losses[8] != losses[1]
    code, out, _ = told("eval", run, "--rank", 1)
    assert f"validation loss {losses[1]:.4f} nats a token" in out
    texts = {r: told("generate", run, "--tokens", 20, "--rank", r, "--temperature", 0)[1] for r in (8, 1)}
    assert all(len(text) > 10 for text in texts.values())
    assert told("generate", run, "--tokens", 20, "--temperature", 0)[1] == texts[8]


def test_ranks_writes_what_a_recipe_reads(run: Path, told: Callable[..., Answer], tmp_path: Path) -> None:
    path = tmp_path / "ranks.yaml"
    code, out, err = told(
        "ranks", run, "--budget-parameters", 2500, "--tokens", 256, "--out", path, "--weights", "master"
    )
    assert code == 0
    assert "evaluations at most, of " in err
    own = config.from_dict(config.yaml12.read(path.read_text()))
    found = {override.modules: override.rank for override in own.lora.overrides}
    assert len(found) > 3
    assert set(found.values()) <= {1, 2, 4, 8}
    assert all(str(rank) in out for rank in found.values())
    code, out, _ = told("ranks", run, "--max-loss-increase", 100, "--tokens", 256, "--json")
    answer = json.loads(out)
    assert set(answer["ranks"].values()) == {1}
    assert answer["loss"] <= answer["whole_loss"] + 100
    code, out, _ = told("ranks", run, "--max-loss-increase", 0, "--tokens", 256)
    assert out.count("- {modules: ") == len(found), "without --out the section is printed"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("eval", "RUN", "--rank", "9"), "lte: there is no rank 9 in heads of lora_rank 8\n"),
        (("ranks", "RUN", "--budget-parameters", "3"), "more than the budget of 3\n"),
        (("generate", "RUN", "--rank", "2", "--weights", "ema"), "could be cut to a rank\n"),
        (("ranks", "RUN", "--max-loss-increase", "1", "--out", "nowhere/x.yaml"), "nowhere is no folder\n"),
    ],
)
def test_mistakes_are_one_line(
    run: Path, told: Callable[..., Answer], arguments: tuple[str, ...], line: str
) -> None:
    code, _, err = told(*(run if argument == "RUN" else argument for argument in arguments))
    assert code == 2
    assert err.endswith(line)


@pytest.mark.parametrize("format_", ["safetensors", "hf"])
def test_an_export_of_a_rank_is_the_model_cut_to_it(
    run: Path, told: Callable[..., Answer], tmp_path: Path, format_: str
) -> None:
    x = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    model, _, _ = recipes.load_run(run, "master", 1)
    whole, _, _ = recipes.load_run(run, "master")
    out = tmp_path / "out"
    code, _, err = told("export", run, "--format", format_, "--weights", "master", "--rank", 1, "--out", out)
    assert (code, err) == (0, "")
    if format_ == "hf":
        transformers = pytest.importorskip("transformers", reason="transformers is of the extra hf")
        logits = transformers.AutoModelForCausalLM.from_pretrained(out)(x).logits
        assert torch.allclose(logits, model(x), atol=1e-5)
    else:
        for name, tensor in load_file(out / "model.safetensors").items():
            assert torch.equal(tensor, model.get_parameter(name))
    assert (model(x) - whole(x)).abs().max() > 1e-3


def test_an_adapter_of_a_rank_is_refused(run: Path, told: Callable[..., Answer], tmp_path: Path) -> None:
    code, _, err = told("export", run, "--format", "peft", "--rank", 1, "--out", tmp_path / "out")
    assert (code, "--rank: is of merged models" in err) == (2, True)
