"""Sixteen levels and fifteen decision points: what a 4-bit data type is.

A weight divided by its block's absmax lies in [-1, 1]. A data type says which 16 numbers of that interval exist
(`levels`), and a number is stored as the index (`code`) of the nearest one. NF4 (section 3 of the paper) puts the
levels at quantiles of the normal distribution, because trained weights look normal:

    positive side   Q(p) for the first 8 of 9 equally spaced p from d down to 1/2
    negative side  -Q(p) for the first 7 of 8 equally spaced p from d down to 1/2         Q = inverse normal CDF
    and one exact zero; sort; divide by the largest.

d = 0.9677083 is 1 - (1/32 + 1/30)/2 cut to seven digits, a compromise between the half-bin tails of a 16-level and a
15-level quantile code. The *recipe* matters as much as the formula: with a float32 linspace, float64 quantiles, and a
float32 division all 16 published constants come out bit for bit; with "cleaner" float64 arithmetic only about half do.

Nearest level means: count the thresholds (float32 midpoints of neighbours) strictly below s. Ties go to the lower code.
In the four tables that are symmetric about zero, ties go to the smaller *magnitude* instead; moving each negative
threshold one ulp down makes the same counting loop do that. A kernel therefore needs no branch per data type: it gets
levels, thresholds and `order` (sorted position -> code) as data. Adding a type is adding one row to `_ROWS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.special import ndtr, ndtri, stdtrit

TAIL = 0.9677083  # d above: the probability of the outermost quantile


@dataclass(frozen=True)
class Codebook:
    """One 4-bit data type. `levels` (16,) f32 by code; `thresholds` (15,) f32 ascending; `order` (16,) u8.

    `code = order[number of thresholds strictly below s]` and `value = levels[code]`.
    `signed_absmax`: the block is divided by its largest element *with its sign* (BOF4-S) instead of its magnitude.
    """

    name: str
    levels: torch.Tensor
    thresholds: torch.Tensor
    order: torch.Tensor
    signed_absmax: bool = False

    @property
    def zero_code(self) -> int:
        """The code whose level is +0; zero blocks and the padding nibble of an odd count use it."""
        return int(self.order[int((self.thresholds < 0).sum())])


def linspace32(start: float, stop: float, n: int) -> np.ndarray:
    """The float32 linspace of torch's CPU kernel: built from both ends, one rounding of start + step * i.

    Not torch.linspace itself: that follows the default-device context, and a `meta` context at import would break this.
    """
    start32, stop32 = np.float32(start), np.float32(stop)
    step = np.float64((stop32 - start32) / np.float32(n - 1))  # a float32 number, held in float64 for what follows
    i = np.arange(n)
    return np.where(i < n // 2, start32 + step * i, stop32 - step * (n - 1 - i)).astype(np.float32)


def _quantile_levels(quantile) -> np.ndarray:
    """The NF4 recipe for any quantile function (paper section 3 and Appendix E). Returns (16,) float32, ascending."""
    positive = quantile(linspace32(TAIL, 0.5, 9)[:-1].astype(np.float64)).astype(np.float32)  # 8 levels
    negative = -quantile(linspace32(TAIL, 0.5, 8)[:-1].astype(np.float64)).astype(np.float32)  # 7 levels
    levels = np.sort(np.concatenate([negative, np.zeros(1, np.float32), positive]))
    return levels / levels.max()  # float32 division: part of the recipe


def _block_optimal_levels(block_size: int, signed: bool) -> np.ndarray:
    """BOF4 / BOF4-S (Blumenberg et al. 2025, arXiv 2505.06653): the levels of least squared error of w = m x.

    For B values N(0,1) the block maximum m has density p(m) = B (2 Phi(m) - 1)^(B-1) 2 phi(m), and given m the other
    values are normal truncated to (-m, m). Lloyd's iteration on E[m^2 (x - q(x))^2] with 0 and +1 pinned (and -1,
    unless the absmax keeps its sign); both integrals over x are closed forms, only m is integrated numerically.
    """
    nodes, weights = np.polynomial.legendre.leggauss(600)
    m, dm = 6.0 * (nodes + 1.0), 6.0 * weights  # m in (0, 12): beyond, the density is below 1e-30
    phi = lambda z: np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    inside = 2 * ndtr(m) - 1
    weight = dm * block_size * inside ** (block_size - 2) * 2 * phi(m) * m * m  # p(m) m^2 / P(|x| < m)

    levels = _quantile_levels(ndtri).astype(np.float64)
    free = np.ones(16, bool)
    free[[7, 15]] = False
    free[0] = signed
    while True:
        edges = np.concatenate([[-1.0], (levels[:-1] + levels[1:]) / 2, [1.0]])  # (17,)
        scaled = m[:, None] * edges  # (nodes, 17)
        mass = weight @ np.diff(ndtr(scaled), axis=1)  # integral of the density over each cell
        moment = (weight / m) @ -np.diff(phi(scaled), axis=1)  # integral of x times the density
        updated = np.where(free, moment / mass, levels)
        if np.abs(updated - levels).max() < 1e-13:
            return updated.astype(np.float32)
        levels = updated


def midpoints(levels: np.ndarray) -> np.ndarray:
    return ((levels[:-1] + levels[1:]) * np.float32(0.5)).astype(np.float32)


def _value_ordered(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(levels, thresholds, order) of a table whose codes already ascend in value."""
    return levels, midpoints(levels), np.arange(16, dtype=np.uint8)


def _symmetric(magnitudes: list[float], codes: list[int], negative_codes: list[int]):
    """A sign-symmetric table: `magnitudes` ascending from 0 (8 of them), with the code of each sign of each.

    15 distinct values, so one position and one threshold (+inf) stay unused. Negative thresholds sit one ulp lower:
    ties then go to the smaller magnitude on both sides.
    """
    magnitude = (np.array(magnitudes, np.float64) / magnitudes[-1]).astype(np.float32)
    positive = midpoints(magnitude)  # (7,)
    negative = np.nextafter(-positive[::-1], np.float32(-np.inf))
    thresholds = np.concatenate([negative, positive, [np.float32(np.inf)]]).astype(np.float32)
    order = np.array(negative_codes[:0:-1] + codes + codes[-1:], np.uint8)  # -7 .. -1, 0 .. 7, unused
    levels = np.zeros(16, np.float32)  # the "-0" code of the floating-point types decodes to +0
    levels[negative_codes[1:]] = -magnitude[1:]
    levels[codes] = magnitude
    return levels, thresholds, order


_E2M1_BNB_ORDER = [0, 1, 6, 7, 4, 5, 2, 3]  # bitsandbytes numbers its magnitudes out of order


def _float4(magnitudes: list[float], codes: Sequence[int] = range(8)):
    """Sign bit (8) + a 3-bit magnitude index."""
    return _symmetric(magnitudes, list(codes), [c + 8 for c in codes])


# name -> (source, function of the block size giving levels, thresholds, order; signed absmax?)
_ROWS = {
    # this paper, section 3; constants of Appendix E
    "nf4": (lambda block: _value_ordered(_quantile_levels(ndtri)), False),
    # bitsandbytes' "fp4": {0, 1/16, 2, 3, 4, 6, 8, 12}/12. Not E2M1: its subnormal is 0.0052 instead of 0.0833
    "fp4_bnb": (lambda block: _float4([0, 0.0625, 2, 3, 4, 6, 8, 12], _E2M1_BNB_ORDER), False),
    # OCP Microscaling Formats v1.0, element type E2M1 (also MXFP4 and NVFP4)
    "fp4_e2m1": (lambda block: _float4([0, 0.5, 1, 1.5, 2, 3, 4, 6]), False),
    # 3 exponent bits, no mantissa: the paper's Table 2 "FP4 E3M0"
    "fp4_e3m0": (lambda block: _float4([0, 0.25, 0.5, 1, 2, 4, 8, 16]), False),
    # the 15 integers -7..7, symmetric; zero is code 7 and code 15 is unused
    "int4": (lambda block: _symmetric(list(range(8)), list(range(7, 15)), list(range(7, -1, -1))), False),
    # Dotzel et al. 2024, arXiv 2405.03103: the NF4 recipe with Student-t quantiles, 5 degrees of freedom
    "sf4": (lambda block: _value_ordered(_quantile_levels(lambda p: stdtrit(5, p))), False),
    # Blumenberg et al. 2025, arXiv 2505.06653: optimal for one block size; "_s" keeps the sign of the absmax
    "bof4": (lambda block: _value_ordered(_block_optimal_levels(block, signed=False)), False),
    "bof4_s": (lambda block: _value_ordered(_block_optimal_levels(block, signed=True)), True),
}

NAMES = tuple(_ROWS)


@cache
def get_codebook(name: str, block_size: int = 64) -> Codebook:
    """The table of a 4-bit data type. Only `bof4` and `bof4_s` depend on `block_size`.

    Raises ValueError naming the known types if `name` is none of them.
    """
    if name not in _ROWS:
        raise ValueError(f"unknown 4-bit data type '{name}'; known are {', '.join(NAMES)}")
    make, signed = _ROWS[name]
    levels, thresholds, order = (torch.tensor(a, device="cpu") for a in make(block_size))
    return Codebook(name, levels, thresholds, order, signed)
