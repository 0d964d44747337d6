"""Elo ratings of a tournament (paper section 5.3): the update, a replay, and the mean over random orderings.

One match changes both ratings by the same amount, from the ratings before the match:

    expected_a = 1 / (1 + 10 ** ((r_b - r_a) / 400))
    delta      = K * (score_a - expected_a);   r_a += delta;   r_b -= delta

so the sum of all ratings never changes. The result depends on the order of the matches, and the published files
are grouped by pair; hence the paper's rating: the mean of the final ratings over many random orderings.
The paper states K = 32, but its printed Vicuna ratings follow from its own files with K = 4 only.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .tournament import Matches

_ALL_ORDERINGS_LIMIT = 8  # 8! = 40,320 orderings
# Orderings at once: few enough that their ratings stay in cache, and that a large file's permutations stay small.
_CHUNK = 2000
_CHUNK_INDICES = 1 << 24


@dataclass(frozen=True)
class EloSettings:
    """`k` and the logistic curve: a lead of `scale` points means odds of `base` to one."""

    k: float = 4.0
    start: float = 1000.0
    base: float = 10.0
    scale: float = 400.0

    def __post_init__(self) -> None:
        # A K of many scales would overflow base ** (lead / scale); it is no rating either.
        finite = all(map(math.isfinite, (self.k, self.start, self.base, self.scale)))
        if not (finite and 0 < self.k <= 100 * self.scale and self.base > 1):
            raise ValueError(f"Elo needs finite numbers with 0 < k <= 100 * scale and base > 1; got {self}.")


PRESETS = {
    # K inferred from the fit to Table 1; the paper says 32.
    "paper-vicuna": EloSettings(k=4.0),
    # K as the paper states it.
    "paper-oa": EloSettings(k=32.0),
}
PAPER_ORDERINGS = 10_000


@dataclass(frozen=True)
class EloResult:
    """Arrays of shape (n_systems,) in the order of `names`: over the orderings, mean, sample SD, SE of the mean.

    The SE says how well the mean over orderings is known, not how well the systems are.
    """

    names: list[str]
    mean: np.ndarray
    sd: np.ndarray
    se: np.ndarray
    n_orderings: int
    n_matches: int
    settings: EloSettings
    seed: int | None  # None: every ordering was replayed

    def ratings(self) -> dict[str, float]:
        return dict(zip(self.names, map(float, self.mean), strict=True))


def expected_score(r_a: float, r_b: float, settings: EloSettings = EloSettings()) -> float:
    """Probability-like score of a against b. 1100 against 1000 is 0.640."""
    return 1.0 / (1.0 + settings.base ** ((r_b - r_a) / settings.scale))


def replay(matches: Matches, settings: EloSettings = EloSettings()) -> dict[str, float]:
    """Final ratings after the matches in the order given. Deterministic; float64."""
    ratings = [settings.start] * len(matches.names)
    for a, b, outcome in zip(matches.a.tolist(), matches.b.tolist(), matches.outcome.tolist(), strict=True):
        delta = settings.k * (outcome - expected_score(ratings[a], ratings[b], settings))
        ratings[a] += delta
        ratings[b] -= delta
    return dict(zip(matches.names, ratings, strict=True))


def mean_over_orderings(
    matches: Matches, settings: EloSettings = EloSettings(), orderings: int = PAPER_ORDERINGS, seed: int = 0
) -> EloResult:
    """Mean final ratings over `orderings` shuffles without replacement; the same seed gives the same result.

    Vectorised over the orderings, in chunks, so memory does not grow with their number.
    """
    _require_matches(matches)
    if orderings < 2:
        raise ValueError(f"a standard error needs at least 2 orderings, not {orderings}.")
    return _summarise(matches, settings, _shuffles(len(matches), orderings, seed), seed)


def mean_over_all_orderings(matches: Matches, settings: EloSettings = EloSettings()) -> EloResult:
    """The exact mean over every ordering; for at most 8 matches. The SE is zero."""
    _require_matches(matches)
    if len(matches) > _ALL_ORDERINGS_LIMIT:
        raise ValueError(f"{len(matches)} matches have too many orderings; at most {_ALL_ORDERINGS_LIMIT} matches.")
    every = np.array(list(itertools.permutations(range(len(matches)))))
    return _summarise(matches, settings, iter([every]), None)


def _require_matches(matches: Matches) -> None:
    if len(matches) == 0:
        raise ValueError("there are no matches to rate: every row was unparsed, a dropped tie, or set aside.")


def _shuffles(n: int, orderings: int, seed: int) -> Iterator[np.ndarray]:
    """Arrays (chunk, n) of permutations; what is drawn does not depend on the size of the chunks."""
    rng = np.random.default_rng(seed)
    identity = np.arange(n, dtype=np.int32)
    at_once = max(1, min(_CHUNK, _CHUNK_INDICES // n))
    for start in range(0, orderings, at_once):
        chunk = np.broadcast_to(identity, (min(at_once, orderings - start), n))
        yield rng.permuted(chunk, axis=1)


def _summarise(
    matches: Matches, settings: EloSettings, permutations: Iterator[np.ndarray], seed: int | None
) -> EloResult:
    """Two running sums around the start value: enough for mean and SD, and memory stays bounded."""
    count, total, squares = 0, np.zeros(len(matches.names)), np.zeros(len(matches.names))
    for order in permutations:
        away = replay_many(matches, order, settings) - settings.start
        count += len(order)
        total = total + away.sum(axis=0)
        squares = squares + (away * away).sum(axis=0)
    mean = total / count
    if seed is None:
        sd = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
        se = np.zeros_like(sd)
    else:
        sd = np.sqrt(np.maximum(squares - count * mean**2, 0.0) / (count - 1))
        se = sd / math.sqrt(count)
    return EloResult(matches.names, settings.start + mean, sd, se, count, len(matches), settings, seed)


def replay_many(matches: Matches, order: np.ndarray, settings: EloSettings = EloSettings()) -> np.ndarray:
    """Final ratings, (n_orderings, n_systems), of the orderings in `order`, (n_orderings, n_matches) indices.

    One step handles match t of every ordering at once. Ratings are kept in units of scale / ln(base), where the
    expected score is a plain logistic; systems lie along rows so that (a * n + ordering) is a flat index.
    """
    n = len(order)
    unit = settings.scale / math.log(settings.base)
    step = settings.k / unit
    ratings = np.zeros(len(matches.names) * n)
    lane = np.arange(n)
    slot_a, slot_b = matches.a * n, matches.b * n
    for at in np.ascontiguousarray(order.T):
        a, b = slot_a[at] + lane, slot_b[at] + lane
        r_a, r_b = ratings[a], ratings[b]
        delta = step * (matches.outcome[at] - 1.0 / (1.0 + np.exp(r_b - r_a)))
        ratings[a] = r_a + delta
        ratings[b] = r_b - delta
    return settings.start + unit * ratings.reshape(-1, n).T
