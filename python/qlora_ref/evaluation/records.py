"""Reading rating files: every row is checked, and what is wrong is counted and named, never averaged in.

A file is JSON Lines or CSV, plain or gzip. A file that cannot be read whole (truncated gzip, a line that is
not JSON) is refused. A row that breaks a rule (score out of range, duplicate key) is refused by default; with
`bad_rows="set-aside"` it is left out and listed. The verdicts that the published files carry on purpose
(`[-1, -1]` and `-1`: the judge's reply could not be parsed) are neither: they are counted as unparsed.
"""

import contextlib
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BAD_ROW_POLICIES = ("refuse", "set-aside")
_NUMBER_KEYS = ("question_id", "annotator", "score")


class BadInput(ValueError):
    """The file breaks a rule; the message says which, where, and what mends it."""


@dataclass
class Notes:
    """What was found while reading: counts by kind, with the first few places of each kind."""

    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, where: str) -> None:
        self.counts[kind] += 1
        self.examples.setdefault(kind, []).append(where)

    def lines(self, shown: int = 5) -> list[str]:
        """One sentence per kind: the count, then the first `shown` places."""
        out = []
        for kind, count in self.counts.items():
            places = self.examples[kind]
            more = f", and {count - shown} more" if count > shown else ""
            out.append(f"{count} x {kind}: {'; '.join(places[:shown])}{more}")
        return out


def read_text(path: str | Path) -> str:
    """The whole text of `path` (UTF-8, gzip undone). Raises BadInput when the file is missing or cut off."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file.")
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = _gunzip(path, raw)
    elif path.suffix == ".gz":
        raise BadInput(f"{path}: the name says gzip but the content is not; rename it or compress it.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8.") from None


def _gunzip(path: Path, raw: bytes) -> bytes:
    try:
        return gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        head = _readable_head(raw)
        raise BadInput(
            f"{path}: the gzip stream is truncated or damaged after {head.count(bytes([10])):,} complete lines; "
            "nothing was used. Fetch the file again (a partial file would give a wrong average)."
        ) from None


def _readable_head(raw: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(raw)
    except zlib.error:
        return b""


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl or .csv file (plain or .gz) as dicts, each with its place under the key "_where".

    Lines are split on "\\n" only: `str.splitlines` would also split at U+0085 inside a text.
    Raises BadInput at the first line that is not a JSON object, and when there are no rows.
    """
    path = Path(path)
    text = read_text(path)
    is_csv = path.name.removesuffix(".gz").endswith(".csv")
    rows = list(_csv_rows(path, text) if is_csv else _json_rows(path, text))
    if not rows:
        raise BadInput(f"{path}: the file holds no rows.")
    return rows


def _json_rows(path: Path, text: str) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            raise BadInput(f"{where}: not JSON ({error.msg} at column {error.colno}).") from None
        except RecursionError:
            raise BadInput(f"{where}: not a row (brackets nested too deep).") from None
        except ValueError as error:  # a key given twice, or a number of thousands of digits
            raise BadInput(f"{where}: {error}") from None
        if not isinstance(row, dict):
            raise BadInput(f"{where}: expected one JSON object a line, found {type(row).__name__}.")
        yield {**row, "_where": where}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; the standard reader would silently keep the last of two equal keys."""
    row = dict(pairs)
    if len(row) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice} is there twice; keep one of them.")
    return row


def _csv_rows(path: Path, text: str) -> Iterable[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = [name.strip() for name in reader.fieldnames or []]
        if len(set(columns)) != len(columns):
            raise BadInput(f"{path.name}:1: two columns have the same name; the header is {', '.join(columns)}.")
        for row in reader:
            where = f"{path.name}:{reader.line_num}"
            if None in row or None in row.values():
                raise BadInput(f"{where}: {len(reader.fieldnames or [])} columns were announced, this row differs.")
            yield {key.strip(): cell(key.strip(), value) for key, value in row.items()} | {"_where": where}
    except csv.Error as error:
        raise BadInput(f"{path.name}:{reader.line_num}: not CSV ({error}).") from None


def cell(key: str, text: str) -> Any:
    """A CSV cell: an integer under the keys that hold numbers, else text (a system may be called 7).

    A relative score is a pair, written as in JSON: "[8, 5.5]".
    """
    text = text.strip()
    if key == "score" and text.startswith("["):
        with contextlib.suppress(ValueError):  # what is no pair stays text, which is no score
            return json.loads(text)
    digits = text.removeprefix("-")
    if key not in _NUMBER_KEYS or not digits.isascii():
        return text
    whole = digits.removesuffix(".0")  # data frames write 1.0 where a column has gaps
    return int(text.removesuffix(".0")) if whole.isdigit() else text


def require_keys(rows: list[dict[str, Any]], keys: Iterable[str], what: str) -> None:
    """Raises BadInput naming the first row without one of `keys`."""
    for row in rows:
        missing = [key for key in keys if key not in row]
        if missing:
            raise BadInput(
                f"{row['_where']}: {what} need the key{'s' * (len(missing) > 1)} {', '.join(missing)}; "
                f"this row has {', '.join(k for k in row if k != '_where')}."
            )


def item_of(row: dict[str, Any]) -> int | str:
    """What was judged: `question_id` (an integer) or `message_id` (a string); exactly one of them."""
    present = [key for key in ("question_id", "message_id") if row.get(key) is not None]
    if len(present) != 1:
        found = " and ".join(present) or "neither"
        raise BadInput(f"{row['_where']}: a row needs either question_id or message_id, this one has {found}.")
    item = row[present[0]]
    wanted = int if present[0] == "question_id" else str
    if not isinstance(item, wanted) or isinstance(item, bool) or item == "":
        raise BadInput(f"{row['_where']}: {present[0]} must be {wanted.__name__}, found {item!r}.")
    return item


def system_name(row: dict[str, Any], key: str) -> str:
    """The system under `key`: a non-empty string without surrounding blanks."""
    name = row[key]
    if not isinstance(name, str) or not name or name != name.strip():
        raise BadInput(f"{row['_where']}: {key} must be the name of a system, found {name!r}.")
    return name


def set_aside(
    rows: list[dict[str, Any]],
    problem_of: Callable[[dict[str, Any]], str | None],
    key_of: Callable[[dict[str, Any]], Hashable],
    bad_rows: str,
    notes: Notes,
) -> list[dict[str, Any]]:
    """The rows that may be used: `problem_of` says None for them and their `key_of` is unique.

    Of a repeated key, one copy is kept when all copies carry the same score, none when they contradict.
    With `bad_rows="refuse"` any such row raises BadInput; with "set-aside" it is listed in `notes`.
    """
    if bad_rows not in BAD_ROW_POLICIES:
        raise ValueError(f"bad_rows must be one of {', '.join(BAD_ROW_POLICIES)}, not {bad_rows!r}.")
    found = Notes()
    good = []
    for row in rows:
        problem = problem_of(row)
        if problem:
            found.add(problem, row["_where"])
        else:
            good.append(row)
    kept = _without_duplicates(good, key_of, found)
    if found.counts and bad_rows == "refuse":
        raise BadInput(
            f"{sum(found.counts.values())} bad row(s): {' | '.join(found.lines())}. "
            "Mend the file, or leave these rows out with --bad-rows set-aside."
        )
    notes.counts += found.counts
    notes.examples |= found.examples
    return kept


def _without_duplicates(rows: list[dict[str, Any]], key_of: Callable, found: Notes) -> list[dict[str, Any]]:
    copies: dict[Hashable, list[dict[str, Any]]] = {}
    for row in rows:
        copies.setdefault(key_of(row), []).append(row)
    kept = []
    for key, group in copies.items():
        agree = all(row["score"] == group[0]["score"] for row in group)
        extra = group[1:] if agree else group
        if agree:
            kept.append(group[0])
        kind = "duplicate id, same score (first kept)" if agree else "duplicate id, different scores (none kept)"
        for row in extra:
            found.add(kind, f"{row['_where']} {key}")
    return kept
