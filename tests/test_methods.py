"""Methods that are settings of the same machine, against naive loops in plain torch."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from simulation import Simulation, recipe
from torch import nn
from torch.nn import functional as F

import lte
from lte import LoRA, config, quantize, wire
from lte.errors import ConfigError
from lte.nn import adapted_modules
from lte.server import intake, service
from lte.server.master import Master
from lte.worker.trainer import Trainer

SCALE = 2.0


class Net(nn.Module):
    """Two adapted weights, a norm, biases: adapted and dense parameters that interact."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def mse(model: nn.Module, batch: object) -> torch.Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def batches(num_workers: int, steps: int, seed: int, size: int = 8) -> list[list[object]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            (torch.randn(size, 6, generator=generator), torch.randn(size, 5, generator=generator))
            for _ in range(steps)
        ]
        for _ in range(num_workers)
    ]


class NaiveLoRA:
    """`Net` with plain factors beside its two weights: y = x (W + s / H sum_h B_h A_h)^T + b, nothing else.

    Attributes:
        W: the frozen weights. A, B: (H, r, in), (H, out, r) of each. dense: norm and biases.
    """

    def __init__(self, model: nn.Module, starts: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Args: model: plain. starts: the A of each weight to begin with."""
        parameters = {n: p.detach().clone().to(dtype) for n, p in model.named_parameters()}
        self.W = {name: parameters.pop(f"{name}.weight") for name in ("up", "down")}
        self.dense = {name: nn.Parameter(p) for name, p in parameters.items()}
        self.A = {name: nn.Parameter(A.detach().clone().to(dtype)) for name, A in starts.items()}
        self.B = {
            name: nn.Parameter(torch.zeros(A.shape[0], len(self.W[name]), A.shape[1], dtype=dtype))
            for name, A in starts.items()
        }

    def weight(self, name: str) -> torch.Tensor:
        products = torch.einsum("hor,hri->oi", self.B[name], self.A[name])
        return self.W[name] + SCALE / len(self.A[name]) * products

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.W["up"].dtype)
        x = F.linear(x, self.weight("up"), self.dense["up.bias"])
        x = F.layer_norm(x, (16,), self.dense["norm.weight"], self.dense["norm.bias"])
        return F.linear(torch.tanh(x), self.weight("down"), self.dense["down.bias"])

    def loss(self, batch: object) -> torch.Tensor:
        x, y = batch
        return F.mse_loss(self(x), y.to(self.W["up"].dtype))

    def groups(self, lr: float, dense_lr: float) -> list[dict[str, object]]:
        return [
            {"params": [*self.A.values(), *self.B.values()], "lr": lr},
            {"params": list(self.dense.values()), "lr": dense_lr},
        ]

    @property
    def trained(self) -> Iterator[nn.Parameter]:
        yield from (*self.A.values(), *self.B.values(), *self.dense.values())


def starts(simulation: Simulation, worker: int = 0) -> dict[str, torch.Tensor]:
    """The A that a worker holds now, by module."""
    modules = simulation.trainers[worker].modules
    return {name: module.lora_A.detach().clone() for name, module in modules.items()}


def distance(simulation: Simulation, naive: NaiveLoRA, which: str) -> float:
    """The largest difference of what the server measures losses on from a naive model."""
    met = simulation.master.parameters(which)
    expected = {f"{name}.weight": naive.weight(name) for name in naive.W} | naive.dense
    return max(float((met[name] - tensor.detach()).abs().max()) for name, tensor in expected.items())


LORA = {
    "lora.merge": "never",
    "train.workers": 1,
    "optimizer.name": "adamw",
    "optimizer.lr": 0.02,
    "optimizer.dense_lr": 0.01,
    "optimizer.eps": 1e-6,
}


# LoRA


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_lora_is_lora(optimizer: str) -> None:
    """Losses, and what is published after each round, are those of a naive loop over the same batches."""
    simulation = Simulation(net(), recipe(**LORA | {"optimizer.name": optimizer}), 1)
    naive = NaiveLoRA(net(), starts(simulation), torch.float64)
    groups = naive.groups(lr=0.02, dense_lr=0.01)
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    other = torch.optim.SGD(groups) if optimizer == "sgd" else adamw
    model, base = simulation.trainers[0].model, dict(simulation.master.base)
    for round_ in range(4):
        data = batches(1, 5, seed=round_)
        for batch in data[0]:
            loss = naive.loss(batch)
            assert mse(model, batch).item() == pytest.approx(loss.item(), abs=1e-5)
            loss.backward()
            other.step()
            other.zero_grad()
            simulation.local_steps(mse, [[batch]])
        simulation.merge()
        assert distance(simulation, naive, "published") < 1e-5
        assert distance(simulation, naive, "master") < 1e-5
        assert simulation.master.base == base, "the base is that of the start"
    moved = (naive.weight("up") - naive.W["up"]).detach().abs().max()
    assert moved > 0.01, "it did not train: the test is blind"


def test_the_function_of_heads_that_are_never_merged_is_no_other_in_eval_mode() -> None:
    simulation = Simulation(net(), recipe(**LORA, **{"lora.dropout": 0.5}), 1)
    simulation.local_steps(mse, batches(1, 5, seed=1))
    simulation.merge()
    model, x = simulation.trainers[0].model.eval(), torch.randn(32, 6)
    published = net()
    simulation.master.fill(published, "published")
    assert torch.allclose(model(x), published(x), atol=1e-5)
    assert (model(x) - net()(x)).abs().max() > 0.01, "it did not train: the test is blind"
    assert torch.allclose(model.up.weight, published.up.weight, atol=1e-6)


@pytest.mark.parametrize("A", ["trained", "frozen"])
def test_qlora_owes_what_its_codec_leaves_out(A: str) -> None:
    """On a quantized base, sent in 4 bits: what is published is the base of the start with the factors as
    the server knows them, and these follow the worker's own."""
    settings = recipe(**LORA, **{"lora.A": A, "base.quant": "nf4", "compress.factors": "int4"})
    simulation = Simulation(net(), settings, 1)
    trainer, base = simulation.trainers[0], dict(simulation.master.base)
    for round_ in range(3):
        simulation.local_steps(mse, batches(1, 5, seed=round_))
        simulation.merge()
        assert trainer.merged_digest() == simulation.master.merged_digest("w0", 1, 4)
    known = simulation.master.merged_of("w0", 1, 4)
    for name, module in trainer.modules.items():
        assert simulation.master.base[name] is base[name]
        sent = SCALE * known[f"{name}/B"][0] @ known[f"{name}/A"][0]
        published = simulation.master.parameters("published")[f"{name}.weight"]
        assert torch.allclose(published, quantize.dequantize(base[name]) + sent, atol=1e-6)
        left_out = (module.lora_B - known[f"{name}/B"]).abs().max()
        assert 0 < left_out < 0.2 * module.lora_B.abs().max()
    before = {name: module.lora_B.clone() for name, module in trainer.modules.items()}
    for _ in range(6):  # without further steps what is owed arrives
        simulation.merge()
    for name, module in trainer.modules.items():
        assert torch.equal(module.lora_B, before[name]), "a worker's own heads are never touched"
        left_out = (module.lora_B - simulation.master.merged_of("w0", 1, 4)[f"{name}/B"]).abs().max()
        assert left_out < 1e-4 * module.lora_B.abs().max()


@pytest.mark.parametrize("method", ["lora", "fedlora"])
def test_rounds_of_other_lengths_are_trained_by_the_same_heads(method: str) -> None:
    """A phase of other local steps alone leaves the very parameters that are averaged, or known."""
    settings = {"lora": LORA, "fedlora": FEDLORA}[method] | {
        "train.phases": [{"from_round": 1, "local_steps": 2}]
    }
    recipe_, num_workers = recipe(**settings), 3 if method == "fedlora" else 1
    simulation = Simulation(net(), recipe_, num_workers)
    before = starts(simulation)
    for round_ in range(3):
        simulation.local_steps(mse, batches(num_workers, 2, seed=round_))
        simulation.merge()
    for name, module in simulation.trainers[0].modules.items():
        published = simulation.master.parameters("published")[f"{name}.weight"]
        assert torch.allclose(module.published_weight, published, atol=1e-5)
        assert not torch.equal(module.lora_A, before[name])


def test_nothing_but_dense_changes_is_published_of_lora() -> None:
    simulation = Simulation(net(), recipe(**LORA), 1)
    simulation.local_steps(mse, batches(1, 5, seed=0))
    simulation.merge()
    before = simulation.master.requantize()
    changes = [change for _, change in simulation.master.changes_since(before)]
    assert [(change.codes.numel(), change.scales.numel()) for change in changes] == [(1, 1)] * 2


def test_whoever_comes_goes_on_with_heads_that_are_never_merged() -> None:
    """Another worker's name, no state: it adopts what the server knows, and computes what it publishes."""
    first = Simulation(net(), recipe(**LORA), 1)
    first.local_steps(mse, batches(1, 5, seed=0))
    first.merge()
    master = first.master
    master.keep_only([])
    second = Simulation(net(), recipe(**LORA), 2).trainers[1]
    assert second.merged_digest() != master.merged_digest("else", 1, 4)
    second.adopt(master.merged_of("else", 1, 4))
    assert second.merged_digest() == master.merged_digest("else", 1, 4)
    for name, module in second.modules.items():
        assert torch.allclose(
            module.published_weight, master.parameters("published")[f"{name}.weight"], atol=1e-6
        )


def test_who_may_train_heads_that_are_never_merged() -> None:
    """One worker at a time, whoever it is, with heads as the recipe has them; of factors that are averaged
    as many as come."""
    lora, fedlora = recipe(**LORA), recipe(**FEDLORA)
    master = Master(net(), lora)
    for settings in (lora, fedlora):
        for heads, rank, scale, reason in (
            (0, 0, 0.0, ""),
            (1, 4, 0.0, ""),
            (1, 2, 0.0, "it trains 1 head of lora_rank 2, the run's own"),
            (0, 0, 3.0, "it trains 1 head of lora_rank 4 and lora_scale 3, the run's own"),
        ):
            hello = wire.Hello(
                schema=wire.SCHEMA, worker_id="w", session="s", model={}, heads=heads, rank=rank, scale=scale
            )
            refusal = intake.objection(hello, master.plan, settings.lora)
            assert refusal is None if not reason else refusal is not None and reason in refusal[0]
    nested = recipe(**{"lora.nested": "unfrozen", "lora.merge": "reset-less", "train.workers": 1})
    refusal = intake.objection(hello, master.plan, nested.lora)
    assert refusal is not None and "at the recipe's" in refusal[0], "a cut would be of another scale"
    assert service._rules(lora).most_workers == 1
    assert service._rules(fedlora).most_workers == fedlora.server.max_workers
    assert lora.lora.first_head(3) == fedlora.lora.first_head(3) == 0


# Multi-head LoRA

MHLORA = LORA | {"lora.heads": 3, "lora.batch": "whole"}


@pytest.mark.parametrize("mode", ["never", "reset-less", "reset-b"])
def test_multi_head_lora_is_a_mean_over_heads_that_all_see_the_whole_batch(mode: str) -> None:
    """Merged or not: merging the only worker's heads changes no function; in reset-less they stay LoRA's."""
    simulation = Simulation(net(), recipe(**MHLORA | {"lora.merge": mode}), 1)
    naive = NaiveLoRA(net(), starts(simulation), torch.float64)
    optimizer = torch.optim.AdamW(naive.groups(0.02, 0.01), betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    for round_ in range(4):
        data = batches(1, 5, seed=round_)
        for batch in data[0]:
            loss = naive.loss(batch)
            assert mse(simulation.trainers[0].model, batch).item() == pytest.approx(loss.item(), abs=1e-5)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            simulation.local_steps(mse, [[batch]])
        simulation.merge()
        assert distance(simulation, naive, "published") < 1e-5
        assert distance(simulation, naive, "master") < 1e-5
        if mode == "reset-b":
            for name in naive.W:
                naive.W[name] = naive.weight(name).detach()
                naive.B[name].data.zero_()


def test_lte_with_one_step_and_one_batch_for_all_is_multi_head_lora_at_a_higher_rate() -> None:
    """N workers of plain SGD that merge after each step, against N heads on the whole batch and a rate N
    times larger (DESIGN, section 1). Dense parameters have one rate in both."""
    N, lr = 3, 0.05
    common = {"optimizer.name": "sgd", "optimizer.dense_lr": 0.1, "lora.merge": "reset-less"}
    lte = Simulation(net(), recipe(**common, **{"optimizer.lr": lr}), N)
    whole = {"lora.heads": N, "lora.batch": "whole", "optimizer.lr": N * lr}
    mhlora = Simulation(net(), recipe(**common, **whole), 1)
    start = lte.master.weights["up"]
    for step in range(8):
        (own,) = batches(1, 1, seed=step)
        lte.local_steps(mse, [own] * N)
        mhlora.local_steps(mse, [own])
        lte.merge()
        mhlora.merge()
        for name, weight in lte.master.weights.items():
            assert (weight - mhlora.master.weights[name]).abs().max() < 1e-5
    assert (lte.master.weights["up"] - start).abs().max() > 0.01, "it did not train: the test is blind"


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Embedding(8, 6, padding_idx=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site((x * 3).long().clamp(0, 7))


class TiedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site, self.output = nn.Embedding(8, 6), nn.Linear(6, 8, bias=False)
        self.output.weight = self.site.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.site((x * 3).long().clamp(0, 7)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Conv2d(4, 6, 3, padding=1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site(x.repeat(1, 4, 1).view(len(x), 4, -1, 6))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        conv = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.site = conv(5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.site(x)


@pytest.mark.parametrize("kind", [Table, TiedNet, Attention, Conv, Transposed])
@pytest.mark.parametrize("mode", ["reset-less", "never"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_heads_on_the_whole_batch_compute_as_one_of_all_their_ranks(
    kind: type[nn.Module], mode: str, quant: str
) -> None:
    """Output and gradients, in training with dropout and under autocast, and in eval mode."""
    H, r = 3, 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = kind()
        x = torch.rand(5, 6, 6) * 3
    shared = {"merge": mode, "embeddings": True, "tied": "adapted", "dropout": 0.25, "batch": "whole"}
    many = lte.convert(copy.deepcopy(plain), LoRA(**shared, heads=H, rank=r, scale=3.0), quant)
    one = lte.convert(copy.deepcopy(plain), LoRA(**shared, heads=1, rank=H * r, scale=1.0), quant)
    pairs = [(a, b) for (_, a), (_, b) in zip(adapted_modules(many), adapted_modules(one), strict=True)]
    assert pairs
    for seed, (a, b) in enumerate(pairs):
        generator = torch.Generator().manual_seed(seed)
        for name in ("lora_A", "lora_B", "merged_A", "merged_B"):
            if (tensor := getattr(a, name)) is not None:
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
                joined = torch.cat(list(tensor.data), dim=0 if name.endswith("A") else 1)
                getattr(b, name).data.copy_(joined.unsqueeze(0))
        a.dropout_seeds = b.dropout_seeds = [seed]
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = [model(x).float() for model in (many, one)]
        assert torch.allclose(*outputs, atol=0.05 if autocast else 1e-5)
    for model in (many, one):
        model.zero_grad()
        model(x).square().mean().backward()
    for a, b in pairs:
        assert torch.allclose(torch.cat(list(a.lora_A.grad)), b.lora_A.grad[0], atol=1e-5)
        assert torch.allclose(torch.cat(list(a.lora_B.grad), 1), b.lora_B.grad[0], atol=1e-5)
        assert a.lora_B.grad.abs().max() > 1e-4
    evaluated = [model.eval()(x) for model in (many, one)]
    assert torch.allclose(*evaluated, atol=1e-5)
    of_base = copy.deepcopy(many)
    for _, module in adapted_modules(of_base):
        module.lora_B.data.zero_()
    assert torch.allclose(of_base(x), evaluated[0], atol=1e-5) == (mode == "reset-less")


# ReLoRA

RELORA = {
    "train.workers": 1,
    "train.rounds": 4,
    "train.local_steps": 6,
    "lora.merge": "reset",
    "lora.init": "kaiming",
    "lora.prune": 0.6,
    "optimizer.name": "adamw",
    "optimizer.lr": 0.02,
    "optimizer.dense_lr": 0.01,
    "schedule.name": "jagged-cosine",
    "schedule.warmup_steps": 2,
    "schedule.restart_warmup_steps": 3,
}


def jagged(step: int, total: int, period: int, warmup: int, climb: int, final: float) -> float:
    """A cosine after a warmup, which is climbed to again after each period."""
    since = step % period
    reached = step - since + climb - 1 if step >= period and since < climb else step
    if step < warmup:
        return (step + 1) / warmup
    cosine = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (reached - warmup) / (total - warmup)))
    return cosine * (since + 1) / climb if step >= period and since < climb else cosine


@pytest.mark.parametrize("moments", ["prune-magnitude", "prune-random"])
def test_relora_is_relora(moments: str) -> None:
    """Losses and weights of a loop that merges, draws A anew, has B start at zero and prunes both moments of
    both, as the published code does: it keeps what exceeds a quantile of the magnitudes; but first ones
    only beside second ones. The new A, and the places that chance has cleared, are taken from here."""
    simulation = Simulation(net(), recipe(**RELORA, **{"lora.moments": moments}), 1)
    trainer = simulation.trainers[0]
    naive = NaiveLoRA(net(), starts(simulation), torch.float32)
    optimizer = torch.optim.AdamW(naive.groups(0.02, 0.01), betas=(0.9, 0.95), weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: jagged(step, 24, 6, 2, 3, 0.1))
    for round_ in range(4):
        for batch in batches(1, 6, seed=round_)[0]:
            loss = naive.loss(batch)
            assert mse(trainer.model, batch).item() == pytest.approx(loss.item(), abs=1e-5)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            simulation.local_steps(mse, [[batch]])
        simulation.merge()
        assert distance(simulation, naive, "master") < 2e-5
        for name, new_A in starts(simulation).items():
            naive.W[name] = naive.weight(name).detach()
            naive.A[name].data.copy_(new_A)
            naive.B[name].data.zero_()
            for factor in ("lora_A", "lora_B"):
                state = optimizer.state[naive.A[name] if factor == "lora_A" else naive.B[name]]
                own = trainer.optimizer.state[getattr(trainer.modules[name], factor)]
                assert own["step"] == state["step"] == 6 * (round_ + 1), "its bias correction goes on"
                kept = {kind: own[kind] != 0 for kind in ("exp_avg", "exp_avg_sq")}
                if moments == "prune-magnitude":
                    for kind in kept:
                        kept[kind] = state[kind].abs() > torch.quantile(state[kind].abs().flatten(), 0.6)
                    kept["exp_avg"] &= kept["exp_avg_sq"]
                for kind, where in kept.items():
                    state[kind].mul_(where)
                    assert torch.equal(own[kind] != 0, where)
                    assert torch.allclose(own[kind], state[kind], rtol=1e-2, atol=1e-5)
                    assert where.any() and not where.all()


def test_relora_after_a_warm_start() -> None:
    """A round of full rank, then two of ReLoRA: of plain AdamW on the weights, then of a loop that goes on
    with the dense parameters' moments, and has factors and moments of its own after each merge."""
    phases = [
        {"from_round": 0, "full_rank": True, "merge": "reset-b"},
        {"from_round": 1, "full_rank": False, "merge": "reset"},
    ]
    own = {"lora.moments": "prune-magnitude", "train.phases": phases, "schedule.join_warmup_steps": 0}
    simulation = Simulation(net(), recipe(**RELORA, **own), 1)
    trainer = simulation.trainers[0]
    naive = NaiveLoRA(net(), {name: torch.zeros(1, 1, 1) for name in ("up", "down")}, torch.float32)
    naive.A, naive.B = {}, {}
    naive.W = {name: nn.Parameter(W) for name, W in naive.W.items()}
    weights = {"params": list(naive.W.values()), "lr": 0.01}
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([weights, *naive.groups(0.02, 0.01)[1:]], **settings)
    naive.weight = lambda name: naive.W[name] if not naive.B else NaiveLoRA.weight(naive, name)
    for step in range(18):
        (((batch,),),) = ([[b]] for b in batches(1, 1, seed=step)[0])
        for group in optimizer.param_groups:
            peak = 0.02 if any(p is A for p in group["params"] for A in naive.A.values()) else 0.01
            group["lr"] = peak * jagged(step, 24, 6, 2, 3, 0.1)
        loss = naive.loss(batch)
        assert mse(trainer.model, batch).item() == pytest.approx(loss.item(), abs=1e-5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        simulation.local_steps(mse, [[batch]])
        if step % 6 < 5:
            continue
        simulation.merge()
        assert distance(simulation, naive, "master") < 2e-5
        W = {name: naive.weight(name).detach() for name in naive.W}
        before, naive.W = (naive.A, naive.B), W
        naive.A = {name: nn.Parameter(A) for name, A in starts(simulation).items()}
        naive.B = {
            name: nn.Parameter(torch.zeros(A.shape[0], len(W[name]), A.shape[1]))
            for name, A in naive.A.items()
        }
        states = {p: optimizer.state[p] for p in naive.dense.values()}
        for olds, news in zip(before, (naive.A, naive.B), strict=True):
            for name, old in olds.items():
                states[news[name]] = state = optimizer.state[old]
                for kind in ("exp_avg", "exp_avg_sq"):
                    state[kind].mul_(state[kind].abs() > torch.quantile(state[kind].abs().flatten(), 0.6))
                state["exp_avg"].mul_(state["exp_avg_sq"] != 0)
        optimizer = torch.optim.AdamW(naive.groups(0.02, 0.01), **settings)
        optimizer.state.update(states)


def test_what_is_pruned_at_random_is_a_function_of_the_seed() -> None:
    """A worker that is started again prunes the same: both moments at one place, no two heads at the same."""
    settings = {"lora.moments": "prune-random", "lora.heads": 2}
    pruned = []
    for seed in (0, 0, 1):
        simulation = Simulation(net(), recipe(**RELORA, **settings, **{"run.seed": seed}), 1)
        simulation.local_steps(mse, batches(1, 6, seed=0))
        torch.manual_seed(len(pruned))
        simulation.merge()
        (trainer,) = simulation.trainers
        state = trainer.optimizer.state[trainer.modules["up"].lora_B]
        pruned.append(torch.stack([state["exp_avg"], state["exp_avg_sq"]]) == 0)
    assert torch.equal(pruned[0], pruned[1])
    assert not torch.equal(pruned[0], pruned[2])
    first, second = pruned[0]
    assert torch.equal(first, second)
    assert not torch.equal(*first)
    assert 0.5 < first.float().mean() < 0.7


@pytest.mark.parametrize("moments", ["prune-magnitude", "prune-random"])
def test_a_restart_is_no_leap(moments: str) -> None:
    """In the first step after it A's gradient is zero: what is left of moments moves A by a few rates."""
    own = {"lora.moments": moments, "lora.prune": 0.9, "optimizer.lr": 1e-3, "train.rounds": 2}
    simulation = Simulation(net(), recipe(**RELORA | own), 1)
    steps = batches(1, 7, seed=0)[0]
    for batch in steps[:6]:
        simulation.local_steps(mse, [[batch]])
    simulation.merge()
    (trainer,) = simulation.trainers
    before = {name: module.lora_A.detach().clone() for name, module in trainer.modules.items()}
    simulation.local_steps(mse, [[steps[6]]])
    for name, module in trainer.modules.items():
        assert 0 < (module.lora_A - before[name]).abs().max() < 5e-3


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"lora.moments": "prune-random"}, "lora.moments, lora.prune: prune-magnitude or prune-random and"),
        ({"lora.prune": 0.9}, "lora.moments, lora.prune: prune-magnitude or prune-random and a share"),
        (
            {"lora.moments": "prune-random", "lora.prune": 0.9, "lora.merge": "reset-b"},
            "lora.moments: prune-random needs merges that redraw A",
        ),
        (
            {"outer.when": "arrival", "outer.weights": "tokens"},
            "outer.weights: tokens compares contributions that are merged together",
        ),
        (
            {"lora.moments": "prune-magnitude", "lora.prune": 0.9, "optimizer.name": "adamw8bit"},
            "lora.moments: prune-magnitude cannot carry moments of 8 bits",
        ),
    ],
)
def test_what_contradicts_relora_is_one_line(changes: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config.replace(recipe(**{"lora.merge": "reset"}), **changes)
    assert len(raised.value.faults) == 1 and line in raised.value.faults[0]


# FedLoRA

FEDLORA = LORA | {"train.workers": 3, "outer.combine": "factors"}


@pytest.mark.parametrize("A", ["trained", "frozen"])
@pytest.mark.parametrize("weights", ["heads", "tokens"])
@pytest.mark.parametrize("heads", [1, 2])
def test_factor_averaging_is_federated_averaging_of_factors(A: str, weights: str, heads: int) -> None:
    """Against a naive loop: all begin each round with the mean A and the mean B, and keep their moments.
    With a frozen A that is FFA-LoRA."""
    of_heads = {"lora.heads": heads, "lora.batch": "whole"}
    settings = FEDLORA | of_heads | {"lora.A": A, "outer.weights": weights}
    simulation, tokens = Simulation(net(), recipe(**settings), 3), (1, 2, 5)
    shares = [1 / 3] * 3 if weights == "heads" else [t / 8 for t in tokens]
    workers = [NaiveLoRA(net(), starts(simulation), torch.float64) for _ in range(3)]
    for worker in workers:
        for parameter in worker.A.values():
            parameter.requires_grad_(A == "trained")
    adamw = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.0}
    optimizers = [torch.optim.AdamW(worker.groups(0.02, 0.01), **adamw) for worker in workers]
    for round_ in range(3):
        data = batches(3, 4, seed=round_)
        for worker, optimizer, own in zip(workers, optimizers, data, strict=True):
            for batch in own:
                worker.loss(batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        simulation.local_steps(mse, data)
        products = {
            name: sum(s * w.weight(name) for s, w in zip(shares, workers, strict=True))
            for name in ("up", "down")
        }
        for of_all in zip(*(worker.trained for worker in workers), strict=True):
            mean = sum(share * p.detach() for share, p in zip(shares, of_all, strict=True))
            for parameter in of_all:
                parameter.data.copy_(mean)
        simulation.merge(tokens=tokens)
        for which in ("published", "master"):
            assert distance(simulation, workers[0], which) < 1e-5
        for trainer in simulation.trainers:
            for name, module in trainer.modules.items():
                assert torch.allclose(module.published_weight.double(), workers[0].weight(name), atol=1e-5)
        inexact = max(
            float((products[name] - workers[0].weight(name)).detach().abs().max()) for name in products
        )
        assert (inexact < 1e-8) == (A == "frozen"), "else it is no mean of products"
    start = NaiveLoRA(net(), starts(simulation), torch.float64).weight("up")
    assert (workers[0].weight("up") - start).detach().abs().max() > 0.01, "it did not train"


def test_factors_that_are_averaged_in_few_bits_owe_the_rest_both_ways() -> None:
    """What is published, and what its loss is measured of, are the factors as workers hold them."""
    settings = FEDLORA | {"base.quant": "nf4", "compress.factors": "int4", "compress.dense": "int8"}
    simulation = Simulation(net(), recipe(**settings), 3)
    for round_ in range(4):
        simulation.local_steps(mse, batches(3, 4, seed=round_))
        simulation.merge()
    for _ in range(12):  # without further steps what is owed arrives
        simulation.merge()
    for name, weight in simulation.master.weights.items():
        published = simulation.master.parameters("published")[f"{name}.weight"]
        assert torch.allclose(published, weight, atol=1e-4)
        for trainer in simulation.trainers:
            assert torch.allclose(trainer.modules[name].published_weight, published, atol=1e-4)
        assert (weight - quantize.dequantize(simulation.master.base[name])).abs().max() > 0.01


def test_a_worker_that_comes_late_begins_with_the_factors_of_all() -> None:
    """They are what is published, of which the loss is measured; the master's differ while bits are owed."""
    simulation = Simulation(net(), recipe(**FEDLORA | {"compress.factors": "int4"}), 3)
    simulation.local_steps(mse, batches(3, 4, seed=0))
    simulation.merge()
    late = Trainer(
        lte.convert(net(), simulation.recipe.lora, "none"),
        simulation.recipe,
        slot=3,
        version=1,
        base=simulation.master.snapshot(),
        base_digest=simulation.master.base_digest(),
    )
    published, master = (simulation.master.parameters(which) for which in ("published", "master"))
    for name, module in late.modules.items():
        assert torch.allclose(module.published_weight, published[f"{name}.weight"], atol=1e-6)
        assert not torch.allclose(module.published_weight, master[f"{name}.weight"], atol=1e-4)
        assert module.lora_B.abs().max() > 0.001
    simulation.local_steps(mse, batches(3, 4, seed=1))
    gone_wrong, other = simulation.trainers[:2]
    gone_wrong.adopt({})
    for name, module in gone_wrong.modules.items():
        assert torch.allclose(module.published_weight, published[f"{name}.weight"], atol=1e-6), (
            "it starts over with them"
        )
        assert not torch.allclose(
            other.modules[name].published_weight, published[f"{name}.weight"], atol=1e-3
        )


@pytest.mark.parametrize("method", [LORA, FEDLORA])
def test_steps_ahead_of_an_update_stay_owed(method: dict[str, object]) -> None:
    """With overlap, and few bits: nothing of the steps that were taken meanwhile is lost or counts twice."""
    num_workers = int(str(method["train.workers"]))
    settings = method | {"train.overlap": True, "compress.factors": "int4", "optimizer.name": "sgd"}
    simulation = Simulation(net(), recipe(**settings), num_workers)
    for round_ in range(3):
        ahead = batches(num_workers, 2, seed=round_)
        simulation.local_steps(mse, batches(num_workers, 2, seed=10 + round_))
        own = [module.published_weight for t in simulation.trainers for module in t.modules.values()]
        simulation.merge(ahead=lambda ahead=ahead: simulation.local_steps(mse, ahead))
        moved = [module.published_weight for t in simulation.trainers for module in t.modules.values()]
        assert max(float((a - b).abs().max()) for a, b in zip(own, moved, strict=True)) > 1e-3
    for _ in range(12):
        simulation.merge()
    for name, weight in simulation.master.weights.items():
        for trainer in simulation.trainers:
            assert torch.allclose(trainer.modules[name].published_weight, weight, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"outer.combine": "products"},
            "whose heads would never meet; outer.combine = factors averages them",
        ),
        ({"lora.merge": "reset-b"}, "outer.combine: factors are averaged in place of merging, which needs"),
        ({"compress.truncate_rank": 2}, "compress.truncate_rank: is for contributions to products"),
    ],
)
def test_what_contradicts_factor_averaging_is_one_line(changes: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config.replace(recipe(**FEDLORA), **changes)
    assert len(raised.value.faults) == 1 and line in raised.value.faults[0]


# Rules of LoRA's


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train.workers": 4}, "lora.merge: never is for one worker"),
        ({"lora.heads": 2}, "lora.merge: never would leave lora.heads = 2"),
        ({"outer.name": "sgd"}, "lora.merge: never leaves the outer optimizer nothing"),
        ({"outer.weight_decay": 0.1}, "lora.merge: never leaves the outer optimizer nothing"),
        ({"outer.bound_norm": 2.0}, "outer.bound_norm: compares"),
        ({"outer.ema": 0.9, "outer.publish_ema": True}, "outer.publish_ema: cannot be told in heads"),
        ({"lora.A": "rotating"}, "lora.A: rotating needs lora.merge = reset-b, not never"),
        ({"base.keep_initial": True}, "base.keep_initial: is for a master that merges"),
        ({"outer.when": "arrival"}, "lora.merge: never has rounds; outer.when = arrival merges"),
        ({"train.phases": [{"from_round": 9, "rank": 8}]}, "lora.merge: never contradicts train.phases of"),
        ({"train.phases": [{"from_round": 9, "merge": "reset-b"}]}, "lora.merge: never contradicts"),
        ({"train.phases": [{"from_round": 9, "base_quant": "int8"}]}, "lora.merge: never contradicts"),
    ],
)
def test_what_contradicts_lora_is_one_line(changes: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config.replace(recipe(**LORA), **changes)
    assert len(raised.value.faults) == 1 and line in raised.value.faults[0]
