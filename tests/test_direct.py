"""Calls past the dispatcher: the same bits as through it, seen by all who watch, and right when the weight changes."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_ref import native, ops
from qlora_ref.nn import Linear4bit, LoRALinear
from qlora_ref.quantized import QuantConfig
from qlora_ref.testing.compare import assert_same_refusal

pytestmark = pytest.mark.skipif(native.cpu is None, reason=f"no CPU kernels: {native.missing['cpu']}")
CONFIGS = {"nested": QuantConfig(), "flat": QuantConfig(double_quant=False), "128": QuantConfig(block_size=128)}


def make(config=QuantConfig(), bias=True, dtype=torch.float32, seed=0, compute_dtype=None, size=(256, 96)):
    torch.manual_seed(seed)
    layer = Linear4bit.from_linear(nn.Linear(*size, bias=bias, dtype=dtype), config, compute_dtype)
    return layer.requires_grad_(False)


def through_the_dispatcher(layer, x):
    return torch.ops.qlora_ref.linear_4bit(x, *layer.op_args(), layer.out_features, layer.cast_bias(x.dtype))


def is_bound(layer, x):
    """Whether the call takes the short way."""
    return layer._bound(layer, x) is not None


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256), (0, 256), (700, 256)], ids=str)
def test_same_bits(config, bias, dtype, shape):
    layer = make(config, bias, dtype)
    x = torch.randn(shape).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and torch.equal(y, through_the_dispatcher(layer, x))
    fused = native.cpu._can_forward(dtype, x.numel() // 256, 256, config.block_size)
    assert is_bound(layer, x) == fused


def test_the_weight_may_change_in_every_way():
    """Written in place, replaced, given other memory, loaded: the next call uses what is there."""
    layer, other, x = make(), make(seed=1), torch.randn(3, 256)
    wanted = other(x)
    assert is_bound(layer, x)

    replaced = copy.deepcopy(layer)
    assert is_bound(replaced, x)
    for name, parameter in other.named_parameters():
        setattr(replaced, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    assert torch.equal(replaced(x), wanted) and is_bound(replaced, x)

    for assign in (False, True):
        loaded = copy.deepcopy(layer)
        assert is_bound(loaded, x)
        loaded.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(loaded(x), wanted)

    for name in dict(layer.named_parameters()):  # one after the other: every one is looked at
        before = layer(x)
        getattr(layer, name).data = getattr(other, name).detach().clone()
        assert torch.equal(layer(x), through_the_dispatcher(layer, x)), name
        assert not torch.equal(layer(x), before), name
    assert torch.equal(layer(x), wanted)


def test_a_smaller_tensor_in_the_place_of_another_is_refused():
    layer, x = make(), torch.randn(3, 256)
    assert is_bound(layer, x)
    layer.weight = nn.Parameter(layer.weight[:4], requires_grad=False)  # at the same address
    with pytest.raises(ValueError, match="packed has 512 elements where 12288 are needed"):
        layer(x)
    layer = make()
    layer.bias = nn.Parameter(layer.bias[:4], requires_grad=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="bias has 4 elements where 96 are needed"):
            layer(x)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_copy_has_its_own_weight(pickled):
    layer, x = make(), torch.randn(3, 256)
    wanted = layer(x)
    if pickled:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    else:
        copied = copy.deepcopy(layer)
    layer.weight.data.zero_()
    assert torch.equal(copied(x), wanted) and not torch.equal(layer(x), wanted)
    assert set(copied.state_dict()) == {"weight", "absmax_codes", "nested_absmax", "absmax_mean", "bias"}


def test_nothing_is_kept_alive():
    layer, x = make(), torch.randn(3, 256)
    assert is_bound(layer, x)
    held = [weakref.ref(p) for p in layer.parameters()]
    layer.to("meta")
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter.clone(), requires_grad=False))
    gc.collect()
    assert [p() for p in held] == [None] * 5


def test_a_bias_of_another_dtype_is_cast():
    layer, x = make(), torch.randn(3, 256).bfloat16()
    assert not is_bound(layer, x)
    assert torch.equal(layer(x), through_the_dispatcher(layer, x))


def test_what_learns_takes_the_long_way():
    layer, x = make(), torch.randn(3, 256)
    assert is_bound(layer, x)
    assert layer(x.clone().requires_grad_()).requires_grad
    layer.bias.requires_grad_()
    assert not is_bound(layer, x) and layer(x).requires_grad


def test_the_tables_may_be_derived_again():
    """The kernel points at the map of the 8-bit codes."""
    from qlora_ref.reference.double_quant import get_map8

    layer, x = make(), torch.randn(3, 256)
    wanted = through_the_dispatcher(layer, x)
    get_map8.cache_clear()  # quantizing has kept the first one; the layer binds another
    assert is_bound(layer, x)
    get_map8.cache_clear()
    gc.collect()
    filler = [torch.full((256,), 7.0) for _ in range(100)]  # what would lie in its place
    assert torch.equal(layer(x), wanted) and filler


def test_compute_dtype_and_autocast():
    layer, x = make(compute_dtype=torch.bfloat16), torch.randn(3, 256)
    assert not is_bound(layer, x)  # x is cast
    assert layer(x).dtype == torch.float32
    plain = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_bound(plain, x) and plain(x).dtype == torch.bfloat16


class Other(torch.Tensor):
    """A tensor of another class, which may follow what is done with it."""


def test_a_call_that_learns_goes_to_the_kernel_and_its_gradient_too(monkeypatch):
    """The same bits as through the dispatcher, which still gets whatever is more than a plain recorded call."""
    lora, x = LoRALinear(make(bias=False), 4, 8), torch.randn(3, 256, requires_grad=True)
    lora.lora_B.data.normal_()
    leaves, calls = (x, lora.lora_A, lora.lora_B), []
    for name in ("lora_linear_4bit", "lora_linear_4bit_backward"):
        kernel = ops.direct_kernels[name, "cpu"]
        spy = lambda *args, name=name, kernel=kernel: calls.append(name) or kernel(*args)
        monkeypatch.setitem(ops.direct_kernels, (name, "cpu"), spy)

    def results(forward):
        calls.clear()
        y = forward(x)
        return y.detach(), *torch.autograd.grad(y.sum(), leaves)

    base = lora.base_layer
    arguments = *base.op_args(), base.out_features, None, lora.lora_A, lora.lora_B, lora.scaling
    wanted = results(lambda x: torch.ops.qlora_ref.lora_linear_4bit(x, *arguments))
    assert calls == ["lora_linear_4bit_backward"]
    assert all(map(torch.equal, results(lambda x: ops.lora_linear_4bit(x, *arguments)), wanted))
    assert calls == ["lora_linear_4bit", "lora_linear_4bit_backward"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert all(map(torch.equal, results(lambda x: ops.lora_linear_4bit(x, *arguments)), wanted)) and not calls
    other = (*arguments[:-3], lora.lora_A.detach().as_subclass(Other), *arguments[-2:])
    ops.lora_linear_4bit(x, *other)
    assert not calls


def test_who_watches_sees_the_op():
    layer, x = make(), torch.randn(3, 256)
    wanted = layer(x)
    with torch.profiler.profile() as profile:
        layer(x)
    assert any(event.key == "qlora_ref::linear_4bit" for event in profile.key_averages())
    assert "qlora_ref::linear_4bit" in str(torch.jit.trace(layer, (x,)).inlined_graph)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (3, 96)
        assert type(layer(x)) is not torch.Tensor
    graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
    assert any("linear_4bit" in str(node.target) for node in graph.graph.nodes)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), wanted)
    assert torch.equal(torch.func.vmap(layer)(x[:, None]), torch.stack([layer(row[None]) for row in x]))


def test_bad_input_is_refused_in_the_same_words():
    layer = make()
    layer(torch.randn(3, 256))
    long = lambda x: ops.linear_4bit(x, *layer.op_args(), 96, None)
    assert_same_refusal(ValueError, layer, long, torch.randn(3, 255))
    assert_same_refusal(TypeError, layer, long, torch.ones(3, 256, dtype=torch.int32))


def test_odd_memory():
    layer, x = make(), torch.randn(3, 512)
    strided, shifted = x[:, ::2], x.view(-1)[1:257].view(1, 256)
    for each in (strided, shifted):
        assert torch.equal(layer(each), through_the_dispatcher(layer, each.clone()))


def test_a_variant_without_the_kernel():
    layer, x, variant = make(), torch.randn(3, 256), native.module.cpu.variant()
    wanted = layer(x)
    try:
        native.set_cpu_variant("scalar")
        assert not is_bound(layer, x)
        torch.testing.assert_close(layer(x), wanted)
    finally:
        native.set_cpu_variant(variant)
    assert torch.equal(layer(x), wanted)


def test_empty_layers():
    for size in ((0, 5), (64, 0)):
        layer = Linear4bit(*size, bias=False)
        assert layer(torch.randn(2, size[0])).shape == (2, size[1])
