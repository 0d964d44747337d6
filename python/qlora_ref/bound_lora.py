"""A 4-bit layer with its adapter on the CPU, with all that does not change looked up once: a training step's short way.

A step of a small model calls its layers hundreds of times, and between two calls the caches fill with activations: the
interpreter's and torch's own data come from memory again. So what counts is how many functions a call needs.

The same bits as the long way, the same tensors saved and the same outputs kept under checkpointing: a block may be
computed one way and recomputed the other. Whatever is more than a plain recorded call (somebody who watches, a tensor
of another class, a gradient of the gradient) takes the long way.
"""

from typing import Any, NamedTuple

import torch

from . import autograd, checkpointing, native
from .arguments import DTYPE, adapter_struct
from .direct import direct, is_watched
from .gradients import MODIFIED

NAME = "lora_linear_4bit"


class _Call(NamedTuple):
    """What a node keeps of the layer. Not as saved tensors: checkpointing calls a function thrice for each of those."""

    weight: Any  # _C's
    tables: tuple  # which `weight` points at
    tensors: tuple[torch.Tensor | None, ...]  # which it points at too: packed, absmax, nested_absmax, absmax_mean
    adapter: tuple[torch.Tensor, torch.Tensor]  # lora_A, lora_B
    state: list[tuple[int, int]]  # where all of them were, and their versions
    spec: tuple  # the rest of op_args
    scaling: float

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, need_dx: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        if torch.compiler.is_compiling():  # compiled autograd follows backward only
            return self._long(dy, x, need_dx)
        now, (lora_A, lora_B) = _state(self.tensors + self.adapter), self.adapter
        if any(version != before for (_, version), (_, before) in zip(now, self.state, strict=True)):
            raise RuntimeError(MODIFIED)
        same = now == self.state and dy.dtype == x.dtype
        if same and type(dy) is torch.Tensor:
            dy = dy.contiguous()
        if not (same and _is_plain(dy) and _is_plain(x)) or torch.is_grad_enabled() or is_watched():
            return self._long(dy, x, need_dx)
        adapter = adapter_struct(x.shape[-1], dy.shape[-1], lora_A, lora_B, self.scaling)
        dx = torch.empty_like(x) if need_dx else None
        dA, dB = torch.empty_like(lora_A), torch.empty_like(lora_B)
        self.weight.lora_linear_4bit_backward(
            *(dy.data_ptr(), x.data_ptr(), DTYPE[x.dtype], x.shape[:-1].numel(), *adapter),
            *(dA.data_ptr(), dB.data_ptr(), 0 if dx is None else dx.data_ptr(), torch.get_num_threads()),
        )
        return dx, dA, dB

    def _long(self, dy: torch.Tensor, x: torch.Tensor, need_dx: bool) -> tuple:
        arguments = (*self.tensors, *self.spec, *self.adapter, self.scaling, need_dx)
        dx, dA, dB = direct("lora_linear_4bit_backward")(dy, x, *arguments)
        return dx if need_dx else None, dA, dB


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lora_A, lora_B, call, output):
        ctx.save_for_backward(x)  # a recomputation stops in here
        ctx.call = call
        return output()

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return *ctx.call.backward(dy, x, ctx.needs_input_grad[0]), None, None


_apply = super(torch.autograd.Function, _Node).apply


def lora_linear(
    layer: Any, x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> torch.Tensor | None:
    """y = x W'^T + bias + scaling (x A^T) B^T for a Linear4bit on the CPU; None where the long way has to be taken."""
    adapter = lora_A, lora_B
    if is_watched() or not (_is_plain(x) and all(map(_is_ready, adapter, (x.dtype, x.dtype))) and _takes(layer, x)):
        return None
    if not native.module.cpu.can_lora(DTYPE[x.dtype], lora_A.shape[0]):
        return None
    struct = adapter_struct(layer.in_features, layer.out_features, lora_A, lora_B, scaling)
    bound, shape = layer._bound, (*x.shape[:-1], layer.out_features)
    if not (torch.is_grad_enabled() and (x.requires_grad or lora_A.requires_grad or lora_B.requires_grad)):
        return product(bound, x, struct, x.new_empty(shape))
    run = checkpointing.current()
    kept = None if run is None else run.take(NAME, shape, x.dtype)
    arguments = layer.op_args()
    tensors, spec = arguments[:4], arguments[4:]
    call = _Call(bound.weight, bound.tables, tensors, adapter, _state(tensors + adapter), spec, scaling)
    if kept is None:
        y = product(bound, x, struct, _apply(x, *adapter, call, lambda: x.new_empty(shape)))
    else:
        y = _apply(x, *adapter, call, lambda: autograd.hollow(x, shape))
        y.data = kept[0]
    if run is not None:
        run.keep(NAME, y)
    return y


def _takes(layer: Any, x: torch.Tensor) -> bool:
    """Whether the layer is bound and multiplies such tokens as they are, if there are any."""
    bound = layer._bound
    fits = bound.is_current(layer) and bound.takes(layer, x.dtype) and x.shape[-1:] == (layer.in_features,)
    return fits and x.numel() > 0


def _is_ready(matrix: torch.Tensor, dtype: torch.dtype) -> bool:
    """A or B as it is stored, and no result of something else: the node keeps it."""
    return _is_plain(matrix) and matrix.is_leaf and matrix.dtype in (torch.float32, dtype)


def product(bound: Any, x: torch.Tensor, struct: tuple, y: torch.Tensor) -> torch.Tensor:
    """The kernel. `struct`: struct Lora of types.h."""
    where = x.data_ptr(), DTYPE[x.dtype], x.shape[:-1].numel(), bound.bias
    bound.weight.lora_linear_4bit_forward(*where, *struct, y.data_ptr(), torch.get_num_threads())
    return y


def _is_plain(t: torch.Tensor) -> bool:
    """An ordinary tensor that the kernels can read where it lies."""
    return autograd.is_ordinary(t) and t.is_cpu and t.is_contiguous()


def _state(tensors: tuple[torch.Tensor | None, ...]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t is not None]
