"""What other libraries load of a run computes what the run's model, and its workers, do."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_model
from test_tasks import Data, data, recipe_of
from torch import nn

from launch import local
from lte import cli, config, models, recipes
from lte.config import Recipe
from lte.data import Index, tokenizer, validation_images
from lte.models import hf
from lte.nn import convert, experts_split
from lte.nn.adapted import Adapted, Tied
from lte.server import recovery
from lte.server.master import Master
from lte.tasks import task_of
from lte.worker import state
from lte.worker.trainer import Trainer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
__all__ = ["data"]  # a fixture

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("gpt", {"lora.embeddings": True, "model.tie_embeddings": True, "lora.tied": "adapted"}),
    "vit": ("vit", {}),
    "llama": (
        "llama",
        {"model.config.num_key_value_heads": 1, "model.config.tie_word_embeddings": True},
    ),
    "gpt2": ("gpt2", {"lora.tied": "adapted", "lora.embeddings": True, "lora.exclude": ["*.wpe"]}),
    "mixtral": ("mixtral", {}),
    "hf-vit": ("hf-vit", {}),
    "resnet": ("resnet", {}),
    "convnext": ("convnext", {}),
}
SOME = {
    "gpt": "*.mlp.up",
    "vit": "patches",
    "llama": "*.q_proj",
    "gpt2": "*.c_attn",
    "mixtral": "*.experts.*.1",
    "hf-vit": "*.fc1",
    "resnet": "*.encoder.*",
    "convnext": "*.pwconv1",
}
"""Sites whose heads have a rank and a scale of their own."""
OF_HEADS = {
    "reset-b": {"lora.merge": "reset-b"},
    "reset-less": {"lora.merge": "reset-less"},
    "given": {"lora.merge": "reset-b", "lora.A": "rotating"},
    "one": {"lora.merge": "reset-less", "lora.batch": "whole"},
    "scaled": {"lora.merge": "reset-less", "train.workers": 1},
    "lora": {"lora.merge": "never", "lora.batch": "whole", "train.workers": 1},
}


class Trained(NamedTuple):
    folder: Path
    recipe: Recipe


@pytest.fixture(scope="module")
def trained(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Train one of `RUNS` in threads, once with the same settings."""
    made: dict[str, Trained] = {}

    def train(name: str, **changes: Any) -> Trained:
        key = json.dumps([name, changes])
        if key not in made:
            model, asked = RUNS[name]
            folder = tmp_path_factory.mktemp("runs") / "run"
            recipe = recipe_of(
                model,
                data,
                **{
                    "run.dir": str(folder),
                    "server.address": f"inprocess://{folder}",
                    "optimizer.lr": 0.01,
                    "outer.ema": 0.5,
                    **asked,
                    **changes,
                },
            )
            assert local.train_in_threads(recipe) == 0
            made[key] = Trained(folder, recipe)
        return made[key]

    return train


@pytest.fixture
def lte(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The command; gives what it printed."""

    def run(*arguments: str | Path) -> str:
        capfd.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        return out

    return run


def inputs(recipe: Recipe, num: int = 4) -> torch.Tensor:
    """So many samples of the task, without what is to be predicted."""
    batch = task_of(recipe).stream(0).batch(0)[torch.arange(num)]
    return batch.pixels if recipe.data.kind == "images" else batch[:, :-1]


def from_pretrained(recipe: Recipe, folder: Path) -> Any:
    kind = "ImageClassification" if recipe.data.kind == "images" else "CausalLM"
    with hf.quiet():
        return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder)


# Merged models


@pytest.mark.parametrize("which", ["published", "master", "ema"])
@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_transformers_loads_the_model(
    name: str, which: str, trained: Callable[..., Trained], lte: Callable[..., str], tmp_path: Path
) -> None:
    run, recipe = trained(name)
    printed = lte("export", run, "--format", "hf", "--out", tmp_path / "out", "--weights", which)
    assert printed == f"{tmp_path / 'out'}\n"
    own, _, _ = recipes.load_run(run, which)
    theirs, x = from_pretrained(recipe, tmp_path / "out"), inputs(recipe)
    expected, met = models.outputs(own, x)[0], theirs(x).logits
    if recipe.model.name == "transformers":
        assert torch.equal(met, expected), "bit for bit"
        with experts_split(theirs):
            assert theirs.state_dict().keys() == own.state_dict().keys()
    else:
        assert (met - expected).abs().max() < 1e-5 * expected.abs().max()
    for other in {"published", "master", "ema"} - {which}:  # they do differ
        assert not torch.allclose(met, models.outputs(recipes.load_run(run, other)[0], x)[0], rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "resnet", "colour"])
@torch.no_grad()
def test_transformers_reads_images_as_the_run_does(
    name: str,
    trained: Callable[..., Trained],
    lte: Callable[..., str],
    tmp_path: Path,
) -> None:
    """From files of images, with the library's own processor, to the names of their classes."""
    images = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    generator, shape = np.random.default_rng(1), (12, 12, 3) if name == "colour" else (12, 12)
    pixels = generator.integers(0, 256, (24, *shape), np.uint8)
    for k, image in enumerate(pixels):
        path = (
            tmp_path / "photos" / ("test" if k % 2 else "train") / ("cat", "dog")[k // 2 % 2] / f"{k:02d}.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        images.fromarray(image).save(path)
    packed = tmp_path / "packed"
    lte("data", "pack-images", tmp_path / "photos", "--out", packed, "--shards", 2)
    folder = tmp_path / "run"
    where = {"run.dir": str(folder), "server.address": f"inprocess://{folder}"}
    own = {"model.channels": 3 if name == "colour" else 1, "train.batch_size": 4, "lora.heads": 1}
    recipe = recipe_of("vit" if name == "colour" else name, Data(packed, packed), **where, **own)
    assert local.train_in_threads(recipe) == 0
    assert lte("export", folder, "--format", "hf", "--out", tmp_path / "out") == f"{tmp_path / 'out'}\n"
    with hf.quiet():
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    paths = sorted((tmp_path / "photos" / "test").rglob("*.png"), key=lambda path: path.name)
    files = [images.open(path) for path in paths]
    (expected,) = validation_images(packed, batch_size=99)
    met = processor(files, return_tensors="pt")["pixel_values"]
    order = [int(torch.argmin((expected.pixels - one).abs().flatten(1).sum(1))) for one in met]
    assert sorted(order) == list(range(12))
    assert torch.allclose(met, expected.pixels[order], rtol=0, atol=1e-6)
    theirs = from_pretrained(recipe, tmp_path / "out")
    named = [theirs.config.id2label[int(label)] for label in expected.labels[order]]
    assert named == [path.parent.name for path in paths]
    assert theirs.config.label2id == {"cat": 0, "dog": 1, "LABEL_2": 2}
    if name == "colour":  # gray files among those in colour
        gray = processor(files[0].convert("L"), return_tensors="pt")["pixel_values"]
        assert gray.shape == (1, 3, 12, 12)
    shutil.rmtree(packed)
    said = lte("export", folder, "--format", "hf", "--out", tmp_path / "more")
    assert said.startswith(f"without names of classes and preprocessor_config.json ({packed}")


def test_the_tokenizer_is_that_of_the_data(
    trained: Callable[..., Trained], lte: Callable[..., str], tmp_path: Path
) -> None:
    run, recipe = trained("gpt")
    lte("export", run, "--format", "hf", "--out", tmp_path / "bytes")
    met = transformers.AutoTokenizer.from_pretrained(tmp_path / "bytes")
    text = "7 bottles\n\tof déjà vu 🍺 on the  wall."
    assert met(text)["input_ids"] == list(text.encode())
    assert met.decode(list(text.encode())) == text
    assert met.model_max_length == recipe.model.context_tokens

    words = tmp_path / "words"
    (tmp_path / "text.txt").write_text("bottles of beer on the wall " * 400)
    lte("data", "pack", tmp_path / "text.txt", "--out", words, "--tokenizer", "bpe:300", "--shards", "2")
    moved = shutil.copytree(run, tmp_path / "run")
    (moved / "config.yaml").write_text(config.to_yaml(config.replace(recipe, **{"data.shards": str(words)})))
    lte("export", moved, "--format", "hf", "--out", tmp_path / "bpe")
    same = transformers.AutoTokenizer.from_pretrained(tmp_path / "bpe")
    assert same(text)["input_ids"] == tokenizer.load(words).encode(text).tolist()

    shutil.rmtree(words)
    printed = lte("export", moved, "--format", "hf", "--out", tmp_path / "none")
    assert printed.startswith(f"without its tokenizer ({words}")
    assert not list((tmp_path / "none").glob("token*"))


def test_a_checkpoints_tokenizer_is_used_all_the_way(lte: Callable[..., str], tmp_path: Path) -> None:
    """Text packed by the tokenizer of a folder of transformers', read from and written to by its library."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} bottles of beer on the wall, déjà vu. " for n in range(300)))
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("▁", -2.0)], 0, True))
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=120, unk_token="<unk>", special_tokens=["<unk>", "<s>"], show_progress=False
    )
    made.train_from_iterator([text.read_text()], trainer)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")
    theirs.save_pretrained(tmp_path / "checkpoint")
    packed, run = tmp_path / "packed", tmp_path / "run"
    said = lte("data", "pack", text, "--out", packed, "--tokenizer", tmp_path / "checkpoint", "--shards", 2)
    assert said.endswith("(tokenizer.json)\n")
    recipe = recipe_of(
        "gpt",
        Data(packed, packed),
        **{"run.dir": str(run), "server.address": f"inprocess://{run}", "model.vocab_size": len(theirs)},
    )
    assert local.train_in_threads(recipe) == 0
    prompt = "7 bottles of beer"
    written = lte("generate", run, "--prompt", prompt, "--tokens", 0).rstrip("\n")
    assert written == theirs.decode(theirs(prompt, add_special_tokens=False)["input_ids"])
    assert "nats a token" in lte("eval", run)
    assert lte("export", run, "--format", "hf", "--out", tmp_path / "out") == f"{tmp_path / 'out'}\n"
    same = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = theirs(text.read_text(), add_special_tokens=False)["input_ids"]
    assert same(text.read_text(), add_special_tokens=False)["input_ids"] == ids
    # What was exported can be given on.
    again = tmp_path / "again"
    lte("data", "pack", text, "--out", again, "--tokenizer", tmp_path / "out", "--shards", 2)
    assert Index.load(again).train == Index.load(packed).train


def test_the_exported_tokenizer_of_bytes_can_be_given_on(
    trained: Callable[..., Trained], lte: Callable[..., str], tmp_path: Path
) -> None:
    run, _ = trained("gpt")
    lte("export", run, "--format", "hf", "--out", tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("7 bottles\n\tof déjà vu 🍺 on the  wall. " * 3000)
    for k, name in enumerate(("bytes", tmp_path / "model")):
        lte("data", "pack", text, "--out", tmp_path / f"{k}", "--tokenizer", name, "--shards", 2)
    reader, expected = tokenizer.load(tmp_path / "1"), text.read_bytes()
    assert reader.encode(text.read_text()).tolist() == list(expected)
    assert [s.num_tokens for s in Index.load(tmp_path / "1").train] == [
        s.num_tokens for s in Index.load(tmp_path / "0").train
    ]


@pytest.mark.parametrize("name", ["gpt", "resnet", "gpt2"])
def test_safetensors_hold_the_state_dict(
    name: str, trained: Callable[..., Trained], lte: Callable[..., str], tmp_path: Path
) -> None:
    run, recipe = trained(name)
    lte("export", run, "--format", "safetensors", "--out", tmp_path / "out", "--weights", "master")
    own, _, _ = recipes.load_run(run, "master")
    other = recipes.initial_model(config.replace(recipe, **{"run.seed": 9}))
    assert load_model(other, tmp_path / "out" / "model.safetensors") == (set(), [])
    for key, tensor in own.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor), key


# Heads


def of_worker(run: Path, recipe: Recipe, name: str) -> nn.Module:
    """The model of a worker as it was when it saved its state last, made as the worker would make it."""
    saved = state.load(run / "workers" / name)
    assert saved is not None
    master = Master(recipes.initial_model(recipe), recipe)
    assert recovery.recover(run, master, until=saved.version).progress.version == saved.version
    plain = task_of(recipe).build()
    scale = saved.numbers["scale"]
    trainer = Trainer(
        convert(plain, recipe.lora.capped(0, 0, scale), recipe.base.quant),
        recipe,
        slot=saved.slot,
        version=saved.version,
        base=master.snapshot(),
        base_digest=master.base_digest(),
        scale=scale,
    )
    before = torch.get_rng_state()
    trainer.resume(saved.tensors, saved.numbers, merged=False)
    torch.set_rng_state(before)
    trainer.model.eval()
    for module in trainer.model.modules():
        module.training = isinstance(module, Adapted | Tied)  # with heads, and norms in eval mode
    return trainer.model


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        *((name, "reset-less") for name in RUNS),
        ("gpt", "reset-b"),
        ("resnet", "reset-b"),
        ("gpt2", "given"),
        ("vit", "one"),
        ("mixtral", "one"),
        ("gpt2", "scaled"),
        ("llama", "lora"),
    ],
)
@torch.no_grad()
def test_peft_computes_what_workers_do(
    name: str,
    heads: str,
    trained: Callable[..., Trained],
    lte: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if heads == "scaled":  # by its worker
        monkeypatch.setattr(recipes, "work", partial(recipes.work, scale=3.0))
    peft = pytest.importorskip("peft", reason="peft is not installed")
    overrides = [{"modules": SOME[name], "rank": 2, "scale": 5.0}]
    num = 1 if name == "mixtral" and heads != "one" else 2  # experts see rows of all samples
    run, recipe = trained(name, **{"lora.heads": num, "lora.overrides": overrides, **OF_HEADS[heads]})
    printed = lte("export", run, "--format", "peft", "--out", tmp_path / "out").splitlines()
    num_heads = recipe.lora.num_slices  # those that all see the whole batch are one
    workers = range(recipe.train.workers)
    assert printed[:-1] == [f"w{k}: {num_heads} of version 1, on base-{k}" for k in workers]
    x = inputs(recipe)
    for worker in workers:
        expected, _ = models.outputs(of_worker(run, recipe, f"w{worker}"), x)
        for head in range(num_heads):
            folder = tmp_path / "out" / f"w{worker}-head-{head}"
            described = json.loads((folder / "adapter_config.json").read_text())
            base = from_pretrained(recipe, Path(described["base_model_name_or_path"]))
            own = slice(head * 4 // num_heads, (head + 1) * 4 // num_heads)
            alone = base(x[own]).logits
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PEFT's, on tied and transposed weights
                with_head = peft.PeftModel.from_pretrained(base, folder).eval()
            met = with_head(x[own]).logits
            size = expected[own].abs().max()
            assert (met - expected[own]).abs().max() < 1e-5 * size
            assert (alone - expected[own]).abs().max() > 1e-3 * size, "the heads do something"


def refused(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a mistake of the user's gets."""
    capfd.readouterr()
    assert cli.main([str(argument) for argument in ("export", *arguments)]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_where_peft_puts_no_heads_is_one_line(
    trained: Callable[..., Trained], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    small = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    mamba = {"model.architecture": "mamba", "model.config": small, "train.local_steps": 2}
    run, _ = trained("gpt2", **mamba, **{"lora.exclude": []})
    line = refused(capfd, run, "--format", "peft", "--out", tmp_path / "out")
    assert line.startswith("lte: PEFT takes no such heads of mamba ([PEFT:")
    assert line.endswith('; heads of a run with lora.exclude=["*.out_proj"] can be exported\n')
    assert not (tmp_path / "out").exists()
    run, _ = trained("gpt2", **mamba, **{"lora.exclude": ["*.out_proj"]})
    assert cli.main(["export", str(run), "--format", "peft", "--out", str(tmp_path / "out")]) == 0


def test_a_mistake_gets_one_line(
    trained: Callable[..., Trained],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, _ = trained("gpt")
    full, out = tmp_path / "full", tmp_path / "out"
    full.mkdir()
    (full / "file").touch()
    for kind in ("hf", "safetensors", "peft"):
        assert f"{full}: is there already" in refused(capfd, run, "--format", kind, "--out", full)
        assert "not a run folder" in refused(capfd, full, "--format", kind, "--out", out)
    assert "cannot be written" in refused(capfd, run, "--format", "hf", "--out", full / "file" / "out")
    assert "--weights" in refused(capfd, run, "--format", "peft", "--out", out, "--weights", "ema")
    assert "--state" in refused(capfd, run, "--format", "hf", "--out", out, "--state", out)

    alone = shutil.copytree(run, tmp_path / "alone")
    states = [path.rename(tmp_path / path.name) for path in sorted((alone / "workers").iterdir())]
    assert "no worker's state" in refused(capfd, alone, "--format", "peft", "--out", out)
    assert "holds no state" in refused(capfd, alone, "--format", "peft", "--out", out, "--state", full)
    given = [option for path in states for option in ("--state", path)]
    assert cli.main([str(x) for x in ("export", alone, "--format", "peft", "--out", out, *given)]) == 0
    (first,) = (alone / "checkpoints").glob("version-*0")
    shutil.rmtree(first)
    shutil.rmtree(alone / "journal")  # as the server does, once it keeps no checkpoint that it follows
    said = refused(capfd, alone, "--format", "peft", "--out", tmp_path / "no", *given)
    assert said.count("holds version 1 no more") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "full", "out", "w0", "w1"]

    whole, _ = trained("gpt", **{"train.full_rank": True})
    said = refused(capfd, whole, "--format", "peft", "--out", tmp_path / "no")
    assert said.count("version 1 trained weights of full rank") == 2
    without, _ = trained("gpt", **{"lora.modules": []})
    said = refused(capfd, without, "--format", "peft", "--out", tmp_path / "no")
    assert said.count("no module has heads (lora.modules)") == 2

    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'lte[hf]'" in refused(capfd, run, "--format", "peft", "--out", tmp_path / "no")
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'lte[hf]'" in refused(capfd, run, "--format", "hf", "--out", tmp_path / "no")
