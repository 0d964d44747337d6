"""Codes against bitsandbytes 0.50.2 on its CPU path: the peer's bytes, reproduced, and where they differ, why."""

import warnings

import pytest
import torch

from qlora_ref.quantized import QuantConfig, QuantizedTensor
from qlora_ref.reference.double_quant import double_dequantize, get_map8
from qlora_ref.testing.compare import assert_bits_equal

pytestmark = pytest.mark.bnb
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed ([test] extra)")

FLAT = QuantConfig(double_quant=False)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N = 10_485_760  # per dtype: more than 10^7, a multiple of every block size


def theirs(x, quant_type="nf4", block_size=64, nested=False):
    return functional.quantize_4bit(x, blocksize=block_size, quant_type=quant_type, compress_statistics=nested)


def weights(n, dtype, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_million_codes_are_byte_equal(dtype):
    """Full blocks: zero differing bytes of `packed`, zero differing bits of absmax."""
    x = weights(N, dtype)
    packed, state = theirs(x)
    mine = QuantizedTensor.quantize(x, FLAT)
    assert_bits_equal(mine.packed, packed.view(-1), "packed")
    assert_bits_equal(mine.absmax, state.absmax, "absmax")


@pytest.mark.parametrize("block_size", [32, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_block_size(block_size, dtype):
    x = weights(2**18, dtype, seed=block_size)
    packed, state = theirs(x, block_size=block_size)
    mine = QuantizedTensor.quantize(x, QuantConfig(block_size=block_size, double_quant=False))
    assert_bits_equal(mine.packed, packed.view(-1), "packed")
    assert_bits_equal(mine.absmax, state.absmax, "absmax")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ragged_tail(dtype):
    """In 16 bits the tail agrees too. (fp32: bitsandbytes divides there, we do not: about 4 codes in 10^8 differ.)"""
    x = weights(64 * 100 + 37, dtype)
    packed, state = theirs(x)
    mine = QuantizedTensor.quantize(x, FLAT)
    assert_bits_equal(mine.packed, packed.view(-1), "packed")
    assert_bits_equal(mine.absmax, state.absmax, "absmax")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantized_values(dtype):
    """Rows of whole blocks only: their AVX-512 kernel is wrong elsewhere (next test)."""
    x = weights(512 * 1024, dtype).view(512, 1024)
    packed, state = theirs(x)
    mine = QuantizedTensor.quantize(x, FLAT)
    assert_bits_equal(mine.dequantize(), functional.dequantize_4bit(packed, state).view_as(x))


def test_rows_that_blocks_straddle_decode_right_here():
    """(64, 80) at block 32: bitsandbytes 0.50.2's AVX-512 kernel indexes the absmax by row and errs without a word.

    The truth is the same bytes decoded as one long row, where it is right.
    """
    x = weights(64 * 80, torch.float32).view(64, 80)
    packed, state = theirs(x.flatten(), block_size=32)
    mine = QuantizedTensor.quantize(x, QuantConfig(block_size=32, double_quant=False))
    assert_bits_equal(mine.packed, packed.view(-1), "packed")
    assert_bits_equal(mine.dequantize(), functional.dequantize_4bit(packed, state).view_as(x))


def test_reading_their_double_quantization_is_bit_exact():
    """Their bytes (codes chosen by a coarse table) through our decoder give their absmax."""
    x = weights(64 * 256 * 20, torch.float32)
    _, state = theirs(x, nested=True)
    nested = state.state2
    offset = state.offset.reshape(1)
    mine = double_dequantize(state.absmax, nested.absmax, offset, get_map8(), nested.blocksize)
    assert_bits_equal(mine, functional.dequantize_blockwise(state.absmax, nested) + state.offset)


def test_their_double_quantization_codes_are_not_always_nearest():
    """The difference that is expected: theirs come from a 65,536-bin table, ours are the nearest entry."""
    x = weights(N, torch.float32)
    _, state = theirs(x, nested=True)
    mine = QuantizedTensor.quantize(x)
    differ = (mine.absmax != state.absmax).float().mean().item()
    exact = QuantizedTensor.quantize(x, FLAT).absmax
    theirs_error = (functional.dequantize_blockwise(state.absmax, state.state2) + state.offset - exact).square().mean()
    assert differ < 0.01 and (mine.absmax_f32() - exact).square().mean() <= theirs_error


@pytest.mark.parametrize("value", [0.0, 1e-39])
def test_zero_blocks(value):
    """A zero block has the same bytes; a subnormal one is a zero block here and shrinks gradually there."""
    x = torch.full((64,), value)
    packed, state = theirs(x)
    mine = QuantizedTensor.quantize(x, FLAT)
    assert mine.packed.unique().tolist() == [0x77] and mine.absmax.tolist() == [0.0]
    assert torch.equal(mine.packed, packed.view(-1)) == (value == 0.0)
