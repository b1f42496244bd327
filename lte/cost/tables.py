"""A recipe's outlook over given links: all methods side by side, and settings that would do better."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from lte import config
from lte.config import Recipe
from lte.cost.links import Site
from lte.cost.model import (
    DDP_BYTES,
    Estimate,
    Rates,
    Sizes,
    ddp_round,
    ddp_run,
    diloco_round,
    largest_rank,
    least_local_steps,
    lte_round,
    plan_of,
    sizes,
)

_INT4_BITS = 4.25
"""An element of DiLoCo's changes, in blocks of 64 with a bf16 scale each."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What `lte plan` found out.

    Attributes:
        recipe: with `train.workers` as the sites have it. server_bps: infinite where not said.
        own: the recipe as it is; the first of `methods`.
        methods: also the recipe with the other `train.overlap`, where it allows that, and others.
        lte: the recipe by train.method = lte: its own estimate, unless it is a data-parallel one; None
            where that is no recipe.
        share: of a round, that the slowest are to compute.
        local_steps, rank: that reach it, alone, all else as it is; None: nothing does. The former
            by `train.overlap`, where the recipe allows both; nothing of a data-parallel one.
        has_heads: whether a lora.rank changes anything.
        below_ring, below_ddp: how many times fewer bytes move than in data-parallel training by a
            ring, and by `DDP_BYTES`.
    """

    recipe: Recipe
    sites: Sequence[Site]
    server_bps: float
    rates: Rates
    sizes: Sizes
    own: Estimate
    methods: Sequence[Estimate]
    lte: Estimate | None
    share: float
    local_steps: Mapping[bool, int | None]
    rank: int | None
    has_heads: bool
    below_ring: float
    below_ddp: float

    @property
    def is_parallel(self) -> bool:
        """Whether the recipe is of data-parallel training, which has no server, heads or base."""
        return self.recipe.train.method == "ddp"

    @property
    def adapted(self) -> int:
        """Parameters that are trained by heads."""
        return 0 if self.is_parallel else self.sizes.adapted

    @property
    def join_s(self) -> float:
        """Seconds in which the whole model gets to the worker with the slowest link."""
        return max(site.link.down_s(self.sizes.snapshot_bytes) for site in self.sites)


def outlook(
    recipe: Recipe, sites: Sequence[Site], rates: Rates, *, server_bps: float = math.inf, share: float = 0.95
) -> Outlook:
    """Compare a recipe with other methods, and find settings with which workers compute enough."""
    recipe = config.replace(recipe, **{"train.workers": sum(site.count for site in sites)})
    plan = plan_of(recipe)

    def computing(other: Recipe) -> float:
        # No other model: building a large one takes seconds.
        planned = plan.of_settings(other.lora, other.base.quant, full_rank=other.train.full_rank)
        return lte_round(other, planned, sites, rates, server_bps=server_bps).slowest_compute_share

    variants = _by_server(recipe)
    ours = [lte_round(each, plan, sites, rates, server_bps=server_bps) for each in variants.values()]
    ring = ddp_round(recipe, plan, sites, rates)
    others = [
        diloco_round(recipe, plan, sites, rates, bits=_INT4_BITS, server_bps=server_bps),
        diloco_round(recipe, plan, sites, rates, server_bps=server_bps),
        diloco_round(recipe, plan, sites, rates),
    ]
    if is_parallel := recipe.train.method == "ddp":
        methods = [ddp_run(recipe, plan, sites, rates), *ours, *others]
        variants = {}
    else:
        methods = [*ours, *others, ring]
    has_heads = bool(plan.adapted) and not plan.full_rank and not is_parallel
    moved = _moved(methods[0])
    return Outlook(
        recipe=recipe,
        sites=sites,
        server_bps=server_bps,
        rates=rates,
        sizes=sizes(recipe, plan),
        own=methods[0],
        methods=methods,
        lte=next(iter(ours), None),
        share=share,
        local_steps={on: least_local_steps(each, share, computing) for on, each in variants.items()},
        rank=largest_rank(recipe, plan, share, computing) if has_heads else None,
        has_heads=has_heads,
        below_ring=_moved(ring) / moved,
        below_ddp=DDP_BYTES * plan.num_parameters * recipe.train.local_steps / moved,
    )


def _by_server(recipe: Recipe) -> dict[bool, Recipe]:
    """The recipe by train.method = lte, by `train.overlap`: as it is and the other way, where it may be."""
    train = dataclasses.replace(recipe.train, method="lte")
    other = dataclasses.replace(train, overlap=not train.overlap, overlap_steps=None)
    found = [dataclasses.replace(recipe, train=each) for each in (train, other)]
    return {each.train.overlap: each for each in found if not config.check(each)}


def _moved(estimate: Estimate) -> float:
    return sum(estimate.uplink_bytes.values()) + sum(estimate.downlink_bytes.values())


def to_dict(found: Outlook) -> dict[str, Any]:
    """All of it as plain values for JSON; what is infinite is None."""
    return {
        "num_parameters": found.sizes.parameters,
        "num_adapted_parameters": found.adapted,
        "workers": found.recipe.train.workers,
        "local_steps": found.recipe.train.local_steps,
        "lora_rank": found.recipe.lora.rank if found.adapted else None,
        "sites": [dataclasses.asdict(site) for site in found.sites],
        "server_bps": found.server_bps if math.isfinite(found.server_bps) else None,
        "rates": dataclasses.asdict(found.rates),
        "methods": [dataclasses.asdict(method) for method in found.methods],
        "below_ring": found.below_ring,
        "below_ddp": found.below_ddp,
        "join_bytes": None if found.is_parallel else found.sizes.snapshot_bytes,
        "join_s": None if found.is_parallel else found.join_s,
        "recommended": {
            "share": found.share,
            "local_steps": found.local_steps.get(False),
            "local_steps_with_overlap": found.local_steps.get(True),
            "rank": found.rank,
        },
    }


# For people


def to_text(found: Outlook) -> RenderableType:
    """All of it as tables, 80 columns wide."""
    sites = [f"  {_site(site, found.rates)}" for site in found.sites]
    if math.isfinite(found.server_bps):
        sites.append(f"  the server's link for all of them: {_rate(found.server_bps)}")
    return Group(
        Text(_headline(found), style="bold"),
        *map(Text, sites),
        Text(),
        _beside(_traffic(found.own), _parts(found.own)),
        Text(),
        _beside(
            _holding("a worker's memory", found.own.worker_bytes),
            *([_holding("the server's", found.own.server_bytes)] if found.own.server_bytes else []),
        ),
        Text(),
        _comparison(found.methods, found.recipe.data.counted),
        Text(),
        *map(Text, _advice(found)),
        Text(),
        *(Text(line, style="dim") for line in _sources(found.rates)),
    )


def _headline(found: Outlook) -> str:
    size, lora, train = found.sizes, found.recipe.lora, found.recipe.train
    heads = f"{lora.heads} heads" if lora.heads > 1 else "1 head"
    if found.is_parallel:
        trained = "data-parallel"
    elif found.adapted:
        trained = (
            f"{size.adapted / size.parameters:.0%} adapted"
            f" ({found.recipe.base.quant}, {heads} of rank {lora.rank})"
        )
    else:
        trained = "none adapted"
    return f"{_si(size.parameters)} parameters, {trained}, {train.workers} workers, T = {train.local_steps}"


def _site(site: Site, rates: Rates) -> str:
    link = site.link
    ways = _rate(link.up_bps)
    if link.up_bps != link.down_bps:
        ways += f" up, {_rate(link.down_bps)} down"
    loss = f", {100 * link.loss:g}% lost" if link.loss else ""
    step_s = rates.step_s if site.step_s is None else site.step_s
    return f"{site.count} x {site.name}: {ways}, rtt {_time(link.rtt_s)}{loss}, {_time(step_s)} a step"


def _traffic(own: Estimate) -> Table:
    kinds = dict.fromkeys([*own.uplink_bytes, *own.downlink_bytes])
    ways = (own.uplink_bytes, own.downlink_bytes)
    rows = [(kind, *(_bytes(way.get(kind)) for way in ways)) for kind in kinds]
    rows.append(("all", *(_bytes(sum(way.values())) for way in ways)))
    return _table(["a worker and round", "up", "down"], rows, sums=True)


def _parts(own: Estimate) -> Table:
    parts = dataclasses.asdict(own.seconds)
    hidden = parts.pop("hidden")
    ahead = sum(parts.values()) - hidden - own.round_s
    rows = [(part, _time(value)) for part, value in parts.items() if value]
    rows += [
        (why, f"-{_time(value)}")
        for why, value in (("in parallel", hidden), ("steps ahead", ahead))
        if value > 1e-9
    ]
    rows.append(("round", _time(own.round_s)))
    return _table([f"time of a round ({own.slowest})", ""], rows, sums=True)


def _holding(title: str, held: Mapping[str, float]) -> Table:
    rows = [(what, _bytes(num_bytes)) for what, num_bytes in held.items()]
    return _table([title, ""], [*rows, ("all", _bytes(sum(held.values())))], sums=True)


def _comparison(methods: Sequence[Estimate], counted: str) -> Table:
    titles = ["a round of each", "up", "down", "time", f"{counted}/s", "busy", "worker", "server"]
    rows = [
        (
            method.method,
            _bytes(sum(method.uplink_bytes.values())),
            _bytes(sum(method.downlink_bytes.values())),
            _time(method.round_s),
            f"{method.tokens_s:,.0f}",
            f"{method.compute_share:.1%}",
            _bytes(sum(method.worker_bytes.values())),
            _bytes(sum(method.server_bytes.values()) or None),
        )
        for method in methods
    ]
    return _table(titles, rows)


def _beside(*tables: Table) -> Table:
    together = Table.grid(padding=(0, 4))
    together.add_row(*tables)
    return together


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, sums: bool = False) -> Table:
    """Words to the left, figures to the right; the last row may hold sums."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for title in titles:
        table.add_column(title, justify="left" if title is titles[0] else "right", no_wrap=True)
    for n, row in enumerate(rows, 1):
        table.add_row(*row, style="bold" if sums and n == len(rows) else "")
    return table


def _advice(found: Outlook) -> list[str]:
    if found.is_parallel:
        return _advice_parallel(found)
    train = found.recipe.train
    steps = {
        overlap: f"train.local_steps >= {least:,}" if least else "no train.local_steps does"
        for overlap, least in sorted(found.local_steps.items())
    }
    rank = f"lora.rank <= {found.rank}" if found.rank else "no lora.rank does"
    own = f"  train.overlap={str(train.overlap).lower()}, train.local_steps={train.local_steps}: {rank}"
    return [
        f"Bytes: {_times(found.below_ring)} fewer than data-parallel training by a ring moves,",
        f"       {_times(found.below_ddp)} fewer than {DDP_BYTES} a parameter, step and worker.",
        f"Joining: {_bytes(found.sizes.snapshot_bytes)}, {_time(found.join_s)} over the slowest link.",
        f"To compute {100 * found.share:g}% of the time, where the round waits for it:",
        *(f"  train.overlap={str(overlap).lower()}: {line}" for overlap, line in steps.items()),
        *([own] if found.has_heads else []),
    ]


def _advice_parallel(found: Outlook) -> list[str]:
    if found.lte is None:
        return []
    fewer = _times(_moved(found.own) / _moved(found.lte))
    return [f"Bytes: train.method=lte, all else as it is, moves {fewer} fewer."]


def _times(ratio: float) -> str:
    return f"{ratio:,.{0 if ratio >= 100 else 1}f} times"


def _sources(rates: Rates) -> list[str]:
    """Where the rates are from, those of one source together."""
    by_source: dict[str, list[str]] = {}
    for name, source in rates.sources.items():
        by_source.setdefault(source, []).append(f"{name} {_si(getattr(rates, name))}")
    return [f"{source}: {', '.join(names)}" for source, names in by_source.items()]


def _bytes(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else decimal(round(num_bytes))


def _time(seconds: float) -> str:
    if seconds >= 999.5:
        return f"{seconds:,.0f} s"
    unit, size = ("s", 1.0) if seconds >= 0.9995 else ("ms", 1e-3)
    return f"{seconds / size:.3g} {unit}"


def _rate(bps: float) -> str:
    number, _, sign = _si(bps).partition(" ")
    return f"{number} {sign}bit/s"


def _si(value: float) -> str:
    for sign, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {sign}"
    return f"{value:.3g}"
