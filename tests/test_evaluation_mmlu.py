"""MMLU: prompts against the published ones, both averages, an oracle, a constant, batching, the callback."""

import csv
import io
import math
import zipfile

import numpy as np
import pytest
import torch

from evaluation_models import ScriptedModel, byte_tokenizer, tiny_llama
from qlora_ref.cli import UserError
from qlora_ref.evaluation import cli
from qlora_ref.evaluation.mmlu import LETTERS, constant_baselines, read_mmlu, score
from qlora_ref.evaluation.mmlu_model import LetterScorer, evaluate_mmlu, letter_tokens
from qlora_ref.evaluation.records import BadInput

pytestmark = pytest.mark.hf


def _csv(rows):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


@pytest.fixture
def release(tmp_path):
    """A made-up release: two subjects of 3 and 6 questions, with commas, quotes, newlines and U+0085 inside."""
    path = tmp_path / "mmlu.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for subject, n in (("big_words", 6), ("small", 3)):
            for split, rows in (("dev", 5), ("val", 2), ("test", n)):
                data = [[f'{split} {i}, "q"\nx\x85?', "a", "b,b", "c", "d", LETTERS[i % 4]] for i in range(rows)]
                archive.writestr(f"data/{split}/{subject}_{split}.csv", _csv(data))
    return path


def _oracle(items, scorer_of):
    """A scripted model that knows the answer to every exact prompt (and only those)."""
    table = {}
    model = ScriptedModel(lambda ids: table[ids], 600)
    scorer = scorer_of(model)
    table.update({tuple(scorer.encode(item)): scorer.letters.ids[item.gold] for item in items})
    return scorer


def test_prompts_are_rebuilt_character_for_character(data_dir):
    published = read_mmlu(data_dir / "evaluation" / "mmlu_zero_shot_val.jsonl.gz")
    rebuilt = read_mmlu(data_dir / "eval" / "mmlu" / "mmlu.zip", "val", n_shots=0)
    assert len(published) == len(rebuilt) == 1531
    ours = sorted((i.subject, i.prompt(), i.gold) for i in rebuilt)
    assert ours == sorted((i.subject, i.prompt(), i.gold) for i in published)
    assert len(read_mmlu(data_dir / "eval" / "mmlu" / "mmlu.zip", "test", 0)) == 14_042


def test_five_shot_prompt(release):
    item = read_mmlu(release, "test")[0]
    prompt = item.prompt()
    assert prompt.startswith("The following are multiple choice questions (with answers) about  big words.\n\ndev 0")
    assert prompt.count("Answer:") == 6 and prompt.endswith("D. d\nAnswer:")
    assert "Answer: A\n\n" in prompt and "Answer: B\n\n" in prompt and "\x85" in prompt
    assert len(read_mmlu(release, "test")) == 9 and item.prompt(0) == read_mmlu(release, "test", 0)[0].prompt()


def test_constant_answers_score_their_exact_base_rate(data_dir):
    items = read_mmlu(data_dir / "evaluation" / "mmlu_zero_shot_val.jsonl.gz")
    notes = {
        "A": (0.2572, 0.2489, 381),
        "B": (0.2395, 0.2476, 379),
        "C": (0.2420, 0.2528, 387),
        "D": (0.2612, 0.2508, 384),
    }
    for letter, baseline in constant_baselines(items).items():
        macro, micro, count = notes[letter]
        assert baseline.micro == count / 1531 == sum(i.gold == LETTERS.index(letter) for i in items) / 1531
        assert (round(baseline.macro, 4), round(baseline.micro, 4)) == (macro, micro)
    assert {n for _, n in baseline.subjects.values()} >= {8, 170}


@pytest.mark.parametrize("shots", [0, 5])
def test_oracle_scores_all_and_constant_its_base_rate(release, shots):
    items, tokenizer = read_mmlu(release, "test", shots), byte_tokenizer()
    result, nll = evaluate_mmlu(_oracle(items, lambda m: LetterScorer(m, tokenizer, batch_size=4)), items)
    assert (result.macro, result.micro, result.macro_se, result.micro_se) == (1, 1, 0, 0)
    assert nll == pytest.approx(math.log(math.e + 3) - 1)
    b = letter_tokens(tokenizer).ids[1]
    result, _ = evaluate_mmlu(LetterScorer(ScriptedModel(lambda ids: b, 258), tokenizer), items)
    # B is the answer to 2 of 6 and to 1 of 3... questions i % 4 == 1: {1, 5} and {1}
    assert (result.macro, result.micro) == (pytest.approx((2 / 6 + 1 / 3) / 2), pytest.approx(3 / 9))
    assert result.metrics("eval")["mmlu_eval_accuracy_small"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_oracle_and_constant_on_the_published_prompts(data_dir, every):
    from qlora_ref.evaluation.local_model import load_tokenizer

    tokenizer = load_tokenizer(data_dir / "weights" / "stories260K_hf")
    items = read_mmlu(data_dir / "evaluation" / "mmlu_zero_shot_val.jsonl.gz")[::every]
    result, _ = evaluate_mmlu(_oracle(items, lambda m: LetterScorer(m, tokenizer, 64)), items)
    assert (result.micro, result.macro, result.n, len(result.subjects)) == (1, 1, -(-1531 // every), 57)
    always_d = letter_tokens(tokenizer).ids[3]
    result, _ = evaluate_mmlu(LetterScorer(ScriptedModel(lambda ids: always_d, 512), tokenizer, 64), items)
    assert result == constant_baselines(items)["D"]


def test_macro_and_micro_differ_and_carry_errors():
    class Item:
        def __init__(self, subject, gold):
            self.subject, self.gold = subject, gold

    items = [Item("a", 0)] * 8 + [Item("b", 1)] * 2
    result = score(items, np.array([0] * 4 + [1] * 4 + [1] * 2))
    assert (result.macro, result.micro) == (0.75, 0.6)
    assert result.macro_se == pytest.approx(math.sqrt(0.25 / 8) / 2)
    with pytest.raises(ValueError, match="same number"):
        score(items, np.zeros(3))


def test_logits_equal_one_prompt_at_a_time(release):
    """Batches, padding and kept positions change nothing: against the model run on each prompt alone."""
    items, tokenizer, model = read_mmlu(release, "test", 1), byte_tokenizer(), tiny_llama(positions=512)
    scorer = LetterScorer(model, tokenizer, batch_size=4)
    got = scorer.logits(items)
    for item, row in zip(items, got, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([tokenizer(item.prompt(1) + " ")["input_ids"]])).logits[0, -1]
        want = alone[list(scorer.letters.ids)].numpy()
        # float32 sums of at most `hidden` = 16 products per layer, twice over: far below the gaps between letters
        bound = 64 * np.finfo(np.float32).eps * np.abs(alone.numpy()).max()
        assert np.abs(row - want).max() <= bound
    assert len({tuple(np.round(row, 3)) for row in got}) > 1


def test_long_prompts_lose_examples_first_and_are_counted(release):
    items, tokenizer = read_mmlu(release, "test"), byte_tokenizer()
    full = LetterScorer(tiny_llama(4096), tokenizer)
    lengths = [len(full.encode(item)) for item in items]
    short = LetterScorer(tiny_llama(4096), tokenizer, max_length=max(lengths) - 1)
    ids = short.encode(max(items, key=lambda i: len(full.encode(i))))
    text = tokenizer.decode(ids)
    assert text.startswith("<s>The following") and text.count("Answer:") == 5 and short.shortened == 1
    tiny = LetterScorer(tiny_llama(64), tokenizer)
    assert tiny.max_length == 64
    ids = tiny.encode(items[0])
    assert len(ids) == 64 and ids[0] == 256 and tokenizer.decode(ids).endswith("Answer: ") and tiny.cut == 1


def test_letter_tokens_of_real_tokenizers(data_dir):
    from qlora_ref.evaluation.local_model import load_tokenizer

    mistral = load_tokenizer(data_dir / "tokenizers" / "mistral_sp")
    assert letter_tokens(mistral).pieces == ("▁A", "▁B", "▁C", "▁D")
    assert letter_tokens(mistral, "bare").pieces == tuple(LETTERS)
    assert letter_tokens(load_tokenizer(data_dir / "tokenizers" / "gpt2")).pieces == ("ĠA", "ĠB", "ĠC", "ĠD")
    stories = load_tokenizer(data_dir / "weights" / "stories260K_hf")
    with pytest.raises(ValueError, match="not four tokens"):
        letter_tokens(stories, "space")  # " B" is one token there, " A" two
    assert letter_tokens(stories).pieces == tuple(LETTERS)
    assert letter_tokens(byte_tokenizer()).lead == (byte_tokenizer()("a b")["input_ids"][2],)


@pytest.mark.parametrize(
    ("member", "content", "says"),
    [
        ("data/test/small_test.csv", _csv([["q", "a", "b", "c", "d", "E"]]), "row 1"),
        ("data/test/small_test.csv", _csv([["q", "a", "b", "c", "A"]]), "row 1"),
        ("data/test/other_test.csv", _csv([["q", "a", "b", "c", "d", "A"]]), "other_dev.csv is missing"),
    ],
)
def test_bad_releases_are_refused(tmp_path, member, content, says):
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/dev/small_dev.csv", _csv([["q", "a", "b", "c", "d", "A"]]))
        archive.writestr(member, content)
    with pytest.raises(BadInput, match=says):
        read_mmlu(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match="damaged"):
        read_mmlu(path)
    with pytest.raises(BadInput, match="no such file"):
        read_mmlu(tmp_path / "absent.zip")


def test_callback_adds_metrics_during_training(release, tmp_path):
    from transformers import Trainer, TrainingArguments

    from qlora_ref.evaluation.mmlu_callback import MMLUCallback

    tokenizer, model = byte_tokenizer(), tiny_llama(512)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2
    arguments = TrainingArguments(
        tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    items = read_mmlu(release, "val", 0)
    trainer.add_callback(MMLUCallback(items, tokenizer, split="eval", batch_size=2))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "mmlu_eval_accuracy" in entry]
    want, _ = evaluate_mmlu(LetterScorer(model, tokenizer), items)
    assert len(logged) == 1 and logged[0]["mmlu_eval_accuracy"] == want.macro
    assert {"mmlu_eval_accuracy_small", "mmlu_eval_accuracy_big_words"} <= set(logged[0])
    assert trainer.evaluate()["mmlu_eval_accuracy"] == want.macro


def test_command_line_with_an_adapter(data_dir, tmp_path, capsys):
    """The official release on stories260K with a random LoRA adapter on top: it runs, and the adapter counts."""
    import json

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = data_dir / "weights" / "stories260K_hf"
    base = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    get_peft_model(base, LoraConfig(init_lora_weights=False, target_modules="all-linear")).save_pretrained(tmp_path)
    command = ["mmlu", str(data_dir / "eval" / "mmlu" / "mmlu.zip"), "--model-folder", str(folder)]
    command += ["--subjects", "anatomy,virology", "--limit", "4", "--format", "json", "--split", "val"]
    losses = []
    for more in ([], ["--adapter", str(tmp_path)], ["--adapter", str(tmp_path), "--quantize", "nf4"]):
        assert cli.main(command + more) == 0
        result = json.loads(capsys.readouterr().out)
        assert [line["subject"] for line in result["tables"]["subjects"]] == ["anatomy", "virology"]
        losses.append(result["tables"]["answer loss"][0]["nats"])
    assert len(set(losses)) == 3  # the adapter counts, and so do the four bits under it
    with pytest.raises(UserError, match="no subject astrology"):
        cli.main(["mmlu", command[1], "--model-folder", str(folder), "--subjects", "astrology"])
    with pytest.raises(UserError, match="not a tokenizer folder"):
        cli.main(["mmlu", command[1], "--model-folder", str(tmp_path / "absent")])
