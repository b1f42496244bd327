"""What no gradient trains: constants that the server sends once, and statistics that are averaged."""

import copy
import threading
import warnings
from pathlib import Path

import pytest
import torch
from simulation import Simulation, recipe
from torch import nn
from torch.nn import functional as F

import lte
from lte import config
from lte.compress import CONSTANT, constants
from lte.config import Recipe
from lte.errors import ConfigError, DigestError, WireError
from lte.server import checkpoint
from lte.server.master import Master
from lte.worker.trainer import Trainer


class Fixed(nn.Module):
    """Constants of every sort around one layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(seed)
        self.layer, self.frozen = nn.Linear(6, 5), nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.coarse = nn.Parameter(torch.randn(3, generator=made).bfloat16(), requires_grad=False)
        self.register_buffer("turns", torch.randn(4, generator=made).to(torch.complex64), persistent=False)
        self.register_buffer("mask", torch.ones(3, 3).tril().bool())
        self.register_buffer("positions", torch.arange(5).expand(2, -1))
        self.register_buffer("gain", torch.tensor(2.0 + seed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.frozen(x)) * self.gain


NAMES = ["coarse", "frozen.weight", "frozen.bias", "turns", "mask", "positions", "gain"]


class Net(nn.Module):
    """A small net of convolutions with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, groups=2),
            nn.BatchNorm2d(8),
            nn.Flatten(),
            nn.Linear(72, 4),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


STATISTICS = [f"body.{k}.running_{what}" for k in (1, 4) for what in ("mean", "var")]


def seeded(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind()


def trainer_of(master: Master, model: nn.Module) -> Trainer:
    settings = master.recipe
    return Trainer(
        lte.convert(model, settings.lora, settings.base.quant),
        settings,
        slot=0,
        version=0,
        base=master.snapshot(),
        base_digest=master.base_digest(),
    )


def images(seed: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 8, 8, generator=made) * 2 + 1, torch.randint(4, (size,), generator=made)


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


# Constants


@pytest.mark.parametrize("on_meta", [True, False])
def test_a_worker_gets_the_servers_constants(on_meta: bool) -> None:
    master = Master(seeded(Fixed), recipe())
    assert list(master.plan.constants) == NAMES
    assert [name for name, c in master.plan.constants.items() if not c.persistent] == ["turns"]
    with torch.device("meta" if on_meta else "cpu"):
        model = Fixed()
    if not on_meta:
        model.gain.fill_(7), model.coarse.data.fill_(7), model.frozen.weight.data.fill_(7)
    trainer = trainer_of(master, model)
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in NAMES:
        assert held[name].dtype == master.constants[name].dtype
        assert torch.equal(held[name], master.constants[name]), name
    assert trainer.base_digest() == master.base_digest()
    assert lte.nn.plan_of(model) == master.plan


def test_only_a_whole_snapshot_holds_constants_and_its_digest_covers_them() -> None:
    simulation = Simulation(seeded(Fixed), recipe(), 2)
    master, trainer = simulation.master, simulation.trainers[0]
    assert {name for name in master.snapshot() if name.endswith(CONSTANT)} == {n + CONSTANT for n in NAMES}
    digest = master.base_digest()
    simulation.local_steps(lambda m, x: m(x).square().mean(), [[torch.randn(4, 6)]] * 2)
    trainer.model.gain.fill_(9.0)  # what a model's own forward may do to its buffers
    simulation.merge()
    assert not any(name.endswith(CONSTANT) for name in master.publish_dense())
    assert trainer.base_digest() == master.base_digest() != digest
    assert trainer.model.gain == 9
    snapshot = master.snapshot()
    trainer.apply(2, snapshot, master.base_digest(), merged=False, whole=True)
    assert trainer.model.gain == 2
    for damaged in (
        snapshot | {f"gain{CONSTANT}": constants.encode(torch.tensor(3.0))},
        snapshot | {f"gain{CONSTANT}": constants.encode(torch.tensor([3.0, 3.0]))},
        {name: blob for name, blob in snapshot.items() if name != f"mask{CONSTANT}"},
    ):
        with pytest.raises(DigestError):
            trainer.apply(3, damaged, master.base_digest(), merged=False, whole=True)
    assert trainer.model.gain == 2


def test_a_checkpoint_brings_constants_back(tmp_path: Path) -> None:
    master = Master(seeded(Fixed), recipe())
    progress = checkpoint.Progress(version=0, tokens=0, master_digest="", base_digest=master.base_digest())
    _, state = checkpoint.load(checkpoint.save(tmp_path, progress, master.state(), keep=None))
    other = Master(seeded(lambda: Fixed(seed=1), 5), recipe())
    assert other.base_digest() != master.base_digest()
    other.load_state(state)
    assert other.base_digest() == master.base_digest()
    filled = seeded(lambda: Fixed(seed=2), 6)
    other.fill(filled, "master")
    x = torch.randn(4, 6)
    expected = seeded(Fixed)
    assert torch.allclose(filled(x), expected(x), atol=1e-6)
    assert torch.equal(filled.turns, expected.turns)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(3).to(torch.complex64),
        torch.ones(5).bool(),
        torch.tensor(3),
        torch.ones(0),
    ],
)
def test_a_constant_travels_to_the_bit(tensor: torch.Tensor) -> None:
    blob, shape = constants.encode(tensor), tuple(tensor.shape)
    unaligned = torch.cat([torch.zeros(1, dtype=torch.uint8), blob])[1:]
    assert torch.equal(constants.decode(unaligned, shape, tensor.dtype), tensor)
    for wrong in (torch.cat([blob, blob]), blob[:-1], torch.zeros(40, dtype=torch.uint8)):
        if len(wrong) != len(blob):
            with pytest.raises(WireError):
                constants.decode(wrong, shape, tensor.dtype)


def test_server_and_worker_must_agree_about_constants() -> None:
    servers = lte.nn.plan(seeded(Fixed), lte.LoRA(rank=2), "int8").describe(lte.LoRA(rank=2))
    model = seeded(Fixed)
    model.mask = model.mask.float()
    met = lte.nn.difference(lte.nn.describe(lte.convert(model, lte.LoRA(rank=2), "int8")), servers)
    assert met == "mask is constant float32 3x3, on the server constant bool 3x3"
    del model.gain
    model.mask = model.mask.bool()
    met = lte.nn.difference(lte.nn.describe(model), servers)
    assert met == "gain is missing, on the server constant float32 scalar"


# Buffers that training changes


class OwnNorm(nn.Module):
    """Norms of one's own, of which torch knows nothing: one writes into its buffer, one puts in another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 1)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.5)
                self.var = torch.lerp(self.var, x.var(0), 0.5)
        return self.last(self.first((x - self.mean) / self.var.sqrt()).relu()) * self.gain


def squares(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x[:, :1]).square().mean()


@pytest.mark.parametrize("merge", ["reset-b", "reset-less"])
def test_buffers_that_are_named_are_averaged_and_published(merge: str) -> None:
    asked = {"lora.statistics": ["mean", "v*"], "lora.merge": merge, "train.workers": 2, "base.quant": "none"}
    simulation = Simulation(seeded(OwnNorm), recipe(**asked), 2)
    assert list(simulation.master.plan.statistics) == ["mean", "var"]
    assert list(simulation.master.plan.constants) == ["gain"]
    made = torch.Generator().manual_seed(0)
    naive = [{"mean": torch.zeros(6).double(), "var": torch.ones(6).double()} for _ in range(2)]
    for _ in range(3):
        for _ in range(2):
            batches = [torch.randn(16, 6, generator=made) * 3 + 5 * (worker + 1) for worker in range(2)]
            simulation.local_steps(squares, [[batch] for batch in batches])
            for held, x in zip(naive, batches, strict=True):
                held["mean"] = 0.5 * held["mean"] + 0.5 * x.double().mean(0)
                held["var"] = 0.5 * held["var"] + 0.5 * x.double().var(0)
        simulation.merge()
        mean = {name: (naive[0][name] + naive[1][name]) / 2 for name in naive[0]}
        naive = [dict(mean), dict(mean)]
        published = dict(simulation.master.parameters("published"))
        for name, expected in mean.items():
            assert torch.allclose(published[name].double(), expected, rtol=1e-5)
            for trainer in simulation.trainers:
                assert torch.allclose(trainer.model.get_buffer(name).double(), expected, rtol=1e-5)
    tensors, _ = simulation.trainers[0].state()
    assert torch.equal(tensors["buffer/var"], simulation.trainers[0].model.var)


def test_buffers_that_training_changes_are_told_of() -> None:
    simulation = Simulation(seeded(OwnNorm), recipe(), 1)
    batch = torch.randn(16, 6) + 3
    with pytest.warns(
        UserWarning, match=r"^mean, var: training changes these buffers, .* in lora.statistics$"
    ):
        simulation.local_steps(squares, [[batch]])
    for settings in (recipe(), recipe(**{"lora.statistics": ["mean", "var"]})):
        others = Simulation(seeded(OwnNorm if settings.lora.statistics else Fixed), settings, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            others.local_steps(lambda model, x: model(x).square().mean(), [[batch], [batch]][:1])


@pytest.mark.parametrize("pattern", ["meen", "layer.*"])
def test_a_pattern_of_statistics_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^lora.statistics: '.*' matches no buffer of float32; there are: gain$"
    ):
        Master(seeded(Fixed), recipe(**{"lora.statistics": [pattern]}))


def test_server_and_worker_must_agree_about_statistics() -> None:
    own = lte.LoRA(rank=2, statistics=("mean",))
    servers = lte.nn.plan(seeded(OwnNorm), own, "int8").describe(own)
    met = lte.nn.difference(lte.nn.describe(lte.convert(seeded(OwnNorm), lte.LoRA(rank=2), "int8")), servers)
    assert met == "mean is constant float32 6, on the server averaged 6"


# Frozen by a pattern


def test_what_a_pattern_freezes_is_constant() -> None:
    """Adapted weights and dense ones alike; server and worker agree, and it does not move."""
    settings = recipe(**{"lora.freeze": ["body.6.*", "*.bias"], "optimizer.dense_lr": 0.1})
    plain = seeded(Net)
    simulation = Simulation(plain, settings, 1)
    decided = simulation.master.plan
    frozen = ["body.1.bias", "body.3.bias", "body.4.bias", "body.6.weight", "body.6.bias"]
    assert list(decided.constants) == frozen
    assert list(decided.adapted) == ["body.0", "body.3"]
    assert list(decided.dense) == ["body.1.weight", "body.4.weight"]
    model = simulation.trainers[0].model
    assert lte.nn.plan_of(model) == decided
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    simulation.local_steps(loss, [[images(0), images(1)]])
    simulation.merge()
    for name, parameter in model.named_parameters():
        if not name.endswith("lora_B"):  # which a merge resets
            assert torch.equal(parameter, before[name]) == (name in frozen), name
    assert all(p.requires_grad for p in plain.parameters()), "the server's model is not changed"


def test_a_tied_weight_is_frozen_by_any_of_its_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    decided = lte.nn.plan(model, lte.LoRA(rank=2, tied="adapted", freeze=("b.weight",)), "int8")
    assert (list(decided.constants), list(decided.adapted)) == (["a.weight"], [])


def test_a_pattern_that_freezes_nothing_or_all_is_a_fault() -> None:
    def message(*freeze: str) -> str:
        with pytest.raises(ConfigError) as error:
            lte.convert(seeded(Net), lte.LoRA(rank=2, freeze=freeze))
        return str(error.value)

    assert "lora.freeze: 'body.6.wight' matches no parameter, did you mean body.6.weight?" in message(
        "body.6.wight", "*.bias"
    )
    assert "'xyz' matches no parameter; there are: body.0.weight, body.1.weight," in message("xyz")
    assert message("*") == "lora.freeze: leaves nothing to train"


# Statistics


@pytest.mark.parametrize("merge", ["reset-less", "reset-b"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"compress.dense": "int4"},
        {"outer.name": "sgd", "outer.momentum": 0.9, "outer.dense": True},
        {"outer.name": "adam", "outer.lr": 0.01, "outer.dense": True},
    ],
)
def test_statistics_are_averaged(merge: str, settings: dict[str, object]) -> None:
    """Exactly, whatever codec and outer optimizer the dense parameters have; counters stay local."""
    changed = recipe(**{"lora.merge": merge, "base.quant": "nf4", "lora.heads": 2, **settings})
    simulation = Simulation(seeded(Net), changed, 3)
    master = simulation.master
    assert list(master.plan.statistics) == STATISTICS
    assert not master.plan.constants
    assert master.plan.num_parameters == sum(p.numel() for p in seeded(Net).parameters())
    for round_ in range(3):
        data = [[images(100 * round_ + 10 * w + t) for t in range(2)] for w in range(3)]
        simulation.local_steps(loss, data)
        local = [copy.deepcopy(dict(t.model.named_buffers())) for t in simulation.trainers]
        before = {name: master.dense[name].clone() for name in STATISTICS}
        simulation.merge()
        for name in STATISTICS:
            mean = torch.stack([buffers[name].double() for buffers in local]).mean(0)
            assert (before[name] - mean).abs().max() > 1e-2
            assert (master.dense[name] - mean).abs().max() < 1e-5
            for trainer in simulation.trainers:
                held = dict(trainer.model.named_buffers())[name]
                assert torch.equal(held, master.published_dense[name])
                assert (held - mean).abs().max() < 1e-5
    assert all(t.model.body[1].num_batches_tracked == 6 for t in simulation.trainers)
    published = seeded(Net, 9).eval()
    master.fill(published, "published")
    x, _ = images(7)
    assert torch.allclose(simulation.trainers[0].model.eval()(x), published(x), atol=1e-4)


def test_statistics_are_not_averaged_over_versions_again() -> None:
    """An average of the weights goes with the statistics of now, which forget old versions by themselves."""
    changed = recipe(**{"outer.ema": 0.9, "outer.publish_ema": True, "base.quant": "int8"})
    simulation = Simulation(seeded(Net), changed, 2)
    master = simulation.master
    for round_ in range(3):
        simulation.local_steps(loss, [[images(10 * round_ + w)] for w in range(2)])
        simulation.merge()
    assert master.ema.tensors.keys() == {*master.weights, *master.plan.dense}
    average, now = master.parameters("ema"), master.parameters("master")
    same = {name for name, tensor in average.items() if torch.equal(tensor, now[name])}
    assert same == {*STATISTICS, "body.3.bias"}, "which the norm behind it takes out again"
    convolution = average["body.0.weight"]
    assert convolution.shape == (8, 3, 3, 3)
    assert torch.equal(convolution.flatten(1), master.ema.tensors["body.0"])
    master.publish_dense(last=True)
    for name, tensor in master.published_dense.items():
        assert torch.allclose(tensor, average[name], atol=1e-6), name
    model = seeded(Net, 9).eval()
    master.fill(model, "ema")
    assert all(torch.equal(model.get_buffer(name), now[name]) for name in STATISTICS)


def test_statistics_of_a_worker_that_was_not_merged_are_dropped() -> None:
    """Owed as a sum they could become negative: a variance that fell twice by what it fell once."""
    simulation = Simulation(seeded(Net), recipe(), 2)
    for round_ in range(4):
        small = [(x * 1e-3, y) for x, y in (images(round_ * 10 + t) for t in range(8))]
        simulation.local_steps(loss, [small, small])
        simulation.merge(only=[0])
        for trainer in simulation.trainers:
            for name, buffer in trainer.model.named_buffers():
                if name in STATISTICS:
                    assert torch.equal(buffer, simulation.master.published_dense[name])
                    assert not name.endswith("var") or buffer.min() > 0


def test_a_worker_that_starts_again_has_its_statistics_and_counters() -> None:
    simulation = Simulation(seeded(Net), recipe(), 1)
    trainer = simulation.trainers[0]
    simulation.local_steps(loss, [[images(t) for t in range(3)]])
    tensors, numbers = trainer.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    with torch.device("meta"):
        model = Net()
    again = trainer_of(simulation.master, model)
    assert model.body[1].num_batches_tracked == 0
    again.resume(tensors, numbers, merged=False)
    for (name, mine), (_, theirs) in zip(model.named_buffers(), trainer.model.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    assert model.body[1].num_batches_tracked == 3


def test_a_bound_holds_statistics_of_one_worker_but_they_do_not_speak_for_it() -> None:
    """One worker's variances are 1000 times as large: bounded there, and its heads count as ever."""
    settings = recipe(**{"outer.bound_norm": 1.5, "train.workers": 4, "optimizer.lr": 0.05})
    simulation = Simulation(seeded(Net), settings, 4)
    simulation.local_steps(loss, [[images(w)] for w in range(4)])
    poisoned = simulation.trainers[3].model.body[1].running_var
    poisoned.mul_(1000)
    most = max(float(t.model.body[1].running_var.max()) for t in simulation.trainers[:3])
    simulation.merge()
    assert float(simulation.master.dense["body.1.running_var"].max()) < 2 * most
    assert simulation.outcome.bounded.get("w3", 1.0) > 0.5


def test_statistics_must_be_float32() -> None:
    model = seeded(Net)
    model.body[1].running_var = model.body[1].running_var.double()
    with pytest.raises(ConfigError, match=r"body\.1\.running_var: is float64"):
        lte.convert(model, lte.LoRA(rank=2), "int8")


# A server and library users


class Shifted(Net):
    """With a constant that no state dict holds."""

    def __init__(self, mean: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), mean), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - self.mean)


def serve(folder: Path, rounds: int, mean: float) -> dict[str, torch.Tensor]:
    """Train with two workers, whose models are on the meta device; what the master has in the end."""
    settings = config.replace(
        Recipe(),
        **{
            "run.dir": str(folder),
            "server.address": f"inprocess://constants-{rounds}",
            "train.rounds": rounds,
            "train.local_steps": 2,
            "train.workers": 2,
            "lora.rank": 4,
            "lora.freeze": ["body.6.bias"],
            "worker.heartbeat_s": 0.02,
        },
    )
    failures: list[BaseException] = []
    met: list[float] = []

    def train(worker_id: str) -> None:
        try:
            with torch.device("meta"):
                model = Shifted(mean=-1.0)
            model = lte.convert(model, settings.lora, settings.base.quant)
            with lte.Worker(model, server.address, worker_id=worker_id) as worker:
                met.append(float(model.mean[0]))
                while not worker.done:
                    given = loss(model, images(worker.step_index))
                    given.backward()
                    worker.step(given)
        except BaseException as error:
            failures.append(error)

    with lte.Server(seeded(lambda: Shifted(mean)), settings, display=False) as server:
        workers = [threading.Thread(target=train, args=(name,)) for name in ("a", "b")]
        for thread in workers:
            thread.start()
        server.serve()
        for thread in workers:
            thread.join(30)
        assert failures == []
        assert server.finished
        assert len(met) == 2
        assert set(met) == {float(server.master.constants["mean"][0])}
        return server.master.parameters("master") | server.master.constants


def test_a_run_with_norms_and_buffers_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Its constants, too, are the run's, not those of whoever goes on with it."""
    first = serve(tmp_path, 2, mean=1.5)
    then = serve(tmp_path, 4, mean=0.25)
    assert float(first["mean"][0]) == float(then["mean"][0]) == 1.5
    for name in ("body.1.running_mean", "body.1.running_var", "body.0.weight", "body.1.weight"):
        assert not torch.equal(first[name], then[name]), name
    start = dict(seeded(Net).named_parameters())
    assert torch.equal(first["body.6.bias"], start["body.6.bias"])
    assert torch.equal(then["body.6.bias"], start["body.6.bias"])
