"""Every operation of the project, declared once: schema, shapes (fake), gradient, and who computes it where.

PyTorch's dispatcher is the backend registry. The reference is registered for every device (CompositeExplicitAutograd);
a native path, where it was built, is registered for its own device key and wins there:

    torch.ops.qlora_ref.NAME --+-- CUDA  -> native.cuda       src/cuda/
                               +-- CPU   -> native.cpu        src/cpp/
                               +-- else  -> the reference     reference/

So nothing here or above asks "which backend?". A 4-bit weight travels as its tensors and the names of its data types
(`_WEIGHT` below): names, not tables, so that torch.compile sees constants. Its tensors may have any shape, and float32
statistics may come as their bytes (uint8), as a module stores them. `Library.define` is used instead of
`custom_op` because it costs a third of the time per call.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.nn.functional import linear

from . import gradients, native
from .arguments import check_decoded_dtype, row_stride
from .direct import direct, direct_kernels
from .reference import blockwise, double_quant
from .reference.codebook import get_codebook
from .reference.double_quant import get_map8

_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? absmax_mean, "
    "str quant_type, int block_size, str map8, int nested_block_size"
)
_WEIGHT_ARGS = gradients.WEIGHT_ARGS
_lib = torch.library.Library("qlora_ref", "DEF")
_lib.define("quantize_4bit(Tensor x, str quant_type, int block_size) -> (Tensor, Tensor)")
_lib.define(f"dequantize_4bit({_WEIGHT}, SymInt[] shape, ScalarType dtype) -> Tensor")
_lib.define(f"dequantize_4bit_out({_WEIGHT}, Tensor(a!) out) -> ()")
_lib.define(
    "quantize_4bit_double(Tensor x, str quant_type, int block_size, str map8, int nested_block_size) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_lib.define("double_quantize(Tensor absmax, Tensor mean, str map8, int nested_block_size) -> (Tensor, Tensor)")
_lib.define(
    "quantize_4bit_nested(Tensor x, Tensor mean, str quant_type, int block_size, str map8, int nested_block_size) "
    "-> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "double_dequantize(Tensor absmax_codes, Tensor nested_absmax, Tensor mean, str map8, int nested_block_size) "
    "-> Tensor"
)
_lib.define(f"linear_4bit(Tensor x, {_WEIGHT}, SymInt out_features, Tensor? bias) -> Tensor")
_lib.define(f"linear_4bit_backward(Tensor dy, {_WEIGHT}, SymInt in_features) -> Tensor")
_lib.define(
    f"lora_linear_4bit(Tensor x, {_WEIGHT}, SymInt out_features, Tensor? bias, "
    "Tensor lora_A, Tensor lora_B, float scaling) -> Tensor"
)
_lib.define(
    f"lora_linear_4bit_backward(Tensor dy, Tensor x, {_WEIGHT}, Tensor lora_A, Tensor lora_B, float scaling, "
    "bool need_dx) -> (Tensor, Tensor, Tensor)"
)
OP_NAMES = (
    "quantize_4bit",
    "quantize_4bit_double",
    "dequantize_4bit",
    "double_quantize",
    "quantize_4bit_nested",
    "double_dequantize",
    "linear_4bit",
    "linear_4bit_backward",
    "lora_linear_4bit",
    "lora_linear_4bit_backward",
)


# --- the reference: what every name means, on any device ---------------------------------------------------------


def _quantize_4bit(x, quant_type, block_size):
    return blockwise.quantize_blockwise(x, get_codebook(quant_type, block_size), block_size, check_finite=False)


def _double_quantize(absmax, mean, map8, nested_block_size):
    return double_quant.double_quantize(absmax, mean, get_map8(map8), nested_block_size)


def _quantize_4bit_nested(x, mean, quant_type, block_size, map8, nested_block_size):
    double_quant.check_double_quant(get_codebook(quant_type, block_size))
    packed, absmax = _quantize_4bit(x, quant_type, block_size)
    return packed, *_double_quantize(absmax, mean, map8, nested_block_size)


def _quantize_4bit_double(x, quant_type, block_size, map8, nested_block_size):
    """With the mean of the tensor's own absmax, the last result."""
    double_quant.check_double_quant(get_codebook(quant_type, block_size))
    packed, absmax = _quantize_4bit(x, quant_type, block_size)
    mean = double_quant.absmax_mean(absmax)
    return packed, *_double_quantize(absmax, mean, map8, nested_block_size), mean


def _double_dequantize(absmax_codes, nested_absmax, mean, map8, nested_block_size):
    return double_quant.double_dequantize(absmax_codes, nested_absmax, mean, get_map8(map8), nested_block_size)


def _dequantize_4bit(
    packed, absmax, nested_absmax, absmax_mean, quant_type, block_size, map8, nested_block_size, shape, dtype
):
    if nested_absmax is None:
        absmax = _floats(absmax)
    else:
        nested, mean = _floats(nested_absmax), _floats(absmax_mean)
        absmax = _double_dequantize(absmax.reshape(-1), nested, mean, map8, nested_block_size)
    codebook = get_codebook(quant_type, block_size)
    return blockwise.dequantize_blockwise(packed.reshape(-1), absmax, codebook, block_size, shape, dtype)


def _floats(stored):
    """float32 values that may be stored as bytes."""
    return stored.reshape(-1).view(torch.float32)


def _dequantize_4bit_out(*args):
    *weight, out = args
    check_decoded_dtype(out.dtype)  # refuse what the kernels refuse
    row_stride(out, out.shape, out.dtype, weight[0].device)
    _count_writing(out)
    out.copy_(_dequantize_4bit(*weight, out.shape, out.dtype))


def _count_writing(out):
    """For autograd, which looks at the count before it uses a tensor that it has saved."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def _linear_4bit(x, *args):
    weight, (out_features, bias) = args[:_WEIGHT_ARGS], args[_WEIGHT_ARGS:]
    return linear(x, _dequantize_4bit(*weight, (out_features, x.shape[-1]), x.dtype), bias)


def _linear_4bit_backward(dy, *args):
    weight, (in_features,) = args[:_WEIGHT_ARGS], args[_WEIGHT_ARGS:]
    return dy @ _dequantize_4bit(*weight, (dy.shape[-1], in_features), dy.dtype)


def _lora_linear_4bit(x, *args):
    """Base path through the dispatcher (so a native base is used), LoRA branch as two thin products."""
    weight, (out_features, bias, lora_A, lora_B, scaling) = args[:_WEIGHT_ARGS], args[_WEIGHT_ARGS:]
    y = torch.ops.qlora_ref.linear_4bit(x, *weight, out_features, bias)
    s = linear(x, lora_A.to(x.dtype)) * scaling  # (..., rank)
    return torch.addmm(y.flatten(0, -2), s.flatten(0, -2), lora_B.to(x.dtype).T).view(y.shape)


def _lora_linear_4bit_backward(dy, x, *args):
    weight, (lora_A, lora_B, scaling, need_dx) = args[:_WEIGHT_ARGS], args[_WEIGHT_ARGS:]
    rows, cols = dy.flatten(0, -2), x.flatten(0, -2)  # (tokens, out), (tokens, in)
    A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    dyB = (rows @ B) * scaling  # (tokens, rank)
    dA = (dyB.T @ cols).to(lora_A.dtype)
    dB = (rows.T @ ((cols @ A.T) * scaling)).to(lora_B.dtype)
    if not need_dx:
        return dy.new_empty(0), dA, dB
    dx = torch.ops.qlora_ref.linear_4bit_backward(rows, *weight, x.shape[-1])
    return torch.addmm(dx, dyB, A).view(x.shape), dA, dB


def _without_autocast(function):
    """The op's dtype is that of its first argument; autocast would change that of the products inside."""

    @wraps(function)
    def call(x, *args):
        if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
            return function(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args)

    return call


_REFERENCE = {name: _without_autocast(globals()[f"_{name}"]) for name in OP_NAMES}
for _name, _function in _REFERENCE.items():
    _lib.impl(_name, _function, "CompositeExplicitAutograd")
_lib.impl("dequantize_4bit_out", _dequantize_4bit_out, "CompositeExplicitAutograd")


# --- shapes and dtypes, for meta tensors, torch.compile and memory traces -----------------------------------------


def _fake(name):
    return torch.library.register_fake(f"qlora_ref::{name}", lib=_lib)


@_fake("quantize_4bit")
def _(x, quant_type, block_size):
    n = x.numel()
    packed = x.new_empty((n + 1) // 2, dtype=torch.uint8)
    return packed, x.new_empty((n + block_size - 1) // block_size, dtype=torch.float32)


@_fake("dequantize_4bit")
def _(packed, absmax, nested_absmax, absmax_mean, quant_type, block_size, map8, nested_block_size, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


@_fake("dequantize_4bit_out")
def _(*args):
    return None


@_fake("double_quantize")
def _(absmax, mean, map8, nested_block_size):
    n = absmax.numel()
    return absmax.new_empty(n, dtype=torch.uint8), absmax.new_empty((n + nested_block_size - 1) // nested_block_size)


@_fake("quantize_4bit_nested")
def _(x, mean, quant_type, block_size, map8, nested_block_size):
    return _fake_double(x, block_size, nested_block_size)


@_fake("quantize_4bit_double")
def _(x, quant_type, block_size, map8, nested_block_size):
    return *_fake_double(x, block_size, nested_block_size), x.new_empty(1, dtype=torch.float32)


def _fake_double(x, block_size, nested_block_size):
    n = x.numel()
    n_blocks = (n + block_size - 1) // block_size
    packed, codes = (x.new_empty(size, dtype=torch.uint8) for size in ((n + 1) // 2, n_blocks))
    return packed, codes, x.new_empty((n_blocks + nested_block_size - 1) // nested_block_size, dtype=torch.float32)


@_fake("double_dequantize")
def _(absmax_codes, nested_absmax, mean, map8, nested_block_size):
    return nested_absmax.new_empty(absmax_codes.numel())


@_fake("linear_4bit")
def _(x, *args):
    return x.new_empty(*x.shape[:-1], args[_WEIGHT_ARGS])


@_fake("linear_4bit_backward")
def _(dy, *args):
    return dy.new_empty(*dy.shape[:-1], args[_WEIGHT_ARGS])


@_fake("lora_linear_4bit")
def _(x, *args):
    return x.new_empty(*x.shape[:-1], args[_WEIGHT_ARGS])


@_fake("lora_linear_4bit_backward")
def _(dy, x, *args):
    lora_A, lora_B, _, need_dx = args[_WEIGHT_ARGS:]
    dx = x.new_empty(x.shape) if need_dx else dy.new_empty(0)
    return dx, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


gradients.register(_lib, _REFERENCE)


# --- straight to the kernel ---------------------------------------------------------------------------------------

linear_4bit, lora_linear_4bit = direct("linear_4bit"), direct("lora_linear_4bit")
quantize_4bit, quantize_4bit_double = direct("quantize_4bit"), direct("quantize_4bit_double")
dequantize_4bit, dequantize_4bit_out = direct("dequantize_4bit"), direct("dequantize_4bit_out")


# --- native backends: names of data types become tables, then straight to the kernel ------------------------------


def _register_native(backend, key: str) -> None:
    def tables(weight):
        packed, absmax, nested_absmax, absmax_mean, quant_type, block_size, map8, nested_block_size = weight
        table8 = None if nested_absmax is None else get_map8(map8)
        return (
            *(packed, absmax, nested_absmax, absmax_mean),
            *(get_codebook(quant_type, block_size), block_size, table8, nested_block_size),
        )

    def quantize_4bit(x, quant_type, block_size):
        return backend.quantize_4bit(x, get_codebook(quant_type, block_size), block_size)

    def dequantize_4bit(*args):
        return backend.dequantize_4bit(*tables(args[:_WEIGHT_ARGS]), *args[_WEIGHT_ARGS:])

    def dequantize_4bit_out(*args):
        *weight, out = args
        _count_writing(out)
        backend.dequantize_4bit(*tables(weight), out.shape, out.dtype, out=out)

    def quantize_4bit_double(x, quant_type, block_size, map8, nested_block_size):
        codebook = get_codebook(quant_type, block_size)
        return backend.quantize_4bit_double(x, codebook, block_size, get_map8(map8), nested_block_size)

    def double_quantize(absmax, mean, map8, nested_block_size):
        return backend.double_quantize(absmax, mean, get_map8(map8), nested_block_size)

    def quantize_4bit_nested(x, mean, quant_type, block_size, map8, nested_block_size):
        codebook = get_codebook(quant_type, block_size)
        return backend.quantize_4bit_nested(x, mean, codebook, block_size, get_map8(map8), nested_block_size)

    def double_dequantize(codes, nested_absmax, mean, map8, nested_block_size):
        return backend.double_dequantize(codes, nested_absmax, mean, get_map8(map8), nested_block_size)

    def linear_4bit(x, *args):
        return backend.linear_4bit_forward(x, *tables(args[:_WEIGHT_ARGS]), *args[_WEIGHT_ARGS:])

    def linear_4bit_backward(dy, *args):
        return backend.linear_4bit_backward(dy, *tables(args[:_WEIGHT_ARGS]), *args[_WEIGHT_ARGS:])

    def lora_linear_4bit(x, *args):
        return backend.lora_linear_4bit(x, *tables(args[:_WEIGHT_ARGS]), *args[_WEIGHT_ARGS:])

    def lora_linear_4bit_backward(dy, x, *args):
        return backend.lora_linear_4bit_backward(dy, x, *tables(args[:_WEIGHT_ARGS]), *args[_WEIGHT_ARGS:])

    kernels: tuple[Callable[..., Any], ...] = (
        quantize_4bit,
        dequantize_4bit,
        dequantize_4bit_out,
        quantize_4bit_double,
        double_quantize,
        quantize_4bit_nested,
        double_dequantize,
    )
    kernels += (linear_4bit, linear_4bit_backward)
    kernels += (_without_autocast(lora_linear_4bit), _without_autocast(lora_linear_4bit_backward))
    for kernel in kernels:
        _lib.impl(kernel.__name__, kernel, key)
        direct_kernels[kernel.__name__, key.lower()] = kernel


if native.cpu is not None:
    _register_native(native.cpu, "CPU")
if native.cuda is not None:
    _register_native(native.cuda, "CUDA")
