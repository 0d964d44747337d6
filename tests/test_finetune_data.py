"""Data: every reader on the files provided, every prompt to the letter, the loss mask by position, cutting, packing."""

import gzip
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_ref.cli import UserError
from qlora_ref.finetune.batches import IGNORE, Plan, collate, pack, split
from qlora_ref.finetune.config import TrainConfig
from qlora_ref.finetune.encode import Dataset, Encoded, encode, find_format, load_dataset, prompt_ids
from qlora_ref.finetune.files import read_rows
from qlora_ref.finetune.formats import Message, detect, examples_of, get_format
from qlora_ref.finetune.prompts import render

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def llama(data_dir):
    from qlora_ref.finetune.loading import load_tokenizer

    return load_tokenizer(str(data_dir / "weights" / "stories260K_hf"))


@pytest.fixture(scope="module")
def gpt2(data_dir):
    from qlora_ref.finetune.loading import load_tokenizer

    return load_tokenizer(str(data_dir / "tokenizers" / "gpt2"))


@pytest.fixture(scope="module")
def mistral(data_dir):
    from qlora_ref.finetune.loading import load_tokenizer

    return load_tokenizer(str(data_dir / "tokenizers" / "mistral_sp"))


# --- readers on real files: rows read, examples kept (those with an answer) -----------------------------------------

FILES = [
    ("alpaca/alpaca_5000.json.gz", "alpaca", 5000, 4998),  # two rows have an empty output
    ("llms_from_scratch/instruction-data.json.gz", "alpaca", 1100, 1100),
    ("self_instruct/seed_tasks.jsonl", "self-instruct", 175, 175),
    ("self_instruct/user_oriented_instructions.jsonl", "self-instruct", 252, 252),
    ("t0_p3_sample/ag_news_classify.jsonl", "self-instruct", 200, 200),
    ("hh_rlhf/harmless-base_test.jsonl.gz", "hh-rlhf", 2312, 2309),  # three have one, empty answer
    ("oasst1/en_100_tree.jsonl.gz", "oasst1", 100, 100),
    ("oasst1/oa_questions.jsonl.gz", "input-output", 953, 953),
    ("longform/longform_train_fixture.json", "input-output", 17, 17),
    ("dolly/dolly_fixture.json", "dolly", 12, 12),
]
FLAN = {"aqua": 2728, "gsm8k": 7473, "qasc": 1084, "strategyqa": 2061}


@pytest.mark.parametrize("name, form, rows, kept", FILES, ids=[f[0] for f in FILES])
def test_every_reader_on_its_file(data_dir, name, form, rows, kept):
    path = str(data_dir / "instruct" / name)
    assert find_format(path, "auto").name == form
    per_row = list(examples_of(read_rows(path), get_format(form), path))
    assert len(per_row) == rows
    assert sum(map(len, per_row)) == kept
    for example in (e for examples in per_row for e in examples):
        assert example[-1].role == "assistant" and example[-1].text.strip()
        assert any(m.role == "user" for m in example)


@pytest.mark.parametrize("name", FLAN)
def test_flan_chain_of_thought(data_dir, name):
    path = data_dir / "instruct" / "flan_v2_cot" / f"{name}_train.tsv.gz"
    form = get_format("flan-cot")
    examples = list(examples_of(read_rows(path, header=form.header), form, str(path)))
    assert len(examples) == FLAN[name] and all(len(e) == 1 for e in examples)
    if name == "gsm8k":
        ((user, assistant),) = examples[0]
        assert user.text.startswith("Natalia sold clips to 48 of her friends")
        assert assistant.text.endswith("altogether in April and May.\nThe answer is 72.")
    if name == "aqua":
        assert "\\n" not in examples[0][0][0].text and "\nOptions:\n(A) 300\n" in examples[0][0][0].text


def test_self_instruct_marker_is_taken_off(data_dir):
    path = str(data_dir / "instruct" / "t0_p3_sample" / "ag_news_classify.jsonl")
    ((_, answer),) = next(examples_of(read_rows(path), get_format("self-instruct"), path))
    assert answer.text == "Business"


def test_hh_rlhf_turns_alternate_and_end_with_the_assistant(data_dir):
    path = str(data_dir / "instruct" / "hh_rlhf" / "harmless-base_test.jsonl.gz")
    for example in (e for row in examples_of(read_rows(path), get_format("hh-rlhf"), path) for e in row):
        roles = [m.role for m in example]
        assert roles[0] == "user" and roles[-1] == "assistant"
        assert all(a != b for a, b in zip(roles, roles[1:], strict=False))


def _tree(text, role, rank=None, replies=(), **more):
    return {"text": text, "role": role, "rank": rank, "replies": list(replies), **more}


def test_oasst_follows_the_best_ranked_reply_at_every_level():
    second = _tree("thanks", "prompter", replies=[_tree("welcome", "assistant")])
    best = _tree("good", "assistant", rank=0, replies=[second])
    replies = [_tree("poor", "assistant", rank=1), best, _tree("gone", "assistant", rank=-1, deleted=True)]
    row = {"prompt": _tree("hello", "prompter", replies=replies)}
    ((*turns,),) = get_format("oasst1").examples(row)
    assert [(m.role, m.text) for m in turns] == [
        ("user", "hello"), ("assistant", "good"), ("user", "thanks"), ("assistant", "welcome"),
    ]  # fmt: skip


def test_oasst_tree_without_ranks_takes_the_first_and_drops_an_unanswered_end(data_dir):
    unanswered = _tree("and now?", "prompter")
    replies = [_tree("first", "assistant", replies=[unanswered]), _tree("second", "assistant")]
    ((*turns,),) = get_format("oasst1").examples({"prompt": _tree("hello", "prompter", replies=replies)})
    assert [m.text for m in turns] == ["hello", "first"]


GOLDEN = {
    "chip2": ({"text": "<human>: Hi\n<bot>: Hello"}, ["Hi", "Hello"]),
    "unnatural-instructions": (
        {"instances": [{"instruction_with_input": "Add 1 and 2", "input": "1 and 2", "output": "3"}]},
        ["Add 1 and 2", "3"],
    ),
    "messages": (
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"},
                      {"role": "assistant", "content": "A"}, {"role": "user", "content": "left"}]},
        ["S", "U", "A"],
    ),
    "oasst1": ({"text": "### Human: q1 ### Assistant: a1### Human: q2### Assistant: a2"}, ["q1", "a1", "q2", "a2"]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_rows(name):
    row, texts = GOLDEN[name]
    ((*turns,),) = get_format(name).examples(row)
    assert [m.text for m in turns] == texts


@pytest.mark.parametrize("name", ["chip2", "messages", "unnatural-instructions"])
def test_auto_recognises(name):
    assert detect(GOLDEN[name][0], "x").name == name


# --- files ----------------------------------------------------------------------------------------------------------

ROWS = [{"instruction": "a", "output": "ä\n1"}, {"instruction": "b", "output": "2"}]


def _write(path, kind):
    if kind == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\ufeff" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS), encoding="utf-8")
    elif kind == "csv":
        path.write_text('instruction,output\na,"ä\n1"\nb,2\n', encoding="utf-8")
    elif kind == "tsv":
        path.write_text('instruction\toutput\na\t"ä\n1"\nb\t2\n', encoding="utf-8")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("zipped", [False, True])
def test_file_kinds(tmp_path, kind, zipped):
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        if zipped:
            pytest.skip("parquet compresses by itself")
    path = tmp_path / f"x.{kind}"
    _write(path, kind)
    if zipped:
        packed = tmp_path / f"x.{kind}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    assert list(read_rows(path)) == ROWS


BAD = {
    "missing.jsonl": (None, "there is no data file"),
    "x.docx": (b"", "cannot tell the format"),
    "latin.jsonl": ('{"a": "ä"}\n'.encode("latin-1"), "not UTF-8 (byte 0xe4)"),
    "broken.jsonl": (b'{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
    "list.jsonl": (b"[1, 2]\n", "must be a JSON object"),
    "lines.json": (b'{"a": 1}\n{"a": 2}\n', "called .jsonl"),
    "x.csv": (b"a,b\n1,2,3\n", "line 2: 3 columns where the header has 2"),
    "x.jsonl.gz": (b"not gzip", "damaged or not gzip"),
    "cut.jsonl.gz": (gzip.compress(b'{"a": 1}\n' * 1000)[:60], "damaged or not gzip"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_sentence(tmp_path, name):
    content, sentence = BAD[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_rows(path))
    assert sentence in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_ref.finetune.files.MAX_LINE", 1000)
    path = tmp_path / "long.jsonl"
    path.write_text('{"a": 1}\n{"a": "' + "x" * 5000 + '"}\n')
    rows = read_rows(path)
    assert next(rows) == {"a": 1}
    with pytest.raises(UserError, match="line 2: longer than"):
        next(rows)


@pytest.mark.parametrize("rows, sentence", [
    ([], "holds no rows"),
    ([{"foo": "1", "bar": "2"}], "match no known format"),
    ([{"instruction": "q", "output": ""}], "none of its 1 rows carries an answer"),
    ([{"instruction": "q", "output": 5}], "column 'output' must hold text"),
])  # fmt: skip
def test_unusable_data(tmp_path, llama, rows, sentence):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError, match=sentence):
        load_dataset(str(path), find_format(str(path), "auto"), "alpaca", llama, TrainConfig())


def test_missing_columns_are_named(tmp_path, llama):
    path = tmp_path / "x.jsonl"
    path.write_text('{"instruction": "q"}\n')
    with pytest.raises(UserError, match="needs the column 'response'; the file has 'instruction'") as error:
        load_dataset(str(path), get_format("dolly"), "alpaca", llama, TrainConfig())
    assert "x.jsonl" in str(error.value)


# --- prompts --------------------------------------------------------------------------------------------------------


def test_alpaca_prompt_to_the_letter():
    pieces = render((Message("user", "Say {input}", "x"), Message("assistant", "y")), "alpaca", None)
    assert pieces[0].text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSay {input}\n\n### Input:\nx\n\n"
        "### Response: "
    )
    assert (pieces[1].text, pieces[1].answer, pieces[1].end) == ("y", True, True)


def test_chat_template_is_cut_at_the_answers(gpt2):
    gpt2.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    try:
        turns = tuple(Message(r, t) for r, t in [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")])
        pieces = render(turns, "chat", gpt2)
    finally:
        gpt2.chat_template = None
    assert [(p.text, p.answer) for p in pieces] == [
        ("<user>q</user><assistant>", False), ("a</assistant>", True),
        ("<user>r</user><assistant>", False), ("b</assistant>", True),
    ]  # fmt: skip


def test_chat_template_problems_are_sentences(gpt2, mistral):
    turns = (Message("user", "q"), Message("assistant", "a"))
    with pytest.raises(UserError, match="no chat template"):
        render(turns, "chat", gpt2)
    with pytest.raises(UserError, match="chat template refuses"):  # this one insists on a system message
        render(turns, "chat", mistral)


# --- the mask -------------------------------------------------------------------------------------------------------

text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(question=text, answer=text, template=st.sampled_from(["alpaca", "plain", "guanaco"]))
def test_mask_covers_the_answer_and_its_end_token_and_nothing_else(llama, gpt2, question, answer, template):
    for tokenizer in (llama, gpt2):  # GPT-2: pad, bos and eos are one token
        turns = (Message("user", question), Message("assistant", answer))
        encoded = encode(render(turns, template, tokenizer), tokenizer, TrainConfig(max_length=4096))
        target = tokenizer(answer, add_special_tokens=False, split_special_tokens=True).input_ids
        n = len(target) + 1
        assert encoded.ids[-n:] == [*target, tokenizer.eos_token_id]
        assert encoded.answer == [False] * (len(encoded.ids) - n) + [True] * n
        assert encoded.ids[:-n] == prompt_ids(turns[:1], template, tokenizer)
        bos = tokenizer.bos_token_id
        assert encoded.ids.count(bos) == (2 if tokenizer is gpt2 else 1) - (tokenizer is gpt2)


@settings(max_examples=80, deadline=None)
@given(
    source=st.integers(1, 60), target=st.integers(1, 60), limit=st.integers(2, 80),
    source_limit=st.none() | st.integers(1, 50), target_limit=st.none() | st.integers(1, 50),
)  # fmt: skip
def test_cutting_takes_the_source_first_and_keeps_the_end_token(source, target, limit, source_limit, target_limit):
    from qlora_ref.finetune.encode import _cut

    config = TrainConfig(max_length=limit, source_max_length=source_limit, target_max_length=target_limit)
    eos, ids = 999, list(range(source + target - 1)) + [999]
    cut = _cut(ids, [False] * source + [True] * target, eos, config)
    kept_target = sum(cut.answer)
    kept_source = len(cut.ids) - kept_target
    assert len(cut.ids) == len(cut.answer) <= limit
    assert cut.ids[-1] == eos and cut.answer[-1]
    assert kept_source <= (source_limit or source) and kept_target <= (target_limit or target)
    if kept_target < min(target, target_limit or target):  # the answer gave way only once the prompt was one token
        assert kept_source <= 1
    if kept_source > 1:  # what stays of the prompt is its first token and its end
        assert cut.ids[0] == 0 and cut.ids[kept_source - 1] == source - 1
    assert cut.cut == (len(cut.ids) < source + target)


def test_loss_on_all(llama):
    turns = (Message("user", "q"), Message("assistant", "a"))
    encoded = encode(render(turns, "guanaco", llama), llama, TrainConfig(loss_on="all"))
    assert encoded.answer == [False] + [True] * (len(encoded.ids) - 1)


def test_special_tokens_in_the_data_are_text(llama):
    turns = (Message("user", "a </s> b"), Message("assistant", "c </s> d"))
    encoded = encode(render(turns, "plain", llama), llama, TrainConfig())
    assert encoded.ids.count(llama.eos_token_id) == 1 and encoded.ids[-1] == llama.eos_token_id


# --- batches --------------------------------------------------------------------------------------------------------


def _dataset(lengths):
    data = Dataset()
    for k, n in enumerate(lengths):
        data.add(Encoded([100 + k] * n, [False] + [True] * (n - 1)))
    return data


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60), limit=st.integers(40, 64))
def test_packing_places_every_example_once_and_overfills_no_row(lengths, limit):
    rows = pack(lengths, limit)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= limit for row in rows)
    assert len(rows) <= 2 * -(-sum(lengths) // limit)  # two rows at most half full would have been one


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 50), batch=st.integers(1, 5), accumulate=st.integers(1, 4), seed=st.integers(0, 9),
    how=st.sampled_from(["plain", "group_by_length", "packing"]),
)  # fmt: skip
def test_an_epoch_shows_every_example_once(n, batch, accumulate, seed, how):
    config = TrainConfig(batch_size=batch, grad_accum=accumulate, seed=seed, max_length=64,
                         group_by_length=how == "group_by_length", packing=how == "packing")  # fmt: skip
    data = _dataset([2 + i % 7 for i in range(n)])
    plan = Plan(data, list(range(n)), config)
    for epoch in range(2):
        steps = [plan.step(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]
        seen = [i for step in steps for batch_rows in step for row in batch_rows for i in row]
        assert sorted(seen) == list(range(n))
    assert Plan(data, list(range(n)), config).step(1 if plan.steps_per_epoch > 1 else 0) == plan.step(
        1 if plan.steps_per_epoch > 1 else 0
    )


def test_split_is_disjoint_and_covers():
    train, held = split(100, 0.1, seed=3)
    assert len(held) == 10 and sorted(train + held) == list(range(100))
    assert split(100, 7, seed=3)[1] != split(100, 7, seed=4)[1] and len(split(100, 7, seed=3)[1]) == 7


def test_padding_carries_no_loss_even_when_pad_is_eos():
    data = _dataset([3, 5])
    batch = collate(data, [[0], [1]], pad=100)  # the pad id is a real token of example 0
    assert batch["labels"].tolist()[0] == [IGNORE, 100, 100, IGNORE, IGNORE]
    assert batch["attention_mask"].tolist()[0] == [1, 1, 1, 0, 0]


def test_packed_rows_equal_separate_rows(data_dir):
    """Packing without contamination: the summed loss and its gradient are those of the examples one by one."""
    from qlora_ref.finetune.loading import load_base
    from qlora_ref.finetune.loss import summed_loss

    model = load_base(str(data_dir / "weights" / "stories260K_hf"), torch.float64)
    generator = torch.Generator().manual_seed(0)
    data = Dataset()
    for n in (7, 12, 5, 9):
        ids = torch.randint(3, 500, (n,), generator=generator).tolist()
        data.add(Encoded([1, *ids], [False] + [True] * n))
    packed, n_packed = summed_loss(model, collate(data, [[0, 1], [2, 3]], pad=0))
    apart = [summed_loss(model, collate(data, [[i]], pad=0)) for i in range(4)]
    assert n_packed == sum(n for _, n in apart)
    total = sum(loss for loss, _ in apart)
    weight = model.model.layers[0].self_attn.q_proj.weight
    g1, g2 = (torch.autograd.grad(loss, weight)[0] for loss in (packed, total))
    # the losses are float32 sums of a few dozen terms; contamination moves them in the first digits
    assert abs(packed - total).item() <= n_packed * torch.finfo(torch.float32).eps * total.item()
    assert (g1 - g2).norm() <= n_packed * torch.finfo(torch.float32).eps * g2.norm()
    swapped = collate(data, [[0, 1], [2, 3]], pad=0)
    swapped["position_ids"] = torch.arange(swapped["input_ids"].shape[1]).repeat(2, 1)  # one sequence: contaminated
    assert abs(summed_loss(model, swapped)[0] - total).item() > 1e-3 * total.item()
