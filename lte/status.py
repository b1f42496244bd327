"""Asking a server how its run is, and showing the answer."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
from rich.console import Group, RenderableType
from rich.filesize import decimal as bytes_text
from rich.table import Table
from rich.text import Text

from lte import transport, wire
from lte.errors import ConnectError
from lte.track import clock_text, loss_text

_ASK_AGAIN_S = 3.0
"""An inquiry without an answer is sent again after this: its connection may have broken."""
_LEAST_WIDTH = {"slot": 50, "version": 60, "merged": 60, "tokens/s": 70, "step": 90, "from": 90}
"""Columns of a terminal for which these of the table are shown."""


def inquire(
    address: str,
    *,
    wait_s: float = 10.0,
    key: str | Path | None = None,
    server_key: str | Path | None = None,
) -> wire.Status:
    """Ask the server at an address how its run is.

    Args:
        wait_s: how long to wait for an answer; in the midst of a merge or an evaluation none comes.
        key, server_key: files of keys, for a server that has some (see `transport.connect`).

    Raises:
        ConnectError: no server answers, keys do not fit, or it is of another version. KeysError: the
        files of keys cannot be used.
    """
    endpoint = transport.connect(address, key=key, server_key=server_key)
    try:
        deadline_s, asked_s = time.monotonic() + wait_s, -float("inf")
        while (now_s := time.monotonic()) < deadline_s:
            if now_s - asked_s >= _ASK_AGAIN_S:
                endpoint.send(wire.encode(wire.Inquiry(schema=wire.SCHEMA)))
                asked_s = now_s
            frames = endpoint.receive(min(asked_s + _ASK_AGAIN_S, deadline_s) - now_s)
            if frames is None:
                continue
            match wire.decode(frames)[0]:
                case wire.Status() as status:
                    return status
                case wire.Refusal(reason=reason, cure=cure):
                    raise ConnectError(f"{address}: the server does not answer this lte: {reason}; {cure}")
        raise ConnectError(
            f"no server answers at {address} after {wait_s:g} s; it may be busy with a merge or an evaluation"
            " (--wait), or not be there"
        )
    finally:
        endpoint.close()


def to_json(status: wire.Status) -> str:
    """All of it, as JSON that a script reads; what is not finite is null."""
    fields = msgspec.to_builtins(status)
    del fields["type"]
    return msgspec.json.format(msgspec.json.encode(fields), indent=2).decode()


def to_text(status: wire.Status, width: int) -> RenderableType:
    """A run and its workers, for rich to print on a terminal of so many columns."""
    speed, left, merged = status.tokens_per_s, status.left_s, status.merged_s
    rows = {
        "version": f"{status.version:,}" + ("" if status.on_arrival else f" of {status.rounds:,}"),
        "now": status.words,
        "loss": f"train {loss_text(status.train_loss)}, valid {loss_text(status.valid_loss)}",
        "tokens": f"{status.tokens:,}" + (f" ({speed:,.0f}/s)" if speed else ""),
        "bytes": f"up {bytes_text(status.uplink_bytes)}, down {bytes_text(status.downlink_bytes)}",
        "last merge": "none since this server started" if merged is None else f"{_ago(merged)} ago",
        "time": f"{clock_text(status.elapsed_s)} gone" + (f", {clock_text(left)} left" if left else ""),
        "workers": f"{status.num_members}" + (f", and {status.num_gone} gone" if status.num_gone else ""),
        "run": f"{status.run_id}, generation {status.generation} of its server",
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows.items():
        grid.add_row(name, Text(value))  # Text: paths may hold [brackets]
    table = [_table(status, width)] if status.workers else []
    return Group(Text(status.folder, style="bold cyan"), grid, *table)


def _table(status: wire.Status, width: int) -> Table:
    """Workers, one a row; a narrow table leaves out what matters least."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    rows = [_row(worker, status.local_steps) for worker in status.workers]
    for title in rows[0]:
        if width >= _LEAST_WIDTH.get(title, 0):
            right = title in ("slot", "version", "step", "tokens/s", "merged")
            table.add_column(title, justify="right" if right else "left", overflow="fold")
    for worker, row in zip(status.workers, rows, strict=True):
        cells = [Text(cell) for title, cell in row.items() if width >= _LEAST_WIDTH.get(title, 0)]
        table.add_row(*cells, style="dim" if worker.state == "gone" else None)
    return table


def _row(worker: wire.WorkerStatus, local_steps: int) -> dict[str, str]:
    state: str = worker.state
    if state == "training":
        state = f"step {worker.local_step} of {local_steps}"
    return {
        "worker": worker.worker_id,
        "slot": str(worker.slot),
        "state": f"{state}: {worker.reason}" if worker.reason else state,
        "seen": f"{_ago(worker.heard_s)} ago",
        "version": "-" if worker.version is None else str(worker.version),
        "merged": str(worker.rounds),
        "tokens/s": "-" if worker.tokens_per_s is None else f"{worker.tokens_per_s:,.0f}",
        "step": "-" if worker.step_s is None else f"{worker.step_s:.3g} s",
        "from": worker.address,
    }


def _ago(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock_text(seconds)
