"""`qlora-ref eval import-csv FILE --out FILE`: human ratings from a spreadsheet, checked, as JSON Lines."""

import json

from .cli_common import parser, positive_int
from .records import BadInput, cell, read_rows
from .report_tables import write_text
from .tournament import read_ratings

_KEYS = ("a", "b", "question_id", "message_id", "annotator", "score")


def main(argv: list[str]) -> int:
    p = parser("import-csv", "Columns: a, b, question_id or message_id, annotator, score (1 a, 2 b, 3 tie).")
    p.add_argument("file")
    p.add_argument("--out", required=True, metavar="FILE", help="where to write the .jsonl")
    p.add_argument("--column", action="append", default=[], metavar="KEY=COLUMN", help="score=Verdict, a=Left, ...")
    p.add_argument("--label", action="append", default=[], metavar="TEXT=1|2|3", help="left=1, right=2, same=3, ...")
    p.add_argument("--raters", type=positive_int, default=3, metavar="N", help="annotations per item (default 3)")
    args = p.parse_args(argv)
    columns = _pairs(args.column, "--column")
    labels = {text: _verdict(text, value) for text, value in _pairs(args.label, "--label").items()}
    if unknown := set(columns) - set(_KEYS):
        raise BadInput(f"--column: no key {', '.join(sorted(unknown))}; the keys are {', '.join(_KEYS)}.")
    rows = [_renamed(row, columns, labels) for row in read_rows(args.file)]
    ratings = read_ratings(rows, raters=args.raters)
    if ratings.kind != "human":
        raise BadInput(f"{args.file}: no column annotator; name it with --column annotator=COLUMN.")
    lines = [json.dumps({k: row[k] for k in _KEYS if k in row}, ensure_ascii=False) for row in rows]
    write_text(args.out, "\n".join(lines) + "\n")
    print(f"{len(rows)} annotations of {len(ratings.annotations)} items written to {args.out}")
    return 0


def _pairs(values: list[str], flag: str) -> dict[str, str]:
    if wrong := [value for value in values if "=" not in value]:
        raise BadInput(f"{flag} {wrong[0]}: expected NAME=VALUE.")
    return dict(value.split("=", 1) for value in values)


def _verdict(text: str, value: str) -> int:
    if value not in ("1", "2", "3"):
        raise BadInput(f"--label {text}={value}: a verdict is 1 (a), 2 (b) or 3 (tie).")
    return int(value)


def _renamed(row: dict, columns: dict[str, str], labels: dict[str, int]) -> dict:
    """The row under our keys; missing columns are left for the reader to name."""
    out = {"_where": row["_where"]}
    for key in _KEYS:
        column = columns.get(key, key)
        if column in row:
            out[key] = cell(key, str(row[column]))
        elif key in columns:
            raise BadInput(f"{row['_where']}: no column {column!r}; the file has {', '.join(map(str, row))}.")
    if "score" in out:
        out["score"] = labels.get(str(out["score"]), out["score"])
    return out
