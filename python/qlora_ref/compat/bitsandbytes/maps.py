"""bitsandbytes' 8-bit maps as functions: 256 float32 values, ascending; fewer bits are padded with zeros."""

import itertools

import numpy as np
import torch
from scipy.special import ndtri

from ...reference.codebook import TAIL, linspace32


def _padded(values) -> torch.Tensor:
    values = np.asarray(values, np.float32)
    padding = np.zeros(256 - len(values), np.float32)
    return torch.from_numpy(np.sort(np.concatenate([values, padding]), kind="stable"))


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> torch.Tensor:
    """Evenly spaced values; odd in number when a zero is wanted."""
    n = 2**total_bits - int(signed and (add_zero or total_bits < 8))
    return _padded(linspace32(-1.0 if signed else 0.0, 1.0, n))


def create_normal_map(offset: float = TAIL, use_extra_value: bool = True) -> torch.Tensor:
    """The NF4 levels (reference/codebook.py) among zeros; without the extra value, seven on each side."""
    n = 9 if use_extra_value else 8
    positive = ndtri(linspace32(offset, 0.5, n)[:-1].astype(np.float64)).astype(np.float32)
    negative = -ndtri(linspace32(offset, 0.5, 8)[:-1].astype(np.float64)).astype(np.float32)
    levels = np.concatenate([positive, negative])
    return _padded(levels / levels.max())


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> torch.Tensor:
    """sign, exponent and fraction of any widths, over the largest value. (As theirs: a larger field means a smaller
    number, which changes the order of codes and not the set of values.)"""
    if exponent_bits + precision_bits + int(signed) != total_bits:
        raise ValueError(f"{exponent_bits} + {precision_bits} + sign bits are not {total_bits}")
    bias = 2 ** (exponent_bits - 1)
    values = []
    for field, bits in itertools.product(range(2**exponent_bits), itertools.product((0, 1), repeat=precision_bits)):
        fraction = sum(bit * 2.0 ** -(i + 1) for i, bit in enumerate(bits))
        value = fraction * 2.0**-bias if field == 0 else (1 + fraction) * 2.0 ** -(field - bias - 1)
        values += [value, -value] if signed else [value]
    table = _padded(values)
    return table / table.max()


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> torch.Tensor:
    """Dynamic tree map (arXiv 1511.04561) of any width; (True, 7, 8) is reference/double_quant.py's."""
    fraction_bits = total_bits - 1 - max_exponent_bits
    values = [0.0, 1.0]
    decades = [(i, int(2.0 ** (i + fraction_bits + (not signed)))) for i in range(max_exponent_bits)]
    decades.append((max_exponent_bits - 1, int(2.0**fraction_bits) - 1))  # bits that no exponent needs
    for i, items in decades:
        if items > 0:
            grid = linspace32(0.1, 1.0, items + 1)
            middles = ((grid[:-1] + grid[1:]) / np.float32(2)).astype(np.float32)
            middles = np.float32(10.0 ** (i - max_exponent_bits + 1)) * middles
            values += list(middles) + (list(-middles) if signed else [])
    return _padded(values)
