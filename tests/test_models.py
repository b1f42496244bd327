"""Whole rounds of whole models: workers built on the meta device, filled by the server, merged, published."""

import copy
from collections.abc import Callable

import pytest
import torch
from simulation import Simulation, recipe
from torch import nn
from torch.nn import functional as F

import lte
from lte.config import Model
from lte.models import build, initialize, outputs
from lte.worker.trainer import Trainer, materialize

TOKENS, CLASSES = 40, 6


class ConvNet(nn.Module):
    """Convolutions with batch norms, one of them depthwise, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.depth = nn.Sequential(nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.BatchNorm2d(8))
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, CLASSES)
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x - self.mean).relu()
        x = x + self.point(self.depth(x).relu())
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """torch's own encoder and decoder layers, with position embeddings and a class token that are bare."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, 16, padding_idx=0)
        self.positions = nn.Parameter(torch.empty(8, 16).normal_(std=0.1))
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, TOKENS)
        self.register_buffer("causal", torch.ones(8, 8).triu(1).bool())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) + self.positions
        memory = self.encoder(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
        return self.head(self.decoder(x, memory, tgt_mask=self.causal, tgt_is_causal=True))


class TiedMixer(nn.Module):
    """Tokens to logits by one table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(TOKENS, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, TOKENS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.table(tokens)).tanh())


class GPT2(nn.Module):
    """transformers' GPT-2, with its tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        settings = transformers.GPT2Config(
            vocab_size=TOKENS, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        self.gpt = transformers.GPT2LMHeadModel(settings)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.gpt(tokens).logits


def images(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.rand(4, 3, 6, 6, generator=made), torch.randint(CLASSES, (4,), generator=made)


def tokens(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    met = torch.randint(1, TOKENS, (4, 8), generator=torch.Generator().manual_seed(seed))
    return met, met


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, wanted = batch
    return F.cross_entropy(model(x).flatten(0, -2), wanted.flatten())


TIED = {"lora.tied": "adapted", "lora.embeddings": True}
GPT2_HEADS = {**TIED, "lora.exclude": ["*.wpe"]}  # which sees positions, but no batch that heads could share
MODELS = {
    "conv net": (ConvNet, images, {}),
    "transformer": (Transformer, tokens, {"lora.embeddings": True}),
    "tied": (TiedMixer, tokens, TIED),
    "gpt-2": (GPT2, tokens, GPT2_HEADS),
    "gpt-2, tied densely": (GPT2, tokens, {}),
}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


@pytest.mark.parametrize("merge", ["reset-less", "reset-b", "reset"])
@pytest.mark.parametrize("name", MODELS)
def test_rounds_add_the_mean_of_the_deltas_and_publish_what_workers_compute(name: str, merge: str) -> None:
    make, batch, asked = MODELS[name]
    settings = recipe(
        **{
            "lora.merge": merge,
            "lora.heads": 2,
            "base.quant": "nf4",
            "optimizer.name": "adamw",
            "optimizer.lr": 0.01,
            "optimizer.dense_lr": 0.01,
            **asked,
        }
    )
    plain = seeded(make)
    simulation = Simulation(plain, settings, 2)
    master = simulation.master
    for slot in range(2):
        with torch.device("meta"):
            empty = make()
        model = lte.convert(empty, settings.lora, "nf4")
        assert lte.nn.describe(model) == master.plan.describe(settings.lora)
        simulation.trainers[slot] = Trainer(
            model, settings, slot=slot, version=0, base=master.snapshot(), base_digest=master.base_digest()
        )
    first = loss(simulation.trainers[0].model.eval(), batch(0)).item()
    for _ in range(3):
        expected = {site: weight.double() for site, weight in master.weights.items()}
        dense = {site: tensor.double() for site, tensor in master.dense.items()}
        for trainer in simulation.trainers:
            trainer.model.train()
        simulation.local_steps(loss, [[batch(0)] * 8] * 2)
        for trainer in simulation.trainers:
            held = dict(trainer.model.named_parameters()) | dict(trainer.model.named_buffers())
            for parameter in dense:
                ahead = held[parameter].detach().double() - trainer._published[parameter]
                dense[parameter] = dense[parameter] + ahead / 2
            for site, module in trainer.modules.items():
                for h in range(2):
                    D = 2.0 * module.lora_B[h].detach().double() @ module.lora_A[h].detach().double()
                    if module.merged_A is not None:
                        D = D - 2.0 * module.merged_B[h].double() @ module.merged_A[h].double()
                    expected[site] = expected[site] + D / 4
        before = dict(master.weights)
        simulation.merge()
        for site, weight in expected.items():
            assert (master.weights[site] - weight).abs().max() < 1e-5, site
            assert (master.weights[site] - before[site]).abs().max() > 1e-4, site
        for parameter, tensor in dense.items():
            assert (master.dense[parameter] - tensor).abs().max() < 1e-5, parameter
    published = seeded(make).eval()
    master.fill(published, "published")
    for trainer in simulation.trainers:
        met = trainer.model.eval()(batch(1)[0])
        assert (met - published(batch(1)[0])).abs().max() < 1e-4
    assert loss(simulation.trainers[0].model, batch(0)).item() < first - 0.1


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_its_place(name: str) -> None:
    """Adapted, dense or constant: each exactly once, and every buffer too."""
    make, _, asked = MODELS[name]
    model, settings = seeded(make), recipe(**asked)
    decided = lte.nn.plan(model, settings.lora, "nf4")
    placed = [spec.parameter for spec in decided.adapted.values()]
    placed += [*decided.dense, *decided.statistics, *decided.constants]
    named = [n for n, _ in (*model.named_parameters(), *model.named_buffers())]
    assert sorted(placed) == sorted(n for n in named if not n.endswith("num_batches_tracked"))
    assert decided.num_parameters == sum(p.numel() for p in model.parameters())


def test_a_weight_that_transformers_reads_is_trained() -> None:
    """Mamba multiplies with `dt_proj.weight`: with B = 0 the gradient of B is s G A^T, G the plain one's."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    settings = Model(name="transformers", architecture="mamba", config=small, vocab_size=TOKENS)
    plain = materialize(build(settings), torch.device("cpu"))
    initialize(plain, 0)

    def gradients(model: nn.Module) -> None:
        met, wanted = tokens(0)
        logits, _ = outputs(model.train(), met)
        F.cross_entropy(logits.flatten(0, 1), wanted.flatten()).backward()

    model = lte.convert(copy.deepcopy(plain), lte.LoRA(rank=3, scale=1.5), "none")
    gradients(plain)
    gradients(model)
    sites = dict(lte.nn.adapted_modules(model))
    assert "backbone.layers.0.mixer.dt_proj" in sites
    for name, module in sites.items():
        G = plain.get_parameter(f"{name}.weight").grad.double()
        expected = 1.5 * G @ module.lora_A[0].detach().double().T
        assert expected.norm() > 0
        assert (module.lora_B.grad[0] - expected).norm() < 1e-4 * expected.norm(), name
