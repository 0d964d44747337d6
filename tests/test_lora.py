"""The adapter: where it starts, how it scales, and what merging keeps."""

import math

import pytest
import torch

from qlora_ref.nn import Linear4bit, LoRALinear
from qlora_ref.quantized import QuantConfig, QuantizedTensor
from qlora_ref.reference import lora


def test_training_starts_at_the_frozen_model():
    base = torch.nn.Linear(48, 20)
    x = torch.randn(3, 48)
    assert torch.equal(LoRALinear(base, 4, 8)(x), base(x))


def test_init_is_kaiming_uniform_with_a_sqrt5():
    A, B = lora.init_lora(64, 400, 10, torch.Generator().manual_seed(0))
    expected = torch.nn.init.kaiming_uniform_(
        torch.empty(64, 400), a=math.sqrt(5), generator=torch.Generator().manual_seed(0)
    )
    assert torch.allclose(A, expected, rtol=2**-22, atol=0) and not B.any()


def test_scaling():
    assert lora.scaling(16, 64) == 0.25
    assert lora.scaling(16, 64, rslora=True) == 2.0


def test_dropout_keeps_the_mean():
    x = torch.ones(100_000)
    y = lora.dropout(x, 0.3, torch.Generator().manual_seed(0))
    kept = (y != 0).float().mean().item()
    assert abs(kept - 0.7) < 5 * math.sqrt(0.21 / len(x)) and torch.allclose(y[y != 0], x[y != 0] / 0.7)


@pytest.mark.parametrize("quantized", [False, True])
def test_merge_is_what_the_layer_computes(quantized):
    torch.manual_seed(0)
    base = torch.nn.Linear(128, 40)
    layer = LoRALinear(Linear4bit.from_linear(base) if quantized else base, 8, 16)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 128)
    exact = x.double() @ layer.merge(torch.float32).weight.double().T + base.bias.double()
    merged = layer.merge(torch.float32)
    bound = 130 * 2.0**-24 * (x.abs().double() @ merged.weight.abs().double().T + base.bias.abs().double())
    adapter = 200 * 2.0**-24 * 2 * (x.abs() @ layer.lora_A.abs().T @ layer.lora_B.abs().T).double()
    assert torch.all((layer(x).double() - exact).abs() <= bound + adapter)


@pytest.mark.parametrize("relative,least,most", [(1e-2, 0.0, 0.05), (0.3, 0.9, 1.1)])
def test_merging_into_nf4_loses_a_small_delta(relative, least, most):
    """Every weight of W' sits on a level: what a small delta leaves after quantizing again is next to nothing."""
    g = torch.Generator().manual_seed(0)
    W = QuantizedTensor.quantize(torch.randn(512, 512, generator=g), QuantConfig(double_quant=False)).dequantize()
    A, B = torch.randn(16, 512, generator=g), torch.randn(512, 16, generator=g)
    delta = lora.delta_weight(A, B, 1.0)
    delta *= relative * W.norm() / delta.norm()
    again = QuantizedTensor.quantize(W + delta, QuantConfig(double_quant=False)).dequantize()
    kept = (((again - W) * delta).sum() / delta.square().sum()).item()
    assert least <= kept <= most


@pytest.mark.parametrize("kw,message", [(dict(rank=0), "rank must be at least 1"), (dict(dropout=1.0), r"in \[0, 1\)")])
def test_bad_arguments(kw, message):
    with pytest.raises(ValueError, match=message):
        LoRALinear(torch.nn.Linear(4, 4), **{"rank": 2, "alpha": 4, **kw})
