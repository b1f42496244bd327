"""Tasks: what recipes train, whatever it is, keeps the same contract and goes through the same rounds."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from launch import local
from lte import cli, config, cost, models, recipes
from lte.compress import DENSE
from lte.config import Model, Recipe
from lte.data import pack, pack_images, validation_batches, validation_images
from lte.errors import ConfigError, UserError
from lte.models import ViT
from lte.server.diagnosis import Diagnosis
from lte.server.master import Received
from lte.tasks import AnyTask, micro_batches, task_of
from lte.worker.trainer import materialize

CPU = torch.device("cpu")
NUM_CLASSES = 3
_SMALL = {"num_layers": 2, "width": 32, "num_attention_heads": 2, "mlp_width": 64}
_SMALL_HF = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": _SMALL,
    "gpt2": {
        "name": "transformers",
        "architecture": "gpt2",
        "config": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16},
    },
    "llama": {
        "name": "transformers",
        "architecture": "llama",
        "config": {**_SMALL_HF, "max_position_embeddings": 16},
    },
    "mixtral": {
        "name": "transformers",
        "architecture": "mixtral",
        "config": {
            **_SMALL_HF,
            "num_key_value_heads": 1,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 16,
        },
    },
    "vit": {"name": "vit", **_SMALL},
    "hf-vit": {"name": "transformers", "architecture": "vit", "config": {**_SMALL_HF, "patch_size": 4}},
    "convnext": {
        "name": "transformers",
        "architecture": "convnext",
        "config": {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "patch_size": 2},
    },
    "resnet": {
        "name": "transformers",
        "architecture": "resnet",
        "config": {
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "layer_type": "basic",
        },
    },
}
"""Models of recipes that a worker can build."""
IMAGES = ("vit", "hf-vit", "convnext", "resnet")


class Data(NamedTuple):
    text: Path
    images: Path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Text that is easy to guess, and images of three classes: dark, gray, bright."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("".join(f"{n} bottles of beer on the wall. " for n in range(400)))
    pack([folder / "text.txt"], folder / "text", num_shards=2)
    source = folder / "mnist"
    source.mkdir()
    generator = np.random.default_rng(0)
    for split, number in (("train", 400), ("t10k", 60)):
        labels = generator.integers(0, NUM_CLASSES, number, np.uint8)
        pixels = generator.integers(0, 60, (number, 12, 12), np.uint8) + 90 * labels[:, None, None]
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
            (source / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())
    pack_images(source, folder / "images", num_shards=2)
    return Data(folder / "text", folder / "images")


def recipe_of(name: str, data: Data, **changes: Any) -> Recipe:
    """A small recipe for one of `MODELS`."""
    images = name in IMAGES
    model = dict(MODELS[name])
    model |= {"image_size": 12, "num_classes": NUM_CLASSES} if images else {"context_tokens": 16}
    settings = {
        "data.kind": "images" if images else "text",
        "data.shards": str(data.images if images else data.text),
        "train.rounds": 2,
        "train.local_steps": 4,
        "train.workers": 2,
        "train.batch_size": 8,
        "lora.rank": 4,
        "lora.scale": 2.0,
        "schedule.warmup_steps": 2,
        "worker.heartbeat_s": 0.02,
        "eval.sample_tokens": 5,
    }
    settings |= {f"model.{key}": value for key, value in model.items()}
    return config.replace(Recipe(), **(settings | changes))


def initialized(task: AnyTask, seed: int = 0) -> nn.Module:
    model = materialize(task.build(), CPU)
    task.initialize(model, seed)
    return model


# The contract


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_built_without_memory_and_begins_as_its_seed_says(name: str, data: Data) -> None:
    """... whatever a global generator did before, which is left alone, and the same way twice."""
    task = task_of(recipe_of(name, data))
    assert all(parameter.is_meta for parameter in task.build().parameters())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = initialized(task).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same, other = initialized(task), initialized(task, seed=1)
    assert all(torch.equal(value, one[key]) for key, value in same.state_dict().items())
    for key, value in same.named_parameters():
        assert value.isfinite().all()
        if value.ndim > 1:
            assert value.std() > 0
            assert not torch.equal(value, other.get_parameter(key)), key
    task.initialize(same, 0)
    assert all(torch.equal(value, one[key]) for key, value in same.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_a_mean_over_samples(name: str, data: Data) -> None:
    """So that each head of several, which sees a slice of them, gets the gradient that is its own."""
    task = task_of(recipe_of(name, data))
    model, batch = initialized(task), task.stream(0).batch(0)
    model.train(name != "resnet")  # whose norms make samples of a batch depend on each other
    slices = [batch[torch.arange(4)], batch[torch.arange(4, 8)]]
    whole = task.loss(model, batch)
    assert whole.item() == pytest.approx(sum(task.loss(model, half).item() for half in slices) / 2, rel=1e-5)
    assert whole.item() == pytest.approx(np.log(NUM_CLASSES if name in IMAGES else 256), rel=0.3)
    whole.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert task.num_tokens(batch) == (8 if name in IMAGES else 8 * 16)


@pytest.mark.parametrize("name", MODELS)
def test_streams_repeat_themselves_and_differ_by_slot(name: str, data: Data) -> None:
    task = task_of(recipe_of(name, data))

    def batch(slot: int, step: int) -> torch.Tensor:
        read = task.stream(slot).batch(step)
        return torch.as_tensor(read.pixels if name in IMAGES else read)

    assert torch.equal(batch(1, 5), batch(1, 5))
    assert not torch.equal(batch(1, 5), batch(0, 5))
    assert not torch.equal(batch(1, 5), batch(1, 4))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_evaluation_against_one_batch_of_everything(name: str, data: Data) -> None:
    recipe = recipe_of(name, data)
    task = task_of(recipe)
    model = initialized(task).eval()
    measured = task.evaluate(model, 0)
    if name in IMAGES:
        (images,) = validation_images(data.images, batch_size=1000)
        logits, _ = models.outputs(model, images.pixels)
        assert measured.loss == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
        right = (logits.argmax(1) == images.labels).float().mean().item()
        assert measured.extras == {"accuracy": pytest.approx(right)}
        assert task.evaluate(model, 7).loss != measured.loss
    else:
        (tokens,) = validation_batches(data.text, context_tokens=16, batch_size=10_000)
        logits, _ = models.outputs(model, tokens[:, :-1])
        expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
        assert measured.loss == pytest.approx(expected, rel=1e-5)
        assert measured.extras == {}


# Rounds


@pytest.fixture
def trained(data: Data, tmp_path: Path) -> Callable[..., tuple[Path, list[dict[str, Any]]]]:
    """Train one of `MODELS` in threads; gives the run's folder and its records."""

    def train(name: str, **changes: Any) -> tuple[Path, list[dict[str, Any]]]:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        recipe = recipe_of(
            name, data, **{"run.dir": str(folder), "server.address": f"inprocess://{folder}"}, **changes
        )
        assert local.train_in_threads(recipe) == 0
        return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return train


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt"])
def test_two_rounds_of_every_model(
    name: str, trained: Callable[..., Any], data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, records = trained(name, **{"train.local_steps": 15, "train.batch_size": 16})
    rounds, done = [line for line in records if line["kind"] == "round"], records[-1]
    assert [line["num_merged"] for line in rounds] == [2, 2]
    assert done["tokens"] == 2 * 15 * 2 * 16 * (1 if name in IMAGES else 16)
    recipe = recipe_of(name, data)
    with torch.no_grad():
        start = task_of(recipe).evaluate(recipes.initial_model(recipe).eval(), 0)
    assert done["loss_master"] < 0.95 * start.loss, "it learns"
    if name in IMAGES:
        assert records[-2]["accuracy_master"] > 0.9
    if name in ("vit", "hf-vit"):
        assert done["num_adapted_parameters"] > 0.8 * done["num_parameters"]

    # What was recorded is what the run's model is, as everybody sees it afterwards.
    evals = [line for line in records if line["kind"] == "eval"]
    for which, key in (("published", ""), ("master", "_master")):
        model, of_run, version = recipes.load_run(folder, which)
        with torch.no_grad():
            measured = task_of(of_run).evaluate(model, 0)
        assert version == 2
        assert measured.loss == pytest.approx(evals[-1][f"loss{key}"])
        for extra, value in measured.extras.items():
            assert evals[-1][extra + key] == pytest.approx(value)
    capsys.readouterr()
    assert cli.main(["eval", str(folder)]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    unit = f"nats an image  accuracy {evals[-1]['accuracy']:.4f}" if name in IMAGES else "nats a token"
    assert f"validation loss {done['loss']:.4f} {unit}" in first


@pytest.mark.parametrize("name", ["vit", "gpt"])
def test_pieces_of_a_batch_hold_as_much_of_every_heads_slice(name: str, data: Data) -> None:
    batch = task_of(recipe_of(name, data)).stream(0).batch(0)
    pieces = list(micro_batches(batch, 2, 2))
    for piece, samples in zip(pieces, ([0, 1, 4, 5], [2, 3, 6, 7]), strict=True):
        for part, whole in (
            [(piece.pixels, batch.pixels), (piece.labels, batch.labels)]
            if name in IMAGES
            else [(piece, batch)]
        ):
            assert torch.equal(part, whole[samples])


def test_accuracy_and_loss_of_the_average_are_recorded(
    trained: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, records = trained("resnet", **{"outer.ema": 0.5, "train.accumulate": 2, "lora.heads": 2})
    (last,) = [line for line in records if line["kind"] == "eval"][-1:]
    model, recipe, _ = recipes.load_run(folder, "ema")
    with torch.no_grad():
        measured = task_of(recipe).evaluate(model, 0)
    assert last["loss_ema"] == records[-1]["loss_ema"] == pytest.approx(measured.loss)
    assert last["accuracy_ema"] == pytest.approx(measured.extras["accuracy"])
    assert last["loss_ema"] != last["loss_master"]
    capsys.readouterr()
    assert cli.main(["eval", str(folder)]) == 0
    assert (
        f"ema        version 2  validation loss {measured.loss:.4f} nats an image" in capsys.readouterr().out
    )


@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_activations_computed_anew_change_no_bit(name: str, trained: Callable[..., Any]) -> None:
    """... of a run, with dropout, pieces of batches, several heads, and norms that keep statistics."""
    changes = {"lora.heads": 2, "lora.dropout": 0.2, "train.accumulate": 2}
    digests = {
        trained(name, **changes, **{"train.checkpoint_activations": anew})[1][-1]["master_digest"]
        for anew in (False, True)
    }
    assert len(digests) == 1


def test_statistics_of_norms_tell_nothing_of_gradient_noise(
    trained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, found = Diagnosis.measure, []

    def measured(
        diagnosis: Diagnosis,
        version: int,
        tokens: int,
        contributions: Sequence[Received],
        *rest: Any,
        **named: Any,
    ) -> dict[str, Any] | None:
        statistics = {f"{name}{DENSE}" for name in diagnosis._master.plan.statistics}
        assert statistics
        others = [
            dataclasses.replace(
                one, tensors={key: 9 * t if key in statistics else t for key, t in one.tensors.items()}
            )
            for one in contributions
        ]
        lines = [
            measure(diagnosis, version, tokens, some, *rest, **named) for some in (contributions, others)
        ]
        found.append([{key: line[key] for key in line if key != "diagnose_s"} for line in lines])
        return lines[0]

    monkeypatch.setattr(Diagnosis, "measure", measured)
    _, records = trained("resnet", **{"log.diagnostics_every": 1})
    told = [line for line in records if line["kind"] == "diagnostics"]
    assert len(told) == len(found) == 2
    for one, other in found:
        assert one == other
    assert "resnet.embedder.embedder.convolution" in told[0]["modules"]


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_runs_repeat_themselves(name: str, trained: Callable[..., Any]) -> None:
    changes = {"lora.heads": 2, "data.augment": "crop-flip" if name in IMAGES else "none"}
    digests = [trained(name, **changes)[1][-1]["master_digest"] for _ in range(2)]
    assert digests[0] == digests[1]
    assert trained(name, **changes, **{"run.seed": 1})[1][-1]["master_digest"] != digests[0]


def test_the_command_speaks_of_images_where_it_is_images(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(
        "vit", data, **{"run.dir": str(tmp_path / "run"), "server.address": f"inprocess://{tmp_path}"}
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(config.to_yaml(recipe))
    assert cli.main(["train", str(path)]) == 0
    out = capsys.readouterr().out
    assert "128 images" in out
    assert "accuracy" in out
    assert "token" not in out
    assert "The trained model writes" not in out
    assert not (tmp_path / "run" / "sample.txt").exists()
    assert cli.main(["generate", str(tmp_path / "run")]) == 2
    assert "a model of images writes no text; 'lte eval' measures it" in capsys.readouterr().err
    arguments = ["plan", str(path), "--bandwidth", "100mbit", "--rtt", "50ms"]
    assert cli.main(arguments) == 0
    assert "images/s" in capsys.readouterr().out


def test_a_transformers_model_writes_text(
    trained: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained("gpt2")
    texts = []
    for _ in range(2):
        capsys.readouterr()
        assert cli.main(["generate", str(folder), "--prompt", "9 bottles", "--tokens", "30"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("9 bottles")
    assert len(texts[0].encode()) > 30


# Data that do not fit


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("vit", {"model.image_size": 16}, "model.image_size: 16, but the images of .* are 12x12 pixels"),
        (
            "vit",
            {"model.channels": 3},
            "model.channels: 3, but the images of .* have 1; set model.channels=1",
        ),
        ("vit", {"model.num_classes": 2}, "model.num_classes: 2 is less than the 3 classes of"),
        ("gpt2", {"model.vocab_size": 99}, "model.vocab_size: 99 is less than the 256 tokens of"),
        ("gpt2", {"model.context_tokens": 17}, "model.context_tokens: 17 is more than the 16 positions of"),
    ],
)
def test_what_does_not_fit_the_data_is_said_before_anything_starts(
    data: Data, name: str, changes: dict[str, Any], line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        task_of(recipe_of(name, data, **changes)).check_run()


def test_heads_that_cannot_share_out_what_a_module_is_given_are_refused_before_anything_starts(
    data: Data, tmp_path: Path
) -> None:
    """GPT-2 looks its positions up once for all samples."""
    settings = {"lora.heads": 2, "lora.embeddings": True, "run.dir": str(tmp_path / "run")}
    settings["server.address"] = f"inprocess://{tmp_path}"
    wanted = r"^transformer\.wpe: a batch of 1 cannot be cut into 2 equal slices, .* name it in lora\.exclude"
    with pytest.raises(ConfigError, match=wanted):
        recipes.make_server(recipe_of("gpt2", data, **settings))
    assert not (tmp_path / "run").exists()
    for name, more in (
        ("gpt2", {"lora.exclude": ["*.wpe"]}),
        ("gpt2", {"lora.batch": "whole"}),
        ("vit", {}),
    ):
        recipe = recipe_of(name, data, **settings, **more, **{"run.resume": "never"})
        with recipes.make_server(recipe, display=False):
            pass


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_every_model_runs_without_memory(name: str, data: Data) -> None:
    """By which its heads' slices are looked at before a run, and `lte plan` counts its operations."""
    recipe = recipe_of(name, data)
    few = config.replace(recipe, **{"train.batch_size": 4})
    assert cost.calibrate.step_flop(recipe) == 2 * cost.calibrate.step_flop(few) > 0


# The reference ViT


@torch.no_grad()
def test_vit_against_torchs_own_blocks() -> None:
    """A strided convolution cuts the patches, nn.MultiheadAttention attends."""
    settings = Model(name="vit", channels=3, image_size=12, num_classes=5, **_SMALL)
    model = materialize(models.build(settings), CPU)
    assert isinstance(model, ViT)
    model.initialize(0)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(2))

    weight = model.patches.weight.view(32, 3, 4, 4)
    patches = F.conv2d(images, weight, model.patches.bias, stride=4).flatten(2).transpose(1, 2)
    x = torch.cat([model.class_token.expand(4, 1, 32), patches], 1) + model.positions
    for block in model.blocks:
        assert isinstance(block, models.vit.Block)
        layer = nn.TransformerEncoderLayer(
            32, 2, 64, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        own = {
            "self_attn.in_proj_": block.attention.qkv,
            "self_attn.out_proj.": block.attention.out,
            "linear1.": block.mlp.up,
            "linear2.": block.mlp.down,
            "norm1.": block.attention_norm,
            "norm2.": block.mlp_norm,
        }
        layer.load_state_dict(
            {
                f"{prefix}{key}": value
                for prefix, part in own.items()
                for key, value in part.state_dict().items()
            }
        )
        x = layer.train()(x)
    expected = F.linear(
        F.layer_norm(x[:, 0], (32,), model.norm.weight, model.norm.bias, 1e-6),
        model.output.weight,
        model.output.bias,
    )
    assert torch.allclose(model(images), expected, atol=1e-4)


def test_how_vit_begins() -> None:
    model = materialize(models.build(Model(name="vit", width=256, mlp_width=512)), CPU)
    assert isinstance(model, ViT)
    model.initialize(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert bool((parameter == 1).all()), name
        elif parameter.numel() > 4000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


# Models of transformers


def hf(architecture: str, kind: Any = "text", /, **settings: Any) -> nn.Module:
    """One of transformers' models, in memory from the start."""
    recipe = Model(
        name="transformers", architecture=architecture, config=settings, image_size=16, context_tokens=16
    )
    model = models.hf.build(recipe, kind)
    models.initialize(model, 0)
    return model.eval()


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("llama", {"num_key_value_heads": 1}),
        ("qwen2", {"num_key_value_heads": 2}),
        ("gpt_neox", {}),
        ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
        ("gpt2", None),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "intermediate_size": None}),
        ("bert", {}),
    ],
)
@torch.no_grad()
def test_models_of_text_predict_from_the_left_alone(architecture: str, more: dict[str, Any] | None) -> None:
    """bert, too, which without a word about it would look ahead."""
    settings = {**_SMALL_HF, "max_position_embeddings": 16, **(more or {})}
    settings = {key: value for key, value in settings.items() if value is not None}
    model = hf(architecture, **(MODELS["gpt2"]["config"] if more is None else settings))
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 256
    logits, auxiliary = models.outputs(model, tokens)
    assert auxiliary is None
    assert logits.shape == (2, 16, 256)
    other, _ = models.outputs(model, changed)
    assert torch.allclose(logits[:, :9], other[:, :9], atol=1e-5)
    assert not torch.allclose(logits[:, 9:], other[:, 9:], atol=1e-5)
    repeated = copy.deepcopy(model)
    models.initialize(repeated, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), repeated.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), repeated.buffers(), strict=True))


TWO_KINDS = [[["global", "local"], 1]]
LEVIT = {"hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}


@pytest.mark.parametrize(
    ("kind", "architecture", "settings"),
    [
        ("text", "openai-gpt", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}),
        ("text", "apertus", {**_SMALL_HF, "num_key_value_heads": 2}),
        (
            "text",
            "gpt_neo",
            {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": TWO_KINDS},
        ),
        ("text", "mixtral", {**_SMALL_HF, "num_key_value_heads": 2, "num_local_experts": 4}),
        ("images", "levit", {**LEVIT, "key_dim": [4, 4, 4]}),
        ("images", "regnet", {"embedding_size": 8, "hidden_sizes": [16], "depths": [1], "groups_width": 8}),
    ],
)
def test_no_value_is_whatever_was_in_memory(kind: Any, architecture: str, settings: dict[str, Any]) -> None:
    """Also where the library gives a tensor values where it makes the module, and nowhere else."""
    recipe = Model(
        name="transformers", architecture=architecture, config=settings, image_size=32, context_tokens=16
    )
    found = []
    for before in (3, 7):
        model = materialize(models.build(recipe, kind), CPU)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(before)
        models.initialize(model, 0)
        found.append(dict(model.named_parameters()) | dict(model.named_buffers()))
    theirs = models.hf.build(recipe, kind)
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
    for name, buffer in theirs.named_buffers():
        assert torch.equal(found[0][name], buffer), name
    for name, parameter in theirs.named_parameters():
        if name in found[0] and parameter.unique().numel() == 1:
            assert torch.equal(found[0][name], parameter), name


@pytest.mark.parametrize("architecture", ["resnet", "vit", "swin"])
@torch.no_grad()
def test_models_of_images_take_the_recipes_shape_and_classes(architecture: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "vit": {**_SMALL_HF, "patch_size": 4},
        "swin": {"embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2, "patch_size": 2},
    }
    logits, _ = models.outputs(
        hf(architecture, "images", **settings[architecture]), torch.randn(3, 1, 16, 16)
    )
    assert logits.shape == (3, 10)


def test_attention_is_torchs_own() -> None:
    assert hf("llama", **_SMALL_HF).config._attn_implementation == "sdpa"  # type: ignore[union-attr]


def test_the_experts_of_a_mixture_are_balanced_while_training_if_its_config_asks(data: Data) -> None:
    task = task_of(recipe_of("gpt2", data))
    batch = task.stream(0).batch(0)
    settings = {
        **_SMALL_HF,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "router_aux_loss_coef": 0.5,
    }
    plain, asked = hf("mixtral", **settings), hf("mixtral", **settings, output_router_logits=True)
    losses = {
        (name, training): task.loss(model.train(training), batch).item()
        for name, model in (("plain", plain), ("asked", asked))
        for training in (False, True)
    }
    assert losses["plain", True] == losses["plain", False] == losses["asked", False]
    expected = asked(batch[:, :-1]).aux_loss.item()
    assert expected > 0.5
    assert losses["asked", True] - losses["asked", False] == pytest.approx(0.5 * expected, rel=1e-4)


def test_dropout_is_off_unless_it_is_asked_for() -> None:
    """And special tokens, which packed text does not have, have no rows of their own."""
    settings = MODELS["gpt2"]["config"]
    tokens = torch.randint(256, (2, 16))
    for more, same in (({}, True), ({"resid_pdrop": 0.5}, False)):
        model = hf("gpt2", **settings, **more).train()
        one, other = (models.outputs(model, tokens)[0] for _ in range(2))
        assert torch.equal(one, other) == same
    opt = hf("opt", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32)
    assert opt.get_input_embeddings().padding_idx is None  # type: ignore[operator]


@pytest.mark.parametrize(
    ("architecture", "first", "size", "settings"),
    [
        ("deit", "DeiTForImageClassification", 16, {**_SMALL_HF, "patch_size": 4}),
        (
            "levit",
            "LevitForImageClassification",
            64,
            {
                "hidden_sizes": [16, 24, 32],
                "depths": [1, 1, 1],
                "num_attention_heads": [2, 2, 2],
                "key_dim": [8, 8, 8],
            },
        ),
        (
            "perceiver",
            "PerceiverForImageClassificationLearned",
            16,
            {
                "num_latents": 4,
                "d_latents": 16,
                "num_blocks": 1,
                "num_self_attends_per_block": 1,
                "num_self_attention_heads": 2,
            },
        ),
    ],
)
@torch.no_grad()
def test_of_several_classes_for_an_architecture_the_first_is_taken(
    architecture: str, first: str, size: int, settings: dict[str, Any]
) -> None:
    recipe = Model(
        name="transformers", architecture=architecture, config=settings, image_size=size, channels=3
    )
    model = models.hf.build(recipe, "images")
    models.initialize(model, 0)
    assert type(model).__name__ == first
    logits, _ = models.outputs(model.eval(), torch.randn(2, 3, size, size))
    assert logits.shape == (2, recipe.num_classes)


def test_settings_that_a_model_reads_though_its_config_declares_none_are_taken() -> None:
    """The library's config stores whatever it is given; what is misspelt is still refused."""
    more = {"num_key_value_heads": 1, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    model = hf("qwen3_moe", **_SMALL_HF, **more, head_dim=64)
    assert model.get_parameter("model.layers.0.self_attn.q_proj.weight").shape == (2 * 64, 32)
    with pytest.raises(ConfigError, match=r"haed_dim: unknown .* did you mean model\.config\.head_dim\?$"):
        hf("qwen3_moe", **_SMALL_HF, haed_dim=64)


@pytest.mark.parametrize(
    ("architecture", "kind", "settings", "lines"),
    [
        (
            "lama",
            "text",
            {},
            ["model.architecture: transformers has no 'lama' for text, did you mean llama?"],
        ),
        ("llama", "images", {}, ["model.architecture: transformers has no 'llama' for images; there are: "]),
        (
            "llama",
            "text",
            {"hiden_size": 3, "zzz": 2},
            [
                "model.config.hiden_size: unknown setting of llama, did you mean model.config.hidden_size?",
                "model.config.zzz: unknown setting of llama; there are: ",
            ],
        ),
        ("llama", "text", {"hidden_size": "x"}, ["model.config: transformers can make no llama of these"]),
        ("llama", "text", {"hidden_act": "x"}, ["model.config: transformers can make no llama of these"]),
        (
            "llama",
            "text",
            {**_SMALL_HF, "max_position_embeddings": 8},
            ["model.context_tokens: 16 is more than the 8 positions of this llama; set model.config.max_pos"],
        ),
    ],
)
def test_a_model_that_cannot_be_made_is_one_line(
    architecture: str, kind: str, settings: dict[str, Any], lines: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        hf(architecture, kind, **settings)
    for met, line in zip(raised.value.faults, lines, strict=True):
        assert met.startswith(line)
        assert "\n" not in met


def test_without_the_library_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'lte\[hf\]'") as raised:
        hf("llama")
    assert "\n" not in str(raised.value)
