"""How a base's change is packed and how a base is requantized: bits and speeds, against alternatives.

    python benchmarks/packing.py

One core, ten seconds. Prints markdown: bits a code of ways to pack the change of an NF4 base, and the speed
of packing and unpacking, at several shares of changed codes; then the speed of requantizing and of its
parts, and that of copying the same weights. `pip install constriction pcodec` adds two coders.

The weights are normal, 2 million, and take one normal step; scales are sticky. Each way to pack gives
back all codes, which is checked. Ours includes the scales' change; the others are of codes alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, get_args

import numpy as np
import torch
import zstandard

from lte import quantize
from lte.compress import changes
from lte.compress.entropy import expand, squeeze
from lte.quantize import Quantized

SHAPE = (1024, 2048)
STEPS = {0.2: 0.00067, 1: 0.0034, 2: 0.0067, 5: 0.017, 12: 0.0405, 30: 0.101, 55: 0.222}
"""Percent of codes changed, about: root mean square of the step, in that of the weights."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Packing:
    """A way to pack the differences of codes.

    Attributes:
        pack: differences modulo 16, one a byte (n,), to parts: bytes, or arrays of them.
        unpack: the parts and n to the differences.
    """

    pack: Callable[[Array], list[Any]]
    unpack: Callable[[list[Any], int], Array]
    needs: str | None = None


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight, move = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    old = quantize.quantize(weight, "nf4")
    news = {share: quantize.requantize(weight + step * move, old) for share, step in STEPS.items()}
    print_packings(old, news)
    print_requantizing(weight, weight + STEPS[12] * move)


def table(header: list[str], rows: list[list[str]]) -> None:
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(row) + " |")
    print()


def seconds(call: Callable[[], Any], repeats: int = 3) -> float:
    """The least of several."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


# Packing


def print_packings(old: Quantized, news: dict[float, Quantized]) -> None:
    n = SHAPE[0] * SHAPE[1]
    shares = {share: changes.encode(old, new).codes_changed / n for share, new in news.items()}
    print("Bits a code (pack / unpack, million codes a second), by percent of codes changed\n")
    rows = []
    for name, packing in PACKINGS.items():
        if packing.needs and find_spec(packing.needs) is None:
            rows.append([name, f"{packing.needs} is not installed"] + [""] * (len(news) - 1))
        else:
            rows.append([name, *(measured(packing, old, new) for new in news.values())])
    rows.insert(0, ["packed codes' XOR, zstd-1", *(measured_xor(old, new) for new in news.values())])
    rows.append(["ours, with scales", *(measured_ours(old, new) for new in news.values())])
    entropies = [changes.entropy_bytes(old, new) * 8 / n for new in news.values()]
    rows.append(["zeroth-order entropy, with scales", *(f"{bits:.4f}" for bits in entropies)])
    table(["", *(f"{100 * share:.2g} %" for share in shares.values())], rows)


def measured(packing: Packing, old: Quantized, new: Quantized) -> str:
    """From codes to parts, and from parts to codes."""
    before, after = old.codes.numpy(), new.codes.numpy()
    n = before.size * 2

    def pack() -> list[Any]:
        return packing.pack((nibbles(after) - nibbles(before)) & 15)

    def unpack() -> Array:
        return packed((nibbles(before) + packing.unpack(parts, n)) & 15)

    parts = pack()
    assert np.array_equal(unpack(), after)
    num_bytes = sum(part.nbytes if hasattr(part, "nbytes") else len(part) for part in parts)
    return cell(num_bytes, n, seconds(pack), seconds(unpack))


def measured_xor(old: Quantized, new: Quantized) -> str:
    before, after = old.codes.numpy(), new.codes.numpy()
    blob = zstd(before ^ after)
    pack_s, unpack_s = seconds(lambda: zstd(before ^ after)), seconds(lambda: before ^ unzstd(blob))
    return cell(len(blob), before.size * 2, pack_s, unpack_s)


def measured_ours(old: Quantized, new: Quantized) -> str:
    change = changes.encode(old, new)
    pack, unpack = partial(changes.encode, old, new), partial(changes.apply, old, change.codes, change.scales)
    num_bytes = change.codes.numel() + change.scales.numel()
    return cell(num_bytes, old.codes.numel() * 2, seconds(pack), seconds(unpack))


def cell(num_bytes: int, n: int, pack_s: float, unpack_s: float) -> str:
    return f"{num_bytes * 8 / n:.4f} ({n / pack_s / 1e6:.0f} / {n / unpack_s / 1e6:.0f})"


def nibbles(codes: Array) -> Array:
    return np.stack([codes >> 4, codes & 15], 1).reshape(-1)


def packed(numbers: Array) -> Array:
    padded = np.append(numbers, np.zeros(numbers.size % 2, np.uint8)).reshape(-1, 2)
    bytes_: Array = padded[:, 0] << 4 | padded[:, 1]
    return bytes_


def zstd(raw: Array) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(np.ascontiguousarray(raw).data)


def unzstd(blob: bytes) -> Array:
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(blob), np.uint8)


def pack_plain(differences: Array) -> list[Any]:
    return [zstd(packed(differences))]


def unpack_plain(parts: list[Any], n: int) -> Array:
    return nibbles(unzstd(parts[0]))


def pack_huffman(differences: Array) -> list[Any]:
    return [squeeze(packed(differences))]


def unpack_huffman(parts: list[Any], n: int) -> Array:
    return nibbles(expand(parts[0], n // 2).numpy())


def pack_planes(differences: Array) -> list[Any]:
    return [zstd(np.packbits(differences >> bit & 1)) for bit in range(4)]


def unpack_planes(parts: list[Any], n: int) -> Array:
    planes = (np.unpackbits(unzstd(part)) << bit for bit, part in enumerate(parts))
    return sum(planes, np.zeros(n, np.uint8))


def pack_bitmap(differences: Array) -> list[Any]:
    changed = differences != 0
    return [zstd(np.packbits(changed)), zstd(packed(differences[changed]))]


def unpack_bitmap(parts: list[Any], n: int) -> Array:
    changed = np.unpackbits(unzstd(parts[0])).astype(bool)
    differences = np.zeros(n, np.uint8)
    differences[changed] = nibbles(unzstd(parts[1]))[: int(changed.sum())]
    return differences


def pack_gaps(differences: Array) -> list[Any]:
    """A gap of more than 254 is a 255 and 4 bytes in another part."""
    at = np.flatnonzero(differences)
    gaps = np.diff(at, prepend=-1) - 1
    long = gaps[gaps >= 255].astype(np.uint32)
    gaps_u8 = np.minimum(gaps, 255).astype(np.uint8)
    return [zstd(gaps_u8), zstd(long.view(np.uint8)), zstd(packed(differences[at]))]


def unpack_gaps(parts: list[Any], n: int) -> Array:
    gaps = unzstd(parts[0]).astype(np.int64)
    gaps[gaps == 255] = unzstd(parts[1]).view(np.uint32)
    differences = np.zeros(n, np.uint8)
    differences[np.cumsum(gaps + 1) - 1] = nibbles(unzstd(parts[2]))[: gaps.size]
    return differences


def pack_pcodec(differences: Array) -> list[Any]:
    pcodec = import_module("pcodec")
    at = np.flatnonzero(differences)
    gaps = np.diff(at, prepend=-1).astype(np.uint32)
    squeezed = pcodec.standalone.simple_compress(gaps, pcodec.ChunkConfig())
    return [squeezed, squeeze(packed(differences[at]))]


def unpack_pcodec(parts: list[Any], n: int) -> Array:
    standalone = import_module("pcodec").standalone
    at = np.cumsum(standalone.simple_decompress(parts[0]).astype(np.int64)) - 1
    differences = np.zeros(n, np.uint8)
    differences[at] = nibbles(expand(parts[1], (at.size + 1) // 2).numpy())[: at.size]
    return differences


def categorical(counts: Array) -> Any:
    model = import_module("constriction").stream.model
    return model.Categorical(np.maximum(counts, 1) / np.maximum(counts, 1).sum(), perfect=False)


def pack_rans(differences: Array) -> list[Any]:
    counts = np.bincount(differences, minlength=16)
    coder = import_module("constriction").stream.stack.AnsCoder()
    coder.encode_reverse(differences.astype(np.int32), categorical(counts))
    return [counts.astype(np.uint32), coder.get_compressed()]


def unpack_rans(parts: list[Any], n: int) -> Array:
    coder = import_module("constriction").stream.stack.AnsCoder(parts[1])
    symbols: Array = coder.decode(categorical(parts[0].astype(np.int64)), n)
    return symbols.astype(np.uint8)


PACKINGS = {
    "difference nibbles, zstd-1": Packing(pack_plain, unpack_plain),
    "difference nibbles, Huffman": Packing(pack_huffman, unpack_huffman),
    "four bit planes, zstd-1": Packing(pack_planes, unpack_planes),
    "bitmap and differences, zstd-1": Packing(pack_bitmap, unpack_bitmap),
    "gaps and differences, zstd-1": Packing(pack_gaps, unpack_gaps),
    "gaps by pcodec, differences": Packing(pack_pcodec, unpack_pcodec, needs="pcodec"),
    "difference nibbles, rANS": Packing(pack_rans, unpack_rans, needs="constriction"),
}


# Requantizing


def print_requantizing(weight: torch.Tensor, moved: torch.Tensor) -> None:
    n = weight.numel()

    def row(name: str, call: Callable[[], Any], size: int = n) -> list[str]:
        duration = seconds(call, repeats=7)
        return [name, f"{size / duration / 1e6:.0f}", f"{size * 4 / duration / 1e9:.2f}"]

    copy = torch.empty_like(weight)
    rows = [row("copying fp32 weights", partial(copy.copy_, moved))]
    for quant in get_args(quantize.Quant):
        base = quantize.quantize(weight, quant)
        rows.append(row(f"{quant}: quantize", partial(quantize.quantize, weight, quant)))
        for hysteresis in (0.0, 0.3):
            call = partial(quantize.requantize, moved, base, hysteresis=hysteresis)
            rows.append(row(f"{quant}: requantize, hysteresis {hysteresis:g}", call))
        if quant != "none":  # which is a view
            rows.append(row(f"{quant}: dequantize", partial(quantize.dequantize, base)))
    theirs = partial(quantize._kernels().quantize_4bit.default, weight.view(-1, 64), 64, "nf4", torch.uint8)
    rows.append(row("nf4: quantize by bitsandbytes", theirs))
    rows += [
        row("nf4, a chunk: " + name, call, blocks.numel())
        for name, (call, blocks) in chunk_parts(moved).items()
    ]
    print("Requantizing (GB of fp32 weights)\n")
    table(["", "million codes a second", "GB/s"], rows)


def chunk_parts(weight: torch.Tensor) -> dict[str, tuple[Callable[[], Any], torch.Tensor]]:
    """What `requantize` does with each chunk, and the chunk."""
    blocks = weight.view(-1, quantize.BLOCK)[: quantize._CHUNK]
    base = quantize.quantize(blocks, "nf4")
    scales, codes = base.scales.float(), base.codes
    calls: dict[str, Callable[[], Any]] = {
        "scales": partial(quantize._scales, blocks, base.scales, "nf4", (0.8, 1.05)),
        "nearest codes": partial(quantize._nearest, blocks, scales, "nf4"),
        "hysteresis": partial(quantize._keeps, blocks, scales, codes, codes, "nf4", 0.3),
    }
    return {name: (call, blocks) for name, call in calls.items()}


if __name__ == "__main__":
    main()
