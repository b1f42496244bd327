"""How long a server takes for a round: 100M parameters from 8 workers, r = 32, by part.

    python benchmarks/server.py [num_threads] [key=value ...]

Beside each part stands its floor: the matrix product of the stacked factors alone, and the time to
read and write what the part must touch at the measured memory bandwidth.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from lte import config
from lte.config import Recipe
from lte.server.master import Master, Received

LAYERS, WIDTH, WORKERS, RANK = 24, 2048, 8, 32


def main() -> None:
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    torch.set_num_threads(1)
    settings = {"lora.rank": RANK, "base.quant": "nf4", "server.num_threads": threads}
    recipe = config.replace(Recipe(), **settings, **dict(a.split("=") for a in sys.argv[2:]))
    torch.manual_seed(0)
    model = nn.ModuleDict({f"l{k}": nn.Linear(WIDTH, WIDTH, bias=False) for k in range(LAYERS)})
    master = Master(model, recipe)
    n = master.plan.num_adapted_parameters
    for _ in range(3):  # the first round sends A whole
        blobs = contributions(master, recipe)
        seconds = one_round(master, blobs)
    torch.set_num_threads(threads)
    floor = floors(n)
    print(f"{n / 1e6:.0f}M parameters, {WORKERS} workers, r = {RANK}, {threads} threads\n")
    print("| part | s | M parameters/s | MB/s of fp32 | share | floor s |")
    print("| --- | --- | --- | --- | --- | --- |")
    total = sum(seconds.values())
    for part, s in [*seconds.items(), ("all", total)]:
        least = f"{floor[part]:.2f}" if part in floor else ""
        print(f"| {part} | {s:.2f} | {n / s / 1e6:.0f} | {4 * n / s / 1e6:.0f} | {s / total:.0%} | {least} |")


def contributions(master: Master, recipe: Recipe) -> list[dict[str, torch.Tensor]]:
    """Changes whose merge moves W by a fraction of a quantization step, as training does."""
    from lte.compress import A, B, factors

    sent = []
    for worker in range(WORKERS):
        blobs = {}
        for name, spec in master.plan.adapted.items():
            for ending, shape, size in (
                (A, (1, spec.rank, spec.shape[1]), spec.rank**-0.5),
                (B, (1, spec.shape[0], spec.rank), 2e-4),
            ):
                known = name + ending in master.merged.get(f"w{worker}", {})
                codec = factors.codec_of(name + ending, recipe, is_known=known)
                change = torch.randn(shape) * (size * 0.01 if known else size)
                blobs[name + ending], _ = factors.encode(change, *codec)
        sent.append(blobs)
    return sent


def one_round(master: Master, sent: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    seconds: dict[str, float] = {}

    def timed(part: str, work: Callable[[], object]) -> object:
        started = time.perf_counter()
        result = work()
        seconds[part] = time.perf_counter() - started
        return result

    received: list[Received] = []

    def decode() -> None:
        for worker, blobs in enumerate(sent):
            tensors = master.decode(blobs, f"w{worker}", 1, RANK)
            received.append(Received(f"w{worker}", 1, RANK, worker, 0, 1, tensors))

    timed("decode", decode)
    timed("merge", lambda: master.merge(received, 0))
    before = timed("requantize", master.requantize)
    timed("digests", lambda: (master.base_digest(), master.master_digest()))
    changed = timed("pack", lambda: [change for _, change in master.changes_since(before)])
    share = sum(c.codes_changed for c in changed) / master.plan.num_adapted_parameters
    sizes = sum(c.codes.numel() + c.scales.numel() for c in changed)
    print(f"{share:.1%} of the codes changed, {8 * sizes / master.plan.num_adapted_parameters:.3f} bits each")
    return seconds


def floors(n: int) -> dict[str, float]:
    """Seconds that cannot be beaten: of the matrix products, and of memory."""
    left, right = torch.randn(WIDTH, WORKERS * RANK), torch.randn(WORKERS * RANK, WIDTH)
    started = time.perf_counter()
    for _ in range(LAYERS):
        left @ right
    product = time.perf_counter() - started
    source, target = torch.empty(25_000_000), torch.empty(25_000_000)
    target.copy_(source)
    started = time.perf_counter()
    for _ in range(4):
        target.copy_(source)
    a_byte = (time.perf_counter() - started) / (4 * 2 * 100e6)
    return {
        "merge": product + n * 12 * a_byte,  # W read and written, the delta added
        "requantize": n * (4 + 0.5 + 0.5) * a_byte,
        "pack": n * 1.0 * a_byte,
        "digests": n * 4.53 * a_byte,
    }


if __name__ == "__main__":
    main()
