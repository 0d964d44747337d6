"""The linear layer with many tokens, by panels of decoded weights (src/cpp/product.cpp), and dx = dy W'."""

import pytest
import torch

from qlora_ref import native, ops
from qlora_ref.arguments import DTYPE
from qlora_ref.quantized import QuantConfig, QuantizedTensor
from qlora_ref.testing.compare import assert_bits_equal, assert_within_bound, bounds

pytestmark = pytest.mark.skipif(native.cpu is None, reason=f"no native CPU: {native.missing['cpu']}")
FORWARD, BACKWARD = torch.ops.qlora_ref.linear_4bit, torch.ops.qlora_ref.linear_4bit_backward
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (tokens, out, in). A panel has 64 features; 4096 elements of the sum in bfloat16 and 2048 else, a quarter of it for
# dx; 512 tokens go over it at a time.
SIZES = [
    (33, 64, 64),
    (200, 96, 128),
    (129, 33, 65),  # neither a whole panel, nor pair, nor block a row
    (131, 200, 63),
    (40, 70, 4100),  # two parts of the sum, the second one short
    (34, 4100, 70),  # likewise in dx
    (36, 9000, 64),
    (36, 64, 9000),
    (600, 130, 70),  # two parts of the tokens
    (33, 65, 2600),  # dx by several panels together, the last group of them short
    (40, 72, 4160),  # two parts of whole 64s; the last 8 rows are no whole 16
    (34, 2080, 320),  # three parts in dx, panels together and one more
    (35, 1, 1),
    (35, 2, 1),
]

needs_product = pytest.mark.skipif(
    native.cpu is None or not native.module.cpu.can_linear_4bit_backward(DTYPE[torch.float32], 1),
    reason="this CPU has no variant with panels",
)


def problem(tokens, rows, cols, dtype, config=None):
    g = torch.Generator().manual_seed(tokens + rows)
    weight = QuantizedTensor.quantize(torch.randn(rows, cols, generator=g), config or QuantConfig()).op_args()
    x, dy, bias = (torch.randn(s, generator=g).to(dtype) for s in ((tokens, cols), (tokens, rows), (rows,)))
    return weight, x, dy, bias


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bound(size, dtype, threads):
    threads(1)  # then panels of dx are decoded together as soon as there are 12
    weight, x, dy, bias = problem(*size, dtype)
    for op, arguments in (
        ("linear_4bit", (x, *weight, size[1], bias)),
        ("linear_4bit_backward", (dy, *weight, size[2])),
    ):
        (name, value, bound), *_ = bounds(op, arguments)
        y, torchs = getattr(torch.ops.qlora_ref, op)(*arguments), ops._REFERENCE[op](*arguments)
        assert_within_bound(y, torchs, value, bound, f"{op} {name}")


@needs_product
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_error_of_a_long_sum_is_torchs(dtype):
    """Every 256 elements have a sum of their own, as in a good BLAS: not more than twice the error of torch's."""
    weight, x, dy, _ = problem(64, 64, 8192, dtype, QuantConfig(double_quant=False))
    W = torch.ops.qlora_ref.dequantize_4bit(*weight, (64, 8192), dtype)
    exact = x.double() @ W.double().T
    error = lambda y: (y.double() - exact).square().mean().sqrt().item()
    assert error(FORWARD(x, *weight, 64, None)) <= 2 * error(x @ W.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(),
        QuantConfig(nested_block_size=32),
        QuantConfig(double_quant=False),
        QuantConfig(double_quant=False, block_size=128),
        QuantConfig(double_quant=False, block_size=32),
        QuantConfig("bof4_s", double_quant=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows, cols", [(130, 200), (150, 320), (16, 64)])
def test_the_same_weight_as_dequantize_bit_for_bit(rows, cols, dtype, config, threads):
    """Tokens with a single 1: y are columns of W' and dx are rows of it."""
    threads(1)  # then panels of dx are decoded together
    weight, *_ = problem(1, rows, cols, dtype, config)
    W = torch.ops.qlora_ref.dequantize_4bit(*weight, (rows, cols), dtype)
    assert_bits_equal(FORWARD(torch.eye(cols).to(dtype), *weight, rows, None) + 0, W.T.contiguous() + 0)
    assert_bits_equal(BACKWARD(torch.eye(rows).to(dtype), *weight, cols) + 0, W + 0)  # + 0: no minus zero


@needs_product
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(601, 1000, 2600), (40, 1100, 2600), (40, 4096, 2048), (40, 1100, 2624), (1100, 70, 65)], ids=str
)
def test_no_dependence_on_threads_or_on_the_tokens_beside(size, dtype, threads):
    """How many panels of dx are decoded together depends on the threads; where the sum is cut must not."""
    weight, x, dy, bias = problem(*size, dtype)
    _, rows, cols = size
    results = []
    for number in (1, 2, 3, 5):
        threads(number)
        results.append((FORWARD(x, *weight, rows, bias), BACKWARD(dy, *weight, cols)))
    for y, dx in results[1:]:
        assert_bits_equal(y, results[0][0])
        assert_bits_equal(dx, results[0][1])
    threads(2)
    assert_bits_equal(FORWARD(x[-36:], *weight, rows, bias), results[0][0][-36:])
    assert_bits_equal(BACKWARD(dy[7:8], *weight, cols), results[0][1][7:8])


@needs_product
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_behind_the_inputs_is_read(dtype):
    """With an odd number of features a pair of them would reach into the next token, or past the end."""
    weight, x, dy, _ = problem(40, 33, 65, dtype)
    y, dx = FORWARD(x, *weight, 33, None), BACKWARD(dy, *weight, 65)
    for last in (torch.nan, torch.inf):
        long_x, long_dy = (torch.cat((t.flatten(), t.new_full((64,), last))) for t in (x, dy))
        assert_bits_equal(FORWARD(long_x[: x.numel()].view_as(x), *weight, 33, None), y)
        assert_bits_equal(BACKWARD(long_dy[: dy.numel()].view_as(dy), *weight, 65), dx)
        others, x3, dy3 = [t for t in range(40) if t != 3], x.clone(), dy.clone()
        x3[3], dy3[3] = last, last
        assert_bits_equal(FORWARD(x3, *weight, 33, None)[others], y[others])
        assert_bits_equal(BACKWARD(dy3, *weight, 65)[others], dx[others])


@pytest.mark.parametrize("size", [(40, 0, 64), (40, 64, 0), (0, 64, 64)], ids=str)
def test_empty(size):
    tokens, rows, cols = size
    weight, x, dy, bias = problem(*size, torch.bfloat16, QuantConfig(double_quant=False))
    y, dx = FORWARD(x, *weight, rows, bias), BACKWARD(dy, *weight, cols)
    assert y.shape == (tokens, rows) and dx.shape == (tokens, cols)
    if cols == 0:
        assert_bits_equal(y, bias.expand(tokens, rows).contiguous())
    if rows == 0:
        assert not dx.any()
