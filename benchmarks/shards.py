"""How long a round takes where the master is divided among 1, 2 and 4 processes (`server.shards`).

    python benchmarks/shards.py [--workers 8,32] [--shards 1,2,4] [--rounds 10] [--pace 0.5] [key=value ...]

The workers are those of `load`: each has connections, a session and heartbeats of its own, and sends in
every round what a real worker made once. Each one waits for `--pace` seconds before it does, in place of
local steps; a round is that, and what server and links take. The model has 3 million parameters.

More processes than cores gain nothing: what they share out then is memory and the link.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from load import JOINED_WITHIN_S, SETTINGS, client
from runs import header, packed_bottles, row

from lte.server.shards import folder_of
from lte.track import METRICS, Records
from lte.worker.session import Session

LARGER: dict[str, Any] = {
    "model.num_layers": 4,
    "model.width": 256,
    "model.mlp_width": 1024,
    "lora.rank": 16,
    "compress.part_bytes": 1 << 20,
    "server.checkpoint_every": 1_000_000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time rounds of a divided server.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the runs")
    parser.add_argument("--workers", default="8,32")
    parser.add_argument("--shards", default="1,2,4")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--pace", type=float, default=0.5, help="seconds before a worker contributes")
    parser.add_argument("--clients", nargs=2, metavar=("ADDRESS", "NUMBER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.clients:
        clients(arguments.clients[0], int(arguments.clients[1]), arguments.pace)
        return
    header(["workers", "shards", "s a round", "of it merging, s", "publishing, s", "journals kB a round"])
    for workers in map(int, arguments.workers.split(",")):
        for shards in map(int, arguments.shards.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                row([workers, shards, *measured(Path(folder), workers, shards, arguments)])
                sys.stdout.flush()


def clients(address: str, number: int, pace_s: float) -> None:
    """Light workers, a thread each, that push at a pace."""
    push = Session.push

    def paced(self: Session, *arguments: Any) -> None:
        time.sleep(pace_s)
        push(self, *arguments)

    Session.push = paced  # type: ignore[method-assign]
    recorded: Any = (threading.Lock(), {})
    threads = [threading.Thread(target=client, args=(address, f"w{n}", recorded, {})) for n in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measured(folder: Path, workers: int, shards: int, arguments: argparse.Namespace) -> list[str]:
    """Run it. Returns what the table says of it."""
    run = folder / "run"
    (folder / "recipe.yaml").write_text("")
    own = {
        "run.dir": run,
        "data.shards": packed_bottles(folder),
        "server.address": "tcp://127.0.0.1:*",
        "server.shards": shards,
        "train.workers": workers,
    }
    overrides = [f"{key}={value}" for key, value in (SETTINGS | LARGER | own).items()]
    lte = [sys.executable, "-m", "lte", "server", str(folder / "recipe.yaml")]
    reading, writing = os.pipe()
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [*lte, *overrides, *arguments.overrides, "--announce", str(writing)],
            pass_fds=(writing,),
            stdout=log,
            stderr=log,
        )
    os.close(writing)
    with os.fdopen(reading) as announced:
        address = announced.readline().strip()
    crowd = subprocess.Popen(
        [sys.executable, __file__, "--clients", address, str(workers), "--pace", str(arguments.pace)]
    )
    try:
        ends_s = time.monotonic() + JOINED_WITHIN_S * 4
        while len(done := rounds_of(run)) < arguments.rounds:
            assert server.poll() is None and time.monotonic() < ends_s, (folder / "server.log").read_text()
            time.sleep(0.2)
        server.send_signal(signal.SIGTERM)
        server.wait(JOINED_WITHIN_S)
        crowd.wait(JOINED_WITHIN_S)
    finally:
        for process in (server, crowd):
            process.kill()
            process.wait()
    times_s = [late["time_s"] - early["time_s"] for early, late in itertools.pairwise(done[1:])]
    journals = [
        sum(path.stat().st_size for path in (folder_of(run, shard) / "journal").glob("*.log"))
        for shard in range(shards)
    ]
    return [
        f"{statistics.median(times_s):.2f}",
        *(f"{statistics.median(line[part] for line in done):.3f}" for part in ("merge_s", "pack_s")),
        " + ".join(f"{size / 1e3 / len(rounds_of(run)):.0f}" for size in journals),
    ]


def rounds_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in Records.read(run / METRICS) if line["kind"] == "round"]


if __name__ == "__main__":
    main()
