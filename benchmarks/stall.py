"""How long the survivors stall when one worker of three is killed or stopped, beside torchft's replicas.

    python3 -m venv /tmp/torchft && /tmp/torchft/bin/pip install torch==2.13.0 torchft
    python benchmarks/stall.py [--torchft /tmp/torchft/bin/python] [--trials 10]

Both take for dead who sent no heartbeat for 5 s. How long a round waits for one that is late and not
known to be dead is a setting of both, torchft's join timeout and our grace window: in one row so long
that only heartbeats decide, in the other short. A stall is the longest wait for a round after the fault.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from fleet import ROOT, Fleet, send
from runs import header, records, row, shards_of

WORKERS, SILENCE_S = 3, 5.0
WAITS_S = {60.0: "5 s without a heartbeat", 0.1: "or 0.1 s after the others"}
FAULTS = {"kill": "one is killed", "stop": "one is stopped"}
ROUNDS_BEFORE, ROUNDS_AFTER = 10, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--torchft", metavar="PYTHON", help="python of an environment that has torchft")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--text", default=str(ROOT / "data/tinyshakespeare/input.txt.gz"))
    arguments = parser.parse_args()
    header(["", "missed after", "trials", "stall, median s", "worst s", "a round s"])
    for fault, wait_s in itertools.product(FAULTS, WAITS_S):
        if arguments.torchft:
            tell("torchft", fault, wait_s, *torchft(arguments.torchft, fault, arguments.trials, wait_s))
        with tempfile.TemporaryDirectory() as folder:
            shards = shards_of(arguments.text, Path(folder))
            tell("lte", fault, wait_s, *ours(Path(folder) / "fleet", shards, fault, arguments.trials, wait_s))


def tell(whose: str, fault: str, wait_s: float, stalls_s: list[float], round_s: float) -> None:
    figures = [f"{seconds:.2f}" for seconds in (statistics.median(stalls_s), max(stalls_s))]
    row([f"{whose}, {FAULTS[fault]}", WAITS_S[wait_s], len(stalls_s), *figures, f"{round_s:.2f}"])


def torchft(python: str, fault: str, trials: int, wait_s: float) -> tuple[list[float], float]:
    """Stalls, and the time of an undisturbed round, in seconds."""
    script = Path(__file__).with_name("stall_torchft.py")
    command = [python, str(script), fault, *map(str, (WORKERS, trials, SILENCE_S, wait_s))]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    found = json.loads(run.stdout.splitlines()[-1])
    return found["stalls_s"], found["round_s"]


def ours(folder: Path, shards: Path, fault: str, trials: int, wait_s: float) -> tuple[list[float], float]:
    """The same, of one run whose last worker has one fault after the other."""
    settings = {
        "data.shards": str(shards),
        "train.workers": WORKERS,
        "train.rounds": 1_000_000,
        "server.quorum": WORKERS - 1,
        "server.grace_s": wait_s,
        "server.silence_s": SILENCE_S,
        "eval.every": 0,
    }
    stalls_s, rounds_s = [], []
    with Fleet(folder, settings) as fleet:
        fleet.serve()
        for k in range(WORKERS):
            fleet.work(f"w{k}")
        for _ in range(trials):
            fleet.until_version(fleet.version + 1)
            while records(fleet.run)[-1].get("num_merged") != WORKERS:
                fleet.look()
            started_s, started = time.monotonic(), fleet.version
            fleet.until_version(started + ROUNDS_BEFORE)
            rounds_s.append((time.monotonic() - started_s) / (fleet.version - started))
            last = fleet.workers[f"w{WORKERS - 1}"]
            fault_s, before = time.monotonic(), fleet.version
            send(last, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            fleet.until_version(before + ROUNDS_AFTER)
            times_s = [fault_s, *(at_s for version, at_s in fleet.seen_s.items() if version > before)]
            stalls_s.append(max(later - earlier for earlier, later in itertools.pairwise(times_s)))
            if fault == "kill":
                fleet.work(f"w{WORKERS - 1}")
            else:
                send(last, signal.SIGCONT)
    return stalls_s, statistics.median(rounds_s)


if __name__ == "__main__":
    main()
