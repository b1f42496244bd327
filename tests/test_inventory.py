"""`lte convert`: the table of what becomes of every tensor."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from simulation import recipe
from torch import nn

from lte import config, inventory
from lte.cli import main
from lte.cost import moments_bytes
from lte.nn import convert, parameter_groups, plan
from lte.optim import make_optimizer

QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.yaml")
Lte = Callable[..., tuple[int, str, str]]


class Net(nn.Module):
    """One tensor of each sort."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.fixed = nn.Parameter(torch.zeros(7), requires_grad=False)
        self.register_buffer("turns", torch.zeros(3))


@pytest.fixture
def lte(capsys: pytest.CaptureFixture[str]) -> Lte:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return (code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer.name": "adamw", "lora.heads": 2},
        {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "lora.merge": "reset-less"},
        {"optimizer.name": "sgd", "lora.A": "frozen"},
    ],
)
def test_the_figures_are_those_of_a_converted_model(settings: dict[str, object]) -> None:
    changed = recipe(**{"base.quant": "nf4", **settings})
    found = inventory.take(plan(Net(), changed.lora, "nf4"), changed)
    model = convert(Net(), changed.lora, "nf4")
    held = model.conv
    factors = [held.lora_A, held.lora_B, held.merged_A, held.merged_B]
    assert found.factors_bytes == sum(4 * tensor.numel() for tensor in factors if tensor is not None)
    assert found.base_bytes == held.codes.nbytes + held.scales.nbytes
    optimizer = make_optimizer(model, changed.optimizer)
    for parameters in parameter_groups(model).values():
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [
        tensor.nbytes
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and name != "step"
    ]
    assert found.optimizer_bytes == sum(moments)
    assert (moments_bytes(changed.optimizer) == 0) == (not moments)
    assert found.elements == {"adapted": 288, "dense": 16, "averaged": 16, "frozen": 7, "buffer": 3}
    assert found.adapted_share == 288 / 304
    row = found.rows[0]
    assert (row.parameter, row.shape, row.elements) == ("conv.weight", (8, 4, 3, 3), 288)
    assert row.heads == inventory.Heads(
        matrix=(8, 36), rank=4, scale=2.0, init="semi-orthogonal", base_bits=8 * 170 / 288
    )


def test_the_table_shows_every_tensor_and_totals() -> None:
    settings = recipe(**{"base.quant": "int8"})
    console = Console(width=120)
    with console.capture() as capture:
        console.print(inventory.to_text(inventory.take(plan(Net(), settings.lora, "int8"), settings)))
    lines = [line.split() for line in capture.get().splitlines()]
    bits = f"{8 * 330 / 288:.3g}"
    for line in (
        ["conv.weight", "8x4x3x3", "288", "adapted", "8x36", "4", "2", "semi-orthogonal", bits],
        ["norm.weight", "8", "8", "dense"],
        ["norm.running_mean", "8", "8", "averaged"],
        ["fixed", "7", "7", "frozen"],
        ["turns", "3", "3", "buffer"],
        ["all", "330"],
        ["Of", "what", "is", "trained", "94.7%", "is", "adapted."],
    ):
        assert line in lines, line


def test_the_command_prints_the_table(lte: Lte) -> None:
    given = QUICKSTART
    code, out, err = lte("convert", given, "lora.freeze=[norm.*]", "--dry-run", "--json")
    assert (code, err) == (0, "")
    met = json.loads(out)
    named = {row["parameter"]: row for row in met["parameters"]}
    assert named["norm.weight"]["what"] == "frozen"
    assert named["blocks.0.mlp.up.weight"]["heads"]["matrix"] == named["blocks.0.mlp.up.weight"]["shape"]
    total = sum(row["elements"] for row in met["parameters"])
    assert total == sum(met["elements"].values())
    width = config.load(given).model.width
    assert met["elements"]["frozen"] == width
    code, out, err = lte("convert", given, "--dry-run")
    assert (code, err) == (0, "")
    assert all(name in out for name in named)


def test_a_model_that_is_mostly_trained_in_full_is_told_of(lte: Lte) -> None:
    """JetMoe keeps its experts as parameters of three dimensions that are not laid out as other mixtures'."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    small = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_local_experts: 4}"
    given = ("configs/llama-1m.yaml", "model.architecture=jetmoe", f"model.config={small}")
    code, out, err = lte("convert", *given, "--dry-run", "--json")
    met = json.loads(out)
    assert code == 0
    assert met["adapted_share"] < 0.5
    assert err.startswith(f"lte: heads are on {met['adapted_share']:.1%} of what is trained alone;")
    dense = [row for row in met["parameters"] if row["what"] == "dense"]
    largest = sorted(dense, key=lambda row: -row["elements"])[:3]
    names = ", ".join(f"{row['parameter']} ({'x'.join(map(str, row['shape']))})" for row in largest)
    assert f"Its largest: {names}, ...; " in err
    assert err.count("\n") == 1
    for asked in ("lora.modules=[]", "train.full_rank=true"):
        merge = ["lora.merge=reset-b"] if "full" in asked else []
        code, _, err = lte("convert", *given, "--dry-run", asked, *merge)
        assert (code, err) == (0, "")


def test_modules_that_can_take_no_heads_are_told_of(lte: Lte) -> None:
    """The router of Llama 4 is a linear layer with more to it; Falcon's layers have nothing more."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    small = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2"
    router = f"{small}, intermediate_size: 32, intermediate_size_mlp: 32, num_local_experts: 2, head_dim: 8"
    shape = ("model.architecture=llama4_text", f"model.config={{{router}, num_key_value_heads: 2}}")
    code, _, err = lte("convert", "configs/llama-1m.yaml", *shape, "--dry-run")
    assert code == 0
    assert "lte: trained in full: model.layers.0.feed_forward.router" in err
    assert err.endswith(": Llama4Router computes in a forward of its own\n")
    shape = ("model.architecture=falcon", f"model.config={{{small}}}")
    code, out, err = lte("convert", "configs/llama-1m.yaml", *shape, "--dry-run", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["adapted_share"] > 0.5


def test_settings_may_stand_behind_options_and_the_last_one_counts(lte: Lte) -> None:
    outs = [
        lte("convert", QUICKSTART, *words)
        for words in (
            ("lora.rank=2", "lora.rank=3", "lora.embeddings=true", "--dry-run", "--json"),
            ("--dry-run", "--json", "lora.rank=2", "lora.embeddings=true", "lora.rank=3"),
            ("lora.rank=2", "--json", "lora.rank=3", "--dry-run", "lora.embeddings=true"),
        )
    ]
    assert outs[0] == outs[1] == outs[2]
    code, out, err = outs[0]
    assert (code, err) == (0, "")
    ranks = {row["heads"]["rank"] for row in json.loads(out)["parameters"] if row["heads"]}
    assert ranks == {3}


def test_mistakes_are_told_in_one_line(lte: Lte) -> None:
    code, out, err = lte("convert", QUICKSTART)
    assert (code, out) == (2, "")
    assert err.startswith("lte: convert: there is nothing to write")
    assert "--dry-run" in err
    assert err.count("\n") == 1
    code, out, err = lte("convert", QUICKSTART, "lora.freeze=[norm.wait]", "--dry-run")
    assert (code, out) == (2, "")
    assert err == "lte: lora.freeze: 'norm.wait' matches no parameter, did you mean norm.weight?\n"
