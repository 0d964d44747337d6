"""The CPU kernels on every variant this machine has, at the edges: every variant gives the bits of the reference.

test_parity.py runs all cases on the fastest variant; here each variant is forced, on fewer and nastier inputs.
"""

import dataclasses
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from conftest import run_python
from qlora_ref import native
from qlora_ref.reference.blockwise import BLOCK_SIZES, dequantize_blockwise, quantize_blockwise
from qlora_ref.reference.codebook import NAMES, get_codebook
from qlora_ref.reference.double_quant import absmax_mean, double_dequantize, double_quantize, get_map8
from qlora_ref.testing.cases import DATA
from qlora_ref.testing.compare import UNIT, assert_bits_equal, gamma

pytestmark = pytest.mark.skipif(native.cpu is None, reason=f"no native CPU: {native.missing['cpu']}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = native.cpu_variants()


@pytest.fixture(params=VARIANTS)
def variant(request):
    before = native.module.cpu.variant()
    native.set_cpu_variant(request.param)
    yield request.param
    native.set_cpu_variant(before)


def make(data: str, n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    x = DATA[data](n, torch.Generator().manual_seed(seed))
    return (x * 2.0**-111 if dtype == torch.float16 and data == "huge" else x).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("data", DATA)
def test_quantize_and_back_equals_the_reference(variant, data, dtype):
    x = make(data, 64 * 40 + 45, dtype)
    for name in ("nf4", "fp4_bnb", "fp4_e3m0", "bof4_s"):  # bins; another code order; bisection; signed absmax
        codebook = get_codebook(name)
        packed, absmax = native.cpu.quantize_4bit(x, codebook, 64)
        want_packed, want_absmax = quantize_blockwise(x, codebook, 64, check_finite=False)
        assert_bits_equal(packed, want_packed, f"{variant} {name} packed")
        assert_bits_equal(absmax, want_absmax, f"{variant} {name} absmax")
        for out in DTYPES:
            got = native.cpu.dequantize_4bit(packed, absmax, None, None, codebook, 64, None, 256, x.shape, out)
            assert_bits_equal(got, dequantize_blockwise(packed, absmax, codebook, 64, x.shape, out), f"{variant} {out}")


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_block_size_and_odd_rows(variant, block_size, dtype):
    """Rows of odd length: blocks straddle rows, rows start inside bytes; `out` has a row stride."""
    shape, codebook, map8 = (7, 2049), get_codebook("nf4", block_size), get_map8()
    x = make("normal", 7 * 2049, dtype).view(shape)
    packed, absmax = native.cpu.quantize_4bit(x, codebook, block_size)
    assert_bits_equal(packed, quantize_blockwise(x, codebook, block_size)[0], "packed")
    mean = absmax_mean(absmax)
    codes, nested = double_quantize(absmax, mean, map8, 32)
    decoded = double_dequantize(codes, nested, mean, map8, 32)
    for out_dtype in DTYPES:
        wide = torch.full((7, 2100), -1.0, dtype=out_dtype)
        native.cpu.dequantize_4bit(
            *(packed, codes, nested, mean, codebook, block_size, map8, 32, shape, out_dtype), out=wide[:, :2049]
        )
        want = dequantize_blockwise(packed, decoded, codebook, block_size, shape, out_dtype)
        assert_bits_equal(wide[:, :2049], want, f"{variant} {out_dtype}")
        assert (wide[:, 2049:] == -1).all()


@pytest.mark.parametrize("map8", ["dynamic", "fp8_e4m3"])
@pytest.mark.parametrize("data", DATA)
def test_double_quantization_equals_the_reference(variant, data, map8):
    absmax, table = make(data, 2000 + 13, torch.float32).abs(), get_map8(map8)
    mean = absmax_mean(absmax)
    for size in (32, 256, 4096):
        codes, nested = native.cpu.double_quantize(absmax, mean, table, size)
        want_codes, want_nested = double_quantize(absmax, mean, table, size)
        assert_bits_equal(codes, want_codes, f"{variant} codes")
        assert_bits_equal(nested, want_nested, f"{variant} nested_absmax")
        got = native.cpu.double_dequantize(codes, nested, mean, table, size)
        assert_bits_equal(got, double_dequantize(codes, nested, mean, table, size), f"{variant} absmax'")


@pytest.mark.parametrize("map8", ["dynamic", "fp8_e4m3"])
def test_double_quantization_at_every_threshold(variant, map8):
    """s on a threshold and on either side of it: groups with a largest deviation of 1 from a mean of 0."""
    table, mean = get_map8(map8), torch.zeros(1)
    on = table.thresholds[table.thresholds.isfinite()]
    up, down = torch.full_like(on, 2.0), torch.full_like(on, -2.0)
    values = torch.cat([on, torch.nextafter(on, up), torch.nextafter(on, down), torch.tensor([0.0, -0.0, 1.0, -1.0])])
    for size in (32, 256):
        absmax = torch.cat([torch.cat([part, torch.ones(1)]) for part in values.split(size - 1)])
        codes, nested = native.cpu.double_quantize(absmax, mean, table, size)
        want_codes, want_nested = double_quantize(absmax, mean, table, size)
        assert_bits_equal(nested, want_nested, f"{variant} nested_absmax")
        assert_bits_equal(codes, want_codes, f"{variant} codes")


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_dequantize_of_any_absmax(variant, block_size):
    """Inf, NaN, subnormal, negative, and both sides of where a variant changes its way to round."""
    powers = [2.0**e * (1 + d) for e in (-149, -127, -126, -101, -100, -99, 127) for d in (-(2.0**-24), 0, 2.0**-20)]
    absmax = torch.tensor([math.inf, math.nan, 0.0, 3.0e38, 1e-45, *powers], dtype=torch.float32)
    absmax = torch.cat([absmax, -absmax])
    nf4 = get_codebook("nf4")
    tiny = dataclasses.replace(nf4, levels=nf4.levels * torch.tensor([2.0**-27, 1.0]).repeat(8))
    packed = torch.randint(256, (absmax.numel() * block_size // 2,), dtype=torch.uint8)
    for codebook in (nf4, tiny):
        for dtype in DTYPES:
            n = absmax.numel() * block_size
            got = native.cpu.dequantize_4bit(packed, absmax, None, None, codebook, block_size, None, 256, (n,), dtype)
            want = dequantize_blockwise(packed, absmax, codebook, block_size, (n,), dtype)
            assert_bits_equal(got, want, f"{variant} {dtype}")


def test_mean_of_the_absmax(variant):
    """The reference's bits, and a plain "not certain" where the order of adding could change them."""

    def mean_of(absmax):
        """Of blocks of 32 with this absmax; and whether the kernel was certain."""
        x, nf4 = absmax.repeat_interleave(32), get_codebook("nf4")
        want = quantize_blockwise(x, nf4, 32, check_finite=False)[1]
        mean = native.cpu.quantize_4bit_double(x, nf4, 32, get_map8())[3]
        assert_bits_equal(mean, absmax_mean(want), f"{variant} {len(absmax)}")
        _, got, *_, certain = native.cpu._quantize_4bit_double(x, nf4, 32, get_map8(), 256)
        assert_bits_equal(got, want, f"{variant} absmax")
        return certain

    generator, certain = torch.Generator().manual_seed(0), 0
    for n in (1, 2, 31, 33, 1000, 40_003):
        for spread in (0, 4, 30):
            certain += mean_of(torch.rand(n, generator=generator) * 10 ** (spread * torch.rand(n, generator=generator)))
    assert certain >= 16  # of 18
    assert not mean_of(torch.tensor([1.0, 1.0 + 2.0**-23]))  # halfway between two floats
    assert not mean_of(torch.tensor([1.0, math.nan]))
    for dtype in DTYPES:
        assert not mean_of(torch.empty(0, dtype=dtype))
    for dtype in (torch.bfloat16, torch.float16):  # few bits, so every sum is exact; the mean halfway again
        assert mean_of(torch.tensor([2.0**15, 2.0**-9]).to(dtype))
        assert mean_of(torch.tensor([2.0**-7, 2.0**-14, *[1.5] * 1022]).to(dtype))  # numbers of like size
    assert not mean_of(torch.tensor([2.0**15, 2.0**-9, 2.0**-100, 0.0]).to(torch.bfloat16))
    assert not mean_of(torch.tensor([2.0**-7, 2.0**-14, *[1.5] * 1022]))  # float32 could have more bits
    x = torch.tensor([-1.0]).repeat(32)  # bof4_s keeps the sign of the absmax
    assert not native.cpu._quantize_4bit_double(x, get_codebook("bof4_s", 32), 32, get_map8(), 256)[-1]
    with pytest.raises(ValueError, match="keeps the sign"):
        native.cpu.quantize_4bit_double(x, get_codebook("bof4_s", 32), 32, get_map8())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [(1, 128, 64), (5, 64, 64), (9, 256, 128), (6, 4352, 64), (8, 96, 32), (3, 33, 64)], ids=str
)
def test_linear_within_its_bound(variant, dtype, case):
    """Few tokens (kernel) and many (panels), rows that are no multiple of four, shapes the kernel does not take."""
    (rows, cols, block_size), codebook, map8 = case, get_codebook("nf4"), get_map8()
    shape = rows, cols
    W = make("normal", rows * cols, dtype).view(shape)
    packed, absmax = native.cpu.quantize_4bit(W, codebook, block_size)
    mean = absmax_mean(absmax)
    codes, nested = double_quantize(absmax, mean, map8, 32)
    for nesting in (True, False):
        stats = (codes, nested, mean) if nesting else (absmax, None, None)
        weight = (packed, *stats, codebook, block_size, map8, 32)
        exact = native.cpu.dequantize_4bit(*weight, shape, dtype).double()
        bias = make("normal", rows, dtype, seed=1)
        for m in (1, 2, 3, 4, 5, 13, 140):
            x = make("normal", m * cols, dtype, seed=m).view(m, cols)
            y = native.cpu.linear_4bit_forward(x, *weight, rows, bias)
            check(y, x.double() @ exact.T + bias.double(), x.double().abs() @ exact.T.abs() + bias.double().abs(), cols)
            dy = make("normal", m * rows, dtype, seed=m).view(m, rows)
            dx = native.cpu.linear_4bit_backward(dy, *weight, cols)
            check(dx, dy.double() @ exact, dy.double().abs() @ exact.abs(), rows)


def check(actual, value, magnitude, k):
    """The rounding bound of a float32 sum of k + 1 terms, then at most two roundings (torch may round before bias)."""
    bound = gamma(k + 1, 2.0**-24) * magnitude + 2 * UNIT[actual.dtype] * (value.abs() + magnitude * 2.0**-20)
    error = (actual.double() - value).abs()
    assert (error <= bound).all(), f"{(error / bound).max().item():.3g} times the rounding bound"


@pytest.mark.parametrize("name", NAMES)
def test_linear_kernel_sees_the_same_weight_as_dequantize(variant, name):
    """One token with a single 1: y is a column of W', bit for bit, whatever path computes it."""
    codebook, cols = get_codebook(name), 192
    W = make("outlier", 8 * cols, torch.bfloat16).view(8, cols)
    packed, absmax = native.cpu.quantize_4bit(W, codebook, 64)
    for dtype in DTYPES:
        weight = (packed, absmax, None, None, codebook, 64, None, 256)
        want = native.cpu.dequantize_4bit(*weight, (8, cols), dtype)
        for tokens in (torch.eye(cols), torch.eye(cols)[60:70], torch.eye(cols)[:1]):
            y = native.cpu.linear_4bit_forward(tokens.to(dtype), *weight, 8, None)
            assert_bits_equal(y, (tokens.to(dtype) @ want.T), f"{variant} {name} {dtype} {len(tokens)} tokens")


@pytest.mark.parametrize("cols", [192, 320, 256])
def test_linear_kernel_crosses_nested_groups_where_dequantize_does(variant, cols):
    """With an odd number of blocks a row, two blocks that are decoded at once can lie in two nested groups."""
    codebook, map8, rows = get_codebook("nf4"), get_map8(), 40
    W = make("outlier", rows * cols, torch.bfloat16).view(rows, cols)
    W *= torch.logspace(-2, 2, rows)[:, None]  # nested groups of very different scale
    packed, absmax = native.cpu.quantize_4bit(W, codebook, 64)
    mean = absmax_mean(absmax)
    weight = (packed, *double_quantize(absmax, mean, map8, 32), mean, codebook, 64, map8, 32)
    for dtype in DTYPES:
        want = native.cpu.dequantize_4bit(*weight, (rows, cols), dtype)
        for tokens in (torch.eye(cols), *torch.eye(cols).split(3)):
            y = native.cpu.linear_4bit_forward(tokens.to(dtype), *weight, rows, None)
            assert_bits_equal(y, tokens.to(dtype) @ want.T, f"{variant} {dtype} {len(tokens)} tokens")


def test_unaligned_and_non_contiguous(variant):
    codebook = get_codebook("nf4")
    storage = torch.randn(70000)
    for x in (storage[1:50001], storage[:60000].view(200, 300).T, storage[::3]):
        packed, absmax = native.cpu.quantize_4bit(x, codebook, 64)
        want_packed, want_absmax = quantize_blockwise(x, codebook, 64)
        assert_bits_equal(packed, want_packed, variant)
        shifted = torch.cat([packed[:1], packed])[1:]  # packed bytes at an odd address
        got = native.cpu.dequantize_4bit(shifted, absmax, None, None, codebook, 64, None, 256, x.shape, torch.bfloat16)
        assert_bits_equal(
            got, dequantize_blockwise(packed, want_absmax, codebook, 64, x.shape, torch.bfloat16), variant
        )


def test_threads_give_the_same_bits(variant):
    codebook, x, before = get_codebook("nf4"), torch.randn(500_003), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            packed, absmax = native.cpu.quantize_4bit(x, codebook, 64)
            results.append((packed, absmax))
    finally:
        torch.set_num_threads(before)
    for packed, absmax in results[1:]:
        assert_bits_equal(packed, results[0][0], variant)
        assert_bits_equal(absmax, results[0][1], variant)


def test_no_variant_runs_anything_when_the_module_is_loaded():
    """A static initializer of a file compiled for AVX-512 would end the import on every CPU without it."""
    root = Path(__file__).resolve().parents[1]
    objects = sorted((root / "build").rglob("variant_avx*.o"))
    sources = {path: root / "src" / "cpp" / path.stem for path in objects}  # x.cpp.o -> x.cpp
    objects = [o for o in objects if sources[o].exists() and o.stat().st_mtime > sources[o].stat().st_mtime]
    if not objects or not shutil.which("nm"):
        pytest.skip("no object files of the variants, or no nm, here")
    for path in objects:
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        assert "_GLOBAL__sub_I" not in symbols, path.name


def test_unknown_variant_lists_those_available():
    with pytest.raises(ValueError, match="no CPU variant 'mmx' here.*scalar"):
        native.set_cpu_variant("mmx")
    result = run_python("import qlora_ref.native", QLORA_CPU_VARIANT="mmx")
    assert result.returncode != 0
    assert "no CPU variant 'mmx' here: this build on this CPU has scalar" in result.stderr


def test_variant_is_forced_by_the_environment():
    code = "from qlora_ref import native; print(native.module.cpu.variant())"
    assert run_python(code, QLORA_CPU_VARIANT="scalar").stdout.strip() == "scalar"
    assert run_python(code, QLORA_CPU_VARIANT="").stdout.strip() == VARIANTS[-1]


def test_reference_can_be_forced():
    code = "from qlora_ref import native; print(native.cpu, native.missing['cpu'])"
    assert run_python(code, QLORA_BACKEND="reference").stdout.startswith("None QLORA_BACKEND=reference asks")


def valid():
    codebook = get_codebook("nf4")
    packed, absmax = quantize_blockwise(torch.randn(4, 64), codebook, 64)
    return packed, absmax, codebook


def test_bad_input_is_refused_in_a_sentence():
    packed, absmax, codebook = valid()
    cpu, x = native.cpu, torch.randn(2, 64)
    linear, decode = cpu.linear_4bit_forward, cpu.dequantize_4bit
    weight = (packed, absmax, None, None, codebook, 64, None, 256)
    short = (packed[:-1], *weight[1:])
    cases = [
        (TypeError, "must be float32, bfloat16 or float16", lambda: cpu.quantize_4bit(torch.arange(8), codebook, 64)),
        (ValueError, "power of two in 32..4096, not 63", lambda: cpu.quantize_4bit(x, codebook, 63)),
        (ValueError, "packed has 127 elements where 128 are", lambda: cpu.dequantize_4bit(*short, (4, 64))),
        (TypeError, "can dequantize to", lambda: cpu.dequantize_4bit(*weight, (4, 64), torch.int32)),
        (ValueError, "out is", lambda: cpu.dequantize_4bit(*weight, (4, 64), out=torch.empty(4, 63))),
        (ValueError, "out must be contiguous", lambda: cpu.dequantize_4bit(*weight, (4, 64), out=torch.empty(64, 4).T)),
        (TypeError, "absmax must be torch.float32", lambda: linear(x, packed, absmax.half(), *weight[2:], 4)),
        (ValueError, "bias has 3 elements", lambda: cpu.linear_4bit_forward(x, *weight, 4, torch.zeros(3))),
        (TypeError, "bias must be", lambda: cpu.linear_4bit_forward(x, *weight, 4, torch.zeros(4).half())),
        (ValueError, "map8 and absmax_mean must be", lambda: decode(packed, absmax, absmax, *weight[3:], (4, 64))),
        (ValueError, "on meta", lambda: cpu.quantize_4bit(torch.empty(4, device="meta"), codebook, 64)),
    ]  # fmt: skip
    for error, sentence, call in cases:
        with pytest.raises(error, match=sentence):
            call()
