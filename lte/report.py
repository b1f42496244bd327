"""What a run looks like afterwards: a summary for the terminal, loss.png, a figure of its diagnostics.

All read only config.yaml and metrics.jsonl, so that they work on a run that still goes, or stopped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.filesize import decimal as bytes_text
from rich.table import Table
from rich.text import Text

from lte.config import Phase, Recipe, load
from lte.cost.model import DDP_BYTES
from lte.errors import RunError
from lte.tasks import task_of
from lte.track import METRICS, Records, clock_text, loss_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

PLOT = "loss.png"
"""Name of the plot in a run's folder."""

FORMATS = (".png", ".pdf", ".svg")
"""Endings of files that a figure can be drawn into."""

_PANELS = {
    "cosine_mean": "cosine between heads, mean",
    "cosine_max": "cosine between heads, largest",
    "grassmann_columns": "Grassmann distance of columns (radians)",
    "grassmann_rows": "Grassmann distance of rows (radians)",
    "effective_rank": "effective rank of W - W0",
    "stable_rank": "stable rank of W - W0",
    "round_effective_rank": "effective rank of a merge",
    "round_stable_rank": "stable rank of a merge",
    "amplification": "amplification of W0",
    "quantization_error": "quantization error, relative",
    "quantization_error_steps": "quantization error (steps)",
    "codes_flipped": "share of codes flipped by a merge",
}
"""Title of each quantity of the modules."""
_COLUMNS = 4

_ARTEFACTS = ("config.yaml", METRICS, PLOT, "checkpoints", "journal", "logs", "wandb")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run in numbers. None: not recorded, as with parameters and losses before its end.

    Attributes:
        rounds, tokens, time_s: done so far.
        uplink_bytes, downlink_bytes: of all rounds and workers.
        tokens: images where the data are images.
        loss, loss_master: mean nats, of the published model and the master, last evaluated.
        accuracy, accuracy_master: share of the images that are classed right.
    """

    finished: bool
    rounds: int
    tokens: int
    time_s: float
    workers: int
    uplink_bytes: int
    downlink_bytes: int
    num_parameters: int | None
    num_adapted_parameters: int | None
    loss: float | None
    loss_master: float | None
    accuracy: float | None
    accuracy_master: float | None

    @property
    def gap(self) -> float | None:
        """How much more the published model loses than the master, as a share of the latter."""
        if self.loss is None or not self.loss_master:
            return None
        return self.loss / self.loss_master - 1

    def bits(self, num_bytes: int) -> float | None:
        """Bits a parameter, round and worker."""
        if not self.num_parameters or not self.rounds:
            return None
        return 8 * num_bytes / (self.num_parameters * self.rounds * self.workers)

    def ddp_bytes(self, steps: int) -> int | None:
        """What data-parallel training of so many steps, and as many workers, exchanges."""
        if not self.num_parameters or not self.rounds:
            return None
        return DDP_BYTES * self.num_parameters * steps * self.workers


def outcome(folder: Path) -> Outcome:
    """The numbers of a run: those of its `done` line, or before there is one, of the others."""
    finished = False
    seen: dict[str, Any] = dict.fromkeys(Outcome.__dataclass_fields__)
    seen.update(rounds=0, tokens=0, time_s=0.0, uplink_bytes=0, downlink_bytes=0)
    seen["workers"] = load(folder / "config.yaml").train.workers
    for line in Records.read(folder / METRICS):
        if line["kind"] == "round":
            seen["rounds"] = line.get("contributions", line["version"] * seen["workers"]) // seen["workers"]
            seen["uplink_bytes"] += line["uplink_bytes"]
            seen["downlink_bytes"] += line["downlink_bytes"]
            names = {"tokens", "time_s"}
        elif line["kind"] == "eval":
            names = {"loss", "loss_master", "accuracy", "accuracy_master"}
        elif line["kind"] == "event":  # one may tell the model's size before the end does
            names = {"num_parameters", "num_adapted_parameters"}
        elif line["kind"] == "diagnostics":
            names = set()
        else:
            finished, names = True, set(seen)
        seen.update({name: line[name] for name in names & line.keys()})
    return Outcome(**{**seen, "finished": finished})


# Versions


def versions(folder: Path, available: Sequence[int]) -> RenderableType:
    """What the records tell of these versions, a row each.

    Raises:
        RunError: when its records are damaged.
    """
    losses: dict[str, dict[int, float | None]] = {"round": {}, "eval": {}}
    for line in Records.read(folder / METRICS):
        if line["kind"] in losses:
            losses[line["kind"]][line["version"]] = line["train_loss" if line["kind"] == "round" else "loss"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("version", "train loss", "valid loss"):
        table.add_column(title, justify="right")
    for version in available:
        rounds, evals = (loss_text(losses[kind].get(version)) for kind in ("round", "eval"))
        table.add_row(f"{version:,}", rounds, evals)
    return table


# Summary


def summary(folder: Path) -> RenderableType:
    """A run in a dozen rows, for rich to print; also readable in a plain file.

    Raises:
        ConfigError: when the folder holds no run.
        RunError: when its records are damaged.
    """
    recipe, run = load(folder / "config.yaml"), outcome(folder)
    train, heads = recipe.train, recipe.lora.heads
    is_ddp = train.method == "ddp"
    of = f"round {run.rounds:,} of {recipe.train.rounds:,}"
    state = f"finished at {of}" if run.finished else f"stopped at {of}, or still running"
    rows = {
        "rounds": f"{run.rounds:,} of {_count(train.local_steps, 'local step')} each"
        + (", merged on arrival" + _staleness(folder) if recipe.merges_on_arrival else ""),
        **({"phases": "\n".join(map(_phase, train.phases))} if train.phases else {}),
        recipe.data.counted: f"{run.tokens:,}"
        + (f" ({run.tokens / run.time_s:,.0f}/s)" if run.time_s else ""),
        "time": clock_text(run.time_s),
        "workers": f"{run.workers}, data-parallel, {_gradients(recipe)}"
        if is_ddp
        else f"{run.workers} of {_count(heads, 'head')}, lora_rank {recipe.lora.rank}, {recipe.lora.merge}",
        "parameters": _parameters(run, is_ddp),
        "loss": _losses(run, recipe),
        **_accuracies(run),
        "up": _bytes(run, run.uplink_bytes),
        "down": _bytes(run, run.downlink_bytes),
        **({} if is_ddp else {"data-parallel": _against_ddp(run, recipe.steps_before(run.rounds))}),
        "files": "\n".join(str(folder / name) for name in _ARTEFACTS if (folder / name).exists()),
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows.items():
        grid.add_row(name, Text(value))  # Text: paths may hold [brackets]
    return Group(Text.assemble((folder.resolve().name, "bold cyan"), "  ", state), grid)


def _phase(phase: Phase) -> str:
    changed = {key: value for key, value in vars(phase).items() if value is not None and key != "from_round"}
    return f"from round {phase.from_round:,} on: {', '.join(f'{key} {changed[key]}' for key in changed)}"


def _staleness(folder: Path) -> str:
    """How far behind contributions that were merged on arrival were, in words."""
    lines = [line for line in Records.read(folder / METRICS) if line["kind"] == "round"]
    merged = sum(line["num_merged"] for line in lines)
    if not merged:
        return ""
    mean = sum(line["staleness_mean"] * line["num_merged"] for line in lines) / merged
    most = max(line["staleness_max"] for line in lines)
    return f" in {_count(len(lines), 'version')}, {mean:.1f} behind on average, {most} at most"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def _gradients(recipe: Recipe) -> str:
    """How gradients travelled."""
    ddp = recipe.ddp
    if ddp.hook == "powersgd":
        return f"gradients by PowerSGD of rank {ddp.powersgd_rank} from step {ddp.powersgd_start:,}"
    return f"gradients in {'bf16' if ddp.hook == 'bf16' else 'fp32'}"


def _parameters(run: Outcome, is_ddp: bool) -> str:
    if not run.num_parameters:
        return "not recorded yet"
    if is_ddp:
        return f"{run.num_parameters:,}, trained at full rank"
    share = (run.num_adapted_parameters or 0) / run.num_parameters
    return f"{run.num_parameters:,}, {share:.1%} adapted by LoRA heads"


def _losses(run: Outcome, recipe: Recipe) -> str:
    if run.loss is None and run.loss_master is None:
        return "not evaluated yet, or not finite"
    gap = "" if run.gap is None else f" (published {run.gap:+.2%})"
    published = f"{loss_text(run.loss)} published ({recipe.in_round(run.rounds).base.quant})"
    return f"{published}, {loss_text(run.loss_master)} master{gap}"


def _accuracies(run: Outcome) -> dict[str, str]:
    if run.accuracy is None or run.accuracy_master is None:
        return {}
    return {"accuracy": f"{run.accuracy:.2%} published, {run.accuracy_master:.2%} master"}


def _bytes(run: Outcome, num_bytes: int) -> str:
    text, bits = bytes_text(num_bytes), run.bits(num_bytes)
    return text if bits is None else f"{text}, {bits:.3g} bits a parameter, round and worker"


def _against_ddp(run: Outcome, steps: int) -> str:
    ddp, own = run.ddp_bytes(steps), run.uplink_bytes + run.downlink_bytes
    if not ddp or not own:
        return "not known yet"
    return f"would move {bytes_text(ddp)}, {ddp / own:,.{0 if ddp >= 100 * own else 1}f} times more"


# Plot


def plot(folder: Path) -> Path:
    """Draw losses over tokens and over bytes into the run's folder.

    Returns:
        the PNG's path.

    Raises:
        ConfigError: when the folder holds no run.
        RunError: when no round is recorded yet, or the records are damaged.
    """
    from matplotlib.figure import Figure  # late: most of a second that a summary need not pay
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    recipe, lines = load(folder / "config.yaml"), Records.read(folder / METRICS)
    rounds = [line for line in lines if line["kind"] == "round"]
    evals = [line for line in lines if line["kind"] == "eval"]
    if not rounds:
        raise RunError(f"{folder / METRICS}: no round yet, so there is nothing to draw")
    moved = accumulate(line["uplink_bytes"] + line["downlink_bytes"] for line in rounds)
    bytes_at = dict(zip((line["version"] for line in rounds), moved, strict=True))

    figure = Figure(figsize=(11, 4.8), dpi=130)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.86), w_pad=0.12, h_pad=0.08)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, rounds, evals, lambda line: line["tokens"])
    left.set_xlabel(f"{recipe.data.counted} trained on")
    left.set_ylabel(f"loss ({task_of(recipe).unit})")
    left.xaxis.set_major_formatter(EngFormatter())
    left.legend(frameon=False, loc="upper right")

    _draw(right, rounds, evals, lambda line: bytes_at.get(line["version"]) or math.nan)
    right.set_xlabel("bytes sent up and down, all workers")
    right.set_xscale("log")
    low, high = right.get_xlim()
    # a narrow range holds too few powers of ten to be read by
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    right.xaxis.set_minor_locator(NullLocator())
    right.xaxis.set_major_formatter(EngFormatter(unit="B"))

    figure.text(0.012, 0.965, folder.resolve().name, size=15, weight="bold", va="top", parse_math=False)
    figure.text(0.012, 0.89, _subtitle(recipe), size=10.5, color="0.35", va="top")
    path = folder / PLOT
    figure.savefig(path)
    return path


def _subtitle(recipe: Recipe) -> str:
    if recipe.train.method == "ddp":
        workers = _count(recipe.train.workers, "data-parallel worker")
        return f"{workers}, {_gradients(recipe)}, published as {recipe.base.quant}"
    parts = [
        f"T = {_count(recipe.train.local_steps, 'local step')}",
        _count(recipe.train.workers, "worker"),
        _count(recipe.lora.heads, "head") + " each",
        f"lora_rank {recipe.lora.rank}",
        recipe.lora.merge,
        f"base {recipe.base.quant}",
    ]
    return ", ".join(parts)


def _draw(
    axes: Axes,
    rounds: Sequence[Mapping[str, Any]],
    evals: Sequence[Mapping[str, Any]],
    x_of: Callable[[Mapping[str, Any]], float],
) -> None:
    """Losses against `x_of` a line; an x of NaN and a loss of null leave a gap."""

    def curve(label: str, lines: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
        x = [x_of(line) for line in lines]
        y = [math.nan if line[key] is None else line[key] for line in lines]
        dots = len(x) == 1 or (lines is evals and len(x) <= 30)
        if x:
            axes.plot(x, y, label=label, marker="o" if dots else "", **style)

    # the master's on top and thinner: the two validation losses nearly agree
    curve("training", rounds, "train_loss", color="#a9bfd3", lw=1.4, ms=5)
    curve("validation, published", evals, "loss", color="#0f5ea8", lw=2.2, ms=6)
    curve("validation, master", evals, "loss_master", color="#e8791a", lw=1.4, ms=3, dashes=(4, 3))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10, color="0.6")


# Diagnostics


def overlap(folder: Path, other: Path, found: Mapping[str, Tensor]) -> RenderableType:
    """How far two runs' updates overlap, as a table for people: a row an i, a column a j, which are powers of
    2 up to the ranks, and the mean over modules in each cell.

    Args:
        found: of `recipes.compare_updates`.
    """
    known = [similarity for similarity in found.values() if not similarity.isnan().any()]
    rows, columns = (min((s.shape[d] for s in known), default=0) for d in (0, 1))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for title in ("i", *(f"j = {j}" for j in _powers_of_2(columns))):
        table.add_column(title, justify="right")
    for i in _powers_of_2(rows):
        cells = [statistics.fmean(float(s[i - 1, j - 1]) for s in known) for j in _powers_of_2(columns)]
        table.add_row(str(i), *(f"{cell:.3f}" for cell in cells))
    return Group(
        Text(f"leading i directions of {folder}'s update in the leading j of {other}'s,"),
        Text(f"from 0 (orthogonal) to 1 (one holds the other), mean of {_count(len(known), 'module')}"),
        table,
    )


def _powers_of_2(most: int) -> list[int]:
    """1, 2, 4 ... and at last the most."""
    return sorted({2**k for k in range(most.bit_length())} | {most} - {0})


def plot_diagnostics(folder: Path, path: Path) -> None:
    """Draw a run's diagnostics over tokens: a panel a quantity, and in it a line a group of modules.

    Modules of one name but for numbers in it are a group: the line is their median, the band all of them.

    Args:
        path: the file to draw into, of one of the `FORMATS`.

    Raises:
        ConfigError: when the folder holds no run.
        RunError: when no diagnostics are recorded, or the records are damaged.
    """
    from matplotlib.figure import Figure  # late, as in `plot`

    recipe = load(folder / "config.yaml")
    lines = [line for line in Records.read(folder / METRICS) if line["kind"] == "diagnostics"]
    if not lines:
        raise RunError(f"{folder / METRICS}: no diagnostics; a run with log.diagnostics_every=1 records some")
    groups = dict.fromkeys(_group(name) for line in lines for name in line["modules"])
    colours = {group: f"C{k}" for k, group in enumerate(groups)}
    num_rows = -(-(len(_PANELS) + 2) // _COLUMNS)  # noise and the legend have a place, too
    figure = Figure(figsize=(3.6 * _COLUMNS, 2.5 * num_rows + 0.8), dpi=110)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.8 / (2.5 * num_rows + 0.8)))
    places = [figure.add_subplot(num_rows, _COLUMNS, k + 1) for k in range(len(_PANELS) + 1)]
    for axes, (key, title) in zip(places, _PANELS.items(), strict=False):
        for group, colour in colours.items():
            _draw_group(axes, lines, group, key, colour)
        _tidy(axes, title)
    _draw_noise(places[-1], lines)
    _legend(figure, places[0])
    figure.text(0.012, 0.99, folder.resolve().name, size=15, weight="bold", va="top", parse_math=False)
    figure.text(0.012, 0.962, _subtitle(recipe), size=10.5, color="0.35", va="top")
    figure.savefig(path)


def _group(name: str) -> str:
    """A module's name with a star for each number in it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _draw_group(axes: Axes, lines: Sequence[Mapping[str, Any]], group: str, key: str, colour: str) -> None:
    x, low, middle, high = [], [], [], []
    for line in lines:
        known = [of[key] for name, of in line["modules"].items() if _group(name) == group]
        if known := [number for number in known if number is not None]:
            x.append(line["tokens"])
            low.append(min(known))
            middle.append(statistics.median(known))
            high.append(max(known))
    axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axes.plot(x, middle, color=colour, lw=1.5, marker="o" if len(x) == 1 else "", label=group)


def _draw_noise(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    for key, label, colour in (("noise_scale", "all", "0.2"), ("noise_scale_dense", "dense", "0.6")):
        known = [(line["tokens"], line[key]) for line in lines if line[key]]
        x, y = zip(*known, strict=True) if known else ((), ())
        axes.plot(x, y, label=label, color=colour, lw=1.5, marker="o" if len(x) <= 30 else "", ms=3)
        if known:
            axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes, "gradient noise scale (tokens)")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="lower right", frameon=False, fontsize=9, ncols=1 + len(labels) // 9
        )


def _tidy(axes: Axes, title: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_title(title, size=9.5, loc="left")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, color="0.6")
