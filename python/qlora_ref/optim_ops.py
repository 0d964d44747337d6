"""The two update operations of PagedAdamW that torch has no kernel for, on PyTorch's dispatcher like those in
ops.py.

    adamw_        float32 moments of float32 or bf16 parameters, lists of 1-D pieces
    adamw_8bit_   8-bit moments; every piece starts at a block of 256

The reference serves every device; a native kernel, where built, is registered for its own device key and wins
there. `steps` are float32 tensors of one element, already counted up for this step, on the device of the
pieces.
"""

from typing import Any

import torch
from torch import Tensor

from . import native
from .reference.adamw import AdamWScalars, adamw_step, adamw_step_8bit

_SCALARS = "*, float lr, float beta1, float beta2, float weight_decay, float eps"
_lib = torch.library.Library("qlora_ref", "FRAGMENT")
_lib.define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    f"Tensor[] steps, {_SCALARS}) -> ()"
)
_lib.define(
    "adamw_8bit_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] m_codes, Tensor(c!)[] m_absmax, "
    f"Tensor(d!)[] v_codes, Tensor(e!)[] v_absmax, Tensor[] steps, {_SCALARS}) -> ()"
)


def _adamw(params, grads, exp_avgs, exp_avg_sqs, steps, **scalars):
    for *tensors, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        adamw_step(*tensors, AdamWScalars(int(step), **scalars))


def _adamw_8bit(params, grads, m_codes, m_absmax, v_codes, v_absmax, steps, **scalars):
    rows = zip(params, grads, zip(m_codes, m_absmax, v_codes, v_absmax, strict=True), steps, strict=True)
    for param, grad, states, step in rows:
        adamw_step_8bit(param, grad, states, AdamWScalars(int(step), **scalars))


_lib.impl("adamw_", _adamw, "CompositeExplicitAutograd")
_lib.impl("adamw_8bit_", _adamw_8bit, "CompositeExplicitAutograd")
for _backend, _key in ((native.cpu, "CPU"), (native.cuda, "CUDA")):
    if _backend is not None:
        _lib.impl("adamw_", _backend.adamw, _key)
        _lib.impl("adamw_8bit_", _backend.adamw_8bit, _key)


def update_pieces(bits: int, rows: list[tuple[Tensor, ...]], group: dict[str, Any]) -> None:
    """One call for all pieces of a window that share a parameter group and dtype.

    rows: (param, grad, state fields..., step), 1-D and of one length each; the fields of `bits`-bit states.
    """
    params, grads, *fields, steps = (list(column) for column in zip(*rows, strict=True))
    beta1, beta2 = (float(beta) for beta in group["betas"])
    scalars: dict[str, Any] = dict(lr=float(group["lr"]), beta1=beta1, beta2=beta2)
    scalars |= dict(weight_decay=float(group["weight_decay"]), eps=float(group["eps"]))
    if bits == 8:
        torch.ops.qlora_ref.adamw_8bit_(params, grads, *fields, steps, **scalars)
    elif params[0].dtype == torch.float32:
        m, v = fields
        torch._fused_adamw_(params, grads, m, v, [], steps, amsgrad=False, maximize=False, **scalars)
    else:
        torch.ops.qlora_ref.adamw_(params, grads, *fields, steps, **scalars)
