"""Workers whose heads differ: in rank, in scale, in number, and from those that they had before."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from simulation import Cap, Simulation, recipe
from test_algorithm import Net, Regression, batches, mse, seeded
from test_compress import whole

import lte
from lte import cli, config, lowrank, recipes
from lte.config import Recipe
from lte.data import pack
from lte.errors import ConfigError, LTEError, RefusedError
from lte.track import METRICS, Records
from lte.worker.session import Session
from lte.worker.trainer import Trainer

NAMES = itertools.count()
MODES = [
    ("reset-less", "trained"),
    ("reset-less", "frozen"),
    ("reset-b", "trained"),
    ("reset-b", "frozen"),
    ("reset-b", "rotating"),
    ("reset", "trained"),
]


# Arithmetic


@pytest.mark.parametrize(("merge", "A"), MODES)
def test_heads_of_different_rank_and_number_weigh_the_same(merge: str, A: str) -> None:
    """W += 1 / (heads of all) * the sum of s (B A - B' A'), naively in float64, each head of its own rank."""
    settings = recipe(
        **{
            "lora.merge": merge,
            "lora.A": A,
            "lora.heads": 2,
            "lora.overrides": [{"modules": "down", "rank": 3, "scale": 5.0}],
            "train.batch_size": 8,
            "optimizer.name": "adamw",
        }
    )
    simulation = Simulation(seeded(Net), settings, 3, caps=[(0, 0), (2, 0), (1, 1)])
    shapes = [t.modules[n].lora_A.shape[:2] for t in simulation.trainers for n in ("up", "down")]
    assert shapes == [(2, 4), (2, 3), (2, 2), (2, 2), (1, 1), (1, 1)]
    for round_ in range(3):
        expected = {name: w.double() for name, w in simulation.master.weights.items()}
        dense = simulation.master.dense["norm.weight"].double()
        simulation.local_steps(mse, batches(3, 4, 8, seed=round_))
        for trainer in simulation.trainers:
            for name, module in trainer.modules.items():
                D = module.lora_B.double() @ module.lora_A.double()
                if module.merged_A is not None:
                    D = D - module.merged_B.double() @ module.merged_A.double()
                expected[name] += module.scale * D.sum(0).detach() / 5
            ahead = trainer.dense["norm.weight"].detach().double() - trainer._published["norm.weight"]
            dense = dense + ahead * trainer.heads / 5
        before = dict(simulation.master.weights)
        simulation.merge()
        for name, weight in simulation.master.weights.items():
            assert (weight.double() - expected[name]).abs().max() < 1e-6
            assert (weight - before[name]).abs().max() > 1e-3, "nothing was merged"
        assert (simulation.master.dense["norm.weight"].double() - dense).abs().max() < 1e-6


@pytest.mark.parametrize(("merge", "A"), MODES)
def test_heads_of_different_rank_and_scale_add_what_they_compute(merge: str, A: str) -> None:
    """W += 1 / N * the sum of s_n (B_n A_n - B_n' A_n'), naively in float64, in every module; and what a
    worker computes is W with N times its part of that."""
    settings = recipe(
        **{
            "lora.merge": merge,
            "lora.A": A,
            "lora.overrides": [{"modules": "down", "rank": 3, "scale": 5.0}],
            "optimizer.name": "adamw",
        }
    )
    caps = [Cap(), Cap(rank=2, scale=3.0), Cap(rank=1, scale=0.5)]
    scales = [{"up": 2.0, "down": 5.0}, {"up": 3.0, "down": 3.0}, {"up": 0.5, "down": 0.5}]
    simulation = Simulation(seeded(Net), settings, 3, caps=caps)
    x, _ = batches(1, 1, 8, seed=99)[0][0]
    for round_ in range(3):
        before = dict(simulation.master.weights)
        changes = {name: torch.zeros_like(W).double() for name, W in before.items()}
        simulation.local_steps(mse, batches(3, 4, 8, seed=round_))
        for trainer, of_modules in zip(simulation.trainers, scales, strict=True):
            weights = {}
            for name, module in trainer.modules.items():
                D = module.lora_B[0].double() @ module.lora_A[0].double()
                if module.merged_A is not None:
                    D = D - module.merged_B[0].double() @ module.merged_A[0].double()
                D = of_modules[name] * D.detach()
                changes[name] += D / 3
                weights[f"{name}.weight"] = (before[name].double() + D).float()
            plain = seeded(Net)
            plain.load_state_dict({n: p.detach() for n, p in trainer.dense.items()} | weights, strict=False)
            assert torch.allclose(trainer.model(x), plain(x), atol=1e-5)
        simulation.merge()
        for name, W in simulation.master.weights.items():
            assert (W.double() - before[name].double() - changes[name]).abs().max() < 1e-6
            assert changes[name].abs().max() > 1e-3, "nothing was merged"


def test_a_scale_of_a_worker_is_its_own_in_every_phase() -> None:
    """Whatever lora_rank says, which rank-stabilized scales follow; at full rank there is none."""
    phases = [
        {"from_round": 1, "rank": 2},
        {"from_round": 2, "full_rank": True},
        {"from_round": 3, "full_rank": False},
    ]
    settings = recipe(
        **{
            "lora.scaling": "rank-stabilized",
            "lora.alpha": 8.0,
            "train.rounds": 4,
            "train.phases": phases,
            "optimizer.name": "adamw",
        }
    )
    simulation = Simulation(seeded(Net), settings, 2, caps=[Cap(), Cap(scale=3.0)])
    for round_, usual in enumerate((4.0, 8 / 2**0.5, 1.0, 8 / 2**0.5)):
        own = 1.0 if round_ == 2 else 3.0
        before, expected = simulation.master.weights["up"], 0.0
        simulation.local_steps(mse, batches(2, 3, 8, seed=round_))
        for trainer, scale in zip(simulation.trainers, (usual, own), strict=True):
            module = trainer.modules["up"]
            assert module.scale == pytest.approx(scale)
            right = torch.eye(module.in_features) if module.is_full else module.lora_A[0].detach()
            expected = expected + scale / 2 * module.lora_B[0].detach().double() @ right.double()
        simulation.merge()
        moved = simulation.master.weights["up"].double() - before.double()
        assert (moved - expected).abs().max() < 1e-6 < 1e-4 < moved.abs().max()


@pytest.mark.parametrize(("merge", "A"), [(m, A) for m, A in MODES if m != "reset"])
@pytest.mark.parametrize("truncate_rank", [None, 2])
def test_both_ends_know_the_same_bits_of_heads_of_different_rank(
    merge: str, A: str, truncate_rank: int | None
) -> None:
    """In int4, with what is left out owed: `Simulation.merge` compares the digests of both ends, and what
    was learnt is in the master or owed. A rank below the truncated one is not truncated."""
    settings = recipe(
        **{
            "lora.merge": merge,
            "lora.A": A,
            "lora.subspace": "disjoint",
            "optimizer.name": "adamw",
            "optimizer.lr": 0.02,
            "compress.factors": "int4",
            "compress.truncate_rank": truncate_rank,
            "compress.dense": "int4",
            "train.local_steps": 3,
            "lora.rotate_every": 100,
        }
    )
    simulation = Simulation(seeded(Net), settings, 3, caps=[Cap(4), Cap(2, scale=3.0), Cap(1)])
    for round_ in range(5):
        simulation.local_steps(mse, batches(3, 3, 8, seed=round_))
        before, _ = whole(simulation)
        start = dict(simulation.master.weights)
        simulation.merge()
        after, _ = whole(simulation)
        lost = max(trainer.lost for trainer in simulation.trainers)
        for name in before:
            moved = (simulation.master.weights[name] - start[name]).norm()
            assert moved > 1e-3
            assert (after[name] - before[name]).norm() <= (3 * lost + 1e-5) * moved
    held = simulation.master.merged
    if merge == "reset-less":
        assert [held[f"w{slot}"]["up/B"].shape for slot in range(3)] == [(1, 16, 4), (1, 16, 2), (1, 16, 1)]


def test_subspaces_of_different_rank_are_disjoint() -> None:
    """A head takes the first rows of its share, of the recipe's rank; server and workers draw the same."""
    settings = recipe(**{"lora.A": "frozen", "lora.subspace": "disjoint", "lora.rank": 2, "lora.heads": 2})
    model = seeded(lambda: Regression(in_features=12))
    caps = [(1, 2), (0, 1), (1, 1)]
    simulation = Simulation(model, settings, 3, caps=caps)
    heads = []
    for trainer, (cap, number) in zip(simulation.trainers, caps, strict=True):
        A = trainer.modules["layer"].lora_A
        given = simulation.master.given_A(trainer.first_head, trainer.heads, trainer.rank, 0)
        assert torch.equal(A, given["layer/A"])
        assert A.shape[:2] == (number, cap or 2)
        heads += list(A)
    for k, one in enumerate(heads):
        assert (one @ one.T - torch.eye(len(one)) * 12 / len(one)).abs().max() < 1e-5
        for other in heads[:k]:
            assert (one @ other.T).abs().max() < 1e-5, "two heads share a direction"


@pytest.mark.parametrize("init", ["semi-orthogonal", "kaiming", "xavier"])
def test_a_shared_subspace_is_that_of_the_first_head(init: lowrank.Init) -> None:
    """Of every draw; a head of a smaller rank has a part of it."""

    def draw(rank: int, head: int, draw: int, subspace: lowrank.Subspace = "shared") -> torch.Tensor:
        return lowrank.draw_A(
            rank, 23, init=init, subspace=subspace, seed=0, module="m", head=head, draw=draw, share=5
        )

    whole = draw(5, 7, 1)
    assert torch.equal(whole, draw(5, 0, 1)) and torch.equal(whole, draw(5, 0, 1, "random"))
    assert not torch.allclose(whole, draw(5, 7, 2), atol=0.1)
    for part in (draw(2, 3, 1), draw(4, 0, 1)):
        scale = part.norm(dim=1) / whole[: len(part)].norm(dim=1)
        assert torch.allclose(part, whole[: len(part)] * scale[:, None], atol=1e-5)


def test_what_heads_of_one_A_add_is_the_mean_of_B() -> None:
    """So with a shared A that is given, of workers of equal ranks, a merge has no more than that rank."""
    settings = recipe(**{"lora.A": "frozen", "lora.subspace": "shared", "lora.heads": 2, "lora.rank": 3})
    simulation = Simulation(seeded(lambda: Regression(in_features=12)), settings, 3)
    before = simulation.master.weights["layer"]
    simulation.local_steps(mse, batches(3, 3, 8, features=12))
    modules = [trainer.modules["layer"] for trainer in simulation.trainers]
    mean = torch.cat([module.lora_B.detach() for module in modules]).double().mean(0)
    simulation.merge()
    moved = (simulation.master.weights["layer"] - before).double()
    assert (moved - 2.0 * mean @ modules[0].lora_A[0].double()).abs().max() < 1e-6
    assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 3


def test_a_joiner_that_waited_has_the_subspace_of_the_version_that_it_begins_with() -> None:
    """Each merge turns A. Whoever owes something keeps its A until that is merged; a joiner owes nothing."""
    settings = recipe(**{"lora.A": "rotating", "lora.subspace": "disjoint", "lora.rank": 2})
    simulation = Simulation(seeded(lambda: Regression(in_features=12)), settings, 2)
    master = simulation.master
    for version in range(1, 4):
        if version == 2:
            joiner = Trainer(
                lte.convert(seeded(lambda: Regression(in_features=12)), settings.lora, "none"),
                settings,
                slot=2,
                version=1,
                base=master.snapshot(),
                base_digest=master.base_digest(),
            )
            simulation.trainers.append(joiner)
        data = batches(2, 1, 8, seed=version, features=12)
        simulation.local_steps(mse, [*data, []][: len(simulation.trainers)])
        simulation.merge(only=[0, 1] if version < 3 else [0])
        assert [trainer.draw for trainer in simulation.trainers] == [version, min(version, 2), version][
            : version + 1
        ]
    simulation.local_steps(mse, [[], [], []])
    heads = [trainer.modules["layer"].lora_A[0] for trainer in simulation.trainers]
    assert (heads[0] @ heads[2].T).abs().max() < 1e-5


@pytest.mark.parametrize(("rank", "share", "features"), [(2, 24, 16), (24, 24, 16), (3, 8, 16)])
def test_a_share_larger_than_the_space_is_cut_too(rank: int, share: int, features: int) -> None:
    A = lowrank.draw_A(
        rank,
        features,
        init="semi-orthogonal",
        subspace="disjoint",
        seed=0,
        module="m",
        head=1,
        draw=0,
        share=share,
    )
    gram = A @ A.T if rank <= features else A.T @ A
    assert (gram - torch.eye(len(gram)) * features / rank).abs().max() < 1e-5


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_one_step_of_adam_moves_the_weight_as_far_whatever_the_rank(rank: int) -> None:
    """By s * lr in each element, root mean square: so the rate of a worker of a smaller rank is right."""
    settings = recipe(**{"lora.rank": 8, "optimizer.name": "adamw", "optimizer.lr": 1e-3})
    model = seeded(lambda: Regression(in_features=64, out_features=5))
    simulation = Simulation(model, settings, 1, caps=[(rank, 0)])
    before = simulation.master.weights["layer"]
    simulation.local_steps(mse, batches(1, 1, 8, features=64))
    simulation.merge()
    moved = (simulation.master.weights["layer"] - before).square().mean().sqrt()
    assert float(moved) == pytest.approx(2.0 * 1e-3, rel=0.1)


@pytest.mark.parametrize("merge", ["reset-less", "reset-b"])
def test_who_comes_back_with_another_rank_has_new_heads(merge: str) -> None:
    """What was merged of the old ones stays in the master, and nothing of it is taken from the new ones."""
    settings = recipe(**{"lora.merge": merge, "compress.factors": "int8", "optimizer.name": "adamw"})
    simulation = Simulation(seeded(Net), settings, 2)
    master = simulation.master
    for round_ in range(2):
        simulation.local_steps(mse, batches(2, 3, 8, seed=round_))
        simulation.merge()
    assert master.merged_of("w1", 1, 4)
    assert master.merged_of("w1", 1, 2) == master.merged_of("w1", 2, 4) == {}
    simulation.trainers[1] = Trainer(
        lte.convert(seeded(Net), settings.lora.capped(2, 0), "none"),
        settings,
        slot=1,
        version=2,
        base=master.snapshot(),
        base_digest=master.base_digest(),
    )
    for round_ in range(2, 4):  # in the second of these what is merged of the new ones is known
        simulation.local_steps(mse, batches(2, 3, 8, seed=round_))
        before, _ = whole(simulation)
        start = dict(master.weights)
        simulation.merge()
        after, _ = whole(simulation)
        for name in before:
            moved = (master.weights[name] - start[name]).norm()
            lost = max(trainer.lost for trainer in simulation.trainers)
            assert (after[name] - before[name]).norm() <= (3 * lost + 1e-5) * moved
    assert master.merged_of("w1", 1, 4) == {}
    assert master.merged_of("w1", 1, 2)


# A server and library users


SETTINGS = {
    "train.rounds": 4,
    "train.local_steps": 2,
    "train.workers": 2,
    "lora.rank": 6,
    "lora.overrides": [{"modules": "down", "rank": 3}],
    "schedule.warmup_steps": 2,
    "worker.heartbeat_s": 0.02,
}


@contextmanager
def serving(folder: Path, **settings: object) -> Iterator[lte.Server]:
    """A server of a small model, in a thread until it is done or the block ends."""
    own = {"run.dir": str(folder), "server.address": f"inprocess://ranks-{next(NAMES)}"}
    with lte.Server(
        seeded(Net), config.replace(Recipe(), **(SETTINGS | own | settings)), display=False
    ) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.stop("enough")
            thread.join(30)


def train(address: str, lora: lte.LoRA, worker_id: str, failures: list[LTEError], scale: float = 0.0) -> None:
    try:
        model = lte.convert(seeded(Net), lora)
        with lte.Worker(model, address, worker_id=worker_id, scale=scale) as worker:
            while not worker.done:
                (batch,) = batches(1, 1, 8, seed=worker.step_index)[0]
                loss = mse(worker._trainer.model, batch)
                loss.backward()
                worker.step(loss)
    except LTEError as error:
        failures.append(error)


def test_models_converted_with_a_smaller_rank_are_welcome(tmp_path: Path) -> None:
    settings = {"lora.heads": 2, "train.batch_size": 8, "train.workers": 3}
    with serving(tmp_path, **settings) as server:
        failures: list[LTEError] = []
        small, other = lte.LoRA(rank=2), lte.LoRA(rank=2, scale=3.0)
        threads = [
            threading.Thread(target=train, args=(server.address, lora, name, failures, scale))
            for name, lora, scale in (("a", server.recipe.lora, 0.0), ("b", small, 0.0), ("c", other, 3.0))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert failures == []
        assert server.finished
    lines = Records.read(tmp_path / METRICS)
    said = {line["message"] for line in lines if line.get("what") == "joined"}
    assert said == {
        "a joined",
        "b joined with 1 head of lora_rank 2",
        "c joined with 1 head of lora_rank 2 and lora_scale 3",
    }
    assert [line["num_merged"] for line in lines if line["kind"] == "round"] == [3] * 4


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        (
            lte.LoRA(rank=7),
            "it trains 1 head of lora_rank 7, the recipe 1 head of lora_rank 6; choose at most",
        ),
        (lte.LoRA(rank=2, heads=2), "it trains 2 heads of lora_rank 2, the recipe 1 head of lora_rank 6;"),
        (lte.LoRA(rank=4), "down.weight is adapted 5x16 on int8, rank 4, .* on the server .* rank 3,"),
        (lte.LoRA(rank=2, scale=3.0), "scale 3, .* on the server .* scale 16,"),
        (lte.LoRA(rank=2, exclude=("up",)), "up.weight is dense 16x6, on the server adapted"),
    ],
    ids=["rank", "heads", "rank of a module", "scale", "modules"],
)
def test_other_heads_are_refused_in_one_line(tmp_path: Path, lora: lte.LoRA, reason: str) -> None:
    with serving(tmp_path) as server:
        with pytest.raises(RefusedError, match=reason) as refused:
            lte.Worker(lte.convert(seeded(Net), lora), server.address)
        assert "\n" not in str(refused.value)
        with pytest.raises(RefusedError, match="it trains 3 heads of lora_rank 9"):
            Session(server.address, heads=3, rank=9)
        with pytest.raises(RefusedError, match=r"its lora_scale is 2e\+06; choose one of 1e\+06 at most"):
            Session(server.address, scale=2e6)
        with pytest.raises(RefusedError, match=r"scale 16, .* on the server .* scale 3,"):
            lte.Worker(lte.convert(seeded(Net), lte.LoRA(rank=2)), server.address, scale=3.0)


# The recipe's task and the command


def test_a_worker_of_the_recipes_task_takes_its_own_rank_and_heads(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{n} bottles of beer on the wall. " for n in range(700)))
    pack([tmp_path / "text.txt"], tmp_path / "shards", num_shards=2)
    settings = {
        "run.dir": str(tmp_path / "run"),
        "data.shards": str(tmp_path / "shards"),
        "server.address": f"inprocess://ranks-{next(NAMES)}",
        "model.num_layers": 1,
        "model.width": 32,
        "model.num_attention_heads": 2,
        "model.mlp_width": 64,
        "model.context_tokens": 16,
        "train.rounds": 2,
        "train.local_steps": 2,
        "train.workers": 1,
        "train.batch_size": 8,
        "lora.rank": 4,
        "lora.heads": 4,
        "eval.final_tokens": 64,
    }
    recipe = config.replace(Recipe(), **settings)
    with recipes.make_server(recipe, display=False) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        with pytest.raises(
            ConfigError, match="--heads: 3 heads cannot share the recipe's batches of 8 equally"
        ):
            recipes.work(server.address, heads=3)
        said: list[str] = []
        recipes.work(server.address, rank=2, heads=2, scale=4.0, recipe=recipe, say=said.append)
        thread.join(30)
        assert said[-1].endswith("finished at version 2")
    joined = [line for line in Records.read(tmp_path / "run" / METRICS) if line.get("what") == "joined"]
    assert joined[-1]["message"].endswith(" joined with 2 heads of lora_rank 2 and lora_scale 4")


def test_the_command_takes_rank_heads_and_scale(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(recipes, "work", lambda address, **named: given.update(named))
    join = ["worker", "--server", "tcp://h:1"]
    assert cli.main([*join, "--rank", "8", "--heads", "2", "--scale", "0.5"]) == 0
    assert (given["rank"], given["heads"], given["scale"]) == (8, 2, 0.5)
    assert cli.main(join) == 0
    assert (given["rank"], given["heads"], given["scale"]) == (0, 0, 0)
    for option, value, reason in (
        ("--rank", "0", "is not a whole number of 1 or more"),
        ("--scale", "0", "is not a number above 0"),
        ("--scale", "nan", "is not a number of 0 or more"),
    ):
        assert cli.main([*join, option, value]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{option}: '{value}' {reason}" in line
