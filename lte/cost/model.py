"""What a round costs: bytes, seconds and memory, of this recipe and of what one would do instead.

A round of a synchronous run lasts as long as its slowest worker takes to compute, send, wait for the
merge, receive and apply. Encoding runs beside sending and packing beside receiving, part by part.
With `train.overlap` the wait is filled with local steps of the next round.

Not modelled: workers that share a machine's cores or one access link, evaluations and checkpoints,
the spread of random loss over workers, and that ranks and formats change the time of a local step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lte import quantize
from lte.compress import factors
from lte.config import Optimizer, Recipe
from lte.cost.links import Site
from lte.nn import Plan, plan
from lte.tasks import task_of

DDP_BYTES = 4
"""Bytes a parameter, step and worker of data-parallel training: bf16 gradients out and in."""

_CONTROL_BYTES, _CONTROL_BYTES_TENSOR = 1000, 100
"""About: messages and signs of life of a round, and what names and aligns a tensor in them."""
_BACKWARD = 2 / 3
"""Share of a full-rank step in which gradients become ready, so that sending them may hide in it."""
_Pair = tuple[Mapping[str, float], Mapping[str, float]]
"""Bytes by kind: up and down, or of a worker and of the server."""
_MOST_STEPS = 1 << 20
"""Where the search for a number of local steps ends."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast machines compute and how small values travel.

    Attributes:
        step_s: seconds of a local step.
        encode_el_s, decode_el_s: elements a second of factors and dense changes that a worker
            encodes and the server decodes.
        merge_flop_s: operations a second of the server's products of factors.
        requantize_el_s, pack_el_s: adapted parameters a second that the server requantizes, and
            whose changes it encodes. apply_el_s: those that a worker brings up to date.
        factor_bits, dense_bits_up, dense_bits_down: bits an element, as sent.
        base_bits: bits that a round changes of an adapted parameter's base, as sent.
        sources: where each of these is from.
    """

    step_s: float
    encode_el_s: float
    decode_el_s: float
    merge_flop_s: float
    requantize_el_s: float
    pack_el_s: float
    apply_el_s: float
    factor_bits: float
    dense_bits_up: float
    dense_bits_down: float
    base_bits: float
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """A round of one site's workers, by part, in seconds.

    Attributes:
        queue: what the transfers take longer because all workers share the server's link.
        hidden: what is counted in other parts, but done beside another.
    """

    compute: float = 0.0
    encode: float = 0.0
    uplink: float = 0.0
    queue: float = 0.0
    decode: float = 0.0
    merge: float = 0.0
    requantize: float = 0.0
    pack: float = 0.0
    downlink: float = 0.0
    apply: float = 0.0
    hidden: float = 0.0

    @property
    def exchange(self) -> float:
        """From the last local step to the update's arrival."""
        server = self.decode + self.merge + self.requantize + self.pack
        return self.encode + self.uplink + self.queue + server + self.downlink - self.hidden

    def round(self, ahead: float = 0.0) -> float:
        """From update to update, where so many seconds of local steps are taken before the update.

        Encoding and applying stop the worker, ahead or not.
        """
        return self.compute + self.encode + self.apply + max(0.0, self.exchange - self.encode - ahead)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one method costs.

    Attributes:
        uplink_bytes, downlink_bytes: a worker and round, by kind.
        seconds: of the site that a round waits for, `slowest`.
        round_s: from update to update. compute_share: of it, the mean share that workers compute.
        tokens_s: trained on a second, by all workers; of what is no text, samples.
        worker_bytes, server_bytes: memory, by what it holds; activations are not counted.
    """

    method: str
    uplink_bytes: Mapping[str, float]
    downlink_bytes: Mapping[str, float]
    slowest: str
    seconds: Seconds
    round_s: float
    compute_share: float
    tokens_s: float
    worker_bytes: Mapping[str, float]
    server_bytes: Mapping[str, float]

    @property
    def slowest_compute_share(self) -> float:
        """Share of a round that the workers which it waits for compute: what they do not spend on
        sending and waiting, however idle faster ones are."""
        return self.seconds.compute / self.round_s if self.round_s else 1.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Elements of a recipe's model, as one worker holds and sends them.

    Attributes:
        adapted, dense: parameters with heads and without. num_tensors: of both.
        held_A, held_B: of the heads' factors. sent: of these, in one contribution.
        base_bytes: of the quantized base.
        merge_flop: operations of merging one worker's heads.
    """

    adapted: int
    dense: int
    num_tensors: int
    held_A: int
    held_B: int
    sent: int
    base_bytes: int
    merge_flop: float

    @property
    def parameters(self) -> int:
        """Elements of all trained weights."""
        return self.adapted + self.dense

    @property
    def snapshot_bytes(self) -> int:
        """What a worker that joins is sent, and what the largest update comes to."""
        return self.base_bytes + 4 * self.dense


def plan_of(recipe: Recipe) -> Plan:
    """What of the recipe's own model is adapted; takes no memory."""
    found = plan(task_of(recipe).build(), recipe.lora, recipe.base.quant)
    return found.of_settings(recipe.lora, recipe.base.quant, full_rank=recipe.train.full_rank)


def sizes(recipe: Recipe, plan: Plan) -> Sizes:
    """Count what a recipe's worker holds and sends."""
    lora, heads = recipe.lora, recipe.lora.heads
    held_A = held_B = sent = base_bytes = 0
    merge_flop = 0.0
    for spec in plan.adapted.values():
        out_features, in_features = spec.shape
        held_A += 0 if plan.full_rank else heads * spec.rank * in_features
        held_B += heads * spec.rank * out_features
        truncate_rank = None if plan.full_rank else recipe.compress.truncate_rank
        sent += heads * _elements_sent(out_features, spec.rank, truncate_rank)
        if recipe.is_A_sent:  # a new A each round travels whole
            truncate_rank = truncate_rank if lora.merge != "reset" else None
            sent += heads * _elements_sent(spec.rank, in_features, truncate_rank)
        base_bytes += quantize.num_bytes(spec.shape, plan.quant)
        products = 2 if lora.merge == "reset-less" else 1
        depth = 1 if plan.full_rank else spec.rank
        merge_flop += 2.0 * out_features * in_features * depth * heads * products
    return Sizes(
        adapted=plan.num_adapted_parameters,
        dense=plan.num_parameters - plan.num_adapted_parameters,
        num_tensors=len(plan.adapted) + len(plan.dense),
        held_A=held_A,
        held_B=held_B,
        sent=sent,
        base_bytes=base_bytes,
        merge_flop=merge_flop,
    )


def _elements_sent(m: int, n: int, truncate_rank: int | None) -> int:
    """Elements by which a factor (m, n) travels."""
    if truncate_rank is None or not factors.truncates((m, n), truncate_rank):
        return m * n
    return (m + n) * truncate_rank


# LoRA-the-Explorer


def lte_round(
    recipe: Recipe, plan: Plan, sites: Sequence[Site], rates: Rates, *, server_bps: float = math.inf
) -> Estimate:
    """What a round of this recipe costs on these sites, `train.overlap` as the recipe has it.

    Args:
        sites: all workers; `train.workers` is not looked at. server_bps: rate of the link that the
            server has for all of them, bits a second in each direction.
    """
    size, workers = sizes(recipe, plan), _num_workers(sites)
    control = _CONTROL_BYTES + _CONTROL_BYTES_TENSOR * size.num_tensors
    uplink = {
        "factors": size.sent * (rates.dense_bits_up if plan.full_rank else rates.factor_bits) / 8,
        "dense": size.dense * rates.dense_bits_up / 8,
        "control": control,
    }
    downlink = {
        "base": 0.0 if recipe.lora.merge == "never" else size.adapted * rates.base_bits / 8,
        "dense": size.dense * rates.dense_bits_down / 8,
        "control": control,
    }
    if recipe.averages_factors:
        downlink["factors"] = uplink["factors"]
    work = Seconds(
        encode=(size.sent + size.dense) / rates.encode_el_s,
        decode=(size.sent + size.dense) * workers / rates.decode_el_s,
        merge=size.merge_flop * workers / rates.merge_flop_s,
        requantize=size.adapted / rates.requantize_el_s,
        pack=size.adapted / rates.pack_el_s,
        apply=size.adapted / rates.apply_el_s,
    )
    return _through_server(
        "LTE, overlap" if recipe.train.overlap else "LTE",
        recipe,
        sites,
        rates,
        (uplink, downlink),
        _memory(recipe, size, workers),
        work=work,
        server_bps=server_bps,
        steps_ahead=recipe.train.steps_ahead,
    )


def _through_server(
    method: str,
    recipe: Recipe,
    sites: Sequence[Site],
    rates: Rates,
    traffic: _Pair,
    memory: _Pair,
    *,
    work: Seconds,
    server_bps: float,
    steps_ahead: int = 0,
) -> Estimate:
    """A method whose workers send their changes to a server and get one update back."""
    up, down = (sum(kinds.values()) for kinds in traffic)
    workers, steps = _num_workers(sites), recipe.train.local_steps
    part_bytes = recipe.compress.part_bytes
    all_s: list[Seconds] = []
    for site in sites:
        uplink, downlink = site.link.up_s(up), site.link.down_s(down)
        shared = site.link.shared(server_bps / workers)
        queue = shared.up_s(up) - uplink + shared.down_s(down) - downlink
        # Of two stages that hand over parts, the shorter hides but for its first or last part.
        hidden = min(work.encode, uplink) * (1 - 1 / math.ceil(max(1, up / part_bytes)))
        hidden += min(work.pack, downlink) * (1 - 1 / math.ceil(max(1, down / part_bytes)))
        compute = steps * _step_s(site, rates)
        all_s.append(
            dataclasses.replace(
                work, compute=compute, uplink=uplink, downlink=downlink, queue=queue, hidden=hidden
            )
        )
    rounds_s = [s.round(_step_s(site, rates) * steps_ahead) for s, site in zip(all_s, sites, strict=True)]
    return _estimate(method, recipe, sites, all_s, rounds_s, traffic, memory)


def _estimate(
    method: str,
    recipe: Recipe,
    sites: Sequence[Site],
    all_s: Sequence[Seconds],
    rounds_s: Sequence[float],
    traffic: _Pair,
    memory: _Pair,
) -> Estimate:
    workers, train = _num_workers(sites), recipe.train
    slowest = max(range(len(sites)), key=rounds_s.__getitem__)
    round_s = rounds_s[slowest]
    computed_s = sum(s.compute * site.count for s, site in zip(all_s, sites, strict=True))
    tokens = workers * train.local_steps * tokens_of_step(recipe)
    return Estimate(
        method=method,
        uplink_bytes=traffic[0],
        downlink_bytes=traffic[1],
        slowest=sites[slowest].name,
        seconds=all_s[slowest],
        round_s=round_s,
        compute_share=computed_s / workers / round_s if round_s else 1.0,
        tokens_s=tokens / round_s if round_s else math.inf,
        worker_bytes=memory[0],
        server_bytes=memory[1],
    )


def tokens_of_step(recipe: Recipe) -> int:
    """Tokens of a worker's local step; samples where there are no tokens."""
    task = task_of(recipe)
    return recipe.train.batch_size * task.num_tokens(task.noise(1, torch.device("meta")))


def _num_workers(sites: Sequence[Site]) -> int:
    return sum(site.count for site in sites)


def _step_s(site: Site, rates: Rates) -> float:
    return rates.step_s if site.step_s is None else site.step_s


_MOMENTS_BYTES = {"adamw": 8, "sgd": 4, "muon": 4, "adamw8bit": 2, "paged-adamw8bit": 2}


def moments_bytes(optimizer: Optimizer) -> int:
    """Bytes that an optimizer keeps for each number that it trains."""
    if optimizer.name == "sgd" and not optimizer.momentum:
        return 0
    return _MOMENTS_BYTES[optimizer.name]


def _memory(recipe: Recipe, size: Sizes, workers: int) -> _Pair:
    """Bytes that a worker and the server hold, all but activations and one layer's scratch."""
    lora, outer = recipe.lora, recipe.outer
    factors_held = size.held_A + size.held_B
    given_A = size.held_A if recipe.is_A_given else 0
    trained = factors_held - given_A
    states_bytes = 8 + moments_bytes(recipe.optimizer)
    known_A = size.held_A if factors.remembers_A(recipe) else 0
    merged = factors_held if lora.keeps_factors else known_A
    sent_with = size.held_A if recipe.train.overlap else 0
    moments = 2 if outer.name == "adam" else 1 if outer.momentum else 0
    stepped = size.adapted + (size.dense if outer.dense else 0)
    others = recipe.worker.processes - 1
    held_again = size.base_bytes + 4 * (given_A + factors_held * lora.keeps_factors)
    held_again += 8 * (trained + size.dense)
    worker = {
        "base": size.base_bytes,
        "heads, gradients, moments": states_bytes * trained + 4 * given_A,
        "heads and moments before a nested step": (states_bytes - 4) * trained * recipe.draws_ranks,
        "factors the server knows": 4 * merged,
        "dense, gradients, moments": states_bytes * size.dense,
        "published dense": 4 * size.dense,
        "contribution in flight": 4 * (trained + size.dense + sent_with),
        "update, staged": size.snapshot_bytes,
        "its other processes": others * held_again,
    }
    server = {
        "master": 4 * size.parameters,
        "base, before and after": 2 * size.base_bytes,
        "published dense": 4 * size.dense,
        "outer momentum": 4 * moments * stepped,
        "average": 4 * size.parameters if outer.ema is not None else 0,
        "contributions": 4 * workers * (trained + size.dense),
        "factors of workers": 4 * workers * (merged + given_A),
        "model for evaluation": 4 * size.parameters,
        "updates for late workers": size.snapshot_bytes,
    }
    return _above_zero(worker), _above_zero(server)


def _above_zero(held: Mapping[str, int]) -> dict[str, float]:
    return {what: num_bytes for what, num_bytes in held.items() if num_bytes}


# What one would do instead


def ring_bytes(num_bytes: float, workers: int) -> float:
    """What each worker sends, and receives, in a ring all-reduce of so many bytes."""
    return 2 * (workers - 1) / workers * num_bytes


def all_reduce_s(num_bytes: float, sites: Sequence[Site]) -> float:
    """Seconds of a ring all-reduce of so many bytes between these workers.

    Each of its 2 (N - 1) steps waits for the one before; links between workers are as those to a
    server are, and the slowest decides.
    """
    workers = _num_workers(sites)
    if workers == 1:
        return 0.0
    moved = ring_bytes(num_bytes, workers)
    return max(
        max(site.link.up_s(moved), site.link.down_s(moved)) + (2 * workers - 3) * site.link.rtt_s / 2
        for site in sites
    )


def ddp_round(recipe: Recipe, plan: Plan, sites: Sequence[Site], rates: Rates) -> Estimate:
    """Data-parallel training: T steps, bf16 gradients all-reduced in a ring after each.

    At its best: exchanging hides behind the backward pass, and gradients are summed in no time.
    """
    memory = {"parameters": 4.0, "gradients": 4.0, "moments": 8.0}
    held = {key: each * plan.num_parameters for key, each in memory.items()}
    return _data_parallel("DDP", recipe, sites, rates, 2.0 * plan.num_parameters, held)


def ddp_run(recipe: Recipe, plan: Plan, sites: Sequence[Site], rates: Rates) -> Estimate:
    """What a round of a recipe with train.method = ddp costs: T steps, by its `ddp.hook`.

    Gradients of the last of `train.accumulate` pieces alone are exchanged beside their backward pass.
    """
    parameters, hook = plan.num_parameters, recipe.ddp.hook
    remembers = hook == "powersgd" and recipe.compress.error_feedback
    held = {
        "parameters": 4 * parameters,
        "gradients": 4 * parameters,
        "gradients in buckets": 4 * parameters,
        "moments": moments_bytes(recipe.optimizer) * parameters,
        "what factors left out": 4 * parameters * remembers,
    }
    name = f"DDP {'fp32' if hook == 'none' else hook}"
    num_bytes = gradient_bytes(recipe, plan)
    return _data_parallel(name, recipe, sites, rates, num_bytes, _above_zero(held), recipe.train.accumulate)


def gradient_bytes(recipe: Recipe, plan: Plan) -> float:
    """What a step all-reduces of its gradients by `ddp.hook`; PowerSGD once it has begun."""
    if recipe.ddp.hook != "powersgd":
        return plan.num_parameters * (2.0 if recipe.ddp.hook == "bf16" else 4.0)
    shapes = [*(spec.plain_shape for spec in plan.adapted.values()), *plan.dense.values()]
    return 4.0 * sum(_powersgd_elements(shape, recipe.ddp.powersgd_rank) for shape in shapes)


def _powersgd_elements(shape: Sequence[int], rank: int) -> int:
    """Elements of both factors of a gradient; all of it where they would not halve it."""
    whole, rows = math.prod(shape), shape[0] if shape else 1
    columns = whole // rows
    factored = (rows + columns) * min(rows, columns, rank)
    return factored if factored * 2 < whole else whole


def _data_parallel(
    method: str,
    recipe: Recipe,
    sites: Sequence[Site],
    rates: Rates,
    step_bytes: float,
    worker_bytes: Mapping[str, float],
    pieces: int = 1,
) -> Estimate:
    """A method that all-reduces so many bytes of gradients in each step, of so many pieces."""
    steps, exchange_s = recipe.train.local_steps, all_reduce_s(step_bytes, sites)
    all_s = [
        Seconds(
            compute=steps * _step_s(site, rates),
            uplink=steps * exchange_s,
            hidden=steps * min(exchange_s, _BACKWARD * _step_s(site, rates) / pieces),
        )
        for site in sites
    ]
    gradients = {"gradients": steps * ring_bytes(step_bytes, _num_workers(sites))}
    rounds_s = [s.round() for s in all_s]
    return _estimate(method, recipe, sites, all_s, rounds_s, (gradients, gradients), (worker_bytes, {}))


def diloco_round(
    recipe: Recipe,
    plan: Plan,
    sites: Sequence[Site],
    rates: Rates,
    *,
    bits: float = 32,
    server_bps: float | None = None,
) -> Estimate:
    """DiLoCo with H = T: every worker trains all parameters; their changes are averaged each round.

    Args:
        bits: an element, up and down. server_bps: rate of the link that a server has for all
            workers; None: no server, a ring all-reduce.
    """
    parameters, workers, steps = plan.num_parameters, _num_workers(sites), recipe.train.local_steps
    num_bytes = parameters * bits / 8
    held = {"parameters": 4.0, "gradients": 4.0, "moments": 8.0, "outer copy": 4.0}
    if server_bps is None:
        held["outer momentum"] = 4.0
    worker_bytes = {key: each * parameters for key, each in held.items()}
    name = f"DiLoCo {'fp32' if bits == 32 else f'int{bits:.0f}'}"
    if server_bps is not None:
        changes = {"changes": num_bytes}
        server = {"parameters": 4.0, "outer momentum": 4.0, "changes": 4.0}
        server_bytes = {key: each * parameters for key, each in server.items()}
        return _through_server(
            f"{name}, server",
            recipe,
            sites,
            rates,
            (changes, changes),
            (worker_bytes, server_bytes),
            work=Seconds(),
            server_bps=server_bps,
        )
    exchange_s = all_reduce_s(num_bytes, sites)
    all_s = [Seconds(compute=steps * _step_s(site, rates), uplink=exchange_s) for site in sites]
    changes = {"changes": ring_bytes(num_bytes, workers)}
    rounds_s = [s.round() for s in all_s]
    return _estimate(f"{name}, ring", recipe, sites, all_s, rounds_s, (changes, changes), (worker_bytes, {}))


# The other way round


def least_local_steps(recipe: Recipe, share: float, compute_share: Callable[[Recipe], float]) -> int | None:
    """The smallest T with which a recipe computes for this share of a round; None: no T does."""

    def reaches(steps: int) -> bool:
        ahead = recipe.train.overlap_steps
        train = dataclasses.replace(
            recipe.train, local_steps=steps, overlap_steps=None if ahead is None else min(ahead, steps)
        )
        return compute_share(dataclasses.replace(recipe, train=train)) >= share

    if not reaches(_MOST_STEPS):
        return None
    return _first(reaches, 1, _MOST_STEPS)


def largest_rank(
    recipe: Recipe, plan: Plan, share: float, compute_share: Callable[[Recipe], float]
) -> int | None:
    """The largest lora.rank, up to the model's width, that does so; None: not even 1.

    The width is the largest rank that a weight can have.
    """

    def fails(rank: int) -> bool:
        lora = dataclasses.replace(recipe.lora, rank=rank)
        return compute_share(dataclasses.replace(recipe, lora=lora)) < share

    most = max((min(spec.shape) for spec in plan.adapted.values()), default=1)
    rank = _first(fails, 1, most) - 1 if fails(most) else most
    return rank or None


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number from low to high for which this holds, as it does for all above it."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
