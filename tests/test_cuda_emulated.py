"""The CUDA kernels' own sources, run on the CPU through tests/cuda_emulator.h, against the reference.

This is not a GPU run: it shows that index arithmetic, tails, shuffles, fragment layouts and scalar semantics are right,
and nothing about races, the compiler's back end or speed. What needs a card is in tests/test_cuda_gpu.py.
"""

import ctypes

import pytest
import torch

from emulated_cuda import CXX, EmulatedBackend, as_tuple, launchers, run
from qlora_ref import ops
from qlora_ref.arguments import table_bytes
from qlora_ref.quantized import QuantConfig, QuantizedTensor
from qlora_ref.reference.codebook import NAMES, get_codebook
from qlora_ref.reference.double_quant import get_map8
from qlora_ref.testing.cases import EXACT, cases
from qlora_ref.testing.compare import ACCUMULATE_CPU, assert_bits_equal, assert_within_bound, bounds

pytestmark = pytest.mark.skipif(CXX is None, reason="g++ is not installed, so the kernels cannot be emulated")


@pytest.fixture(scope="module")
def emulated() -> EmulatedBackend:
    return EmulatedBackend(launchers())


@pytest.mark.parametrize("case", [c for c in cases() if c.parity == EXACT], ids=lambda c: c.id)
def test_exact(case, emulated, guarded_outputs):
    """Equal bits, and not a byte written outside the outputs."""
    with guarded_outputs():
        actual = as_tuple(run(emulated, case.op, case.arguments()))
    expected = as_tuple(ops._REFERENCE[case.op](*case.arguments()))
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_bits_equal(a, e, f"{case.id} output {i}")


# --- the linear layer for few tokens ---------------------------------------------------------------------------------


def _fits(case) -> bool:
    """What cuda_linear.py sends to the fused kernel rather than to dequantize + cuBLAS."""
    return case.params["m"] <= 32 and case.params["k"] % 8 == 0


@pytest.mark.parametrize("major", [7, 9], ids=["simt", "mma"])
@pytest.mark.parametrize("case", [c for c in cases("linear_4bit") if _fits(c)], ids=lambda c: c.id)
def test_linear(case, major, emulated, guarded_outputs):
    """Within the rounding bound of a float64 product of the same W', and at most twice torch's error."""
    emulated._c.set_device(major, 4)
    with guarded_outputs():
        actual = run(emulated, case.op, case.arguments())
    same_dtype = ops._REFERENCE[case.op](*case.arguments())
    ((name, value, bound),) = bounds(case.op, case.arguments(), ACCUMULATE_CPU)
    assert_within_bound(actual, same_dtype, value, bound, f"{case.id} {name}")


def linear_arguments(m, rows, cols, dtype, seed=0, bias=True, config=QuantConfig()):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, cols, generator=generator).to(dtype)
    weight = QuantizedTensor.quantize(torch.randn(rows, cols, generator=generator), config)
    return x, *weight.op_args(), rows, torch.randn(rows, generator=generator).to(dtype) if bias else None


# Each (rows, m, multiprocessors) that selects another instantiation: row tiles x token tiles x warps along the rows.
TILINGS = {
    (40, 5, 4): (1, 1, 1),
    (250, 8, 3): (2, 1, 1),
    (40, 9, 4): (1, 2, 1),
    (130, 12, 1): (2, 2, 4),
    (70, 17, 3): (2, 4, 1),
    (100, 32, 2): (2, 4, 2),
    (15, 31, 9): (1, 4, 1),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("choice", TILINGS, ids=str)
def test_every_tiling(choice, dtype, emulated, guarded_outputs):
    rows, m, multiprocessors = choice
    chosen = (ctypes.c_int * 3)()
    emulated._c.tiling(rows, m, multiprocessors, chosen)
    assert tuple(chosen) == TILINGS[choice], "the heuristic moved: this list should reach every instantiation"
    emulated._c.set_device(9, multiprocessors)
    arguments = linear_arguments(m, rows, 1056, dtype)  # 1056 = 8 steps of 128 and one lane group more
    with guarded_outputs():
        actual = run(emulated, "linear_4bit", arguments)
    ((_, value, bound),) = bounds("linear_4bit", arguments, ACCUMULATE_CPU)
    assert_within_bound(actual, ops._REFERENCE["linear_4bit"](*arguments), value, bound, f"{choice}")


@pytest.mark.parametrize("major", [7, 9], ids=["simt", "mma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_one_weight_whatever_the_batch(dtype, major, emulated):
    """x = rows of the identity read W' out: the fused kernel's weight has the very bits of dequantize, for every m."""
    emulated._c.set_device(major, 4)
    arguments = linear_arguments(1, 24, 96, dtype, bias=False)
    weight = ops._REFERENCE["dequantize_4bit"](*arguments[1:9], (24, 96), dtype)
    for m in (1, 8, 32):
        x = torch.eye(96, dtype=dtype)[:m]
        read_out = run(emulated, "linear_4bit", (x, *arguments[1:]))
        assert_bits_equal(read_out.T.contiguous(), weight[:, :m].contiguous(), f"m={m}")


# --- index arithmetic beyond 2^31 ------------------------------------------------------------------------------------


def test_positions_beyond_two_to_the_31(emulated):
    """Strided output positions and the division in them against Python's integers."""
    for n in (0, 1, 2**31 - 1, 2**31, 2**62, 2**63 - 1):
        for divisor in (1, 2, 3, 64, 4096, 14336, 2**31 - 1, 2**40 + 1):
            for near in (n, n - n % divisor, n - n % divisor - 1):
                if near >= 0:
                    assert emulated._c.divide(near, divisor) == near // divisor, (near, divisor)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        i = int(torch.randint(2**44, (), generator=generator))
        cols = int(torch.randint(1, 2 ** int(torch.randint(1, 20, (), generator=generator)), (), generator=generator))
        stride = cols + int(torch.randint(4096, (), generator=generator))
        expected = i // cols * stride + i % cols
        assert emulated._c.position(i, cols, stride) == expected
        assert emulated._c.divide(i, cols) == i // cols
        start = i - i % 1024
        row, col = divmod(start, cols)
        assert emulated._c.position_in_tile(row, col, i - start, cols, stride) == expected


def test_output_rows_with_a_stride(emulated):
    """The scratch of cuda_linear.py: W' in the left columns of a wider matrix, the rest untouched."""
    shapes = (70, 96, 64, torch.bfloat16), (33, 129, 7, torch.float16), (9, 72, 4, torch.float32)
    for rows, cols, extra, dtype in shapes:
        arguments = linear_arguments(1, rows, cols, dtype, bias=False)[1:9]
        expected = ops._REFERENCE["dequantize_4bit"](*arguments, (rows, cols), dtype)
        wide = torch.full((rows, cols + extra), 7.0, dtype=dtype)
        tables = (*arguments[:4], get_codebook("nf4", 64), 64, get_map8("dynamic"), 256)
        emulated.dequantize_4bit(*tables, (rows, cols), dtype, out=wide[:, :cols])
        assert_bits_equal(wide[:, :cols].contiguous(), expected, f"{rows}x{cols}")
        assert (wide[:, cols:] == 7).all()


def test_a_signed_absmax_has_no_second_level(emulated):
    arguments = torch.randn(64), torch.ones(1), get_codebook("bof4_s", 64), 64, get_map8("dynamic"), 256
    with pytest.raises(ValueError, match="bof4_s keeps the sign"):
        emulated.quantize_4bit_nested(*arguments)


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8])
def test_misaligned_storage(offset, emulated):
    """Slices of a checkpoint need not be aligned for vector loads: slower, but the same bits."""
    x, packed, absmax, *_ = linear_arguments(1, 40, 64, torch.bfloat16, config=QuantConfig(double_quant=False))
    shifted = torch.empty(packed.numel() + offset, dtype=torch.uint8)[offset:]
    shifted.copy_(packed)
    arguments = (shifted, absmax, None, None, get_codebook("nf4", 64), 64, None, 256, (40, 64))
    for dtype in (torch.bfloat16, torch.float32):
        expected = ops._REFERENCE["dequantize_4bit"](
            packed, absmax, None, None, "nf4", 64, "dynamic", 256, (40, 64), dtype
        )
        assert_bits_equal(emulated.dequantize_4bit(*arguments, dtype), expected, f"offset {offset}")
        out = torch.empty(40 * 64 + offset, dtype=dtype)[offset:].view(40, 64)
        aligned_codes = (packed, *arguments[1:])
        assert_bits_equal(emulated.dequantize_4bit(*aligned_codes, dtype, out=out), expected, f"out, offset {offset}")


@pytest.mark.parametrize("name", NAMES)
def test_bin_table_or_search(name, emulated):
    """One threshold a bin, except in fp4_e3m0 (three between 0 and 1/16): that type takes the search."""
    assert emulated._c.bins_usable(table_bytes(get_codebook(name, 64))) == (name != "fp4_e3m0")
