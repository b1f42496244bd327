"""Data-parallel training: it is what it says, goes on where it was, and counts what it sends."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.cluster import ENDS_WITHIN_S, Fault, Script, shards
from forks import fork
from namespaces import Inside, star
from processes import Family, done, lines, versions
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_optim import stepped_naively
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from launch import exits, local
from lte import config, cost, ddp, quantize, recipes
from lte.cli import main
from lte.config import Recipe
from lte.data import pack_images
from lte.ddp import Place
from lte.ddp.exchange import Exchange
from lte.errors import ConfigError, DivergedError, RunEnded
from lte.nn import plan, to_matrix
from lte.optim.groups import groups
from lte.schedule import factor_in
from lte.server import checkpoint
from lte.tasks import Text, task_of

SETTINGS: dict[str, Any] = {
    "run.dir": "run",
    "run.seed": 3,
    "model.num_layers": 1,
    "model.width": 32,
    "model.num_attention_heads": 2,
    "model.mlp_width": 64,
    "model.context_tokens": 16,
    "data.shards": "shards",
    "train.method": "ddp",
    "train.rounds": 4,
    "train.local_steps": 3,
    "train.workers": 3,
    "train.batch_size": 4,
    "schedule.warmup_steps": 3,
    "base.quant": "nf4",
    "optimizer.name": "adamw",
    "optimizer.dense_lr": 5e-3,
    "server.checkpoint_every": 2,
    "eval.every": 2,
    "eval.sample_tokens": 0,
}
STEPS = 12
RESNET: dict[str, Any] = {
    "data__kind": "images",
    "data__shards": "images",
    "model__name": "transformers",
    "model__architecture": "resnet",
    "model__config": {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"},
    "model__image_size": 12,
    "model__num_classes": 3,
    "model__num_layers": 4,
    "model__width": 128,
    "model__num_attention_heads": 4,
    "model__mlp_width": 512,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def folder(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shards").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def family(folder: Path) -> Iterator[Family]:
    family = Family(folder)
    yield family
    family.close()


def recipe_of(**changes: Any) -> Recipe:
    return config.replace(Recipe(), **SETTINGS | {k.replace("__", "."): v for k, v in changes.items()})


def write(recipe: Recipe) -> Path:
    path = Path("recipe.yaml")
    path.write_text(config.to_yaml(recipe))
    return path


# Workers in processes of their own, with faults


def _work(recipe: Recipe, place: Place, faults: Sequence[Script], folder: Path) -> None:
    os.chdir(folder)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    log = os.open(f"log-{place.number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for fault in faults:
        fault.install()
    try:
        raise SystemExit(ddp.train(recipe, place, claimed=False))
    except RunEnded as error:
        print(error)
        raise SystemExit(exits.EXIT_RUN_ENDED) from None


def train(recipe: Recipe, **faults: Script) -> list[int]:
    """Run all workers; `w1=Fault(...)` is worker 1's. Returns their exit codes: of one that stopped, the
    signal's number."""
    size, codes = recipe.train.workers, []
    meeting = Path(f"meeting-{uuid.uuid4().hex}")
    processes = []
    for k in range(size):
        place = Place(number=k, size=size, local_number=k, local_size=size, meeting=str(meeting.resolve()))
        own = [faults[f"w{k}"]] if f"w{k}" in faults else []
        processes.append(fork(_work, recipe, place, own, Path.cwd()))
    for process in processes:
        process.join(ENDS_WITHIN_S)
        assert process.exitcode is not None, [path.read_text() for path in Path().glob("log-*")]
        codes.append(process.exitcode)
        process.close()
    return codes


def digest(run: str = "run") -> str:
    return str(done(Path(run))["master_digest"])


# What it computes


class Naive:
    """One process and one model, whose batch is that of all workers; nothing of `lte` but data, rates and
    the initial weights."""

    def __init__(self, recipe: Recipe, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        self.recipe, self.task = recipe, task_of(recipe)
        self.model = recipes.initial_model(recipe)
        self.optimizer = optimizer(self.model)
        self.losses: list[float] = []
        streams = [self.task.stream(k) for k in range(recipe.train.workers)]
        average: dict[str, Tensor] = {}
        weight = 0.0
        for step in range(STEPS):
            batch = torch.cat([stream.batch(step) for stream in streams])
            loss = self.task.loss(self.model, batch)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.optimizer.clip_norm)
            scale = factor_in(recipe, *divmod(step, recipe.train.local_steps))
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.optimizer.dense_lr * scale
            self.optimizer.step()
            self.losses.append(float(loss.detach()))
            if recipe.outer.ema and (step + 1) % recipe.train.local_steps == 0:
                weight = recipe.outer.ema * weight + 1 - recipe.outer.ema
                for name, p in self.model.state_dict().items():
                    old = average.get(name, torch.zeros_like(p, dtype=torch.float64))
                    average[name] = recipe.outer.ema * old + (1 - recipe.outer.ema) * p.double()
        self.average = {name: tensor / weight for name, tensor in average.items()}

    def loss(self, weights: dict[str, Tensor] | None = None) -> float:
        model = recipes.initial_model(self.recipe).eval()
        model.load_state_dict(weights or self.model.state_dict())
        with torch.no_grad():
            return float(self.task.evaluate(model, 0).loss or 0)

    def in_nf4(self) -> dict[str, Tensor]:
        weights = self.model.state_dict()
        adapted = plan(recipes.initial_model(self.recipe), self.recipe.lora, "nf4").adapted
        for spec in adapted.values():
            rounded = quantize.quantize(to_matrix(weights[spec.parameter], spec), "nf4")
            weights[spec.parameter] = quantize.dequantize(rounded)
        return weights


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    decays = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(decays, betas=(0.9, 0.95))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), momentum=0.9)


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        (adamw, {"optimizer__dense_weight_decay": 0.1, "outer__ema": 0.8, "train__accumulate": 2}),
        (sgd, {"optimizer__name": "sgd", "optimizer__momentum": 0.9, "optimizer__dense_lr": 0.3}),
    ],
)
def test_workers_do_what_one_does_with_the_batches_of_all(
    optimizer: Callable[[nn.Module], torch.optim.Optimizer], changes: dict[str, Any], folder: Path
) -> None:
    recipe = recipe_of(**changes)
    assert train(recipe) == [0, 0, 0]
    naive = Naive(recipe, optimizer)
    assert naive.losses[-1] < naive.losses[0] - 1, "it learns"
    rounds = lines(folder / "run", "round")
    means = torch.tensor(naive.losses).view(-1, recipe.train.local_steps).mean(1).tolist()
    assert [line["train_loss"] for line in rounds] == pytest.approx(means, rel=1e-5)
    num_parameters = sum(p.numel() for p in naive.model.parameters())
    once_a_step = 4 * num_parameters * recipe.train.local_steps
    assert {line["payload_bytes"] for line in rounds} == {once_a_step}, "not once a piece of a batch"
    master, _, version = recipes.load_run(folder / "run", "master")
    assert version == 4
    for name, tensor in naive.model.state_dict().items():
        torch.testing.assert_close(master.state_dict()[name], tensor, rtol=1e-3, atol=2e-5)
    end = done(folder / "run")
    assert end["loss_master"] == pytest.approx(naive.loss(), rel=1e-5)
    assert end["loss"] == pytest.approx(naive.loss(naive.in_nf4()), rel=1e-3)
    assert end["loss"] != end["loss_master"]
    if recipe.outer.ema:
        assert end["loss_ema"] == pytest.approx(naive.loss(naive.average), rel=1e-5)


def test_one_worker_does_what_the_servers_only_worker_does(folder: Path) -> None:
    """As in configs/quickstart-adamw.yaml: no module is adapted."""
    own = {"train__workers": 1, "lora__modules": [], "base__quant": "none", "compress__dense": "fp32"}
    recipe = recipe_of(**own, run__dir="ddp")
    assert alone(recipe, folder) == 0
    lte = recipe_of(**own, run__dir="lte", train__method="lte", server__address=f"inprocess://{folder}")
    assert local.train_in_threads(lte) == 0
    for kind, key in (("round", "train_loss"), ("eval", "loss"), ("eval", "loss_master")):
        ours, theirs = ([line[key] for line in lines(folder / run, kind)] for run in ("ddp", "lte"))
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert ours[-1] < ours[0] - 0.3
    for key in ("version", "tokens", "lr"):
        ours, theirs = ([line[key] for line in lines(folder / run, "round")] for run in ("ddp", "lte"))
        assert ours == theirs
    assert done(folder / "ddp").keys() == done(folder / "lte").keys()


def test_with_muon_hidden_matrices_have_the_dense_rate_and_the_rest_its_own(folder: Path) -> None:
    settings = recipe_of(optimizer__name="muon", optimizer__adamw_lr=1e-4).optimizer
    model = recipes.initial_model(recipe_of())
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: (g["lr"], g["orthogonal"]) for g in groups(model, settings) for p in g["params"]}
    assert {name for name, rate in rates.items() if rate == (5e-3, True)} == {
        f"blocks.0.{module}.weight" for module in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    }
    assert {rate for rate in rates.values() if rate != (5e-3, True)} == {(1e-4, False)}


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")  # torch, of speed
def test_with_muon_kernels_of_convolutions_step_as_matrices(folder: Path) -> None:
    images(folder)
    muon = {"optimizer__name": "muon", "optimizer__muon_momentum": 0.9, "optimizer__clip_norm": 0.0}
    flat = {"schedule__name": "constant", "schedule__warmup_steps": 0}
    recipe = recipe_of(**RESNET, **muon, **flat, train__workers=1, train__rounds=1)
    gradients = dict[int, list[Tensor]]()

    def watch(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            gradients.setdefault(p.data_ptr(), []).append(p.grad.clone())
            trained[p.data_ptr()] = p

    trained = dict[int, nn.Parameter]()
    hook = register_optimizer_step_pre_hook(watch)
    try:
        assert alone(recipe, folder) == 0
    finally:
        hook.remove()
    ended = recipes.load_run(Path("run"), "master")[0]
    kernels = 0
    for name, start in recipes.initial_model(recipe).named_parameters():
        if start.ndim == 4 and "embed" not in name:
            end = ended.get_parameter(name)
            (at,) = (at for at, p in trained.items() if p.shape == end.shape and torch.equal(p, end))
            expected = stepped_naively(start, gradients[at], 5e-3, (start.shape[0], start[0].numel()))
            assert torch.allclose(end.double(), expected, rtol=0, atol=1e-5), name
            kernels += 1
    assert kernels == 2


# What it sends


@pytest.mark.parametrize("hook", ["none", "bf16", "powersgd"])
def test_recorded_bytes_are_the_payload_around_a_ring(hook: str, folder: Path) -> None:
    """The kernel's count against what torch hands to all-reduce, which moves 2 (N - 1) / N of it a worker.
    Beside the payload go Gloo's own headers, what stops the workers, and losses."""
    recipe = recipe_of(ddp__hook=hook, ddp__powersgd_start=6, ddp__powersgd_rank=16, model__width=128)
    assert train(recipe) == [0, 0, 0]
    shapes = [tuple(p.shape) for p in recipes.initial_model(recipe).parameters()]
    whole = sum(torch.Size(shape).numel() for shape in shapes)
    factors = sum(16 * sum(shape) if len(shape) == 2 else shape[0] for shape in shapes)
    a_step = {"none": 4 * whole, "bf16": 2 * whole, "powersgd": 4 * factors}[hook]
    expected = [3 * (4 * whole if hook == "powersgd" and version <= 2 else a_step) for version in range(1, 5)]
    rounds = lines(folder / "run", "round")
    assert [line["payload_bytes"] for line in rounds] == expected
    assert cost.gradient_bytes(recipe, cost.plan_of(recipe)) == a_step, "as it is planned"
    for line in rounds:
        ring = 4 * line["payload_bytes"]
        assert ring < line["uplink_bytes"] < ring * 1.02 + 24_000
        assert line["downlink_bytes"] == pytest.approx(line["uplink_bytes"], abs=2000)
    end = done(folder / "run")
    assert end["uplink_bytes"] == sum(line["uplink_bytes"] for line in rounds)
    assert rounds[-1]["train_loss"] < rounds[0]["train_loss"] - 1, "it learns"


def test_by_gloo_powersgd_has_one_bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it hands to all-reduce from callbacks mixes between buckets, and workers differ in how: that
    aborted them. This model has several buckets by torch's rule."""
    buckets = {"none": set[int](), "powersgd": set[int]()}
    reduced = Exchange._reduced
    for hook, seen in buckets.items():

        def noted(exchange: Exchange, bucket: GradBucket, seen: set[int] = seen) -> Future[Tensor]:
            seen.add(bucket.index())
            return reduced(exchange, bucket)

        monkeypatch.setattr(Exchange, "_reduced", noted)
        own = {"ddp__hook": hook, "ddp__powersgd_start": 2, "run__dir": hook}
        assert alone(recipe_of(train__workers=1, model__width=512, train__rounds=1, **own), folder) == 0
    assert buckets["powersgd"] == {0} < buckets["none"]


def test_recorded_bytes_are_what_the_interface_carried(folder: Path) -> None:
    """Loopback's own counters in a network namespace where nobody else is. Finding each other, the first
    copy of the weights and one rehearsal are not in the records: 3 % of this run."""
    recipe = recipe_of(train__workers=2, model__width=128, train__rounds=12, eval__every=0)
    with star(num_leaves=0) as network:
        assert train(recipe, w0=Inside(network.hub), w1=Inside(network.hub)) == [0, 0]
        inside = ["ip", "netns", "exec", network.hub]
        counters = "/sys/class/net/lo/statistics/tx_bytes"
        carried = int(subprocess.run([*inside, "cat", counters], check=True, capture_output=True).stdout)
    assert done(folder / "run")["uplink_bytes"] == pytest.approx(carried, rel=0.08)


# Going on


RESUMED = {"ddp__hook": "powersgd", "ddp__powersgd_start": 4, "outer__ema": 0.8, "run__resume": "auto"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "shards").symlink_to(data)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert train(recipe_of(**RESUMED)) == [0, 0, 0]
    finally:
        os.chdir(before)
    return folder / "run"


@pytest.mark.parametrize(
    ("who", "fault"),
    [
        (1, Fault("lte.ddp.trainer:Trainer.step", call=9)),
        (0, Fault("lte.ddp.trainer:Trainer.step", call=5)),
        (0, Fault("lte.server.checkpoint:save", call=2)),
        (0, Fault("lte.server.checkpoint:save", call=2, after=True)),
        (2, Fault("lte.ddp.trainer:Trainer.save_own", call=2)),
        (0, Fault("lte.ddp.keeper:Keeper.finish")),
    ],
    ids=[
        "midst of a round",
        "before a checkpoint",
        "of its own files",
        "after one",
        "writing one",
        "at the end",
    ],
)
def test_a_run_whose_worker_was_killed_goes_on_with_the_same_bits(
    who: int, fault: Fault, folder: Path, undisturbed: Path
) -> None:
    recipe = recipe_of(**RESUMED)
    codes = train(recipe, **{f"w{who}": fault})
    assert codes[who] == -signal.SIGKILL
    others = {code for k, code in enumerate(codes) if k != who}
    assert others == ({0} if "finish" in fault.function else {exits.EXIT_RUN_ENDED})
    assert not any(line["kind"] == "done" for line in lines(folder / "run", "done"))
    assert train(recipe) == [0, 0, 0]
    assert digest() == digest(str(undisturbed))
    assert versions(folder / "run") == [1, 2, 3, 4]
    assert lines(folder / "run", "eval")[-1]["loss_ema"] == lines(undisturbed, "eval")[-1]["loss_ema"]
    for kind in ("round", "eval"):
        ours, theirs = (lines(run, kind) for run in (folder / "run", undisturbed))
        for key in {"train_loss", "tokens", "loss"} & theirs[0].keys():
            assert [line[key] for line in ours] == [line[key] for line in theirs]


def test_a_signal_to_one_worker_stops_all_after_the_step_at_hand(folder: Path, undisturbed: Path) -> None:
    recipe = recipe_of(**RESUMED)
    told = Fault("lte.ddp.trainer:Trainer.step", call=4, number=signal.SIGTERM)
    assert train(recipe, w1=told) == [signal.SIGTERM] * 3
    found = checkpoint.newest(folder / "run")
    _, state = checkpoint.load(found)
    assert (checkpoint.version_of(found), int(state["ddp"]["step"])) == (1, 5), "in the midst of round 2"
    assert train(recipe) == [0, 0, 0]
    assert digest() == digest(str(undisturbed))
    assert [line["train_loss"] for line in lines(folder / "run", "round")] == [
        line["train_loss"] for line in lines(undisturbed, "round")
    ]


def test_moments_stay_with_their_parameters_when_other_rates_group_them(folder: Path) -> None:
    """At a rate of zero, so that gradients are the same however parameters are grouped."""
    assert train(recipe_of(train__workers=2, train__rounds=2)) == [0, 0]
    shutil.copytree(folder / "run", folder / "regrouped")
    still = {"train__workers": 2, "train__rounds": 3, "run__resume": "auto", "optimizer__dense_lr": 0.0}
    rates = [{"modules": "blocks.0.attention*", "factor": 0.5}, {"modules": "*norm*", "factor": 2.0}]
    assert train(recipe_of(**still)) == [0, 0]
    assert train(recipe_of(**still, run__dir="regrouped", optimizer__rates=rates)) == [0, 0]
    moments = [
        checkpoint.load(checkpoint.newest(folder / run))[1]["optimizer"] for run in ("run", "regrouped")
    ]
    assert moments[0].keys() == moments[1].keys()
    assert {name.partition("/")[0] for name in moments[0]} == dict(
        recipes.starting_model(recipe_of()).named_parameters()
    ).keys()
    assert all(torch.equal(moments[1][name], tensor) for name, tensor in moments[0].items())
    assert digest("regrouped") == digest()
    assert "moments" not in [line["what"] for line in lines(folder / "regrouped", "event")]


def test_a_run_goes_on_with_another_optimizer_and_says_whose_moments_begin_anew(folder: Path) -> None:
    recipe = recipe_of(train__rounds=2, run__resume="auto")
    assert train(recipe) == [0, 0, 0]
    assert train(recipe_of(run__resume="auto", optimizer__name="muon")) == [0, 0, 0]
    (event,) = [line for line in lines(folder / "run", "event") if line["what"] == "moments"]
    assert event["version"] == 2
    assert "begin anew, empty: the state saved is AdamW's, not Muon's (" in event["message"]
    assert math.isfinite(done(folder / "run")["loss"])


def test_what_a_worker_of_another_version_of_lte_wrote_is_refused_in_a_line(folder: Path) -> None:
    recipe = recipe_of(train__rounds=2, train__workers=2, run__resume="auto")
    assert train(recipe) == [0, 0]
    for path in (folder / "run" / "workers").glob("w*/step-00000006.safetensors"):
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            described = {"numbers": file.metadata()["numbers"]}
        save_file(tensors, path, described)
    assert 0 not in train(recipe_of(train__workers=2, run__resume="auto"))
    said = (folder / "log-0").read_text() + (folder / "log-1").read_text()
    assert "of another version of lte; choose another run.dir, or run.resume=never" in said


def test_statistics_of_norms_are_averaged_and_go_on(folder: Path) -> None:
    """Batch norms see each worker's own batch; between rounds their statistics differ, and are not lost."""
    images(folder)
    resnet = RESNET | {"train__workers": 2}
    assert train(recipe_of(**resnet, run__dir="whole")) == [0, 0]
    told = Fault("lte.ddp.trainer:Trainer.step", call=4, number=signal.SIGUSR1)
    assert train(recipe_of(**resnet), w0=told) == [signal.SIGUSR1] * 2
    own = [load_file(folder / f"run/workers/w{k}/step-00000005.safetensors") for k in range(2)]
    name = "buffer/resnet.embedder.embedder.normalization.running_mean"
    assert not torch.equal(own[0][name], own[1][name])
    assert train(recipe_of(**resnet)) == [0, 0]
    assert digest("run") == digest("whole")
    ends = [load_file(folder / f"run/workers/w{k}/step-00000012.safetensors") for k in range(2)]
    assert torch.equal(ends[0][name], ends[1][name])
    master, _, _ = recipes.load_run(folder / "run", "master")
    assert torch.equal(dict(master.named_buffers())[name.removeprefix("buffer/")], ends[0][name])


def images(folder: Path) -> None:
    source = folder / "mnist"
    source.mkdir()
    generator = np.random.default_rng(0)
    for split, number in (("train", 200), ("t10k", 30)):
        labels = generator.integers(0, 3, number, np.uint8)
        pixels = generator.integers(0, 60, (number, 12, 12), np.uint8) + 90 * labels[:, None, None]
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
            (source / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())
    pack_images(source, folder / "images", num_shards=2)


# The command


def test_the_command_trains_and_others_read_what_it_wrote(
    family: Family, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(eval__sample_tokens=20)
    command = family.start("train", write(recipe))
    assert command.ended() == 0, command.err
    assert command.err == ""
    assert "3, data-parallel, gradients in fp32" in command.out
    assert "trained at full rank" in command.out
    assert "The trained model writes:" in command.out
    for name in ("config.yaml", "checkpoints", "logs", "loss.png", "sample.txt"):
        assert (folder / "run" / name).exists()
    assert [path.read_text() for path in sorted((folder / "run/logs").iterdir())] == [""] * 3
    end = done(folder / "run")
    assert (end["rounds"], end["workers"], end["tokens"]) == (4, 3, 12 * 3 * 4 * 16)
    capfd.readouterr()
    assert main(["eval", "run"]) == 0
    told = capfd.readouterr().out
    assert f"loss {end['loss']:.4f}" in told
    assert f"loss {end['loss_master']:.4f}" in told
    assert main(["generate", "run", "--tokens", "5"]) == 0
    assert main(["report", "run"]) == 0
    assert "data-parallel" in capfd.readouterr().out
    assert main(["train", "recipe.yaml"]) == 0
    assert "finished already" in capfd.readouterr().out
    assert main(["rollback", "run", "--version", "2"]) == 2
    assert "keeps no journal" in capfd.readouterr().err

    # More rounds go on with it; another method does not.
    assert family.start("train", write(config.replace(recipe, **{"train.rounds": 5}))).ended() == 0
    assert versions(folder / "run") == [1, 2, 3, 4, 5]
    assert main(["train", "recipe.yaml", "train.method=lte"]) == 2
    assert "train.method: ddp -> lte" in capfd.readouterr().err
    assert main(["train", "recipe.yaml", "ddp.hook=bf16"]) == 2
    assert "ddp.hook: none -> bf16" in capfd.readouterr().err


LONG = {"train__rounds": 4000, "train__local_steps": 1, "eval__every": 0, "server__checkpoint_every": 1000}


def workers_of(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text()
    return [int(pid) for pid in children.split()]


def test_a_worker_that_dies_ends_all_with_one_line(family: Family, folder: Path) -> None:
    command = family.start("train", write(recipe_of(**LONG)))
    command.until_round(folder / "run", 3)
    family.kill(workers_of(command.pid)[1])
    assert command.ended() == 1
    assert command.err == "lte: worker 1 ended: killed by SIGKILL; see run/logs/worker-1.log\n"
    family.until_all_ended(0)


def test_sigterm_saves_and_leaves_and_the_same_command_goes_on(family: Family, folder: Path) -> None:
    path = write(recipe_of(**LONG))
    command = family.start("train", path)
    command.until_round(folder / "run", 3)
    command.signal(signal.SIGTERM)
    assert command.ended() == 128 + signal.SIGTERM
    assert command.err == ""
    assert "The same command goes on from here" in command.out
    family.until_all_ended(0)
    version = checkpoint.version_of(checkpoint.newest(folder / "run"))
    assert versions(folder / "run") == list(range(1, version + 1))
    assert "stopped by SIGTERM" in [line["message"] for line in lines(folder / "run", "event")]
    again = family.start("train", path)
    again.until_round(folder / "run", version + 2)
    again.signal(signal.SIGINT)
    assert again.ended() == 128 + signal.SIGINT
    steps = [line["tokens"] for line in lines(folder / "run", "round")]
    assert steps == [3 * 4 * 16 * k for k in range(1, len(steps) + 1)]


def test_nobody_outlives_a_launcher_that_was_killed(family: Family, folder: Path) -> None:
    command = family.start("train", write(recipe_of(**LONG)))
    command.until_round(folder / "run", 2)
    command.signal(signal.SIGKILL)
    command.ended()
    family.until_all_ended(ENDS_WITHIN_S)
    assert lines(folder / "run", "event")[-1]["message"] == "stopped by SIGTERM"


def test_torchrun_starts_it_too(family: Family, folder: Path) -> None:
    recipe = recipe_of(train__workers=2)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    worker = (sys.executable, "-m", "lte", "train", write(recipe))
    command = family.start_python(*torchrun, *worker, GLOO_SOCKET_IFNAME="lo")
    assert command.ended() == 0, command.err
    by_torchrun = digest()
    assert train(recipe_of(train__workers=2, run__dir="by-file")) == [0, 0]
    assert by_torchrun == digest("by-file")


def test_who_is_done_leaves_before_the_interpreter_ends(family: Family, folder: Path) -> None:
    """At the end of Python, Gloo's threads may end the process by std::terminate."""
    started = Path("started.py")  # as the installed `lte` is
    started.write_text(
        "import atexit, importlib.metadata\n"
        "atexit.register(print, 'Python ends')\n"
        "[command] = importlib.metadata.entry_points(group='console_scripts', name='lte')\n"
        "command.load()()\n"
    )
    recipe = write(recipe_of(train__workers=1))
    (folder / "run").mkdir()  # as `lte train` does before it starts workers
    place = Place(number=0, size=1, local_number=0, local_size=1, meeting=str(folder / "meeting"))
    worker = family.execute_python(started, "train", recipe, env={**os.environ, **place.environment()})
    assert worker.ended() == 0, worker.err
    assert versions(folder / "run")[-1] == recipe_of().train.rounds
    assert "Python ends" not in worker.out
    other = family.execute_python(started, "convert", recipe, "--dry-run")
    assert other.ended() == 0, other.err
    assert "Python ends" in other.out


# Mistakes


@pytest.mark.parametrize(
    ("words", "environment", "line"),
    [
        (
            ("train", "recipe.yaml"),
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"},
            "train.workers: 3, but torchrun started 2 processes; set train.workers=2",
        ),
        (
            ("train", "recipe.yaml"),
            {"RANK": "0", "WORLD_SIZE": "3"},
            "MASTER_PORT, MASTER_ADDR: not as torchrun sets it",
        ),
        (
            ("train", "recipe.yaml"),
            {"RANK": "x", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"},
            "RANK: not as torchrun sets it",
        ),
        (
            ("server", "recipe.yaml"),
            {},
            "train.method: ddp has no server; use 'lte train', or set train.method=lte",
        ),
        (("train", "recipe.yaml", "data.shards=nowhere"), {}, "nowhere"),
        (
            ("train", "recipe.yaml", "lora.freeze=[nothing.*]"),
            {},
            "lora.freeze: 'nothing.*' matches no parameter",
        ),
        (("train", "recipe.yaml", "optimizer.rates=[{modules: 'x'}]"), {}, "optimizer.rates: 'x' matches no"),
        (("train", "recipe.yaml", "ddp.powersgd_start=1"), {}, "ddp.powersgd_start: "),
        (
            ("train", "recipe.yaml", "lora.merge=never", "train.workers=1"),
            {},
            "lora.merge: never has no weights to quantize, as train.method = ddp has",
        ),
        (
            ("train", "recipe.yaml", "train.phases=[{from_round: 1, rank: 4}]"),
            {},
            "train.phases: are of heads and merges, which train.method = ddp has none of",
        ),
        (
            ("train", "recipe.yaml", "worker.device=cuda:7"),
            {},
            "worker.device: 'cuda:7' is not on this machine",
        ),
    ],
)
def test_a_mistake_gets_one_line(
    words: Sequence[str], environment: dict[str, str], line: str, family: Family, folder: Path
) -> None:
    write(recipe_of())
    command = family.start(*words, **environment)
    assert command.ended() == 2
    (said,) = command.err_lines
    assert line in said


def test_a_folder_in_use_is_said(family: Family, folder: Path) -> None:
    path = write(recipe_of(**LONG))
    command = family.start("train", path)
    command.until_round(folder / "run", 1)
    second = family.start("train", path)
    assert second.ended() == 2
    assert second.err.startswith("lte: run: in use by another")
    command.signal(signal.SIGTERM)
    command.ended()


def alone(recipe: Recipe, folder: Path) -> int:
    place = Place(number=0, size=1, local_number=0, local_size=1, meeting=str(folder / uuid.uuid4().hex))
    return ddp.train(recipe, place, claimed=False)


def test_its_update_is_from_the_weights_as_they_were(folder: Path) -> None:
    """And not from what was published of them, which is rounded."""
    updates = []
    for rank in (1, 3):
        recipe = recipe_of(
            run__dir=f"rank{rank}",
            train__workers=1,
            lora__rank=rank,
            optimizer__dense_lr=1e-4 * rank,
            server__keep_checkpoints=1,
        )
        assert alone(recipe, folder) == 0
        begun, ended = recipes.initial_model(recipe), recipes.load_run(Path(f"rank{rank}"), "master")[0]
        both = (model.get_parameter("blocks.0.mlp.up.weight").detach().numpy() for model in (ended, begun))
        updates.append(np.subtract(*both))
    u, v = (np.linalg.svd(update)[2].T for update in updates)
    naive = [np.linalg.norm(u[:, :1].T @ v[:, :j]) ** 2 for j in (1, 2, 3)]
    found = recipes.compare_updates(Path("rank1"), Path("rank3"))["blocks.0.mlp.up"].numpy()
    assert found == pytest.approx(np.array([naive]), abs=1e-3)


def test_numbers_that_are_not_finite_end_the_run(folder: Path) -> None:
    recipe = recipe_of(train__workers=1, optimizer__dense_lr=1e38, optimizer__clip_norm=0)
    with pytest.raises(DivergedError, match=r"diverged by local step 3: .* lower optimizer.dense_lr"):
        alone(recipe, folder)


def test_parameters_that_a_step_does_not_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused, unless the recipe allows for them: then they stay as they are."""

    def loss(self: Text, model: Any, batch: Tensor) -> Tensor:
        logits = model.output(model.embedding(batch[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    monkeypatch.setattr(Text, "loss", loss)
    with pytest.raises(ConfigError, match=r"set ddp.find_unused=true"):
        alone(recipe_of(train__workers=1), folder)
    recipe = recipe_of(train__workers=1, ddp__find_unused=True, run__dir="allowed")
    assert alone(recipe, folder) == 0
    before, (after, _, _) = recipes.initial_model(recipe), recipes.load_run(Path("allowed"), "master")
    for (name, was), (_, now) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(was, now) == (name not in ("embedding.weight", "output.weight"))
