"""The paper's experiments at a size of seconds; what they come to is in docs/reproduction.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reproduction
import reproduction_closer
from reproduction_cases import EXPERIMENTS
from reproduction_closer import CLOSER

from lte import config
from lte.data import pack_images

DOCS = Path(__file__).parent.parent / "docs"
IMAGES = ("model.image_size=8", "model.patch_size=4")
SMALL = (
    *IMAGES,
    "model.width=16",
    "model.num_attention_heads=2",
    "model.mlp_width=16",
    "model.num_layers=1",
    "schedule.warmup_steps=0",
    "lora.rank=4",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of ten classes."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, number in (("train", 640), ("t10k", 32)):
        labels, pixels = generator.integers(0, 10, number), generator.integers(0, 256, (number, 8, 8))
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    pack_images(folder, folder / "packed", num_shards=4)
    return folder / "packed"


def figures_of(name: str, folder: Path, *overrides: str) -> list[dict[str, object]]:
    """Run an experiment; see that it leaves a plot."""
    arguments = [name, "--out", str(folder), "--runs", str(folder / "runs"), "--seeds", "1"]
    reproduction.main([*arguments, "--set", *overrides])
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_case_is_a_recipe_of_its_own(name: str) -> None:
    experiment = EXPERIMENTS[name]
    recipes = [
        config.load(reproduction.CONFIGS / f"{experiment.recipe}.yaml", [*experiment.common, *case.settings])
        for case in experiment.cases
    ]
    assert len(set(recipes)) == len(recipes)
    points = [(case.series, case.x) for case in experiment.cases]
    assert len(set(points)) == len(points)


def test_cases_of_a_recipe_are_run_once_and_told_in_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["model.width=8", "train.local_steps=2", "train.rounds=2"]
    figures = figures_of("regression-heads", tmp_path, *small)
    assert [figure["series"] for figure in figures] == [
        case.series for case in EXPERIMENTS["regression-heads"].cases
    ]
    assert all(len(figure["curve"]) == 2 and figure["y"] == figure["losses"][0] for figure in figures)
    told = capsys.readouterr()
    assert told.out.count(f"{figures[0]['y']:.4g}") >= 2, "the loss, and that of the seed"
    assert told.err.count("\n") == len(figures)
    assert figures_of("regression-heads", tmp_path, *small) == figures
    assert not capsys.readouterr().err, "no run is repeated"


def test_the_best_of_several_rates_counts(tmp_path: Path) -> None:
    small = ["model.width=8", "train.local_steps=2", "train.rounds=1"]
    for figure in figures_of("regression-merges", tmp_path, *small):
        assert len(figure["tried"]) == 2
        assert figure["losses"] == [min(figure["tried"].values())]


def test_a_mean_needs_no_server(tmp_path: Path, images: Path) -> None:
    """A loop of its own comes to the weights that a server's run comes to."""
    overrides = [*SMALL, f"data.shards={images}", "train.rounds=3", "train.local_steps=2"]
    server, alone = figures_of("serverless", tmp_path, *overrides)
    assert 0 < alone["apart"] < 1e-4
    assert server["curve"][-1] == pytest.approx(alone["curve"][-1])


def test_heads_are_compared_where_data_or_beginnings_are_the_same(tmp_path: Path, images: Path) -> None:
    overrides = [*SMALL, f"data.shards={images}", "train.rounds=2", "train.local_steps=2"]
    figures = figures_of("alignment", tmp_path, *overrides)
    angles = {figure["series"]: figure["angle"] for figure in figures}
    assert angles["other data, same heads"] < 0.2 < 0.5 < angles["other data, other heads"]
    cosines = {figure["series"]: figure["cosine"] for figure in figures}
    assert cosines["same data, other heads"] > cosines["other data, other heads"]


def test_bytes_are_those_of_the_formula_where_nothing_is_compressed(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduction_closer, "TRAFFIC_STEPS", (1, 2))
    figures = figures_of("traffic", tmp_path, *IMAGES, f"data.shards={images}")
    formula, fp32, int4 = (
        [f for f in figures if f["series"] == series]
        for series in ("(q M + M_lte) / T", "measured, fp32", "measured, int4")
    )
    for computed, measured, compressed in zip(formula, fp32, int4, strict=True):
        assert computed["x"] == measured["x"] == compressed["x"]
        assert computed["up"] <= measured["up"] < 1.1 * computed["up"]
        assert compressed["up"] < measured["up"]


def test_memory_is_that_of_the_formula_and_the_gradients(tmp_path: Path, images: Path) -> None:
    figures = figures_of("memory", tmp_path, *IMAGES, "model.width=64", f"data.shards={images}")
    measured = [f for f in figures if f["series"] == "measured"]
    for figure in measured:
        assert figure["y"] == pytest.approx(figure["base"] + 4 * figure["trained"], rel=0.05)
    assert measured[0]["y"] < measured[-1]["y"]


@pytest.mark.parametrize("name", [*EXPERIMENTS, *CLOSER])
def test_the_page_has_the_table_and_the_plot_of_every_experiment_that_was_run(name: str) -> None:
    page, path = (DOCS / "reproduction.md").read_text(), DOCS / "reproduction" / f"{name}.json"
    if not path.exists():
        assert f"`{name}`" in page.partition("## Not run yet")[2]
        return
    assert reproduction.table(name, json.loads(path.read_text())) in page
    assert f"](reproduction/{name}.png)" in page
    assert path.with_suffix(".png").exists()
