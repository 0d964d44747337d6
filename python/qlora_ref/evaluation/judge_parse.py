"""What a judge wrote becomes a score, or the explicit class "unparsed"; nothing is guessed.

Three-class replies (1, 2, 3 for first, second, tie) put the label alone on the last line. Relative replies put
two scores on the first line, except the math prompt, which asks for them at the end.
"""

import re

UNPARSED = -1
UNPARSED_PAIR = (-1.0, -1.0)
LABELS = (1, 2, 3)
MATH_PROMPT = 3
_TAIL = 500  # characters in which the math scores are looked for

_NUMBER = r"(\d+(?:\.\d+)?)"
_LABELLED = [re.compile(rf"Assistant {which}(?:\W*:|\s+a score of)\W*{_NUMBER}") for which in (1, 2)]
_TUPLE = re.compile(rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)")


def last_line(text: str) -> str:
    return text.strip().split("\n")[-1]


def parse_threeclass(text: str) -> int:
    """`int(last line)` when that is 1, 2 or 3, else -1: exactly how the published labels were made."""
    try:
        label = int(last_line(text))
    except ValueError:
        return UNPARSED
    return label if label in LABELS else UNPARSED


def parse_threeclass_loose(text: str) -> int:
    """The only label 1, 2 or 3 that stands alone on the last line ("Best answer: 2"), else -1.

    Not the paper's rule: it recovers rows that the published files call unparsed.
    """
    strict = parse_threeclass(text)
    if strict != UNPARSED:
        return strict
    line = re.sub(r"Assistants?'?s?\s+[12](\s+and\s+(Assistant\s+)?2)?", "", last_line(text))
    found = set(re.findall(r"(?<![\w.])([123])(?![\w.]*\d)(?!\w)", line))
    return int(found.pop()) if len(found) == 1 else UNPARSED


def parse_relative(text: str, prompt_id: int) -> tuple[float, float]:
    """(score of the answer shown first, shown second), each in [0, 10]; (-1, -1) when unparsed."""
    pair = _math_scores(text) if prompt_id == MATH_PROMPT else _first_line_scores(text)
    if pair is None or not all(0 <= score <= 10 for score in pair):
        return UNPARSED_PAIR
    return pair


def _first_line_scores(text: str) -> tuple[float, float] | None:
    """Two numbers alone on the first line, separated by blanks or a comma."""
    parts = text.strip().split("\n")[0].replace(",", " ").split()
    if len(parts) != 2 or not all(re.fullmatch(_NUMBER, part) for part in parts):
        return None
    return float(parts[0]), float(parts[1])


def _math_scores(text: str) -> tuple[float, float] | None:
    """The labels "Assistant 1: n" (or "Assistant 1 a score of n") near the end for both, else the last tuple there.

    Labels come first: in question 70 the tuples near the end include the point (10, 4) of the problem itself.
    """
    tail = text[-_TAIL:]
    labels = [pattern.findall(tail) for pattern in _LABELLED]
    if all(labels):
        return float(labels[0][-1]), float(labels[1][-1])
    tuples = _TUPLE.findall(tail)
    return (float(tuples[-1][0]), float(tuples[-1][1])) if tuples else None
