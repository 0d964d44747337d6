"""matmul_4bit: the product every 4-bit layer of bitsandbytes is made of."""

import warnings

import torch
from torch.nn.functional import linear

from ..functional import dequantize_4bit, weight_args
from ..quant_state import QuantState


def matmul_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    quant_state: QuantState,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A (..., K) times the packed weight B (N, K), plus bias (N,), in A's dtype. Gradients for A and bias.

    The backward uses the bit-same weight as the forward. A weight quantized as (K, N) works and warns, as theirs does.
    """
    if quant_state is None:
        raise ValueError("quant_state is required")
    if len(quant_state.shape) != 2:
        raise ValueError("matmul_4bit: quant_state.shape must be 2D [N, K]")
    rows, cols = quant_state.shape
    if A.shape[-1] == rows != cols:
        warnings.warn(
            f"matmul_4bit: weight was quantized from a [K, N] tensor (quant_state.shape={[rows, cols]}). "
            "Re-quantize it in [N, K] (out_features, in_features) orientation.",
            DeprecationWarning,
            stacklevel=2,
        )
        weight = dequantize_4bit(B.reshape(-1, 1), quant_state).to(A.dtype)
        result = linear(A, weight.t(), bias)
    else:
        bias = bias if bias is None else bias.to(A.dtype)
        result = torch.ops.qlora_ref.linear_4bit(A, *weight_args(B, quant_state), rows, bias)
    return result if out is None else out.copy_(result)
