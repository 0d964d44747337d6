"""Attention within a checkpoint that keeps products: its kernel runs once, unless something forbids that."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from attention_kernels import Kernels
from qlora_ref import checkpointing
from qlora_ref.checkpointing import keep_products
from qlora_ref.testing.compare import assert_bits_equal

KEEPING = {"use_reentrant": False, "context_fn": keep_products}


class Block(torch.nn.Module):
    def __init__(self, change=lambda y: y, p=0.0, after=torch.nn.functional.silu):
        super().__init__()
        self.change, self.p, self.after = change, p, after

    def forward(self, q, k, v):
        with checkpointing.attention(self.p):
            y = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.p)
        return self.after(self.change(y) + q)


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(2, 3, 17, 16, dtype=dtype, requires_grad=True) for _ in range(3)]


def run(call, qkv):
    """(bits of the gradients, kernels in forward, kernels in backward)."""
    torch.manual_seed(1)
    with Kernels() as kernels:
        y = call(*qkv)
        forward = kernels.count
        gradients = torch.autograd.grad(y.square().sum(), qkv)
    return gradients, forward, kernels.count - forward


def compare(block, qkv, backward_kernels):
    expected, _, _ = run(block, qkv)
    actual, forward, backward = run(lambda *qkv: checkpoint(block, *qkv, **KEEPING), qkv)
    assert (forward, backward) == (1, backward_kernels)
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_runs_once(dtype):
    compare(Block(), inputs(dtype), backward_kernels=0)


def test_attention_at_the_end_of_the_block():
    """A last product is not kept. Attention is: its own backward wants its output."""
    compare(Block(after=lambda y: y + 0), inputs(), backward_kernels=0)


def test_an_output_changed_in_place_is_not_taken():
    """Autograd refuses that anyhow, where it notices."""
    first, again = keep_products()
    qkv = [t.detach() for t in inputs()]
    with first, checkpointing.attention():
        y = scaled_dot_product_attention(*qkv)
    y.mul_(2)
    with again, Kernels() as kernels, checkpointing.attention():
        assert_bits_equal(scaled_dot_product_attention(*qkv).mul(2), y)
    assert kernels.count == 1


def test_with_dropout_nothing_is_kept():
    """A fused kernel of a GPU would leave the random generator behind. (Here dropout has no fused kernel.)"""
    with keep_products()[0]:
        assert isinstance(checkpointing.attention(0.0), checkpointing.Attention)
        assert not isinstance(checkpointing.attention(0.25), checkpointing.Attention)


def test_a_second_backward_computes_it():
    qkv = inputs()
    y = checkpoint(Block(), *qkv, **KEEPING)
    with Kernels() as kernels:
        first = torch.autograd.grad(y.sum(), qkv, retain_graph=True)
        assert kernels.count == 0
        second = torch.autograd.grad(y.sum(), qkv)
        assert kernels.count == 1
    for a, b in zip(first, second, strict=True):
        assert_bits_equal(a, b)


def test_products_and_attention_keep_their_places():
    """One list for both, in the order of calls. The last product is not kept."""
    first, again = keep_products()
    q, k, v = (t.detach() for t in inputs())

    def calls(run):
        a = run.product("a", (2,), torch.float32, lambda: torch.ones(2))
        run.keep("a", a)
        with checkpointing.attention():
            one, two = scaled_dot_product_attention(q, k, v), scaled_dot_product_attention(k, q, v)
            b = run.product("a", (2,), torch.float32, lambda: torch.zeros(2))
            run.keep("a", b)
        c = run.product("a", (2,), torch.float32, lambda: torch.full((2,), 2.0))
        run.keep("a", c)
        return a, one, two, b, c

    with first:
        expected = calls(first)
    with again:
        actual = calls(again)
    taken = [a.data_ptr() == e.data_ptr() for a, e in zip(actual, expected, strict=True)]
    assert taken == [True, True, True, True, False]
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)


def test_attention_within_attention():
    """A wrapper around a wrapper: kept once."""
    first, again = keep_products()
    qkv = [t.detach() for t in inputs()]
    for run, kernels in ((first, 1), (again, 0)):
        with run, Kernels() as seen, checkpointing.attention(), checkpointing.attention():
            scaled_dot_product_attention(*qkv)
        assert seen.count == kernels and len(first._kept) == 1
    assert not first.attending and not again.attending


def test_another_kernel_in_the_recomputation():
    """Its outputs are of another kind. Nothing is taken from there on."""
    first, again = keep_products()
    q, k, v = (t.detach() for t in inputs())
    with first, checkpointing.attention():
        scaled_dot_product_attention(q, k, v)
        scaled_dot_product_attention(q, k, v)
    with again:
        assert again.take("aten::_scaled_dot_product_flash_attention", tuple(q.shape), q.dtype) is None
        with Kernels() as kernels, checkpointing.attention():
            scaled_dot_product_attention(q, k, v)
        assert kernels.count == 1


def test_outputs_that_are_no_tensors():
    """The kernels of a GPU give lengths and undefined tensors too."""
    first, again = keep_products()
    with first:
        first.keep("aten::_scaled_dot_product_flash_attention", torch.ones(2), torch.ones(1), None, 17)
    with again:
        outputs = again.take("aten::_scaled_dot_product_flash_attention", (2,), torch.float32)
        assert outputs[2:] == (None, 17)


def test_a_change_within_the_context_is_noticed():
    first, again = keep_products()
    qkv = [t.detach() for t in inputs()]
    with first, checkpointing.attention():
        scaled_dot_product_attention(*qkv).mul_(2)
    with again, Kernels() as kernels, checkpointing.attention():
        scaled_dot_product_attention(*qkv)
    assert kernels.count == 1


def test_fake_tensors_are_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    first, _ = keep_products()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t.detach()) for t in inputs()]
    with first, checkpointing.attention():
        scaled_dot_product_attention(*fakes)
    assert first._kept == []


def test_outside_of_a_run_nothing_happens():
    with checkpointing.attention() as nothing:
        assert nothing is None
