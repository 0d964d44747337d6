"""Double quantization (paper section 3): the absmax of every block, quantized again.

One float32 absmax per 64 weights costs 32/64 = 0.5 bit a weight. Quantized to 8 bits in blocks of 256 it costs
8/64 + 32/(64*256) = 0.127 bit. The absmax are positive, so their mean is taken off first and the rest is symmetric:

    d = absmax - mean;  nested_absmax = max |d| per 256;  code = nearest map entry to d / nested_absmax
    absmax' = map[code] * nested_absmax + mean                            two roundings, never a fused multiply-add

The mean is computed once in float64 (a float64 sum of float32 values is exact for any realistic tensor, hence the same
in every order) and handed to the kernels. The paper says "8-bit floats"; the authors' code uses the *dynamic* 8-bit
map, twice as accurate here as E4M3. It is our default; `fp8_e4m3` is the option that follows the paper's words.

The encoder guards one thing: a block far below the mean could reconstruct to a *negative* absmax, which would flip the
sign of every weight in it. Where the nearest entry does that, the lowest entry that does not is taken instead.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from .blockwise import block_absmax, count_below, normalize
from .codebook import Codebook, linspace32, midpoints

NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True)
class Map8:
    """An 8-bit data type: `levels` (256,) f32 ascending, `thresholds` (255,) f32, `zero_code` the index of 0."""

    name: str
    levels: torch.Tensor
    thresholds: torch.Tensor
    zero_code: int


def dynamic_map(signed: bool = True) -> torch.Tensor:
    """The 8-bit dynamic data type (Dettmers 2016, arXiv 1511.04561; bitsandbytes' default map). (256,) f32 ascending.

    A byte is a sign, e leading zeros that give the decade 10^-e, a one, and a linear fraction in the bits that are
    left: decade i of 7 holds 2^i fractions (twice as many without a sign), the midpoints of a grid over [0.1, 1].
    """
    values = [0.0, 1.0]
    for i in range(7):
        grid = linspace32(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        fractions = ((grid[:-1] + grid[1:]) / np.float32(2)).astype(np.float32)
        decade = np.float32(10.0 ** (i - 6)) * fractions
        values += list(decade) + (list(-decade) if signed else [])
    return torch.from_numpy(np.sort(np.array(values, np.float32)))


def _fp8_e4m3_map() -> np.ndarray:
    """All finite E4M3 values over their largest, 448; 253 of them (one zero), the rest of the table repeats 1."""
    bits = torch.arange(256, dtype=torch.uint8, device="cpu")
    values = bits.view(torch.float8_e4m3fn).float().numpy()
    values = np.unique(values[np.isfinite(values)]) / np.float32(448)
    return np.concatenate([values, np.ones(256 - len(values), np.float32)])


@cache
def get_map8(name: str = "dynamic") -> Map8:
    """'dynamic' (default), 'dynamic_unsigned' (for Adam's second moment) or 'fp8_e4m3'. ValueError for other names."""
    makers = {
        "dynamic": lambda: dynamic_map(True).numpy(),
        "dynamic_unsigned": lambda: dynamic_map(False).numpy(),
        "fp8_e4m3": _fp8_e4m3_map,
    }
    if name not in makers:
        raise ValueError(f"unknown 8-bit map '{name}'; known are {', '.join(makers)}")
    levels = makers[name]()
    thresholds = np.where(levels[:-1] == levels[1:], np.float32(np.inf), midpoints(levels)).astype(np.float32)
    zero = int(np.flatnonzero(levels == 0)[0])
    return Map8(name, torch.tensor(levels, device="cpu"), torch.tensor(thresholds, device="cpu"), zero)


def absmax_mean(absmax: torch.Tensor) -> torch.Tensor:
    """float32(mean of absmax, summed in float64), shape (1,); 0 for an empty tensor."""
    if absmax.numel() == 0:
        return torch.zeros(1, device=absmax.device)
    return absmax.double().mean().float().reshape(1)


def check_double_quant(codebook: Codebook) -> None:
    """Raise ValueError for a data type whose absmax has a sign: the codes of a mean's deviations cannot hold it."""
    if codebook.signed_absmax:
        raise ValueError(
            f"{codebook.name} keeps the sign of the absmax, which double quantization (it subtracts a mean) "
            "cannot hold; pass double_quant=False"
        )


def _grouped(x: torch.Tensor, size: int) -> torch.Tensor:
    """(n,) -> (ceil(n / size), size), padded with zeros."""
    groups = torch.zeros(-(-x.numel() // size) * size, device=x.device)
    groups[: x.numel()] = x
    return groups.view(-1, size)


def quantize_8bit(x: torch.Tensor, map8: Map8, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blockwise 8-bit quantization of a 1-D f32 tensor: codes (n,) u8 and absmax (ceil(n / block_size),) f32."""
    groups = _grouped(x, block_size)
    absmax = block_absmax(groups, signed=False) if x.numel() else x.new_empty(0)
    codes = count_below(normalize(groups, absmax), map8.thresholds)
    codes = torch.where((absmax == 0)[:, None], map8.zero_code, codes)
    return codes.view(-1)[: x.numel()].to(torch.uint8), absmax


def dequantize_8bit(codes: torch.Tensor, absmax: torch.Tensor, map8: Map8, block_size: int) -> torch.Tensor:
    """map[code] * absmax, (n,) f32."""
    return map8.levels.to(codes.device)[codes.int()] * absmax.repeat_interleave(block_size)[: codes.numel()]


def double_quantize(
    absmax: torch.Tensor, mean: torch.Tensor, map8: Map8, nested_block_size: int = NESTED_BLOCK_SIZE
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_blocks,) f32 absmax and its mean (1,) -> `absmax_codes` (n_blocks,) u8, `nested_absmax` (ceil(n/256),) f32."""
    codes, nested_absmax = quantize_8bit(absmax - mean, map8, nested_block_size)
    # the guard: every entry of the map reconstructed, per group; they ascend, so the first that is >= 0 is the lowest
    entries = map8.levels.to(absmax.device) * nested_absmax[:, None] + mean  # (groups, 256)
    lowest = (entries >= 0).int().argmax(dim=1)
    lowest = lowest.repeat_interleave(nested_block_size)[: codes.numel()]
    return torch.maximum(codes, lowest.to(torch.uint8)), nested_absmax


def double_dequantize(
    absmax_codes: torch.Tensor,
    nested_absmax: torch.Tensor,
    mean: torch.Tensor,
    map8: Map8,
    nested_block_size: int = NESTED_BLOCK_SIZE,
) -> torch.Tensor:
    """absmax' = map[code] * nested_absmax + mean, (n_blocks,) f32: two roundings, no clamp."""
    return dequantize_8bit(absmax_codes, nested_absmax, map8, nested_block_size) + mean
