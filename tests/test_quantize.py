"""The base against independent quantizers: float64, element by element."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lte import quantize
from lte.quantize import Quant, Quantized

# The NormalFloat table of Dettmers et al. 2023, appendix E, written here from the paper.
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)

SHAPES = [(64, 64), (5, 96), (7, 160), (3, 688), (128, 1376), (1, 1), (3, 5), (33, 63)]
QUANTS: list[Quant] = ["nf4", "int8", "none"]
LEVELS = {"nf4": NF4.double().numpy(), "int8": np.arange(-127.0, 128.0)}
"""What codes stand for, in scales; those of int8 counted from -127."""
REACH = {"nf4": 1, "int8": 127}
"""Largest magnitude that a scale stands for."""


def weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(W: torch.Tensor) -> torch.Tensor:
    flat = W.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % 64)).view(-1, 64)


def bf16(x: np.ndarray) -> np.ndarray:
    """fp32 rounded to the nearest bf16, ties to even, by its bits."""
    bits = x.astype(np.float32).view(np.uint32)
    return (((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) << 16).view(np.float32)


def codes_of(base: Quantized) -> np.ndarray:
    """Indexes into `LEVELS`, (blocks, 64)."""
    if base.quant == "int8":
        return (base.codes.numpy().astype(int) + 127).reshape(-1, 64)
    packed = base.codes.numpy()
    return np.stack([packed >> 4, packed & 15], 1).astype(int).reshape(-1, 64)


def check_requantized(
    W: torch.Tensor, previous: Quantized, base: Quantized, hysteresis: float, keep: tuple[float, float]
) -> None:
    """The definition of `requantize`, in float64. A choice that rounding could turn counts as right."""
    blocks = blocks_of(W).double().numpy()
    largest, old_scales = np.abs(blocks).max(1), previous.scales.double().numpy()
    stays = (keep[0] * REACH[base.quant] * old_scales <= largest) & (
        largest <= keep[1] * REACH[base.quant] * old_scales
    )
    scales = np.where(stays, old_scales, bf16(largest.astype(np.float32) / np.float32(REACH[base.quant])))
    assert np.array_equal(base.scales.double().numpy(), scales)

    levels = LEVELS[base.quant]
    errors = np.abs(blocks[..., None] - scales[:, None, None] * levels)
    old, new = codes_of(previous), codes_of(base)
    of_old, of_new, least = (
        np.take_along_axis(errors, codes[..., None], 2)[..., 0] for codes in (old, new, errors.argmin(2))
    )
    rounding = 1e-5 * scales[:, None]
    may_keep = of_old <= (1 + hysteresis) * least + rounding
    must_keep = of_old <= (1 + hysteresis) * least - rounding
    assert ((of_new <= least + rounding) | (may_keep & (new == old))).all()
    if hysteresis:
        assert (~must_keep | (new == old)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_the_nearest_code_of_the_papers_table(shape: tuple[int, int]) -> None:
    """Against torch.bucketize over the table's midpoints in float64: all codes and scales equal."""
    W = weight(shape)
    base = quantize.quantize(W, "nf4")
    blocks = blocks_of(W)
    scales = torch.from_numpy(bf16(blocks.abs().amax(1).numpy()))
    boundaries = ((NF4[1:] + NF4[:-1]) / 2).double()
    codes = torch.bucketize(blocks.double() / scales.double()[:, None], boundaries).view(-1)
    assert base.scales.dtype == torch.bfloat16
    assert torch.equal(base.scales.float(), scales)
    assert torch.equal(base.codes, (codes[::2] << 4 | codes[1::2]).to(torch.uint8)), "first in high nibble"
    expected = (NF4[codes].view(-1, 64) * scales[:, None]).view(-1)[: W.numel()].view(shape)
    assert torch.equal(quantize.dequantize(base), expected)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] * s[1] % 64 == 0])
def test_nf4_has_bitsandbytes_codes_where_the_scale_needs_no_rounding(shape: tuple[int, int]) -> None:
    """On (n / 64, 64), which is free of bitsandbytes' bug with straddling rows."""
    import bitsandbytes.functional as bnb

    blocks = blocks_of(weight(shape))
    largest = blocks.abs().amax(1)
    rounded = torch.from_numpy(bf16(largest.numpy()))
    is_largest = blocks.abs() == largest[:, None]
    blocks = torch.where(is_largest, blocks.sign() * rounded[:, None], blocks)
    blocks = torch.minimum(torch.maximum(blocks, -rounded[:, None]), rounded[:, None])
    packed, state = bnb.quantize_4bit(blocks.contiguous(), blocksize=64, quant_type="nf4")
    ours = quantize.quantize(blocks.view(shape), "nf4")
    assert torch.equal(packed.view(-1), ours.codes)
    assert torch.equal(state.absmax, ours.scales.float())
    assert torch.equal(bnb.dequantize_4bit(packed, state).view(shape), quantize.dequantize(ours))


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step(shape: tuple[int, int]) -> None:
    W = weight(shape)
    base = quantize.quantize(W, "int8")
    step = np.repeat(bf16(blocks_of(W).abs().amax(1).numpy() / np.float32(127)), 64)[: W.numel()]
    error = (quantize.dequantize(base) - W).abs().numpy()
    # Where a scale is rounded down, the largest magnitudes lie up to 0.4 % beyond 127 of it.
    beyond = np.maximum(W.abs().numpy() - 127 * step.reshape(shape), 0)
    assert (error <= np.maximum(step.reshape(shape) * 0.5001, beyond * 1.0001)).all()
    assert beyond.max() <= 0.004 * float(W.abs().max())


@settings(deadline=None, max_examples=100)
@given(
    quant=st.sampled_from(QUANTS),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200),
)
def test_any_finite_weight_has_a_finite_base_that_stays(quant: Quant, values: list[float]) -> None:
    W = torch.tensor([values])
    base = quantize.quantize(W, quant)
    back = quantize.dequantize(base)
    assert back.isfinite().all()
    assert back.shape == W.shape
    again = quantize.requantize(back, base)
    # A base is the fixed point of its format: from scratch W = deq(Q) costs nothing.
    assert torch.equal(quantize.dequantize(again), back)
    assert torch.equal(again.scales, base.scales)


@settings(deadline=None, max_examples=60)
@given(
    quant=st.sampled_from(["nf4", "int8"]),
    shape=st.sampled_from([(1, 1), (1, 63), (2, 32), (5, 13), (3, 96), (7, 160)]),
    seed=st.integers(0, 10_000),
    hysteresis=st.sampled_from([0.0, 0.1, 0.5, 1.0, 4.0]),
    keep=st.sampled_from([(0.8, 1.05), (1.0, 1.0), (0.0, 10.0)]),
)
def test_a_history_of_requantizations_follows_the_definition(
    quant: Quant, shape: tuple[int, int], seed: int, hysteresis: float, keep: tuple[float, float]
) -> None:
    """Small and large steps, blocks that become zero and blocks that were."""
    generator = np.random.default_rng(seed)
    W = torch.from_numpy(generator.normal(size=shape).astype(np.float32))
    base = quantize.quantize(W, quant)
    for _ in range(6):
        blocks = blocks_of(W * float(generator.choice([0.7, 1.0, 1.0, 1.3]))).clone()
        blocks += torch.from_numpy(generator.normal(0, 0.05, blocks.shape).astype(np.float32))
        blocks[torch.from_numpy(generator.random(len(blocks)) < 0.2)] = 0
        W = blocks.view(-1)[: W.numel()].view(shape).clone()
        previous, bits = base, (base.codes.clone(), base.scales.clone())
        base = quantize.requantize(W, previous, hysteresis=hysteresis, keep=keep)
        assert torch.equal(previous.codes, bits[0])
        assert torch.equal(previous.scales, bits[1])
        assert (base.quant, base.shape, base.codes.dtype) == (quant, shape, bits[0].dtype)
        check_requantized(W, previous, base, hysteresis, keep)
        assert (quantize.dequantize(base)[W == 0] == 0).all()


@pytest.mark.parametrize("quant", QUANTS)
def test_from_nothing_requantizing_is_quantizing(quant: Quant) -> None:
    W = weight((33, 63))
    from_nothing = quantize.requantize(W, quantize.empty((33, 63), quant, "cpu"))
    base = quantize.quantize(W, quant)
    assert torch.equal(from_nothing.codes, base.codes)
    assert torch.equal(from_nothing.scales, base.scales)


@pytest.mark.parametrize(("quant", "move"), [("nf4", 0.02), ("int8", 0.002)])
def test_sticky_scales_and_hysteresis_change_less(quant: Quant, move: float) -> None:
    W = weight((64, 64))
    moved = W + move * weight((64, 64), seed=1)
    base = quantize.quantize(W, quant)
    plain, sticky, calm = (
        quantize.requantize(moved, base, hysteresis=h, keep=keep)
        for h, keep in ((0.0, (1.0, 1.0)), (0.0, (0.8, 1.05)), (0.5, (0.8, 1.05)))
    )
    changed = [int((codes_of(new) != codes_of(base)).sum()) for new in (plain, sticky, calm)]
    assert min(changed[:2]) > 1.5 * changed[2] > 0
    num_scales = [int((new.scales != base.scales).sum()) for new in (plain, sticky)]
    assert num_scales[0] > 10 * num_scales[1]


def test_none_is_the_weight_itself_and_shares_no_memory() -> None:
    W = weight((3, 5))
    base = quantize.requantize(W, quantize.empty((3, 5), "none", "cpu"), hysteresis=1.0)
    assert torch.equal(quantize.dequantize(base), W)
    assert base.codes.data_ptr() != W.data_ptr()


@pytest.mark.parametrize("quant", QUANTS)
def test_codes_depend_neither_on_threads_nor_on_chunks(quant: Quant, monkeypatch: pytest.MonkeyPatch) -> None:
    W, moved = weight((300, 640)), weight((300, 640)) + 0.05 * weight((300, 640), seed=1)

    def both() -> list[torch.Tensor]:
        base = quantize.quantize(W, quant)
        new = quantize.requantize(moved, base, hysteresis=0.3)
        return [base.codes, base.scales, quantize.dequantize(base), new.codes, new.scales]

    one = both()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(quantize, "_CHUNK", 777)
    try:
        assert all(torch.equal(a, b) for a, b in zip(one, both(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_those_of_the_tensors(shape: tuple[int, int], quant: Quant) -> None:
    for base in (quantize.empty(shape, quant, "cpu"), quantize.quantize(weight(shape), quant)):
        assert quantize.num_bytes(shape, quant) == base.codes.nbytes + base.scales.nbytes
        assert quantize.step(base).shape == base.scales.shape
        assert quantize.dequantize(base).shape == shape
    assert quantize.num_blocks(shape) == math.ceil(shape[0] * shape[1] / 64)


def test_step_is_the_mean_distance_of_neighbouring_levels() -> None:
    W = weight((4, 64))
    nf4, int8 = quantize.quantize(W, "nf4"), quantize.quantize(W, "int8")
    mean_distance = float(NF4.diff().mean())
    assert torch.allclose(quantize.step(nf4), nf4.scales.float() * mean_distance)
    assert torch.equal(quantize.step(int8), int8.scales.float())
    assert quantize.step(nf4).dtype == torch.float32


def test_digest_sees_every_bit_name_and_shape() -> None:
    x = torch.zeros(4)
    flipped = x.clone()
    flipped[2] = -0.0
    assert quantize.digest([("a", x)]) == quantize.digest([("a", x.clone())])
    others = [("b", x), ("a", x.view(2, 2)), ("a", flipped), ("a", x.to(torch.float64))]
    assert len({quantize.digest([other]) for other in [("a", x), *others]}) == 5
