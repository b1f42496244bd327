"""What slow links cost: a server and four workers on an emulated network, beside DDP and the planner.

    sudo python benchmarks/links.py [key=value ...] --infra DIR [--text FILE ...] [--links NAME ...]

DIR holds netns_up.sh and netns_down.sh, which make network namespaces joined by links with rate,
delay and loss. Each link carries the recipe without and with overlap, then DDP (Gloo, bf16 gradients).
Prints a markdown table. Finished measurements are kept in runs/links/*.json and not repeated; whatever
happens, the namespaces are removed. Links that cannot be emulated here are skipped, with the reason.

Delays are half of the round trip at either end, so all pairs of machines have the same one, and two
workers lose packets on both their links. Cores are shared by all processes and by the emulator, so
look at `load` (processes that wanted a core) before comparing times: shares of time suffer less.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import itertools
import json
import operator
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from lte import config, cost, recipes
from lte.config import Recipe
from lte.tasks import task_of
from lte.track import METRICS, Records

RUNS = Path("runs/links")
RECIPE = "configs/gpt-10m.yaml"
WORKERS = 4
SETTINGS = [
    "model.context_tokens=64",
    f"train.workers={WORKERS}",
    "train.local_steps=10",
    "lora.rank=32",
    "eval.every=0",
    "eval.final_tokens=2000",
    "eval.sample_tokens=0",
    "server.checkpoint_every=1000",
    "server.silence_s=60",
    "server.insecure=true",
    "run.resume=never",
]
"""Of all runs, on top of the recipe; those of the command line come last."""
METHODS = {"LTE": ["train.overlap=false"], "LTE, overlap": ["train.overlap=true"]}
WARM_ROUNDS, WARM_STEPS = 2, 1
"""Rounds and DDP steps that do not count."""
PREFIX, SUBNET, PORT = "lteb", "10.79.0", 5555


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network to run on. Rate 0: none, but the loopback interface."""

    rate_mbit: float = 0
    rtt_ms: float = 0
    loss: float = 0

    def link(self, num_ends: int = 1) -> cost.Link:
        """As the planner has it, where packets pass so many lossy links."""
        bps = self.rate_mbit * 1e6 or float("inf")
        loss = 1 - (1 - self.loss) ** num_ends
        return cost.Link(up_bps=bps, down_bps=bps, rtt_s=self.rtt_ms / 1e3, loss=loss)


NETWORKS = {
    "loopback": Network(),
    "100 Mbit/s, 50 ms": Network(rate_mbit=100, rtt_ms=50),
    "10 Mbit/s, 100 ms": Network(rate_mbit=10, rtt_ms=100),
    "100 Mbit/s, 50 ms, 0.5% lost": Network(rate_mbit=100, rtt_ms=50, loss=0.005),
}

Result = dict[str, Any]
Inside = Callable[[int], list[str]]
"""The words before a command that run it on node n; 0 is the server's."""


def main() -> None:
    arguments = _arguments()
    if arguments.ddp_rank is not None:
        ddp_process(arguments)
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    RUNS.mkdir(parents=True, exist_ok=True)
    lock = (RUNS / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"another of these runs in {RUNS}")
    shards = RUNS / "shards"
    if not (shards / "index.json").exists():
        if not arguments.text:
            sys.exit(f"{shards} holds no data yet: give --text FILE")
        lte = [sys.executable, "-m", "lte", "data", "pack", "--out", str(shards)]
        subprocess.run([*lte, *map(str, arguments.text)], check=True)
    own = [*SETTINGS, f"data.shards={shards}", f"train.rounds={arguments.rounds}", *arguments.overrides]
    results: dict[tuple[str, str], Result] = {}
    for name in ["loopback", *(name for name in arguments.links if name != "loopback")]:
        network = NETWORKS[name]
        if why_not := cannot_emulate(network, arguments.infra):
            print(f"{name}: skipped, {why_not}", file=sys.stderr)
            continue
        for method in [*METHODS, "DDP"]:
            results[name, method] = measured(name, method, own, arguments)
    print_table(results, own)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure rounds over slow links.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe")
    parser.add_argument("--infra", type=Path, metavar="DIR", help="folder of netns_up.sh")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="text to train on")
    parser.add_argument("--links", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: all")
    parser.add_argument("--rounds", type=int, default=8, help="default: 8")
    parser.add_argument("--ddp-steps", type=int, default=3, help="that count (default: 3)")
    parser.add_argument("--timeout", type=float, default=1200, metavar="S", help="of one run (default: 1200)")
    parser.add_argument("--ddp-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ddp-result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def cannot_emulate(network: Network, infra: Path | None) -> str:
    """Why this network cannot be had here, or ''."""
    if not network.rate_mbit:
        return ""
    if os.geteuid():
        return "namespaces need root"
    if infra is None or not (infra / "netns_up.sh").is_file():
        return "--infra DIR must hold netns_up.sh"
    missing = [tool for tool in ("ip", "bash") if not shutil.which(tool)]
    return f"there is no {missing[0]}" if missing else ""


@contextmanager
def up(network: Network, infra: Path) -> Iterator[Inside]:
    """Have a network; it is gone afterwards, with all that still runs in it."""
    if not network.rate_mbit:
        yield lambda node: []
        return
    state = (RUNS / "netns").resolve()
    down = ["bash", str(infra / "netns_down.sh"), "--kill", str(state)]
    settings = {
        "MODE": "tap",
        "NODES": WORKERS,
        "RATE_MBIT": network.rate_mbit,
        "DELAY_MS": network.rtt_ms / 2,
        "LOSS": network.loss,
        "NS_PREFIX": PREFIX,
        "SUBNET": SUBNET,
    }
    env = {**os.environ, **{key: str(value) for key, value in settings.items()}}
    try:
        if (state / "netns.env").exists():  # left by a run that was killed
            subprocess.run(down, check=True, stdout=sys.stderr)
        subprocess.run(["bash", infra / "netns_up.sh", state], env=env, check=True, stdout=sys.stderr)
        links = json.loads((state / "links.json").read_text())
        links[f"{PREFIX}0"]["delay_ms"] = network.rtt_ms / 2
        (state / "links.json").write_text(json.dumps(links))
        time.sleep(0.5)  # the emulator looks five times a second
        yield lambda node: ["ip", "netns", "exec", f"{PREFIX}{node}"]
    finally:
        subprocess.run(down, check=False, stdout=sys.stderr)


def measured(name: str, method: str, own: Sequence[str], arguments: argparse.Namespace) -> Result:
    """The result of a method over a link, from its file where it is there."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{name} {method}".lower())
    digest = hashlib.sha256(repr([own, METHODS.get(method), arguments.ddp_steps]).encode()).hexdigest()[:8]
    path = RUNS / f"{slug}-{digest}.json"
    if not path.exists():
        print(f"{name}: {method} ...", file=sys.stderr, flush=True)
        with up(NETWORKS[name], arguments.infra) as inside:
            if method == "DDP":
                result = run_ddp(inside, own, arguments)
            else:
                folder = path.with_suffix("")
                result = run_lte(
                    inside, [*own, *METHODS[method], f"run.dir={folder}"], folder, arguments.timeout
                )
        path.write_text(json.dumps(result, indent=1))
    found: Result = json.loads(path.read_text())
    return found


# LTE


def run_lte(inside: Inside, overrides: Sequence[str], folder: Path, timeout_s: float) -> Result:
    """A run of one server and its workers in processes of their own: medians of its rounds."""
    address = f"tcp://{SUBNET}.1:{PORT}" if inside(0) else f"tcp://127.0.0.1:{_free_port()}"
    lte = [sys.executable, "-m", "lte"]
    server = [*lte, "server", RECIPE, *overrides, f"server.address={address}"]
    workers = [[*lte, "worker", "--server", address, "--wait", "60"] for _ in range(WORKERS)]
    commands = [[*inside(node), *command] for node, command in enumerate([server, *workers])]
    run_together(commands, {}, timeout_s, folder.with_suffix(".log"))
    rounds = [line for line in Records.read(folder / METRICS) if line["kind"] == "round"]
    counted = rounds[WARM_ROUNDS:]
    ends_s = [line["time_s"] for line in rounds[WARM_ROUNDS - 1 :]]
    tokens = counted[0]["tokens"] - rounds[WARM_ROUNDS - 1]["tokens"]
    took_s = [end - start for start, end in itertools.pairwise(ends_s)]
    computed_s = [line["step_s"] * config.load(RECIPE, overrides).train.local_steps for line in counted]
    round_s = statistics.median(took_s)
    return {
        "folder": str(folder),
        "load": os.getloadavg()[0],
        "round_s": round_s,
        "compute_share": statistics.median(map(operator.truediv, computed_s, took_s)),
        "tokens_s": tokens / round_s,
        "uplink_bytes": statistics.median(line["uplink_bytes"] / line["num_merged"] for line in counted),
        "downlink_bytes": statistics.median(line["downlink_bytes"] / line["num_merged"] for line in counted),
    }


def run_together(commands: Sequence[Sequence[str]], env: dict[str, str], timeout_s: float, log: Path) -> None:
    """Run commands side by side until all have ended well; end them all if one does not."""
    deadline_s = time.monotonic() + timeout_s
    with ExitStack() as stack, log.open("wb") as output:
        running: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, running)
        for n, command in enumerate(commands):
            own = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(n), **env}
            running.append(subprocess.Popen(command, env=own, stdout=output, stderr=output))
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running) or time.monotonic() > deadline_s:
                break
            time.sleep(0.1)
        if any(process.poll() != 0 for process in running):
            raise SystemExit(f"a process failed or took more than {timeout_s:g} s; see {log}")


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# DDP


def run_ddp(inside: Inside, own: Sequence[str], arguments: argparse.Namespace) -> Result:
    """Data-parallel steps of the same model, batch and number of workers."""
    result, log = RUNS / "ddp.json", RUNS / "ddp.log"
    overrides = [override for override in own if override != "run.resume=never"]
    env = {
        "MASTER_ADDR": f"{SUBNET}.11" if inside(1) else "127.0.0.1",
        "MASTER_PORT": str(PORT if inside(1) else _free_port()),
        "GLOO_SOCKET_IFNAME": "eth0" if inside(1) else "lo",
    }
    script = [sys.executable, __file__, "--ddp-steps", str(arguments.ddp_steps), "--ddp-result", str(result)]
    commands = [[*inside(rank + 1), *script, "--ddp-rank", str(rank), *overrides] for rank in range(WORKERS)]
    run_together(commands, env, arguments.timeout, log)
    found: Result = json.loads(result.read_text())
    recipe = config.load(RECIPE, overrides)
    steps, tokens = recipe.train.local_steps, recipe.train.batch_size * recipe.model.context_tokens
    return {
        "round_s": steps * found["seconds"],
        "tokens_s": WORKERS * tokens / found["seconds"],
        "load": os.getloadavg()[0],
        "step_s": found["alone_s"],
        "compute_share": found["alone_s"] / found["seconds"],
        "uplink_bytes": steps * found["sent_bytes"],
        "downlink_bytes": steps * found["received_bytes"],
    }


def ddp_process(arguments: argparse.Namespace) -> None:
    """One rank of DDP: steps without exchange first, then steps with it. Rank 0 writes the result."""
    torch.set_num_threads(1)
    recipe = config.load(RECIPE, arguments.overrides)
    distributed.init_process_group("gloo", rank=arguments.ddp_rank, world_size=WORKERS)
    model = recipes.initial_model(recipe)
    # All start from one seed: broadcasting the model would take minutes on these links.
    wrapped = DistributedDataParallel(_Loss(model, recipe), init_sync=False)
    wrapped.register_comm_hook(None, lambda _, bucket: in_bf16(bucket.buffer()))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    shape = (recipe.train.batch_size, recipe.model.context_tokens + 1)

    def step() -> float:
        start_s = time.perf_counter()
        wrapped(torch.randint(recipe.model.vocab_size, shape)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start_s

    distributed.barrier()
    with wrapped.no_sync():
        alone_s = statistics.median([step() for _ in range(5)])
    for _ in range(WARM_STEPS):
        step()
    before = _interface_bytes()
    seconds = [step() for _ in range(arguments.ddp_steps)]
    distributed.barrier()
    received, sent = (now - then for now, then in zip(_interface_bytes(), before, strict=True))
    on_one = WORKERS if os.environ["GLOO_SOCKET_IFNAME"] == "lo" else 1
    if arguments.ddp_rank == 0:
        per_step = arguments.ddp_steps * on_one
        result = {
            "seconds": statistics.mean(seconds),
            "alone_s": alone_s,
            "sent_bytes": sent / per_step,
            "received_bytes": received / per_step,
        }
        arguments.ddp_result.write_text(json.dumps(result))
    distributed.destroy_process_group()


def in_bf16(gradients: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    """What torch's bf16_compress_hook does with a bucket, and refuses to do over Gloo."""
    work = distributed.all_reduce(gradients.to(torch.bfloat16) / WORKERS, async_op=True)
    reduced: torch.futures.Future[list[torch.Tensor]] = work.get_future()
    return reduced.then(lambda done: gradients.copy_(done.value()[0]))


class _Loss(torch.nn.Module):
    """DDP wraps what is called."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.task = model, task_of(recipe)

    def forward(self, sequences: torch.Tensor) -> Any:
        return self.task.loss(self.model, sequences)


def _interface_bytes() -> tuple[int, int]:
    """Received and sent by this namespace's interface so far, frames' headers included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == os.environ["GLOO_SOCKET_IFNAME"]:
            return int(figures.split()[0]), int(figures.split()[8])
    raise SystemExit(f"no interface {os.environ['GLOO_SOCKET_IFNAME']}")


# The planner


def predicted(name: str, method: str, measured_in: Result, own: Sequence[str]) -> cost.Estimate:
    """What the planner says of this link, with the speeds and bits of this measurement of the method."""
    recipe = config.load(RECIPE, [*own, *METHODS.get(method, [])])
    plan, network, rates = cost.plan_of(recipe), NETWORKS[name], cost.assumed(recipe)
    if method == "DDP":
        rates = cost.said(rates, step_s=measured_in["step_s"])
        return cost.ddp_round(recipe, plan, _sites(network.link(num_ends=2)), rates)
    rates = cost.from_run(Path(measured_in["folder"]), recipe, rates)
    return cost.lte_round(recipe, plan, _sites(network.link()), rates)


def _sites(link: cost.Link) -> list[cost.Site]:
    return [cost.Site(name="worker", link=link, count=WORKERS)]


def print_table(results: dict[tuple[str, str], Result], own: Sequence[str]) -> None:
    """Measured and planned: with the speeds of the loopback's run, and with those of the run itself,
    which differ by what else the machine did."""
    titles = ["link", "method", "s/round", "tokens/s", "of loopback", "computing", "load", "MB up", "MB down"]
    titles += ["planned s", "with own speeds", "planned MB up", "down"]
    print("| " + " | ".join(titles) + " |")
    print("|" + " --- |" * len(titles))
    for (name, method), result in results.items():
        here = results["loopback", method]
        plan = predicted(name, method, here, own)
        with_own = predicted(name, method, result, own)
        row = [
            name,
            method,
            f"{result['round_s']:.2f}",
            f"{result['tokens_s']:,.0f}",
            f"{result['tokens_s'] / here['tokens_s']:.0%}",
            f"{result['compute_share']:.0%}",
            f"{result['load']:.0f}",
            f"{result['uplink_bytes'] / 1e6:.2f}",
            f"{result['downlink_bytes'] / 1e6:.2f}",
            _beside(plan.round_s, result["round_s"]),
            _beside(with_own.round_s, result["round_s"]),
            _beside(sum(plan.uplink_bytes.values()) / 1e6, result["uplink_bytes"] / 1e6),
            _beside(sum(plan.downlink_bytes.values()) / 1e6, result["downlink_bytes"] / 1e6),
        ]
        print("| " + " | ".join(row) + " |")


def _beside(planned: float, measured: float) -> str:
    return f"{planned:.2f} ({planned / measured - 1:+.0%})"


if __name__ == "__main__":
    main()
