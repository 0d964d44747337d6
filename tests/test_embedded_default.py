"""The embedded default: a model that learned, a tokenizer that round-trips, questions that leak nothing."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest

from qlora_ref.data import SPLITS, stdlib_qa_path, tiny_base_path

ROOT = Path(__file__).resolve().parents[1]
MAX_MODEL_BYTES = 6_000_000  # issue 2, point 4


def rows(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in stdlib_qa_path(split).read_text(encoding="utf-8").splitlines()]


def manifest(folder: str) -> dict:
    return json.loads((tiny_base_path().parent / folder / "MANIFEST.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.AutoTokenizer.from_pretrained(tiny_base_path())


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch")
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_base_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def corpus():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import stdlib_corpus
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return stdlib_corpus


# --- the model --------------------------------------------------------------------------------------------


def test_weights_are_small_and_bf16():
    path = tiny_base_path() / "model.safetensors"
    assert path.stat().st_size <= MAX_MODEL_BYTES
    with path.open("rb") as file:  # the format's header: 8 bytes of length, then JSON
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    assert header and {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert "lm_head.weight" not in header  # tied: the head is the embedding


def test_blocks_align_with_rows(model):
    torch = pytest.importorskip("torch")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(linears) == 7 * model.config.num_hidden_layers + 1
    assert {n: m.in_features for n, m in linears.items() if m.in_features % 64} == {}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_model_beats_every_unigram_model(model, tokenizer):
    """On help-page text of held-out modules. The empirical entropy is the least loss that any unigram model,
    even one fitted to these very tokens, can have; a model below it uses context."""
    torch = pytest.importorskip("torch")
    context = model.config.max_position_embeddings
    pages = [f'{r["input"]}:\n    """{r["output"]}"""\n' for r in rows("heldout") if r["input"]]
    ids = [i for page in pages for i in [*tokenizer(page).input_ids, tokenizer.eos_token_id]]
    batch = torch.tensor(ids[: len(ids) // context * context]).view(-1, context)
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss.item()
    counts = Counter(batch[:, 1:].flatten().tolist())
    total = sum(counts.values())
    entropy = -sum(c / total * math.log(c / total) for c in counts.values())
    assert loss < entropy


def test_sources_of_the_model_are_recorded():
    record = manifest("tiny_base")
    files = record["files"]
    assert record["python"].count(".") == 2
    assert len({f["file"] for f in files}) == len(files)
    assert all(len(bytes.fromhex(f["sha256"])) == 32 for f in files)
    assert {f["module"] for f in files if f["held_out"]} == set(manifest("stdlib_qa")["heldout_modules"])


# --- the tokenizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Return the path.",
        "def f(self, *, x=1):\n\n    return {'a': x}  # \t end",
        "naïve café ∑ 你好 🎉",
        " leading and trailing ",
        "\r\n\x00",
    ],
)
def test_tokenizer_round_trips(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_special_tokens_are_three_ids_the_model_agrees_on(tokenizer, model):
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len(set(special)) == 3
    config = model.config
    assert [config.pad_token_id, config.bos_token_id, config.eos_token_id] == special
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.model_max_length == config.max_position_embeddings


# --- the instruction set ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "least", "most"), [("train", 2000, 4000), ("heldout", 200, 300)])
def test_rows_are_alpaca_rows(tokenizer, split, least, most):
    data = rows(split)
    assert least <= len(data) <= most
    for r in data:
        assert list(r) == ["instruction", "input", "output"]
        assert all(isinstance(v, str) for v in r.values())
        assert r["instruction"].strip() and r["output"].strip()
    assert max(len(tokenizer(r["output"], add_special_tokens=False).input_ids) for r in data) <= 60
    assert len({(r["instruction"], r["input"]) for r in data}) == len(data)


@pytest.mark.parametrize("split", SPLITS)
def test_manifest_has_the_hash_of_each_split(split):
    recorded = manifest("stdlib_qa")["splits"][split]
    assert hashlib.sha256(stdlib_qa_path(split).read_bytes()).hexdigest() == recorded["sha256"]
    assert len(rows(split)) == recorded["rows"]


def asked_name(row: dict[str, str], tops: set[str]) -> str:
    """The dotted name a question asks about: the one word that starts with a known top-level module."""
    words = [w.strip("?.") for w in row["instruction"].split()]
    names = [w for w in words if "." in w and w.split(".")[0] in tops]
    assert len(names) == 1, row
    return names[0]


def test_held_out_modules_are_asked_about_in_heldout_only():
    held = {m.split(".")[0] for m in manifest("stdlib_qa")["heldout_modules"]}
    seen = {f["module"].split(".")[0] for f in manifest("tiny_base")["files"] if not f["held_out"]}
    assert not held & seen  # whole families
    tops = held | seen
    assert {asked_name(r, tops).split(".")[0] for r in rows("train")} <= seen
    assert {asked_name(r, tops).split(".")[0] for r in rows("heldout")} <= held


def test_no_heldout_sentence_is_a_train_sentence():
    """Lists of parameters may agree (many functions have one `name`): the question holds the answer."""
    answers = {s: {r["output"] for r in rows(s) if not r["instruction"].startswith("Name")} for s in SPLITS}
    assert not answers["heldout"] & answers["train"]


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test'.*train, heldout"):
        stdlib_qa_path("test")


# --- how the rows are made --------------------------------------------------------------------------------

SAMPLE = '''
class Stack(list):
    """A last-in, first-out collection of items.  More text."""

    def peek(self, depth=0, *rest, wide=False):
        """Return the item on top, without
        removing it.

        A second paragraph.
        """

def bare():
    pass

def odd():
    """odd() -> int"""
'''


def test_documented_objects_and_first_sentences(corpus):
    items = list(corpus.documented(corpus.Module("stack", "stack.py", SAMPLE, False)))
    assert [(i.name, i.kind, i.signature) for i in items] == [
        ("stack.Stack", "class", "class Stack(list)"),
        ("stack.Stack.peek", "method", "def peek(self, depth=0, *rest, wide=False)"),
        ("stack.odd", "function", "def odd()"),
    ]
    assert [corpus.first_sentence(i.doc) for i in items] == [
        "A last-in, first-out collection of items.",
        "Return the item on top, without removing it.",
        None,
    ]
    assert corpus.parameter_names(items[1].signature) == ["self", "depth", "wide", "rest"]


def test_relatives_are_held_out_together(corpus):
    for a, b in [("_pyio", "io"), ("asyncio.locks", "asyncio.queues"), ("_strptime", "strptime")]:
        assert corpus.family(a) == corpus.family(b)
    shares = [corpus.is_held_out(f"module{i}") for i in range(2000)]
    expected = 2000 * corpus.HELD_OUT_SHARE  # binomial: five standard deviations
    assert abs(sum(shares) - expected) < 5 * math.sqrt(expected * (1 - corpus.HELD_OUT_SHARE))


def test_same_python_makes_the_same_rows(corpus):
    """The committed files are the output of the committed code, wherever the standard library is the same."""
    recorded = {(f["file"], f["sha256"]) for f in manifest("tiny_base")["files"]}
    modules = corpus.read_modules()
    if {(m.path, hashlib.sha256(m.text.encode()).hexdigest()) for m in modules} != recorded:
        recorded_version = manifest("tiny_base")["python"]
        pytest.skip(f"this Python's standard library is not the recorded one (Python {recorded_version})")
    limits = {s: manifest("stdlib_qa")["splits"][s]["rows"] for s in SPLITS}
    assert corpus.instruction_rows(modules, limits) == {s: rows(s) for s in SPLITS}
