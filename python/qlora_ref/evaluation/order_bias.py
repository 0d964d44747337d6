"""Does the judge prefer the answer it is shown first? (Paper section 5.3: GPT-4 does.)"""

from collections import Counter
from dataclasses import dataclass

from scipy.stats import binomtest

from .tournament import A_WINS, B_WINS, TIE, UNPARSED, Vote


@dataclass(frozen=True)
class OrderBias:
    """Counts over all votes, and over the pairs of votes that differ only in the presentation order.

    first_share: of the decided votes, the share won by the answer shown first (0.5 without bias).
    consistent: both orders name the same system, or both a tie. flipped_to_first: each order names the answer
    it showed first; flipped_to_second likewise. half_tied: one order a tie, the other not.
    p_value: exact sign test of flipped_to_first against flipped_to_second; nan without flips.
    """

    first_wins: int
    second_wins: int
    ties: int
    unparsed: int
    first_share: float
    n_swapped_pairs: int
    consistent: int
    flipped_to_first: int
    flipped_to_second: int
    half_tied: int
    p_value: float


def order_bias(votes: list[Vote]) -> OrderBias:
    """Order-bias statistics of a judge's votes (for human files: of the majority votes)."""
    label = Counter(v.label for v in votes)
    decided = label[A_WINS] + label[B_WINS]
    pairs = Counter(map(_kind_of_pair, swapped_pairs(votes)))
    first, second = pairs["flipped_to_first"], pairs["flipped_to_second"]
    return OrderBias(
        label[A_WINS],
        label[B_WINS],
        label[TIE],
        label[UNPARSED],
        label[A_WINS] / decided if decided else float("nan"),
        pairs.total(),
        pairs["consistent"],
        first,
        second,
        pairs["half_tied"],
        float(binomtest(first, first + second).pvalue) if first + second else float("nan"),
    )


def swapped_pairs(votes: list[Vote]) -> list[tuple[int, int]]:
    """(label of (a, b), label of (b, a) with 1 and 2 exchanged) for a < b as strings; both in terms of a and b.

    Items judged in one order only, and items with an unparsed order, are left out.
    """
    by_key = {(v.a, v.b, v.item): v.label for v in votes}
    turned = {A_WINS: B_WINS, B_WINS: A_WINS, TIE: TIE}
    return [
        (label, turned[by_key[b, a, item]])
        for (a, b, item), label in by_key.items()
        if a < b and label != UNPARSED and by_key.get((b, a, item), UNPARSED) != UNPARSED
    ]


def _kind_of_pair(pair: tuple[int, int]) -> str:
    forward, backward = pair
    if forward == backward:
        return "consistent"
    if TIE in pair:
        return "half_tied"
    return "flipped_to_first" if forward == A_WINS else "flipped_to_second"
