"""What else than LTE is trained by the same machine survives the same faults, bit for bit."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
from cluster import ROUNDS, Cluster, EveryCheckpoint, Fault, audit, replayed

from lte import recipes
from lte.config import Recipe
from lte.server import checkpoint
from lte.server.evaluation import Measured
from lte.server.master import Master
from lte.tasks import task_of

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"train.workers": 1, "lora.merge": "never"},
    "mhlora": {
        "train.workers": 1,
        "train.accumulate": 2,
        "train.checkpoint_activations": True,
        "lora.merge": "never",
        "lora.heads": 3,
        "lora.batch": "whole",
        "lora.dropout": 0.1,
    },
    "relora": {
        "train.workers": 1,
        "lora.merge": "reset",
        "lora.moments": "prune-random",
        "lora.prune": 0.5,
        "schedule.name": "jagged-cosine",
        "schedule.restart_warmup_steps": 1,
    },
    "fedlora": {"lora.merge": "never", "outer.combine": "factors"},
    "dylora": {
        "train.workers": 1,
        "lora.merge": "never",
        "lora.nested": "unfrozen",
        "lora.scale": 4.0,
        "optimizer.name": "adamw",
    },
    "diloco": {
        "lora.modules": [],
        "base.quant": "none",
        "outer.name": "sgd",
        "outer.lr": 0.7,
        "outer.momentum": 0.9,
        "outer.dense": True,
    },
}
KILLED = {
    "server, between journal and publishing": Fault("lte.server.publisher:Publisher.publish", call=3),
    "server, before a checkpoint has its name": Fault("lte.server.checkpoint:_name", call=2),
    "worker, between two steps": Fault("lte.worker.trainer:Trainer.step", call=5, after=True),
    "worker, when it has pushed": Fault("lte.worker.session:Session.push", call=3, after=True),
    "worker, when it has applied the update": Fault("lte.worker.trainer:Trainer.apply", call=3, after=True),
}


@pytest.fixture(scope="module", params=METHODS)
def settings(request: pytest.FixtureRequest, settings: dict[str, Any]) -> dict[str, Any]:
    return settings | METHODS[request.param] | {"log.diagnostics_every": 3}


def names(cluster: Cluster) -> tuple[str, ...]:
    return ("b", "a")[: cluster.settings["train.workers"]]


def trained(cluster: Cluster, **settings: Any) -> None:
    for process in (
        cluster.serve(EveryCheckpoint(), **settings),
        *(cluster.work(name) for name in names(cluster)),
    ):
        cluster.ended(process, 0)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Cluster:
    """A run that nothing happened to."""
    cluster = Cluster(tmp_path_factory.mktemp("calm"), settings)
    try:
        trained(cluster)
        return cluster
    finally:
        cluster.close()


def measured(recipe: Recipe, cluster: Cluster, which: str) -> float:
    model, _, _ = recipes.load_run(cluster.run, which)
    with torch.no_grad():
        found = task_of(recipe).evaluate(model, recipe.eval.final_tokens)
    assert isinstance(found, Measured) and found.loss is not None
    return found.loss


def test_what_a_run_folder_holds_is_what_was_measured(calm: Cluster) -> None:
    (done,) = calm.lines("done")
    recipe = recipes.recipe_of(calm.run)
    assert measured(recipe, calm, "published") == pytest.approx(done["loss"])
    assert measured(recipe, calm, "master") == pytest.approx(done["loss_master"])
    assert replayed(calm.run) == calm.master_digest()
    audit(calm.run, ROUNDS, set(names(calm)))


def test_diagnostics_know_what_is_published(calm: Cluster) -> None:
    """Heads that are never merged flip no code, and nothing of W is rounded."""
    lines = calm.lines("diagnostics")
    assert [line["version"] for line in lines] == [3, 6]
    never = calm.settings["lora.merge"] == "never"
    for module in lines[-1]["modules"].values():
        assert (module["codes_flipped"] == 0) == never
        assert (module["quantization_error"] == 0) == never
        assert module["effective_rank"] > 1


@pytest.mark.parametrize("killed", KILLED)
def test_whoever_is_killed_goes_on_bit_for_bit(cluster: Cluster, calm: Cluster, killed: str) -> None:
    of_server, of_worker = ([KILLED[killed]] if killed.startswith(who) else [] for who in ("server", "work"))
    server, others = cluster.serve(*of_server), [cluster.work(name) for name in names(cluster)[1:]]
    disturbed = cluster.work("b", *of_worker)
    cluster.ended(disturbed if of_worker else server, -signal.SIGKILL)
    again = cluster.work("b") if of_worker else cluster.serve()
    for process in (again, server if of_worker else disturbed, *others):
        cluster.ended(process, 0)
    assert cluster.master_digest() == calm.master_digest()
    audit(cluster.run, ROUNDS, set(names(cluster)))


def test_a_run_that_was_rolled_back_ends_as_it_would_have(cluster: Cluster) -> None:
    """Workers start over from what the server knew of their heads then, which is all that there is of them:
    no moments, and nothing owed but the rounding of sums of changes."""
    exact = {
        "optimizer__name": "sgd",
        "optimizer__lr": 0.1,
        "compress__factors": "fp32",
        "compress__dense": "fp32",
        "schedule__join_warmup_steps": 0,
    }
    trained(cluster, **exact)
    went_on = master_of(cluster)
    start = Master(recipes.initial_model(recipe := recipes.recipe_of(cluster.run)), recipe).parameters(
        "master"
    )
    recipes.roll_back(cluster.run, 3)
    assert not cluster.lines("done")
    trained(cluster, **exact)
    assert [line["version"] for line in cluster.lines("round")] == list(range(1, ROUNDS + 1))
    ended = master_of(cluster)
    for name, weight in ended.items():
        assert torch.allclose(weight, went_on[name], rtol=0, atol=1e-5), name
    moved = max(float((ended[name] - weight).abs().max()) for name, weight in start.items())
    assert moved > 1e-3, "it did not train"


def master_of(cluster: Cluster) -> dict[str, torch.Tensor]:
    """W and all that is averaged, at the end."""
    _, state = checkpoint.load(checkpoint.newest(cluster.run))
    return state["master"]
