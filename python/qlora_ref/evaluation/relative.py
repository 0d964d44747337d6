"""Scores relative to a baseline system (ChatGPT), in both presentation orders: Table 6 of the paper.

A judge gives each of two answers a score from 0 to 10. Which answer is shown first moves the score, so every
question is judged twice. With m_q (system) and c_q (baseline) the averages of question q over its valid orders:

    column      100 * sum(system) / sum(baseline)      over the valid rows of one order
    mean        100 * sum_q m_q / sum_q c_q            a question without any valid order is dropped
    interval    half width 100 * (m/c - (m - e_m) / (c + e_c)),  e = 1.96 * std(ddof=0) / sqrt(n)

The interval is the paper's (20 of its 20 printed values follow from it): the lower arm of a worst-case ratio,
which ignores that m_q and c_q rise and fall together. `paired_half_width` is the delta method that does not.
"""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .records import BadInput, Notes, item_of, require_keys, set_aside, system_name

HIGHEST_SCORE = 10
Z_95 = 1.96  # the paper's rule, to its two digits


@dataclass(frozen=True)
class OrderColumn:
    """One presentation order of one system. `percent` is nan when no row of that order is valid."""

    n_valid: int
    sum_baseline: float
    sum_system: float
    percent: float


@dataclass(frozen=True)
class RelativeScore:
    """One system's row of the table; all values in percent of the baseline except the counts.

    `first_bonus_points` is how many score points (of 10) an answer gains when it is shown first, averaged over
    the questions that are valid in both orders. The three last estimators are not the paper's: diagnostics.
    """

    system: str
    baseline_first: OrderColumn
    system_first: OrderColumn
    mean_percent: float
    n_questions: int
    ci95_half_width_percent: float
    paired_half_width_percent: float
    first_bonus_points: float
    mean_of_two_orders_percent: float
    pooled_all_ratings_percent: float
    mean_of_ratios_percent: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class RelativeTable:
    baseline: str
    scores: list[RelativeScore]
    n_rows: int
    n_unparsed: int
    notes: Notes = field(default_factory=Notes)


def paper_round(value: float) -> float:
    """One decimal, as the paper prints it (the notes' rule: 1e-9 lifts representable halves)."""
    return round(value + 1e-9, 1)


def relative_table(
    rows: list[dict[str, Any]],
    baseline: str = "chatgpt",
    bad_rows: str = "refuse",
    baseline_answer_ids: Collection[str] | None = None,
) -> RelativeTable:
    """The table of all systems in `rows` (see `records.read_rows`), sorted by mean percent, best first.

    `baseline_answer_ids` are the ids of the baseline's own answers: with them, who was shown first is derived
    from `answer1_id` and must agree with the stored `first`. Raises BadInput for rows that break a rule.
    """
    require_keys(rows, ("system", "score"), "relative scores")
    notes = Notes()
    for row in rows:
        row["first"] = _shown_first(row, baseline, baseline_answer_ids)
    usable = set_aside(
        rows,
        lambda row: "the baseline scored against itself" if row["system"] == baseline else _score_problem(row),
        lambda row: (system_name(row, "system"), row["first"], item_of(row)),
        bad_rows,
        notes,
    )
    parsed = [row for row in usable if tuple(row["score"]) != (-1, -1)]
    by_system: dict[str, list[dict[str, Any]]] = {}
    for row in usable:
        by_system.setdefault(row["system"], []).append(row)
    scores = [_score_system(name, group, baseline, notes) for name, group in by_system.items()]
    scores.sort(key=lambda s: (-s.mean_percent if s.n_questions else math.inf, s.system))
    return RelativeTable(baseline, scores, len(rows), len(usable) - len(parsed), notes)


def _shown_first(row: dict[str, Any], baseline: str, baseline_ids: Collection[str] | None) -> str:
    """`baseline` or the system: never from the file name, which is reversed in 66 of the 72 published files."""
    stored = row.get("first")
    if stored is not None and stored not in (baseline, row["system"]):
        raise BadInput(
            f"{row['_where']}: first is {stored!r}, but only {baseline!r} (the baseline) and {row['system']!r} were "
            "shown; name another baseline with --baseline."
        )
    if baseline_ids is None:
        if stored is None:
            raise BadInput(f"{row['_where']}: no key first; give the baseline's answers with --baseline-answers.")
        return stored
    is_baseline = [str(row.get(key)) in baseline_ids for key in ("answer1_id", "answer2_id")]
    if sum(is_baseline) != 1:
        raise BadInput(f"{row['_where']}: exactly one of answer1_id, answer2_id must be an answer of {baseline}.")
    derived = baseline if is_baseline[0] else row["system"]
    if stored not in (None, derived):
        raise BadInput(f"{row['_where']}: first says {stored!r}, the answer ids say {derived!r}.")
    return derived


def _score_problem(row: dict[str, Any]) -> str | None:
    """None for two numbers in [0, 10] or for the stored "unparsed" [-1, -1]. 0.0 is a score like any other."""
    score = row["score"]
    if not isinstance(score, list) or len(score) != 2:
        return "score is not a pair of numbers"
    if any(isinstance(x, bool) or not isinstance(x, int | float) for x in score):
        return "score is not a pair of numbers"
    if score == [-1, -1]:
        return None
    if not all(0 <= x <= HIGHEST_SCORE for x in score):  # false for nan, too
        return f"score out of range 0..{HIGHEST_SCORE}"
    return None


def _score_system(system: str, rows: list[dict[str, Any]], baseline: str, notes: Notes) -> RelativeScore:
    orders: dict[str, dict[Any, tuple[float, float]]] = {baseline: {}, system: {}}
    seen: dict[Any, set[str]] = {}
    for row in rows:
        item = item_of(row)
        seen.setdefault(item, set()).add(row["first"])
        if row["score"] != [-1, -1]:
            shown_first, shown_second = row["score"]
            pair = (shown_second, shown_first) if row["first"] == baseline else (shown_first, shown_second)
            orders[row["first"]][item] = pair  # (system, baseline)
    _name_missing(system, seen, orders, baseline, notes)

    per_question = [
        tuple(np.mean([orders[first][item] for first in orders if item in orders[first]], axis=0))
        for item in seen
        if any(item in order for order in orders.values())
    ]
    both = [item for item in seen if all(item in order for order in orders.values())]
    bonus = [
        (orders[system][i][0] - orders[baseline][i][0] + orders[baseline][i][1] - orders[system][i][1]) / 2
        for i in both
    ]
    first_columns = {first: _column(list(order.values())) for first, order in orders.items()}
    pooled = [pair for order in orders.values() for pair in order.values()]
    return RelativeScore(
        system,
        first_columns[baseline],
        first_columns[system],
        *_mean_and_intervals(np.array(per_question, dtype=float).reshape(-1, 2)),
        float(np.mean(bonus)) if bonus else math.nan,
        (first_columns[baseline].percent + first_columns[system].percent) / 2,
        _column(pooled).percent,
        _mean_of_ratios(pooled),
    )


def _mean_and_intervals(per_question: np.ndarray) -> tuple[float, int, float, float]:
    """(mean percent, n, paper's half width, paired half width) of an (n, 2) array of m_q, c_q."""
    n = len(per_question)
    m, c = per_question.T
    if n == 0 or c.sum() == 0:
        return math.nan, n, math.nan, math.nan
    ratio = m.sum() / c.sum()
    e_m, e_c = Z_95 * m.std() / math.sqrt(n), Z_95 * c.std() / math.sqrt(n)
    half_width = ratio - (m.mean() - e_m) / (c.mean() + e_c)
    paired = Z_95 * math.sqrt(np.mean((m - ratio * c) ** 2) / n) / c.mean()
    return float(100 * ratio), n, float(100 * half_width), float(100 * paired)


def _column(pairs: list[tuple[float, float]]) -> OrderColumn:
    system, base = (float(sum(x)) for x in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    return OrderColumn(len(pairs), base, system, 100 * system / base if base else math.nan)


def _mean_of_ratios(pairs: list[tuple[float, float]]) -> float:
    return float(100 * np.mean([s / b for s, b in pairs])) if pairs and all(b for _, b in pairs) else math.nan


def _name_missing(system: str, seen: dict, orders: dict, baseline: str, notes: Notes) -> None:
    """Counts what the average does not see: missing halves, questions without a valid order."""
    for item, firsts in seen.items():
        for first in {baseline, system} - firsts:
            notes.add("missing half (the question counts with its other order)", f"{system} {item}, {first} first")
        if not any(item in order for order in orders.values()):
            notes.add("question dropped, no valid order", f"{system} {item}")
