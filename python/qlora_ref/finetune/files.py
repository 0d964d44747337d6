"""Rows out of files: json, jsonl, csv, tsv and parquet, optionally gzipped, one dict at a time.

Everything but `.json` is streamed. Text must be UTF-8 (with or without a byte order mark); a line longer than
`MAX_LINE` characters is refused instead of filling the memory.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..cli import UserError

KINDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
MAX_LINE = 16 * 2**20
Row = dict[str, Any]


def kind_of(path: Path) -> str:
    """The suffix that says how to read a file, `.gz` put aside. Raises UserError for one that is not known."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix == ".ndjson":
        return ".jsonl"
    if suffix not in KINDS:
        raise UserError(f"{path}: cannot tell the format from the name; use one of {', '.join(KINDS)} (or .gz of it).")
    return suffix


def read_rows(path: str | Path, header: bool = True) -> Iterator[Row]:
    """Yield the rows of a data file as dicts. `header=False`: csv and tsv columns are named "0", "1", ...

    Raises UserError (a sentence with the file and, where there is one, the line) for a missing, unreadable, damaged,
    wrongly encoded or malformed file. Rows before the damage have been yielded by then.
    """
    path = Path(path)
    kind = kind_of(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name one data file in it.")
    if not path.exists():
        raise UserError(f"there is no data file {path}.")
    try:
        if kind == ".parquet":
            yield from _parquet(path)
            return
        with _open(path) as file:
            if kind == ".json":
                yield from _json(path, file)
            elif kind == ".jsonl":
                yield from _jsonl(path, file)
            else:
                yield from _table(path, file, "\t" if kind == ".tsv" else ",", header)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert it, for example with "
            "iconv -f latin1 -t utf-8."
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or not gzip: {error}.") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from None


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _lines(path: Path, file: IO[str]) -> Iterator[tuple[int, str]]:
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise UserError(
                f"{path}, line {number}: longer than {MAX_LINE >> 20} million characters; split the record."
            )
        yield number, line


def _object(path: Path, where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{path}, {where}: a row must be a JSON object with named columns, not {type(value).__name__}.")
    return value


def _jsonl(path: Path, file: IO[str]) -> Iterator[Row]:
    for number, line in _lines(path, file):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise UserError(f"{path}, line {number}: not valid JSON ({reason}).") from None
        yield _object(path, f"line {number}", value)


def _json(path: Path, file: IO[str]) -> Iterator[Row]:
    try:
        values = json.load(file)
    except (json.JSONDecodeError, RecursionError) as error:
        hint = " (one object per line is called .jsonl)" if getattr(error, "msg", "") == "Extra data" else ""
        raise UserError(f"{path} is not valid JSON: {error}{hint}.") from None
    if isinstance(values, dict):  # {"data": [...]} and the like
        lists = [v for v in values.values() if isinstance(v, list)]
        values = lists[0] if len(lists) == 1 else values
    if not isinstance(values, list):
        raise UserError(f"{path} must hold a JSON list of rows.")
    for i, value in enumerate(values):
        yield _object(path, f"row {i + 1}", value)


def _table(path: Path, file: IO[str], delimiter: str, header: bool) -> Iterator[Row]:
    lines = (line for _, line in _lines(path, file))
    # a headerless table (FLAN's chain-of-thought files) is split at the tabs and nothing else: quotes are text there
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if header else csv.QUOTE_NONE)
    names: list[str] | None = None
    try:
        for values in reader:
            if not values:
                continue
            if header and names is None:
                names = values
                continue
            columns = names or [str(i) for i in range(len(values))]
            if len(values) != len(columns):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(values)} columns where the header has {len(columns)}; "
                    "quote the fields that contain the delimiter."
                )
            yield dict(zip(columns, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}.") from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow (pip install pyarrow).") from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file: {error}.") from None
