"""Text and questions from Python's own standard library: the corpus of the embedded default.

Every Python installation carries the same kind of text, so nothing has to be downloaded: module sources,
the docstrings in them and the language topics of `pydoc`. Files are read and parsed with `ast`; no module is
imported.

Whole modules are held out. The choice is made on the *family* of a module (its top-level name without
leading underscores, so `_pyio` goes with `io` and `asyncio.locks` with `asyncio.queues`), because relatives
share docstrings word for word and would leak the answer.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Code about code (tests, demos, vendored tools), and files that are tables or belong to one machine.
EXCLUDED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "turtledemo",
    "encodings",
    "__phello__",
    "__pycache__",
}
EXCLUDED_NAMES = re.compile(r"^(_sysconfigdata|__phello__|sitecustomize$|usercustomize$)|^config-")
HELD_OUT_SHARE = 0.12
MAX_SIGNATURE_CHARS = 110
MIN_ANSWER_CHARS, MAX_ANSWER_CHARS = 20, 130
MAX_SAME_ANSWER = 2  # overridden methods repeat one docstring; more copies teach nothing


@dataclass(frozen=True)
class Module:
    """One standard-library file: dotted name, path relative to the library folder, text, held out or not."""

    name: str
    path: str
    text: str
    held_out: bool


@dataclass(frozen=True)
class Documented:
    """A documented function, method or class: dotted name, module, kind, signature, clean docstring."""

    name: str
    module: str
    kind: str
    signature: str
    doc: str


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def family(module: str) -> str:
    """`_pyio` -> `io`, `asyncio.locks` -> `asyncio`: the unit that is held out as a whole."""
    top = module.split(".")[0]
    return re.sub(r"^_+(py(?=.))?", "", top) or top


def is_held_out(module: str) -> bool:
    """True for about HELD_OUT_SHARE of the families; never for the language topics, prose about Python."""
    return family(module) != "pydoc_data" and unit_hash("held-out " + family(module)) < HELD_OUT_SHARE


def read_modules(stdlib: Path | None = None) -> list[Module]:
    """All usable modules of the standard library, sorted by name."""
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    modules = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if EXCLUDED_FOLDERS & set(parts) or any(EXCLUDED_NAMES.search(p) for p in parts):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        text = path.read_text(encoding="utf-8", errors="strict")
        if text.strip():
            modules.append(Module(name, path.relative_to(root).as_posix(), text, is_held_out(name)))
    if not modules:
        raise ValueError(f"{root} holds no Python sources: pass the folder that holds os.py.")
    return sorted(modules, key=lambda m: (m.name, m.path))


def documented(module: Module) -> Iterator[Documented]:
    """Every documented function, method and class of a module, in source order."""

    def visit(body: list[ast.stmt], prefix: str, in_class: bool) -> Iterator[Documented]:
        for node in body:
            if isinstance(node, (ast.If, ast.Try)):
                yield from visit(node.body, prefix, in_class)
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            name, doc = f"{prefix}.{node.name}", ast.get_docstring(node)
            is_class = isinstance(node, ast.ClassDef)
            if doc:
                kind = "class" if is_class else "method" if in_class else "function"
                yield Documented(name, module.name, kind, signature(node), inspect.cleandoc(doc))
            if is_class:
                yield from visit(node.body, name, True)

    yield from visit(ast.parse(module.text).body, module.name, False)


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """`def name(arguments)` or `class Name(bases)` on one line, as `ast` writes it."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(b) for b in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{word} {node.name}({ast.unparse(node.args)})"


# --- text for pre-training --------------------------------------------------------------------------------


def documents(modules: list[Module], card_copies: int) -> list[str]:
    """Documents of one epoch: each source once, each docstring `card_copies` times as a help page of its own.

    A card is what `help()` prints: the dotted name with its signature, then the indented docstring. Repeating
    cards moves the mixture from code toward English without any text from outside the library.
    """
    texts: list[str] = []
    for module in modules:
        if module.name == "pydoc_data.topics":
            texts += string_values(module.text) * card_copies
            continue
        texts.append(f"# {module.name}\n{module.text}")
        for item in documented(module):
            call = item.signature.split(item.name.rsplit(".", 1)[1], 1)[1]
            body = "\n".join(f"    {line}".rstrip() for line in item.doc.splitlines())
            texts += [f"{item.kind} {item.name}{call}\n{body}\n"] * card_copies
    return texts


def string_values(source: str) -> list[str]:
    """The string values of the dictionary in `pydoc_data/topics.py`: the language topics as plain text."""
    values = [v for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Dict) for v in node.values]
    return [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]


# --- questions and answers --------------------------------------------------------------------------------

PARAMETERS = "Name the parameters of"
DOES = ("What does {name} do?", "Explain {name} in one sentence.", "Describe the {kind} {name}.")


def first_sentence(doc: str) -> str | None:
    """First sentence of a docstring, or None when it is not a short sentence of plain English."""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z)\]'\"`]\.)\s+(?=[A-Z`'\"])|:\s*$", paragraph)[0].strip()
    if not sentence.endswith("."):
        sentence += "."
    plain = sentence.isascii() and re.match(r"[A-Z][a-z]*[ ,]", sentence) and len(sentence.split()) >= 4
    if not plain or re.search(r"->|>>>|[|\\{}@]|\.\.\.|  |--", sentence):
        return None
    return sentence if MIN_ANSWER_CHARS <= len(sentence) <= MAX_ANSWER_CHARS else None


def questions(item: Documented) -> list[dict[str, str]]:
    """Alpaca rows about one documented object: always what it does; sometimes its parameters or its module.

    The last two can be answered from the question itself, so they show a skill where the first shows
    knowledge and style.
    """
    answer = first_sentence(item.doc)
    if answer is None or len(item.signature) > MAX_SIGNATURE_CHARS:
        return []
    pick = unit_hash("template " + item.name)
    text = DOES[int(pick * len(DOES))].format(name=item.name, kind=item.kind)
    with_code = unit_hash("code " + item.name) < 0.5
    rows = [row(text, item.signature if with_code else "", answer)]
    side = unit_hash("side " + item.name)
    arguments = [a for a in parameter_names(item.signature) if a != "self"]
    if side < 0.2 and 1 <= len(arguments) <= 5 and item.kind != "class":
        rows.append(row(f"{PARAMETERS} {item.name}.", item.signature, ", ".join(arguments) + "."))
    elif side > 0.9:
        answer = f"The {item.kind} is defined in {item.module}."
        rows.append(row(f"Which module defines {item.name}?", "", answer))
    return rows


def row(instruction: str, context: str, output: str) -> dict[str, str]:
    return {"instruction": instruction, "input": context, "output": output}


def parameter_names(text: str) -> list[str]:
    """Names of the parameters in a signature that `signature` wrote, in order; [] for a class."""
    if text.startswith("class"):
        return []
    node = ast.parse(text + ": pass").body[0]
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    args = node.args
    stars = [a for a in (args.vararg, args.kwarg) if a]
    return [a.arg for a in [*args.posonlyargs, *args.args, *args.kwonlyargs, *stars]]


def instruction_rows(modules: list[Module], limits: dict[str, int]) -> dict[str, list[dict[str, str]]]:
    """At most `limits[split]` rows per split ("train", "heldout") in hash order: a prefix is a fair sample.

    Only public objects of public modules are asked about. A held-out row whose answer stands in the training
    text is dropped, unless it is a list of parameters, which its own input gives away.
    """
    found: dict[str, list[dict[str, str]]] = {"train": [], "heldout": []}
    for module in modules:
        if any(part.startswith("_") for part in module.name.split(".")):
            continue
        for item in documented(module):
            if not any(part.startswith("_") for part in item.name.split(".")):
                found["heldout" if module.held_out else "train"] += questions(item)
    seen = " ".join(" ".join(m.text for m in modules if not m.held_out).split())
    found["heldout"] = [
        r for r in found["heldout"] if r["instruction"].startswith(PARAMETERS) or r["output"].rstrip(".") not in seen
    ]
    return {split: distinct(rows)[: limits[split]] for split, rows in found.items()}


def distinct(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows in hash order, without repeated questions and with at most MAX_SAME_ANSWER rows per answer."""
    ordered = sorted(rows, key=lambda r: unit_hash(r["instruction"] + "\n" + r["input"]))
    answers: Counter[str] = Counter()
    questions_seen: set[tuple[str, str]] = set()
    kept = []
    for r in ordered:
        answers[r["output"]] += 1
        key = (r["instruction"], r["input"])
        if key not in questions_seen and answers[r["output"]] <= MAX_SAME_ANSWER:
            questions_seen.add(key)
            kept.append(r)
    return kept
