"""The change of a base as bytes, against plain numpy, and against damage."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lte import quantize
from lte.compress import changes
from lte.compress.entropy import expand, squeeze
from lte.errors import WireError
from lte.quantize import Quant, Quantized

QUANTS: list[Quant] = ["nf4", "int8", "none"]
SHAPES = [(1, 1), (1, 64), (3, 5), (5, 13), (8, 64), (33, 63)]


def bits_of(base: Quantized) -> tuple[bytes, bytes]:
    return base.codes.view(torch.uint8).numpy().tobytes(), base.scales.view(torch.uint8).numpy().tobytes()


def same(a: Quantized, b: Quantized) -> bool:
    kinds = [(x.quant, x.shape, x.codes.dtype, x.scales.dtype, x.codes.shape, x.scales.shape) for x in (a, b)]
    return kinds[0] == kinds[1] and bits_of(a) == bits_of(b)


def random_base(generator: np.random.Generator, shape: tuple[int, int], quant: Quant) -> Quantized:
    """Any bits, the same as no quantizer makes."""
    base = quantize.empty(shape, quant, "cpu")
    for tensor in (base.codes, base.scales):
        raw = tensor.view(torch.uint8)
        raw.copy_(torch.from_numpy(generator.integers(0, 256, raw.shape, dtype=np.uint8)))
    return base


def changed_base(generator: np.random.Generator, base: Quantized, share: float, reach: int) -> Quantized:
    """A base in which about this share of bytes, and of scales' bits, moved by up to `reach`."""

    def moved(tensor: torch.Tensor, unsigned: type[np.unsignedinteger]) -> torch.Tensor:
        x = tensor.view(torch.uint8).numpy().view(unsigned)
        step = generator.integers(-reach, reach + 1, x.shape) * (generator.random(x.shape) < share)
        return torch.from_numpy((x + step).astype(unsigned).view(np.uint8)).view(tensor.dtype)

    codes, scales = moved(base.codes, np.uint8), moved(base.scales, np.uint16)
    return Quantized(base.quant, base.shape, codes, scales)


histories = st.tuples(
    st.sampled_from(QUANTS),
    st.sampled_from(SHAPES),
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.003, 0.05, 0.4, 1.0]), st.sampled_from([1, 20, 255])),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**32),
)


def versions_of(history: tuple[Quant, tuple[int, int], list[tuple[float, int]], int]) -> list[Quantized]:
    quant, shape, steps, seed = history
    generator = np.random.default_rng(seed)
    versions = [random_base(generator, shape, quant)]
    for share, reach in steps:
        versions.append(changed_base(generator, versions[-1], share, reach))
    return versions


@settings(deadline=None, max_examples=150)
@given(histories)
def test_changes_applied_in_turn_give_the_newest_base(history) -> None:
    versions = versions_of(history)
    held = versions[0]
    for old, new in pairwise(versions):
        change = changes.encode(old, new)
        before = bits_of(held)
        applied = changes.apply(held, change.codes, change.scales)
        assert bits_of(held) == before, "the input is not changed"
        assert same(applied, new)
        held = applied


@settings(deadline=None, max_examples=100)
@given(histories)
def test_changes_fold_into_one(history) -> None:
    """Reverted one by one, as a server does for a worker that is versions behind, then encoded anew."""
    *earlier, newest = versions = versions_of(history)
    past = newest
    for old, new in list(pairwise(versions))[::-1]:
        change = changes.encode(old, new)
        if changes.FULL in (change.codes[0], change.scales[0]):
            with pytest.raises(ValueError, match="cannot be undone"):
                changes.revert(past, change.codes, change.scales)
            past = old
        else:
            past = changes.revert(past, change.codes, change.scales)
        assert same(past, old)
        folded = changes.encode(past, newest)
        assert same(changes.apply(past, folded.codes, folded.scales), newest)
    assert same(past, earlier[0])


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_snapshot_applies_to_any_base(shape: tuple[int, int], quant: Quant) -> None:
    generator = np.random.default_rng(0)
    base = random_base(generator, shape, quant)
    snapshot = changes.full(base)
    for other in (quantize.empty(shape, quant, "cpu"), random_base(generator, shape, quant)):
        assert same(changes.apply(other, snapshot.codes, snapshot.scales), base)
        with pytest.raises(ValueError, match="cannot be undone"):
            changes.revert(other, snapshot.codes, snapshot.scales)
    assert snapshot.scales_changed == base.scales.numel()


@pytest.mark.parametrize("quant", QUANTS)
def test_what_changed_is_counted(quant: Quant) -> None:
    generator = np.random.default_rng(0)
    old = random_base(generator, (33, 63), quant)
    new = changed_base(generator, old, 0.1, 3)
    change = changes.encode(old, new)
    if quant == "nf4":
        pairs = [np.stack([x.codes.numpy() >> 4, x.codes.numpy() & 15]) for x in (old, new)]
    else:
        pairs = [x.codes.view(torch.int32 if quant == "none" else torch.int8).numpy() for x in (old, new)]
    assert change.codes_changed == (pairs[0] != pairs[1]).sum() > 0
    scales = [x.scales.view(torch.int16).numpy() for x in (old, new)]
    assert change.scales_changed == (scales[0] != scales[1]).sum()
    nothing = changes.encode(old, old)
    assert (nothing.codes_changed, nothing.scales_changed) == (0, 0)
    assert nothing.codes.numel() == nothing.scales.numel() == 1


def naive_entropy_bytes(old: Quantized, new: Quantized) -> float:
    """Shannon's formula over differences counted one by one."""

    def entropy(differences: list[int]) -> float:
        total = len(differences)
        return sum(n * math.log2(total / n) for n in Counter(differences).values()) / 8

    def codes(base: Quantized) -> list[int]:
        if base.quant == "int8":
            return base.codes.tolist()
        return [nibble for byte in base.codes.tolist() for nibble in (byte >> 4, byte & 15)]

    modulus = 16 if old.quant == "nf4" else 256
    scales = [base.scales.view(torch.int16).tolist() for base in (old, new)]
    return entropy([(b - a) % modulus for a, b in zip(codes(old), codes(new), strict=True)]) + entropy(
        [(b - a) % 65536 for a, b in zip(*scales, strict=True)]
    )


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_entropy_is_shannons(quant: Quant) -> None:
    old, new = versions_of((quant, (33, 63), [(0.2, 2)], 0))
    assert changes.entropy_bytes(old, new) == pytest.approx(naive_entropy_bytes(old, new))
    assert changes.entropy_bytes(old, old) == 0


STEPS = [0.0002, 0.001, 0.005, 0.02, 0.06, 0.11, 0.15, 0.22, 0.35, 0.6]


@pytest.mark.parametrize(("quant", "slack"), [("nf4", 1.06), ("int8", 1.1)])
def test_bytes_are_near_the_entropy_at_every_density(quant: Quant, slack: float) -> None:
    """From 0.05 % to 60 % of the codes of a million; each form is met."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(1024, 1024, generator=generator)
    moves = torch.randn(1024, 1024, generator=generator)
    old, shares, forms = quantize.quantize(W, quant), [], set()
    for step in STEPS:
        new = quantize.requantize(W + moves * (step if quant == "nf4" else step / 10), old)
        change = changes.encode(old, new)
        assert same(changes.apply(old, change.codes, change.scales), new)
        num_bytes = change.codes.numel() + change.scales.numel()
        assert num_bytes <= slack * changes.entropy_bytes(old, new) + 100
        shares.append(change.codes_changed / W.numel())
        forms.add(int(change.codes[0]))
    assert shares[0] < 0.002 < 0.5 < shares[-1]
    assert forms == {changes.GAPS, changes.DENSE}


def test_the_same_change_makes_the_same_bytes() -> None:
    old, new = versions_of(("nf4", (33, 63), [(0.1, 3)], 0))
    one, two = changes.encode(old, new), changes.encode(old, new)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scales, two.scales)


# Damage


def damaged(blob: torch.Tensor, how: str, at: int, value: int) -> torch.Tensor:
    blob = blob.clone()
    where = at % max(blob.numel(), 1)
    if how == "flip" and blob.numel():
        blob[where] ^= 1 << value % 8
    if how == "overwrite" and blob.numel():
        blob[where] = value
    if how == "cut":
        blob = blob[:where]
    if how == "grow":
        blob = torch.cat([blob, torch.full((1 + at % 9,), value, dtype=torch.uint8)])
    return blob


damages = st.lists(
    st.tuples(
        st.sampled_from(["flip", "overwrite", "cut", "grow"]),
        st.integers(0, 40) | st.integers(0, 5000),  # headers more often than what follows them
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=3,
)


@settings(deadline=None, max_examples=400)
@given(history=histories, damage=damages, of_codes=st.booleans(), undo=st.booleans())
def test_damage_is_refused_or_makes_another_base(history, damage, of_codes: bool, undo: bool) -> None:
    old, new = versions_of(history)[:2]
    change = changes.encode(old, new)
    codes, scales = change.codes, change.scales
    for one in damage:
        if of_codes:
            codes = damaged(codes, *one)
        else:
            scales = damaged(scales, *one)
    is_full = changes.FULL in [int(blob[0]) for blob in (codes, scales) if blob.numel()]
    try:
        base = (changes.revert if undo else changes.apply)(old, codes, scales)
    except WireError:
        return
    except ValueError:
        if undo and is_full:
            return
        raise
    assert (base.quant, base.shape) == (old.quant, old.shape)
    assert (base.codes.dtype, base.scales.dtype) == (old.codes.dtype, old.scales.dtype)
    assert (base.codes.shape, base.scales.shape) == (old.codes.shape, old.scales.shape)


@settings(deadline=None, max_examples=200)
@given(
    quant=st.sampled_from(QUANTS),
    codes=st.binary(max_size=60),
    scales=st.binary(max_size=60),
    forms=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
def test_any_bytes_are_refused_or_make_a_base(quant: Quant, codes, scales, forms) -> None:
    base = quantize.empty((5, 13), quant, "cpu")
    blobs = [
        torch.frombuffer(bytearray([form, *rest]), dtype=torch.uint8)
        for form, rest in zip(forms, (codes, scales), strict=True)
    ]
    try:
        applied = changes.apply(base, *blobs)
    except WireError:
        return
    assert applied.codes.shape == base.codes.shape


def test_a_truncated_or_extended_change_is_always_refused() -> None:
    """No form has bytes to spare."""
    generator = np.random.default_rng(0)
    for quant in QUANTS:
        old = random_base(generator, (33, 63), quant)
        for share in (0.0, 0.001, 0.05, 0.6, 1.0):
            change = changes.encode(old, changed_base(generator, old, share, 3))
            for blobs in (
                (change.codes[:-1], change.scales),
                (change.codes, change.scales[:-1]),
                (torch.cat([change.codes, change.codes[:1]]), change.scales),
                (change.codes, torch.cat([change.scales, change.scales[:1]])),
            ):
                with pytest.raises(WireError):
                    changes.apply(old, *blobs)


# Entropy coding


@settings(deadline=None, max_examples=100)
@given(
    st.binary(max_size=300)
    | st.tuples(st.integers(0, 255), st.integers(0, 300_000)).map(lambda x: bytes([x[0]]) * x[1])
)
def test_squeezed_bytes_expand(raw: bytes) -> None:
    data = np.frombuffer(raw, np.uint8)
    blob = squeeze(data)
    assert blob.numel() <= len(raw) + 1
    assert torch.equal(squeeze(torch.from_numpy(data.copy())), blob)
    assert expand(blob, len(raw)).numpy().tobytes() == raw
    for other in {0, len(raw) - 1, len(raw) + 1, 10 * len(raw)} - {len(raw), -1}:
        with pytest.raises(WireError):
            expand(blob, other)


def test_a_bomb_is_refused_before_it_takes_memory() -> None:
    """Frames of 16 GiB: by what they hold, by the size they claim, and by the window they ask for."""
    import tracemalloc

    import zstandard

    held = squeeze(np.zeros(1 << 24, np.uint8))
    compressor = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(
            format=zstandard.FORMAT_ZSTD1_MAGICLESS, window_log=27, compression_level=1
        )
    )
    writer = compressor.compressobj(size=1 << 34)
    claims = writer.compress(bytes(1 << 20)) + writer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    windowed = compressor.compressobj()
    asks = windowed.compress(bytes(1 << 20)) + windowed.flush()
    tracemalloc.start()
    for bomb in (held.numpy().tobytes(), b"\1" + claims, b"\1" + asks):
        with pytest.raises(WireError):
            expand(np.frombuffer(bomb, np.uint8), 1 << 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
