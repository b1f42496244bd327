"""Simulated runs of several sizes, for people and for scripts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from lte.simulate.run import Figures

_SATURATED = 0.9
"""Utilisation from which a part of the server is called saturated."""
_PARTS = {
    "server_up": "the server's link from the workers",
    "server_down": "the server's link to the workers",
    "server_cpu": "the server's CPU",
}


def to_dict(found: Sequence[Figures], given: Mapping[str, Any]) -> dict[str, Any]:
    """All of it as plain values for JSON, beside what was asked for; what is infinite is None."""
    runs = [
        {key: None if value == math.inf else value for key, value in dataclasses.asdict(figures).items()}
        for figures in found
    ]
    return {**given, "runs": runs, "saturated": {part: _saturated_at(found, part) for part in _PARTS}}


def to_text(found: Sequence[Figures], title: str, counted: str) -> RenderableType:
    """All of it as tables, 80 columns wide.

    Args:
        counted: what is trained on: `tokens`, `images`.
    """
    speed = _table(
        ["workers", "rounds/h", f"{counted}/s", "efficiency", "computing", "link in", "out", "CPU"],
        [
            (
                f"{figures.workers:,}",
                f"{3600 / figures.round_s:,.1f}",
                f"{figures.tokens_s:,.0f}",
                f"{figures.efficiency:.1%}",
                f"{figures.compute_share:.1%}",
                f"{figures.server_up:.0%}",
                f"{figures.server_down:.0%}",
                f"{figures.server_cpu:.0%}",
            )
            for figures in found
        ],
    )
    moved = _table(
        ["workers", "s/round", "up/round", "down/round", "used", "late", "lost"],
        [
            (
                f"{figures.workers:,}",
                f"{figures.round_s:,.2f}",
                decimal(round(figures.uplink_bytes)),
                decimal(round(figures.downlink_bytes)),
                f"{figures.used:,}",
                f"{figures.late:,}",
                f"{figures.lost:,}",
            )
            for figures in found
        ],
    )
    lines = [*map(Text, _words(found))]
    return Group(Text(title, style="bold"), Text(), speed, Text(), moved, Text(), *lines)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _words(found: Sequence[Figures]) -> list[str]:
    """What the figures mean."""
    lines = []
    for part, name in _PARTS.items():
        if (workers := _saturated_at(found, part)) is not None:
            lines.append(f"From {workers:,} workers on {name} is busy for {_SATURATED:.0%} of the time.")
    if not lines:
        lines.append(f"Nothing of the server is busy for {_SATURATED:.0%} of the time.")
    for figures in found:
        if figures.round_s == math.inf:
            lines.append(f"{figures.workers:,} workers: given up after {figures.merged} merges.")
        if figures.stalled:
            lines.append(
                f"{figures.workers:,} workers: parts of {figures.stalled:,} contributions took longer than"
                " server.silence_s, and the server would take their workers for gone."
            )
    return lines


def _saturated_at(found: Sequence[Figures], part: str) -> int | None:
    """The least number of workers with which a part of the server is; None: with none of these."""
    return min((f.workers for f in found if getattr(f, part) >= _SATURATED), default=None)
