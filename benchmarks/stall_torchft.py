"""How long torchft's replicas stall when one of them is killed or stopped; for `stall.py`, which runs
this in an environment of its own (pip install torch torchft).

    python benchmarks/stall_torchft.py kill|stop REPLICAS TRIALS HEARTBEAT_TIMEOUT_S JOIN_TIMEOUT_S

Its lighthouse, and DiLoCo over Gloo on a tiny model, one process a replica. Prints a line of JSON. The
join timeout is how long a quorum waits for a replica that is alive, as far as is known.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import nn
from torch.distributed import TCPStore
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

WIDTH, SYNC_EVERY = 64, 4
ROUNDS_BEFORE, ROUNDS_AFTER = 10, 4
"""That all replicas take before a fault, and that each survivor takes after it."""
PATIENCE_S = 120.0
CONTEXT = multiprocessing.get_context("spawn")


def main() -> None:
    fault, replicas, trials, *timeouts_s = sys.argv[1:]
    found = [trial(fault, int(replicas), *map(float, timeouts_s)) for _ in range(int(trials))]
    rounds = [seconds for _, seconds in found]
    print(json.dumps({"stalls_s": [stall for stall, _ in found], "round_s": statistics.median(rounds)}))


def trial(fault: str, replicas: int, timeout_s: float, join_timeout_s: float) -> tuple[float, float]:
    """One fault in a group of its own. Returns the survivors' longest wait for a round after it, and a
    round's time before it, in seconds."""
    # min_replicas counts who must be there for a quorum: the survivors suffice.
    lighthouse = LighthouseServer(
        bind="[::]:0",
        min_replicas=replicas - 1,
        heartbeat_timeout_ms=int(timeout_s * 1000),
        join_timeout_ms=int(join_timeout_s * 1000),
    )
    readers, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for k in range(replicas):
            reader, writer = CONTEXT.Pipe(duplex=False)
            arguments = (k, replicas, lighthouse.address(), timeout_s, writer, f"{folder}/{k}.log")
            process = CONTEXT.Process(target=replicate, args=arguments)
            process.start()
            writer.close()
            readers.append(reader)
            processes.append(process)
        try:
            return measure(readers, processes, fault)
        except BaseException:
            for k in range(replicas):
                with open(f"{folder}/{k}.log") as log:
                    print(f"== replica {k}\n{log.read()[-3000:]}", file=sys.stderr)
            raise
        finally:
            for process in processes:
                process.kill()
                process.join()
            lighthouse.shutdown()


def measure(readers: list[Connection], processes: list[Any], fault: str) -> tuple[float, float]:
    """Let all take some rounds, have the fault happen to the last one, watch the others."""
    times: dict[Connection, list[float]] = {reader: [] for reader in readers}

    def until(watched: list[Connection], num_rounds: int) -> None:
        least = {reader: len(times[reader]) + num_rounds for reader in watched}
        deadline_s = time.monotonic() + PATIENCE_S
        while any(len(times[reader]) < least[reader] for reader in watched):
            assert time.monotonic() < deadline_s, "the replicas have stopped for good"
            for reader in wait(watched, 1.0):
                participants, at_s = reader.recv()
                if participants == len(readers) or len(watched) < len(readers):
                    times[reader].append(at_s)

    until(readers, ROUNDS_BEFORE)
    fault_s = time.monotonic()
    os.kill(processes[-1].pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    survivors = readers[:-1]
    until(survivors, ROUNDS_AFTER)
    stalls, rounds = [], []
    for reader in survivors:
        before = [at_s for at_s in times[reader] if at_s <= fault_s]
        rounds += [later - earlier for earlier, later in itertools.pairwise(before)]
        after = [fault_s, *(at_s for at_s in times[reader] if at_s > fault_s)]
        stalls.append(max(later - earlier for earlier, later in itertools.pairwise(after)))
    return max(stalls), statistics.median(rounds)


def replicate(k: int, replicas: int, lighthouse: str, timeout_s: float, writer: Connection, log: str) -> None:
    """A replica, until it is killed. Sends (participants, time) after each round that was committed."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "inner": inner.state_dict()}

    def load(saved: dict[str, Any]) -> None:
        model.load_state_dict(saved["model"])
        inner.load_state_dict(saved["inner"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=timeout_s)),
        load_state_dict=load,
        state_dict=state,
        min_replica_size=replicas - 1,
        use_async_quorum=False,
        timeout=timedelta(seconds=timeout_s),
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"replica_{k}",
        hostname="localhost",
        init_sync=False,
    )
    committed = manager.current_step()
    with DiLoCo(manager, [model], inner, outer, sync_every=SYNC_EVERY), contextlib.suppress(BrokenPipeError):
        while True:
            inputs = torch.randn(16, WIDTH)
            inner.zero_grad()
            (model(inputs) - inputs).square().mean().backward()
            inner.step()
            if manager.current_step() > committed:
                committed = manager.current_step()
                writer.send((manager.num_participants(), time.monotonic()))


if __name__ == "__main__":
    main()
