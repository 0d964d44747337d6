"""Paired comparison of arms: how far apart, how sure, and whether that is close enough to call them equal.

For differences d_i of replicates i (same seed, same permutation, same data order; only the arm differs):

    mean +- t(0.975, n-1) s / sqrt(n)                                    95 % confidence interval
    TOST (Schuirmann 1987): reject "|difference| >= margin" when both one-sided t tests do; p = the larger of the two

"Not significantly different" is no evidence of equality; TOST is. The margin has to be fixed before looking.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """mean and sd of the paired differences, 95 % interval, p of "no difference", p of TOST; NaN below two pairs."""

    n: int
    mean: float
    sd: float
    low: float
    high: float
    p_difference: float
    p_equivalence: float
    margin: float

    @property
    def equivalent(self) -> bool:
        return self.p_equivalence < 0.05

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "equivalent": self.equivalent}


def compare(arm: dict[Any, float], baseline: dict[Any, float], margin: float) -> Comparison:
    """`arm` minus `baseline` over the replicates both have."""
    from scipy import stats

    pairs = sorted(set(arm) & set(baseline), key=str)
    d = [arm[k] - baseline[k] for k in pairs]
    n = len(d)
    mean = sum(d) / n if n else math.nan
    if n < 2:
        return Comparison(n, mean, *(math.nan,) * 5, margin)
    sd = math.sqrt(sum((x - mean) ** 2 for x in d) / (n - 1))
    error = sd / math.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    if error == 0:
        p_difference, p_equivalence = float(mean == 0), float(abs(mean) >= margin)
    else:
        p_difference = float(2 * stats.t.sf(abs(mean) / error, n - 1))
        p_equivalence = float(stats.t.sf((margin - abs(mean)) / error, n - 1))
    return Comparison(n, mean, sd, mean - half, mean + half, p_difference, p_equivalence, margin)
