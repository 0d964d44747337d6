"""QuantConfig and QuantizedTensor: what is accepted, what is stored, what comes back."""

import pytest
import torch

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
