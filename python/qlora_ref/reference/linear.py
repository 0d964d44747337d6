"""The linear layer of QLoRA (paper equations 5 and 6): forward, and the backward written out by hand.

Storage is 4 bits; computation is not. The weight is dequantized to the dtype of x for each product and dropped again:

    W' = dequantize(packed, absmax)                                 (out, in), in the dtype of x
    y  = x W'^T + bias + s (x A^T) B^T                              x (..., in), y (..., out), s = scaling

    dx = dy W' + s (dy B) A            needs W' again: dequantized again, never kept
    dA = s (dy B)^T x                  (rank, in)
    dB = s dy^T (x A^T)                (out, rank)                  and there is no dW: W is frozen

Forward and backward use the bit-same W'. Autograd saves x, the packed weight and the adapter: 4 bits a weight, not 16.
"""

import torch

from .blockwise import dequantize_blockwise
from .codebook import Codebook


def forward(x, weight, bias, lora_A, lora_B, scale: float) -> torch.Tensor:
    """y = x W'^T + bias + s (x A^T) B^T. All in the dtype of x; `bias` may be None."""
    y = x @ weight.T + scale * ((x @ lora_A.T) @ lora_B.T)
    return y if bias is None else y + bias


def backward(dy, x, weight, lora_A, lora_B, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dA, dB) of `forward` for dy (..., out), x (..., in)."""
    dx = dy @ weight + scale * ((dy @ lora_B) @ lora_A)
    dy, x = dy.flatten(0, -2), x.flatten(0, -2)  # (tokens, out), (tokens, in)
    dA = scale * ((dy @ lora_B).T @ x)
    dB = scale * (dy.T @ (x @ lora_A.T))
    return dx, dA, dB


class QLoRALinear(torch.autograd.Function):
    """`forward` and `backward` around a packed weight.

    apply(x (..., in), packed u8, absmax (n_blocks,) f32, codebook, block_size, (out, in), bias | None, A, B, s).
    `absmax` is the one used for decoding: under double quantization, the reconstructed one.
    """

    @staticmethod
    def forward(ctx, x, packed, absmax, codebook: Codebook, block_size: int, shape, bias, lora_A, lora_B, scale):
        ctx.save_for_backward(x, packed, absmax, lora_A, lora_B)
        ctx.weight_spec = (codebook, block_size, shape, x.dtype)
        ctx.scale, ctx.has_bias = scale, bias is not None
        weight = dequantize_blockwise(packed, absmax, *ctx.weight_spec)
        return forward(x, weight, bias, lora_A, lora_B, scale)

    @staticmethod
    def backward(ctx, dy):
        x, packed, absmax, lora_A, lora_B = ctx.saved_tensors
        weight = dequantize_blockwise(packed, absmax, *ctx.weight_spec)  # the bit-same W', again
        dx, dA, dB = backward(dy, x, weight, lora_A, lora_B, ctx.scale)
        dbias = dy.flatten(0, -2).sum(0) if ctx.has_bias else None
        return dx, None, None, None, None, None, dbias, dA, dB, None
