"""Bradley-Terry: the same matches rated at once, so there is no K, no ordering and no unconverged leader.

P(x beats y) = p_x / (p_x + p_y), a draw is half a win for each. The strengths are the fixed point of

    p_i <- W_i / sum_j N_ij / (p_i + p_j)          W_i wins plus half the draws, N_ij matches of the pair

and the rating is 400 log10(p) + 1000 with the geometric mean of p at 1, so the mean rating is 1000.
All matches on one question share its difficulty and its answers: the intervals count questions, not matches.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.sparse.csgraph import connected_components

from .tournament import Matches

_CONVERGED = 1e-13
_MAX_SWEEPS = 1_000_000
_Z_95 = 1.959963984540054  # scipy.stats.norm.ppf(0.975)


@dataclass(frozen=True)
class BradleyTerry:
    """Arrays (n_systems,) in the order of `names`: rating on the Elo scale, 95 % interval (nan: one item only)."""

    names: list[str]
    rating: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n_matches: int
    n_items: int

    def ratings(self) -> dict[str, float]:
        return dict(zip(self.names, map(float, self.rating), strict=True))


def fit(matches: Matches, start: float = 1000.0, scale: float = 400.0) -> BradleyTerry:
    """Ratings and intervals. Raises ValueError when some systems never lose to the others: no finite rating then."""
    n = len(matches.names)
    wins = np.zeros((n, n))
    np.add.at(wins, (matches.a, matches.b), matches.outcome)
    np.add.at(wins, (matches.b, matches.a), 1.0 - matches.outcome)
    _require_finite(wins, matches.names)
    strength = _fixed_point(wins)
    rating = scale * np.log10(strength) + start
    se = _clustered_se(matches, strength) * scale / math.log(10)
    n_items = len(set(matches.items))
    return BradleyTerry(matches.names, rating, rating - _Z_95 * se, rating + _Z_95 * se, len(matches), n_items)


def _require_finite(wins: np.ndarray, names: list[str]) -> None:
    """Finite ratings exist if and only if every system beats every other through some chain of wins (Ford 1957)."""
    n_groups, group = connected_components(wins > 0, directed=True, connection="strong")
    if n_groups == 1:
        return
    for g in range(n_groups):
        inside, outside = group == g, group != g
        if not (wins[np.ix_(outside, inside)] > 0).any():
            unbeaten = ", ".join(name for name, i in zip(names, inside, strict=True) if i)
            raise ValueError(
                f"no finite Bradley-Terry rating: no other system ever beat or drew with {{{unbeaten}}} in these "
                "matches. Add matches that connect the systems, or use Elo, which stays finite."
            )


def _fixed_point(wins: np.ndarray) -> np.ndarray:
    played = wins + wins.T
    won = wins.sum(axis=1)
    strength = np.ones(len(wins))
    for _ in range(_MAX_SWEEPS):
        updated = won / (played / (strength[:, None] + strength[None, :])).sum(axis=1)
        updated /= np.exp(np.log(updated).mean())
        change = np.abs(updated - strength).max()
        strength = updated
        # Strengths far above 1 cannot change by less than their own rounding.
        if change < max(_CONVERGED, 4 * np.finfo(float).eps * strength.max()):
            return strength
    raise RuntimeError("Bradley-Terry did not converge; the systems are almost unconnected by wins.")


def _clustered_se(matches: Matches, strength: np.ndarray) -> np.ndarray:
    """SE of the centred log strengths by the sandwich H^+ (sum_g s_g s_g^T) H^+, one score s_g per item g."""
    n = len(strength)
    items = {item: i for i, item in enumerate(dict.fromkeys(matches.items))}
    if len(items) < 2:
        return np.full(n, math.nan)
    p = strength[matches.a] / (strength[matches.a] + strength[matches.b])
    hessian = np.zeros((n, n))
    for i, j, sign in ((matches.a, matches.a, 1), (matches.b, matches.b, 1), (matches.a, matches.b, -1),
                       (matches.b, matches.a, -1)):  # fmt: skip
        np.add.at(hessian, (i, j), sign * p * (1 - p))
    score = np.zeros((len(items), n))
    cluster = np.array([items[item] for item in matches.items])
    np.add.at(score, (cluster, matches.a), matches.outcome - p)
    np.add.at(score, (cluster, matches.b), p - matches.outcome)
    # The likelihood does not move along the all-ones direction; filling it in fixes the mean log strength at 0,
    # as the normalisation of the fit does. (Scores sum to zero, so the filling itself adds nothing.)
    inverse = np.linalg.inv(hessian + np.full((n, n), hessian.trace() / n**2))
    small_sample = len(items) / (len(items) - 1)
    return np.sqrt(small_sample * np.diag(inverse @ (score.T @ score) @ inverse))
