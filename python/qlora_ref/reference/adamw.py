"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), operation by operation in the order of torch's loop.

    theta <- theta - lr * decay * theta
    m     <- beta1 * m + (1 - beta1) * g                            exp_avg
    v     <- beta2 * v + (1 - beta2) * g^2                          exp_avg_sq
    theta <- theta - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

The formulas leave the roundings open; this file does not. Each line below is one float32 operation, in the
order of `torch.optim.AdamW(foreach=False)`, with the two fused multiply-adds that torch's vector code has (in
`lerp_` and in `addcmul_`) written out, and scalars computed in float64 and rounded once. The square root is
IEEE's: torch on x86 takes MKL's, which is one ulp off for every fifth float32, and that is the only
difference between the two.

The moments are float32, or 8 bits: blocks of 256, the dynamic map for m, its unsigned form for v (arXiv
2110.02861). Parameters are float32 or bf16; a bf16 parameter is computed in float32 and rounded once, at the
end.
"""

from dataclasses import dataclass

import torch

from .double_quant import dequantize_8bit, get_map8, quantize_8bit

STATE_BLOCK_SIZE = 256


@dataclass(frozen=True)
class AdamWScalars:
    """What one step needs besides the tensors; `step` counts from 1."""

    step: int
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01


def fma(a: torch.Tensor | float, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c in float32 with one rounding, on any machine; `a` must be a float32 value.

    The product of two float32 is exact in float64. Its sum with c is rounded *to odd* there (TwoSum gives the
    lost part; if there is one, the last bit is forced to 1), after which rounding to float32 cannot round
    twice.
    """
    product, c = (torch.as_tensor(a, dtype=torch.float64, device=b.device) * b.double()), c.double()
    total = product + c
    rest = total - product
    lost = (product - (total - rest)) + (c - rest)  # TwoSum: product + c == total + lost exactly
    bits = total.view(torch.int64)
    towards = torch.where((lost > 0) == (total > 0), 1, -1)  # one step away from, or to, zero
    odd = torch.where((lost.abs() > 0) & (bits & 1 == 0), bits + towards, bits)
    return odd.view(torch.float64).float()


def ieee_sqrt(x: torch.Tensor) -> torch.Tensor:
    """Correctly rounded float32 square root: float64 has more than the 2 * 24 + 2 bits that this needs."""
    return x.double().sqrt().float()


def round32(x: float) -> float:
    """The float32 nearest to x, as a Python float."""
    return torch.tensor(x, dtype=torch.float32, device="cpu").item()


def adamw_step(
    param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, s: AdamWScalars,
    sqrt=ieee_sqrt,
) -> None:  # fmt: skip
    """One step in place. `param`, `grad`: f32 or bf16; `exp_avg`, `exp_avg_sq`: f32; all of one shape."""
    theta, g, m, v = param.float(), grad.float(), exp_avg, exp_avg_sq
    w1, w2 = round32(1 - s.beta1), round32(1 - s.beta2)

    if s.weight_decay != 0:
        theta = theta * (1 - s.lr * s.weight_decay)
    m = fma(w1, g - m, m) if w1 < 0.5 else fma(-round32(1 - w1), g - m, g)  # lerp_, from the nearer end
    v = fma(g, w2 * g, v * s.beta2)  # mul_, addcmul_

    step_size = s.lr / (1 - s.beta1**s.step)
    denominator = sqrt(v) / ((1 - s.beta2**s.step) ** 0.5) + s.eps
    theta = theta + (-step_size * m) / denominator  # addcdiv_

    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    param.copy_(theta)  # the one rounding of a bf16 parameter


def encode_moments(m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Two 1-D f32 moments -> m codes (n,) u8, m absmax (ceil(n / 256),) f32, and the same two for v.

    Nearest entry of the map by float32 midpoints, ties to the lower; but a v > 0 never becomes 0: the
    smallest entry is taken instead. Otherwise an element 2500 times below the gradients of its block would
    divide m by eps alone.
    """
    m_codes, m_absmax = quantize_8bit(m, get_map8("dynamic"), STATE_BLOCK_SIZE)
    v_codes, v_absmax = quantize_8bit(v, get_map8("dynamic_unsigned"), STATE_BLOCK_SIZE)
    alive = (v > 0) & (v_absmax != 0).repeat_interleave(STATE_BLOCK_SIZE)[: v.numel()]
    return m_codes, m_absmax, torch.where(alive, v_codes.clamp(min=1), v_codes), v_absmax


def decode_moments(
    m_codes: torch.Tensor, m_absmax: torch.Tensor, v_codes: torch.Tensor, v_absmax: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse: two (n,) f32 tensors."""
    m = dequantize_8bit(m_codes, m_absmax, get_map8("dynamic"), STATE_BLOCK_SIZE)
    return m, dequantize_8bit(v_codes, v_absmax, get_map8("dynamic_unsigned"), STATE_BLOCK_SIZE)


def adamw_step_8bit(param: torch.Tensor, grad: torch.Tensor, states: tuple[torch.Tensor, ...], s: AdamWScalars) -> None:
    """One step in place on 1-D tensors; `states` as `encode_moments` returns them. The update uses the exact
    new moments; only what is kept for the next step is rounded to 8 bits."""
    m, v = decode_moments(*states)
    adamw_step(param, grad, m, v, s)
    for kept, new in zip(states, encode_moments(m, v), strict=True):
        kept.copy_(new)
