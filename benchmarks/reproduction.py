"""The LTE paper's own experiments (Huh et al. 2024, arXiv 2402.16828) at a size that one core can run.

    lte data pack-images fashion-mnist --out data/fashion-mnist
    python benchmarks/reproduction.py all                      every experiment, as in docs/reproduction.md
    python benchmarks/reproduction.py heads rank --seeds 1     some of them
    python benchmarks/reproduction.py all --tables             run nothing: the tables of what there is

Each experiment writes OUT/NAME.json, its figures, and OUT/NAME.png, prints a table, and puts it into OUT.md,
if there is such a page, in the place of the table that follows the line <!-- NAME -->. The runs are those of
`lte train` with a recipe of configs/reproduction, with server and workers as threads of this process; of each
only the records are kept, in runs/reproduction, and none is repeated once it is finished.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from reproduction_cases import EXPERIMENTS, Case, Experiment
from reproduction_closer import CLOSER
from runs import Figures, train_here

from lte import config

CONFIGS = Path(__file__).parent.parent / "configs" / "reproduction"


def main(arguments: Sequence[str] | None = None) -> None:
    names = [*EXPERIMENTS, *CLOSER]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=["all", *names], metavar="EXPERIMENT")
    parser.add_argument("--out", type=Path, default=Path("docs/reproduction"), help="of figures and plots")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduction"), help="of the runs' records")
    parser.add_argument("--seeds", type=int, default=9, help="at most so many of each case")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all runs")
    parser.add_argument(
        "--tables", action="store_true", help="run nothing: print the tables of what there is"
    )
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in names if "all" in given.experiments else given.experiments:
        path = given.out / f"{name}.json"
        if not given.tables:
            if name in CLOSER:
                recipe, measure = CONFIGS / f"{CLOSER[name].recipe}.yaml", CLOSER[name].measure
                figures = measure(recipe, given.set, given.runs / name)
            else:
                figures = run(EXPERIMENTS[name], given.seeds, given.set, given.runs)
            path.write_text(json.dumps(figures, indent=1) + "\n")
            draw(name, figures, path.with_suffix(".png"))
        told = table(name, json.loads(path.read_text()))
        print(f"\n{name}\n\n{told}", flush=True)
        page = given.out.with_suffix(".md")
        if page.exists():
            # A table is the lines that begin with a bar.
            page.write_text(re.sub(rf"(<!-- {name} -->\n)(\|.*\n)*", rf"\1{told}\n", page.read_text()))


def run(experiment: Experiment, most_seeds: int, overrides: Sequence[str], folder: Path) -> Figures:
    """Run all cases of an experiment, as far as they were not; returns what each came to."""

    path = CONFIGS / f"{experiment.recipe}.yaml"
    as_it_is = config.load(path)

    def of(case: Case, rate: str, seed: int) -> list[dict[str, Any]]:
        own = [*experiment.common, *case.settings, *filter(None, [rate]), f"run.seed={seed}", *overrides]
        # Experiments share runs: what a setting says that the recipe says is in no folder's name.
        named = [setting for setting in own if config.load(path, [setting]) != as_it_is]
        name = ",".join(sorted(named)).replace("/", "_") or "as it is"
        return train_here(folder / experiment.recipe / name, path, own)

    figures = []
    for case in experiment.cases:
        tried = {rate: of(case, rate, 0)[-1]["loss"] for rate in case.rates}
        best = min(tried, key=lambda rate: tried[rate])
        runs = [of(case, best, seed) for seed in range(min(experiment.seeds, most_seeds))]
        evals = [[line for line in lines if line["kind"] == "eval"] for lines in runs]
        accuracies = [lines[-1]["accuracy"] for lines in evals if "accuracy" in lines[-1]]
        figures.append(
            {
                "series": case.series,
                "x": case.x,
                "y": mean(lines[-1]["loss"] for lines in runs),
                "settings": " ".join([*case.settings, best]).strip(),
                "tried": {rate.partition("=")[2]: loss for rate, loss in tried.items() if rate},
                "losses": [lines[-1]["loss"] for lines in runs],
                "accuracy": mean(accuracies) if accuracies else None,
                "curve": _curve(runs[0]),
            }
        )
    return figures


def _curve(lines: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Samples and validation loss; where a run was evaluated once, training losses, round by round."""
    evals = [[line["tokens"], line["loss"]] for line in lines if line["kind"] == "eval"]
    rounds = [[line["tokens"], line["train_loss"]] for line in lines if line["kind"] == "round"]
    return evals if len(evals) > 1 else rounds


def table(name: str, figures: Figures) -> str:
    """What an experiment came to, as markdown."""
    if name in CLOSER:
        rows = [CLOSER[name].row(figure) for figure in figures]
    else:
        rows = [_row(figure, EXPERIMENTS[name].x) for figure in figures]
    titles = list(dict.fromkeys(title for row in rows for title in row))
    lines = [titles, ["---"] * len(titles), *([row.get(title, "") for title in titles] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(figure: dict[str, Any], x: str) -> dict[str, str]:
    tried = [f"{rate}: {loss:.4g}" for rate, loss in figure["tried"].items()]
    row = {"case": figure["series"]}
    row |= {x: f"{figure['x']:g}"} if x else {}
    row |= {"rates tried": ", ".join(tried)} if tried else {}
    if not x:
        end = figure["curve"][-1][0]
        for share in (0.1, 0.4):
            passed = [loss for samples, loss in figure["curve"] if samples <= share * end]
            row[f"at {share:.0%} of the run"] = f"{passed[-1]:.4g}" if passed else ""
    row |= {
        "loss": f"{figure['y']:.4g}",
        "of each seed": ", ".join(f"{loss:.4g}" for loss in figure["losses"]),
    }
    return row | ({} if figure["accuracy"] is None else {"accuracy": f"{figure['accuracy']:.1%}"})


def draw(name: str, figures: Figures, path: Path) -> None:
    """Draw an experiment's curves, or its results against what was varied."""
    from matplotlib.figure import Figure

    of = CLOSER[name] if name in CLOSER else EXPERIMENTS[name]
    figure = Figure(figsize=(6.4, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    series: dict[str, list[tuple[float, float]]] = {}
    for each in figures:
        points = [(each["x"], each["y"])] if of.x else each["curve"]
        series.setdefault(each["series"], []).extend(map(tuple, points))
    for label, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o" if of.x else "", ms=4, label=label)
    if "x" in of.log:
        axes.set_xscale("log")
    if "y" in of.log:
        axes.set_yscale("log")
    axes.set(title=of.title, xlabel=of.x or of.over, ylabel=of.y)
    axes.grid(color="0.92")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
