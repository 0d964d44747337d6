"""Derivatives of every kind, of the layers and of their gradients: backward, forward mode, both, and torch.func's."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from qlora_ref.nn import Linear4bit, LoRALinear

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap has no rule for the ops, it loops


def layer_and_inputs(lora: bool):
    torch.manual_seed(0)
    layer = Linear4bit.from_linear(nn.Linear(64, 5))
    inputs = {"x": torch.randn(2, 64), "bias": torch.randn(5)}
    if lora:
        layer = LoRALinear(layer, 3, 6)
        inputs |= {"lora_A": torch.randn(3, 64), "lora_B": torch.randn(5, 3)}
    return layer, {name: value.double().requires_grad_() for name, value in inputs.items()}


def output(layer, x, bias, **adapter):
    """Of the layer with these in place of its own."""
    parameters = {"base_layer.bias": bias, **adapter} if adapter else {"bias": bias}
    return torch.func.functional_call(layer, parameters, (x,))


def dense(layer, x, bias, **adapter):
    """The same by torch's own functions."""
    base = layer.base_layer if adapter else layer
    y = nn.functional.linear(x, base.dequantize(torch.float64), bias)
    return y + layer.scaling * (x @ adapter["lora_A"].T) @ adapter["lora_B"].T if adapter else y


@pytest.mark.parametrize("lora", [False, True])
def test_first_and_second_derivatives_in_both_modes(lora):
    layer, inputs = layer_and_inputs(lora)

    def cubes(*values):
        return output(layer, **dict(zip(inputs, values, strict=True))) ** 3

    values = tuple(inputs.values())
    assert gradcheck(cubes, values, check_forward_ad=True)
    assert gradgradcheck(cubes, values, check_fwd_over_rev=True)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_transforms_of_torch_func(transform, lora):
    layer, inputs = layer_and_inputs(lora)
    inputs = {name: value.detach() for name, value in inputs.items()}
    got = transform(lambda values: (output(layer, **values) ** 3).sum())(inputs)
    wanted = transform(lambda values: (dense(layer, **values) ** 3).sum())(inputs)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("lora", [False, True])
def test_a_tangent_is_not_lost_where_nothing_else_is_recorded(lora):
    """A dual tensor looks like any other; the way past the dispatcher would drop its tangent in silence."""
    layer, inputs = layer_and_inputs(lora)
    x, along = torch.randn(2, 64), torch.randn(2, 64)
    layer.requires_grad_(False)
    layer(x)  # binds the tensors
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = layer(torch.autograd.forward_ad.make_dual(x, along))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    bias = (layer.base_layer if lora else layer).bias
    torch.testing.assert_close(tangent, layer(along) - bias)
