"""Settings that change in the run, by round."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from simulation import Simulation, recipe
from test_algorithm import Net, batches, mse, seeded
from torch import nn

import lte
from launch import local
from lte import config, quantize
from lte.config import Recipe
from lte.cost.model import plan_of, sizes
from lte.data import TrainingStream
from lte.errors import ConfigError
from lte.nn import adapted_modules, fit_heads
from lte.track import METRICS, Records
from lte.worker.trainer import Trainer

NAMES = itertools.count()
Line = dict[str, Any]
Train = Callable[..., list[Line]]


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
            "base.quant": "nf4",
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
    assert all(config.check(recipe.in_round(number)) == [] for number in range(12))


def test_the_settings_of_a_round_say_the_same_of_all_rounds() -> None:
    recipe = phased({"from_round": 3, "local_steps": 2}, {"from_round": 9, "local_steps": 4})
    for number in range(13):
        own = recipe.in_round(number)
        assert own.total_steps == recipe.total_steps
        assert config.check(own) == []
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
    "train.overlap: contradicts train.phases of other heads": [{"from_round": 4, "rank": 3}],
    "train.phases.0.xyz: unknown setting; known here: from_round": [{"from_round": 4, "xyz": 1}],
}


@pytest.mark.parametrize("line", FAULTS)
def test_impossible_phases_are_one_line(line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        phased(*FAULTS[line], **{"train.overlap": True, "train.overlap_steps": 3})
    (met,) = raised.value.faults
    assert met.startswith(line)


def test_full_rank_is_for_reset_b() -> None:
    with pytest.raises(ConfigError, match=r"train\.full_rank: needs lora\.merge = reset-b, not reset-less"):
        phased({"from_round": 0, "full_rank": True, "merge": "reset-less"})
    phases = [{"from_round": 0, "full_rank": True}, {"from_round": 2, "full_rank": False, "merge": "reset"}]
    assert config.check(phased(*phases)) == []


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


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({"train.full_rank": True}, range(6)),
        ({"lora.modules": []}, range(6)),
        (
            {"train.phases": [{"from_round": 0, "full_rank": True}, {"from_round": 2, "full_rank": False}]},
            (0, 1),
        ),
        ({"train.full_rank": True, "outer.when": "arrival", "train.workers": 1}, range(6)),
        ({"outer.when": "arrival", "train.workers": 1}, ()),
    ],
)
def test_the_rate_that_is_told_is_one_that_something_has(
    train: Train, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], dense: Sequence[int]
) -> None:
    """lora_B's, or that of dense parameters where no head of a rank is trained."""
    rates: dict[tuple[int, int], dict[str, float]] = {}
    step = Trainer.step

    def stepping(trainer: Trainer) -> None:
        place = trainer.round, trainer.local_step
        step(trainer)
        names = {parameter: name for name, parameter in trainer.model.named_parameters()}
        rates[place] = {
            names[p].rpartition(".")[2]: group["lr"]
            for group in trainer.optimizer.param_groups
            for p in group["params"]
        }

    monkeypatch.setattr(Trainer, "step", stepping)
    own = {
        "optimizer.name": "adamw",
        "optimizer.lr": 0.002,
        "optimizer.dense_lr": 0.03,
        "schedule.final": 0.3,
        "schedule.join_warmup_steps": 0,
        "lora.merge": "reset-b",
    }
    lines = of_kind(train(**own, **settings), "round")
    expected = [rates[number, 1]["weight" if number in dense else "lora_B"] for number in range(6)]
    assert [line["lr"] for line in lines] == pytest.approx(expected)
    assert all((rate > 0.002) == (number in dense) for number, rate in enumerate(expected))


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


# Heads


CHANGES = {
    "more rank": {"rank": 6},
    "less rank": {"rank": 2},
    "reset-less": {"merge": "reset-less"},
    "reset-b": {"merge": "reset-b"},
    "reset": {"merge": "reset"},
    "both": {"rank": 5, "merge": "reset-b"},
}


def effective(trainer: Trainer, name: str) -> torch.Tensor:
    """The weight that a worker of one head trains with, in float64."""
    module = trainer.modules[name]
    weight = quantize.dequantize(module.base).double()
    A, B = module.lora_A[0].detach().double(), module.lora_B[0].detach().double()
    weight = weight + module.scale * B @ A
    if module.merged_A is not None and module.merged_B is not None:
        weight -= module.scale * module.merged_B[0].double() @ module.merged_A[0].double()
    return weight


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("A", ["trained", "frozen"])
@pytest.mark.parametrize("merge", ["reset-less", "reset-b", "reset"])
def test_merges_add_the_mean_of_the_deltas_on_both_sides_of_a_change(
    merge: str, A: str, change: dict[str, Any]
) -> None:
    """Naively in float64, with AdamW; worker 1 misses the merge before the change and still owes after it."""
    if A == "frozen" and "reset" in (merge, change.get("merge")):
        return
    phases = [{"from_round": 2, **change}]
    settings = recipe(
        **{
            "train.phases": phases,
            "lora.merge": merge,
            "lora.A": A,
            "optimizer.name": "adamw",
            "optimizer.lr": 0.02,
        }
    )
    simulation = Simulation(seeded(Net), settings, 2)
    for version in range(1, 6):
        simulation.local_steps(mse, batches(2, 3, 8, seed=version))
        merged = [0] if version == 2 else [0, 1]
        expected = {name: weight.double() for name, weight in simulation.master.weights.items()}
        for name, weight in expected.items():
            for slot in merged:
                published = quantize.dequantize(simulation.trainers[slot].modules[name].base).double()
                weight += (effective(simulation.trainers[slot], name) - published) / 2
        before = dict(simulation.master.weights)
        simulation.merge(only=merged)
        for name, weight in simulation.master.weights.items():
            assert (weight.double() - expected[name]).abs().max() < 1e-6
            assert (weight - before[name]).abs().max() > 1e-3, "nothing was merged"
        now = settings.in_round(version).lora
        for module in simulation.trainers[0].modules.values():
            assert module.lora_A.shape[1] == module.lora_B.shape[2] == module.rank == now.rank
            assert (module.merged_A is not None) == (now.merge == "reset-less")


@pytest.mark.parametrize("codec", ["fp32", "int4"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("merge", ["reset-less", "reset-b"])
@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "too late"])
def test_what_a_worker_owes_when_its_heads_change_is_kept_or_said_to_be_lost(
    merge: str, change: dict[str, Any], codec: str, is_merged: bool
) -> None:
    phases = [{"from_round": 2, **change}]
    settings = recipe(
        **{"train.phases": phases, "lora.merge": merge, "compress.factors": codec, "optimizer.lr": 0.3}
    )
    simulation = Simulation(seeded(Net), settings, 2)
    trainer = simulation.trainers[1]
    for round_ in range(2):
        simulation.local_steps(mse, batches(2, 3, 8, seed=round_))
        if round_ == 0:
            simulation.merge()
    # The same round without a change, to compare with.
    like = copy.deepcopy(simulation)
    like.master.recipe = config.replace(settings, **{"train.phases": []})
    for one in like.trainers:
        one.recipe = like.master.recipe
    for each in (simulation, like):
        each.merge(only=[0, 1] if is_merged else [0])
    other = like.trainers[1]
    assert torch.equal(simulation.master.weights["up"], like.master.weights["up"])
    lost = sum(
        float((effective(trainer, name) - effective(other, name)).square().sum()) / 2.0**2
        for name in trainer.modules
    )
    left_out, total = trainer._lost_ahead
    assert lost == pytest.approx(left_out, rel=1e-3, abs=1e-9)
    owes = sum(
        float((effective(other, n) - quantize.dequantize(other.modules[n].base)).square().sum())
        for n in other.modules
    )
    assert (owes < 1e-9) == (is_merged and codec == "fp32")
    if codec == "fp32" and (is_merged or change.get("rank", 4) >= 4) and (is_merged or merge == "reset-b"):
        assert lost < 1e-9, "the rows of A can hold it"
    assert lost <= total


@pytest.mark.parametrize("rank", [2, 6])
def test_trained_rows_and_their_moments_are_kept(rank: int) -> None:
    settings = recipe(
        **{"train.phases": [{"from_round": 1, "rank": rank}], "optimizer.name": "adamw", "optimizer.lr": 0.05}
    )
    simulation = Simulation(seeded(Net), settings, 1)
    (trainer,) = simulation.trainers
    simulation.local_steps(mse, batches(1, 3, 8))
    module, state = trainer.modules["up"], trainer.optimizer.state
    A = module.lora_A.detach().clone()
    of_A, of_B = (state[p]["exp_avg_sq"].clone() for p in (module.lora_A, module.lora_B))
    simulation.merge()
    kept = min(rank, 4)
    assert torch.equal(module.lora_A[:, :kept], A[:, :kept])
    assert torch.equal(state[module.lora_A]["exp_avg_sq"][:, :kept], of_A[:, :kept])
    assert torch.equal(state[module.lora_B]["exp_avg_sq"][..., :kept], of_B[..., :kept])
    assert not state[module.lora_A]["exp_avg_sq"][:, kept:].any()
    assert module.lora_A[:, kept:].abs().sum(-1).gt(0).all(), "further rows are drawn"
    assert float(state[module.lora_A]["step"]) == 3.0


def test_a_capped_worker_keeps_its_bound_and_joiners_have_the_heads_of_the_round() -> None:
    """Ranks 4, 7, 2 by phase, on workers that may have 3 at most, or all."""
    phases = [{"from_round": 1, "rank": 7}, {"from_round": 2, "rank": 2}]
    simulation = Simulation(
        seeded(Net), recipe(**{"train.phases": phases, "lora.A": "frozen"}), 2, caps=[(3, 0), (0, 0)]
    )
    ranks = []
    for version in range(1, 4):
        ranks.append([trainer.modules["up"].rank for trainer in simulation.trainers])
        joiner = Trainer(
            lte.convert(seeded(Net), simulation.master.recipe.as_built.lora, "none"),
            simulation.master.recipe,
            slot=1,
            version=version - 1,
            base=simulation.master.snapshot(),
            base_digest=simulation.master.base_digest(),
        )
        other = simulation.trainers[1]
        assert torch.equal(joiner.modules["up"].lora_A, other.modules["up"].lora_A)
        simulation.local_steps(mse, batches(2, 2, 8, seed=version))
        simulation.merge()
    assert ranks == [[3, 4], [3, 7], [2, 2]]


def test_disjoint_and_stabilized_heads_of_another_rank() -> None:
    phases = [{"from_round": 1, "rank": 3}]
    settings = recipe(
        **{
            "train.phases": phases,
            "lora.rank": 2,
            "lora.A": "frozen",
            "lora.subspace": "disjoint",
            "lora.scaling": "rank-stabilized",
            "lora.alpha": 4.0,
        }
    )
    simulation = Simulation(seeded(Net), settings, 2)
    for round_ in range(3):
        simulation.local_steps(mse, batches(2, 2, 8, seed=round_))
        simulation.merge()
    one, two = (trainer.modules["up"] for trainer in simulation.trainers)
    assert one.lora_A.shape == (1, 3, 6)
    assert (one.lora_A[0] @ two.lora_A[0].T).abs().max() < 1e-5
    assert one.scale == simulation.master.plan.adapted["up"].scale == pytest.approx(4 / 3**0.5)


def test_heads_that_are_reset_no_more_keep_the_last_A_that_was_drawn() -> None:
    phases = [{"from_round": 2, "merge": "reset-b"}, {"from_round": 4, "merge": "reset"}]
    settings = recipe(**{"train.phases": phases, "lora.merge": "reset", "optimizer.lr_A": 0.0})
    simulation = Simulation(seeded(Net), settings, 2)
    draws, As = [], []
    for round_ in range(6):
        simulation.local_steps(mse, batches(2, 2, 8, seed=round_))
        draws.append(simulation.trainers[0].draw)
        As.append(simulation.trainers[0].modules["up"].lora_A.detach().clone())
        simulation.merge()
    assert draws == [0, 1, 2, 2, 2, 5]
    assert torch.equal(As[2], As[4])
    assert not torch.equal(As[4], As[5])


# Full rank


FULL = {"train.full_rank": True, "optimizer.name": "adamw", "optimizer.dense_lr": 0.01}


def test_full_rank_is_local_training_of_all_weights_averaged() -> None:
    """Against plain copies of the model, AdamW on all parameters, and the mean of what they learnt."""
    simulation = Simulation(seeded(Net), recipe(**FULL), 2)
    plain = seeded(Net)
    copies = [copy.deepcopy(plain) for _ in range(2)]
    optimizers = [
        torch.optim.AdamW(c.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0) for c in copies
    ]
    for round_ in range(3):
        data = batches(2, 4, 8, seed=round_)
        for model, optimizer, own in zip(copies, optimizers, data, strict=True):
            for batch in own:
                optimizer.zero_grad()
                mse(model, batch).backward()
                optimizer.step()
        with torch.no_grad():
            for parameters in zip(*(model.parameters() for model in copies), strict=True):
                mean = sum(parameters) / 2
                for parameter in parameters:
                    parameter.copy_(mean)
        simulation.local_steps(mse, data)
        simulation.merge()
        master = simulation.master.parameters("master")
        for name, parameter in copies[0].named_parameters():
            assert (master[name] - parameter).abs().max() < 2e-6, name
    assert (master["up.weight"] - seeded(Net).up.weight).abs().max() > 0.02


class Wide(nn.Module):
    """A weight of 4,096 elements and more, from where on bitsandbytes keeps 8 bits of a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


class Zoo(nn.Module):
    """Every kind of module that can have heads."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(7, 8, padding_idx=0), nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(24, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(self.conv(x.view(len(x), 4, 2, -1)).flatten(1)[:, :24])


@pytest.mark.parametrize("heads", [1, 2])
def test_every_kind_of_module_trains_at_full_rank(heads: int) -> None:
    """The output and the gradient of each B are the plain model's, on its own slice of the batch."""
    lora = lte.LoRA(rank=2, heads=heads, embeddings=True)
    plain = seeded(Zoo)
    model = lte.convert(copy.deepcopy(plain), lora, "none")
    fit_heads(model, lora, 2, full_rank=True)
    tokens = torch.randint(7, (4, 4), generator=torch.Generator().manual_seed(0))
    target = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model.zero_grad()
        output = model(tokens)
        (output - target).square().mean().backward()
        for head, (own, aim) in enumerate(zip(tokens.chunk(heads), target.chunk(heads), strict=True)):
            reference = copy.deepcopy(plain)
            with torch.no_grad():
                for _, module in adapted_modules(model):
                    parameter = reference.get_parameter(module.spec.parameter)
                    parameter += module.lora_B[head].view(parameter.shape)
            expected = reference(own)
            (expected - aim).square().mean().backward()
            assert torch.allclose(output.chunk(heads)[head], expected, atol=1e-5)
            for _, module in adapted_modules(model):
                gradient = reference.get_parameter(module.spec.parameter).grad
                assert torch.allclose(
                    module.lora_B.grad[head], gradient.view(module.lora_B[head].shape), atol=1e-5
                )
        with torch.no_grad():
            for _, module in adapted_modules(model):
                module.lora_B -= 0.1 * module.lora_B.grad


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_after_a_warm_start_heads_begin_on_what_was_learnt(codec: str) -> None:
    """Nothing is owed with fp32; with int8 what is owed goes into B as far as it can."""
    phases = [{"from_round": 2, "full_rank": False, "rank": 3, "base_quant": "int8"}]
    settings = recipe(
        **FULL, **{"train.phases": phases, "compress.dense": codec, "schedule.join_warmup_steps": 2}
    )
    simulation = Simulation(seeded(Net), settings, 2)
    (trainer, _), master = simulation.trainers, simulation.master
    assert trainer.modules["up"].lora_B.shape == (1, 16, 6)
    for round_ in range(2):
        simulation.local_steps(mse, batches(2, 3, 8, seed=round_))
        if round_:
            norm = trainer.dense["norm.weight"]
            moment = trainer.optimizer.state[norm]["exp_avg"].clone()
        simulation.merge()
    module = trainer.modules["up"]
    assert (module.is_full, module.rank, module.scale) == (False, 3, 2.0)
    assert bool(module.lora_B.any()) == (codec != "fp32")
    assert trainer.lost == 0.0
    assert (trainer._lost_ahead[0] > 0) == (codec != "fp32"), "rank 3 cannot hold all of it"
    assert torch.equal(master.base["up"].codes, quantize.quantize(master.weights["up"], "int8").codes)
    assert torch.equal(trainer.optimizer.state[norm]["exp_avg"], moment), "dense parameters keep theirs"
    assert module.lora_B not in trainer.optimizer.state
    before = {name: weight.clone() for name, weight in master.weights.items()}
    rates = []
    for _ in range(3):
        simulation.local_steps(mse, batches(2, 1, 8, seed=7))
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == [0.5 * rates[2], rates[2], rates[2]], "heads that are new are warmed up"
    expected = {
        name: before[name].double()
        + sum(effective(t, name) - quantize.dequantize(t.modules[name].base) for t in simulation.trainers) / 2
        for name in before
    }
    simulation.merge()
    for name, weight in master.weights.items():
        assert (weight - expected[name]).abs().max() < 1e-6
        assert (weight - before[name]).abs().max() > 1e-3


def test_heads_may_become_of_full_rank_and_lose_nothing() -> None:
    phases = [{"from_round": 1, "full_rank": True}]
    settings = recipe(**{"train.phases": phases, "optimizer.lr": 0.3})
    simulation = Simulation(seeded(Net), settings, 2)
    simulation.local_steps(mse, batches(2, 3, 8))
    trainer = simulation.trainers[1]
    owed = {
        name: effective(trainer, name) - quantize.dequantize(m.base) for name, m in trainer.modules.items()
    }
    simulation.merge(only=[0])
    for name, module in trainer.modules.items():
        assert module.lora_B.shape == (1, *module.spec.shape)
        assert torch.allclose(module.lora_B[0].double(), owed[name], atol=1e-6)


def test_an_optimizer_over_the_parameters_cannot_follow_to_full_rank() -> None:
    master = Simulation(seeded(Net), recipe(**FULL), 1).master
    model = lte.convert(seeded(Net), lte.LoRA(rank=4), "none")
    with pytest.raises(ConfigError, match="a function that makes the optimizer"):
        Trainer(
            model,
            recipe(**FULL),
            slot=0,
            version=0,
            base=master.snapshot(),
            base_digest=master.base_digest(),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        )


def test_a_run_warms_up_at_full_rank_and_its_bytes_are_counted(train: Train) -> None:
    phases = [
        {"from_round": 0, "full_rank": True, "local_steps": 1},
        {"from_round": 3, "full_rank": False, "local_steps": 4, "rank": 2},
    ]
    lines = train(**{"train.phases": phases, "lora.heads": 2, "eval.every": 1, "log.diagnostics_every": 2})
    rounds = of_kind(lines, "round")
    assert [line["tokens"] for line in rounds] == [2 * 4 * 16 * n for n in (1, 2, 3, 7, 11, 15)]
    up = [line["uplink_factors_bytes"] for line in rounds]
    adapted = of_kind(lines, "event")[0]["num_adapted_parameters"]
    for line in rounds[:3]:  # a byte a weight, and a scale of two bytes for 64 of them, of two heads each
        assert line["uplink_factors_bytes"] <= 2 * 2 * adapted * (1 + 2 / 64) * 1.05
        assert line["uplink_factors_bytes"] > 2 * max(up[3:])
    losses = [line["loss_master"] for line in of_kind(lines, "eval")]
    assert losses[-1] < losses[0]
    assert len(of_kind(lines, "diagnostics")) == 3


def test_the_plan_of_a_round_is_by_its_settings() -> None:
    phases = [
        {"from_round": 3, "full_rank": True},
        {"from_round": 5, "full_rank": False, "base_quant": "none"},
    ]
    all_rounds = phased(*phases, **{"model.width": 32})
    sent = [sizes(now, plan_of(now)).sent for now in map(all_rounds.in_round, (0, 3, 5))]
    size = sizes(all_rounds, plan_of(all_rounds))
    assert sent == [size.sent, size.adapted, size.sent]
    bases = [sizes(now, plan_of(now)).base_bytes for now in map(all_rounds.in_round, (0, 5))]
    assert bases[1] == 4 * size.adapted > bases[0]


@pytest.mark.parametrize("name", ["sgd", "muon", "adamw8bit"])
def test_every_optimizer_goes_on_with_other_heads_and_from_its_state(name: str) -> None:
    """Full rank, then rank 2, then 3; each worker is replaced by one that goes on from its state."""
    phases = [{"from_round": 2, "full_rank": False, "rank": 2}, {"from_round": 4, "rank": 3}]
    settings = recipe(
        **FULL
        | {"train.phases": phases, "optimizer.name": name, "optimizer.momentum": 0.9, "lora.A": "frozen"}
    )
    calm, disturbed = (Simulation(seeded(Wide), settings, 2) for _ in range(2))
    for round_ in range(6):
        for simulation in (calm, disturbed):
            simulation.local_steps(mse, batches(2, 2, 8, seed=round_, features=64))
        saved = [trainer.state() for trainer in disturbed.trainers]
        digest, base = disturbed.master.base_digest(), disturbed.master.snapshot()
        for slot, (tensors, numbers) in enumerate(saved):
            built = disturbed.master.recipe.as_built
            again = Trainer(
                lte.convert(seeded(Wide), built.lora, built.base.quant),
                settings,
                slot=slot,
                version=round_,
                base=base,
                base_digest=digest,
            )
            again.resume({key: tensor.clone() for key, tensor in tensors.items()}, numbers, merged=False)
            disturbed.trainers[slot] = again
        for simulation in (calm, disturbed):
            simulation.merge()
        assert calm.master.master_digest() == disturbed.master.master_digest()
