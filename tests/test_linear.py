"""Forward and backward through 4-bit weights: the hand-written gradient, the same W' in both, nothing 16-bit saved."""

import pytest
import torch

from qlora_ref import ops  # noqa: F401
from qlora_ref.quantized import QuantConfig, QuantizedTensor
from qlora_ref.reference import linear
from qlora_ref.reference.codebook import get_codebook
from qlora_ref.testing.compare import assert_bits_equal


def problem(m=5, n=24, k=64, r=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype)
    return make(m, k), make(n, k), make(n), make(r, k), make(n, r)


def test_hand_written_backward_is_the_gradient():
    """gradcheck in float64, W' a constant."""
    x, W, b, A, B = problem()

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, A, B):
            ctx.save_for_backward(x, A, B)
            return linear.forward(x, W, b, A, B, 0.5)

        @staticmethod
        def backward(ctx, dy):
            x, A, B = ctx.saved_tensors
            return linear.backward(dy, x, W, A, B, 0.5)

    assert torch.autograd.gradcheck(Function.apply, [t.requires_grad_() for t in (x, A, B)])


def test_reference_function_equals_autograd_through_the_dequantized_weight():
    x, W, b, A, B = problem(dtype=torch.float32)
    q = QuantizedTensor.quantize(W)
    leaves = [t.clone().requires_grad_() for t in (x, b, A, B)]
    y = linear.QLoRALinear.apply(
        leaves[0], q.packed, q.absmax_f32(), get_codebook("nf4"), 64, q.shape, leaves[1], leaves[2], leaves[3], 0.5
    )
    y.square().sum().backward()
    check = [t.clone().double().requires_grad_() for t in (x, b, A, B)]
    y64 = linear.forward(check[0], q.dequantize().double(), check[1], check[2], check[3], 0.5)
    y64.square().sum().backward()
    for mine, exact in zip(leaves, check, strict=True):
        norm = exact.grad.norm()
        assert (mine.grad.double() - exact.grad).norm() <= 64 * 2.0**-24 * norm  # k = 64 at most everywhere


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_backward_use_the_bit_same_weight(dtype):
    """Identity in, W' out: the rows of y are W'^T and the rows of dx are W', in every dtype, for any batch size."""
    W = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    q = QuantizedTensor.quantize(W)
    expected = q.dequantize(dtype)
    eye_in, eye_out = torch.eye(64, dtype=dtype), torch.eye(48, dtype=dtype)
    y = torch.ops.qlora_ref.linear_4bit(eye_in, *q.op_args(), 48, None)
    dx = torch.ops.qlora_ref.linear_4bit_backward(eye_out, *q.op_args(), 64)
    assert_bits_equal(y.T, expected, "forward")
    assert_bits_equal(dx, expected, "backward")
    one = torch.ops.qlora_ref.linear_4bit(eye_in[:1], *q.op_args(), 48, None)
    assert_bits_equal(one[0], expected[:, 0], "batch of one")


def test_autograd_keeps_four_bits_a_weight():
    """It saves x; of weight and adapter the node keeps the very tensors it was given, 4.2 bits a weight."""
    W = torch.randn(512, 512)
    q = QuantizedTensor.quantize(W)
    x = torch.randn(2, 512, requires_grad=True)
    A, B = torch.randn(4, 512, requires_grad=True), torch.randn(512, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = torch.ops.qlora_ref.lora_linear_4bit(x, *q.op_args(), 512, None, A, B, 0.5)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    assert [t.data_ptr() for t in y.grad_fn.adapter] == [A.data_ptr(), B.data_ptr()]
    kept = [t for t in y.grad_fn.weight if isinstance(t, torch.Tensor)]
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (q.packed, q.absmax, q.nested_absmax, q.absmax_mean)}
    assert sum(t.nbytes for t in kept) == q.nbytes and q.bits_per_weight < 4.2


@pytest.mark.parametrize("which", [0, 1])
def test_an_adapter_changed_before_backward_is_refused(which):
    q, x = QuantizedTensor.quantize(torch.randn(24, 64)), torch.randn(3, 64)
    adapter = torch.randn(4, 64, requires_grad=True), torch.randn(24, 4, requires_grad=True)
    y = torch.ops.qlora_ref.lora_linear_4bit(x, *q.op_args(), 24, None, *adapter, 0.5)
    with torch.no_grad():
        adapter[which].zero_()
    with pytest.raises(RuntimeError, match="the packed weight or the adapter .* was modified in place"):
        y.sum().backward()


@pytest.mark.parametrize("op", ["linear_4bit", "lora_linear_4bit"])
def test_a_weight_changed_before_backward_is_refused(op):
    q, x = QuantizedTensor.quantize(torch.randn(24, 64)), torch.randn(3, 64, requires_grad=True)
    adapter = (torch.randn(4, 64), torch.randn(24, 4), 0.5) if op == "lora_linear_4bit" else ()
    y = getattr(torch.ops.qlora_ref, op)(x, *q.op_args(), 24, None, *adapter)
    q.packed.bitwise_not_()
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()


@pytest.mark.parametrize("frozen", ["x", "bias", "adapter"])
def test_only_what_is_asked_for_gets_a_gradient(frozen):
    q = QuantizedTensor.quantize(torch.randn(24, 64), QuantConfig(double_quant=False))
    x, b = torch.randn(3, 64, requires_grad=frozen != "x"), torch.randn(24, requires_grad=frozen != "bias")
    A, B = (torch.randn(s, requires_grad=frozen != "adapter") for s in ((4, 64), (24, 4)))
    torch.ops.qlora_ref.lora_linear_4bit(x, *q.op_args(), 24, b, A, B, 0.5).sum().backward()
    for tensor, name in ((x, "x"), (b, "bias"), (A, "adapter"), (B, "adapter")):
        assert (tensor.grad is None) == (name == frozen)
