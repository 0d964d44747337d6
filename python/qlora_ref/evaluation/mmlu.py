"""MMLU (Hendrycks et al. 2021): the official files, the prompts, and the two averages.

The prompt of a question is a header, up to five solved questions of the same subject (from the dev split), and
the question, ending in "Answer:". The published accuracy (upstream `mmlu_{split}_accuracy`) is the mean over
subjects (macro); the share of all questions (micro) differs because subjects differ in size.
"""

import csv
import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from .records import BadInput, read_rows

LETTERS = "ABCD"
SPLITS = ("val", "test")
SHOTS = 5


@dataclass(frozen=True)
class MMLUItem:
    """One question; `gold` is 0..3. `prompt(k)` has at most k solved examples before it."""

    subject: str
    header: str
    shots: tuple[str, ...]
    question: str
    gold: int

    def prompt(self, n_shots: int = SHOTS) -> str:
        return self.header + "".join(self.shots[:n_shots]) + self.question


def header(subject: str) -> str:
    """Two blanks before the subject, as in the official prompts."""
    words = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about  {words}.\n\n"


def question_text(fields: list[str]) -> str:
    options = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, fields[1:5], strict=True))
    return f"{fields[0]}{options}\nAnswer:"


def read_mmlu(path: str | Path, split: str = "test", n_shots: int = SHOTS) -> list[MMLUItem]:
    """Questions of the official release (the .zip, or its unpacked folder), subject by subject.

    A .jsonl file (`subject`, `input`, `output`: zero-shot prompts) is taken as it is; it has no splits or shots.
    Raises BadInput for a damaged archive, a missing dev file, a row without six fields or with a strange answer.
    """
    path = Path(path)
    if path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return _read_prompts(path)
    files = _csv_files(path)
    if split not in SPLITS or not 0 <= n_shots <= SHOTS:
        raise BadInput(f"split is one of {', '.join(SPLITS)} and shots 0 to {SHOTS}; got {split!r}, {n_shots}.")
    subjects = sorted(name.removesuffix(f"_{split}.csv") for name in files if name.endswith(f"_{split}.csv"))
    if not subjects:
        raise BadInput(f"{path}: no *_{split}.csv inside; this is not the official MMLU release.")
    items = []
    for subject in subjects:
        shots: tuple[str, ...] = ()
        if n_shots:
            dev = _rows(path, files, f"{subject}_dev.csv")[:n_shots]
            shots = tuple(f"{question_text(fields)} {fields[5]}\n\n" for fields in dev)
        for fields in _rows(path, files, f"{subject}_{split}.csv"):
            gold = LETTERS.index(fields[5])
            items.append(MMLUItem(subject, header(subject), shots, question_text(fields), gold))
    return items


def _csv_files(path: Path) -> dict[str, bytes]:
    """File name -> content; names are unique in the release."""
    if path.is_dir():
        found = {p.name: p.read_bytes() for p in path.rglob("*.csv")}
    elif path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if n.endswith(".csv") and "__MACOSX" not in n]
                found = {PurePosixPath(n).name: archive.read(n) for n in names}
        except (zipfile.BadZipFile, EOFError) as error:
            raise BadInput(f"{path}: the archive is damaged ({error}); fetch it again.") from None
    else:
        raise BadInput(f"{path}: no such file or folder.")
    return found


def _rows(path: Path, files: dict[str, bytes], name: str) -> list[list[str]]:
    if name not in files:
        raise BadInput(f"{path}: {name} is missing.")
    try:
        rows = list(csv.reader(io.StringIO(files[name].decode("utf-8"), newline="")))
    except UnicodeDecodeError:
        raise BadInput(f"{path}: {name} is not UTF-8.") from None
    for number, fields in enumerate(rows, start=1):
        if len(fields) != 6 or fields[5] not in tuple(LETTERS):
            raise BadInput(
                f"{path}: {name} row {number}: expected question, A, B, C, D and a letter, found {fields!r:.80}."
            )
    return rows


def _read_prompts(path: Path) -> list[MMLUItem]:
    items = []
    for row in read_rows(path):
        subject, text, gold = (row.get(key) for key in ("subject", "input", "output"))
        if not isinstance(subject, str) or not isinstance(text, str) or gold not in tuple(LETTERS):
            raise BadInput(f"{row['_where']}: expected subject, input (the prompt) and output (A, B, C or D).")
        items.append(MMLUItem(subject, "", (), text, LETTERS.index(gold)))
    return items


@dataclass(frozen=True)
class MMLUScore:
    """Accuracies in 0..1 with standard errors; `subjects`: name -> (accuracy, number of questions)."""

    macro: float
    macro_se: float
    micro: float
    micro_se: float
    n: int
    subjects: dict[str, tuple[float, int]]

    def metrics(self, split: str) -> dict[str, float]:
        """Upstream's names: `mmlu_{split}_accuracy` is the macro average."""
        found = {f"mmlu_{split}_accuracy_{name}": accuracy for name, (accuracy, _) in self.subjects.items()}
        return found | {f"mmlu_{split}_accuracy": self.macro, f"mmlu_{split}_accuracy_micro": self.micro}


def score(items: list[MMLUItem], answers: np.ndarray) -> MMLUScore:
    """Both averages of `answers`, (n,) integers 0..3, one for each item."""
    if len(items) != len(answers) or not items:
        raise ValueError(f"{len(items)} questions, {len(answers)} answers: need the same number, at least one.")
    right: dict[str, list[bool]] = {}
    for item, answer in zip(items, answers, strict=True):
        right.setdefault(item.subject, []).append(item.gold == int(answer))
    subjects = {name: (sum(hits) / len(hits), len(hits)) for name, hits in sorted(right.items())}
    micro = sum(map(sum, right.values())) / len(items)
    spread = sum(p * (1 - p) / n for p, n in subjects.values())
    return MMLUScore(
        sum(p for p, _ in subjects.values()) / len(subjects),
        math.sqrt(spread) / len(subjects),
        micro,
        math.sqrt(micro * (1 - micro) / len(items)),
        len(items),
        subjects,
    )


def constant_baselines(items: list[MMLUItem]) -> dict[str, MMLUScore]:
    """What always answering one letter scores: the floor under any reading of an accuracy."""
    return {letter: score(items, np.full(len(items), i)) for i, letter in enumerate(LETTERS)}
