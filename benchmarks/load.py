"""One server under the load of many workers: is anything lost, is memory flat, how long is a round?

    python benchmarks/load.py [--workers 64] [--seconds 300] [--processes 4] [key=value ...]

The workers are light: each has a connection, a session and its heartbeats of its own, as every worker
does, but trains nothing. In every round it sends the contribution that a real worker made once. With
lora.merge=reset, the default here, the server takes it anew each time.

Lost is what a worker had sent and heard merged, or sent before the last round, and what the journal's
merges do not name.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
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
from runs import header, packed_bottles, row
from watched import Watched

from lte import config, wire
from lte.errors import RunEnded
from lte.models import build
from lte.nn import convert
from lte.server import journal
from lte.tasks import task_of
from lte.track import METRICS, Records
from lte.worker.session import Session
from lte.worker.trainer import Trainer, materialize

SETTINGS: dict[str, Any] = {
    "model.num_layers": 2,
    "model.width": 64,
    "model.num_attention_heads": 2,
    "model.mlp_width": 128,
    "model.context_tokens": 16,
    "base.quant": "int8",
    "lora.rank": 4,
    "lora.merge": "reset",
    "optimizer.lr": 1e-6,
    "train.rounds": 1_000_000,
    "train.local_steps": 1,
    "train.batch_size": 4,
    "compress.part_bytes": 16384,
    "server.silence_s": 60.0,
    "server.checkpoint_every": 100,
    "server.keep_checkpoints": 1_000_000,  # and with them the whole journal, for the audit
    "eval.every": 0,
    "eval.sample_tokens": 0,
}
JOINED_WITHIN_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Load a server with many light workers.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0, help="from the first round on")
    parser.add_argument("--processes", type=int, default=4, help="that the workers share")
    parser.add_argument("--clients", nargs=3, metavar=("ADDRESS", "FIRST", "END"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.clients:
        address, first, end = arguments.clients
        clients(address, range(int(first), int(end)))
        return
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(load(Path(folder), arguments))


# The workers, in processes of their own


def clients(address: str, numbers: range) -> None:
    """Light workers, a thread each, until the server says farewell. Prints what each sent and heard."""
    recorded = threading.Lock(), dict[str, dict[str, torch.Tensor]]()
    told: dict[str, Any] = {}
    threads = [threading.Thread(target=client, args=(address, f"w{n}", recorded, told)) for n in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json.dump(told, sys.stdout)


def client(address: str, worker_id: str, recorded: Any, told: dict[str, Any]) -> None:
    lock, contribution = recorded
    sent, merged = [], []
    with Session(address, worker_id=worker_id, wait_s=JOINED_WITHIN_S) as session:
        welcome = session.welcome
        with lock:  # one contribution is everyone's
            if not contribution:
                contribution["blobs"] = encoded(session)
        blobs, version, digest = contribution["blobs"], welcome.version, session.base_digest
        with contextlib.suppress(RunEnded):
            while True:
                message, _ = session.next_step()
                if isinstance(message, wire.Update):
                    version, digest = message.version, message.base_digest
                    session.progress(version, 0)
                    merged += [version] if welcome.incarnation in message.merged else []
                elif isinstance(message, wire.Begin) and message.version == version and version not in sent:
                    session.push(version, blobs.items(), closing(session, version, digest))
                    sent.append(version)
                else:
                    assert not isinstance(message, wire.Receipt), f"refused: {message}"
    told[worker_id] = {"incarnation": welcome.incarnation, "sent": sent, "merged": merged}


def closing(session: Session, version: int, base_digest: str) -> Any:
    """Makes the message that closes a contribution."""
    welcome = session.welcome

    def close(num_parts: int, blobs: dict[str, torch.Tensor]) -> wire.Contribution:
        return wire.Contribution(
            generation=welcome.generation,
            worker_id=welcome.worker_id,
            incarnation=welcome.incarnation,
            version=version,
            stream=0,
            parts=num_parts,
            draw=0,
            tokens=64,
            loss=1.0,
            lost=0.0,
            step_s=0.0,
            encode_s=0.0,
            apply_s=0.0,
            base_digest=base_digest,
            merged_digest=welcome.merged_digest,
            given_digest="",
        )

    return close


def encoded(session: Session) -> dict[str, torch.Tensor]:
    """The contribution of a real worker after a step on random tokens."""
    recipe = config.from_dict(session.welcome.settings)
    plain = build(recipe.model)
    model: Any = materialize(convert(plain, recipe.lora, recipe.base.quant), torch.device("cpu"))
    trainer = Trainer(
        model,
        recipe,
        slot=0,
        version=0,
        base=session.base,
        base_digest=session.base_digest,
        shards=session.shards,
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        0, recipe.model.vocab_size, (4, recipe.model.context_tokens + 1), generator=generator
    )
    task_of(recipe).loss(model, tokens).backward()
    trainer.step()
    return dict(trainer.contribution())


# The server, and what it cost


def load(folder: Path, arguments: argparse.Namespace) -> int:
    run = folder / "run"
    (folder / "recipe.yaml").write_text("")
    own = {
        "run.dir": run,
        "data.shards": packed_bottles(folder),
        "server.address": "tcp://127.0.0.1:*",
        "train.workers": arguments.workers,
    }
    reading, writing = os.pipe()
    overrides = [f"{key}={value}" for key, value in (SETTINGS | own).items()]
    lte = [
        sys.executable,
        "-m",
        "lte",
        "server",
        str(folder / "recipe.yaml"),
        *overrides,
        *arguments.overrides,
    ]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [*lte, "--announce", str(writing)], pass_fds=(writing,), stdout=log, stderr=log
        )
    os.close(writing)
    with os.fdopen(reading) as announced:
        address = announced.readline().strip()
    ends = [arguments.workers * k // arguments.processes for k in range(arguments.processes + 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--clients", address, str(first), str(end)], stdout=subprocess.PIPE
        )
        for first, end in itertools.pairwise(ends)
    ]
    try:
        until_first_round(run, server)
        watched = Watched(server.pid, every_s=0.5)
        time.sleep(arguments.seconds)
        watched.close()
        server.send_signal(signal.SIGTERM)
        told: dict[str, Any] = {}
        for process in processes:
            told |= json.loads(process.communicate(timeout=JOINED_WITHIN_S)[0])
        server.wait(JOINED_WITHIN_S)
    finally:
        for process in (server, *processes):
            process.kill()
            process.wait()
    assert "Traceback" not in (log_text := (folder / "server.log").read_text()), log_text
    return report(run, told, watched)


def until_first_round(run: Path, server: subprocess.Popen[bytes]) -> None:
    ends_s = time.monotonic() + JOINED_WITHIN_S
    while not any(line["kind"] == "round" for line in Records.read(run / METRICS)):
        assert server.poll() is None, "the server ended"
        assert time.monotonic() < ends_s, "the first round was not merged"
        time.sleep(0.2)


def report(run: Path, told: dict[str, Any], watched: Watched) -> int:
    """Print the tables. Returns the exit code: 1 if something was lost."""
    rounds = [line for line in Records.read(run / METRICS) if line["kind"] == "round"]
    times_ms = sorted(
        1e3 * (late["time_s"] - early["time_s"]) for early, late in itertools.pairwise(rounds[1:])
    )
    merged = journaled(run)
    num_rounds = len(merged)
    sent = {(version, who["incarnation"]) for who in told.values() for version in who["sent"]}
    heard = {(version - 1, who["incarnation"]) for who in told.values() for version in who["merged"]}
    in_journal = {(version - 1, incarnation) for version, some in merged.items() for incarnation in some}
    twice = sum(len(some) - len(set(some)) for some in merged.values())
    still_open = {(version, incarnation) for version, incarnation in sent if version >= num_rounds}
    lost = (sent - still_open - in_journal) | (heard - in_journal)
    header(["rounds", "ms a round: median / p95 / worst", "of it merging, ms", "uplink kB", "downlink kB"])
    worst = [times_ms[len(times_ms) // 2], times_ms[int(len(times_ms) * 0.95)], times_ms[-1]]
    row(
        [
            num_rounds,
            " / ".join(f"{ms:.0f}" for ms in worst),
            f"{1e3 * statistics.median(line['merge_s'] for line in rounds):.0f}",
            f"{statistics.median(line['uplink_bytes'] for line in rounds) / 1e3:.0f}",
            f"{statistics.median(line['downlink_bytes'] for line in rounds) / 1e3:.0f}",
        ]
    )
    print()
    header(["contributions sent", "merged", "in the round that was open", "lost", "merged twice"])
    row([f"{len(sent):,}", f"{len(in_journal):,}", len(still_open), len(lost), twice])
    print()
    samples = watched.samples
    at = [samples[0][1], samples[len(samples) // 2][1], samples[-1][1]]
    seconds = samples[-1][0]
    header(["s", "memory MB: start / middle / end", "slope of the last half, MB a minute", "server's CPU"])
    row(
        [
            f"{seconds:.0f}",
            " / ".join(f"{num_bytes / 1e6:.1f}" for num_bytes in at),
            f"{watched.slope(seconds / 2) * 60 / 1e6:+.2f}",
            f"{watched.cpu_share:.0%} of a core",
        ]
    )
    tenths = [samples[len(samples) * k // 10][1] / 1e6 for k in range(10)]
    print(f"memory at each tenth, MB: {', '.join(f'{mb:.1f}' for mb in tenths)}", file=sys.stderr)
    return 1 if lost or twice else 0


def journaled(run: Path) -> dict[int, tuple[int, ...]]:
    """version -> incarnations whose contributions the journal says are in it."""
    merged: dict[int, tuple[int, ...]] = {}
    for segment in journal.history(run):
        for record in segment:
            if isinstance(record, journal.Merged):
                assert record.version not in merged, "a version was merged twice"
                merged[record.version] = record.incarnations
    return merged


if __name__ == "__main__":
    main()
