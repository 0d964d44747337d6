"""Checkpointing that keeps products: which are computed again, the same gradients, and what is not kept."""

import threading
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from qlora_ref import bound_lora, checkpointing, native
from qlora_ref.checkpointing import keep_products
from qlora_ref.nn import Linear4bit, LoRALinear
from qlora_ref.testing.compare import assert_bits_equal

pytestmark = pytest.mark.skipif(native.cpu is None, reason=f"no CPU kernels: {native.missing['cpu']}")
KEEPING = {"use_reentrant": False, "context_fn": keep_products}


def layer(cols, rows, adapter):
    base = Linear4bit.from_linear(torch.nn.Linear(cols, rows)).requires_grad_(False)
    if not adapter:
        return base
    module = LoRALinear(base, 4, alpha=8)
    torch.nn.init.normal_(module.lora_B, std=0.1)
    return module


class Block(torch.nn.Module):
    """Three products and the elementwise work between them; `change` is done to the output of the first."""

    def __init__(self, adapter=True, change=lambda y: y):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = layer(64, 96, adapter), layer(64, 96, adapter), layer(96, 64, adapter)
        self.change = change

    def forward(self, x):
        return x + self.last(silu(self.change(self.first(x))) * self.second(x))

    def gradients(self, y, x, **options):
        return torch.autograd.grad(y.sum(), [x, *(p for p in self.parameters() if p.requires_grad)], **options)


@pytest.fixture(params=["short way", "long way"])
def products(monkeypatch, request):
    """Features (in, out) of every product that is computed."""
    seen, product = [], bound_lora.product
    spy = lambda bound, x, struct, y: seen.append((x.shape[-1], y.shape[-1])) or product(bound, x, struct, y)
    monkeypatch.setattr(bound_lora, "product", spy)
    if request.param == "long way":
        monkeypatch.setattr(bound_lora, "lora_linear", lambda *_: None)
    for name in ("linear_4bit_forward", "lora_linear_4bit"):
        method = getattr(native.cpu, name)
        spy = lambda x, *args, method=method: seen.append((x.shape[-1], args[8])) or method(x, *args)
        monkeypatch.setattr(native.cpu, name, spy)
    return seen


THREE = [(64, 96), (64, 96), (96, 64)]


@pytest.mark.parametrize("adapter", [True, False], ids=["LoRA", "frozen"])
@pytest.mark.parametrize("tokens", [3, 140])
def test_no_product_is_computed_again(adapter, tokens, products):
    block, x = Block(adapter), torch.randn(tokens, 64, requires_grad=True)
    expected = block.gradients(block(x), x)
    products.clear()
    y = checkpoint(block, x, **KEEPING)
    assert products == THREE
    actual = block.gradients(y, x)
    assert products == THREE
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)


def test_a_second_backward_computes_what_the_first_was_given(products):
    block, x = Block(), torch.randn(5, 64, requires_grad=True)
    y = checkpoint(block, x, **KEEPING)
    first = block.gradients(y, x, retain_graph=True)
    second = block.gradients(y, x)
    assert products == [*THREE, (64, 96), (64, 96)]
    for a, b in zip(first, second, strict=True):
        assert_bits_equal(a, b)


def through_a_view(y):
    y.view(-1)[3:7].zero_()
    return y


@pytest.mark.parametrize("change", [lambda y: y.mul_(2), through_a_view], ids=["whole", "view"])
def test_an_output_changed_in_place_is_computed_again(products, change):
    block, x = Block(change=change), torch.randn(5, 64, requires_grad=True)
    expected = block.gradients(block(x), x)
    products.clear()
    actual = block.gradients(checkpoint(block, x, **KEEPING), x)
    assert products == [*THREE, (64, 96)]
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)


def test_work_behind_the_last_product(products):
    """Its output is not kept, so here, where something saves it, it is computed again."""
    block, x = Block(), torch.randn(5, 64, requires_grad=True)
    expected = block.gradients(silu(block(x)), x)
    products.clear()
    actual = block.gradients(checkpoint(lambda x: silu(block(x)), x, **KEEPING), x)
    assert products == [*THREE, (96, 64)]
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)


def test_a_run_within_a_run(products):
    """The inner function keeps for itself; what the outer one computes again, it computes from the beginning."""
    inner, outer, x = Block(), Block(), torch.randn(5, 64, requires_grad=True)
    leaves = [x, *(p for b in (inner, outer) for p in b.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(outer(inner(x)).sum(), leaves)
    products.clear()
    both = lambda x: outer(checkpoint(inner, x, **KEEPING))
    actual = torch.autograd.grad(checkpoint(both, x, **KEEPING).sum(), leaves)
    assert products == [*THREE, *THREE, *THREE]  # forward twice, and the inner one from its beginning
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)
    assert checkpointing.current() is None


def test_dropout(products):
    """The adapter is a branch of its own, whose products are not ours; the frozen ones are kept, but for the last."""
    block, x = Block(), torch.randn(5, 64, requires_grad=True)
    for module in (block.first, block.second, block.last):
        module.dropout = torch.nn.Dropout(0.5)
    torch.manual_seed(1)
    expected = block.gradients(block(x), x)
    products.clear()
    torch.manual_seed(1)
    actual = block.gradients(checkpoint(block, x, **KEEPING), x)
    assert products == [*THREE, (96, 64)]  # the last stands before its branch, which saves its input
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)


def test_an_error_leaves_no_run_behind():
    def fail(y):
        raise RuntimeError("on purpose")

    x = torch.randn(5, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="on purpose"):
        checkpoint(Block(change=fail), x, **KEEPING)
    assert checkpointing.current() is None
    checkpoint(Block(), x, **KEEPING).sum().backward()


def test_a_recomputation_that_failed_begins_anew(products):
    """What it took is gone; the others still stand in their places."""
    runs = []

    def fail_once(y):
        runs.append(y)
        if len(runs) == 2:
            raise RuntimeError("on purpose")
        return y

    block, x = Block(change=fail_once), torch.randn(5, 64, requires_grad=True)
    y = checkpoint(block, x, **KEEPING)
    with pytest.raises(RuntimeError, match="on purpose"):
        block.gradients(y, x, retain_graph=True)
    actual = block.gradients(y, x)
    assert products == [*THREE, (64, 96)]
    for a, e in zip(actual, block.gradients(block(x), x), strict=True):
        assert_bits_equal(a, e)


def test_a_run_belongs_to_its_thread():
    first, _ = keep_products()
    with first:
        seen = []
        thread = threading.Thread(target=lambda: seen.append(checkpointing.current()))
        thread.start()
        thread.join()
        assert seen == [None] and checkpointing.current() is first


def test_what_is_kept_goes_with_the_backward():
    """Every output but the last is alive until its recomputation, and not longer."""
    kept, block, x = [], Block(), torch.randn(5, 64, requires_grad=True)

    def contexts():
        first, again = keep_products()
        kept.append(first._kept)
        return first, again

    y = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    memory = [weakref.ref(product.outputs[0]) for product in kept[0]]
    assert [m().shape for m in memory] == [(5, 96), (5, 96)]
    block.gradients(y, x)
    assert kept == [[None, None]] and not any(m() is not None for m in memory)


@pytest.mark.parametrize("wrong", ["name", "shape", "dtype"])
def test_what_does_not_fit_is_computed(wrong):
    first, again = keep_products()
    with first:
        for _ in range(2):
            first.keep("lora_linear_4bit", torch.ones(3, 4))
    right = {"name": "lora_linear_4bit", "shape": (3, 4), "dtype": torch.float32}
    other = {"name": "linear_4bit", "shape": (4, 3), "dtype": torch.bfloat16}
    with again:
        assert again.product(**(right | {wrong: other[wrong]}), compute=lambda: "computed") == "computed"
        assert again.product(**right, compute=lambda: "computed") == "computed"  # the last is not kept


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Features (in, out) of every product that passes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "qlora_ref::lora_linear_4bit":
            self.seen.append((args[0].shape[-1], args[9]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_under_a_dispatch_mode(device):
    """As in the memory trace. Here a node is made after its product: the last is computed before anybody can stop."""
    block, x = Block().to(device), torch.randn(5, 64).to(device).requires_grad_()
    expected = block.gradients(block(x), x)
    with Watch() as watch:
        y = checkpoint(block, x, **KEEPING)
        assert watch.seen == THREE
        actual = block.gradients(y, x)
    assert watch.seen == [*THREE, (96, 64)]
    if device == "cpu":
        for a, e in zip(actual, expected, strict=True):
            assert_bits_equal(a, e)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("transform", ["jvp", "vmap"])
def test_under_torch_func(transform):
    """Nothing is kept of what a transform runs."""
    block, x = Block(), torch.randn(5, 64, requires_grad=True)
    along = {"jvp": lambda x: torch.func.jvp(block, (x,), (x,))[1], "vmap": torch.func.vmap(block)}[transform]
    expected = block.gradients(along(x), x)
    for a, e in zip(block.gradients(checkpoint(along, x, **KEEPING), x), expected, strict=True):
        assert_bits_equal(a, e)


def test_fake_tensors_are_not_kept():
    """As a compiler makes them inside the block, in the first run only: the places of the others stay."""
    block, x = Block(), torch.randn(5, 64, requires_grad=True)
    expected, runs, layer = block.gradients(block(x), x), [], block.first
    arguments = *layer.base_layer.op_args(), 96, None, layer.lora_A, layer.lora_B, layer.scaling

    def traced_once(x):
        runs.append(x)
        if len(runs) == 1:
            with FakeTensorMode() as mode, torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in (x, *arguments)]
                assert torch.ops.qlora_ref.lora_linear_4bit(*fakes).requires_grad
        return block(x)

    for a, e in zip(block.gradients(checkpoint(traced_once, x, **KEEPING), x), expected, strict=True):
        assert_bits_equal(a, e)
