"""Generations and perplexity: local models, an endpoint, and what happens after an interruption."""

import json
import math

import pytest
import torch

from evaluation_models import ScriptedModel, byte_tokenizer, tiny_llama
from evaluation_stub_server import StubServer
from qlora_ref.cli import UserError
from qlora_ref.evaluation import cli
from qlora_ref.evaluation.answers import Question, read_answers
from qlora_ref.evaluation.endpoint import CallFailed
from qlora_ref.evaluation.generate import Sampling, fill, generation_row, local_generator, run
from qlora_ref.evaluation.perplexity import _windows, perplexity

pytestmark = pytest.mark.hf
QUESTIONS = {i: Question(i, f"Question {i}?", None, "question_id") for i in range(5)}


def test_answers_do_not_depend_on_order_or_interruption(tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    generate = local_generator(model, tokenizer, "guanaco", Sampling(max_new_tokens=12))
    assert run(QUESTIONS, generate, tmp_path / "whole.jsonl", {}, Sampling(max_new_tokens=12)) == (5, 0, [])
    calls = []

    def interrupted(question):
        calls.append(question.item)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(question)

    with pytest.raises(KeyboardInterrupt):
        run(QUESTIONS, interrupted, tmp_path / "parts.jsonl", {}, Sampling(max_new_tokens=12))
    assert len(read_answers(tmp_path / "parts.jsonl")) == 2
    assert run(QUESTIONS, generate, tmp_path / "parts.jsonl", {}, Sampling(max_new_tokens=12)) == (3, 2, [])
    whole = read_answers(tmp_path / "whole.jsonl")
    assert read_answers(tmp_path / "parts.jsonl") == whole
    assert len({a.text for a in whole.values()}) == 5
    other = local_generator(model, tokenizer, "guanaco", Sampling(max_new_tokens=12, seed=1))
    assert other(QUESTIONS[0]) != generate(QUESTIONS[0]) == generate(QUESTIONS[0])
    with pytest.raises(ValueError, match="seed differ"):
        run(QUESTIONS, other, tmp_path / "parts.jsonl", {}, Sampling(max_new_tokens=12, seed=1))


def test_nucleus_sampling_draws_from_the_nucleus_only():
    """Frequencies of the first token against the renormalised nucleus of the model's own distribution."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    sampling = Sampling(max_new_tokens=1)
    ids = torch.tensor([tokenizer(fill("plain", "x"))["input_ids"]])
    with torch.no_grad():
        p = torch.softmax(model(ids).logits[0, -1] / sampling.temperature, -1)
    ranked, index = p.sort(descending=True)
    inside = ranked.cumsum(0) - ranked < sampling.top_p  # the smallest set that reaches top_p
    nucleus = {int(i): float(q) for i, q in zip(index[inside], ranked[inside] / ranked[inside].sum(), strict=True)}
    drawn = []
    original = model.generate

    def spy(*args, **kwargs):
        out = original(*args, **kwargs)
        drawn.append(int(out[0, -1]))
        return out

    model.generate = spy
    generate = local_generator(model, tokenizer, "plain", sampling)
    n = 60
    for i in range(n):
        generate(Question(i, "x", None, "question_id"))
    assert set(drawn) <= set(nucleus) and len(nucleus) < 258
    top, q = max(nucleus.items(), key=lambda kv: kv[1])
    assert abs(drawn.count(top) / n - q) < 5 * math.sqrt(q * (1 - q) / n)


def test_an_invented_next_turn_is_cut_from_what_is_judged():
    q = QUESTIONS[1]
    assert generation_row(q, "Yes.") == {"question_id": 1, "generation": "Yes."}
    row = generation_row(q, "Yes.\n### Human: and?")
    assert row["generation_truncated"] == "Yes." and row["generation"].endswith("and?")


def test_templates():
    assert fill("guanaco", "Why {x}?") == "### Human: Why {x}?\n### Assistant:"
    with pytest.raises(ValueError, match="holds {question}"):
        fill("alpacca", "x")
    for bad in ({"top_p": 0}, {"temperature": -1}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match="sampling needs"):
            Sampling(**bad)


def test_failures_are_listed_not_written(tmp_path):
    def sometimes(question):
        if question.item == 2:
            raise CallFailed("HTTP 400: too long")
        return "fine"

    assert run(QUESTIONS, sometimes, tmp_path / "a.jsonl", {}, Sampling()) == (4, 0, ["2: HTTP 400: too long"])
    assert set(read_answers(tmp_path / "a.jsonl")) == {0, 1, 3, 4}


def test_command_line_endpoint_and_local(tmp_path, data_dir, capsys):
    rows = [{"message_id": f"m{i}", "text": f"Once upon a time {i}"} for i in range(3)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["generate", "--questions", str(tmp_path / "q.jsonl")]
    with StubServer(plan=lambda n: 500 if n == 1 else "ok", reply=lambda p: f"re: {p}") as stub:
        flags = ["--out", str(tmp_path / "e.jsonl"), "--base-url", stub.url, "--model", "m", "--pause", "0.001"]
        assert cli.main([*command, *flags]) == 0
    body = stub.bodies[0]
    assert (body["top_p"], body["temperature"], body["max_tokens"]) == (0.9, 0.7, 512)
    assert read_answers(tmp_path / "e.jsonl")["m2"].text == "re: Once upon a time 2"
    model = str(data_dir / "weights" / "stories260K_hf")
    local = ["--out", str(tmp_path / "l.jsonl"), "--model-folder", model, "--template", "plain", "--temperature", "0"]
    assert cli.main([*command, *local, "--max-new-tokens", "30"]) == 0
    local[1] = str(tmp_path / "again.jsonl")
    assert cli.main([*command, *local, "--max-new-tokens", "30", "--seed", "9"]) == 0
    first, again = (read_answers(tmp_path / name) for name in ("l.jsonl", "again.jsonl"))
    assert first == again and all(a.text.isascii() and " " in a.text for a in first.values())  # greedy, English
    with pytest.raises(UserError, match="say who answers"):
        cli.main([*command, "--out", str(tmp_path / "n.jsonl")])


def test_windows_score_every_token_but_the_first_once():
    for n in range(2, 40):
        for window in range(2, 12):
            for context in range(1, window):
                scored = [t for _, first, end in _windows(n, window, context) for t in range(first, end)]
                assert scored == list(range(1, n))
                assert all(
                    end - begin <= window and begin < first for begin, first, end in _windows(n, window, context)
                )


def test_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary():
    class Uniform(ScriptedModel):
        def forward(self, input_ids, attention_mask):
            from types import SimpleNamespace

            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 258))

    text = "é" * 50
    found = perplexity(Uniform(None, 258), byte_tokenizer(), text, window=16, context=3)
    assert found.perplexity == pytest.approx(258) and found.n_scored == 100
    assert found.bits_per_byte == pytest.approx(math.log2(258))


def test_perplexity_equals_the_model_s_own_loss():
    model, tokenizer = tiny_llama(256), byte_tokenizer()
    text = "The quick brown fox. " * 9
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        own = model(ids, labels=ids).loss.item()
        logits = model(ids).logits[0].log_softmax(-1)
    one = perplexity(model, tokenizer, text, window=256, context=1)
    assert one.nll == pytest.approx(own, rel=1e-5) and one.n_scored == ids.shape[1] - 1
    # Sliding windows against the definition: each token from the context that its window holds.
    slid = perplexity(model, tokenizer, text, window=32, context=8, batch_size=3)
    total = 0.0
    with torch.no_grad():
        for begin, first, end in _windows(ids.shape[1], 32, 8):
            part = model(ids[:, begin:end]).logits[0].log_softmax(-1)
            total -= sum(part[t - begin - 1, ids[0, t]].item() for t in range(first, end))
    assert slid.nll == pytest.approx(total / slid.n_scored, rel=1e-5) and logits.isfinite().all()
    for window, context in ((32, 32), (32, 0), (512, 8)):
        with pytest.raises(ValueError, match="context < window"):
            perplexity(model, tokenizer, text, window, context)
    with pytest.raises(ValueError, match="fewer than two"):
        perplexity(model, tokenizer, "")


def test_command_line_perplexity(tmp_path, data_dir, capsys):
    (tmp_path / "t.txt").write_text("Once upon a time, there was a little girl named Lily. She loved to play.\n" * 3)
    model = str(data_dir / "weights" / "stories260K_hf")
    assert cli.main(["perplexity", str(tmp_path / "t.txt"), "--model-folder", model, "--format", "json"]) == 0
    line = json.loads(capsys.readouterr().out)["tables"]["perplexity"][0]
    assert line["perplexity"] < 10  # a story in its own words, against a vocabulary of 512
