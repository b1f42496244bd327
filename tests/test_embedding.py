"""Heads on embeddings, against independent float64 references."""

import copy

import numpy as np
import pytest
import torch
from simulation import Simulation, recipe
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lte
from lte.config import Model
from lte.errors import ConfigError
from lte.models import GPT, build
from lte.nn import LoRAEmbedding, LoRALinear
from lte.tasks import Text

ROWS = 30


class Table(nn.Module):
    """y = W[tokens]: nothing but one adapted table."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens)


def seeded(kind, *args: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(*args)


def adapted_table(width: int, quant: str, **settings) -> LoRAEmbedding:
    """A converted table whose factors, merged ones too, are random."""
    lora = lte.LoRA(rank=3, scale=1.5, embeddings=True, **settings)
    layer = lte.convert(seeded(Table, width), lora, quant).table
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (layer.lora_A, layer.lora_B, layer.merged_A, layer.merged_B):
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return layer


def deltas(layer: LoRAEmbedding, A: torch.Tensor, B: torch.Tensor) -> list[torch.Tensor]:
    """s (B A - B' A') of each head, in float64."""
    D = [1.5 * B[h] @ A[h] for h in range(layer.heads)]
    if layer.merged_A is not None:
        D = [D[h] - 1.5 * layer.merged_B[h].double() @ layer.merged_A[h].double() for h in range(layer.heads)]
    return D


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
@pytest.mark.parametrize("width", [64, 128, 40])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("merge", ["reset-less", "reset-b"])
def test_the_embedding_computes_the_formula_and_its_gradients(
    quant: str, width: int, heads: int, merge: str
) -> None:
    """Forward and the gradients of A and B against float64 autograd; each head as if it were alone."""
    layer = adapted_table(width, quant, heads=heads, merge=merge)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(ROWS, (6, 7), generator=generator)
    target = torch.randn(6, 7, width, generator=generator)
    met = layer(tokens)
    F.mse_loss(met, target).backward()

    W = layer.published_weight.double()
    A, B = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    weights = [W + D for D in deltas(layer, A, B)]
    slices = zip(tokens.chunk(heads), target.double().chunk(heads), weights, strict=True)
    rows = [(weight[own], wanted) for own, wanted, weight in slices]
    sum(F.mse_loss(y, wanted) for y, wanted in rows).backward()
    assert met.dtype == torch.float32
    assert (met - torch.cat([y for y, _ in rows])).abs().max() < 1e-5
    assert A.grad.abs().max() > 1e-3
    for gradient, expected in ((layer.lora_A.grad, A.grad), (layer.lora_B.grad, B.grad)):
        assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
@pytest.mark.parametrize("width", [64, 40])
def test_in_eval_mode_it_gives_the_published_rows(quant: str, width: int) -> None:
    layer = adapted_table(width, quant, heads=2, merge="reset-less").eval()
    tokens = torch.randint(ROWS, (5, 7), generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(tokens), layer.weight[tokens])
    assert torch.equal(layer(tokens[0, 0]), layer.weight[tokens[0, 0]])
    assert torch.equal(layer(tokens.T), layer.weight[tokens.T])
    assert layer(tokens[:0]).shape == (0, 7, width)


def test_what_it_takes_is_what_nn_embedding_takes() -> None:
    layer = adapted_table(64, "nf4", merge="reset-less")
    tokens = torch.tensor([[3, 29], [0, 3]])
    whole = layer.published_weight + deltas(layer, layer.lora_A.double(), layer.lora_B.double())[0].float()
    for shaped in (tokens, tokens[0], tokens[0, 0], tokens.int(), tokens.T, tokens[:0]):
        assert torch.allclose(layer(shaped), whole[shaped.long()], atol=1e-5)
    for wrong in (-1, ROWS):
        with pytest.raises(IndexError):
            layer(torch.tensor([[wrong]]))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(tokens).dtype == F.embedding(tokens, whole).dtype == torch.float32
    assert (layer.num_embeddings, layer.embedding_dim) == (ROWS, 64)
    with pytest.raises(ConfigError, match="a batch of 3 cannot be cut into 2 equal slices"):
        adapted_table(64, "nf4", heads=2)(torch.zeros(3, 2, dtype=torch.long))


class Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor that any operator gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        met = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        self.elements = max(self.elements, *met, 0)
        return out


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("merge", ["reset-less", "reset-b"])
@pytest.mark.parametrize("width", [64, 192, 100])
def test_no_tensor_of_the_tables_shape_is_made(quant: str, merge: str, width: int) -> None:
    """Except where blocks of the base straddle its rows: there the watch sees one."""
    lora = lte.LoRA(rank=4, heads=2, merge=merge, embeddings=True)
    layer = lte.convert(nn.Sequential(nn.Embedding(1000, width)), lora, quant)
    tokens = torch.randint(1000, (4, 5), generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        layer(tokens).square().sum().backward()
        layer.eval()(tokens)
    assert layer[0].lora_B.grad.abs().max() > 0
    # The largest is the gradient of B, (H, 1000, r).
    assert (largest.elements < 1000 * width) == (width % 64 == 0), largest.elements


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("merge", ["reset-less", "reset-b"])
def test_two_rounds_of_sgd_give_the_formula(heads: int, merge: str) -> None:
    """Three workers, T = 2, in numpy and float64 with the gradients written out.

    For head h with slice (t, y) of n targets G = 2/n sum (W[t] - y) by rows t is the gradient of its
    loss by W, dB = s G A^T and dA = s B^T G.
    """
    workers, lr, s, width, batch = 3, 3.0, 2.0, 6, 8
    settings = recipe(
        **{
            "lora.merge": merge,
            "lora.heads": heads,
            "lora.embeddings": True,
            "train.local_steps": 2,
            "train.batch_size": batch * heads,
            "optimizer.lr": lr,
        }
    )
    simulation = Simulation(seeded(Table), settings, workers)
    W = simulation.master.weights["table"].double().numpy()
    A = [t.modules["table"].lora_A.detach().double().numpy() for t in simulation.trainers]
    B = [np.zeros((heads, ROWS, 4)) for _ in range(workers)]
    merged_A, merged_B = copy.deepcopy(A), copy.deepcopy(B)
    first_A = copy.deepcopy(A)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        data = [
            [
                (
                    torch.randint(ROWS, (batch * heads, 3), generator=generator),
                    torch.randn(batch * heads, 3, width, generator=generator),
                )
                for _ in range(2)
            ]
            for _ in range(workers)
        ]
        D = np.zeros_like(W)
        for w in range(workers):
            for h in range(heads):
                for tokens, targets in data[w]:
                    t, y = (d[batch * h : batch * (h + 1)].numpy() for d in (tokens, targets.double()))
                    effective = W + s * (B[w][h] @ A[w][h] - merged_B[w][h] @ merged_A[w][h])
                    G = np.zeros_like(W)
                    np.add.at(G, t, 2 / y.size * (effective[t] - y))
                    dB, dA = s * G @ A[w][h].T, s * B[w][h].T @ G
                    B[w][h], A[w][h] = B[w][h] - lr * dB, A[w][h] - lr * dA
                D += s * (B[w][h] @ A[w][h] - merged_B[w][h] @ merged_A[w][h])
        before, W = W, W + D / (workers * heads)
        if merge == "reset-b":
            B = [np.zeros_like(b) for b in B]
        merged_A, merged_B = copy.deepcopy(A), copy.deepcopy(B)
        simulation.local_steps(lambda model, given: F.mse_loss(model(given[0]), given[1]), data)
        simulation.merge()
        assert np.abs(W - before).max() > 1e-2, "nothing was merged: the test is blind"
        assert np.abs(simulation.master.weights["table"].double().numpy() - W).max() < 1e-5
        for w, trainer in enumerate(simulation.trainers):
            module = trainer.modules["table"]
            assert np.abs(module.lora_A.detach().numpy() - A[w]).max() < 1e-5
            assert np.abs(module.lora_B.detach().numpy() - B[w]).max() < 1e-5
            if merge == "reset-less":
                assert np.abs(module.merged_A.numpy() - merged_A[w]).max() < 1e-5
                assert np.abs(module.merged_B.numpy() - merged_B[w]).max() < 1e-5
    assert np.abs(A[0] - first_A[0]).max() > 1e-3, "A did not move: the test is blind to it"


def test_what_is_adapted() -> None:
    """Plain tables; none that is tied, shared, frozen, excluded or treats some rows apart."""
    shared = nn.Embedding(10, 6)
    model = nn.ModuleDict(
        {
            "plain": nn.Embedding(10, 6),
            "excluded": nn.Embedding(10, 6),
            "tied": nn.Embedding(10, 6),
            "output": nn.Linear(6, 10, bias=False),
            "shared": shared,
            "again": shared,
            "frozen": nn.Embedding(10, 6),
            "padded": nn.Embedding(10, 6, padding_idx=0),
            "bounded": nn.Embedding(10, 6, max_norm=1.0),
            "by_frequency": nn.Embedding(10, 6, scale_grad_by_freq=True),
            "sparse": nn.Embedding(10, 6, sparse=True),
            "hidden": nn.Linear(6, 6, bias=False),
        }
    )
    model["output"].weight = model["tied"].weight
    model["frozen"].weight.requires_grad_(False)
    overrides = (lte.Override(modules="pl*", rank=3, scale=5.0, init="xavier"),)
    lora = lte.LoRA(rank=2, embeddings=True, exclude=("excl*",), overrides=overrides)
    linear_only = lte.LoRA(rank=2)
    assert list(lte.nn.plan(model, linear_only, "int8").adapted) == ["hidden"]
    decided = lte.nn.plan(model, lora, "int8")
    lte.convert(model, lora, "int8")
    assert {name: type(m) for name, m in lte.nn.adapted_modules(model)} == {
        "plain": LoRAEmbedding,
        "padded": LoRAEmbedding,
        "hidden": LoRALinear,
    }
    table = model["plain"]
    assert (table.rank, table.scale, table.init, model["hidden"].rank) == (3, 5.0, "xavier", 2)
    assert (table.lora_A.shape, table.lora_B.shape) == ((1, 3, 6), (1, 10, 3))
    dense = ["excluded", "tied", "shared", "bounded", "by_frequency", "sparse"]
    assert list(decided.dense) == [f"{name}.weight" for name in dense]
    assert list(dict(lte.nn.dense_parameters(model))) == list(decided.dense)


def test_patterns_that_match_nothing_are_told_what_there_is() -> None:
    def message(lora: lte.LoRA) -> str:
        with pytest.raises(ConfigError) as error:
            lte.convert(nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2)), lora)
        return str(error.value)

    pattern = "lora.modules: 'table'"
    assert (
        f"{pattern} matches nothing that takes heads (embeddings do with lora.embeddings=true); there are: 1"
        in message(lte.LoRA(modules=("table",)))
    )
    asked = lte.LoRA(modules=("table",), embeddings=True)
    assert f"{pattern} matches nothing that takes heads; there are: 0, 1" in message(asked)
    with pytest.raises(ConfigError, match=r"a bare nn\.Embedding has no parent"):
        lte.convert(nn.Embedding(4, 2), lte.LoRA(embeddings=True))


SMALL = Model(num_layers=1, width=64, num_attention_heads=2, mlp_width=64, context_tokens=16)


def gpt(config: Model = SMALL) -> GPT:
    model = GPT(config)
    model.initialize(0)
    return model


def test_server_and_worker_agree_about_the_model() -> None:
    """Decided on the server's plain model, and by the worker on the meta device."""
    settings = recipe(**{"lora.embeddings": True, "base.quant": "nf4"})
    simulation = Simulation(gpt(), settings, 1)
    servers = simulation.master.plan
    worker = lte.convert(build(SMALL), settings.lora, "nf4")
    assert lte.nn.plan_of(worker) == servers
    assert lte.nn.plan_of(simulation.trainers[0].model) == servers
    described = servers.describe(settings.lora)
    assert described["embedding.weight"].startswith("adapted 256x64 on nf4, rank 4, scale 2")
    assert lte.nn.difference(lte.nn.describe(worker), described) == ""
    without = lte.nn.describe(lte.convert(build(SMALL), recipe().lora, "nf4"))
    assert lte.nn.difference(without, described) != ""


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_gpt_with_an_adapted_embedding_learns_and_publishes(quant: str) -> None:
    settings = recipe(
        **{
            "lora.embeddings": True,
            "lora.heads": 2,
            "lora.merge": "reset-less",
            "base.quant": quant,
            "optimizer.name": "adamw",
            "optimizer.lr": 5e-3,
        }
    )
    simulation, task = Simulation(gpt(), settings, 2), Text(settings)
    tokens = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(0))
    model = simulation.trainers[0].model
    start, before = simulation.master.weights["embedding"].clone(), task.loss(model.eval(), tokens).item()
    for _ in range(2):
        for trainer in simulation.trainers:
            trainer.model.train()
        simulation.local_steps(task.loss, [[tokens] * 6] * 2)
        simulation.merge()
    assert task.loss(model.eval(), tokens).item() < before - 0.5
    published = gpt().eval()
    simulation.master.fill(published, "published")
    assert torch.allclose(published(tokens), model(tokens), atol=1e-4)
    assert (simulation.master.weights["embedding"] - start).abs().max() > 1e-2
    assert "embedding.weight" not in simulation.master.dense


def test_a_tied_embedding_stays_dense() -> None:
    tied = lte.convert(gpt(Model(tie_embeddings=True)), lte.LoRA(rank=4, embeddings=True), "int8")
    assert type(tied.embedding) is nn.Embedding
    assert type(tied.output) is nn.Linear
    assert tied.embedding.weight is tied.output.weight
    assert "embedding.weight" in dict(lte.nn.dense_parameters(tied))
