"""QuantConfig and QuantizedTensor: what is accepted, what is stored, what comes back."""

import copy
import pickle

import pytest
import torch

from qlora_ref import ops
from qlora_ref.quantized import QuantConfig, QuantizedTensor
from qlora_ref.testing.compare import assert_bits_equal


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5, 2), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_come_back(shape, dtype, double_quant):
    x = torch.randn(shape).to(dtype)
    q = QuantizedTensor.quantize(x, QuantConfig(double_quant=double_quant))
    y = q.dequantize()
    assert y.shape == x.shape and y.dtype == dtype and q.dequantize(torch.float32).dtype == torch.float32


def test_non_contiguous_equals_contiguous():
    x = torch.randn(64, 130).T
    a, b = QuantizedTensor.quantize(x), QuantizedTensor.quantize(x.contiguous())
    assert_bits_equal(a.packed, b.packed)
    assert_bits_equal(a.dequantize(), b.dequantize())


def test_codes_come_from_the_exact_absmax():
    """Double quantization changes how codes are decoded, never the codes."""
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    nested, flat = QuantizedTensor.quantize(x), QuantizedTensor.quantize(x, QuantConfig(double_quant=False))
    assert_bits_equal(nested.packed, flat.packed)
    assert not torch.equal(nested.absmax_f32(), flat.absmax)


@pytest.mark.parametrize(
    "make,error,message",
    [
        (lambda: QuantConfig(block_size=48), ValueError, "power of two in 32..4096, not 48"),
        (lambda: QuantConfig("nf8"), ValueError, "unknown 4-bit data type 'nf8'"),
        (lambda: QuantConfig(nested_block_size=100), ValueError, "not 100"),
        (lambda: QuantizedTensor.quantize(torch.arange(4)), TypeError, "not torch.int64"),
        (lambda: QuantizedTensor.quantize(torch.full((4,), float("inf"))), ValueError, "4 of 4 weights are NaN or Inf"),
    ],
)
def test_bad_input_is_a_sentence(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- out= ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dequantize_into_out(dtype, double_quant):
    q = QuantizedTensor.quantize(torch.randn(70, 130), QuantConfig(double_quant=double_quant))
    expected = q.dequantize(dtype)
    out = torch.full((70, 130), -1.0, dtype=dtype)
    assert q.dequantize(out=out) is out
    assert_bits_equal(out, expected)
    wide = torch.full((70, 140), -1.0, dtype=dtype)
    q.dequantize(dtype, out=wide[:, 5:135])
    assert_bits_equal(wide[:, 5:135].contiguous(), expected)
    assert (wide[:, :5] == -1).all() and (wide[:, 135:] == -1).all()


@pytest.mark.parametrize("double_quant", [True, False])
def test_dequantize_into_out_follows_its_tensors(double_quant):
    """Changed in place, moved, copied, pickled: what was looked up at the first call must not outlive them."""
    q = QuantizedTensor.quantize(torch.randn(8, 96), QuantConfig(block_size=32, double_quant=double_quant))
    out = torch.empty(8, 96)
    for change in (
        lambda: None,
        lambda: q.packed.bitwise_not_(),
        lambda: q.packed.set_(q.packed.flip(0)),
        lambda: q.absmax.set_(q.absmax.flip(0)),
        lambda: q.nested_absmax.mul_(2) if double_quant else q.absmax.mul_(2),
        lambda: q.absmax_mean.set_(q.absmax_mean + 1) if double_quant else None,
    ):
        change()
        version = out._version
        for each in (q, copy.copy(q), copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
            assert_bits_equal(each.dequantize(out=out.zero_()), each.dequantize())
        assert out._version == version + 8
    q.packed.set_(q.packed[:-1].clone())
    with pytest.raises(ValueError, match="elements"):
        q.dequantize(out=out)


def test_dequantize_into_out_and_autograd():
    q = QuantizedTensor.quantize(torch.randn(8, 64))
    parameter = torch.nn.Parameter(torch.zeros(8, 64))
    with pytest.raises(ValueError, match="requires grad"):
        q.dequantize(out=parameter)
    with torch.no_grad():
        q.dequantize(out=parameter)
    assert_bits_equal(parameter.detach(), q.dequantize())
    saved = torch.ones(8, 64)
    loss = (parameter * saved).sum()
    q.dequantize(out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        assert_bits_equal(q.dequantize(out=torch.empty(8, 64)), q.dequantize())


@pytest.mark.parametrize(
    "out,dtype,error,message",
    [
        (torch.empty(4, 63), None, ValueError, r"out is \(4, 63\) .*; it must be \(4, 64\)"),
        (torch.empty(4, 64), torch.float16, ValueError, "must be .* torch.float16 on cpu"),
        (torch.empty(4, 64, dtype=torch.int32), None, TypeError, "can dequantize to float32.*not torch.int32"),
        (torch.empty(64, 4).T, None, ValueError, "out must be contiguous, or 2-D with contiguous rows"),
        (torch.empty(4, 64, device="meta"), None, ValueError, "out is .* on meta; it must be .* on cpu"),
    ],
)
def test_bad_out_is_a_sentence(out, dtype, error, message):
    q = QuantizedTensor.quantize(torch.randn(4, 64))
    with pytest.raises(error, match=message):
        q.dequantize(dtype, out)
    if dtype is None and out.shape == q.shape:
        with pytest.raises(error, match=message):  # the reference says the same
            ops._dequantize_4bit_out(*q.op_args(), out)


def test_out_on_meta_and_in_a_compiled_function():
    meta = QuantizedTensor.quantize(torch.randn(4, 64, device="meta"))
    assert meta.dequantize(out=torch.empty(4, 64, device="meta")).device.type == "meta"
    q, out = QuantizedTensor.quantize(torch.randn(4, 64)), torch.zeros(4, 64)
    torch.library.opcheck(torch.ops.qlora_ref.dequantize_4bit_out.default, (*q.op_args(), out))

    def decode(out):
        torch.ops.qlora_ref.dequantize_4bit_out(*q.op_args(), out)
        return out + 1

    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
    assert_bits_equal(compiled(out), q.dequantize() + 1)
    assert_bits_equal(out, q.dequantize())


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_in_large_pages_has_the_same_bits(double_quant):
    """From 4 MB of codes on the memory is asked for in pages of 2 MB (cpu_backend.py): cut in two, it is below that."""
    config = QuantConfig(double_quant=double_quant)
    x = torch.randn(2, 2048 * 4096 // 2, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    whole = QuantizedTensor.quantize(x, config)
    halves = [QuantizedTensor.quantize(half, config, absmax_mean=whole.absmax_mean) for half in x]
    assert whole.packed.numel() == 4 * 2**20
    assert_bits_equal(whole.packed, torch.cat([half.packed for half in halves]))
    assert_bits_equal(whole.dequantize(), torch.stack([half.dequantize() for half in halves]))
