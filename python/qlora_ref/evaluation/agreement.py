"""How far judges agree: rank correlation over systems, Fleiss kappa over single items (paper section 5.4).

Fleiss kappa on the labels "first, second, tie" changes when pairs are turned around, so the orientation is
fixed here and printed with every value: as stored, or a < b as strings for the comparison after the swap.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau, spearmanr

from .order_bias import swapped_pairs
from .tournament import UNPARSED, Ratings, Vote

CLASSES = (1, 2, 3)


@dataclass(frozen=True)
class ItemAgreement:
    """Agreement over n items: kappa (nan when every rating is of one class), mean pairwise agreement, class shares.

    `unanimous` is the share of items on which all raters agree. `orientation` and `missing` say how the items
    were turned and what became of items without a label.
    """

    n_items: int
    n_raters: int
    kappa: float
    agreement: float
    unanimous: float
    class_shares: tuple[float, ...]
    orientation: str
    missing: str


@dataclass(frozen=True)
class RankAgreement:
    """Kendall tau-b and Spearman rho between the ratings of the systems that both judges rated."""

    systems: list[str]
    kendall_tau: float
    spearman_rho: float


def fleiss_kappa(counts: np.ndarray | Sequence[Sequence[int]]) -> float:
    """Kappa of an (n_items, n_classes) table of how many raters chose each class; the same number of raters a row.

    P = mean_i (sum_c n_ic^2 - n) / (n (n - 1)), P_e = sum_c p_c^2, kappa = (P - P_e) / (1 - P_e);
    nan when P_e = 1, where kappa is undefined. Raises ValueError for a malformed table.
    """
    table = np.asarray(counts, dtype=float)
    if table.ndim != 2 or len(table) == 0:
        raise ValueError("Fleiss kappa needs a table (items, classes) with at least one item.")
    raters = table.sum(axis=1)
    n = raters[0]
    if (raters != n).any() or n < 2:
        raise ValueError("Fleiss kappa needs the same number of raters, at least two, for every item.")
    observed = ((table**2).sum(axis=1) - n).mean() / (n * (n - 1))
    expected = ((table.sum(axis=0) / table.sum()) ** 2).sum()
    return float((observed - expected) / (1 - expected)) if expected < 1 else math.nan


def item_agreement(labels: Sequence[Sequence[int]], orientation: str, missing: str) -> ItemAgreement:
    """Agreement of `labels`, one sequence of n labels (1, 2, 3) an item."""
    if not labels:
        raise ValueError("the judges share no labelled item, so agreement over items is undefined.")
    counts = np.array([[row.count(c) for c in CLASSES] for row in map(list, labels)])
    n = int(counts[0].sum())
    pairwise = ((counts**2).sum(axis=1) - n) / (n * (n - 1))
    shares = counts.sum(axis=0) / counts.sum()
    return ItemAgreement(
        len(counts),
        n,
        fleiss_kappa(counts),
        float(pairwise.mean()),
        float((counts.max(axis=1) == n).mean()),
        tuple(map(float, shares)),
        orientation,
        missing,
    )


def among_annotators(ratings: Ratings) -> ItemAgreement:
    """Between the annotators of a human file, items as stored."""
    if ratings.kind != "human":
        raise ValueError("agreement among annotators needs a human file (rows with the key annotator).")
    return item_agreement(list(ratings.annotations.values()), "as stored: a was shown first", "not applicable")


def between_judges(one: Ratings, other: Ratings) -> ItemAgreement:
    """Two judges on the same items in the same presentation order (a, b, item); unparsed rows dropped."""
    first, second = _one_label_each(one), _one_label_each(other)
    shared = [(label, second[key]) for key, label in first.items() if key in second]
    return item_agreement(shared, "same presentation order, as stored", "no majority = tie; unparsed dropped")


def after_swap(votes: list[Vote]) -> ItemAgreement:
    """A judge against itself when the two answers change places; one vote an item and order."""
    return item_agreement(
        swapped_pairs(votes),
        "a < b as strings; the swapped label is turned back",
        "no majority = tie; unparsed in either order dropped",
    )


def _one_label_each(ratings: Ratings) -> dict[tuple, int]:
    """(a, b, item) -> label: the majority of a human file (no majority = tie), the label of a judge."""
    return {(v.a, v.b, v.item): v.label for v in ratings.item_votes() if v.label != UNPARSED}


def rank_agreement(one: dict[str, float], other: dict[str, float]) -> RankAgreement:
    """Correlation of two sets of (unrounded) ratings over the systems in both; needs at least two."""
    systems = sorted(one.keys() & other.keys())
    if len(systems) < 2:
        raise ValueError(f"the judges share {len(systems)} system(s); a rank correlation needs at least two.")
    x, y = ([ratings[name] for name in systems] for ratings in (one, other))
    return RankAgreement(systems, float(kendalltau(x, y).statistic), float(spearmanr(x, y).statistic))
