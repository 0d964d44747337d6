"""The expected quantization error of N(0,1) weights, by quadrature: what STATISTICAL tests compare samples with.

A block of B values has maximum m with density p(m) = B (2 Phi(m) - 1)^(B-1) 2 phi(m). Given m, the other B - 1 values
are normal truncated to (-m, m), and the maximum itself is stored exactly. So

    E|e|^k = (B-1)/B  integral p(m) integral_{-m}^{m} |x - m q(x/m)|^k phi(x) / (2 Phi(m) - 1) dx dm
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtr


class Error(NamedTuple):
    """Mean and variance per weight of |e| and of e^2, in units of the standard deviation of the weights."""

    mae: float
    mse: float
    var_abs: float
    var_sq: float


def expected_error(levels: torch.Tensor, block_size: int, n_m: int = 200, n_x: int = 400) -> Error:
    """Expected error of the table `levels` (ascending, ends at +-1) on N(0,1) weights in blocks of `block_size`."""
    table = np.sort(np.asarray(levels, np.float64))
    nodes, weights = np.polynomial.legendre.leggauss(n_m)
    m, dm = 4.5 * (nodes + 1), 4.5 * weights  # (0, 9): p(9) < 1e-15 for any block size here
    phi = lambda z: np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    inside = 2 * ndtr(m) - 1
    weight_m = dm * block_size * inside ** (block_size - 2) * 2 * phi(m)  # p(m) / P(|x| < m)
    edges = np.concatenate([[-1.0], (table[1:] + table[:-1]) / 2, [1.0]])
    edges = np.unique(np.clip(np.concatenate([edges, table]), -1, 1))  # |e| has a kink at every level and edge
    u, du = np.polynomial.legendre.leggauss(max(4, n_x // len(edges)))
    x = (edges[:-1, None] + edges[1:, None]) / 2 + (edges[1:, None] - edges[:-1, None]) / 2 * u
    dx = ((edges[1:] - edges[:-1])[:, None] / 2 * du).ravel()
    x = x.ravel()  # in (-1, 1)
    e = np.abs(x - table[np.abs(x[:, None] - table).argmin(1)])
    density = phi(m[:, None] * x) * m[:, None] * dx * weight_m[:, None] * (block_size - 1) / block_size
    moments = [float((density * (m[:, None] * e) ** k).sum()) for k in (1, 2, 4)]
    return Error(moments[0], moments[1], moments[1] - moments[0] ** 2, moments[2] - moments[1] ** 2)
