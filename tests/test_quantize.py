"""The base against independent quantizers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lte import quantize

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


def weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(W: torch.Tensor) -> torch.Tensor:
    flat = W.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % 64)).view(-1, 64)


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_the_nearest_code_of_the_papers_table(shape: tuple[int, int]) -> None:
    """Against torch.bucketize over the table's midpoints: all codes and scales equal."""
    W = weight(shape)
    base = quantize.quantize(W, "nf4")
    blocks = blocks_of(W)
    scales = blocks.abs().amax(1)
    codes = torch.bucketize(blocks / scales.clamp(min=1e-30)[:, None], (NF4[1:] + NF4[:-1]) / 2)
    codes = codes.view(-1)
    assert torch.equal(base.scales, scales)
    assert torch.equal(base.codes, (codes[::2] << 4 | codes[1::2]).to(torch.uint8)), "first in high nibble"
    expected = (NF4[codes].view(-1, 64) * scales[:, None]).view(-1)[: W.numel()].view(shape)
    assert torch.equal(quantize.dequantize(base), expected)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] * s[1] % 64 == 0])
def test_dequantization_error_is_within_bitsandbytes_own(shape: tuple[int, int]) -> None:
    """bitsandbytes' own round trip on (n / 64, 64), which is free of its bug with straddling rows."""
    import bitsandbytes.functional as bnb

    W = weight(shape)
    packed, state = bnb.quantize_4bit(W.reshape(-1, 64).contiguous(), blocksize=64, quant_type="nf4")
    theirs = bnb.dequantize_4bit(packed, state).reshape(shape)
    ours = quantize.dequantize(quantize.quantize(W, "nf4"))
    assert torch.equal(packed.view(-1), quantize.quantize(W, "nf4").codes), "bitsandbytes' layout"
    assert (ours - W).abs().mean() <= (theirs - W).abs().mean() * (1 + 1e-6)
    assert (ours - W).abs().max() <= (theirs - W).abs().max() * (1 + 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step(shape: tuple[int, int]) -> None:
    W = weight(shape)
    base = quantize.quantize(W, "int8")
    step = np.repeat(blocks_of(W).abs().amax(1).numpy() / 127, 64)[: W.numel()].reshape(shape)
    error = (quantize.dequantize(base) - W).abs().numpy()
    assert (error <= step * 0.5001).all()


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(["nf4", "int8", "none"]),
    st.lists(st.floats(-(2.0**66), 2.0**66, width=32), min_size=1, max_size=200),
)
def test_any_finite_weight_has_a_finite_base(quant: str, values: list[float]) -> None:
    W = torch.tensor([values])
    base = quantize.quantize(W, quant)
    back = quantize.dequantize(base)
    assert back.isfinite().all()
    assert back.shape == W.shape
    again = quantize.quantize(back, quant)
    if quant != "int8":  # a base is the fixed point of its format: from scratch W = deq(Q) costs nothing
        assert torch.equal(quantize.dequantize(again), back)


def test_codes_do_not_depend_on_threads() -> None:
    W = weight((300, 640))
    one = quantize.quantize(W, "nf4")
    torch.set_num_threads(2)
    try:
        two = quantize.quantize(W, "nf4")
        assert torch.equal(quantize.dequantize(two), quantize.dequantize(one))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scales, two.scales)


def test_digest_sees_every_bit_name_and_shape() -> None:
    x = torch.zeros(4)
    flipped = x.clone()
    flipped[2] = -0.0
    assert quantize.digest([("a", x)]) == quantize.digest([("a", x.clone())])
    others = [("b", x), ("a", x.view(2, 2)), ("a", flipped), ("a", x.to(torch.float64))]
    assert len({quantize.digest([other]) for other in [("a", x), *others]}) == 5
