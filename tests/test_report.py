"""The summary of a run and its plot."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from lte import cli, config, report
from lte.errors import ConfigError, RunError
from lte.report import PLOT, outcome, plot, plot_diagnostics, summary
from lte.track import METRICS, Records


def make_run(
    folder: Path,
    num_rounds: int,
    *,
    evals: bool = True,
    done: bool = False,
    **event: Any,
) -> Path:
    """A run of 4 workers, T = 10, 50 rounds planned: 2.1 MB up and 0.3 MB down a round."""
    folder.mkdir(parents=True)
    recipe = config.replace(config.Recipe(), **{"train.rounds": 50, "base.quant": "nf4"})
    (folder / "config.yaml").write_text(config.to_yaml(recipe))
    with Records(folder / METRICS, version=0) as records:
        records.append("event", what="start", message="the run starts", **event)
        for version in range(1, num_rounds + 1):
            records.append(
                "round",
                version=version,
                time_s=2.0 * version,
                tokens=40_960 * version,
                train_loss=float("nan") if version == 2 else 3.0 - version / 100,
                uplink_bytes=2_100_000,
                downlink_bytes=300_000,
            )
            if evals and version % 5 == 0:
                tokens = 40_960 * version
                records.append("eval", version=version, tokens=tokens, loss=2.99, loss_master=2.60)
        if done:
            records.append(
                "done",
                rounds=num_rounds,
                tokens=40_960 * num_rounds,
                workers=4,
                num_parameters=1_200_000,
                num_adapted_parameters=1_080_000,
                uplink_bytes=2_100_000 * num_rounds,
                downlink_bytes=300_000 * num_rounds,
                loss=2.625,
                loss_master=2.5,
                master_digest="ab",
                time_s=100.0,
            )
    return folder


def printed(folder: Path, width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width, _environ={}).print(summary(folder))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_summary_of_a_finished_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "[bold]", 50, done=True)
    # up: 105 MB * 8 bits / (1.2 M parameters * 50 rounds) = 14; down: 15 MB -> 2
    # data-parallel: 4 bytes * 1.2 M parameters * 10 steps * 50 rounds * 4 workers = 9.6 GB, 80 * 120 MB
    text = printed(folder, width=200)
    assert text == "\n".join(
        [
            "[bold]  finished at round 50 of 50",
            "rounds         50 of 10 local steps each",
            "tokens         2,048,000 (20,480/s)",
            "time           1:40",
            "workers        4 of 1 head, lora_rank 32, reset-b",
            "parameters     1,200,000, 90.0% adapted by LoRA heads",
            "loss           2.625 published (nf4), 2.500 master (published +5.00%)",
            "up             105.0 MB, 3.5 bits a parameter, round and worker",
            "down           15.0 MB, 0.5 bits a parameter, round and worker",
            "data-parallel  would move 9.6 GB, 80.0 times more",
            f"files          {folder}/config.yaml",
            f"               {folder}/metrics.jsonl",
        ]
    )


def test_summary_of_a_run_that_merged_on_arrival(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 0)
    recipe = config.replace(config.load(folder / "config.yaml"), **{"outer.when": "arrival"})
    (folder / "config.yaml").write_text(config.to_yaml(recipe))
    with Records(folder / METRICS, version=0) as records:
        for version, (num_merged, mean, most) in enumerate([(1, 0.0, 0), (3, 2.0, 4), (4, 1.0, 1)], start=1):
            moved = {"uplink_bytes": 1, "downlink_bytes": 1, "tokens": version, "train_loss": 3.0}
            behind = {
                "staleness_mean": mean,
                "staleness_max": most,
                "contributions": version**2 - (version == 3),
            }
            records.append("round", version=version, time_s=1.0, num_merged=num_merged, **moved, **behind)
    text = printed(folder, width=200)
    assert "stopped at round 2 of 50" in text, "eight contributions of four workers"
    said = "2 of 10 local steps each, merged on arrival in 3 versions, 1.2 behind on average, 4 at most"
    assert said in text


def test_summary_fits_80_columns_and_loses_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / ("long" * 30), 50, done=True)
    text = printed(folder)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert f"{folder}/metrics.jsonl" in text.replace("\n", "").replace(" ", "")


def test_summary_of_an_unfinished_run(tmp_path: Path) -> None:
    text = printed(make_run(tmp_path / "run", 12))
    assert "stopped at round 12 of 50, or still running" in text
    assert "491,520 (20,480/s)" in text
    assert "2.990 published (nf4), 2.600 master (published +15.00%)" in text
    for expected in ("25.2 MB", "3.6 MB", "not recorded yet", "not known yet"):
        assert expected in text


def test_an_event_may_tell_the_size_before_the_end(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 10, num_parameters=1_200_000, num_adapted_parameters=600_000)
    assert "50.0% adapted" in printed(folder)
    assert outcome(folder).bits(21_000_000) == 3.5


@pytest.mark.parametrize("num_rounds", [0, 1])
def test_summary_of_a_run_that_hardly_began(tmp_path: Path, num_rounds: int) -> None:
    text = printed(make_run(tmp_path / "run", num_rounds, num_parameters=1000))
    assert f"stopped at round {num_rounds} of 50" in text
    assert "not evaluated yet" in text


def test_diagnostics_are_not_the_end_of_a_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 3)
    before = outcome(folder)
    with Records(folder / METRICS, version=3) as records:
        records.append("diagnostics", version=3, tokens=1, time_s=1.0, noise_scale=1.0, modules={})
    assert outcome(folder) == before


def test_summary_of_a_diverged_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 1)
    with Records(folder / METRICS, version=1) as records:
        records.append("eval", version=1, tokens=40_960, loss=float("nan"), loss_master=3.0)
    run = outcome(folder)
    assert (run.loss, run.gap) == (None, None)
    assert "loss           - published (nf4), 3.000 master\n" in printed(folder)


def test_a_folder_without_a_run_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml: no such file"):
        summary(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.yaml: no such file"):
        plot(tmp_path)


@pytest.mark.parametrize(
    ("num_rounds", "evals"),
    [(50, True), (1, True), (1, False), (2, False), (6, True)],
)
def test_plot_is_a_png(tmp_path: Path, num_rounds: int, evals: bool) -> None:
    folder = make_run(tmp_path / "a $run$ [of] mine", num_rounds, evals=evals, done=True)
    path = plot(folder)
    assert path == folder / "loss.png"
    assert png_size(path) == (1430, 624)
    assert 20_000 < path.stat().st_size < 300_000
    assert str(path) in printed(folder, width=200)


def test_plot_shows_what_was_recorded(tmp_path: Path) -> None:
    few, more = make_run(tmp_path / "a" / "run", 10, evals=False), make_run(tmp_path / "b" / "run", 10)
    assert plot(few).read_bytes() != plot(more).read_bytes()
    assert plot(few).read_bytes() == plot(few).read_bytes()


def test_plot_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no round yet"):
        plot(make_run(tmp_path / "run", 0))


def test_plot_leaves_pyplot_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    plot(make_run(tmp_path / "run", 3))
    assert "matplotlib.pyplot" not in sys.modules


# Diagnostics


def diagnosed(folder: Path, **noise: float | None) -> Path:
    """A run with diagnostics of two versions: three blocks' layers `up`, and one `output`."""
    make_run(folder, 4)
    keys = report._PANELS
    with Records(folder / METRICS, version=4) as records:
        for version in (2, 4):
            blocks = {
                f"blocks.{k}.up": dict.fromkeys(keys, 1.0 * version * x) for k, x in enumerate((1, 2, 6))
            }
            modules = blocks | {"output": dict.fromkeys(keys, 3.0) | {"cosine_mean": None}}
            records.append(
                "diagnostics",
                version=version,
                tokens=1000 * version,
                time_s=1.0,
                modules=modules,
                **{"noise_scale": 1e5, "noise_scale_dense": 1e4} | noise,
            )
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *given: Any, **named: Any) -> None:
        figures.append(figure)
        save(figure, *given, **named)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_diagnostics_have_a_panel_a_quantity_and_a_line_a_group(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_diagnostics(diagnosed(tmp_path / "run"), tmp_path / "d.png")
    width, height = png_size(tmp_path / "d.png")
    assert min(width, height) > 1000
    (figure,) = drawn
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [*report._PANELS.values(), "gradient noise scale (tokens)"]
    rank = figure.axes[titles.index("effective rank of W - W0")]
    up, output = rank.get_lines()
    assert [line.get_label() for line in (up, output)] == ["blocks.*.up", "output"]
    np.testing.assert_array_equal(
        up.get_xydata(), [(2000, 4), (4000, 8)]
    )  # the median of 2, 4, 12; of 4, 8, 24
    np.testing.assert_array_equal(output.get_xydata(), [(2000, 3), (4000, 3)])
    ((low, high),) = rank.collections[0].get_datalim(rank.transData).intervaly[None]
    assert (low, high) == (2, 24)
    assert len(figure.axes[0].get_lines()[1].get_xydata()) == 0, "a quantity that was null in every line"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["blocks.*.up", "output"]


@pytest.mark.parametrize(
    "noise", [{}, {"noise_scale": None, "noise_scale_dense": None}, {"noise_scale": 0.0}]
)
def test_noise_may_be_undefined(tmp_path: Path, drawn: list[Figure], noise: dict[str, float | None]) -> None:
    plot_diagnostics(diagnosed(tmp_path / "run", **noise), tmp_path / "d.png")
    drawn_points = [len(line.get_xydata()) for line in drawn[0].axes[-1].get_lines()]
    values = {"noise_scale": 1e5, "noise_scale_dense": 1e4} | noise
    assert drawn_points == [2 if value else 0 for value in values.values()]


def test_without_adapted_modules_only_noise_is_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 1)
    with Records(folder / METRICS, version=1) as records:
        records.append(
            "diagnostics",
            version=1,
            tokens=1,
            noise_scale=1.0,
            noise_scale_dense=1.0,
            modules={},
        )
    plot_diagnostics(folder, tmp_path / "d.svg")
    assert (tmp_path / "d.svg").read_text().startswith("<?xml")


def test_the_command_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = diagnosed(tmp_path / "run"), tmp_path / "d.pdf"
    assert cli.main(["report", str(folder)]) == 0
    assert "stopped at round 4 of 50" in capsys.readouterr().out
    assert (folder / PLOT).is_file()
    assert cli.main(["report", str(folder), "--diagnostics", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert file.read_bytes().startswith(b"%PDF")


def test_a_report_of_a_run_that_hardly_began_has_no_plot(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 0)
    assert cli.main(["report", str(folder)]) == 0
    assert not (folder / PLOT).exists()


def test_a_report_of_what_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", 2)
    assert cli.main(["report", str(folder), "--diagnostics", str(tmp_path / "d.png")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no diagnostics; a run with log.diagnostics_every=1 records some" in said
    assert not (tmp_path / "d.png").exists()
