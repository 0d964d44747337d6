"""The short way of a layer that learns: the bits of the long one, and the long one for whatever is more than that."""

import copy
import gc
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from qlora_ref import bound_lora, native
from qlora_ref.checkpointing import keep_products
from qlora_ref.nn import Linear4bit, LoRALinear
from qlora_ref.quantized import QuantConfig
from qlora_ref.reference.double_quant import get_map8
from qlora_ref.testing.compare import assert_same_refusal

pytestmark = pytest.mark.skipif(native.cpu is None, reason=f"no CPU kernels: {native.missing['cpu']}")
CONFIGS = {"nested": QuantConfig(), "flat": QuantConfig(double_quant=False), "128": QuantConfig(block_size=128)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(config=QuantConfig(), bias=False, dtype=torch.float32, adapter_dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    base = Linear4bit.from_linear(nn.Linear(256, 96, bias=bias, dtype=dtype), config)
    layer = LoRALinear(base, 4, 8, dtype=adapter_dtype)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def long_way(layer):
    """The same layer, through the dispatcher."""
    base = layer.base_layer
    arguments = *base.op_args(), base.out_features
    return lambda x: torch.ops.qlora_ref.lora_linear_4bit(
        x, *arguments, base.cast_bias(x.dtype), layer.lora_A, layer.lora_B, layer.scaling
    )


def results(forward, layer, x):
    y = forward(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy)


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.fixture
def ways(monkeypatch):
    """What every call of a layer took, and every backward: True for the short way."""
    taken, forward, backward = [], bound_lora.lora_linear, bound_lora.direct

    def spy(*args):
        y = forward(*args)
        taken.append(y is not None)
        return y

    monkeypatch.setattr(bound_lora, "lora_linear", spy)
    monkeypatch.setattr(bound_lora, "direct", lambda name: taken.append("long backward") or backward(name))
    return taken


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256), (140, 256)], ids=str)
def test_same_bits(config, bias, dtype, shape, ways):
    layer = make(config, bias, dtype)
    x = torch.randn(shape).to(dtype).requires_grad_()
    assert same(results(layer, layer, x), results(long_way(layer), layer, x))
    assert ways == [native.module.cpu.can_lora(bound_lora.DTYPE[dtype], 4)]
    with torch.no_grad():
        assert torch.equal(layer(x), long_way(layer)(x))


@pytest.mark.parametrize("adapter_dtype", DTYPES)
def test_an_adapter_of_another_dtype(adapter_dtype, ways):
    layer, x = make(dtype=torch.bfloat16, adapter_dtype=adapter_dtype), torch.randn(3, 256).bfloat16().requires_grad_()
    assert same(results(layer, layer, x), results(long_way(layer), layer, x))
    assert ways == [adapter_dtype != torch.float16 and native.module.cpu.can_lora(1, 4)]


def test_inputs_that_need_no_gradient(ways):
    layer, x = make(), torch.randn(3, 256)
    wanted = torch.autograd.grad(long_way(layer)(x).square().sum(), (layer.lora_A, layer.lora_B))
    assert same(torch.autograd.grad(layer(x).square().sum(), (layer.lora_A, layer.lora_B)), wanted) and ways == [True]
    layer.requires_grad_(False)
    assert not layer(x).requires_grad and ways == [True, True]
    assert layer(x.requires_grad_()).requires_grad and ways == [True] * 3


def test_gradients_that_do_not_lie_in_one_piece(ways):
    """A sum's is expanded, a transpose's strided; so may x be."""
    layer, x = make(), torch.randn(3, 256, requires_grad=True)
    for of in (lambda y: y.sum(), lambda y: (y.t() * torch.arange(3.0)).square().sum()):
        wanted = torch.autograd.grad(of(long_way(layer)(x)), (x, layer.lora_A))
        assert same(torch.autograd.grad(of(layer(x)), (x, layer.lora_A)), wanted)
    assert ways == [True, True]
    strided = torch.randn(3, 512, requires_grad=True)
    assert torch.equal(layer(strided[:, ::2]), long_way(layer)(strided[:, ::2])) and ways.pop() is False


def test_what_is_more_than_a_recorded_call_takes_the_long_way(ways):
    layer, x = make(), torch.randn(3, 256, requires_grad=True)

    class Other(torch.Tensor):
        pass

    layer(x.detach().as_subclass(Other))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    assert any(event.key == "qlora_ref::lora_linear_4bit" for event in profile.key_averages())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x.detach(), torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent, long_way(layer)(torch.ones_like(x)).detach())
    assert torch.func.grad(lambda x: layer(x).square().sum())(x.detach()).shape == x.shape
    trainable = make(bias=True)
    trainable.base_layer.bias.requires_grad_()
    trainable(x).sum().backward()
    assert trainable.base_layer.bias.grad is not None
    computed = make()
    A = computed.lora_A * 2  # not a leaf: its own gradient is wanted, and checkpointing may drop it
    computed.base_layer.with_adapter(x, A, computed.lora_B, 1.0).sum().backward()
    assert computed.lora_A.grad is not None
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    assert ways == [False] * 7 + [True]


def test_within_a_transform_that_follows_something_else(ways):
    """x, A and B are ordinary tensors there; what the layer gives is not."""
    layer, x = make(), torch.randn(3, 256)
    y = layer(x).detach()
    outputs = torch.func.vmap(lambda s: s * layer(x))(torch.arange(3.0))
    torch.testing.assert_close(outputs, torch.arange(3.0)[:, None, None] * y)
    gradient = torch.func.grad(lambda s: (s * layer(x)).sum())(torch.tensor(1.0))
    torch.testing.assert_close(gradient, y.sum())
    assert ways == [True, False, False]


@pytest.mark.parametrize("again", ["long", "short"])
@pytest.mark.parametrize("keeping", [False, True])
def test_a_block_computed_one_way_and_recomputed_the_other(again, keeping, ways):
    """Both save the same. Layers are square, and tokens as many as ranks: a matrix of an adapter could pass for x."""
    torch.manual_seed(0)
    base = [Linear4bit.from_linear(nn.Linear(64, 64, bias=False)) for _ in range(2)]
    block = nn.Sequential(*(LoRALinear(b, 4, 8) for b in base))
    for layer in block:
        nn.init.normal_(layer.lora_B, std=0.1)
    x, leaves = torch.randn(4, 64, requires_grad=True), [p for p in block.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(block(x).square().sum(), [x, *leaves])
    ways.clear()
    watched = partial(torch.profiler.profile, activities=[torch.profiler.ProfilerActivity.CPU])
    options = {"context_fn": keep_products} if keeping else {}
    with watched() if again == "short" else nullcontext():
        y = checkpoint(block, x, use_reentrant=False, **options).square().sum()
    with watched() if again == "long" else nullcontext():
        assert same(torch.autograd.grad(y, [x, *leaves]), wanted)
    assert set(ways[:2]) == {again == "long"} and (again == "short") in ways


def test_a_gradient_of_the_gradient(ways):
    layer, x = make(), torch.randn(3, 256, requires_grad=True)

    def twice(forward):
        (dx,) = torch.autograd.grad(forward(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, layer.lora_A, layer.lora_B))

    assert same(twice(layer), twice(long_way(layer)))
    assert ways == [True, "long backward"]


@pytest.mark.parametrize("name", ["base_layer.weight", "base_layer.nested_absmax", "lora_A", "lora_B"])
def test_a_change_in_place_before_backward_is_an_error(name):
    layer, x = make(), torch.randn(3, 256, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.get_parameter(name).zero_()
    with pytest.raises(RuntimeError, match="was modified in place between forward and backward"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["base_layer.weight", "base_layer.absmax_mean", "lora_A"])
def test_memory_may_move_before_backward(name, ways):
    """As when weights are offloaded: then the node looks where they are now."""
    layer, x = make(), torch.randn(3, 256, requires_grad=True)
    wanted = results(long_way(layer), layer, x)[1:]
    y = layer(x)
    parameter = layer.get_parameter(name)
    kept = parameter.data
    parameter.data = kept.clone()
    kept.zero_()
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    assert same(torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy), wanted)
    assert ways == [True, "long backward"]


def test_the_layer_may_get_another_weight_before_backward():
    """The node has the one it was computed with, and the map of its 8-bit codes."""
    layer, other, x = make(), make(seed=1), torch.randn(3, 256, requires_grad=True)
    wanted = results(long_way(layer), layer, x)[1:]
    get_map8.cache_clear()  # quantizing has kept the first one; the layer binds another
    y = layer(x)
    layer.base_layer.load_state_dict(copy.deepcopy(other.base_layer.state_dict()), assign=True)
    get_map8.cache_clear()
    assert torch.equal(layer(x), long_way(layer)(x))  # the other one is bound now
    gc.collect()
    filler = [torch.full((256,), 7.0) for _ in range(100)]  # what would lie in the place of the old one's tables
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    assert same(torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy), wanted) and filler


def test_hooks_see_what_is_saved():
    """Only x is. An unpacked one may be of another kind."""
    layer, x = make(), torch.randn(6, 256, requires_grad=True)
    wanted, seen = results(long_way(layer), layer, x), []

    def unpack(packed):
        return packed.T.contiguous().T  # the same numbers, column by column

    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t.detach().clone(), unpack):
        y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    assert same((y.detach(), *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy)), wanted)
    assert seen == [(6, 256)]


def test_nothing_is_kept_alive():
    layer, x = make(), torch.randn(3, 256, requires_grad=True)
    y = layer(x)
    held = [weakref.ref(p) for p in layer.parameters()]
    y.sum().backward()
    del layer, y
    gc.collect()
    assert [p() for p in held] == [None] * len(held)


def test_bad_input_is_refused_in_the_same_words():
    layer = make()
    layer(torch.randn(3, 256))
    long = long_way(layer)
    assert_same_refusal(ValueError, layer, long, torch.randn(3, 255))
    assert_same_refusal(TypeError, layer, long, torch.ones(3, 256, dtype=torch.int32))
    layer.lora_A = nn.Parameter(torch.randn(4, 255))
    with pytest.raises(ValueError, match="they must be"):
        layer(torch.randn(3, 256))


def test_no_tokens_and_variants_without_the_kernel(ways):
    layer, x, variant = make(), torch.randn(3, 256), native.module.cpu.variant()
    assert layer(torch.randn(0, 256)).shape == (0, 96)
    wanted = layer(x)
    try:
        native.set_cpu_variant("scalar")
        torch.testing.assert_close(layer(x), wanted)
    finally:
        native.set_cpu_variant(variant)
    assert ways == [False, native.module.cpu.can_lora(0, 4), False]
