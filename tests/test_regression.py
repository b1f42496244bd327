"""Linear regression: drawn as it says, solved by whom it can be solved by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from launch import local
from lte import cli, config, recipes
from lte.config import Recipe
from lte.tasks import Regression

WIDTH, RANK = 8, 2
RECIPE = Path(__file__).parent.parent / "configs" / "reproduction" / "regression.yaml"


def recipe_of(**changes: object) -> Recipe:
    small = {"model.width": WIDTH, "lora.rank": RANK, "train.batch_size": 32, "run.seed": 3}
    return config.replace(config.load(RECIPE), **(small | changes))


def lost_by(weight: Tensor) -> float:
    """The evaluation's loss of a weight."""
    task = Regression(recipe_of())
    model = recipes.initial_model(task.recipe)
    with torch.no_grad():
        model.get_parameter("map.weight").copy_(weight)
        return float(task.evaluate(model.eval(), 0).loss or 0)


def test_least_squares_on_a_batch_find_the_solution() -> None:
    """There is no noise, so that numpy needs no more samples than features to solve it."""
    task = Regression(recipe_of())
    x, y = task.stream(0).batch(5).numpy().transpose(1, 0, 2)
    solved, residual, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    assert rank == WIDTH
    assert residual.max() < 1e-9
    assert torch.from_numpy(solved.T).allclose(task.solution(), atol=1e-5)
    assert lost_by(torch.from_numpy(solved.T)) < 1e-9


def test_losses_are_the_mean_squared_error_and_in_expectation_the_norm_of_what_is_missing() -> None:
    task = Regression(recipe_of())
    model, batch = recipes.initial_model(task.recipe), task.stream(1).batch(0)
    weight = model.get_parameter("map.weight").detach()
    x, y = batch.numpy().transpose(1, 0, 2)
    assert task.loss(model, batch).item() == pytest.approx(((x @ weight.numpy().T - y) ** 2).mean(), rel=1e-5)
    missing = (weight - task.solution()).square().sum().item() / WIDTH
    assert lost_by(weight) == pytest.approx(missing, rel=0.1)
    halves = [task.loss(model, batch[torch.arange(k, k + 16)]).item() for k in (0, 16)]
    assert task.loss(model, batch).item() == pytest.approx(sum(halves) / 2)
    assert task.num_tokens(batch) == 32


def test_samples_repeat_themselves_by_seed_worker_and_step_alone() -> None:
    first = Regression(recipe_of()).stream(1).batch(2)
    assert torch.equal(first, Regression(recipe_of()).stream(1).batch(2))
    for seed, slot, step in ((3, 0, 2), (3, 1, 3), (4, 1, 2)):
        other = Regression(recipe_of(**{"run.seed": seed})).stream(slot).batch(step)
        assert not other.isclose(first).any()
    task, model = Regression(recipe_of()), recipes.initial_model(recipe_of())
    with torch.no_grad():
        assert task.evaluate(model, 100).loss != task.evaluate(model, 0).loss


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., float]:
    """The final loss of a small run of the recipe that is shipped."""

    def train(**changes: object) -> float:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        own = {"run.dir": str(folder), "server.address": f"inprocess://{folder}", "eval.every": 0}
        assert local.train_in_threads(recipe_of(**(own | changes))) == 0
        done = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert done["tokens"] == 32 * done["rounds"] * 25
        return float(done["loss"])

    return train


def test_a_head_is_stuck_at_its_rank_and_merging_it_recovers_the_solution(
    trained: Callable[..., float],
) -> None:
    """Reset-less with one head adds what that head is by now, and no more: LoRA."""
    task = Regression(recipe_of())
    missing = task.solution() - recipes.initial_model(task.recipe).get_parameter("map.weight").detach()
    tail = torch.linalg.svdvals(missing)[RANK:].square().sum().item() / WIDTH
    stuck = trained(**{"train.rounds": 20, "lora.merge": "reset-less"})
    assert 0.9 * tail < stuck < 1.3 * tail
    assert trained(**{"train.rounds": 40}) < 0.05 * tail
    everything = {"lora.modules": (), "optimizer.dense_lr": 0.03}
    assert trained(**{"train.rounds": 20, **everything}) < 0.01 * tail, "of full rank it is easy"


def test_the_recipe_as_it_is_shipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(RECIPE), "train.rounds=2", f"run.dir={tmp_path / 'run'}"]) == 0
    assert cli.main(["eval", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "3,200 samples" in out
    assert "squared error" in out
    export = ["export", str(tmp_path / "run"), "--format", "hf", "--out", str(tmp_path / "hf")]
    assert cli.main(export) == 2
    assert capsys.readouterr().err.startswith("lte: model.name: linear is no model of transformers")


def test_updates_of_two_ranks_overlap_as_their_weights_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`lte report --overlap`, of heads that stay and of merged ones, against numpy on the models."""
    updates = []
    for rank, merge in ((1, "never"), (3, "reset")):
        folder = tmp_path / f"rank{rank}"
        own = {"run.dir": str(folder), "server.address": f"inprocess://{folder}", "train.rounds": 12}
        recipe = recipe_of(**own, **{"lora.rank": rank, "lora.merge": merge})
        assert local.train_in_threads(recipe) == 0
        weights = [
            model.get_parameter("map.weight").detach().double().numpy()
            for model in (recipes.load_run(folder, "master")[0], recipes.initial_model(recipe))
        ]
        updates.append(weights[0] - weights[1])
    u, v = (np.linalg.svd(update)[2].T for update in updates)
    found = recipes.compare_updates(tmp_path / "rank1", tmp_path / "rank3")["map"].numpy()
    naive = [np.linalg.norm(u[:, :1].T @ v[:, :j]) ** 2 for j in (1, 2, 3)]
    assert found == pytest.approx(np.array([naive]), abs=1e-4)
    assert cli.main(["report", str(tmp_path / "rank1"), "--overlap", str(tmp_path / "rank3")]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.split() == ["1", *(f"{number:.3f}" for number in naive)]


@pytest.mark.parametrize("is_kept", [True, False])
def test_updates_of_runs_that_continue_another_are_from_where_they_began(
    is_kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the checkpoint of version 0 where it is kept, else of the other run; and without both a line."""

    def train(name: str, **changes: object) -> np.ndarray:
        folder = tmp_path / name
        own = {"run.dir": str(folder), "server.address": f"inprocess://{folder}", "lora.merge": "reset-less"}
        recipe = recipe_of(**own, **changes, **{"server.keep_checkpoints": 2 if is_kept else 1})
        assert local.train_in_threads(recipe) == 0
        assert (folder / "checkpoints" / "version-00000000").exists() == is_kept
        return recipes.load_run(folder, "master")[0].get_parameter("map.weight").detach().double().numpy()

    began = train("before", **{"train.rounds": 10})
    more = {"model.init_from": str(tmp_path / "before"), "train.rounds": 4, "train.local_steps": 5}
    updates = [
        train(f"rank{rank}", **more, **{"lora.rank": rank, "run.seed": rank + 5}) - began for rank in (1, 3)
    ]
    u, v = (np.linalg.svd(update)[2].T for update in updates)
    naive = [np.linalg.norm(u[:, :1].T @ v[:, :j]) ** 2 for j in (1, 2, 3)]
    if is_kept:
        (tmp_path / "before").rename(tmp_path / "gone")
    found = recipes.compare_updates(tmp_path / "rank1", tmp_path / "rank3")["map"].numpy()
    assert found == pytest.approx(np.array([naive]), abs=1e-4)
    if not is_kept:
        (tmp_path / "before").rename(tmp_path / "gone")
        assert cli.main(["report", str(tmp_path / "rank1"), "--overlap", str(tmp_path / "rank3")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "rank1: what it started from is gone" in line
        assert str(tmp_path / "before") in line


def test_runs_with_nothing_in_common_have_no_overlap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for width in (4, 8):
        folder = tmp_path / str(width)
        own = {"run.dir": str(folder), "server.address": f"inprocess://{folder}", "train.rounds": 1}
        assert local.train_in_threads(recipe_of(**own, **{"model.width": width})) == 0
    assert cli.main(["report", str(tmp_path / "4"), "--overlap", str(tmp_path / "8")]) == 2
    assert "no module is adapted in both and has the same shape" in capsys.readouterr().err
