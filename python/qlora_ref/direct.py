"""Calls that nothing watches go straight to the kernel, past the dispatcher, which would only pass them on.

Decoding one token is hundreds of calls of a millisecond, and between two of them the caches fill with weights: the
interpreter's and torch's own data come from memory again. So what counts is how many functions of torch a call needs.

    direct(name)    the op, past the dispatcher where nobody but autograd looks on
    BoundLinear     the linear layer with all that does not change looked up once: the CPU
    BoundDecoder    the same for dequantize(out=...)
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._C import _get_tracing_state, _is_any_autocast_enabled, _len_torch_dispatch_stack
from torch.autograd import profiler

from . import autograd, native
from .arguments import DTYPE
from .reference.codebook import get_codebook
from .reference.double_quant import get_map8

direct_kernels: dict[tuple[str, str], Callable[..., Any]] = {}  # by name of the op and type of the device


def direct(name: str) -> Callable[..., Any]:
    """The op `name`, past the dispatcher where it would only pass the call on, or record it for backward."""

    op = getattr(torch.ops.qlora_ref, name)

    def call(x, *args):
        if torch.compiler.is_compiling():
            return op(x, *args)
        kernel = direct_kernels.get((name, x.device.type))
        plain = autograd.is_plain(x) and (not isinstance(args[0], torch.Tensor) or autograd.is_plain(args[0]))
        if kernel is None or not plain or _is_followed():
            return op(x, *args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, *args)):
            return kernel(x, *args)
        record = autograd.recorders.get(name)
        return record(kernel, x, *args) if record and autograd.are_ordinary(x, *args) else op(x, *args)

    return call


def _is_followed() -> bool:
    """By forward-mode derivatives, a profiler or a tracer."""
    return autograd.is_forward_mode() or profiler._is_profiler_enabled or _get_tracing_state() is not None


class BoundLinear:
    """y = x W'^T + bias for a Linear4bit on the CPU whose tensors stay where they are; None where that is not all.

    The tensors are recognized by object and address, and bound again where one has changed. Nothing here keeps them
    alive. A copy or a pickle of it is empty: the copied layer binds its own.
    """

    def __init__(self) -> None:
        self._tensors: list[tuple[Callable[[], Any], int]] = []  # weak reference, address
        self.weight: Any = None  # _C's
        self.tables: tuple = ()  # which `weight` points at
        self.bias = 0  # address
        self._bias_dtype: torch.dtype | None = None

    def __call__(self, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        if not x.is_cpu or type(x) is not torch.Tensor or x.requires_grad or is_watched():
            return None
        shape, dtype = x.shape, x.dtype
        if not (self.is_current(layer) and self.takes(layer, dtype)):
            return None
        if not shape or shape[-1] != layer.in_features or not x.is_contiguous():
            return None
        tokens = shape.numel() // layer.in_features
        try:
            address = x.data_ptr()
        except RuntimeError:  # a wrapper of torch.func's, around a tensor that it follows
            return None
        y = x.new_empty((*shape[:-1], layer.out_features))
        arguments = address, DTYPE[dtype], tokens, self.bias, y.data_ptr(), torch.get_num_threads()
        return y if self.weight.linear_4bit_forward(*arguments) else None

    def is_current(self, layer: Any) -> bool:
        """Whether `weight` and `bias` are those of the layer, now bound if need be and possible."""
        return self._is_bound(layer._parameters) or self._bind(layer)

    def takes(self, layer: Any, dtype: torch.dtype) -> bool:
        """Whether an input of this dtype is one that is not cast."""
        return dtype in DTYPE and self._bias_dtype in (None, dtype) and layer.compute_dtype in (None, dtype)

    def _is_bound(self, parameters: dict[str, Any]) -> bool:
        if len(self._tensors) != len(parameters):
            return False
        for (tensor, address), now in zip(self._tensors, parameters.values(), strict=True):
            if tensor() is not now or (now is not None and now.data_ptr() != address):
                return False
        bias = parameters["bias"]
        return bias is None or not bias.requires_grad

    def _bind(self, layer: Any) -> bool:
        """Read the layer's tensors, if the kernel can take them as they are."""
        self._tensors = []
        tensors, bias = list(layer._parameters.values()), layer.bias
        ordinary = all(t is None or _is_ordinary(t) for t in tensors)
        if native.cpu is None or not ordinary or not layer.in_features or not layer.out_features:
            return False
        if bias is not None and bias.numel() != layer.out_features:
            return False  # refused elsewhere, in a sentence
        self.weight, self.tables = _native_weight(layer.op_args(), layer.out_features, layer.in_features)
        self.bias, self._bias_dtype = (0, None) if bias is None else (bias.data_ptr(), bias.dtype)
        self._tensors = [((lambda: None), 0) if t is None else (weakref.ref(t), t.data_ptr()) for t in tensors]
        return True

    def __deepcopy__(self, memo: dict) -> "BoundLinear":
        return BoundLinear()

    def __reduce__(self) -> tuple:
        return BoundLinear, ()


class BoundDecoder:
    """dequantize(out=...) of a QuantizedTensor on the CPU whose tensors stay where they are; False: not done.

    The caller has compared shape, dtype and device. The object's tensors are always the same ones: their addresses say
    whether they have moved (their sizes are not looked at again). Empty in a copy or a pickle, as BoundLinear is.
    """

    def __init__(self) -> None:
        self._addresses: tuple[int, ...] = ()
        self._weight: Any = None  # _C's
        self._tables: tuple = ()  # which _weight points at

    def __call__(self, q: Any, out: torch.Tensor) -> bool:
        if torch.compiler.is_compiling() or not (out.is_cpu and autograd.is_plain(out)) or is_watched():
            return False
        dtype = DTYPE.get(out.dtype)
        if dtype is None or not out.dim() or not out.is_contiguous():
            return False
        addresses: tuple[int, ...]
        if (nested := q.nested_absmax) is None:
            addresses = q.packed.data_ptr(), q.absmax.data_ptr()
        else:
            addresses = q.packed.data_ptr(), q.absmax.data_ptr(), nested.data_ptr(), q.absmax_mean.data_ptr()
        if addresses != self._addresses and not self._bind(q, addresses):
            return False
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)
        self._weight.dequantize_4bit(out.data_ptr(), dtype, q.shape[-1], torch.get_num_threads())
        return True

    def _bind(self, q: Any, addresses: tuple[int, ...]) -> bool:
        tensors = [t for t in q._tensors() if t is not None]
        ordinary = all(autograd.is_plain(t) and t.is_contiguous() and not t.requires_grad for t in tensors)
        if native.cpu is None or not ordinary or not q.shape.numel():
            return False
        rows, cols = q.shape.numel() // q.shape[-1], q.shape[-1]
        self._weight, self._tables = _native_weight(q.op_args(), rows, cols)
        self._addresses = addresses
        return True

    def __deepcopy__(self, memo: dict) -> "BoundDecoder":
        return BoundDecoder()

    def __reduce__(self) -> tuple:
        return BoundDecoder, ()


def _native_weight(op_args: tuple, rows: int, cols: int) -> tuple[Any, tuple]:
    """(_C's Weight, the tables that it points at)."""
    packed, absmax, nested, mean, quant_type, block_size, map8, nested_block_size = op_args
    codebook, table8 = get_codebook(quant_type, block_size), None if nested is None else get_map8(map8)
    weight = packed, absmax, nested, mean, codebook, block_size, table8, nested_block_size
    backend: Any = native.cpu  # both callers have looked that it is there
    arguments, _ = backend._weight(*weight, rows, cols)
    return native.module.cpu.Weight(*arguments), (codebook, table8)


def _is_ordinary(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.nn.Parameter and tensor.is_cpu and tensor.is_contiguous() and not tensor.requires_grad


def is_watched() -> bool:
    """By a tracer, a mode that follows operations, autocast, a transform of torch.func, forward mode or a profiler."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return transformed or _is_followed() or _len_torch_dispatch_stack() != 0 or _is_any_autocast_enabled()
