"""A weight that several modules share, adapted once."""

import copy

import pytest
import torch
from simulation import Simulation, recipe
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import lte
from lte.config import Model
from lte.errors import ConfigError
from lte.models import GPT, build
from lte.nn import LoRAEmbedding, LoRALinear
from lte.tasks import Text

SMALL = Model(num_layers=1, width=64, num_attention_heads=2, mlp_width=64, tie_embeddings=True)


class Tied(nn.Module):
    """Tokens to logits by one matrix, which a third module uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(20, 8), nn.Linear(8, 20), nn.Linear(8, 20)
        self.inner.weight = self.out.weight = self.table.weight
        self.mix = nn.Linear(20, 8, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.mix(torch.tanh(self.inner(self.table(tokens))))))


def lora(**settings: object) -> lte.LoRA:
    return lte.LoRA(rank=3, scale=1.5, tied="adapted", **settings)


def seeded() -> Tied:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tied()


@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize(("heads", "merge"), [(1, "reset-b"), (2, "reset-less")])
def test_all_modules_compute_with_the_same_heads(heads: int, merge: str, quant: str) -> None:
    """Against the plain model in float64, whose one matrix is W + s (B A - B' A')."""
    plain = seeded()
    model = lte.convert(copy.deepcopy(plain), lora(heads=heads, merge=merge), quant)
    sites = dict(lte.nn.adapted_modules(model))
    assert list(sites) == ["table", "mix"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in sites.values():
            for tensor in (module.lora_A, module.lora_B, module.merged_A, module.merged_B):
                if tensor is not None:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    tokens = torch.randint(20, (4, 6), generator=generator)
    met = model(tokens)
    F.cross_entropy(met.flatten(0, 1), tokens.flatten()).backward()

    A, B = (
        {site: getattr(m, factor).detach().double().requires_grad_() for site, m in sites.items()}
        for factor in ("lora_A", "lora_B")
    )
    losses = []
    for h in range(heads):
        weights = {n: p.detach().double() for n, p in lte.nn.dense_parameters(model)}
        for site, module in sites.items():
            D = 1.5 * B[site][h] @ A[site][h]
            if module.merged_A is not None:
                D = D - 1.5 * module.merged_B[h].double() @ module.merged_A[h].double()
            weights[f"{site}.weight"] = module.published_weight.double() + D
        own = tokens.chunk(heads)[h]
        expected = functional_call(plain.double(), weights, (own,), strict=True)
        assert (met.chunk(heads)[h] - expected).abs().max() < 1e-5
        losses.append(F.cross_entropy(expected.flatten(0, 1), own.flatten()))
    sum(losses).backward()
    for site, module in sites.items():
        assert A[site].grad.abs().max() > 1e-3
        for gradient, wanted in ((module.lora_A.grad, A[site].grad), (module.lora_B.grad, B[site].grad)):
            assert (gradient - wanted).abs().max() < 1e-5
    published = functional_call(
        plain.float(), {f"{s}.weight": m.published_weight for s, m in sites.items()}, (tokens,)
    )
    assert (model.eval()(tokens) - published).abs().max() < 1e-5


def test_it_counts_once() -> None:
    plain = seeded()
    decided = lte.nn.plan(plain, lora(), "nf4")
    model = lte.convert(copy.deepcopy(plain), lora(), "nf4")
    assert lte.nn.plan_of(model) == decided
    assert decided.num_parameters == sum(p.numel() for p in plain.parameters())
    assert decided.num_adapted_parameters == 2 * 160
    assert list(decided.describe(lora())) == ["table.weight", "mix.weight", "inner.bias", "out.bias"]
    assert [n for n in model.state_dict() if "lora_B" in n] == ["table.lora_B", "mix.lora_B"]
    assert [n for n in dict(model.named_buffers()) if "codes" in n] == ["table.codes", "mix.codes"]
    counts = {kind: len(found) for kind, found in lte.nn.parameter_groups(model).items()}
    assert counts == {"lora_A": 2, "lora_B": 2, "dense": 2}
    again = copy.deepcopy(model)
    assert again.out.adapted is again.table is not model.table


def test_which_tied_weights_are_adapted() -> None:
    """A module under two names; two layers; not what a convolution or an unknown module uses, too."""

    class Own(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

    block = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    model = nn.ModuleDict(
        {
            "first": block,
            "second": block,
            "a": nn.Linear(4, 4),
            "b": nn.Linear(4, 4),
            "known": nn.Linear(4, 4),
            "tables": nn.ModuleList([nn.Embedding(5, 4), nn.Embedding(5, 4)]),
        }
    )
    model["b"].weight = model["a"].weight
    model["tables"][1].weight = model["tables"][0].weight
    model["unknown"] = Own(model["known"].weight)
    assert not lte.nn.plan(model, lte.LoRA(rank=2, embeddings=True), "int8").adapted
    asked = lte.LoRA(rank=2, tied="adapted", exclude=("a",))
    assert list(lte.nn.plan(model, asked, "int8").adapted) == [
        "first.0",
        "first.1.in_proj",
        "first.1.out_proj",
    ]
    overrides = (lte.Override(modules="a", rank=1),)
    asked = lte.LoRA(rank=2, tied="adapted", embeddings=True, overrides=overrides)
    decided = lte.nn.plan(model, asked, "int8")
    assert list(decided.adapted) == ["first.0", "first.1.in_proj", "first.1.out_proj", "a", "tables.0"]
    lte.convert(model, asked, "int8")
    assert lte.nn.plan_of(model) == decided
    assert model["first"][0] is model["second"][0]
    assert model["a"].rank == 1
    assert (type(model["first"][0]), type(model["tables"][0])) == (LoRALinear, LoRAEmbedding)
    assert model["b"].adapted is model["a"]
    pair = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    pair["b"].weight = pair["a"].weight
    with pytest.raises(ConfigError, match=r"lora\.exclude: 'b' matches nothing .*; there are: a, c$"):
        lte.convert(pair, lte.LoRA(rank=2, tied="adapted", exclude=("b",)))


@pytest.mark.parametrize("merge", ["reset-less", "reset-b", "reset"])
def test_a_tied_gpt_goes_through_rounds(merge: str) -> None:
    settings = recipe(
        **{
            "lora.tied": "adapted",
            "lora.heads": 2,
            "lora.merge": merge,
            "base.quant": "nf4",
            "optimizer.name": "adamw",
            "optimizer.lr": 5e-3,
        }
    )
    plain = GPT(SMALL)
    plain.initialize(0)
    simulation = Simulation(plain, settings, 2)
    worker = lte.convert(build(SMALL), settings.lora, "nf4")
    assert lte.nn.describe(worker) == simulation.master.plan.describe(settings.lora)
    tokens = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(0))
    model = simulation.trainers[0].model
    task = Text(settings)
    before = task.loss(model.eval(), tokens).item()
    for _ in range(2):
        for trainer in simulation.trainers:
            trainer.model.train()
        simulation.local_steps(task.loss, [[tokens] * 6] * 2)
        expected = simulation.master.weights["embedding"].double()
        for trainer in simulation.trainers:
            module = trainer.modules["embedding"]
            for h in range(2):
                D = module.lora_B[h].detach().double() @ module.lora_A[h].detach().double()
                if module.merged_A is not None:
                    D -= module.merged_B[h].double() @ module.merged_A[h].double()
                expected = expected + 2.0 * D / 4
        simulation.merge()
        assert (simulation.master.weights["embedding"] - expected).abs().max() < 1e-6
    assert task.loss(model.eval(), tokens).item() < before - 0.3
    published = GPT(SMALL).eval()
    simulation.master.fill(published, "published")
    assert published.output.weight is published.embedding.weight
    assert torch.allclose(published(tokens), model(tokens), atol=1e-4)
