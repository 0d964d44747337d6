"""The derivatives of the ops: the equations of reference/linear.py. Only packed bytes are saved, never W'.

Each rule is what autograd.py's `register` asks for: the shape of the output, what to save, the gradients of the
arguments, and the op on dual tensors (forward mode).
"""

from collections.abc import Callable
from functools import cache

import torch
from torch.autograd.forward_ad import make_dual, unpack_dual

from . import autograd
from .direct import direct

MODIFIED = (
    "the packed weight or the adapter of lora_linear_4bit was modified in place between forward and backward, so its "
    "gradient would be wrong; change weights after backward()"
)
WEIGHT_ARGS = 8  # packed, absmax, nested_absmax, absmax_mean, quant_type, block_size, map8, nested_block_size


_direct = cache(direct)  # the ops do not exist yet when this module is read


def _output_shape(x, *args):  # of each op: behind the weight stands the number of output features
    return *x.shape[:-1], args[WEIGHT_ARGS]


def _save_linear(ctx, inputs):
    x, *weight = inputs[: 1 + WEIGHT_ARGS]
    ctx.save_for_backward(*weight[:4])  # packed, absmax, nested_absmax, absmax_mean
    ctx.spec, ctx.in_features = weight[4:], x.shape[-1]


def _linear_backward(ctx, dy):
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _direct("linear_4bit_backward")(dy, *ctx.saved_tensors, *ctx.spec, ctx.in_features)
    if ctx.needs_input_grad[2 + WEIGHT_ARGS]:
        dbias = dy.flatten(0, -2).sum(0)
    return dx, *[None] * WEIGHT_ARGS, None, dbias


def _versions(tensors) -> list[int]:
    return [t._version for t in tensors if t is not None and not t.is_inference()]


def _save_lora_linear(ctx, inputs):
    x, *weight = inputs[: 1 + WEIGHT_ARGS]
    *_, lora_A, lora_B, ctx.scaling = inputs
    # Frozen, so no saved tensors: checkpointing would count them and offloading move them at every layer. The node
    # keeps them alive, and looks itself whether they are still what they were. So with an adapter that is stored as it
    # is. (bound_lora.py does the same: a block may be computed one way and recomputed the other.)
    stored = lora_A.is_leaf and lora_B.is_leaf and autograd.are_ordinary(x, lora_A, lora_B)
    ctx.weight, ctx.adapter = weight, (lora_A, lora_B) if stored else ()
    ctx.versions = _versions((*weight[:4], *ctx.adapter))
    ctx.save_for_backward(*((x,) if stored else (x, lora_A, lora_B)))


def _lora_linear_backward(ctx, dy):
    x, lora_A, lora_B = ctx.saved_tensors + ctx.adapter
    if _versions((*ctx.weight[:4], *ctx.adapter)) != ctx.versions:
        raise RuntimeError(MODIFIED)
    need_dx = ctx.needs_input_grad[0]
    lora_backward = _direct("lora_linear_4bit_backward")
    dx, dA, dB = lora_backward(dy, x, *ctx.weight, lora_A, lora_B, ctx.scaling, need_dx)
    dbias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2 + WEIGHT_ARGS] else None
    return dx if need_dx else None, *[None] * WEIGHT_ARGS, None, dbias, dA, dB, None


def _linear_dual(*args):
    """Linear in x, and in bias."""
    primals, tangents = autograd.unpack(args)
    dx, dbias = tangents[0], tangents[2 + WEIGHT_ARGS]
    dx = torch.zeros_like(primals[0]) if dx is None else dx
    along = torch.ops.qlora_ref.linear_4bit(dx, *primals[1:-1], dbias)
    return make_dual(torch.ops.qlora_ref.linear_4bit(*primals), along)


# The gradients are ops too, and somebody may differentiate those: dx = dy W' is linear in dy.


def _save_backward(ctx, inputs):
    dy, *weight = inputs[: 1 + WEIGHT_ARGS]
    ctx.save_for_backward(*weight[:4])
    ctx.spec, ctx.out_features = weight[4:], dy.shape[-1]


def _backward_backward(ctx, ddx):
    ddy = torch.ops.qlora_ref.linear_4bit(ddx, *ctx.saved_tensors, *ctx.spec, ctx.out_features, None)
    return ddy, *[None] * WEIGHT_ARGS, None


def _backward_dual(dy, *weight_and_size):
    backward = torch.ops.qlora_ref.linear_4bit_backward
    dy, along = unpack_dual(dy)
    return make_dual(backward(dy, *weight_and_size), backward(along, *weight_and_size))


def register(lib: torch.library.Library, reference: dict[str, Callable]) -> None:
    """`reference`: the functions that compute an op from differentiable ones, by name."""
    ops = torch.ops.qlora_ref
    lora = _output_shape, _save_lora_linear, _lora_linear_backward, reference["lora_linear_4bit"]
    autograd.register(lib, ops.linear_4bit.default, _output_shape, _save_linear, _linear_backward, _linear_dual)
    autograd.register(lib, ops.lora_linear_4bit.default, *lora)
    backward = _output_shape, _save_backward, _backward_backward, _backward_dual
    autograd.register(lib, ops.linear_4bit_backward.default, *backward)
    composite = reference["lora_linear_4bit_backward"]
    autograd.register_composite(lib, ops.lora_linear_4bit_backward.default, composite)
