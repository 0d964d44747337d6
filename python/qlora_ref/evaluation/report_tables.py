"""Results as text, CSV and JSON. Every result carries the rule and the settings that produced it."""

import csv
import io
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMATS = ("text", "csv", "json")


@dataclass
class Table:
    """`rows` of plain values under `columns`; `decimals` says how floats of a column are shown in text only."""

    name: str
    columns: list[str]
    rows: list[list[Any]]
    decimals: dict[str, int] = field(default_factory=dict)


@dataclass
class Result:
    title: str
    settings: dict[str, Any]
    tables: list[Table]
    notes: list[str] = field(default_factory=list)


def render(result: Result, form: str = "text", table: str | None = None) -> str:
    """`result` as a string. CSV holds one table: the one named `table`, or the first. Full precision but in text.

    Raises ValueError for an unknown form or table.
    """
    names = [t.name for t in result.tables]
    if table is not None and table not in names:
        raise ValueError(f"no table '{table}'; this result has {', '.join(names)}.")
    chosen = [t for t in result.tables if table in (None, t.name)]
    if form == "json":
        return json.dumps(_as_dict(result, chosen), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if form == "csv":
        return _as_csv(chosen[0])
    if form == "text":
        return _as_text(result, chosen)
    raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {form!r}.")


def _plain(value: Any) -> Any:
    """JSON has no nan: it becomes null. numpy scalars become Python's."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_dict(result: Result, tables: list[Table]) -> dict[str, Any]:
    return {
        "title": result.title,
        "settings": {key: _plain(value) for key, value in result.settings.items()},
        "tables": {t.name: [dict(zip(t.columns, map(_plain, row), strict=True)) for row in t.rows] for t in tables},
        "notes": result.notes,
    }


def _as_csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([["" if _plain(v) is None else _plain(v) for v in row] for row in table.rows])
    return out.getvalue()


def _as_text(result: Result, tables: list[Table]) -> str:
    settings = "; ".join(f"{key} {value}" for key, value in result.settings.items())
    parts = [result.title, f"  {settings}", ""]
    for table in tables:
        parts += [f"[{table.name}]", *_aligned(table), ""]
    if result.notes:
        parts += ["[notes]", *(f"- {note}" for note in result.notes), ""]
    return "\n".join(parts)


def _aligned(table: Table) -> list[str]:
    from tabulate import tabulate

    rows = [
        [_shown(value, table.decimals.get(column, 2)) for column, value in zip(table.columns, row, strict=True)]
        for row in table.rows
    ]
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.columns)
    align = ["left" if all(isinstance(value, str) for value in column) else "right" for column in columns]
    return tabulate(rows, table.columns, tablefmt="plain", disable_numparse=True, colalign=align).split("\n")


def _shown(value: Any, decimals: int) -> str:
    value = _plain(value)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and 0 < abs(value) < 0.5 * 10**-decimals:
        return f"{value:.0e}"  # a p-value of 1e-99 is not 0.00
    return (
        f"{value:.{decimals}f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` whole or not at all, and reads it back."""
    path = Path(path)
    if path.is_dir():
        raise OSError(f"{path} is a folder; give the name of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if temporary.read_bytes() != text.encode("utf-8"):
            raise OSError(f"{path}: what was read back differs from what was written.")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
