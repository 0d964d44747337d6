"""One list of cases for every op: it feeds the parity tests, opcheck and the benchmarks. An op without a case fails.

A case is an op, a parity class and parameters; its `id` prints all of them and is the filter that reruns just that one:

    pytest tests/test_parity.py -k "dequantize_4bit-n129"

Adding an op: add it to `ops.OP_NAMES`, write a function here that turns parameters into arguments, list its cases.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ..quantized import QuantConfig, QuantizedTensor
from ..reference.codebook import NAMES, get_codebook
from ..reference.double_quant import absmax_mean

EXACT, BOUND = "EXACT", "BOUND"  # parity classes, see docs/07_parity.md
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SIZES = (0, 1, 2, 31, 64, 129, 1000, 4096 + 17)  # empty, one, odd, ragged, several blocks


def _normal(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, generator=generator)


def _with(edit):
    def make(n, generator):
        x = _normal(n, generator)
        return edit(x, generator) if n else x

    return make


def _fill(x, value, start=0, step=1):
    x[start::step] = value
    return x


def _ties(x, generator):
    """Every block holds a 1 and otherwise the thresholds of every table: exact ties."""
    ties = torch.cat([get_codebook(name).thresholds for name in NAMES])
    ties = ties[ties.isfinite()]
    x = ties[torch.randint(len(ties), (x.numel(),), generator=generator)]
    return _fill(x, 1.0, step=32)


def _knife_edge(x, generator):
    """Values within an ulp or two of threshold * absmax: x / absmax and x * (1 / absmax) often get different codes."""
    thresholds = get_codebook("nf4").thresholds
    n = x.numel()
    absmax = torch.rand(-(-n // 32), generator=generator) + 1
    x = thresholds[torch.randint(15, (n,), generator=generator)] * absmax.repeat_interleave(32)[:n]
    x = x * (1 + torch.randint(-2, 3, (n,), generator=generator) * 2.0**-23)
    x[::32] = absmax
    return x


# name -> function(n, generator) giving (n,) f32; what numerics rule it is about
DATA = {
    "normal": _normal,
    "zeros": _with(lambda x, g: x * 0),
    "signed_zeros": _with(lambda x, g: torch.copysign(x * 0, x)),
    "zero_blocks": _with(lambda x, g: _fill(x.clone(), 0.0, x.numel() // 2)),
    "outlier": _with(lambda x, g: _fill(x, 1e4, step=777)),
    "ties": _with(_ties),
    "knife_edge": _with(_knife_edge),
    "huge_knife_edge": _with(lambda x, g: _knife_edge(x, g) * 2.0**126),
    "subnormal": _with(lambda x, g: x * 1e-39),
    "near_zero_block": _with(lambda x, g: x * 2.0**-126),
    "huge": _with(lambda x, g: x.clamp(-3.9, 3.9) * 2.0**125),
    "plus_minus_max": _with(lambda x, g: _fill(_fill(x, 7.0, 3, 16), -7.0, 1, 16)),
    "nonfinite": _with(lambda x, g: _fill(_fill(x, float("nan"), 5, 301), float("-inf"), 9, 503)),
    "small_rows": _with(lambda x, g: _fill(x, 1e-6, 0, 1) if x.numel() < 128 else _scale_half(x)),
}


def _scale_half(x):
    x[: x.numel() // 2] *= 1e-3  # blocks far below the mean: the double-quantization guard has to act
    return x


@dataclass(frozen=True)
class Case:
    """`arguments(device)` are the arguments of `torch.ops.qlora_ref.<op>`; two calls give equal tensors."""

    op: str
    parity: str
    params: dict = field(hash=False)

    @property
    def id(self) -> str:
        return "-".join([self.op, *(f"{k}{v}" for k, v in self.params.items())])

    def arguments(self, device: str = "cpu") -> tuple:
        generator = torch.Generator().manual_seed(hash_seed(self.id))
        args = _ARGUMENTS[self.op](generator, **self.params)
        return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)


def hash_seed(text: str) -> int:
    """A seed that depends on the case and not on the process (Python's hash() does)."""
    return sum((i + 1) * ord(c) for i, c in enumerate(text)) % 2**31


def _tensor(generator, n, data="normal", dtype="f32") -> torch.Tensor:
    x = DATA[data](n, generator)
    if dtype == "f16" and data.startswith("huge"):
        x = x * 2.0**-112  # the largest that fp16 holds
    return x.to(DTYPES[dtype])


def _quantized(generator, shape, data="normal", quant_type="nf4", block=64, nested=True, map8="dynamic", tail=256):
    config = QuantConfig(quant_type, block, nested, map8, tail)
    n = torch.Size(shape).numel()
    return QuantizedTensor.quantize(_tensor(generator, n, data).view(shape), config, check_finite=False)


def _quantize_args(generator, n, data="normal", dtype="f32", quant_type="nf4", block=64, layout="contiguous"):
    if layout == "strided":
        x = _tensor(generator, 2 * n, data, dtype)[::2]
    elif layout == "transposed":
        x = _tensor(generator, n * 3, data, dtype).view(3, n).T
    elif layout == "offset":  # storage not aligned to a vector
        x = _tensor(generator, n + 1, data, dtype)[1:]
    else:
        x = _tensor(generator, n, data, dtype)
    return x, quant_type, block


def _dequantize_args(generator, n, dtype="f32", **how):
    q = _quantized(generator, (n,), **how)
    return *q.op_args(), [n], DTYPES[dtype]


def _double_quantize_args(generator, n, data="normal", map8="dynamic", block=256):
    absmax = _tensor(generator, n, data).abs()
    return absmax, absmax_mean(absmax), map8, block


def _quantize_nested_args(
    generator, n, data="normal", dtype="f32", quant_type="nf4", block=64, map8="dynamic", tail=256, layout="contiguous",
    times=1.0,
):  # fmt: skip
    """`times` the tensor's own mean: another makes many blocks lie below it, where the guard acts."""
    x, *_ = _quantize_args(generator, n, data, dtype, layout=layout)
    _, absmax = torch.ops.qlora_ref.quantize_4bit(x, quant_type, block)
    return x, times * absmax_mean(absmax), quant_type, block, map8, tail


def _quantize_double_args(generator, n, data="normal", dtype="f32", block=64, map8="dynamic", tail=256):
    return *_quantize_args(generator, n, data, dtype, block=block), map8, tail


def _double_dequantize_args(generator, n, data="normal", map8="dynamic", block=256):
    absmax, mean, *_ = _double_quantize_args(generator, n, data, map8, block)
    codes, nested = torch.ops.qlora_ref.double_quantize(absmax, mean, map8, block)
    return codes, nested, mean, map8, block


def _linear_args(generator, m, n, k, dtype="f32", bias=False, **how):
    """x (m, k), weight (n, k): numbers of the scale of a real layer."""
    q = _quantized(generator, (n, k), **how)
    x = _tensor(generator, m * k, "normal", dtype).view(m, k)
    b = _tensor(generator, n, "normal", dtype) if bias else None
    return x, *q.op_args(), n, b


def _linear_backward_args(generator, m, n, k, dtype="f32", **how):
    q = _quantized(generator, (n, k), **how)
    return _tensor(generator, m * n, "normal", dtype).view(m, n), *q.op_args(), k


def _lora_tensors(generator, n, k, rank):
    return torch.randn(rank, k, generator=generator) / k**0.5, torch.randn(n, rank, generator=generator)


def _lora_args(generator, m, n, k, rank=8, dtype="f32", bias=False, **how):
    return *_linear_args(generator, m, n, k, dtype, bias, **how), *_lora_tensors(generator, n, k, rank), 0.25


def _lora_backward_args(generator, m, n, k, rank=8, dtype="f32", **how):
    dy, *weight, k_ = _linear_backward_args(generator, m, n, k, dtype, **how)
    x = _tensor(generator, m * k, "normal", dtype).view(m, k)
    return dy, x, *weight, *_lora_tensors(generator, n, k, rank), 0.25, True


_ARGUMENTS: dict[str, Callable[..., tuple]] = {
    "quantize_4bit": _quantize_args,
    "quantize_4bit_double": _quantize_double_args,
    "dequantize_4bit": _dequantize_args,
    "double_quantize": _double_quantize_args,
    "quantize_4bit_nested": _quantize_nested_args,
    "double_dequantize": _double_dequantize_args,
    "linear_4bit": _linear_args,
    "linear_4bit_backward": _linear_backward_args,
    "lora_linear_4bit": _lora_args,
    "lora_linear_4bit_backward": _lora_backward_args,
}


def _grid(op: str, parity: str, *rows: dict) -> Iterator[Case]:
    for row in rows:
        yield Case(op, parity, row)


def _quantize_cases():
    rows = [dict(n=n, dtype=d) for n in SIZES for d in DTYPES]
    rows += [dict(n=4113, data=data, dtype=d) for data in DATA for d in DTYPES if data != "normal"]
    rows += [dict(n=4113, data=data, quant_type=q) for q in NAMES for data in ("normal", "ties", "plus_minus_max")]
    rows += [dict(n=9001, data=data, block=32) for data in ("knife_edge", "huge_knife_edge")]
    rows += [dict(n=9001, block=2**b, dtype=d) for b in range(5, 13) for d in ("f32", "bf16")]
    rows += [dict(n=1111, layout=layout, dtype=d) for layout in ("strided", "transposed", "offset") for d in DTYPES]
    return _grid("quantize_4bit", EXACT, *rows)


def _quantize_nested_cases():
    rows = [dict(n=n, dtype=d) for n in (*SIZES, 64 * 256, 40001) for d in DTYPES]
    rows += [dict(n=9001, data=data, dtype=d) for data in DATA for d in ("f32", "bf16") if data != "normal"]
    rows += [dict(n=9001, quant_type=q) for q in NAMES if not get_codebook(q, 64).signed_absmax]
    rows += [dict(n=40001, block=2**b, tail=tail) for b in range(5, 13) for tail in (32, 256, 4096)]
    rows += [dict(n=9001, map8="fp8_e4m3", times=times, block=32) for times in (0.0, 0.9, 3.0, -1.0)]
    rows += [dict(n=1111, layout=layout, dtype=d) for layout in ("strided", "transposed", "offset") for d in DTYPES]
    return _grid("quantize_4bit_nested", EXACT, *rows)


def _dequantize_cases():
    rows = [dict(n=n, dtype=d, nested=nested) for n in SIZES for d in DTYPES for nested in (True, False)]
    rows += [dict(n=4113, data=data, dtype=d, nested=nested)
             for data in DATA if data != "normal" for d in DTYPES for nested in (True, False)]  # fmt: skip
    rows += [dict(n=4113, quant_type=q, dtype=d, nested=False) for q in NAMES for d in DTYPES]
    rows += [dict(n=40001, block=2**b, dtype="bf16", nested=nested) for b in range(5, 13) for nested in (True, False)]
    rows += [dict(n=40001, block=32, map8="fp8_e4m3", tail=tail) for tail in (32, 256, 4096)]
    return _grid("dequantize_4bit", EXACT, *rows)


def _double_rows():
    rows = [dict(n=n) for n in (0, 1, 255, 256, 257, 5000)]
    rows += [dict(n=5000, data=data) for data in DATA if data != "normal"]
    rows += [dict(n=5000, data=data, map8="fp8_e4m3", block=64) for data in ("normal", "small_rows", "zero_blocks")]
    return rows


LINEAR_SHAPES = (  # m, n, k: one token, ragged rows, rows that blocks straddle, "weird", larger than a tile
    (1, 64, 64), (1, 33, 129), (3, 7, 5), (4, 96, 172), (16, 128, 192), (5, 123, 123), (40, 256, 320), (257, 65, 128),
)  # fmt: skip


def _linear_rows(bias: bool = False):
    rows = [dict(m=m, n=n, k=k, dtype=d) for m, n, k in LINEAR_SHAPES for d in DTYPES]
    rows += [dict(m=6, n=128, k=256, dtype=d, nested=False, block=32) for d in DTYPES]
    rows += [dict(m=2, n=64, k=128, quant_type=q, nested=False) for q in NAMES]
    rows += [dict(m=0, n=8, k=64, dtype="f32")]
    if bias:
        rows += [dict(m=9, n=70, k=64, dtype=d, bias=True) for d in DTYPES]
    return rows


def _quantize_double_cases():
    rows = [dict(n=n, dtype=d) for n in (*SIZES, 100_003) for d in DTYPES]
    rows += [dict(n=9001, data=data, block=32) for data in DATA if data != "normal"]
    rows += [dict(n=9001, block=2**b, tail=32, map8="fp8_e4m3") for b in range(5, 13)]
    return _grid("quantize_4bit_double", EXACT, *rows)


ALL = [
    *_quantize_cases(),
    *_quantize_double_cases(),
    *_dequantize_cases(),
    *_grid("double_quantize", EXACT, *_double_rows()),
    *_quantize_nested_cases(),
    *_grid("double_dequantize", EXACT, *_double_rows()),
    *_grid("linear_4bit", BOUND, *_linear_rows(bias=True)),
    *_grid("linear_4bit_backward", BOUND, *_linear_rows()),
    *_grid("lora_linear_4bit", BOUND, *_linear_rows(bias=True)),
    *_grid("lora_linear_4bit_backward", BOUND, *_linear_rows()),
]


def cases(op: str | None = None) -> list[Case]:
    return [case for case in ALL if op in (None, case.op)]
