"""A JSON Lines file that grows by one verified row at a time and survives a kill.

Every row is written with one call and synced before the next is asked for. A kill can only tear the last line,
which is cut off when the file is opened again; whatever the row was about is then done again. A second file beside
it (`NAME.settings.json`) holds what the rows depend on, so that a resumed run cannot mix two experiments.
"""

import fcntl
import json
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from .records import BadInput
from .report_tables import write_text


class Ledger:
    """Open with `with`; `rows` are those already there. Only one process may hold a ledger.

    path: the .jsonl file, made when absent. settings: must equal those of the rows that are there.
    key_of: what makes a row unique. Raises BadInput when the file was damaged or belongs to other settings.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], key_of: Callable[[dict], Hashable]):
        self.path, self._settings, self._key_of = Path(path), settings, key_of
        self.rows: list[dict[str, Any]] = []
        self.keys: set[Hashable] = set()
        self.torn_bytes = 0

    def __enter__(self) -> "Ledger":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise BadInput(
                f"{self.path}: another process is writing it; wait for it, or choose another --out."
            ) from None
        try:
            self._load()
            self._check_settings()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def _load(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self.rows, self.keys = _complete_rows(self.path, content[:whole], self._key_of)
        self.torn_bytes = len(content) - whole
        if self.torn_bytes:
            self._file.truncate(whole)
            os.fsync(self._file.fileno())

    def _check_settings(self) -> None:
        beside = self.path.with_name(self.path.name + ".settings.json")
        mine = json.loads(json.dumps(self._settings))
        if not beside.exists():
            if self.rows:
                raise BadInput(f"{self.path} has rows but {beside.name} is missing; choose another --out.")
            write_text(beside, json.dumps(mine, indent=1, ensure_ascii=False) + "\n")
            return
        theirs = json.loads(beside.read_text(encoding="utf-8"))
        differ = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        if differ and self.rows:
            raise BadInput(
                f"{self.path} was begun with other settings ({', '.join(differ)} differ); resume with the same ones, "
                "or choose another --out."
            )
        if differ:
            write_text(beside, json.dumps(mine, indent=1, ensure_ascii=False) + "\n")

    def append(self, row: dict[str, Any]) -> None:
        """Adds one row and returns when it is on the disk."""
        key = self._key_of(row)
        if key in self.keys:
            raise RuntimeError(f"{key} is already in {self.path}.")
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
        written = self._file.write(data)
        if written != len(data):
            self._file.truncate(self._file.seek(0, os.SEEK_END) - (written or 0))
            raise OSError(f"{self.path}: only {written} of {len(data)} bytes were written; is the disk full?")
        os.fsync(self._file.fileno())
        self.keys.add(key)
        self.rows.append(row)


def _complete_rows(path: Path, content: bytes, key_of: Callable[[dict], Hashable]) -> tuple[list[dict], set[Hashable]]:
    rows, keys = [], set()
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            key = key_of(row)
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{path}:{number}: not a row of this file; mend or move it before resuming.") from None
        if key in keys:
            raise BadInput(f"{path}:{number}: {key} is there twice; remove one of the rows before resuming.")
        rows.append(row)
        keys.add(key)
    return rows, keys


def complete_keys(path: str | Path, key_of: Callable[[dict], Hashable]) -> set[Hashable]:
    """Keys of the complete rows of a ledger that may not exist yet; nothing is written or locked."""
    path = Path(path)
    content = path.read_bytes() if path.exists() else b""
    return _complete_rows(path, content[: content.rfind(b"\n") + 1], key_of)[1]
