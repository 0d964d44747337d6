"""Comparison by parity class: nobody types a tolerance.

EXACT  equal bits (any NaN equals any NaN: its payload means nothing).
BOUND  each output of a matrix product lies within the rounding bound of a float64 product of the *same* dequantized
       weight, and its largest error is at most twice that of torch in the same dtype (FlashAttention's rule).

The bound (Higham 2002, section 3): for an inner product of length k accumulated in precision u_acc,

    |y - y64| <= gamma_k (|x| |W|^T) + u_out |y64|,   gamma_k = k u_acc / (1 - k u_acc)

An intermediate that is stored (x A^T) adds its own rounding, pushed through the product that follows. Errors of the
order of the smallest subnormal of the output dtype are added once: near zero a rounding is absolute, not relative.
"""

import torch

from ..reference.blockwise import dequantize_blockwise
from ..reference.codebook import get_codebook
from ..reference.double_quant import double_dequantize, get_map8

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
ACCUMULATE_CPU = 2.0**-24  # IEEE float32 additions
ACCUMULATE_CUDA = 2.0**-22  # tensor cores truncate inside a block (Fasi et al. 2021, PeerJ cs-330)
_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_bits_equal(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Shape, dtype and every bit equal; the message gives the count and the first places that differ."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    actual, expected = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    integer = _INT[actual.element_size()]
    differ = actual.view(integer) != expected.view(integer)
    if actual.is_floating_point():
        differ &= ~(actual.isnan() & expected.isnan())
    if differ.any():
        places = differ.nonzero()[:5].tolist()
        shown = [(tuple(p), actual[tuple(p)].item(), expected[tuple(p)].item()) for p in places]
        raise AssertionError(f"{what}: {int(differ.sum())} of {differ.numel()} differ; (where, is, should be) {shown}")


def ulp_distance(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """Largest distance in units in the last place of float32 tensors (0 = equal bits; -0 and +0 are neighbours)."""

    def ordered(x):
        bits = x.detach().cpu().contiguous().view(torch.int32).long()
        return torch.where(bits < 0, -(bits + 2**31) - 1, bits)

    return int((ordered(actual) - ordered(expected)).abs().max()) if actual.numel() else 0


def gamma(k: int, u: float) -> float:
    return k * u / (1 - k * u)


class Product:
    """A matrix product a @ b in float64 with a bound on what a computation in lower precision may differ by.

    `a` and `b` are (value, error bound) pairs in float64; exact inputs have error 0.
    """

    def __init__(self, a, b, u_acc: float):
        (a, da), (b, db) = a, b
        k = a.shape[-1]
        self.value = a @ b
        magnitude = (a.abs() + da) @ (b.abs() + db)
        self.error = da @ b.abs() + a.abs() @ db + da @ db + gamma(max(k, 1), u_acc) * magnitude

    def plus(self, other, u_acc: float) -> "Product":
        """The sum of two products kept in the accumulator: one more addition."""
        value = self.value + other.value
        self.error = self.error + other.error + u_acc * (self.value.abs() + other.value.abs())
        self.value = value
        return self

    def rounded(self, dtype: torch.dtype, times: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored in `dtype` (rounded `times` times): the pair that the next product takes."""
        info = torch.finfo(dtype)
        u = times * UNIT[dtype]
        error = self.error * (1 + u) + u * self.value.abs() + times * info.tiny * info.eps
        return self.value, error

    def scaled(self, s: float) -> "Product":
        self.value, self.error = self.value * s, self.error * abs(s)
        return self


def exact(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().cpu().double()
    return x, torch.zeros_like(x)


def _transposed(pair):
    return pair[0].mT, pair[1].mT


def weight_of(weight_args, shape, dtype) -> torch.Tensor:
    """W' by the reference, from the eight arguments of an op."""
    packed, absmax, nested, mean, quant_type, block, map8, tail = weight_args
    packed, absmax = packed.cpu(), absmax.cpu()
    if nested is not None:
        absmax = double_dequantize(absmax, nested.cpu(), mean.cpu(), get_map8(map8), tail)
    return dequantize_blockwise(packed, absmax, get_codebook(quant_type, block), block, shape, dtype)


def bounds(op: str, args: tuple, u_acc: float = ACCUMULATE_CPU) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, float64 value, error bound) of every output of a BOUND op for these arguments."""
    return _BOUNDS[op](args, u_acc)


def _branch(x, lora_A, lora_B, scaling, dtype, u_acc):
    """s (x A^T) B^T and its stored middle; the middle is rounded after the product and after the scaling."""
    A, B = exact(lora_A.to(dtype)), exact(lora_B.to(dtype))
    middle = Product(x, _transposed(A), u_acc).scaled(scaling).rounded(dtype, 2)
    return Product(middle, _transposed(B), u_acc)


def _linear(args, u_acc):
    x, *weight, n, bias = args
    W = exact(weight_of(weight, (n, x.shape[-1]), x.dtype))
    y = Product(exact(x), _transposed(W), u_acc)
    if bias is not None:  # torch may round once before adding the bias
        y.error = y.rounded(x.dtype)[1] + u_acc * exact(bias)[0].abs()
        y.value = y.value + exact(bias)[0]
    return [("y", *y.rounded(x.dtype))]


def _linear_backward(args, u_acc):
    dy, *weight, k = args
    W = exact(weight_of(weight, (dy.shape[-1], k), dy.dtype))
    return [("dx", *Product(exact(dy), W, u_acc).rounded(dy.dtype))]


def _lora(args, u_acc):
    x, *weight, n, bias, lora_A, lora_B, scaling = args
    value, error = _linear((x, *weight, n, bias), u_acc)[0][1:]  # the base path, stored
    y = _branch(exact(x), lora_A, lora_B, scaling, x.dtype, u_acc)
    y.value, y.error = y.value + value, y.error + error + u_acc * (y.value.abs() + value.abs())
    return [("y", *y.rounded(x.dtype))]


def _lora_backward(args, u_acc):
    dy, x, *weight, lora_A, lora_B, scaling, _ = args
    dtype, A, B = x.dtype, exact(lora_A.to(x.dtype)), exact(lora_B.to(x.dtype))
    W = exact(weight_of(weight, (dy.shape[-1], x.shape[-1]), dtype))
    dyB = Product(exact(dy), B, u_acc).scaled(scaling).rounded(dtype, 2)  # (m, rank)
    xA = Product(exact(x), _transposed(A), u_acc).scaled(scaling).rounded(dtype, 2)
    base = Product(exact(dy), W, u_acc)
    base.error = base.rounded(dtype)[1]
    dx = base.plus(Product(dyB, A, u_acc), u_acc)
    dA = Product(_transposed(dyB), exact(x), u_acc)
    dB = Product(_transposed(exact(dy)), xA, u_acc)
    return [("dx", *dx.rounded(dtype)), ("dA", *dA.rounded(dtype)), ("dB", *dB.rounded(dtype))]


_BOUNDS = {
    "linear_4bit": _linear,
    "linear_4bit_backward": _linear_backward,
    "lora_linear_4bit": _lora,
    "lora_linear_4bit_backward": _lora_backward,
}


def assert_within_bound(actual, same_dtype_torch, value, bound, what: str) -> None:
    """|actual - value| <= bound everywhere, and max error <= 2 * torch's max error + one rounding of the output."""
    assert actual.shape == value.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(value.shape)}"
    if not value.numel():
        return
    error = (actual.detach().cpu().double() - value).abs()
    assert error.isfinite().all(), f"{what}: {int((~error.isfinite()).sum())} outputs are not finite"
    worst = (error / bound.clamp_min(1e-300)).max().item()
    assert worst <= 1, f"{what}: error is {worst:.3g} times its rounding bound"
    torch_error = (same_dtype_torch.detach().cpu().double() - value).abs().max().item()
    one_rounding = UNIT[same_dtype_torch.dtype] * value.abs().max().item()
    allowed = 2 * torch_error + one_rounding
    assert error.max().item() <= allowed, (
        f"{what}: largest error {error.max().item():.3g}, more than twice torch's {torch_error:.3g}"
    )


def assert_same_refusal(error: type[Exception], one, other, *args) -> None:
    """Both functions raise `error` for these arguments, in the same words."""
    words = []
    for function in (one, other):
        try:
            function(*args)
        except error as refusal:
            words.append(str(refusal))
    assert len(words) == 2, f"{error.__name__} was raised by {len(words)} of two"
    assert words[0] == words[1], f"{words[0]!r} is not {words[1]!r}"
