"""Questions and answers: what the judge, the rating page and the HTML report are given."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import BadInput, Notes, item_of, read_rows


@dataclass(frozen=True)
class Question:
    item: int | str
    text: str
    category: str | None
    key: str  # "question_id" or "message_id"


@dataclass(frozen=True)
class Answer:
    text: str
    answer_id: str | None = None


def read_questions(path: str | Path) -> dict[int | str, Question]:
    """Rows with question_id or message_id, `text` and perhaps `category`; the order of the file is kept."""
    found: dict[int | str, Question] = {}
    for row in read_rows(path):
        item = item_of(row)
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise BadInput(f"{row['_where']}: a question needs its words under the key text.")
        if not isinstance(row.get("category"), str | None):
            raise BadInput(f"{row['_where']}: category must be a word, found {row['category']!r}.")
        if item in found:
            raise BadInput(f"{row['_where']}: question {item} is there twice.")
        key = "question_id" if row.get("question_id") is not None else "message_id"
        found[item] = Question(item, row["text"], row.get("category"), key)
    if len({q.key for q in found.values()}) > 1:
        raise BadInput(f"{path}: some questions have question_id, some message_id; use one of them.")
    return found


def read_answers(path: str | Path) -> dict[int | str, Answer]:
    """item -> what was judged: `generation_truncated` where present, else `generation`, else `text`."""
    found: dict[int | str, Answer] = {}
    for row in read_rows(path):
        item = item_of(row)
        text = next((row[k] for k in ("generation_truncated", "generation", "text") if row.get(k) is not None), None)
        if not isinstance(text, str):
            raise BadInput(f"{row['_where']}: an answer needs its words under the key generation or text.")
        if item in found:
            raise BadInput(f"{row['_where']}: the answer to {item} is there twice.")
        found[item] = Answer(text, row.get("answer_id"))
    return found


def read_all_answers(specs: list[str]) -> dict[str, dict[int | str, Answer]]:
    """["system=file", ...] -> system -> item -> Answer."""
    systems: dict[str, dict[int | str, Answer]] = {}
    for spec in specs:
        name, sign, path = spec.partition("=")
        if not sign or not name.strip() or not path:
            raise BadInput(f"--answers {spec}: expected SYSTEM=FILE, such as guanaco-7b=answers.jsonl.")
        if name.strip() in systems:
            raise BadInput(f"--answers: system {name.strip()} is given twice.")
        systems[name.strip()] = read_answers(path)
    return systems


def common_items(
    questions: dict[int | str, Question], systems: dict[str, dict[int | str, Any]], bad_rows: str, notes: Notes
) -> list[int | str]:
    """Questions that every system answered. Gaps are refused, or with "set-aside" left out and named."""
    found = Notes()
    for name, answers in systems.items():
        for item in questions:
            if item not in answers:
                found.add("missing answer (question left out for all)", f"{name} {item}")
        for item in answers:
            if item not in questions:
                found.add("answer without a question (left out)", f"{name} {item}")
    if found.counts and bad_rows == "refuse":
        raise BadInput(
            f"{' | '.join(found.lines())}. Complete the files, or go on without these with --bad-rows set-aside."
        )
    notes.counts += found.counts
    notes.examples |= found.examples
    items = [item for item in questions if all(item in answers for answers in systems.values())]
    if not items:
        raise BadInput("no question is answered by all systems.")
    return items
