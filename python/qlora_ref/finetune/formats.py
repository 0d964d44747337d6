"""What the columns of a dataset mean: each format turns a row into messages, and says which template suits it.

Sources: the eight datasets of the paper (appendix B.1) in the shape in which they are published, plus `messages`,
`dolly` and plain `input`/`output` columns. A row that holds no answer gives no example, and is counted by the caller.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..cli import UserError
from .config import FORMATS, suggestion
from .files import Row


@dataclass(frozen=True)
class Message:
    """One turn. `role` is system, user or assistant; `context` is the `input` column of an Alpaca row."""

    role: str
    text: str
    context: str = ""


Example = tuple[Message, ...]


@dataclass(frozen=True)
class Format:
    """name; columns a row must have; row -> examples; the template unless another is asked for; has a header line."""

    name: str
    columns: tuple[str, ...]
    examples: Callable[[Row], list[Example]]
    template: str
    header: bool = True


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"column '{column}' must hold text, not {type(value).__name__}.")
    return value


def _pair(user: str, answer: str, context: str = "") -> list[Example]:
    if not answer.strip():
        return []
    return [(Message("user", user, context), Message("assistant", answer))]


def _alpaca(row: Row) -> list[Example]:
    return _pair(_text(row, "instruction"), _text(row, "output"), _text(row, "input"))


def _input_output(row: Row) -> list[Example]:
    return _pair(_text(row, "input"), _text(row, "output"))


def _dolly(row: Row) -> list[Example]:
    return _pair(_text(row, "instruction"), _text(row, "response"), _text(row, "context"))


def _self_instruct(row: Row) -> list[Example]:
    """`prompt`/`completion` (its end-of-text marker gives way to the tokenizer's own), or seed tasks."""
    if "instances" in row:
        task = _text(row, "instruction")
        pairs = [_pair(task, _text(i, "output"), _text(i, "input")) for i in row["instances"] or []]
        return [example for pair in pairs for example in pair]
    return _pair(_text(row, "prompt"), _text(row, "completion").removesuffix("<|endoftext|>"))


def _unnatural(row: Row) -> list[Example]:
    """Unnatural Instructions (Honovich et al. 2022): `instances` of `instruction_with_input`, `input`, `output`."""
    if "instances" not in row:
        return _alpaca(row)
    pairs = [_pair(_text(i, "instruction_with_input"), _text(i, "output")) for i in row["instances"] or []]
    return [example for pair in pairs for example in pair]


def _chip2(row: Row) -> list[Example]:
    """OIG-chip2: one string `<human>: ...\\n<bot>: ...`."""
    human, found, bot = _text(row, "text").partition("\n<bot>: ")
    return _pair(human.removeprefix("<human>: "), bot) if found else []


def _hh_rlhf(row: Row) -> list[Example]:
    """Anthropic HH: the `chosen` dialogue, turns marked Human: and Assistant:; a repeated speaker joins."""
    parts = re.split(r"\n\n(Human|Assistant):", _text(row, "chosen"))
    turns: list[Message] = []
    for speaker, text in zip(parts[1::2], parts[2::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, (turns[-1].text + "\n\n" + text.strip()).strip())
        else:
            turns.append(Message(role, text.strip()))
    return _dialogue(turns)


def _dialogue(turns: list[Message]) -> list[Example]:
    """Cut after the last assistant turn that says something; nothing if there is none."""
    while turns and not (turns[-1].role == "assistant" and turns[-1].text.strip()):
        turns.pop()
    return [tuple(turns)] if turns and any(t.role == "user" for t in turns) else []


def _best_reply(replies: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The reply ranked first by people (rank 0 is best); without ranks the first; deleted ones never."""
    kept = [r for r in replies if not r.get("deleted") and r.get("review_result") is not False]
    return min(kept, key=lambda r: r["rank"] if r.get("rank") is not None else len(kept), default=None)


def _oasst1(row: Row) -> list[Example]:
    """A message tree: the top reply at every level, as in Guanaco's training set; or its published flat `text`."""
    if "prompt" not in row or not isinstance(row["prompt"], dict):
        return _guanaco_text(_text(row, "text"))
    turns: list[Message] = []
    message: dict[str, Any] | None = row["prompt"]
    while message is not None:
        role = "user" if message.get("role") == "prompter" else "assistant"
        turns.append(Message(role, _text(message, "text")))
        message = _best_reply(message.get("replies") or [])
    return _dialogue(turns)


def _guanaco_text(text: str) -> list[Example]:
    parts = re.split(r"(?:^|\s*)### (Human|Assistant):", text)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return _dialogue([Message("user" if who == "Human" else "assistant", body.strip()) for who, body in pairs])


def _flan_cot(row: Row) -> list[Example]:
    """FLAN v2 chain of thought: question, answer, rationale; `\\n` is spelled out in the file."""
    if len(row) != 3:
        raise UserError(f"a flan-cot row has 3 columns (question, answer, rationale), not {len(row)}.")
    question, answer, rationale = (str(v).replace("\\n", "\n") for v in row.values())
    target = f"{rationale}\nThe answer is {answer}." if rationale.strip() else answer
    return _pair(f"{question}\nLet's think step by step.\n", target if answer.strip() else "")


_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def _messages(row: Row) -> list[Example]:
    """`messages` with `role`/`content`, or ShareGPT `conversations` with `from`/`value`."""
    turns = []
    for m in row.get("messages") or row.get("conversations") or []:
        role = m.get("role", m.get("from"))
        if role not in _ROLES:
            raise UserError(f"a message has the role {role!r}; known are {', '.join(_ROLES)}.")
        turns.append(Message(_ROLES[role], _text(m, "content" if "content" in m else "value")))
    return _dialogue(turns)


_BY_NAME = {
    f.name: f
    for f in (
        Format("alpaca", ("instruction", "output"), _alpaca, "alpaca"),
        Format("input-output", ("input", "output"), _input_output, "plain"),
        Format("self-instruct", ("prompt", "completion"), _self_instruct, "plain"),
        Format("chip2", ("text",), _chip2, "plain"),
        Format("hh-rlhf", ("chosen",), _hh_rlhf, "guanaco"),
        Format("oasst1", ("prompt",), _oasst1, "guanaco"),
        Format("longform", ("input", "output"), _input_output, "plain"),
        Format("unnatural-instructions", ("instances",), _unnatural, "plain"),
        Format("flan-cot", ("0", "1", "2"), _flan_cot, "plain", header=False),
        Format("dolly", ("instruction", "response"), _dolly, "alpaca"),
        Format("messages", ("messages",), _messages, "chat"),
    )
}
# columns that stand in for the required ones
_ALTERNATIVES = {
    "self-instruct": ("instruction", "instances"),
    "oasst1": ("text",),
    "unnatural-instructions": ("instruction", "output"),
    "messages": ("conversations",),
}


def get_format(name: str) -> Format:
    """A format by name; UserError with a suggestion for an unknown one."""
    if name not in _BY_NAME:
        raise UserError(f"there is no data format '{name}'; known are {', '.join(FORMATS)}.{suggestion(name, FORMATS)}")
    return _BY_NAME[name]


def fits(form: Format, row: Row) -> bool:
    return all(c in row for c in form.columns) or (
        form.name in _ALTERNATIVES and all(c in row for c in _ALTERNATIVES[form.name])
    )


def _shown(row: Row) -> str:
    """Column names for an error: at most eight, none longer than a line (a file without a header has text there)."""
    names = [repr(c if len(c) <= 40 else c[:37] + "...") for c in map(str, row)]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def detect(row: Row, origin: str) -> Format:
    """The format of a row from its columns, for `--format auto`. UserError listing what was found and what is known."""
    columns = set(row)
    order = ("alpaca", "dolly", "messages", "input-output", "hh-rlhf", "oasst1")
    if "instances" in columns:
        first = row["instances"][0] if row["instances"] else {}
        return _BY_NAME["unnatural-instructions" if "instruction_with_input" in first else "self-instruct"]
    if {"prompt", "completion"} <= columns:
        return _BY_NAME["self-instruct"]
    if "text" in columns and "\n<bot>: " in str(row["text"]):
        return _BY_NAME["chip2"]
    for name in order:
        if fits(_BY_NAME[name], row):
            return _BY_NAME[name]
    raise UserError(
        f"{origin}: the columns {_shown(row)} match no known format; needed are for example "
        "'instruction' and 'output' (alpaca), 'input' and 'output', or 'messages'; choose with --format."
    )


def check_columns(form: Format, row: Row, origin: str) -> None:
    """Raise UserError if the first row of a file lacks the columns of its format."""
    if not fits(form, row):
        missing = [c for c in form.columns if c not in row]
        raise UserError(
            f"{origin}: format {form.name} needs the column{'s' if len(missing) > 1 else ''} "
            f"{', '.join(map(repr, missing))}; the file has {_shown(row)}."
        )


def examples_of(rows: Iterator[Row], form: Format, origin: str) -> Iterator[list[Example]]:
    """For each row its examples (an empty list: the row has no answer). Errors name the row."""
    for number, row in enumerate(rows, 1):
        if number == 1:
            check_columns(form, row, origin)
        try:
            yield form.examples(row)
        except UserError as error:
            raise UserError(f"{origin}, row {number}: {error}") from None
        except (AttributeError, TypeError, KeyError) as error:
            raise UserError(
                f"{origin}, row {number}: not a {form.name} row ({type(error).__name__}: {error})."
            ) from None
