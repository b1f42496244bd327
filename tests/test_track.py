"""metrics.jsonl, the progress display, Weights & Biases."""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lte import config, track
from lte.errors import RunError, UserError
from lte.track import METRICS, Records, Tracker, clock_text

RECIPE = config.replace(config.Recipe(), **{"train.rounds": 12})


def round_line(version: int, **fields: Any) -> dict[str, Any]:
    """What a server records of a round: 4,096 tokens in half a second, 1 MB up, 260 kB down."""
    line: dict[str, Any] = {
        "version": version,
        "time_s": version / 2,
        "tokens": 4096 * version,
        "train_loss": 3.0,
        "num_merged": 4,
        "uplink_bytes": 1_000_000,
        "downlink_bytes": 260_000,
        "merge_s": 0.1,
        "wait_s": 0.1,
        "lr": 1e-3,
    }
    return line | fields


def arrival_line(version: int, contributions: int) -> dict[str, Any]:
    return round_line(version, contributions=contributions, staleness_mean=1.0, staleness_max=2)


def eval_line(version: int, **fields: Any) -> dict[str, Any]:
    return {"version": version, "tokens": 4096 * version, "loss": 2.904, "loss_master": 2.89} | fields


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tests run, as in CI, rich may have been told that everything is a terminal."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stop the tracker's clock; call it with seconds to advance it."""
    now_s = [1000.0]
    monkeypatch.setattr("lte.track.monotonic", lambda: now_s[0])

    def advance(seconds: float) -> None:
        now_s[0] += seconds

    return advance


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine that nobody has logged in on."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC", "XDG_"))]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    yield home
    import wandb

    wandb.teardown()


def terminal(width: int) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(force_terminal=True, file=file, width=width, _environ={"TERM": "xterm"}), file


def screen(text: str) -> list[str]:
    """The lines of a terminal's output, without colours and cursor movements."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", text))


# Records


def test_continuing_drops_what_the_older_attempt_wrote_beyond_the_version(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    with Records(path, version=0) as records:
        for version in (1, 2, 3):
            records.append("round", **round_line(version))
            records.append("eval", **eval_line(version))
            records.append("diagnostics", version=version, noise_scale=1e5)
        records.append("event", what="lost", message="worker 3 is gone")
        records.append("done", rounds=3)
    with Records(path, version=2) as records:
        records.append("round", **round_line(3, train_loss=1.0))

    lines = Records.read(path)
    assert [(line["kind"], line.get("version")) for line in lines] == [
        ("round", 1),
        ("eval", 1),
        ("diagnostics", 1),
        ("round", 2),
        ("eval", 2),
        ("diagnostics", 2),
        ("event", None),
        ("round", 3),
    ]
    assert lines[-1]["train_loss"] == 1.0
    assert os.listdir(tmp_path) == [METRICS]


def test_a_torn_last_line_is_skipped_and_then_dropped(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    with Records(path, version=0) as records:
        records.append("round", **round_line(1))
    whole = path.read_bytes()
    for torn in (b'{"kind": "round", "ver', b"\0\0\0", b'{"kind": "ev\xc3', b"{\n"):
        path.write_bytes(whole + torn)
        assert len(Records.read(path)) == 1
        with Records(path, version=1):
            assert path.read_bytes() == whole


def test_a_line_that_lacks_only_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text('{"kind": "round", "version": 1}')
    with Records(path, version=1) as records:
        records.append("round", **round_line(2))
    assert [line["version"] for line in Records.read(path)] == [1, 2]


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text('{"kind": "event"}\n{"kind": "ro\n{"kind": "event"}\n')
    with pytest.raises(RunError, match="line 2 is damaged"):
        Records.read(path)


def test_a_crash_while_continuing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / METRICS
    with Records(path, version=0) as records:
        records.append("round", **round_line(1))
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        Records(path, version=0)
    assert path.read_bytes() == before


def test_lines_are_strict_json_and_at_once_readable(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    with Records(path, version=0) as records:
        fields = {"train_loss": math.nan, "by_worker": [1.5, math.inf, {"x": -math.inf}], "é": "ü\n"}
        records.append("round", **round_line(1, **fields))
        line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert line["train_loss"] is None
    assert line["by_worker"] == [1.5, None, {"x": None}]
    assert line["é"] == "ü\n"


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert Records.read(tmp_path / METRICS) == []


# Tracker


def test_totals_and_time_go_on_where_the_kept_lines_end(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    with Tracker(tmp_path, RECIPE, version=0, display=False) as tracker:
        for version in (1, 2, 3):
            tracker.record("round", **round_line(version))
        assert (tracker.uplink_bytes, tracker.downlink_bytes) == (3_000_000, 780_000)

    clock(3600)
    tracker = Tracker(tmp_path, RECIPE, version=2, display=False)
    clock(60)
    with tracker:
        assert (tracker.uplink_bytes, tracker.downlink_bytes) == (2_000_000, 520_000)
        clock(0.25)
        assert tracker.elapsed_s == pytest.approx(1.25)
        tracker.record("event", what="joined", message="worker 5 joined")
    assert Records.read(tmp_path / METRICS)[-1]["time_s"] == 1.25


def test_time_does_not_go_back_where_events_were_the_last_lines(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    with Tracker(tmp_path, RECIPE, version=0, display=False) as tracker:
        tracker.record("round", **round_line(1))
        clock(30)
        tracker.record("event", what="left", message="worker 1 is gone")
    with Tracker(tmp_path, RECIPE, version=1, display=False) as tracker:
        clock(1)
        tracker.record("event", what="joined", message="worker 1 joined")
    first, left, joined = (line["time_s"] for line in Records.read(tmp_path / METRICS))
    assert left == first + 30
    assert joined == left + 1


def test_time_starts_on_entering(tmp_path: Path, clock: Callable[[float], None]) -> None:
    tracker = Tracker(tmp_path, RECIPE, version=0, display=False)
    clock(60)
    with tracker:
        clock(2)
        assert tracker.elapsed_s == 2


def test_without_display_nothing_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, RECIPE, version=0, display=False) as tracker:
        tracker.alive(4)
        tracker.waiting("waiting for workers: 2 of 4")
        tracker.record("round", **round_line(1))
    assert capsys.readouterr() == ("", "")
    assert len(Records.read(tmp_path / METRICS)) == 1


# Display


def test_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]
) -> None:
    with Tracker(tmp_path, RECIPE, version=0) as tracker:
        tracker.waiting("waiting for workers: 2 of 4")
        tracker.waiting("waiting for workers: 2 of 4")
        tracker.record("event", what="joined", message="worker [red]a3[/] joined " + "x" * 200)
        tracker.alive(4)
        tracker.record("round", **round_line(1, train_loss=math.nan))
        tracker.record("eval", **eval_line(1))
        clock(1.5)
        tracker.record("round", **round_line(2, train_loss=2.871))
        tracker.record("done", rounds=2)
    assert capsys.readouterr().out.splitlines() == [
        "waiting for workers: 2 of 4",
        "event joined: worker [red]a3[/] joined " + "x" * 200,
        "round  1/12  4,096 tokens  train -  up 1.0 MB  down 260.0 kB  workers 4/4",
        "eval   1/12  4,096 tokens  valid 2.904  master 2.890",
        "round  2/12  8,192 tokens  8,192 tok/s  train 2.871  valid 2.904"
        "  up 2.0 MB  down 520.0 kB  workers 4/4  left 0:05",
    ]


def test_merged_on_arrival_lines_tell_of_contributions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]
) -> None:
    recipe = config.replace(RECIPE, **{"outer.when": "arrival", "train.workers": 2})
    with Tracker(tmp_path, recipe, version=0) as tracker:
        for version, contributions in enumerate((2, 3, 24), start=1):
            tracker.record("round", **arrival_line(version, contributions))
            clock(2)
        tracker.record("eval", **eval_line(3))
    (first, *_, last, evaluated) = capsys.readouterr().out.splitlines()
    assert first.startswith("merged  2/24  ")
    assert last.startswith("merged 24/24  ")
    assert last.endswith("left 0:00")
    assert evaluated.startswith("eval  24/24  12,288 tokens")


def test_plain_lines_come_once_a_second_and_for_the_last_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]
) -> None:
    with Tracker(tmp_path, RECIPE, version=0) as tracker:
        for version in range(1, 13):
            clock(0.3)
            tracker.record("round", **round_line(version))
    printed = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["1/12", "5/12", "9/12", "12/12"]


def test_speed_is_that_of_recent_rounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]
) -> None:
    recipe = config.replace(RECIPE, **{"train.rounds": 100})
    with Tracker(tmp_path, recipe, version=0) as tracker:
        for version in range(1, 21):
            clock(2)
            slow_start_s = 1000 if version > 5 else 0
            tracker.record("round", **round_line(version, time_s=slow_start_s + 2 * version))
    last = capsys.readouterr().out.splitlines()[-1]
    assert "2,048 tok/s" in last
    assert last.endswith("left 2:40")


def test_speed_is_not_measured_across_an_interruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Callable[[float], None]
) -> None:
    for version in (0, 2):
        with Tracker(tmp_path, RECIPE, version=version) as tracker:
            for k in (1, 2):
                clock(2)
                tracker.record("round", **round_line(version + k))
    after = capsys.readouterr().out.splitlines()[2:]
    assert ["tok/s" in line for line in after] == [False, True]


@pytest.mark.parametrize("width", [80, 160])
def test_live_display(tmp_path: Path, clock: Callable[[float], None], width: int) -> None:
    folder = tmp_path / "a_run_with_a_name_that_is_far_too_long"
    folder.mkdir()
    recipe = config.replace(RECIPE, **{"train.rounds": 12_000})
    console, file = terminal(width)
    with Tracker(folder, recipe, version=0, console=console) as tracker:
        tracker.alive(4)
        for version in (5998, 5999, 6000):
            line = round_line(version, uplink_bytes=123_400_000, time_s=3 * version, train_loss=2.871)
            tracker.record("round", **line)
        tracker.record("eval", **eval_line(6000))
        tracker.record("event", what="lost", message="worker [red]a3[/] is silent")
        tracker.waiting("waiting for worker a3")
    lines = screen(file.getvalue())
    assert max(map(len, lines)) <= width
    event = next(index for index, line in enumerate(lines) if "[red]a3[/] is silent" in line)
    assert lines[event].startswith("5:00:00")

    bar, titles, totals, recent, waiting = [line for line in lines if line.strip()][-5:]
    assert bar.startswith("a_run_with_a_na… round 6,000/12,000 ━━━")
    assert bar.rstrip().endswith("50% 5:00:00 gone, 5:00:00 left")
    assert titles.split("  ")[0] == "train loss"
    assert totals.split() == ["2.871", "2.904", "24,576,000", "370.2", "MB", "780.0", "kB", "4/4"]
    assert recent.split() == ["round", "6,000", "1,365/s", "123.4", "MB/round", "260.0", "kB/round"]
    assert waiting == "waiting for worker a3"


def test_live_display_between_rounds(tmp_path: Path, clock: Callable[[float], None]) -> None:
    console, file = terminal(80)
    with Tracker(tmp_path, RECIPE, version=0, console=console) as tracker:
        tracker.waiting("waiting for workers: 2 of 4")
        for version in (1, 2):
            tracker.record("round", **round_line(version, time_s=10 * version))
        file.truncate(0)
        clock(30)
    drawn = "\n".join(screen(file.getvalue()))
    assert "0:50 gone, 1:10 left" in drawn  # 10 rounds of 10 s, of which 30 s have passed
    assert "waiting" not in drawn


def test_live_display_before_the_first_round_and_after_an_error(tmp_path: Path) -> None:
    console, file = terminal(80)

    def interrupted() -> None:
        with Tracker(tmp_path, RECIPE, version=0, console=console) as tracker:
            tracker.waiting("waiting for workers: 2 of 4")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "round 0/12" in file.getvalue()
    assert "waiting for workers: 2 of 4" in file.getvalue()
    assert file.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    file = io.StringIO()
    console = Console(force_terminal=True, file=file, _environ={"TERM": "dumb"})
    with Tracker(tmp_path, RECIPE, version=0, console=console) as tracker:
        tracker.record("round", **round_line(1))
    assert file.getvalue().startswith("round  1/12  4,096 tokens")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.2, "0:00"), (59.6, "1:00"), (3723, "1:02:03")],
)
def test_clock(seconds: float | None, text: str) -> None:
    assert clock_text(seconds) == text


# Weights & Biases


def test_wandb_is_not_imported_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Tracker(tmp_path, RECIPE, version=0, display=False) as tracker:
        tracker.record("round", **round_line(1))


def test_wandb_offline_needs_no_key_and_says_nothing(
    tmp_path: Path, wandb_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = config.replace(RECIPE, **{"log.wandb": "offline"})
    with Tracker(tmp_path, recipe, version=0, display=False) as tracker:
        tracker.record("round", **round_line(1, train_loss=math.nan))
        tracker.record("eval", **eval_line(1))
        modules = {"blocks.0.up": {"cosine_mean": 0.125, "grassmann_rows": None}}
        tracker.record("diagnostics", version=1, tokens=4096, noise_scale=1e5, modules=modules)
        tracker.record("done", rounds=1, loss=2.904, master_digest="digest-of-the-master")
    assert capfd.readouterr() == ("", "")

    import wandb

    wandb.teardown()  # its process writes on after a run's end
    (store,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    stored = store.read_bytes()
    diagnostics = (b"diagnostics/noise_scale", b"diagnostics/cosine_mean/blocks.0.up")
    for text in (b"round/uplink_bytes", b"eval/loss_master", b"digest-of-the-master", b"local_steps"):
        assert text in stored
    assert all(text in stored for text in diagnostics)
    assert b"grassmann_rows" not in stored
    assert b"round/train_loss" not in stored  # it was not a number
    event = Records.read(tmp_path / METRICS)[0]
    assert event["what"] == "wandb"
    assert event["message"].endswith(f"wandb sync {store.parent}")


def test_wandb_online_without_a_key_is_one_line(
    tmp_path: Path, wandb_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = config.replace(RECIPE, **{"log.wandb": "online"})
    with pytest.raises(UserError, match=r"no key.*wandb login.*log\.wandb=offline") as caught:
        Tracker(tmp_path, recipe, version=0).__enter__()
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_wandb_online_does_not_hang_on_a_silent_server(
    tmp_path: Path, wandb_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(track, "_WANDB_ANSWERS_S", 1.0)
    recipe = config.replace(RECIPE, **{"log.wandb": "online"})
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UserError, match=r"cannot log in \(.* timed out\); run `wandb login`") as caught:
            Tracker(tmp_path, recipe, version=0).__enter__()
    assert "\n" not in str(caught.value)
