"""Every kind of module that takes heads, against torch's own in float64 with W + s (B A - B' A') put in."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import lte
from lte.errors import ConfigError
from lte.nn import LoRAConv2d, LoRAEmbedding, LoRALinear, LoRAMultiheadAttention

SCALE = 1.5


class Host(nn.Module):
    """A module with a parent; its first output alone."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layer = make()

    def forward(self, **inputs):
        out = self.layer(*[inputs.pop(n) for n in ("x", "query", "key", "value") if n in inputs], **inputs)
        return out[0] if isinstance(out, tuple) else out


class Renamed(nn.Linear):
    """A subclass that computes what its parent does."""


@dataclass
class Case:
    """A module, what goes in, and which dimension of each input and of the output is the batch."""

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], dict[str, object]]
    batch: dict[str, int] = field(default_factory=lambda: {"x": 0})
    out_batch: int = 0


def normal(*shape: int):
    return lambda generator: {"x": torch.randn(shape, generator=generator)}


def attention(
    *,
    batch_first: bool = True,
    same: str = "qkv",
    kdim: int = 8,
    vdim: int = 8,
    batch: int = 4,
    masks=(),
    **settings,
) -> Case:
    """Attention of 4 attention heads; `same` names the inputs that are one tensor."""
    batch, L, S = 4, 5, 5 if same == "qkv" else 6

    def make() -> nn.Module:
        return nn.MultiheadAttention(8, 4, batch_first=batch_first, kdim=kdim, vdim=vdim, **settings)

    def inputs(generator: torch.Generator) -> dict[str, object]:
        def normal(length: int, width: int) -> torch.Tensor:
            x = torch.randn(batch, length, width, generator=generator)
            return x if batch_first else x.transpose(0, 1).contiguous()

        query = normal(L, 8)
        key = query if same == "qkv" else normal(S, kdim)
        value = key if same in ("qkv", "kv") else normal(S, vdim)
        found: dict[str, object] = {"query": query, "key": key, "value": value}
        if "causal" in masks:
            found["attn_mask"] = torch.ones(L, S).triu(1).bool()
            found["is_causal"] = True
        if "float" in masks:
            found["attn_mask"] = torch.randn(L, S, generator=generator)
        if "each" in masks:
            found["attn_mask"] = torch.randn(batch * 4, L, S, generator=generator)
        if "padding" in masks:
            padding = torch.arange(S)[None] >= torch.arange(batch)[:, None] % 3 + 3
            if "float" in masks or "each" in masks:  # torch wants both masks of one type
                padding = torch.zeros(batch, S).masked_fill(padding, -torch.inf)
            found["key_padding_mask"] = padding
        found["need_weights"] = "weights" in masks
        return found

    at = 0 if batch_first else 1
    dims = {"query": at, "key": at, "value": at, "attn_mask": 0, "key_padding_mask": 0}
    if "each" not in masks:
        del dims["attn_mask"]
    return Case(make, inputs, dims, at)


class Conv1D:
    """transformers' own, if it is installed."""

    def __call__(self) -> nn.Module:
        utils = pytest.importorskip("transformers.pytorch_utils")
        return utils.Conv1D(10, 12)


class Falcon:
    """Falcon's own linear layer, which writes its product down."""

    def __call__(self) -> nn.Module:
        return pytest.importorskip("transformers.models.falcon.modeling_falcon").FalconLinear(12, 10)


def conv(*, x=(4, 6, 9, 8), **settings) -> Case:
    return Case(partial(nn.Conv2d, 6, 8, **settings), normal(*x))


CASES = {
    "linear": Case(partial(nn.Linear, 12, 10), normal(4, 3, 12)),
    "linear_subclass": Case(partial(Renamed, 12, 10, bias=False), normal(4, 12)),
    "linear_not_quantizable": Case(partial(NonDynamicallyQuantizableLinear, 12, 10), normal(4, 3, 12)),
    "falcon_linear": Case(Falcon(), normal(4, 3, 12)),
    "transformers_conv1d": Case(Conv1D(), normal(4, 3, 12)),
    "embedding": Case(
        partial(nn.Embedding, 20, 6, padding_idx=3),
        lambda generator: {"x": torch.randint(2, 5, (4, 7), generator=generator)},
    ),
    "conv": conv(kernel_size=3),
    "conv_strided": conv(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "conv_grouped": conv(kernel_size=3, groups=2, padding=1, bias=False),
    "conv_same": conv(kernel_size=(4, 3), padding="same", dilation=2),
    "conv_valid": conv(kernel_size=1, padding="valid"),
    "conv_reflect": conv(kernel_size=3, padding=(2, 1), padding_mode="reflect"),
    "conv_circular": conv(kernel_size=3, padding="same", padding_mode="circular"),
    "attention": attention(),
    "attention_time_first": attention(batch_first=False),
    "attention_no_bias": attention(bias=False),
    "attention_weights": attention(masks=("weights", "float", "padding")),
    "attention_padding": attention(masks=("padding",)),
    "attention_causal": attention(masks=("causal",)),
    "attention_causal_padding": attention(masks=("causal", "padding")),
    "attention_each": attention(masks=("each", "padding"), batch_first=False),
    "attention_cross": attention(same="kv", masks=("float",)),
    "attention_three": attention(same="", masks=("padding",)),
    "attention_kdim": attention(same="", kdim=6, vdim=10),
    "attention_added": attention(add_bias_kv=True, add_zero_attn=True, masks=("float", "padding")),
}


def converted(case: Case, quant: str, **settings: object) -> tuple[Host, Host, lte.nn.Plan]:
    """A plain and a converted model, with random factors and merged factors, and the plan."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Host(case.make)
        for parameter in plain.parameters():  # torch starts biases at zero
            if parameter.dim() == 1:
                nn.init.normal_(parameter)
    lora = lte.LoRA(rank=3, scale=SCALE, embeddings=True, **settings)
    decided = lte.nn.plan(plain, lora, quant)
    model = lte.convert(copy.deepcopy(plain), lora, quant)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, module in lte.nn.adapted_modules(model):
            for tensor in (module.lora_A, module.lora_B, module.merged_A, module.merged_B):
                if tensor is not None:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
            if isinstance(module, LoRAEmbedding):  # what training never fills
                for tensor in (module.lora_B, module.merged_B):
                    if tensor is not None:
                        tensor[:, 3] = 0
    return plain, model, decided


def plain_shaped(matrix: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """A matrix (out, in) as the parameter: Conv1D's is the only one that lies the other way."""
    if plain.dim() == 2 and matrix.shape != plain.shape:
        return matrix.T
    return matrix.reshape(plain.shape)


def of_slice(case: Case, inputs: dict[str, object], h: int, heads: int) -> dict[str, object]:
    """What head h of so many sees; inputs that are one tensor stay one."""
    cut = {id(v): v.chunk(heads, case.batch[n])[h] for n, v in inputs.items() if n in case.batch}
    return {name: cut.get(id(value), value) for name, value in inputs.items()}


def wide(value: object) -> object:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().double().requires_grad_() if floating else value


@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize(("heads", "merge"), [(1, "reset-b"), (2, "reset-less"), (2, "reset")])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_the_plain_module(
    name: str, heads: int, merge: str, quant: str
) -> None:
    """Each head as if it were alone with its slice; what is dense, and the input, sees the batch's mean."""
    case = CASES[name]
    plain, model, decided = converted(case, quant, heads=heads, merge=merge)
    sites = dict(lte.nn.adapted_modules(model))
    assert sites.keys() == decided.adapted.keys() != set()
    inputs = case.inputs(torch.Generator().manual_seed(2))
    leaves = {
        id(v): v.requires_grad_() for v in inputs.values() if torch.is_tensor(v) and v.is_floating_point()
    }
    met = model(**inputs)
    target = torch.randn(met.shape, generator=torch.Generator().manual_seed(3))
    F.mse_loss(met, target).backward()

    A = {site: module.lora_A.detach().double().requires_grad_() for site, module in sites.items()}
    B = {site: module.lora_B.detach().double().requires_grad_() for site, module in sites.items()}
    doubled = {key: wide(value) for key, value in ((id(v), v) for v in inputs.values())}
    wide_inputs = {n: doubled[id(v)] for n, v in inputs.items()}
    dense = {n: p.detach().double().requires_grad_() for n, p in lte.nn.dense_parameters(model)}
    outputs, losses = [], []
    for h in range(heads):
        weights = dict(dense)
        for site, module in sites.items():
            D = SCALE * (B[site][h] @ A[site][h])
            if module.merged_A is not None:
                D = D - SCALE * (module.merged_B[h].double() @ module.merged_A[h].double())
            W = module.published_weight.double()
            weights[decided.adapted[site].parameter] = W + plain_shaped(D, W)
        y = functional_call(
            plain.double(), weights, kwargs=of_slice(case, wide_inputs, h, heads), strict=True
        )
        outputs.append(y)
        losses.append(F.mse_loss(y, target.double().chunk(heads, case.out_batch)[h]))
    sum(losses).backward()
    assert met.dtype == torch.float32
    assert (met - torch.cat(outputs, case.out_batch)).abs().max() < 1e-5

    def same(gradient: torch.Tensor, expected: torch.Tensor) -> bool:
        return bool((gradient - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1))

    for site, module in sites.items():
        assert A[site].grad.abs().max() > 1e-4
        assert same(module.lora_A.grad, A[site].grad)
        assert same(module.lora_B.grad, B[site].grad)
    for n, parameter in lte.nn.dense_parameters(model):
        assert same(parameter.grad * heads, dense[n].grad)
    for key, leaf in leaves.items():
        assert same(leaf.grad * heads, doubled[key].grad)


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
@pytest.mark.parametrize("name", CASES)
def test_in_eval_mode_it_is_the_plain_module_with_published_weights(name: str, quant: str) -> None:
    case = CASES[name]
    plain, model, decided = converted(case, quant, heads=2)
    weights = {
        decided.adapted[site].parameter: m.published_weight for site, m in lte.nn.adapted_modules(model)
    }
    inputs = case.inputs(torch.Generator().manual_seed(2))
    expected = functional_call(plain.eval(), weights, kwargs=inputs)
    assert (model.eval()(**inputs) - expected).abs().max() < 1e-5
    assert (model.train()(**inputs) - expected).abs().max() > 1e-3, "without heads either: the test is blind"


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_same_before_and_after_and_on_the_meta_device(name: str) -> None:
    case = CASES[name]
    _, model, decided = converted(case, "int8", heads=2)
    assert lte.nn.plan_of(model) == decided
    assert list(lte.nn.plan_of(model).adapted) == list(decided.adapted)
    assert list(lte.nn.plan_of(model).dense) == list(decided.dense)
    with torch.device("meta"):
        empty = Host(case.make)
    lora = lte.nn.lora_of(model)
    assert lte.nn.describe(lte.convert(empty, lora, "int8")) == decided.describe(lora)


def test_attention_gives_its_weights_and_takes_what_has_no_batch() -> None:
    for average in (True, False):
        plain, model, decided = converted(attention(), "none")
        sites = lte.nn.adapted_modules(model)
        weights = {
            decided.adapted[site].parameter.removeprefix("layer."): m.published_weight for site, m in sites
        }
        x = torch.randn(5, 8)
        given = {"average_attn_weights": average}
        for each in (x, x[None]):
            expected = functional_call(plain.layer.eval(), weights, (each, each, each), given)
            met = model.layer.eval()(each, each, each, **given)
            for mine, theirs in zip(met, expected, strict=True):
                assert mine.shape == theirs.shape
                assert (mine - theirs).abs().max() < 1e-6
    with pytest.raises(RuntimeError, match="attn_mask, which is missing"):
        model.layer(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match=r"attn_mask: has the shape \(5, 4\), not \(5, 5\)"):
        model.layer(x, x, x, attn_mask=torch.zeros(5, 4))


def test_attention_drops_out_as_torch_does_in_training_alone() -> None:
    _, model, _ = converted(attention(dropout=0.5), "none")
    x = torch.randn(4, 5, 8)

    def seeded(need_weights: bool) -> torch.Tensor:
        torch.manual_seed(0)
        return model.layer(x, x, x, need_weights=need_weights)[0]

    with torch.random.fork_rng():
        for need_weights in (True, False):
            model.train()
            assert not torch.equal(seeded(need_weights), model.layer(x, x, x, need_weights=need_weights)[0])
            model.eval()
            assert torch.equal(seeded(need_weights), model.layer(x, x, x, need_weights=need_weights)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("exclude", [(), ("*.in_proj",), ("*.out_proj",), ("*.linear1",)])
@pytest.mark.parametrize("gradients", [True, False])
def test_torchs_encoder_computes_the_published_model_also_on_its_fast_path(
    exclude: tuple[str, ...], gradients: bool
) -> None:
    """With a padding mask and no gradients the encoder makes nested tensors and calls one fused kernel."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    plain = nn.TransformerEncoder(layer, 2)
    model = lte.convert(copy.deepcopy(plain), lte.LoRA(rank=2, exclude=exclude), "nf4").eval()
    sites = dict(lte.nn.adapted_modules(model))
    assert len(sites) == (8 if not exclude else 6)
    decided = lte.nn.plan(plain, lte.LoRA(rank=2, exclude=exclude), "nf4")
    assert list(decided.adapted) == list(sites)
    weights = {decided.adapted[site].parameter: m.published_weight for site, m in sites.items()}
    for _, module in sites.items():
        nn.init.normal_(module.lora_B)
    x, padding = torch.randn(3, 6, 16), torch.arange(6)[None] >= torch.tensor([6, 4, 3])[:, None]
    expected = functional_call(plain.train(), weights, (x,), {"src_key_padding_mask": padding})
    with torch.set_grad_enabled(gradients):
        met = model(x, src_key_padding_mask=padding)
    assert (met - expected)[~padding].abs().max() < 1e-5
    trained = model.train()(x, src_key_padding_mask=padding)
    assert (trained - expected)[~padding].abs().max() > 1e-2
    trained.square().mean().backward()
    assert all(module.lora_A.grad.abs().max() > 0 for module in sites.values())


def test_what_takes_no_heads_is_left_alone() -> None:
    class Other(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    class More(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.gain = nn.Parameter(torch.ones(4))

    model = nn.ModuleDict(
        {
            "other": Other(4, 4),
            "more": More(),
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "transposed": nn.ConvTranspose2d(4, 4, 3),
            "plain": nn.Linear(4, 4),
            "conv": nn.Conv2d(1, 4, 3),
        }
    )
    before = dict(model.named_parameters())
    lte.convert(model, lte.LoRA(rank=2), "int8")
    assert {name for name, _ in lte.nn.adapted_modules(model)} == {"plain", "conv"}
    dense = dict(lte.nn.dense_parameters(model))
    assert dense.keys() == before.keys() - {"plain.weight", "conv.weight"}


class Scaled(nn.Linear):
    """Others call what it adds."""

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return self(x) * 3


class Marked(nn.Linear):
    """Others read what each one holds."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.gain, self._private = 3.0, 2


class Around(nn.MultiheadAttention):
    def both(self, x: torch.Tensor) -> torch.Tensor:
        return self(x, x, x)[0]


class Using(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaled, self.marked, self.around = Scaled(4, 4), Marked(), Around(4, 2)
        self.table, self.plain = type("Table", (nn.Embedding,), {"size": 5})(5, 4), nn.Linear(4, 4)
        self.plain.MARK = 1

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.around.both(self.scaled.scaled(self.table(tokens % self.table.size)))
        return self.plain(self.marked(x) * self.marked.gain)


def test_what_a_subclass_adds_is_not_lost() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, tokens = Using(), torch.arange(8).view(2, 4)
        expected = model(tokens)
        lora = lte.LoRA(rank=2, embeddings=True)
        why = {
            "Scaled has scaled of its own, which would be lost": ["scaled"],
            "Marked has gain of its own, which would be lost": ["marked"],
            "Around has both of its own, which would be lost": ["around"],
            "Table has size of its own, which would be lost": ["table"],
        }
        assert lte.nn.without_heads(model, lora) == why
        assert list(lte.nn.without_heads(model, lte.LoRA(exclude=("scaled", "marked")))) == list(why)[2:3]
        lte.convert(model, lora, "none")
    assert [name for name, _ in lte.nn.adapted_modules(model)] == ["around.out_proj", "plain"]
    assert (model(tokens) - expected).abs().max() < 1e-6


def test_a_padding_row_is_not_trained() -> None:
    """As of `nn.Embedding`: in every mode the published row of the padding stays what it was."""
    _, model, _ = converted(CASES["embedding"], "none", heads=2, merge="reset-less")
    tokens = torch.tensor([[3, 2], [3, 3]])
    model(x=tokens).sum().backward()
    assert model.layer.lora_B.grad[:, 3].abs().max() == 0
    assert model.layer.lora_B.grad[0, 2].abs().max() > 0
    assert torch.equal(model(x=tokens)[1, 0], model.layer.published_weight[3])


def test_kinds_have_their_classes() -> None:
    for name, kind in {
        "linear_subclass": LoRALinear,
        "falcon_linear": LoRALinear,
        "transformers_conv1d": LoRALinear,
        "embedding": LoRAEmbedding,
        "conv": LoRAConv2d,
        "attention": LoRAMultiheadAttention,
    }.items():
        assert type(converted(CASES[name], "none")[1].layer) is kind


class Reading(nn.Module):
    """Computes with weights that it takes out of its modules, and with one of them by calling it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.conv = nn.Embedding(20, 8), nn.Linear(8, 6), nn.Conv2d(1, 6, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = x + F.linear(x, self.attention.in_proj_weight[:8], self.attention.in_proj_bias[:8])
        y = F.conv2d(F.linear(x, self.mix.weight)[:, None], self.conv.weight, padding=1).mean(1)
        return torch.tanh(y) @ self.mix.weight @ self.table.weight.T


def reading(quant: str, **settings: object) -> tuple[Reading, Reading]:
    """A plain and a converted model; the heads of the latter are random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Reading()
        lora = lte.LoRA(rank=3, scale=SCALE, embeddings=True, **settings)
        model = lte.convert(copy.deepcopy(plain), lora, quant)
        for _, module in lte.nn.adapted_modules(model):
            for tensor in (module.lora_A, module.lora_B, module.merged_A, module.merged_B):
                if tensor is not None:
                    nn.init.normal_(tensor, std=0.2)
    return plain, model


@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize(
    "settings",
    [{"merge": "reset-b"}, {"merge": "reset-less"}, {"heads": 2, "batch": "whole", "merge": "reset"}],
)
def test_a_weight_that_other_code_reads_is_trained_as_the_plain_one(
    settings: dict[str, object], quant: str
) -> None:
    """Against the plain model in float64, with W + s (B A - B' A') for its weights; also under autocast the
    weight is fp32, and whoever computes no gradients, or evaluates, reads the published one."""
    plain, model = reading(quant, **settings)
    tokens = torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(1))
    met = model(tokens)
    met.square().mean().backward()
    sites = dict(lte.nn.adapted_modules(model))
    factors, weights = {}, {n: p.detach().double() for n, p in lte.nn.dense_parameters(model)}
    for site, module in sites.items():
        A, B = (p.detach().double().requires_grad_() for p in (module.lora_A, module.lora_B))
        factors[site], W = (A, B), module.published_weight.double()
        D = sum(B[h] @ A[h] for h in range(module.heads))
        if module.merged_A is not None:
            D = D - sum(module.merged_B.double() @ module.merged_A.double())
        weights[module.spec.parameter] = W + plain_shaped(module.scale * D, W)
    expected = functional_call(plain.double(), weights, (tokens,))
    expected.square().mean().backward()
    assert (met - expected).abs().max() < 1e-5 * expected.abs().max()
    for site, module in sites.items():
        if site == "attention.out_proj":
            assert module.lora_B.grad is None
            continue
        for own, wide_ in zip((module.lora_A, module.lora_B), factors[site], strict=True):
            assert wide_.grad.abs().max() > 1e-3
            assert (own.grad - wide_.grad).abs().max() < 1e-5 * wide_.grad.abs().max().clamp(min=1)
        with torch.autocast("cpu", torch.bfloat16):
            assert module.weight.dtype == torch.float32
            assert torch.allclose(module.weight.double(), weights[module.spec.parameter], atol=1e-6)
        with torch.no_grad():
            assert torch.equal(module.weight, module.published_weight)
        module.eval()
        assert not module.weight.requires_grad
        assert torch.equal(module.weight, module.published_weight)


def test_a_weight_that_is_read_has_its_heads_of_full_rank_and_gates() -> None:
    _, model = reading("none", merge="reset-b")
    model.mix.gates = torch.tensor([1.0, 0.0, 1.0]).view(1, 1, 3)
    kept = model.mix.lora_B.detach() * model.mix.gates
    D = SCALE * (kept @ model.mix.lora_A.detach())[0]
    assert torch.allclose(model.mix.weight, model.mix.published_weight + D, atol=1e-6)
    model.mix.set_full_heads()
    nn.init.normal_(model.mix.lora_B)
    assert torch.equal(model.mix.weight, model.mix.published_weight + model.mix.lora_B[0])


def test_heads_with_a_slice_each_cannot_train_a_weight_that_is_read() -> None:
    """What asks for no gradient is let: its dtype, an evaluation, and a step without it in the graph."""
    _, model = reading("nf4", heads=2)
    tokens = torch.randint(20, (4, 6))
    assert model.mix.weight.dtype == torch.float32
    model.table(tokens).sum().backward()
    with torch.no_grad():
        model(tokens)
    y = model(tokens).square().mean()
    wanted = r"^(mix|table|conv|attention\.in_proj): .* lora.exclude, or set lora.heads=1$"
    with pytest.raises(ConfigError, match=wanted):
        y.backward()
    model.eval()(tokens).sum().backward()


def test_what_has_no_shape_yet_is_one_line() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with pytest.raises(ConfigError, match=r"^0\.weight: has no shape yet; run a batch through"):
        lte.convert(model, lte.LoRA(rank=2), "int8")
    model(torch.randn(4, 6))
    lte.convert(model, lte.LoRA(rank=2), "int8")
    assert list(dict(lte.nn.adapted_modules(model))) == ["0"]
