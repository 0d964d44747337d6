"""LoRA on the CPU: every number of tokens and dtype within its rounding bound, and what autograd does around the op."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qlora_ref import bound_lora, cpu_linear, native, ops
from qlora_ref.arguments import DTYPE
from qlora_ref.nn import Linear4bit, LoRALinear
from qlora_ref.quantized import QuantConfig, QuantizedTensor
from qlora_ref.testing.compare import assert_bits_equal, assert_within_bound, bounds

pytestmark = pytest.mark.skipif(native.cpu is None, reason=f"no native CPU: {native.missing['cpu']}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORWARD, BACKWARD = torch.ops.qlora_ref.lora_linear_4bit, torch.ops.qlora_ref.lora_linear_4bit_backward


def has_kernel(dtype) -> bool:
    return native.cpu is not None and native.module.cpu.can_lora(DTYPE[dtype], 16)


NATIVE = [
    pytest.param(
        dtype, id=str(dtype), marks=pytest.mark.skipif(not has_kernel(dtype), reason="no kernel for LoRA here")
    )
    for dtype in (torch.float32, torch.bfloat16)
]


def problem(tokens, rows=96, cols=128, rank=5, dtype=torch.float32, bias=True):
    """Arguments of the forward op, and a dy."""
    g = torch.Generator().manual_seed(tokens)
    weight = QuantizedTensor.quantize(torch.randn(rows, cols, generator=g)).op_args()
    x, dy = (torch.randn(tokens, n, generator=g).to(dtype) for n in (cols, rows))
    A, B = torch.randn(rank, cols, generator=g) / cols**0.5, torch.randn(rows, rank, generator=g)
    b = torch.randn(rows, generator=g).to(dtype) if bias else None
    return (x, *weight, rows, b, A, B, 0.25), dy


def backward_arguments(forward, dy, need_dx=True):
    x, *weight, _, _, A, B, scaling = forward
    return dy, x, *weight, A, B, scaling, need_dx


def check(op, arguments):
    outputs, torch_outputs = getattr(torch.ops.qlora_ref, op)(*arguments), ops._REFERENCE[op](*arguments)
    if not isinstance(outputs, tuple):
        outputs, torch_outputs = (outputs,), (torch_outputs,)
    for mine, same, (name, value, bound) in zip(outputs, torch_outputs, bounds(op, arguments), strict=True):
        assert mine.dtype == same.dtype and mine.is_contiguous()
        assert_within_bound(mine, same, value, bound, f"{op} {name}")


def check_bounds(forward, dy):
    """The rounding bound alone: in float32 the largest of a few errors, beside torch's, is luck."""
    for op, arguments in (
        ("lora_linear_4bit", forward),
        ("lora_linear_4bit_backward", backward_arguments(forward, dy)),
    ):
        outputs = getattr(torch.ops.qlora_ref, op)(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for mine, (name, value, bound) in zip(outputs, bounds(op, arguments), strict=True):
            assert ((mine.double() - value).abs() <= bound).all(), f"{op} {name}"


def check_both(forward, dy):
    check("lora_linear_4bit", forward)
    check("lora_linear_4bit_backward", backward_arguments(forward, dy))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 48, 49, 128, 129, 300])
def test_bound_for_every_number_of_tokens(tokens, dtype):
    """Both sides of the change from the kernel to panels."""
    check_both(*problem(tokens, dtype=dtype))
    check_both(*problem(tokens, rows=33, cols=65, rank=1, dtype=dtype, bias=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_over_several_panels(dtype, monkeypatch):
    """Ragged last panels in both directions, where the variant has no product of its own."""
    for kernel in ("_can_forward", "_can_backward", "_can_lora"):
        monkeypatch.setattr(native.cpu, kernel, lambda *_: False)
    monkeypatch.setattr(cpu_linear, "PANEL_STEP", 32)
    monkeypatch.setattr(cpu_linear, "PANEL_BYTES", 1)
    counted = []
    dequantize = native.cpu._dequantize_region
    monkeypatch.setattr(native.cpu, "_dequantize_region", lambda w, r, out: counted.append(r) or dequantize(w, r, out))
    check_both(*problem(530, rows=100, cols=70, dtype=dtype))
    rows = [(0, 32, 0, 70), (32, 32, 0, 70), (64, 32, 0, 70), (96, 4, 0, 70)]
    cols = [(0, 100, 0, 32), (0, 100, 32, 32), (0, 100, 64, 6)]
    assert counted == 2 * rows + 2 * cols  # once each for the reference, whose base path is dispatched too


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8, 64), (3, 1, 64), (7, 64, 1), (140, 5, 3)])
def test_odd_shapes(shape, dtype):
    tokens, rows, cols = shape
    check_both(*problem(tokens, rows, cols, rank=2, dtype=dtype))


@pytest.fixture(params=native.cpu_variants() if native.cpu else [])
def variant(request):
    before = native.module.cpu.variant()
    native.set_cpu_variant(request.param)
    yield request.param
    native.set_cpu_variant(before)


def test_which_variants_have_it(variant):
    """float32 from AVX-512 on, bfloat16 with AVX512-BF16, float16 nowhere (docs/08_kernels.md)."""
    wide = variant.startswith("avx512")
    assert [has_kernel(dtype) for dtype in DTYPES] == [wide, variant == "avx512_bf16", False]
    can_lora = native.module.cpu.can_lora
    assert [can_lora(DTYPE[torch.float32], rank) for rank in (0, 1, 256, 257)] == [False, wide, wide, False]


RANKS = [1, 2, 3, 7, 8, 9, 16, 17, 31, 64, 256]
TAILS = [1, 2, 3, 4, 5, 6, 7, 11, 127, 128, 129, 256, 257, 513]
ODD = [(32, 64), (31, 33), (1, 95), (98, 2)]  # features that fill no strip of 32, no pair of either


@pytest.mark.parametrize("rank", RANKS)
def test_bound_for_every_rank(rank, variant):
    for adapter in DTYPES:
        (x, *rest, A, B, scaling), dy = problem(13, rows=70, cols=67, rank=rank, dtype=torch.bfloat16)
        check_both((x, *rest, A.to(adapter), B.to(adapter), scaling), dy)


@pytest.mark.parametrize("rank", RANKS)
def test_bound_for_every_rank_in_float32(rank, variant):
    """An adapter in 16 bits is that in float32, its gradients rounded."""
    (x, *rest, A, B, scaling), dy = problem(13, rows=70, cols=67, rank=rank)
    check_bounds((x, *rest, A, B, scaling), dy)
    for adapter in (torch.bfloat16, torch.float16):
        narrow = (x, *rest, A.to(adapter), B.to(adapter), scaling)
        wide = (x, *rest, A.to(adapter).float(), B.to(adapter).float(), scaling)
        assert_bits_equal(FORWARD(*narrow), FORWARD(*wide))
        actual, expected = (BACKWARD(*backward_arguments(f, dy)) for f in (narrow, wide))
        for a, e in zip(actual, (expected[0], *(e.to(adapter) for e in expected[1:])), strict=True):
            assert_bits_equal(a, e)


@pytest.mark.parametrize("tokens", TAILS)
def test_bound_of_the_thin_products_for_every_tail(tokens, variant):
    """Tokens that fill no block, odd features."""
    for rows, cols in ODD:
        check_both(*problem(tokens, rows, cols, rank=5, dtype=torch.bfloat16))
        check_bounds(*problem(tokens, rows, cols, rank=5))


@pytest.mark.skipif(not has_kernel(torch.float32), reason="no kernel for LoRA here")
def test_the_error_of_long_sums_is_torchs():
    """u and v over 8192 features, dA and dB over 8192 tokens: not more than twice the error of torch's products."""
    g = torch.Generator().manual_seed(0)
    error = lambda value, exact: (value.double() - exact).square().mean().sqrt().item()
    for tokens, features in ((64, 8192), (8192, 64)):
        zeros = QuantizedTensor.quantize(torch.zeros(features, features)).op_args()
        x, dy, A, B = (torch.randn(s, generator=g) for s in (*2 * [(tokens, features)], (16, features), (features, 16)))
        y = FORWARD(x, *zeros, features, None, A, B, 1.0)
        exact_u, exact_v = x.double() @ A.double().T, dy.double() @ B.double()
        dx, dA, dB = BACKWARD(dy, x, *zeros, A, B, 1.0, True)
        u, v = x @ A.T, dy @ B
        for mine, torchs, exact in (
            (y, u @ B.T, exact_u @ B.double().T),
            (dx, v @ A, exact_v @ A.double()),
            (dA, v.T @ x, exact_v.T @ x.double()),
            (dB, dy.T @ u, dy.double().T @ exact_u),
        ):
            assert error(mine, exact) <= 2 * error(torchs, exact)


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (7, 67, 97, 3), (257, 64, 35, 17), (300, 34, 133, 33), (40, 5000, 70, 16)], ids=str
)
def test_small_integers_are_exact(sizes, adapter, dtype):
    """Every number fits bfloat16 and every sum float32, so a wrong place, pair or rounding is another number."""
    stored = lambda x: x.to(dtype).float()
    tokens, in_features, out_features, rank = sizes
    g = torch.Generator().manual_seed(tokens)
    shapes = (tokens, in_features), (tokens, out_features), (rank, in_features), (out_features, rank)
    x, dy, A, B = (torch.randint(-2, 3, s, generator=g).float() for s in shapes)
    W = torch.randint(-1, 2, (out_features, in_features), generator=g).float()  # NF4 has -1, 0 and 1
    weight = QuantizedTensor.quantize(W, QuantConfig(double_quant=False)).op_args()
    u, v = stored(0.5 * x @ A.T), stored(0.5 * dy @ B)
    expected = x @ W.T + u @ B.T, dy @ W + v @ A, v.T @ x, dy.T @ u
    x, dy, A, B = x.to(dtype), dy.to(dtype), A.to(adapter), B.to(adapter)
    y = FORWARD(x, *weight, out_features, None, A, B, 0.5)
    outputs = y, *BACKWARD(dy, x, *weight, A, B, 0.5, True)
    for actual, value, name in zip(outputs, expected, ("y", "dx", "dA", "dB"), strict=True):
        assert_bits_equal(actual + 0, value.to(actual.dtype) + 0, name)  # + 0: no minus zero


@pytest.mark.parametrize("dtype", NATIVE)
def test_no_dependence_on_the_number_of_threads(dtype):
    """Nor does a token's row depend on the tokens beside it."""
    forward, dy = problem(301, rows=1200, cols=1333, rank=20, dtype=dtype)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((FORWARD(*forward), *BACKWARD(*backward_arguments(forward, dy))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_bits_equal(a, b)
    x, *rest = forward
    assert_bits_equal(FORWARD(x[-40:], *rest), results[0][0][-40:])


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("tokens", [3, 35])
def test_infinity_and_nan_are_passed_on(tokens, dtype):
    """To the outputs they belong to, and to no other: padding must not turn them into NaN."""
    (x, *weight, rows, _, A, B, _), dy = problem(tokens, rows=33, cols=35, rank=3, dtype=dtype, bias=False)
    A, B, x, dy, others = A.abs(), B.abs(), x.abs(), dy.abs(), [t for t in range(tokens) if t != 1]
    weight[0] = torch.full_like(weight[0], 0xFF)  # +1 everywhere: no two signs meet
    x[1, 34] = torch.inf
    y = FORWARD(x, *weight, rows, None, A, B, 1.0)
    assert y[1].isinf().all() and y[others].isfinite().all()
    dx, dA, dB = BACKWARD(dy, x, *weight, A, B, 1.0, True)
    assert dx.isfinite().all() and dA[:, 34].isinf().all() and dA[:, :34].isfinite().all() and dB.isinf().all()
    dy[1, 32] = torch.inf
    dx, *_ = BACKWARD(dy, x, *weight, A, B, 1.0, True)
    assert dx[1].isinf().all() and dx[others].isfinite().all()
    x[1, 34] = torch.nan
    y = FORWARD(x, *weight, rows, None, A, B, 1.0)
    assert y[1].isnan().all() and y[others].isfinite().all()


@pytest.mark.parametrize("dtype", NATIVE)
def test_nothing_behind_the_inputs_is_read(dtype):
    """A panel, a strip and a pair reach past the last feature and token; what lies there must not count."""
    (x, *rest, A, B, scaling), dy = problem(41, rows=33, cols=35, rank=3, dtype=dtype, bias=False)
    results = []
    for last in (0.0, torch.nan, torch.inf):
        cut = [torch.cat((t.flatten(), t.new_full((4096,), last)))[: t.numel()].view_as(t) for t in (x, dy, A, B)]
        forward = (cut[0], *rest, *cut[2:], scaling)
        results.append((FORWARD(*forward), *BACKWARD(*backward_arguments(forward, cut[1]))))
    for other in results[1:]:
        for a, b, name in zip(other, results[0], ("y", "dx", "dA", "dB"), strict=True):
            assert_bits_equal(a, b, name)


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize(
    "config", [QuantConfig(), QuantConfig(double_quant=False, block_size=128)], ids=["nested", "flat"]
)
@pytest.mark.parametrize("tokens", [5, 70])
def test_bound_nested_and_flat(tokens, config, dtype):
    (x, *old, A, B, scaling), dy = problem(tokens, rows=100, cols=256, rank=5, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    weight = QuantizedTensor.quantize(torch.randn(100, 256, generator=g), config).op_args()
    check_both((x, *weight, *old[len(weight) :], A, B, scaling), dy)


@pytest.mark.parametrize("dtype", NATIVE)
def test_an_adapter_of_the_wrong_shape_is_refused(dtype):
    (x, *rest, A, B, scaling), dy = problem(3, dtype=dtype)
    for a, b in ((A[:, 1:], B), (A, B[1:]), (A[1:], B), (A, B.T)):
        with pytest.raises(ValueError, match="for this layer they must be"):
            FORWARD(x, *rest, a, b, scaling)
        with pytest.raises(ValueError, match="for this layer they must be"):
            BACKWARD(*backward_arguments((x, *rest, a, b, scaling), dy))


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("tokens", [6, 140])
def test_strided_and_batched_inputs_give_the_same_bits(tokens, dtype):
    """x, dy, A and B as slices or transposed, and with two batch dimensions."""
    (x, *rest), dy = problem(tokens, dtype=dtype)
    y, grads = FORWARD(x, *rest), BACKWARD(*backward_arguments((x, *rest), dy))
    wide = torch.stack((x, -x), -1)[..., 0]
    dy_t = dy.T.contiguous().T
    assert not wide.is_contiguous() and not dy_t.is_contiguous()
    assert_bits_equal(FORWARD(wide.view(2, tokens // 2, -1), *rest).flatten(0, 1), y)
    *rest, A, B, scaling = rest
    rest += [A.T.contiguous().T, torch.stack((B, -B), -1)[..., 0], scaling]
    again = BACKWARD(*backward_arguments((wide, *rest), dy_t))
    for a, b, name in zip(again, grads, ("dx", "dA", "dB"), strict=True):
        assert_bits_equal(a, b, name)


@pytest.mark.parametrize("dtype", NATIVE)
def test_without_dx_the_adapter_gets_the_same_gradient(dtype):
    forward, dy = problem(140, dtype=dtype)
    _, dA, dB = BACKWARD(*backward_arguments(forward, dy))
    nothing, dA2, dB2 = BACKWARD(*backward_arguments(forward, dy, need_dx=False))
    assert nothing.numel() == 0
    assert_bits_equal(dA2, dA), assert_bits_equal(dB2, dB)


def test_gradients_are_those_of_the_function():
    """gradcheck in float64, where W' is exact."""
    (x, *rest), _ = problem(3, rows=4, cols=6, rank=2, dtype=torch.float64)
    *weight, rows, bias, A, B, scaling = rest
    leaves = [t.double().requires_grad_() for t in (x, bias, A, B)]
    call = lambda x, bias, A, B: FORWARD(x, *weight, rows, bias, A, B, scaling)
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("tokens", [6, 140])
def test_autocast_leaves_the_products_in_the_dtype_of_x(tokens):
    forward, dy = problem(tokens)
    y, grads = FORWARD(*forward), BACKWARD(*backward_arguments(forward, dy))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_bits_equal(FORWARD(*forward), y)
        for a, b in zip(BACKWARD(*backward_arguments(forward, dy)), grads, strict=True):
            assert_bits_equal(a, b)


def layer(rows=64, cols=64, dropout=0.0):
    torch.manual_seed(0)
    module = LoRALinear(Linear4bit.from_linear(torch.nn.Linear(cols, rows)), 4, 8, dropout)
    torch.nn.init.normal_(module.lora_B)
    return module


def test_with_dropout_the_branch_sees_the_dropped_input():
    module, x = layer(dropout=0.5), torch.randn(140, 64)
    torch.manual_seed(1)
    y = module.train()(x)
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(x, 0.5)
    branch = torch.nn.functional.linear(torch.nn.functional.linear(dropped, module.lora_A), module.lora_B)
    assert_bits_equal(y, module.base_layer(x) + module.scaling * branch)


def test_output_with_a_graph_is_an_ordinary_tensor():
    """Its storage is that of the result, it can be changed in place, and its bits are those without a graph."""
    module, x = layer(), torch.randn(140, 64)
    y = module(x.requires_grad_())
    with torch.no_grad():
        assert_bits_equal(y.detach(), module(x))
    assert y.untyped_storage().nbytes() == y.nbytes and y.is_contiguous() and y.requires_grad
    expected = torch.autograd.grad(y.sum(), x)[0]
    assert_bits_equal(torch.autograd.grad(module(x).mul_(2).sum(), x)[0], 2 * expected)


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = layer(96, 64), layer(64, 96)

    def forward(self, x):
        return x + self.last(torch.nn.functional.silu(self.first(x)))


@pytest.mark.parametrize("short", [True, False], ids=["short way", "long way"])
def test_recomputation_stops_before_the_last_product(monkeypatch, short):
    """Two layers are two products forward and one again, not two; the gradients are those without checkpointing."""
    model, x = TwoLayers(), torch.randn(140, 64, requires_grad=True)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(model(x).sum(), leaves)
    calls, forward, product = [], native.cpu.lora_linear_4bit, bound_lora.product
    if short:
        monkeypatch.setattr(bound_lora, "product", lambda b, x, *a: calls.append(x.shape) or product(b, x, *a))
    else:
        monkeypatch.setattr(bound_lora, "lora_linear", lambda *_: None)
        monkeypatch.setattr(native.cpu, "lora_linear_4bit", lambda x, *a: calls.append(x.shape) or forward(x, *a))
    y = checkpoint(model, x, use_reentrant=False)
    assert calls == [(140, 64), (140, 96)]
    actual = torch.autograd.grad(y.sum(), leaves)
    assert calls == [(140, 64), (140, 96), (140, 64)]
    for a, e in zip(actual, expected, strict=True):
        assert_bits_equal(a, e)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_one_layer_alone(use_reentrant):
    module, x = layer(), torch.randn(6, 64, requires_grad=True)
    expected = torch.autograd.grad(module(x).sum(), [x, module.lora_A])
    checkpoint(module, x, use_reentrant=use_reentrant).sum().backward()
    assert_bits_equal(x.grad, expected[0]), assert_bits_equal(module.lora_A.grad, expected[1])
