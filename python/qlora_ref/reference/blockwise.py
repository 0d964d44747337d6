"""Blockwise 4-bit quantization (paper section 2, equations 1 and 2), with the rules that make it exact.

    weight -> blocks of 64 -> absmax of each -> s = x / absmax in [-1, 1] -> nearest of 16 levels -> 4-bit code
    code -> level * absmax -> weight'                                     round once, to the output dtype

Rules that the formulas leave open, fixed here once for every backend:

- blocks run over the flattened tensor; the last one may be short and follows the same rule;
- s = x * (1 / absmax): one IEEE reciprocal per block. Above 2^126 the reciprocal would be subnormal: divide there;
- a block whose absmax is zero or subnormal (below 2^-126) is a *zero block*: absmax 0, every code that of zero;
- NaN or Inf is refused; unchecked, it poisons its whole block (absmax NaN) and cannot pass unnoticed;
- level * absmax is one float32 product and one rounding to the output dtype, never a product of rounded factors.
"""

import torch

from .codebook import Codebook
from .packing import pack, unpack

SMALLEST_NORMAL = 2.0**-126
LARGEST_INVERTIBLE = 2.0**126  # above it 1/x is subnormal
BLOCK_SIZES = tuple(2**k for k in range(5, 13))  # 32 .. 4096


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless `block_size` is a power of two in 32..4096."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be a power of two in 32..4096, not {block_size}; 64 is the paper's choice")


def check_weight(x: torch.Tensor, check_finite: bool = True) -> None:
    """Raise TypeError for a dtype other than fp32, bf16, fp16; ValueError for NaN or Inf if `check_finite`."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"can only quantize float32, bfloat16 or float16 weights, not {x.dtype}; convert with .float()")
    if check_finite and not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(
            f"{bad} of {x.numel()} weights are NaN or Inf; mend the checkpoint, or pass check_finite=False to let each "
            "such block become NaN"
        )


def normalize(blocks: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """s = x * (1 / absmax), or x / absmax where the reciprocal would be subnormal. (n_blocks, B), (n_blocks,) f32."""
    scale = absmax[:, None]
    return torch.where(scale.abs() > LARGEST_INVERTIBLE, blocks / scale, blocks * (1.0 / scale))


def count_below(s: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Number of thresholds strictly below each s (0 for NaN): position of the nearest level, ties to the lower."""
    position = torch.bucketize(s, thresholds.to(s.device), right=False)
    return torch.where(s.isnan(), 0, position)


def block_absmax(blocks: torch.Tensor, signed: bool) -> torch.Tensor:
    """(n_blocks, B) f32 -> (n_blocks,) f32: max |x|; NaN if the block is not finite; 0 if it is a zero block.

    `signed`: the element of largest magnitude with its sign; if +m and -m are both there, +m.
    """
    absmax = blocks.abs().amax(dim=1)
    if signed:
        absmax = torch.where(blocks.amax(dim=1) == absmax, absmax, -absmax)
    absmax = torch.where(blocks.isfinite().all(dim=1), absmax, torch.nan)
    return torch.where(absmax.abs() < SMALLEST_NORMAL, 0.0, absmax)


def quantize_blockwise(
    x: torch.Tensor, codebook: Codebook, block_size: int = 64, check_finite: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a tensor of any shape. Returns `packed` ((n + 1) // 2,) u8 and `absmax` (ceil(n / block_size),) f32.

    Raises TypeError for other dtypes, ValueError for a bad block size or (unless `check_finite=False`) NaN and Inf.
    """
    check_block_size(block_size)
    check_weight(x, check_finite)
    n = x.numel()
    n_blocks = -(-n // block_size)
    if n_blocks == 0:
        return torch.empty(0, dtype=torch.uint8, device=x.device), torch.empty(0, device=x.device)
    blocks = torch.zeros(n_blocks * block_size, device=x.device)  # zeros change neither absmax nor the codes before n
    blocks[:n] = x.reshape(-1).float()  # exact: float32 holds bf16 and fp16
    blocks = blocks.view(n_blocks, block_size)

    absmax = block_absmax(blocks, codebook.signed_absmax)
    s = normalize(blocks, absmax)
    codes = codebook.order.to(x.device)[count_below(s, codebook.thresholds)]
    codes = torch.where((absmax == 0)[:, None], codebook.zero_code, codes).to(torch.uint8)
    return pack(codes.view(-1)[:n], codebook.zero_code), absmax


def dequantize_blockwise(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: Codebook,
    block_size: int,
    shape: tuple[int, ...] | torch.Size,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """weight' = round_dtype(level * absmax), in the given shape and dtype (fp32, bf16 or fp16)."""
    n = torch.Size(shape).numel()
    levels = codebook.levels.to(packed.device)[unpack(packed, n).int()]
    scale = absmax.repeat_interleave(block_size)[:n]
    return (levels * scale).to(dtype).view(shape)
