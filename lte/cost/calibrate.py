"""Where `Rates` come from: assumptions, the records of a run, or a few seconds' trial on this machine."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lte import config, optim, recipes
from lte.compress import CODES, SCALES
from lte.config import Codec, Recipe, Schedule
from lte.cost.model import Rates, Sizes, plan_of, sizes
from lte.ddp.trainer import freeze
from lte.errors import ConfigError, RunError
from lte.models.hf import in_a_line
from lte.nn import blocks, convert, dense_parameters, draw_heads, recompute_activations
from lte.quantize import Quant
from lte.server.master import Master, Received
from lte.tasks import task_of
from lte.team import backward, device_of
from lte.track import METRICS, Records
from lte.worker.trainer import Trainer, materialize

GFLOP_S = 50.0
"""Assumed of a process that nobody measured: billions of operations a second in local steps."""

_BITS: dict[Codec, float] = {"fp32": 32, "bf16": 11.5, "int8": 7.9, "int4": 3.85, "int2": 2.15}
"""Bits an element, squeezed, of changes that look like noise."""
_BASE_BITS: dict[Quant, float] = {"nf4": 0.8, "int8": 3.0, "none": 32}
"""Bits a round changes of an adapted parameter: depends on the training. Measured in small models."""

_STEP_TRIAL_S = 1.5
_MAX_TRIAL_STEPS = 10
_TRIAL_ROUNDS = 3
_TRIAL_WORKERS = 8
"""Most workers whose contributions a trial merges."""


def step_flop(recipe: Recipe) -> float:
    """Operations of a worker's local step: three times those of the matrix products of a forward pass,
    counted without memory. Of experts as many as a token is sent to.

    Raises:
        ConfigError: they cannot be counted, such as where the model's way depends on its numbers.
    """
    task, counter = task_of(recipe), FlopCounterMode(display=False)
    # All, as experts share out the rows of all; or two, as batch norm trains on no single number a channel.
    num = max(2, recipe.train.batch_size)
    model, samples = task.build().train(), task.noise(num, torch.device("meta"))
    try:
        # Fake tensors, as some models look at numbers where there are none unless they are traced.
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), counter:
            task.loss(model, samples)
    except Exception as error:  # any, of whatever model
        raise ConfigError(
            [
                "model: its operations cannot be counted, as it does not run without numbers"
                f" ({type(error).__name__}: {in_a_line(error)}); a short run tells its costs"
            ]
        ) from None
    return 3.0 * counter.get_total_flops() / num * recipe.train.batch_size


def assumed(recipe: Recipe, *, gflop_s: float = GFLOP_S) -> Rates:
    """Rates of one CPU thread, before anything is measured."""
    compress = recipe.compress
    guess = "assumed; --probe or --from RUN measures it"
    sources = {rate.name: guess for rate in dataclasses.fields(Rates) if rate.name != "sources"}
    sources["step_s"] = f"3 x the products of a forward pass at {gflop_s:g} GFLOP/s, assumed"
    sources |= dict.fromkeys(("factor_bits", "dense_bits_up", "dense_bits_down"), "of noise in this codec")
    return Rates(
        step_s=step_flop(recipe) / recipe.worker.processes / (gflop_s * 1e9),
        encode_el_s=2e7,
        decode_el_s=1e8,
        merge_flop_s=5e10,
        requantize_el_s=2e8,
        pack_el_s=2e8,
        apply_el_s=3e8,
        factor_bits=_BITS[compress.factors],
        dense_bits_up=_BITS[compress.dense],
        dense_bits_down=_BITS[compress.dense],
        base_bits=_BASE_BITS[recipe.base.quant],
        sources=sources,
    )


def _measured(rates: Rates, figures: Mapping[str, float | None], source: str) -> Rates:
    """The rates with those figures in place that are there and say something."""
    known = {name: value for name, value in figures.items() if value and math.isfinite(value)}
    sources = {**rates.sources, **dict.fromkeys(known, source)}
    return dataclasses.replace(rates, **known, sources=sources)


def said(rates: Rates, **figures: float) -> Rates:
    """The rates with those that a person gave in place."""
    return _measured(rates, figures, "as you said")


# A run


def from_run(folder: Path, recipe: Recipe, rates: Rates) -> Rates:
    """Rates that a run recorded: medians over its rounds but the first tenth.

    Args:
        recipe: what is planned. Bits count only where it has the run's formats; the time of a local
            step is scaled by operations, and by the processes of a worker.
        rates: for what the run did not record.

    Raises:
        ConfigError: the folder holds no run. RunError: no rounds, or a model that is not the recipe's.
    """
    run = config.load(folder / "config.yaml")
    lines = Records.read(folder / METRICS)
    rounds = [line for line in lines if line["kind"] == "round"]
    if not rounds:
        raise RunError(f"{folder}: no round is recorded there yet, so there is nothing to take from it")
    plan = plan_of(run)
    met = next((line["num_parameters"] for line in lines if line.get("num_parameters")), None)
    if met not in (None, plan.num_parameters):
        raise RunError(f"{folder}: trained a model of its own ({met:,} parameters), not its recipe's")
    figures = _figures(rounds[len(rounds) // 10 :], run, sizes(run, plan))
    if figures["step_s"]:
        figures["step_s"] *= step_flop(recipe) / step_flop(run)
        figures["step_s"] *= run.worker.processes / recipe.worker.processes
    for name, key in _FORMATS.items():
        if _at(run, key) != _at(recipe, key):
            figures[name] = None
    return _measured(rates, figures, f"measured in {folder}")


_FORMATS = {
    "factor_bits": "compress.factors",
    "dense_bits_up": "compress.dense",
    "dense_bits_down": "compress.dense",
    "base_bits": "base.quant",
}
"""Rates, and the setting that they belong to."""


def _at(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def _figures(rounds: Sequence[Mapping[str, Any]], run: Recipe, size: Sizes) -> dict[str, float | None]:
    """Rates by name, None where these lines do not tell."""

    def median(value: Callable[[Mapping[str, Any]], float]) -> float | None:
        values = []
        for line in rounds:
            try:
                values.append(value(line))
            except (KeyError, TypeError, ZeroDivisionError):  # an older run's line, or a null in it
                continue
        return statistics.median(values) if values else None

    def bits(key: str, workers: str, elements: int) -> float | None:
        return median(lambda line: 8 * line[key] / line[workers] / elements)

    def base_bits(line: Mapping[str, Any]) -> float:
        changed = line["downlink_codes_bytes"] + line["downlink_scales_bytes"]
        return float(8 * changed / line["num_told"] / size.adapted)

    step_s = median(lambda line: line["step_s"])
    if step_s is None:  # all that older runs say
        step_s = median(lambda line: line["wait_s"] / run.train.local_steps)
    return {
        "step_s": step_s,
        "encode_el_s": median(lambda line: (size.sent + size.dense) / line["encode_s"]),
        "merge_flop_s": median(
            lambda line: size.merge_flop * line["num_merged"] / (line["merge_s"] - line["requantize_s"])
        ),
        "requantize_el_s": median(lambda line: size.adapted / line["requantize_s"]),
        "pack_el_s": median(lambda line: size.adapted / line["pack_s"]),
        "apply_el_s": median(lambda line: size.adapted / line["apply_s"]),
        "factor_bits": bits("uplink_factors_bytes", "num_merged", size.sent),
        "dense_bits_up": bits("uplink_dense_bytes", "num_merged", size.dense),
        "dense_bits_down": bits("downlink_dense_bytes", "num_told", size.dense),
        "base_bits": median(base_bits),
    }


# A trial


def probe(recipe: Recipe, rates: Rates) -> Rates:
    """Rates of this machine: local steps of the recipe's model on noise, of one process's share of a batch,
    and rounds of a model of one of its layers (of transformers, and where patterns name others: of all).
    Takes some seconds. Bits are not measured: noise trains nothing."""
    constant = Schedule(name="constant", warmup_steps=0)  # so that codes do change
    trial = dataclasses.replace(_one_layer(recipe), schedule=constant)
    figures = {"step_s": _step_s(recipe), **_round_rates(trial)}
    return _measured(rates, figures, "measured on this machine")


def _one_layer(recipe: Recipe) -> Recipe:
    """The recipe with one layer; as it is where its patterns name something beyond that."""
    one = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_layers=1))
    try:
        optim.check_patterns(plan_of(one), one.optimizer)
        if one.train.checkpoint_activations:
            blocks(task_of(one).build(), one.train.checkpoint_modules)
    except ConfigError:
        return recipe
    return one


def _step_s(recipe: Recipe) -> float:
    """Median seconds of a local step of the recipe's model, its base all zeros."""
    torch.set_num_threads(recipe.worker.num_threads)
    task = task_of(recipe)
    model, num_slices = task.build(), recipe.lora.num_slices
    if recipe.train.method == "ddp":
        freeze(model, recipe)
        num_slices = 1
    else:
        model = convert(model, recipe.lora, recipe.base.quant)
    materialize(model, device_of(recipe))
    draw_heads(model, recipe.lora, seed=0, first_head=0, draw=0)
    with torch.no_grad():
        for _, parameter in dense_parameters(model):
            parameter.normal_(std=0.02)
    if recipe.train.checkpoint_activations:
        recompute_activations(model, recipe.train.checkpoint_modules)
    optimizer = optim.make_optimizer(model, recipe.optimizer)
    batch = task.noise(recipe.train.batch_size // recipe.worker.processes, device_of(recipe))
    step_s: list[float] = []
    while len(step_s) < 2 or (sum(step_s) < _STEP_TRIAL_S and len(step_s) < _MAX_TRIAL_STEPS):
        with _timed(step_s):
            backward(model, task, recipe, batch, num_slices)
            optim.clip(model, recipe.optimizer)
            optimizer.step()
            optimizer.zero_grad()
    return statistics.median(step_s[1:])


def _round_rates(recipe: Recipe) -> dict[str, float | None]:
    """Encoding to applying, of a model of this recipe and contributions of the same worker."""
    torch.set_num_threads(1)  # as the server does, whose layers are shared out among threads
    task, master = task_of(recipe), Master(recipes.initial_model(recipe), recipe)
    trainer = Trainer(
        convert(task.build(), recipe.lora, recipe.base.quant),
        recipe,
        slot=0,
        version=0,
        base=master.snapshot(),
        base_digest=master.base_digest(),
    )
    workers = min(recipe.train.workers, _TRIAL_WORKERS)
    seconds: dict[str, list[float]] = {
        part: [] for part in ("encode", "decode", "merge", "requantize", "pack", "apply")
    }
    batch = task.noise(recipe.train.batch_size, torch.device("cpu"))
    for version in range(1, _TRIAL_ROUNDS + 1):
        task.loss(trainer.model, batch).backward()  # type: ignore[no-untyped-call]
        trainer.step()
        with _timed(seconds["encode"]):
            contribution = dict(trainer.contribution())
        with _timed(seconds["decode"]):
            tensors = master.decode(contribution, "w0", trainer.heads, trainer.rank)
        received = Received(
            worker_id="w0",
            heads=trainer.heads,
            rank=trainer.rank,
            first_head=0,
            draw=trainer.draw,
            tokens=1,
            tensors=tensors,
        )
        with _timed(seconds["merge"]):
            master.merge([received] * workers, 0)
        with _timed(seconds["requantize"]):
            before, update = master.requantize(), master.publish_dense()
            digest = master.base_digest()
        with _timed(seconds["pack"]):
            for name, change in master.changes_since(before):
                update |= {name + CODES: change.codes, name + SCALES: change.scales}
        with _timed(seconds["apply"]):
            trainer.apply(version, update, digest, merged=True, whole=False)
    size = sizes(recipe, master.plan)
    took = {part: statistics.median(each[1:]) for part, each in seconds.items()}
    return {
        "encode_el_s": (size.sent + size.dense) / took["encode"],
        "decode_el_s": (size.sent + size.dense) / took["decode"],
        "merge_flop_s": size.merge_flop * workers / took["merge"],
        "requantize_el_s": size.adapted / took["requantize"],
        "pack_el_s": size.adapted / took["pack"],
        "apply_el_s": size.adapted / took["apply"],
    }


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    """Append the seconds that the block takes."""
    start_s = time.perf_counter()
    yield
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start_s)
