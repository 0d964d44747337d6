"""The definition of blockwise quantization: every canonical rule, and its error against an integral."""

import math

import numpy as np
import pytest
import torch

from qlora_ref.reference.blockwise import BLOCK_SIZES, dequantize_blockwise, quantize_blockwise
from qlora_ref.reference.codebook import NAMES, get_codebook
from qlora_ref.reference.packing import unpack
from qlora_ref.testing.cases import DATA
from qlora_ref.testing.compare import assert_bits_equal
from qlora_ref.testing.quality import expected_error

NF4 = get_codebook("nf4")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def round_trip(x, book=NF4, block_size=64, dtype=torch.float32, **kw):
    packed, absmax = quantize_blockwise(x, book, block_size, **kw)
    return dequantize_blockwise(packed, absmax, book, block_size, x.shape, dtype)


def codes_of(x, book=NF4, block_size=64, **kw):
    return unpack(quantize_blockwise(x, book, block_size, **kw)[0], x.numel()).tolist()


@pytest.mark.parametrize("name", [n for n in NAMES if n != "bof4_s"])  # the integral is for unsigned absmax
@pytest.mark.parametrize("block_size", [32, 64, 512, 4096])
def test_error_is_the_integral(name, block_size):
    """STATISTICAL: mean |e| and mean e^2 of N(0,1) weights lie in the 5-sigma band of the exact expectation."""
    book = get_codebook(name, block_size)
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(block_size))
    e = (round_trip(x, book, block_size) - x).double()
    want = expected_error(torch.unique(book.levels), block_size)
    blocks = e.view(-1, block_size)  # errors within a block share its maximum: take the spread between blocks
    for got, expected in ((blocks.abs(), want.mae), (blocks.square(), want.mse)):
        means = got.mean(dim=1)
        standard_error = means.std().item() / math.sqrt(len(means))
        assert abs(means.mean().item() - expected) < 5 * standard_error


def test_signed_absmax_gains_what_it_should():
    """BOF4-S (absmax keeps its sign) beats BOF4 on the same weights, and its negative end is free."""
    x = torch.randn(2**19, generator=torch.Generator().manual_seed(0))
    error = {n: (round_trip(x, get_codebook(n)) - x).square().mean().item() for n in ("bof4_s", "bof4", "nf4")}
    assert error["bof4_s"] < error["bof4"] < error["nf4"]


@pytest.mark.parametrize("name", NAMES)
def test_the_block_maximum_is_exact(name):
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    y = round_trip(x, get_codebook(name))
    at = x.abs().argmax(dim=1, keepdim=True)
    assert_bits_equal(y.gather(1, at), x.gather(1, at))


def test_largest_possible_error():
    """No weight is off by more than half the widest gap of NF4 times its block's absmax."""
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(2))
    widest = (NF4.levels[1:] - NF4.levels[:-1]).max() / 2
    error = (round_trip(x) - x).abs() / x.abs().amax(dim=1, keepdim=True)
    assert error.max() <= widest + 2**-23


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizing_twice_changes_nothing(block_size, dtype):
    """Levels times absmax quantize to themselves: the result is a fixed point."""
    x = torch.randn(3 * block_size + 5, generator=torch.Generator().manual_seed(3)).to(dtype)
    once = round_trip(x, block_size=block_size)
    assert_bits_equal(round_trip(once, block_size=block_size), once)


def test_ragged_tail_follows_the_same_rule():
    """The last block alone quantizes like a full block that starts with the same numbers."""
    x = torch.randn(64 + 13, generator=torch.Generator().manual_seed(4))
    _, absmax = quantize_blockwise(x, NF4)
    alone, tail_absmax = quantize_blockwise(x[64:].clone(), NF4)
    assert_bits_equal(absmax[1:], tail_absmax)
    assert codes_of(x)[64:] == codes_of(x[64:].clone())


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (3, 5, 7), (2, 64), (65, 1)])
def test_any_shape(shape):
    x = torch.randn(shape)
    assert round_trip(x).shape == x.shape


def test_odd_count_is_padded_with_the_code_of_zero():
    packed, _ = quantize_blockwise(torch.ones(3), NF4)
    assert packed[-1] & 0xF == NF4.zero_code


@pytest.mark.parametrize("name", NAMES)
def test_zero_block(name):
    book = get_codebook(name)
    for tiny in (0.0, -0.0, 1e-39, -(2.0**-127)):
        x = torch.full((70,), tiny)
        packed, absmax = quantize_blockwise(x, book)
        assert torch.equal(absmax, torch.zeros(2)) and set(codes_of(x, book)) == {book.zero_code}
        assert_bits_equal(round_trip(x, book), torch.zeros(70))


def test_smallest_block_that_is_not_zero():
    x = torch.full((64,), 2.0**-126)
    assert_bits_equal(round_trip(x), x)


def test_negative_zero_becomes_zero():
    x = torch.ones(64)
    x[1] = -0.0
    assert_bits_equal(round_trip(x)[1], torch.tensor(0.0))


def codes_by_hand(x, rule):
    """The rule again, independently, in numpy float32: blocks of 32, one scalar operation at a time."""
    x, thresholds = x.numpy(), NF4.thresholds.numpy()
    absmax = np.abs(x.reshape(-1, 32)).max(1).repeat(32)
    s = x / absmax if rule == "divide" else x * (np.float32(1) / absmax)
    return (thresholds < s[:, None]).sum(1).tolist()


KNIFE_EDGES = [("knife_edge", "invert", "divide"), ("huge_knife_edge", "divide", "invert")]


@pytest.mark.parametrize("data,rule,other", KNIFE_EDGES)
def test_reciprocal_or_division(data, rule, other):
    """s = x * (1/absmax), but x / absmax above 2^126: on data where the two rules give different codes."""
    x = DATA[data](32 * 4000, torch.Generator().manual_seed(0))
    assert (x.abs().max() > 2.0**126) == (data == "huge_knife_edge")
    expected = codes_by_hand(x, rule)
    assert expected != codes_by_hand(x, other), "the data does not tell the two rules apart"
    assert codes_of(x, block_size=32) == expected


def test_bf16_codes_do_not_depend_on_the_division():
    """Every pair of bf16 significands, exponent gaps 0..6, both signs: division and a reciprocal two ulp off agree.

    Beyond a gap of 6 a ratio lies below every threshold in magnitude. So any backend gives the same NF4 codes.
    """
    significand = np.arange(128, 256, dtype=np.float32)
    absmax, x, gap = (a.ravel() for a in np.meshgrid(significand, significand, np.arange(7)))
    x = (x * 2.0 ** -gap.astype(np.float64)).astype(np.float32)
    keep = x <= absmax
    absmax, x = absmax[keep], x[keep]
    inverse = np.float32(1) / absmax
    off_by = lambda ulp: (inverse.view(np.int32) + np.int32(ulp)).view(np.float32)
    thresholds = NF4.thresholds.numpy()
    for signed in (x, -x):
        expected = np.searchsorted(thresholds, signed / absmax)
        for ulp in (-2, -1, 0, 1, 2):
            assert np.array_equal(np.searchsorted(thresholds, signed * off_by(ulp)), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_is_refused_or_poisons_its_block(bad):
    x = torch.randn(130)
    x[70] = bad
    with pytest.raises(ValueError, match="1 of 130 weights are NaN or Inf"):
        quantize_blockwise(x, NF4)
    y = round_trip(x, check_finite=False)
    assert set(codes_of(x, check_finite=False)[64:128]) == {0}  # nothing is strictly below NaN
    assert y[64:128].isnan().all() and y[:64].isfinite().all() and y[128:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.float64, torch.uint8])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match="can only quantize float32, bfloat16 or float16"):
        quantize_blockwise(torch.zeros(4).to(dtype), NF4)


@pytest.mark.parametrize("block_size", [0, 16, 48, 63, 8192, -64])
def test_bad_block_size(block_size):
    with pytest.raises(ValueError, match=f"power of two in 32..4096, not {block_size}"):
        quantize_blockwise(torch.zeros(4), NF4, block_size)


def test_plus_and_minus_maximum_with_signed_absmax():
    """If +m and -m are both there, the absmax is +m: independent of order."""
    x = torch.tensor([-2.0, 2.0, 0.5])
    for permuted in (x, x.flip(0)):
        assert quantize_blockwise(permuted, get_codebook("bof4_s"))[1].tolist() == [2.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_once(dtype):
    """round(level * absmax), not round(level) * round(absmax)."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(5))
    packed, absmax = quantize_blockwise(x, NF4)
    exact = NF4.levels[unpack(packed, 4096).long()] * absmax.repeat_interleave(64)
    assert_bits_equal(dequantize_blockwise(packed, absmax, NF4, 64, x.shape, dtype), exact.to(dtype))
    twice = NF4.levels.to(dtype)[unpack(packed, 4096).long()] * absmax.to(dtype).repeat_interleave(64)
    if dtype != torch.float32:
        assert not torch.equal(twice, exact.to(dtype)), "the test data does not tell the two rules apart"
