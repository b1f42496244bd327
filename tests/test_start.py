"""Runs that start from weights that were trained before, by lte or by others."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_tasks import Data, data, recipe_of

import lte
from launch import local
from lte import cli, config, export, models, quantize, recipes
from lte.config import Recipe
from lte.errors import ConfigError
from lte.models import hf, taken
from lte.models.counterparts import counterpart_of
from lte.nn import to_matrix
from lte.server import checkpoint
from lte.server.master import Master
from lte.tasks import task_of
from lte.worker import Worker

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
__all__ = ["data"]  # a fixture

MODELS = ("gpt", "vit", "gpt2", "llama", "resnet")


def trained_before(recipe: Recipe) -> torch.nn.Module:
    """A model whose tensors are all its own, also biases, norms and statistics, which begin alike."""
    model = recipes.initial_model(recipe)
    statistics = [(n, b) for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))]
    for k, (_, tensor) in enumerate([*model.named_parameters(), *statistics]):
        tensor.data += torch.rand(tensor.shape, generator=torch.Generator().manual_seed(k)) * 0.02
    return model


def in_layout(model: torch.nn.Module, recipe: Recipe, folder: Path, **how: Any) -> Path:
    with hf.quiet():
        export.merged.in_transformers(model, recipe).save_pretrained(folder, **how)
    return folder


def starting(recipe: Recipe, path: Path, **changes: Any) -> torch.nn.Module:
    begins = {"model.init_from": str(path), "run.seed": 9, **changes}
    return recipes.starting_model(config.replace(recipe, **begins))


def assert_same(met: torch.nn.Module, expected: torch.nn.Module) -> None:
    there = dict(expected.named_parameters()) | dict(expected.named_buffers())
    for name, tensor in (*met.named_parameters(), *met.named_buffers()):
        assert torch.equal(tensor, there[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_read_from_every_layout(name: str, data: Data, tmp_path: Path) -> None:
    recipe = recipe_of(name, data, **{"run.dir": str(tmp_path / "run")})
    model = trained_before(recipe)
    assert_same(starting(recipe, in_layout(model, recipe, tmp_path / "whole")), model)
    in_layout(model, recipe, tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_same(starting(recipe, tmp_path / "shards"), model)
    # By the model's own names, in one file or many, and whichever of its names a tied tensor has.
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "all.safetensors")
    assert_same(starting(recipe, tmp_path / "all.safetensors"), model)
    (tmp_path / "plain").mkdir()
    halves = {"a.safetensors": sorted(state)[::2], "b.safetensors": sorted(state)[1::2]}
    for file, keys in halves.items():
        save_file({key: state[key] for key in keys}, tmp_path / "plain" / file)
    index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (tmp_path / "plain" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(starting(recipe, tmp_path / "plain"), model)
    # Of half the bits: the nearest fp32.
    in_layout(copy.deepcopy(model).bfloat16(), recipe, tmp_path / "bf16")
    for tensor in model.state_dict().values():
        tensor.copy_(tensor.bfloat16())
    assert_same(starting(recipe, tmp_path / "bf16"), model)


@torch.no_grad()
def test_rotary_angles_are_the_librarys(data: Data, tmp_path: Path) -> None:
    """They are buffers that no file holds, whichever file the weights are of."""
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"rope_theta": 5e5, "original_max_position_embeddings": 8}
    recipe = recipe_of("llama", data, **{"model.config.rope_parameters": scaled})
    folder = in_layout(trained_before(recipe), recipe, tmp_path / "llama")
    with hf.quiet():
        library = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    angles = library.model.rotary_emb.inv_freq
    assert angles.abs().sum() > 0
    x = torch.arange(16)[None]
    for path in (folder, folder / "model.safetensors"):
        model: Any = starting(recipe, path).eval()
        assert torch.equal(model.model.rotary_emb.inv_freq, angles)
        assert torch.equal(model(x).logits, library(x).logits)
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


_PEAK = """
import re, sys
from pathlib import Path
from lte import config, recipes
from lte.tasks import task_of

def kilobytes(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

recipe = config.load(sys.argv[1])
task_of(recipe).build()  # whatever the library imports
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = kilobytes("VmRSS")
model = recipes.starting_model(recipe)
print((kilobytes("VmHWM") - before) / sum(p.numel() * 4 / 1024 for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_memory_is_that_of_one_model(data: Data, tmp_path: Path) -> None:
    """No initial weights beside those that are read."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    recipe = recipe_of("llama", data, **{f"model.config.{key}": value for key, value in sizes.items()})
    folder = in_layout(recipes.initial_model(recipe), recipe, tmp_path / "llama", max_shard_size="20MB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    written = tmp_path / "recipe.yaml"
    written.write_text(config.to_yaml(config.replace(recipe, **{"model.init_from": str(folder)})))
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, written], check=True, capture_output=True, text=True, timeout=300
    )
    assert float(done.stdout) < 1.5, "in sizes of the model in fp32"


def test_nothing_is_built_before_another_model_is_refused(
    data: Data, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = recipe_of("llama", data, **{"run.dir": str(tmp_path / "run")})
    folder = in_layout(recipes.initial_model(llama), llama, tmp_path / "llama")
    large = {"model.config.hidden_size": 4096, "model.config.num_attention_heads": 32}
    other = config.replace(llama, **large, **{"model.init_from": str(folder)})
    written = tmp_path / "recipe.yaml"

    def never(*_: object) -> None:
        raise AssertionError("it is built")

    monkeypatch.setattr(models, "build", never)
    monkeypatch.setattr(models, "initialize", never)
    for method in ("lte", "ddp"):
        for command in ("train", "server"):
            if (command, method) == ("server", "ddp"):
                continue
            written.write_text(config.to_yaml(config.replace(other, **{"train.method": method})))
            capfd.readouterr()
            assert cli.main([command, str(written)]) == 2
            out, err = capfd.readouterr()
            assert (out, err.count("\n")) == ("", 1)
            assert err.startswith(
                f"lte: model.init_from: {folder} holds another model: hidden_size is 32, not"
            )
    assert not (tmp_path / "run").exists()


def write(recipe: Recipe, path: Path, *left_out: str, **model: Any) -> Path:
    """The recipe in a file, whose section `model` lacks some settings, and has these."""
    tree = config.to_dict(recipe)
    tree["model"] = {k: v for k, v in tree["model"].items() if k not in left_out} | model
    path.write_text(yaml.safe_dump(tree))
    return path


BY_KIND = {"text": ["vocab_size"], "images": ["image_size", "channels", "num_classes"]}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "hf-vit", "resnet", "convnext"])
@torch.no_grad()
def test_what_a_recipe_leaves_out_is_taken_from_the_checkpoint(name: str, data: Data, tmp_path: Path) -> None:
    """Of a checkpoint with settings that no default has, which the library alone wrote and reads."""
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    more: dict[str, dict[str, Any]] = {
        "llama": {"rope_parameters": scaled, "attention_bias": True, "rms_norm_eps": 1e-3, "mlp_bias": True},
        "gpt2": {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True, "resid_pdrop": 0.1},
        "mixtral": {"num_experts_per_tok": 1, "sliding_window": 4, "head_dim": 4},
        "hf-vit": {"qkv_bias": False, "layer_norm_eps": 1e-2},
        "resnet": {"hidden_act": "gelu"},
        "convnext": {"layer_norm_eps": 1e-2},
    }
    recipe = recipe_of(name, data, **{f"model.config.{key}": value for key, value in more[name].items()})
    folder = in_layout(trained_before(recipe), recipe, tmp_path / "checkpoint")
    kind = "ImageClassification" if recipe.data.kind == "images" else "CausalLM"
    with hf.quiet():
        library = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).eval()
    left_out = ["config", "architecture", *BY_KIND[recipe.data.kind]]
    if name == "resnet":  # which takes images of any size
        left_out.remove("image_size")
    written = write(recipe, tmp_path / "recipe.yaml", *left_out, init_from=str(folder))
    said = list[str]()
    made = recipes.load(written, say=said.append)
    (line,) = said
    assert f"architecture {recipe.model.architecture}" in line and str(folder / "config.json") in line
    own = config.replace(made, **{"model.config": recipe.model.config, "model.init_from": None})
    assert own == recipe, "but for how the model's settings are said"
    batch = task_of(recipe).stream(0).batch(0)
    x = batch.pixels if kind == "ImageClassification" else batch[:, :-1]
    expected = library(x).logits
    assert torch.equal(recipes.starting_model(made).eval()(x).logits, expected)
    # What config.yaml will say makes the same model, without the folder.
    written.write_text(config.to_yaml(config.replace(made, **{"model.init_from": None})))
    assert recipes.load(written).model.config == made.model.config
    again = recipes.initial_model(config.load(written)).eval()
    again.load_state_dict(lte.split_experts(library).state_dict())
    assert torch.equal(again(x).logits, expected)
    assert not any(module.p for module in again.modules() if isinstance(module, torch.nn.Dropout))


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "kimi_linear", "bailing_hybrid"])
def test_settings_of_several_names_are_taken(architecture: str, tmp_path: Path) -> None:
    """The library writes such a one under one of them."""
    there: Any = transformers.AutoConfig.for_model(architecture)
    several = [name for name in there.attribute_map if name in hf.computed(there)]
    changed = {name: getattr(there, name) + 1 for name in several if type(getattr(there, name)) is int}
    assert changed
    for name, value in changed.items():
        setattr(there, name, value)
    there.save_pretrained(tmp_path)
    found = taken.from_folder(tmp_path, "text").config
    assert {name: found[name] for name in changed} == changed


def test_a_checkpoint_is_trained_on_with_a_loss_and_dropouts_of_ones_own(data: Data, tmp_path: Path) -> None:
    """Which its config.json has off, and which change nothing of what it computes."""
    recipe = recipe_of("mixtral", data)
    folder = in_layout(trained_before(recipe), recipe, tmp_path / "checkpoint")
    own = {"output_router_logits": True, "attention_dropout": 0.25}
    left_out = ["architecture", *BY_KIND["text"]]
    written = write(recipe, tmp_path / "recipe.yaml", *left_out, init_from=str(folder), config=own)
    made = recipes.load(written, say=lambda line: None)
    assert made.model.config == {**made.model.config, **recipe.model.config, **own}
    model = recipes.starting_model(made)
    assert model.config.output_router_logits and model.config.attention_dropout == 0.25


def test_a_recipe_that_contradicts_its_checkpoint_is_refused(
    data: Data, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    llama = recipe_of("llama", data)
    folder = in_layout(recipes.initial_model(llama), llama, tmp_path / "llama")
    file = tmp_path / "recipe.yaml"
    for setting, value, there in (("vocab_size", 300, 256), ("architecture", "gpt2", "llama")):
        written = write(llama, file, "config", init_from=str(folder), **{setting: value})
        capfd.readouterr()
        assert cli.main(["train", str(written)]) == 2
        out, err = capfd.readouterr()
        line = f"lte: model.{setting}: {value}, but {folder / 'config.json'} says {there}; leave it out"
        assert (out, err.count("\n")) == ("", 1) and err.startswith(line)
    (folder / "config.json").write_text("{")
    assert cli.main(["train", str(write(llama, file, "config", init_from=str(folder)))]) == 2
    assert f"model.init_from: {folder} cannot be read" in capfd.readouterr().err
    # What names settings is compared with the checkpoint, not completed.
    written = write(llama, file, "config", init_from=str(folder), config={"hidden_size": 32})
    assert recipes.load(written, say=pytest.fail).model.config == {"hidden_size": 32}


def test_all_commands_see_what_was_taken(
    data: Data, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Server, workers, whoever resumes without the checkpoint, and what tells beforehand."""
    run, llama = tmp_path / "run", recipe_of("llama", data, **{"model.config.attention_bias": True})
    llama = config.replace(llama, **{"run.dir": str(run), "server.address": f"inprocess://{run}"})
    folder = in_layout(trained_before(llama), llama, tmp_path / "llama")
    out = ["architecture", "config", "vocab_size"]
    written = str(write(llama, tmp_path / "recipe.yaml", *out, init_from=str(folder)))
    capfd.readouterr()
    assert cli.main(["convert", written, "--dry-run", "--json"]) == 0
    shown = capfd.readouterr().out
    assert "q_proj.bias" in json.dumps(json.loads(shown)), "it has biases"
    assert cli.main(["convert", written, "--dry-run"]) == 0
    assert capfd.readouterr().out.startswith("model: architecture llama, vocab_size 256 and")
    assert cli.main(["train", written]) == 0
    assert capfd.readouterr().out.count("are taken from") == 1
    folder.rename(tmp_path / "gone")
    begun = config.load(run / "config.yaml")
    assert begun.model.config["attention_bias"] is True and begun.model.config["hidden_size"] == 32
    capfd.readouterr()
    assert cli.main(["train", written]) == 0
    assert "finished already" in capfd.readouterr().out
    assert cli.main(["train", written, "train.rounds=3"]) == 0
    assert [line["version"] for line in lines(run, "round")] == [1, 2, 3]
    # A run is a checkpoint, too.
    written = str(write(llama, tmp_path / "recipe.yaml", *out, init_from=str(run)))
    more = recipes.load(written, [f"run.dir={tmp_path / 'more'}"])
    assert more.model.config == begun.model.config
    assert_same(recipes.starting_model(more), recipes.load_run(run, "master")[0])


def test_a_pickle_is_refused_with_the_cure(data: Data, tmp_path: Path) -> None:
    llama = recipe_of("llama", data)
    folder = in_layout(recipes.initial_model(llama), llama, tmp_path / "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    plain = tmp_path / "plain"
    plain.mkdir()
    torch.save({}, plain / "weights.pt")
    for path, file in ((folder, "pytorch_model.bin"), (plain, "weights.pt"), (plain / "weights.pt", "")):
        with pytest.raises(ConfigError, match=r"is a pickle.*safetensors.*save_pretrained") as raised:
            starting(llama, path)
        (line,) = raised.value.faults
        assert line.startswith(f"model.init_from: {path / file if file else path} is")


def test_a_master_keeps_the_weights_that_it_is_given(data: Data, tmp_path: Path) -> None:
    recipe = recipe_of("gpt", data, **{"base.quant": "nf4"})
    model = trained_before(recipe)
    given = config.replace(recipe, **{"model.init_from": "anywhere"})
    for kept, settings in (
        (False, recipe),
        (True, given),
        (True, config.replace(recipe, **{"base.keep_initial": True})),
        (False, config.replace(given, **{"base.keep_initial": False})),
        (False, config.replace(given, **{"lora.merge": "never", "train.workers": 1})),
    ):
        master = Master(model, settings)
        for name, spec in master.plan.adapted.items():
            whole = to_matrix(model.get_parameter(spec.parameter).detach(), spec)
            rounded = quantize.dequantize(quantize.quantize(whole, "nf4"))
            assert torch.equal(quantize.dequantize(master.base[name]), rounded)
            assert torch.equal(master.weights[name], whole if kept else rounded)
            assert not torch.equal(whole, rounded)


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if line["kind"] == kind]


def test_a_run_goes_on_from_a_run_and_needs_it_no_more(
    data: Data, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its server reads it once; not its workers, nor whoever resumes, measures or rolls it back."""

    def settings(folder: Path, **changes: Any) -> Recipe:
        where = {"run.dir": str(folder), "server.address": f"inprocess://{folder}"}
        return recipe_of("gpt", data, **where, **changes)

    first, second = tmp_path / "first", tmp_path / "second"
    assert local.train_in_threads(settings(first, **{"outer.ema": 0.5})) == 0
    given, _, _ = recipes.load_run(first, "master")
    for which in ("published", "master", "ema"):
        start = starting(settings(second), first, **{"model.init_weights": which})
        assert_same(start, recipes.load_run(first, which)[0])

    more = {"model.init_from": str(first), "log.diagnostics_every": 1, "server.keep_checkpoints": 9}
    recipe = settings(second, **more)
    with recipes.make_server(recipe, display=False) as server:
        assert server.master.master_digest() == Master(given, recipe).master_digest()
        first.rename(tmp_path / "gone")
        workers = [
            threading.Thread(
                target=recipes.work,
                args=(server.address,),
                kwargs={"worker_id": f"w{k}", "say": lambda _: None, "recipe": own},
            )
            for k, own in enumerate((recipe, settings(second)))
        ]
        for worker in workers:
            worker.start()
        assert server.serve()
        for worker in workers:
            worker.join()
    with torch.no_grad():
        begun = task_of(recipe).evaluate(given, 0).loss
    assert lines(second, "done")[-1]["loss_master"] < begun, "it went on"
    # What was rounded of the given weights is no update of theirs.
    of_module = lines(second, "diagnostics")[0]["modules"]["blocks.0.mlp.up"]
    assert of_module["effective_rank"] == pytest.approx(of_module["round_effective_rank"], rel=1e-3)

    # The same command finds it complete; with more rounds it goes on.
    capfd.readouterr()
    digest = lines(second, "done")[-1]["master_digest"]
    assert checkpoint.load(checkpoint.newest(second))[0].master_digest == digest
    assert local.train_in_threads(config.replace(recipe, **{"train.rounds": 3})) == 0
    assert [line["version"] for line in lines(second, "round")] == [1, 2, 3]
    for back_to in (1, 0):  # to 1 by merging again what was given, which has its digest
        assert cli.main(["rollback", str(second), "--version", str(back_to)]) == 0
        model, _, version = recipes.load_run(second, "master")
        assert version == back_to
    assert_same(model, given)


def test_other_weights_are_refused_in_a_line_of_each_kind(
    data: Data, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of("gpt", data, **{"run.dir": str(tmp_path / "run")})
    model = trained_before(recipe)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    def refusal(path: Path, of: Recipe = recipe) -> list[str]:
        with pytest.raises(ConfigError) as raised:
            starting(of, path)
        assert all(line.startswith(f"model.init_from: {path}") for line in raised.value.faults)
        assert not any("\n" in line for line in raised.value.faults)
        return raised.value.faults

    file = tmp_path / "file.safetensors"
    less = {key: tensor for key, tensor in state.items() if not key.startswith("blocks.1")}
    save_file(less, file)
    assert refusal(file) == [
        f"model.init_from: {file} lacks 6 tensors: blocks.1.attention.out.weight,"
        " blocks.1.attention.qkv.weight, blocks.1.attention_norm.weight, ..."
    ]
    save_file(state | {"norm.weight": torch.zeros(3), "more": torch.zeros(1)}, file)
    assert refusal(file) == [
        f"model.init_from: {file} has in another shape 1 tensor: norm.weight (3, not 32)",
        f"model.init_from: {file} has, and the model has not, 1 tensor: more",
    ]
    file.write_bytes(b"none")
    for path in (file, tmp_path / "nothing", tmp_path):
        assert "cannot be read" in refusal(path)[0]

    # The digest of what lte wrote is looked at.
    out = tmp_path / "exported"
    out.mkdir()
    save_file(state, out / "model.safetensors", {"lte.digest": quantize.digest(sorted(state.items()))})
    assert_same(starting(recipe, out), model)
    save_file(
        state | {"norm.weight": state["norm.weight"] + 1}, out / "model.safetensors", {"lte.digest": "0"}
    )
    assert "is damaged" in refusal(out)[0]

    # transformers' layout: the settings are compared, as not all of them show in shapes; then tensors.
    llama = recipe_of("llama", data, **{"run.dir": str(tmp_path / "run")})
    folder = in_layout(recipes.initial_model(llama), llama, tmp_path / "llama")
    assert "holds another model: a llama, not a arcee" in refusal(folder)[0]
    (line,) = refusal(folder, config.replace(llama, **{"model.config.rms_norm_eps": 1e-5}))
    assert line.endswith("holds another model: rms_norm_eps is 1e-06, not 1e-05")
    held = load_file(folder / "model.safetensors")
    del held["model.norm.weight"]
    held |= {"lm_head.weight": torch.zeros(3, 3), "more": torch.zeros(1)}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    assert refusal(folder, llama) == [
        f"model.init_from: {folder} lacks 1 tensor: model.norm.weight",
        f"model.init_from: {folder} has in another shape 1 tensor: lm_head.weight (3x3, not 256x32)",
        f"model.init_from: {folder} has, and the model has not, 1 tensor: more",
    ]

    # As a person meets it.
    written = tmp_path / "recipe.yaml"
    address = f"server.address=inprocess://{tmp_path}"
    written.write_text(config.to_yaml(config.replace(recipe, **{"model.init_from": str(file)})))
    capfd.readouterr()
    assert cli.main(["train", str(written), address]) == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("architecture", "which"),
    [
        ("mixtral", ".experts.1.w1.weight"),
        ("mixtral", ".experts.3.w2.weight"),
        ("cohere2_moe", ".experts.0.up_proj.weight"),
        ("cohere2_moe", ".experts.1.down_proj.weight"),
    ],
)
def test_the_experts_tensor_that_is_amiss_is_named(
    architecture: str, which: str, data: Data, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the name that it has there, though the library cannot stack the others without it."""
    described = recipe_of("mixtral", data, **{"model.architecture": architecture})
    small = {key: value for key, value in described.model.config.items() if key != "num_local_experts"}
    experts = {"num_local_experts" if architecture == "mixtral" else "num_experts": 4}
    recipe = config.replace(described, **{"model.config": small | experts})
    folder = in_layout(recipes.initial_model(recipe), recipe, tmp_path / "checkpoint")
    file = folder / "model.safetensors"
    held = load_file(file)
    name = next(key for key in sorted(held) if key.endswith(which))
    rest = {key: tensor for key, tensor in held.items() if key != name}
    for changed, lines in (
        ({}, [f" lacks 1 tensor: {name}"]),
        ({name: held[name][:, :9].contiguous()}, [f" has in another shape 1 tensor: {name} ("]),
        (
            {"model.more": held[name]},
            [f" lacks 1 tensor: {name}", " has, and the model has not, 1 tensor: model.more"],
        ),
        ({name: held[name].flatten()}, [f" has in another shape 1 tensor: {name} ("]),
    ):
        save_file(rest | changed, file, {"format": "pt"})
        with pytest.raises(ConfigError) as raised:
            starting(recipe, folder)
        assert len(raised.value.faults) == len(lines)
        for fault, line in zip(raised.value.faults, lines, strict=True):
            assert fault.startswith(f"model.init_from: {folder}{line}")
    capfd.readouterr()
    written = tmp_path / "recipe.yaml"
    written.write_text(config.to_yaml(config.replace(recipe, **{"model.init_from": str(folder)})))
    save_file(rest, file, {"format": "pt"})
    assert cli.main(["train", str(written), f"server.address=inprocess://{tmp_path}"]) == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"lte: model.init_from: {folder} lacks 1 tensor: {name}\n")
    # Of other names nothing is said that is not so.
    save_file({f"other.{key}": tensor for key, tensor in rest.items()}, file, {"format": "pt"})
    with pytest.raises(ConfigError):
        starting(recipe, folder)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.init_weights=ema", "model.init_weights: ema is of a run"),
        ("model.init_from=runs/default", "model.init_from: runs/default is run.dir itself"),
        ("base.keep_initial=true", "base.keep_initial: is for a master that merges"),
    ],
)
def test_settings_that_contradict_each_other(override: str, line: str) -> None:
    key, _, value = override.partition("=")
    lora = {"lora.merge": "never", "train.workers": 1}
    with pytest.raises(ConfigError, match=line):
        config.replace(Recipe(), **lora, **{key: value == "true" or value})


def test_a_model_of_from_pretrained_is_converted_and_trained(data: Data, tmp_path: Path) -> None:
    """The library's way: a model of the user's own, in no recipe."""
    recipe = recipe_of("gpt2", data, **{"compress.dense": "fp32"})
    in_layout(trained_before(recipe), recipe, tmp_path / "gpt2")

    def load() -> Any:
        with hf.quiet():
            return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")

    settings = {"run.dir": str(tmp_path / "run"), "server.address": f"inprocess://{tmp_path}"}
    own = config.replace(recipe, **settings, **{"base.keep_initial": True, "train.workers": 1})
    stream, given = task_of(recipe).stream(0), load()
    model = lte.convert(load(), own.lora, own.base.quant)

    def work(address: str) -> None:
        with Worker(model, address) as worker:
            while not worker.done:
                loss = task_of(recipe).loss(model, stream.batch(worker.step_index))
                loss.backward()
                worker.step(loss)

    with lte.Server(given, own, display=False) as server:
        for name, spec in server.master.plan.adapted.items():
            whole = to_matrix(given.get_parameter(spec.parameter).detach(), spec)
            assert torch.equal(server.master.weights[name], whole)
        thread = threading.Thread(target=work, args=(server.address,))
        thread.start()
        assert server.serve()
        thread.join()
        model.eval()
        server.master.fill(given, "published")
    x = stream.batch(0)[:, :-1]
    with torch.no_grad():
        assert (model(x).logits - given.eval()(x).logits).abs().max() < 1e-4
        assert (given(x).logits - load().eval()(x).logits).abs().max() > 1e-2


def test_counterparts_name_every_parameter(data: Data) -> None:
    for name in ("gpt", "vit"):
        recipe = recipe_of(name, data)
        ours = recipes.initial_model(recipe)
        theirs = export.merged.in_transformers(ours, recipe)
        counterpart = counterpart_of(recipe.model)
        named = [part for key, _ in ours.named_parameters() for part in counterpart.of(key)]
        assert sorted(named) == sorted(key for key, _ in theirs.named_parameters())
        there = dict(theirs.named_parameters())
        for key, tensor in ours.named_parameters():
            assert torch.equal(counterpart.take(there, key, tuple(tensor.shape)), tensor)
        assert not there
