"""Ratings become matches: pairwise judge files, Open Assistant files keyed by message, human annotations.

A match is (a, b, outcome): a was shown first; outcome 1.0 when a wins, 0.0 when b wins, 0.5 for a draw. Every
rated row is one match and the two presentation orders stay separate matches (the paper's rule). Human files hold
several annotations an item, which become one match by majority.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .judge_parse import parse_threeclass, parse_threeclass_loose
from .records import BadInput, Notes, item_of, require_keys, set_aside, system_name

A_WINS, B_WINS, TIE, UNPARSED = 1, 2, 3, -1
OUTCOME = {A_WINS: 1.0, B_WINS: 0.0, TIE: 0.5}
TIE_POLICIES = ("half", "drop")
UNPARSED_POLICIES = ("drop", "tie")
ANNOTATOR_POLICIES = ("majority", "each", "first")
NO_MAJORITY_POLICIES = ("tie", "drop")


@dataclass(frozen=True)
class Vote:
    """One label for one item in one presentation order; `label` is 1 (a), 2 (b), 3 (tie) or -1 (unparsed)."""

    a: str
    b: str
    item: int | str
    label: int


@dataclass(frozen=True)
class Matches:
    """n matches between the systems `names`; parallel arrays of shape (n,).

    a, b: int64 indices into `names`; outcome: float64 score of a in {0, 0.5, 1} (or a mean of them);
    items: what was judged, the cluster for intervals.
    """

    names: list[str]
    a: np.ndarray
    b: np.ndarray
    outcome: np.ndarray
    items: list[int | str]

    def __len__(self) -> int:
        return len(self.outcome)


@dataclass
class Ratings:
    """A file read: the votes that become matches, label counts over all rows, and what was found on the way."""

    kind: str  # "judge" or "human"
    votes: list[Vote]
    label_counts: Counter
    n_rows: int
    n_without_majority: int = 0
    annotations: dict[tuple, list[int]] = field(default_factory=dict)  # human only: item -> labels as listed
    notes: Notes = field(default_factory=Notes)

    def item_votes(self) -> list[Vote]:
        """One vote an item and order whatever `annotators` was: the majority of a human file, without one a tie.

        Annotators have no identity across items, so the two orders of a pair can only be compared like this.
        """
        if self.kind == "judge":
            return self.votes
        return [Vote(a, b, item, majority_label(labels) or TIE) for (a, b, item), labels in self.annotations.items()]


def read_ratings(
    rows: list[dict[str, Any]],
    bad_rows: str = "refuse",
    annotators: str = "majority",
    no_majority: str = "tie",
    raters: int = 3,
    loose: bool = False,
) -> Ratings:
    """Votes in the order of the file. A row with the key `annotator` makes it a human file.

    `loose` re-reads unparsed rows with a parser that searches the text; it moves ratings away from the paper.
    Raises BadInput for rows that break a rule, and for items without exactly `raters` annotations.
    """
    if rows and "system" in rows[0] and "first" in rows[0]:
        raise BadInput(f"{rows[0]['_where']}: these are relative scores; use `qlora-ref eval relative`.")
    if any("annotator" in row for row in rows):
        return _human_ratings(rows, bad_rows, annotators, no_majority, raters)
    return _judge_ratings(rows, bad_rows, loose)


def _judge_ratings(rows: list[dict[str, Any]], bad_rows: str, loose: bool) -> Ratings:
    require_keys(rows, ("a", "b", "score"), "pairwise ratings")
    notes = Notes()
    good = set_aside(rows, lambda r: _label_problem(r, (1, 2, 3, -1)), _match_key, bad_rows, notes)
    for row in good:
        stored = row["score"] = int(row["score"])
        if isinstance(row.get("last_line"), str) and parse_threeclass(row["last_line"]) != stored:
            notes.add("stored score differs from int(last_line) (stored one used)", row["_where"])
        if loose and stored == UNPARSED:
            row["score"] = parse_threeclass_loose(str(row.get("review") or row.get("last_line") or ""))
            if row["score"] != UNPARSED:
                notes.add("unparsed row recovered by the loose parser (not the paper's rule)", row["_where"])
    votes = [Vote(row["a"], row["b"], item_of(row), row["score"]) for row in good]
    _name_missing_halves(votes, notes)
    return Ratings("judge", votes, Counter(v.label for v in votes), len(rows), notes=notes)


def _human_ratings(
    rows: list[dict[str, Any]], bad_rows: str, annotators: str, no_majority: str, raters: int
) -> Ratings:
    for name, value, allowed in (
        ("annotators", annotators, ANNOTATOR_POLICIES),
        ("no_majority", no_majority, NO_MAJORITY_POLICIES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.")
    require_keys(rows, ("a", "b", "annotator", "score"), "human ratings")
    notes = Notes()
    good = set_aside(
        rows,
        lambda r: _annotator_problem(r) or _label_problem(r, (1, 2, 3)),
        lambda r: (*_match_key(r), r["annotator"]),
        bad_rows,
        notes,
    )
    items: dict[tuple, list[int]] = {}
    for row in good:
        items.setdefault(_match_key(row), []).append(int(row["score"]))
    items = _complete_items(items, raters, bad_rows, notes)
    without = sum(majority_label(labels) is None for labels in items.values())
    votes = []
    for (a, b, item), labels in items.items():
        chosen = {"each": labels, "first": labels[:1]}.get(annotators, [majority_label(labels)])
        for label in chosen:
            if label is None and no_majority == "drop":
                continue
            votes.append(Vote(a, b, item, TIE if label is None else label))
    counts = Counter(label for labels in items.values() for label in labels)
    return Ratings("human", votes, counts, len(rows), without, items, notes)


def majority_label(labels: list[int]) -> int | None:
    """The label that more than half of the annotators gave; None when there is none."""
    label, count = Counter(labels).most_common(1)[0]
    return label if 2 * count > len(labels) else None


def _complete_items(items: dict[tuple, list[int]], raters: int, bad_rows: str, notes: Notes) -> dict[tuple, list[int]]:
    """The items with exactly `raters` annotations; the others are refused, or named and left out."""
    wrong = {key: len(labels) for key, labels in items.items() if len(labels) != raters}
    if wrong and bad_rows == "refuse":
        (a, b, item), count = next(iter(wrong.items()))
        raise BadInput(
            f"{len(wrong)} item(s) without exactly {raters} annotations: the first is {a} against {b}, item {item}, "
            f"which has {count}. Complete the file, say how many annotate each item with --raters, or leave these "
            "items out with --bad-rows set-aside."
        )
    for (a, b, item), count in wrong.items():
        notes.add(f"item without exactly {raters} annotations (left out)", f"{a} first, {b}, {item}: {count}")
    return {key: labels for key, labels in items.items() if key not in wrong}


def _match_key(row: dict[str, Any]) -> tuple[str, str, int | str]:
    return system_name(row, "a"), system_name(row, "b"), item_of(row)


def _label_problem(row: dict[str, Any], allowed: tuple[int, ...]) -> str | None:
    if row["a"] == row["b"]:
        return "a system matched against itself"
    score = row["score"]  # 1.0 is the number 1: spreadsheets and data frames write it so
    if isinstance(score, bool) or not isinstance(score, int | float) or score not in allowed:
        return f"score is not one of {', '.join(map(str, allowed))}"
    return None


def _annotator_problem(row: dict[str, Any]) -> str | None:
    annotator = row["annotator"]
    return None if isinstance(annotator, int | str) and annotator != "" else "annotator is not a number or a name"


def _name_missing_halves(votes: list[Vote], notes: Notes) -> None:
    """Items judged in one presentation order only: used as they are (each row is a match), but said aloud."""
    seen = {(v.a, v.b, v.item) for v in votes}
    for v in votes:
        if (v.b, v.a, v.item) not in seen:
            notes.add("judged in one presentation order only (its match is used)", f"{v.a} first, {v.b}, {v.item}")


def to_matches(votes: list[Vote], ties: str = "half", unparsed: str = "drop") -> Matches:
    """Matches in the order of the votes. `ties`: half a win each, or drop; `unparsed`: drop, or count as a tie."""
    if ties not in TIE_POLICIES or unparsed not in UNPARSED_POLICIES:
        raise ValueError(f"ties is one of {TIE_POLICIES}, unparsed one of {UNPARSED_POLICIES}.")
    kept = []
    for vote in votes:
        label = TIE if vote.label == UNPARSED and unparsed == "tie" else vote.label
        if label != UNPARSED and not (label == TIE and ties == "drop"):
            kept.append((vote, OUTCOME[label]))
    names = sorted({name for vote, _ in kept for name in (vote.a, vote.b)})
    index = {name: i for i, name in enumerate(names)}
    return Matches(
        names,
        np.array([index[v.a] for v, _ in kept], dtype=np.int64),
        np.array([index[v.b] for v, _ in kept], dtype=np.int64),
        np.array([outcome for _, outcome in kept], dtype=np.float64),
        [v.item for v, _ in kept],
    )


def average_orders(matches: Matches) -> Matches:
    """One match per unordered pair and item: mean outcome over its orders, seen from the smaller name."""
    groups: dict[tuple, list[float]] = {}
    for a, b, outcome, item in zip(matches.a, matches.b, matches.outcome, matches.items, strict=True):
        key, value = ((a, b, item), outcome) if a < b else ((b, a, item), 1 - outcome)
        groups.setdefault(key, []).append(value)
    first, second, items = zip(*groups, strict=True)
    outcome = np.array([np.mean(values) for values in groups.values()])
    return Matches(matches.names, np.array(first), np.array(second), outcome, list(items))


def net_table(votes: list[Vote]) -> dict[str, dict[str, float]]:
    """ "x|y" (x < y) -> wins, losses, ties of x over both orders, valid rows, and net = (wins - losses) / all."""
    table: dict[str, Counter] = {}
    for vote in votes:
        if vote.label == UNPARSED:
            continue
        x, y = sorted((vote.a, vote.b))
        winner = {A_WINS: vote.a, B_WINS: vote.b, TIE: None}[vote.label]
        result = "ties" if winner is None else "wins" if winner == x else "losses"
        table.setdefault(f"{x}|{y}", Counter())[result] += 1
    return {
        pair: {key: count[key] for key in ("wins", "losses", "ties")}
        | {"net": (count["wins"] - count["losses"]) / count.total()}
        for pair, count in sorted(table.items())
    }
