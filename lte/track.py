"""What a run writes down and shows while it goes: metrics.jsonl, a progress display, Weights & Biases.

Lines of metrics.jsonl, one JSON object each, told apart by `kind`:

    round   version, time_s (since the run's start, interruptions left out), tokens (since then),
            train_loss (the workers' mean), typical_loss (their median), num_merged (contributions),
            num_told (workers that the version was sent to), uplink_bytes and downlink_bytes (this
            round, all workers), wait_s, lr (optimizer.lr, or dense_lr where no head of a rank is
            trained, as the schedule has it in the round's last local step); bytes by kind
            (uplink_ factors, dense, control; downlink_ codes, scales, dense, control) and bits a
            parameter and worker (uplink_bits, downlink_bits); codes_changed and scales_changed
            (shares), changes_bytes (of both, one copy) and, if measured, the entropy_bytes of these
            changes; merge_in_steps (size of the merge in steps of the quantization); lost (share
            of the heads' change that nobody owes); with robust merging bounded (worker_id -> share of
            its length merged) and trimmed (worker_ids left out), num_bounded and num_trimmed; merged
            on arrival: contributions (of the run so far), staleness_mean and staleness_max (of these,
            versions); the
            server's merge_s (of it requantize_s), journal_s and pack_s; step_s, encode_s and apply_s of the
            median worker. With train.method = ddp, also payload_bytes (that one worker handed to
            all-reduce), and of the others those that docs/ddp.md names
    eval    version, tokens, loss (published model), loss_master and, with outer.ema, loss_ema (of the
            master's average), and what else a task measures of these, such as accuracy, accuracy_master
    diagnostics
            of every log.diagnostics_every-th round, once it is published (see lte/diagnostics.py):
            version, tokens, noise_scale (B_simple, in tokens) with its parts signal and noise,
            noise_scale_dense (of the dense parameters alone), diagnose_s; modules (name -> cosine_mean,
            cosine_max, grassmann_columns and grassmann_rows (radians, means) between heads' deltas;
            effective_rank, stable_rank and amplification of W - W_0; round_effective_rank and
            round_stable_rank of this merge's mean delta; quantization_error (relative) and
            quantization_error_steps; codes_flipped (share, in this merge)). What is not defined is null
    event   what (a slug), message (for people)
    done    rounds, version, tokens, workers, num_parameters, num_adapted_parameters, uplink_bytes and
            downlink_bytes (the whole run), loss, loss_master, loss_ema, master_digest, time_s

Writers may add fields; a number that is not finite is written as null. Losses are nats a token, or
a sample where there are no tokens, of which samples are counted then.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import ssl
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal as bytes_text
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lte.config import Recipe, to_dict
from lte.durable import DISK_FULL
from lte.errors import RunError, UserError

if TYPE_CHECKING:
    from wandb import Run

Kind = Literal["round", "eval", "diagnostics", "event", "done"]

METRICS = "metrics.jsonl"
"""Name of the records in a run's folder."""

_WINDOW_ROUNDS = 10
_PLAIN_EVERY_S = 1.0
_WANDB_ANSWERS_S = 10.0
_WANDB_START_S = 30.0
_WANDB_FINISH_S = 60.0


# Records


class Records:
    """The lines of one metrics.jsonl, open for append. One process writes; any number may read.

    While the disk is full, lines wait until there is room.

    Args:
        path: the file; made if missing.
        version: the version that the run goes on from. What older attempts wrote beyond it is
            dropped, so that every version has one `round` line; events stay, as they did happen.
    """

    def __init__(self, path: Path, *, version: int) -> None:
        if path.exists():
            kept = [line for line in self.read(path) if _holds_at(line, version)]
            temporary = path.with_name(path.name + ".tmp")
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(_json(line) for line in kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """All lines, without a last one that a crash has torn; none if there is no file.

        Raises:
            RunError: when a line before the last is damaged.
        """
        texts = path.read_bytes().splitlines() if path.exists() else []
        lines = []
        for number, text in enumerate(texts, start=1):
            try:
                lines.append(json.loads(text))
            except ValueError:
                if number < len(texts):
                    raise RunError(f"{path}: line {number} is damaged; mend or delete it") from None
        return lines

    def append(self, kind: Kind, **fields: Any) -> dict[str, Any]:
        """Write one line, at once visible to readers, and return it."""
        line: dict[str, Any] = _strict({"kind": kind, **fields})
        self._waiting += _json(line).encode()
        try:
            self._flush()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
        return line

    def _flush(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        """Write what waits, and close.

        Raises:
            OSError: the disk is still full: the last lines are lost.
        """
        with self._file:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _holds_at(line: Mapping[str, Any], version: int) -> bool:
    """Whether a line is still true of a run that goes on from `version`."""
    if line["kind"] in ("round", "eval", "diagnostics"):
        return bool(line["version"] <= version)
    return bool(line["kind"] != "done")


def _json(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    """`value` with null for every number that JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Tracking


class Tracker:
    """Records a run, shows it, and passes it on to Weights & Biases; a context manager.

    Its methods are called from one thread at a time. The display's own thread only reads.

    Args:
        folder: the run's folder; it exists.
        version: the version that the run starts or goes on from.
        display: show progress: live on a terminal, else as plain lines.
        console: where to show it; by default stdout.

    Attributes:
        uplink_bytes, downlink_bytes: of all rounds recorded, also before the run was continued.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        *,
        version: int,
        display: bool = True,
        console: Console | None = None,
    ) -> None:
        self._folder, self._recipe, self._version = folder, recipe, version
        self._progress = Standing(recipe, folder.resolve().name)
        console = console or Console()
        self._display: _Live | _Plain | None = None
        if display:
            self._display = (_Live if console.is_interactive else _Plain)(self._progress, console)
        self._wandb: Run | None = None

    @property
    def uplink_bytes(self) -> int:
        return self._progress.uplink_bytes

    @property
    def downlink_bytes(self) -> int:
        return self._progress.downlink_bytes

    @property
    def elapsed_s(self) -> float:
        """Seconds of this run so far, interruptions left out."""
        return self._progress.elapsed_s

    @property
    def standing(self) -> Standing:
        """Where the run stands; only to be read."""
        return self._progress

    def __enter__(self) -> Self:
        path = self._folder / METRICS
        wandb_id = None
        with ExitStack() as stack:
            self._records = stack.enter_context(Records(path, version=self._version))
            for line in Records.read(path):
                self._progress.take(line)
                wandb_id = line.get("wandb_id", wandb_id)
            self._progress.restart()
            if self._recipe.log.wandb != "off":
                self._wandb = run = _start_wandb(self._folder, self._recipe, wandb_id)
                stack.push(lambda kind, *_: run.finish(exit_code=0 if kind is None else 1))
            if self._display:
                stack.enter_context(self._display)
            if self._wandb:
                message = _whereabouts(self._wandb)
                self.record("event", what="wandb", message=message, wandb_id=self._wandb.id)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def record(self, kind: Kind, **fields: Any) -> None:
        """Write a line, with `time_s` if it has none, and show it."""
        line = self._records.append(kind, **{"time_s": round(self.elapsed_s, 3), **fields})
        self._progress.take(line)
        if self._display:
            self._display.show(line)
        if self._wandb:
            _log_wandb(self._wandb, line)

    def alive(self, num_workers: int) -> None:
        """Show how many workers are alive."""
        self._progress.num_alive = num_workers

    def waiting(self, text: str) -> None:
        """Show what the run waits for, until the next round is recorded."""
        if text != self._progress.waiting:
            self._progress.waiting = text
            if self._display:
                self._display.wait(text)


# Display


class Standing:
    """Where a run stands: what the displays show, told by the lines recorded."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        self.name = name
        self.counted, self.num_workers = recipe.data.counted, recipe.train.workers
        # How far the run is, and how far it goes, in rounds or, merged on arrival, in contributions.
        self.unit, self.done, self.goal = "round", 0, recipe.train.rounds
        if recipe.merges_on_arrival:
            self.unit, self.goal = "merged", recipe.train.rounds * recipe.train.workers
        self.version = self.tokens = self.uplink_bytes = self.downlink_bytes = 0
        self.last_uplink_bytes = self.last_downlink_bytes = 0
        self.train_loss: float | None = None
        self.valid_loss: float | None = None
        self.evaluated = ""
        self.num_alive: int | None = None
        self.waiting = ""
        # (done, time_s, tokens) at recent merges: speed is measured between its ends
        self._window: deque[tuple[int, float, int]] = deque(maxlen=_WINDOW_ROUNDS + 1)
        self._time_s = 0.0  # of the run when ...
        self._seen_s = monotonic()  # ... this clock was read

    def take(self, line: Mapping[str, Any]) -> None:
        """Bring this up to date with a line."""
        # Events count: a run that was restarted before its next round must not go back in time.
        self._time_s, self._seen_s = max(self._time_s, line["time_s"]), monotonic()
        if line["kind"] == "round":
            self.version, self.tokens = line["version"], line["tokens"]
            self.done = line.get("contributions", self.version)
            self.train_loss = line["train_loss"]
            self.last_uplink_bytes = line["uplink_bytes"]
            self.last_downlink_bytes = line["downlink_bytes"]
            self.uplink_bytes += self.last_uplink_bytes
            self.downlink_bytes += self.last_downlink_bytes
            self.waiting = ""
            self._window.append((self.done, self._time_s, self.tokens))
        elif line["kind"] == "eval":
            self.valid_loss, self.evaluated = line["loss"], f"{self.unit} {self.place(line['version']):,}"

    def place(self, version: int) -> int:
        """How far the run was with a version; merged on arrival, how far it is."""
        return version if self.unit == "round" else self.done

    def restart(self) -> None:
        """Go on from the lines taken: time stood still since, and their speed says nothing."""
        self._seen_s = monotonic()
        self._window.clear()

    @property
    def elapsed_s(self) -> float:
        return self._time_s + monotonic() - self._seen_s

    @property
    def tokens_per_s(self) -> float | None:
        return self._per_s(2)

    @property
    def left_s(self) -> float | None:
        done_per_s = self._per_s(0)
        if not done_per_s:
            return None
        return max(0.0, (self.goal - self.done) / done_per_s - (self.elapsed_s - self._time_s))

    def _per_s(self, column: int) -> float | None:
        """How fast a column of the window grows; None before two rounds are known."""
        if len(self._window) < 2 or self._window[-1][1] <= self._window[0][1]:
            return None
        first, last = self._window[0], self._window[-1]
        return (last[column] - first[column]) / (last[1] - first[1])

    @property
    def workers(self) -> str:
        return "" if self.num_alive is None else f"{self.num_alive}/{self.num_workers}"


class _Plain:
    """Lines for pipes and log files: at most one round a second, but all else and the last round."""

    def __init__(self, progress: Standing, console: Console) -> None:
        self._progress, self._console = progress, console
        self._printed_s = -math.inf

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "round":
            now_s, last = monotonic(), self._progress.done >= self._progress.goal
            if last or now_s - self._printed_s >= _PLAIN_EVERY_S:
                self._printed_s = now_s
                self._print(self._round())
        elif line["kind"] == "eval":
            place = self._progress.place(line["version"])
            self._print(
                f"eval  {self._of(place)}  {line['tokens']:,} {self._progress.counted}"
                f"  valid {loss_text(line['loss'])}  master {loss_text(line['loss_master'])}"
                + (f"  accuracy {line['accuracy']:.1%}" if line.get("accuracy") is not None else "")
            )
        elif line["kind"] == "event":
            self._print(f"event {line['what']}: {line['message']}")

    def wait(self, text: str) -> None:
        if text:
            self._print(text)

    def _round(self) -> str:
        now = self._progress
        parts = {
            f"{now.unit} {self._of(now.done)}": True,
            f"{now.tokens:,} {now.counted}": True,
            f"{now.tokens_per_s or 0:,.0f} {now.counted.replace('tokens', 'tok')}/s": now.tokens_per_s
            is not None,
            f"train {loss_text(now.train_loss)}": True,
            f"valid {loss_text(now.valid_loss)}": now.valid_loss is not None,
            f"up {bytes_text(now.uplink_bytes)}": True,
            f"down {bytes_text(now.downlink_bytes)}": True,
            f"workers {now.workers}": bool(now.workers),
            f"left {clock_text(now.left_s)}": now.left_s is not None,
        }
        return "  ".join(part for part, known in parts.items() if known)

    def _of(self, done: int) -> str:
        return f"{done:>{len(str(self._progress.goal))}}/{self._progress.goal}"

    def _print(self, text: str) -> None:
        # not the console's print: it would wrap, and read [brackets] as markup
        print(text, file=self._console.file, flush=True)


class _Live:
    """A bar and the numbers that matter, redrawn in place; events scroll by above them."""

    def __init__(self, progress: Standing, console: Console) -> None:
        self._progress, self._console = progress, console
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        self._console.show_cursor()  # whoever ends this process at once must not be left without it
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "event":
            time = clock_text(line["time_s"])
            self._console.print(Text.assemble((time, "dim"), "  ", line["message"]))

    def wait(self, text: str) -> None:
        self._live.refresh()

    def _render(self) -> RenderableType:
        now = self._progress
        width = min(self._console.width, 110)  # beyond, the eye loses the line
        name = now.name if len(now.name) <= 16 else now.name[:15] + "…"
        bar = Table.grid(padding=(0, 1))
        bar.width = width
        for ratio in (None, 1, None, None):
            bar.add_column(ratio=ratio, no_wrap=True)
        bar.add_row(
            Text.assemble((name, "bold cyan"), f" {now.unit} {now.done:,}/{now.goal:,}"),
            ProgressBar(total=now.goal, completed=now.done),
            Text(f"{now.done / now.goal:.0%}", style="bold"),
            Text(f"{clock_text(now.elapsed_s)} gone, {clock_text(now.left_s)} left"),
        )
        speed, up, down = now.tokens_per_s, now.last_uplink_bytes, now.last_downlink_bytes
        # title: (share of the width, total, of late); fixed shares keep the columns from jumping
        columns = {
            "train loss": (12, loss_text(now.train_loss), ""),
            "valid loss": (12, loss_text(now.valid_loss), now.evaluated),
            now.counted: (16, f"{now.tokens:,}", "" if speed is None else f"{speed:,.0f}/s"),
            "up": (15, bytes_text(now.uplink_bytes), f"{bytes_text(up)}/round" if up else ""),
            "down": (15, bytes_text(now.downlink_bytes), f"{bytes_text(down)}/round" if down else ""),
            "workers": (8, now.workers or "-", ""),
        }
        numbers = Table(box=None, expand=True, width=width, padding=0, header_style="dim")
        for title, (share, *_) in columns.items():
            numbers.add_column(title, ratio=share, no_wrap=True)
        numbers.add_row(*(total for _, total, _ in columns.values()), style="bold")
        numbers.add_row(*(late for _, _, late in columns.values()), style="dim")
        return Group(bar, numbers, *([Text(now.waiting, style="yellow")] if now.waiting else []))


def loss_text(loss: float | None) -> str:
    """`2.871`, or a dash for a loss that is unknown or was not finite."""
    return "-" if loss is None else f"{loss:.3f}"


def clock_text(seconds: float | None) -> str:
    """`0:41`, `1:02:03`, or a dash for an unknown time."""
    if seconds is None:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


# Weights & Biases


def _start_wandb(folder: Path, recipe: Recipe, wandb_id: str | None) -> Run:
    """Begin a W&B run in the run's folder, or go on with an online one.

    Raises:
        UserError: when it cannot log in, or its server does not answer.
    """
    import wandb  # late: half a second that most runs need not pay

    mode = recipe.log.wandb
    assert mode != "off"
    settings = wandb.Settings(
        silent=True,
        console="off",  # it would wrap stdout, which is the display's
        disable_git=True,
        init_timeout=_WANDB_START_S,
        finish_timeout=_WANDB_FINISH_S,
    )
    session = wandb.setup(settings)
    try:
        if mode == "online":
            if not wandb.login(prompt=False, verify=False):  # a run must not stop to ask for a key
                raise UserError(_mend("there is no key on this machine"))
            _reach(session.settings.base_url)
            wandb.login(prompt=False)
        return wandb.init(
            project=recipe.log.wandb_project,
            name=folder.resolve().name,
            config=to_dict(recipe),
            dir=folder,
            mode=mode,
            id=wandb_id if mode == "online" else None,
            resume="allow" if mode == "online" else None,
            settings=settings,
        )
    except wandb.Error as error:
        raise UserError(_mend(str(error).partition("\n")[0])) from None


def _reach(url: str) -> None:
    """Raise UserError if nothing answers there.

    Asked before W&B asks: its process, told to end while a request is under way, may miss the word,
    and whoever started it then waits for its end for ever (seen with 0.30).
    """
    try:
        urllib.request.urlopen(url, timeout=_WANDB_ANSWERS_S).close()
    except urllib.error.HTTPError as answer:
        answer.close()
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if not isinstance(reason, ssl.SSLError):  # W&B knows other certificates
            raise UserError(_mend(f"{url} does not answer: {reason}")) from None


def _mend(reason: str) -> str:
    return f"log.wandb: cannot log in ({reason}); run `wandb login`, or set log.wandb=offline"


def _whereabouts(run: Run) -> str:
    return f"W&B: {run.url}" if run.url else f"W&B, to upload: wandb sync {Path(run.dir).parent}"


def _log_wandb(run: Run, line: Mapping[str, Any]) -> None:
    if line["kind"] == "done":
        run.summary.update({key: value for key, value in line.items() if key != "kind"})
    elif line["kind"] != "event":
        kind = line["kind"]
        numbers = {f"{kind}/{key}": n for key, n in line.items() if isinstance(n, int | float)}
        for name, of_module in line.get("modules", {}).items():
            numbers |= {f"{kind}/{key}/{name}": n for key, n in of_module.items() if n is not None}
        run.log(numbers, step=line["version"])
