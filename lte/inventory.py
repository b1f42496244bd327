"""What `lte convert` tells: of every tensor of a recipe's model what becomes of it, with totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.filesize import decimal as bytes_text
from rich.table import Table
from rich.text import Text

from lte import quantize
from lte.config import Recipe
from lte.cost import moments_bytes
from lte.nn import HeadSpec, Plan
from lte.printable import some
from lte.quantize import Quant

What = Literal["adapted", "dense", "averaged", "frozen", "buffer"]
MEANINGS: dict[What, str] = {
    "adapted": "heads on a frozen base",
    "dense": "trained in full, averaged at merges",
    "averaged": "statistics, averaged at merges",
    "frozen": "not trained, sent once",
    "buffer": "not trained, sent once",
}


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of one weight; see `HeadSpec`.

    Attributes:
        matrix: (out, in). base_bits: bits an element of the base, with its scales.
    """

    matrix: tuple[int, int]
    rank: int
    scale: float
    init: str
    base_bits: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor of the plain model."""

    parameter: str
    shape: tuple[int, ...]
    what: What
    heads: Heads | None = None

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """All tensors of a model, and what a worker holds for them.

    Attributes:
        elements: of the plain model, by what becomes of them.
        adapted_share: of the elements that are trained.
        base_bytes: of the quantized base. factors_bytes: of all heads' A and B, and of merged factors.
        optimizer_bytes: of the moments of all that is trained.
    """

    rows: tuple[Row, ...]
    elements: dict[What, int]
    adapted_share: float
    base_bytes: int
    factors_bytes: int
    optimizer_bytes: int


def take(plan: Plan, recipe: Recipe) -> Inventory:
    """The inventory of a plan, as a worker of this recipe would have it."""
    rows = [
        Row(
            parameter=spec.parameter,
            shape=spec.plain_shape,
            what="adapted",
            heads=_heads(spec, plan.quant),
        )
        for spec in plan.adapted.values()
    ]
    rows += [Row(parameter=name, shape=shape, what="dense") for name, shape in plan.dense.items()]
    rows += [Row(parameter=name, shape=shape, what="averaged") for name, shape in plan.statistics.items()]
    for name, constant in plan.constants.items():
        what: What = "buffer" if constant.is_buffer else "frozen"
        rows.append(Row(parameter=name, shape=constant.shape, what=what))
    elements = {kind: sum(row.elements for row in rows if row.what == kind) for kind in MEANINGS}
    lora = recipe.lora
    rows_A = 0 if plan.full_rank else sum(spec.rank * spec.shape[1] for spec in plan.adapted.values())
    held_A = lora.heads * rows_A
    held_B = lora.heads * sum(spec.rank * spec.shape[0] for spec in plan.adapted.values())
    copies = 2 if lora.keeps_factors else 1
    trained = held_B + (held_A if recipe.is_A_sent else 0) + elements["dense"]
    return Inventory(
        rows=tuple(rows),
        elements=elements,
        adapted_share=plan.num_adapted_parameters / max(plan.num_parameters, 1),
        base_bytes=sum(quantize.num_bytes(spec.shape, plan.quant) for spec in plan.adapted.values()),
        factors_bytes=4 * copies * (held_A + held_B),
        optimizer_bytes=moments_bytes(recipe.optimizer) * trained,
    )


def left_out(plan: Plan, recipe: Recipe) -> str:
    """A line that says what is trained in full where that is more than half of what is trained; '' where it
    is not, or was asked for: without heads, or with heads of full rank."""
    if not recipe.lora.modules or plan.full_rank or 2 * plan.num_adapted_parameters >= plan.num_parameters:
        return ""
    largest = sorted(plan.dense, key=lambda name: -prod(plan.dense[name]))
    named = some(f"{name} ({_by(plan.dense[name])})" for name in largest)
    share = plan.num_adapted_parameters / plan.num_parameters
    return (
        f"heads are on {share:.1%} of what is trained alone; the rest is trained in full by every worker, and"
        f" travels as such. Its largest: {named}; embeddings get heads with lora.embeddings, tied"
        " weights with lora.tied"
    )


def _heads(spec: HeadSpec, quant: Quant) -> Heads:
    bits = 8 * quantize.num_bytes(spec.shape, quant) / prod(spec.shape)
    return Heads(matrix=spec.shape, rank=spec.rank, scale=spec.scale, init=spec.init, base_bits=bits)


def to_dict(inventory: Inventory) -> dict[str, Any]:
    """The inventory for scripts."""
    plain = asdict(inventory)
    del plain["rows"]
    rows = [asdict(row) | {"elements": row.elements} for row in inventory.rows]
    return {"parameters": rows, **plain}


def to_text(inventory: Inventory) -> RenderableType:
    """The inventory for people."""
    titles = ("parameter", "shape", "elements", "what", "matrix", "rank", "scale", "init", "base bits")
    lines = []
    for row in inventory.rows:
        cells = [row.parameter, _by(row.shape), f"{row.elements:,}", row.what]
        if heads := row.heads:
            cells += [_by(heads.matrix), f"{heads.rank}", f"{heads.scale:g}", heads.init]
            cells.append(f"{heads.base_bits:.3g}")
        lines.append(cells)
    total = sum(inventory.elements.values())
    sums: list[tuple[str, ...]] = [
        (what, f"{elements:,}", f"{elements / total:.1%}", MEANINGS[what])
        for what, elements in inventory.elements.items()
        if elements
    ]
    sums.append(("all", f"{total:,}", "", ""))
    base, factors, moments = (
        bytes_text(size)
        for size in (inventory.base_bytes, inventory.factors_bytes, inventory.optimizer_bytes)
    )
    return Group(
        _table(titles, lines, right=("elements", "rank", "scale", "base bits")),
        Text(),
        _table(("what", "elements", "share", ""), sums, right=("elements", "share")),
        Text(),
        Text(f"Of what is trained {inventory.adapted_share:.1%} is adapted."),
        Text(f"A worker holds {base} of base, {factors} of factors and {moments} of optimizer."),
    )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for title in titles:
        table.add_column(title, justify="right" if title in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # Text: names may hold [brackets]
    return table
