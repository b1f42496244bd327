"""What `lte ranks` finds: the smallest rank of each module's head within a bound. No model, no disk.

Trying all combinations is out of reach: each lower rank of each module is measured alone, all others whole.
From the whole model on, the next cut is always that which raises the loss least for each number that it
saves, as if increases added up. These cuts make one path of ever smaller models; where on it to stop is
measured, not added up: with a budget at its first model within, with a bound by bisection along the path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lte.config import Override, yaml12
from lte.errors import UserError

Ranks = Mapping[str, int]
"""A rank of each module."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Ranks that a search chose.

    Attributes:
        ranks: by module. loss: measured with them. whole_loss: with the heads whole.
        num_parameters: numbers in the heads with these ranks. whole_parameters: in the whole heads.
        increases: module -> rank -> what the loss rises by when this module alone is cut to it.
        num_evaluations: how often the loss was measured.
    """

    ranks: dict[str, int]
    loss: float
    whole_loss: float
    num_parameters: int
    whole_parameters: int
    increases: dict[str, dict[int, float]]
    num_evaluations: int


def most_evaluations(rungs: Mapping[str, Sequence[int]]) -> int:
    """How often a search measures the loss at most."""
    cuts = sum(len(of_module) - 1 for of_module in rungs.values())
    return 2 + cuts + math.ceil(math.log2(cuts + 1))


def search(
    rungs: Mapping[str, Sequence[int]],
    features: Mapping[str, int],
    loss: Callable[[Ranks], float],
    *,
    most_parameters: int | None = None,
    most_increase: float | None = None,
) -> Found:
    """Choose a rank for each module; see the module's text.

    Args:
        rungs: the ranks that each module may have, ascending; the last is its whole. features: numbers of its
            head a rank.
        most_parameters, most_increase: the bound, one of the two: numbers in all heads, or nats by which the
            loss may be above the whole model's.

    Raises:
        UserError: the least ranks have more parameters than the budget.
    """
    measured = dict[tuple[int, ...], float]()

    def measure(ranks: Ranks) -> float:
        key = tuple(ranks.values())
        if key not in measured:
            measured[key] = loss(ranks)
        return measured[key]

    def size(ranks: Ranks) -> int:
        return sum(rank * features[name] for name, rank in ranks.items())

    whole = {name: of_module[-1] for name, of_module in rungs.items()}
    whole_loss = measure(whole)
    increases = {
        name: {rank: measure({**whole, name: rank}) - whole_loss for rank in of_module[:-1]}
        | {of_module[-1]: 0.0}
        for name, of_module in rungs.items()
    }
    path = [whole, *_cuts(whole, increases, features)]
    if most_parameters is not None:
        if size(path[-1]) > most_parameters:
            raise UserError(
                f"the least ranks have {size(path[-1]):,} parameters, more than the budget of"
                f" {most_parameters:,}"
            )
        chosen = next(ranks for ranks in path if size(ranks) <= most_parameters)
    else:
        assert most_increase is not None
        within, beyond = 0, len(path)  # path[within] was measured to be within the bound
        while beyond - within > 1:
            middle = (within + beyond) // 2
            if measure(path[middle]) <= whole_loss + most_increase:
                within = middle
            else:
                beyond = middle
        chosen = path[within]
    return Found(
        ranks=dict(chosen),
        loss=measure(chosen),
        whole_loss=whole_loss,
        num_parameters=size(chosen),
        whole_parameters=size(whole),
        increases=increases,
        num_evaluations=len(measured),
    )


def to_dict(found: Found) -> dict[str, Any]:
    """What was found, for scripts."""
    return asdict(found)


def to_text(found: Found) -> RenderableType:
    """What was found, for people: a row a module."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("module", no_wrap=True)
    for title in ("rank", "of", "loss by it alone"):
        table.add_column(title, justify="right")
    for name, rank in found.ranks.items():
        increases = found.increases[name]
        table.add_row(Text(name), str(rank), str(max(increases)), f"{increases[rank]:+.4f}")
    share = found.num_parameters / found.whole_parameters
    return Group(
        table,
        Text(),
        Text(
            f"{found.num_parameters:,} of {found.whole_parameters:,} parameters of heads ({share:.1%}); loss"
            f" {found.loss:.4f}, whole {found.whole_loss:.4f}; {found.num_evaluations} evaluations"
        ),
    )


def to_yaml(overrides: Sequence[Override]) -> str:
    """A recipe's section of overrides, one a line."""
    lines = ["lora:", "  overrides:"]
    for override in overrides:
        said = {key: value for key, value in asdict(override).items() if value is not None}
        lines.append(f"    - {yaml12.dump(said, on_one_line=True).strip()}")
    return "\n".join(lines) + "\n"


def _cuts(
    whole: Ranks, increases: Mapping[str, Mapping[int, float]], features: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """Ever smaller models, one cut after another, each the cheapest for each number that it saves."""
    ranks = dict(whole)

    def price(cut: tuple[str, int]) -> float:
        name, rank = cut
        saved = (ranks[name] - rank) * features[name]
        return (increases[name][rank] - increases[name][ranks[name]]) / saved

    while cuts := [(name, rank) for name in ranks for rank in increases[name] if rank < ranks[name]]:
        name, rank = min(cuts, key=price)
        ranks[name] = rank
        yield dict(ranks)
