"""Experiments that look at heads, bytes and memory more closely than records do; see reproduction.py.

`by_all_reduce` is LTE without a server: every worker holds the master, and the mean of their deltas is
all that they need of each other. It is a loop of its own on the library's modules, for reset-b, plain
averaging and one head a worker.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from runs import Figures, train_here
from torch import Tensor, nn

import lte
from launch import local
from lte import config, diagnostics, optim, quantize, recipes, schedule
from lte.config import Recipe
from lte.merge import HeadDelta
from lte.nn import adapted_modules, dense_parameters, draw_heads
from lte.server.master import Master
from lte.tasks import task_of
from lte.track import METRICS, Records
from lte.worker.trainer import Trainer

_FOUR_WORKERS = ("train.workers=4", "train.batch_size=16", "lora.heads=1", "run.resume=never")
_SHORT = ("train.rounds=6",)


class Merge(NamedTuple):
    """A merge that was just made.

    Attributes:
        version, samples: counted from the start. heads: every worker's, by module, as they were merged.
        models: every worker's; they differ in A alone.
    """

    version: int
    samples: int
    heads: dict[str, list[HeadDelta]]
    models: list[nn.Module]


def by_all_reduce(recipe: Recipe, *, same_data: bool = False, same_heads: bool = False) -> Iterator[Merge]:
    """Train a recipe.

    Args:
        same_data: all workers read the batches of the first. same_heads: all begin with its A.
    """
    task, plain, num_workers = task_of(recipe), recipes.initial_model(recipe), recipe.train.workers
    models = [lte.convert(copy.deepcopy(plain), recipe.lora, recipe.base.quant) for _ in range(num_workers)]
    for n, model in enumerate(models):
        draw_heads(model, recipe.lora, seed=recipe.run.seed, first_head=0 if same_heads else n, draw=0)
    streams = [task.stream(0 if same_data else n) for n in range(num_workers)]
    optimizers = [optim.make_optimizer(model, recipe.optimizer) for model in models]
    peaks = [group["lr"] for group in optimizers[0].param_groups]
    samples = 0
    for step in range(recipe.total_steps):
        factor = schedule.factor(recipe.schedule, step, recipe.total_steps, recipe.train.local_steps)
        for model, stream, optimizer in zip(models, streams, optimizers, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            batch = stream.batch(step)
            task.loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optim.clip(model, recipe.optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            samples += len(batch)
        version, left = divmod(step + 1, recipe.train.local_steps)
        if not left:
            yield Merge(version, samples, _merge(models), models)


@torch.no_grad()
def _merge(models: list[nn.Module]) -> dict[str, list[HeadDelta]]:
    """W += the mean of s B A, and every dense parameter becomes the mean of all; B = 0."""
    heads = {}
    for same in zip(*(adapted_modules(model) for model in models), strict=True):
        name, modules = same[0][0], [module for _, module in same]
        heads[name] = [
            HeadDelta(m.lora_A[0].clone(), m.lora_B[0].clone(), None, None, m.scale) for m in modules
        ]
        delta = torch.stack([m.scale * m.lora_B[0] @ m.lora_A[0] for m in modules]).mean(0)
        for module in modules:
            weight = quantize.dequantize(module.base) + delta
            module.codes.copy_(quantize.quantize(weight, module.quant).codes)
            module.lora_B.zero_()
    for tensors in zip(*(dense_parameters(model) for model in models), strict=True):
        average = torch.stack([tensor for _, tensor in tensors]).mean(0)
        for _, tensor in tensors:
            tensor.copy_(average)
    return heads


# Heads beside each other

ALIGNMENTS: dict[str, dict[str, bool]] = {
    "other data, other heads": {},
    "same data, other heads": {"same_data": True},
    "other data, same heads": {"same_heads": True},
}
"""Workers with the same data and the same heads would do the same."""


def alignment(path: Path, overrides: Sequence[str], folder: Path) -> Figures:
    """How far the heads of four workers point in the same direction, merge by merge."""
    recipe, figures = config.load(path, [*_FOUR_WORKERS, *_SHORT, *overrides]), []
    for name, how in ALIGNMENTS.items():
        curve, angles = [], []
        for merge in by_all_reduce(recipe, **how):
            cosines = [
                diagnostics.of_pairs(diagnostics.cosines(heads)).mean() for heads in merge.heads.values()
            ]
            curve.append([merge.samples, float(torch.stack(cosines).mean())])
            angles.append(mean(map(_angle, merge.heads.values())))
        cosine = mean(cosine for _, cosine in curve)
        figures.append({"series": name, "curve": curve, "cosine": cosine, "angle": mean(angles)})
    return figures


def _angle(heads: list[HeadDelta]) -> float:
    """Mean Grassmann distance of heads' row spaces, as a share of that of orthogonal ones."""
    spaces = [diagnostics.subspaces(head)[1] for head in heads]
    return mean(
        diagnostics.grassmann_distance(a, b) / (math.sqrt(min(a.shape[1], b.shape[1])) * math.pi / 2)
        for a, b in combinations(spaces, 2)
    )


# Without a server


def serverless(path: Path, overrides: Sequence[str], folder: Path) -> Figures:
    """The same recipe through a server and by all-reduce: losses, and how far the weights are apart."""
    own = [*_FOUR_WORKERS, *_SHORT, "eval.every=3", *overrides, f"run.dir={folder}"]
    recipe = config.load(path, own)
    if local.train_in_threads(recipe):
        raise SystemExit(1)
    through_server, task = recipes.load_run(folder, "master")[0], task_of(recipe)
    evals = [line for line in Records.read(folder / METRICS) if line["kind"] == "eval"]
    curve = []
    for merge in by_all_reduce(recipe):
        alone, is_last = merge.models[0], merge.version == recipe.train.rounds
        if merge.version % recipe.eval.every == 0 or is_last:
            with torch.no_grad():
                tokens = recipe.eval.final_tokens if is_last else recipe.eval.tokens
                curve.append([merge.samples, task.evaluate(alone.eval(), tokens).loss])
            alone.train()
    started = recipes.initial_model(recipe).state_dict()
    mine = {name: parameter.detach() for name, parameter in dense_parameters(alone)}
    mine |= {f"{name}.weight": module.published_weight for name, module in adapted_modules(alone)}
    apart = moved = 0.0
    for name, tensor in through_server.state_dict().items():
        apart += float((mine[name] - tensor).double().square().sum())
        moved += float((started[name] - tensor).double().square().sum())
    by_server = {"series": "through the server", "curve": [[e["tokens"], e["loss_master"]] for e in evals]}
    alone_by_itself = {"series": "by all-reduce", "curve": curve}
    return [by_server | {"apart": 0.0}, alone_by_itself | {"apart": math.sqrt(apart / moved)}]


# Bytes and memory

TRAFFIC_STEPS = (1, 5, 25)
"""T of what is sent."""


class _Sizes(NamedTuple):
    """Bytes of a worker's frozen base, q M, and of what it trains, M_lte, each element of 4 bytes."""

    base: int
    trained: int


def _sizes(model: nn.Module) -> _Sizes:
    base = sum(module.codes.nbytes + module.scales.nbytes for _, module in adapted_modules(model))
    return _Sizes(base, sum(p.nbytes for p in model.parameters() if p.requires_grad))


def traffic(path: Path, overrides: Sequence[str], folder: Path) -> Figures:
    """Bytes a step and worker, both ways, beside (q M + M_lte) / T."""
    common = [*_FOUR_WORKERS, "base.quant=nf4", "eval.final_tokens=500", *overrides]
    recipe = config.load(path, common)
    size = _sizes(lte.convert(task_of(recipe).build(), recipe.lora, recipe.base.quant))
    formula = {"up": size.trained, "down": size.base}
    figures = [_traffic("(q M + M_lte) / T", T, formula) for T in TRAFFIC_STEPS]
    for codec in ("fp32", "int4"):
        for T in TRAFFIC_STEPS:
            own = [f"compress.factors={codec}", f"compress.dense={codec}"]
            own += [f"train.local_steps={T}", "train.rounds=3"]
            lines = train_here(folder / f"{codec}-{T}", path, [*common, *own])
            # The first round's update is the whole model, which every method begins with.
            later = [line for line in lines if line["kind"] == "round"][1:]
            measured = {
                way: mean(line[f"{way}link_bytes"] for line in later) / recipe.train.workers
                for way in ("up", "down")
            }
            figures.append(_traffic(f"measured, {codec}", T, measured))
    return figures


def _traffic(series: str, T: int, bytes_a_round: dict[str, float]) -> dict[str, Any]:
    return {"series": series, "x": T, "y": sum(bytes_a_round.values()) / T, **bytes_a_round}


def memory(path: Path, overrides: Sequence[str], folder: Path) -> Figures:
    """Bytes that a worker holds, by lora_rank, beside q M + 3 M_lte and what training all of it takes."""
    wide = ["model.width=256", "model.mlp_width=1024", "train.batch_size=4"]
    common = [*_FOUR_WORKERS, "base.quant=nf4", *wide, *overrides]
    full, _ = _held(config.load(path, [*common, "lora.modules=[]", "train.batch_size=4"]))
    figures = []
    for rank in (4, 16, 64):
        held, size = _held(config.load(path, [*common, f"lora.rank={rank}"]))
        for series, y in (
            ("measured", held),
            ("q M + 3 M_lte", size.base + 3 * size.trained),
            ("measured, full rank", full),
        ):
            figures.append({"series": series, "x": rank, "y": y, "base": size.base, "trained": size.trained})
    return figures


def _held(recipe: Recipe) -> tuple[int, _Sizes]:
    """Bytes of all tensors that a worker makes and that live when its optimizer has stepped: gradients
    are among them, activations are not."""
    master = Master(recipes.initial_model(recipe), recipe)
    blobs, digest, before, held = master.snapshot(), master.base_digest(), 0, list[int]()
    task = task_of(recipe)
    batch = task.stream(0).batch(0)
    before = _alive_bytes()
    model = lte.convert(task.build(), recipe.lora, recipe.base.quant)
    trainer = Trainer(model, recipe, slot=0, version=0, base=blobs, base_digest=digest)
    trainer.optimizer.register_step_post_hook(lambda *_: held.append(_alive_bytes() - before))
    task.loss(model, batch).backward()  # type: ignore[no-untyped-call]
    trainer.step()
    return held[0], _sizes(model)


def _alive_bytes() -> int:
    """Of the memory of all tensors, each counted once."""
    gc.collect()
    # By type: isinstance asks for attributes, which some modules' lazy objects warn of.
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and not t.is_meta]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


# All of them


@dataclass(frozen=True, kw_only=True)
class Closer:
    """An experiment.

    Attributes:
        measure: what runs it: (recipe's file, settings, folder of its runs) -> figures. row: of its table.
        recipe, title, x, over, y, log: see `reproduction_cases.Experiment`.
    """

    recipe: str
    title: str
    measure: Callable[[Path, Sequence[str], Path], Figures]
    row: Callable[[dict[str, Any]], dict[str, str]]
    y: str
    x: str = ""
    over: str = "images trained on"
    log: str = ""


CLOSER = {
    "alignment": Closer(
        recipe="vit",
        title="ViT: heads of four workers beside each other",
        measure=alignment,
        row=lambda f: {
            "case": f["series"],
            "mean cosine": f"{f['cosine']:.4f}",
            "at the first merge": f"{f['curve'][0][1]:.4f}",
            "at the last": f"{f['curve'][-1][1]:.4f}",
            "Grassmann distance of row spaces, share of orthogonal": f"{f['angle']:.3f}",
        },
        y="mean cosine of deltas",
    ),
    "serverless": Closer(
        recipe="vit",
        title="ViT: a server's merge and an all-reduce",
        measure=serverless,
        row=lambda f: {
            "case": f["series"],
            "loss": f"{f['curve'][-1][1]:.6f}",
            "weights apart, share of their way": f"{f['apart']:.2g}",
        },
        y="validation loss, nats an image",
    ),
    "traffic": Closer(
        recipe="vit",
        title="Bytes a step and worker, up and down",
        measure=traffic,
        row=lambda f: {
            "case": f["series"],
            "T": str(f["x"]),
            "kB up a round": f"{f['up'] / 1e3:,.1f}",
            "kB down a round": f"{f['down'] / 1e3:,.1f}",
            "kB a step": f"{f['y'] / 1e3:,.2f}",
        },
        x="T, local steps between merges",
        y="bytes",
        log="xy",
    ),
    "memory": Closer(
        recipe="vit",
        title="Bytes that a worker holds",
        measure=memory,
        row=lambda f: {
            "case": f["series"],
            "lora_rank": str(f["x"]),
            "MB": f"{f['y'] / 1e6:,.1f}",
            "q M": f"{f['base'] / 1e6:,.1f}",
            "M_lte": f"{f['trained'] / 1e6:,.1f}",
        },
        x="lora_rank",
        y="bytes",
        log="x",
    ),
}
