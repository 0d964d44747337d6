"""The modules: storage that survives casts and checkpoints, models rebuilt in place, true parameter counts."""

import copy

import pytest
import torch
from torch import nn

from qlora_ref.nn import Linear4bit, LoRALinear, attach_lora, count_parameters, quantize_model
from qlora_ref.quantized import QuantConfig
from qlora_ref.testing.compare import assert_bits_equal

CONFIGS = [QuantConfig(), QuantConfig(double_quant=False), QuantConfig("fp4_e2m1", 32), QuantConfig("nf4", 4096)]


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.Sequential(nn.Linear(128, 10)))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", [(64, 32), (33, 7), (129, 5), (100, 64)])
def test_state_dict_round_trip(config, shape):
    layer = Linear4bit.from_linear(nn.Linear(*shape), config)
    other = Linear4bit(*shape, config=config)
    other.load_state_dict(layer.state_dict())
    assert_bits_equal(other.dequantize(), layer.dequantize())
    assert_bits_equal(other.bias, layer.bias)


def test_everything_frozen_is_bytes_and_rows_stay_rows():
    layer = Linear4bit.from_linear(nn.Linear(256, 96, bias=False))
    for name, p in layer.named_parameters():
        assert p.dtype == torch.uint8 and not p.requires_grad and p.dim() >= 1, name
    assert layer.weight.shape == (96, 128) and layer.absmax_codes.shape == (96, 4)
    flat = Linear4bit.from_linear(nn.Linear(256, 96), QuantConfig(double_quant=False))
    assert flat.absmax.shape == (96, 16)


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), copy.deepcopy]
)
def test_casting_the_model_leaves_the_bytes_alone(cast):
    layer = Linear4bit.from_linear(nn.Linear(64, 64))
    expected = layer.dequantize()
    assert_bits_equal(cast(layer).dequantize(torch.float32), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compute_dtype(dtype):
    """Identity in, W' out: the weight of the product is rounded to the compute dtype, the output has the input's."""
    layer = Linear4bit.from_linear(nn.Linear(64, 32, bias=False), compute_dtype=torch.bfloat16)
    y = layer(torch.eye(64, dtype=dtype))
    assert_bits_equal(y, layer.dequantize(torch.bfloat16).T.to(dtype))
    assert not torch.equal(y.float(), layer.dequantize(torch.float32).T)


def test_autocast():
    layer = LoRALinear(Linear4bit.from_linear(nn.Linear(64, 32)), 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 64))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("op", ["linear_4bit", "lora_linear_4bit"])
def test_autocast_does_not_reach_into_an_op(op):
    """Called directly with float32, an op stays in float32: that is what its fake promises."""
    layer = Linear4bit.from_linear(nn.Linear(64, 32, bias=False))
    adapter = (torch.randn(4, 64), torch.randn(32, 4), 0.5) if op == "lora_linear_4bit" else ()
    call = lambda: getattr(torch.ops.qlora_ref, op)(x, *layer.op_args(), 32, None, *adapter)
    x = torch.randn(2, 64)
    expected = call()
    with torch.autocast("cpu", torch.bfloat16):
        assert_bits_equal(call(), expected)


@pytest.mark.parametrize("quantized", [True, False])
def test_dropout_path_is_the_same_function(quantized):
    """In eval, or with p = 0, the branch with dropout computes what the fused branch does."""
    base = nn.Linear(64, 32)
    base = Linear4bit.from_linear(base) if quantized else base
    plain, dropped = LoRALinear(base, 4, 8), LoRALinear(base, 4, 8, dropout=0.5)
    dropped.load_state_dict(plain.state_dict())
    nn.init.normal_(plain.lora_B)
    dropped.load_state_dict(plain.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(plain(x), dropped.eval()(x))
    assert not torch.equal(plain(x), dropped.train()(x))


def test_quantize_model_and_attach_lora():
    model = small_model()
    before = copy.deepcopy(model)
    assert quantize_model(model, skip=("3.0",)) == ["0", "2"]
    assert isinstance(model[0], Linear4bit) and type(model[3][0]) is nn.Linear
    assert attach_lora(model, rank=4, alpha=8, skip=("3.0",), seed=0) == ["0", "2"]
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"]
    total, trained = count_parameters(model)
    assert trained == 4 * (64 + 128) + 4 * (128 + 128)
    assert total - trained == sum(p.numel() for p in before.parameters())


def test_seed_makes_adapters_equal():
    a, b = small_model(), small_model()
    attach_lora(a, 4, 8, seed=3), attach_lora(b, 4, 8, seed=3)
    assert_bits_equal(a[2].lora_A, b[2].lora_A)


def test_subclasses_and_skipped_layers_are_left_alone():
    model = nn.ModuleDict({"q_proj": nn.Linear(64, 64), "lm_head": nn.Linear(64, 9), "deep": small_model()})
    assert "lm_head" not in quantize_model(model)


def test_large_unreached_weights_are_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 128, 256))

    model = nn.ModuleDict({"q": nn.Linear(64, 64), "experts": Experts()})
    with pytest.warns(UserWarning, match=r"1 weights \(0 MiB\).*stay unquantized.*experts.gate_up_proj"):
        quantize_model(model)


@pytest.mark.parametrize(
    "act,message",
    [
        (lambda m: quantize_model(nn.Sequential(nn.ReLU())), "no nn.Linear to quantize"),
        (lambda m: attach_lora(m, target_modules=["q_proj"]), r"matches no linear layer; candidates are \['0', '2'\]"),
        (lambda m: _poison(m), r"2: 1 of 16384 weights are NaN or Inf"),
    ],
)
def test_bad_input_is_a_sentence(act, message):
    with pytest.raises(ValueError, match=message):
        act(small_model())


def _poison(model):
    model[2].weight.data[0, 0] = float("nan")
    quantize_model(model)


def test_model_on_meta():
    with torch.device("meta"):
        model = small_model()
    quantize_model(model)
    attach_lora(model, 4, 8)
    assert model(torch.empty(5, 64, device="meta")).shape == (5, 10)


def test_default_meta_context_does_not_break_the_derivation():
    """The tables are derived lazily: under a meta device context too."""
    from qlora_ref.reference.codebook import get_codebook

    get_codebook.cache_clear()
    with torch.device("meta"):
        assert get_codebook("nf4").levels.device.type == "cpu"


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("lora", [False, True])
def test_a_trainable_bias_gets_its_gradient(lora, needs_dx):
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    layer = Linear4bit.from_linear(linear)
    wrapped = LoRALinear(layer, 4, 8) if lora else layer
    layer.bias.requires_grad_(True)
    x, dy = torch.randn(3, 5, 64, requires_grad=needs_dx), torch.randint(-9, 9, (3, 5, 32)).float()
    wrapped(x).backward(dy)
    assert torch.equal(layer.bias.grad, dy.sum((0, 1)))  # whole numbers: exact in any order
    assert (x.grad is not None) == needs_dx


def test_the_same_bits_with_and_without_a_gradient():
    """What nothing records goes past the dispatcher (ops.py), straight to the same kernel."""
    torch.manual_seed(0)
    layer = LoRALinear(Linear4bit.from_linear(nn.Linear(128, 32)), 4, 8)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 128)
    for module in (layer, layer.base_layer):
        y = module(x.clone().requires_grad_())
        assert y.requires_grad
        with torch.no_grad():
            assert_bits_equal(module(x), y.detach())
        with torch.inference_mode():
            assert_bits_equal(module(x), y.detach())


def test_a_call_is_seen_by_those_who_record_it():
    layer, x = Linear4bit.from_linear(nn.Linear(64, 32)), torch.randn(2, 64)
    with torch.no_grad(), torch.profiler.profile() as profile:
        layer(x)
    assert any(event.key == "qlora_ref::linear_4bit" for event in profile.key_averages())
    with torch.no_grad():
        batched = torch.func.vmap(lambda row: layer(row[None]))(x)
    assert batched.shape == (2, 1, 32)
