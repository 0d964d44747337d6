"""Judges: prompts, parsing, a hostile server, resuming after a kill, and a key that is never written down."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation_stub_server import StubServer
from qlora_ref.cli import UserError
from qlora_ref.evaluation import cli
from qlora_ref.evaluation.endpoint import CallFailed, Endpoint, EndpointRefuses
from qlora_ref.evaluation.judge_parse import parse_relative, parse_threeclass, parse_threeclass_loose
from qlora_ref.evaluation.judge_prompts import judge_messages, prompt_id
from qlora_ref.evaluation.ledger import Ledger
from qlora_ref.evaluation.records import BadInput, read_rows
from qlora_ref.evaluation.tournament import read_ratings

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def benchmark(tmp_path):
    """Four questions, three systems; the command line that judges them."""
    questions = [
        {"question_id": q, "text": f"Question {q}?", "category": c} for q, c in enumerate(["math", "coding", "x", "x"])
    ]
    _write(tmp_path / "questions.jsonl", questions)
    command = ["judge", "--questions", str(tmp_path / "questions.jsonl"), "--out", str(tmp_path / "ratings.jsonl")]
    for name in ("one", "two", "chatgpt"):
        _write(tmp_path / f"{name}.jsonl", [{"question_id": q, "text": f"{name} says {q} {{}} é"} for q in range(4)])
        command += ["--answers", f"{name}={tmp_path / name}.jsonl"]
    return command, tmp_path / "ratings.jsonl"


def _write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def _endpoint(stub, **more):
    return ["--base-url", stub.url, "--model", "m", "--yes", "--pause", "0.001", *more.pop("flags", [])]


def test_prompts_equal_the_published_ones(data_dir):
    published = json.loads((data_dir / "evaluation" / "judge_prompts.json").read_text())
    names = {"vicuna_prompt_relative": "relative", "vicuna_prompt_threeclass": "threeclass"}
    names["oa_prompt_threeclass"] = "oa-threeclass"
    for key, kind in names.items():
        for prompt in published[key]:
            category = prompt["category"]
            want = prompt["prompt_template"].format(question="Q {x}", answer_1="A", answer_2="B", **prompt["defaults"])
            got = judge_messages(kind, category, "Q {x}", "A", "B")
            assert [m["content"] for m in got] == [prompt["system_prompt"], want]
    assert prompt_id("threeclass", "math") == 3 and prompt_id("oa-threeclass", "math") == 1


def test_strict_parsers_reproduce_the_published_scores(data_dir):
    rows = read_rows(data_dir / "evaluation" / "relative_vicuna_gpt4.jsonl.gz")
    rated = [r for r in rows if r["score"] != [-1, -1]]
    assert all(list(parse_relative(r["review"], r["reviewer_id"])) == r["score"] for r in rated)
    rows = read_rows(data_dir / "evaluation" / "pairwise_vicuna_gpt4.jsonl.gz")
    assert all(parse_threeclass(r.get("review") or r["last_line"]) == r["score"] for r in rows)


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ("because\n2", 2, 2),
        ("because\n 2 \n\n", 2, 2),
        ("2\nbecause", -1, -1),
        ("Best answer: 2", -1, 2),
        ("**1**", -1, 1),
        ("1 or 2", -1, -1),
        ("4", -1, -1),
        ("0", -1, -1),
        ("2.5", -1, -1),
        ("I choose 3 as Assistant 1 and Assistant 2 are equal", -1, 3),
        ("error", -1, -1),
        ("", -1, -1),
    ],
)
def test_threeclass_parsing(text, strict, loose):
    assert (parse_threeclass(text), parse_threeclass_loose(text)) == (strict, loose)


@pytest.mark.parametrize(
    ("text", "prompt", "pair"),
    [
        ("8 9.5\nbecause", 1, (8, 9.5)),
        ("8, 9\nbecause", 2, (8, 9)),
        ("8 11\n", 1, (-1, -1)),
        ("Scores: 8 9", 1, (-1, -1)),
        ("8", 1, (-1, -1)),
        ("-1 -1", 1, (-1, -1)),
        ("work\n\nOutput: (10, 1)", 3, (10, 1)),
        ("at (10, 4)\nScores:\nAssistant 1: 2\nAssistant 2: 9\nso 2 wins", 3, (2, 9)),
        ("9 9\nno tuple", 3, (-1, -1)),
    ],
)
def test_relative_parsing(text, prompt, pair):
    assert parse_relative(text, prompt) == pair


def test_every_passing_fault_is_retried_and_pauses_grow():
    faults = [500, "garbage", 429, "empty", "cut", 503]
    pauses = []
    with StubServer(plan=lambda n: faults[n] if n < len(faults) else "ok") as stub:
        reply = Endpoint(stub.url, "m", sleep=pauses.append).chat(MESSAGES, temperature=0.2)
    assert (reply.text, reply.attempts, reply.prompt_tokens) == ("Both are fine.\n3", 7, 7)
    assert stub.bodies[0] == {"model": "m", "messages": MESSAGES, "temperature": 0.2}
    assert pauses[2] == 7.0  # the server's Retry-After
    assert all(0.5 * 2**i <= p <= 2**i for i, p in enumerate(pauses) if i != 2)


def test_a_hanging_server_is_left_and_asked_again():
    with StubServer(plan=lambda n: "hang" if n == 0 else "ok", hang=5) as stub:
        start = time.monotonic()
        reply = Endpoint(stub.url, "m", timeout=0.3, pause=0.01).chat(MESSAGES)
    assert reply.attempts == 2 and time.monotonic() - start < 5


def test_faults_that_do_not_pass():
    with StubServer(plan=lambda n: 400) as stub, pytest.raises(CallFailed, match="HTTP 400"):
        Endpoint(stub.url, "m").chat(MESSAGES)
    assert stub.n == 1
    with StubServer(plan=lambda n: 401) as stub, pytest.raises(EndpointRefuses, match="HTTP 401"):
        Endpoint(stub.url, "m").chat(MESSAGES)
    with StubServer(plan=lambda n: 302) as stub, pytest.raises(CallFailed, match="HTTP 302"):
        Endpoint(stub.url, "m").chat(MESSAGES)
    with StubServer(plan=lambda n: 500) as stub, pytest.raises(CallFailed, match="after 3 attempts"):
        Endpoint(stub.url, "m", retries=2, pause=0).chat(MESSAGES)
    with pytest.raises(CallFailed, match="ConnectionRefused"):
        Endpoint("http://127.0.0.1:9/v1", "m", retries=1, pause=0).chat(MESSAGES)
    for url, says in (("localhost:8000", "base URL"), ("http://me:secret@host/v1", "no user name")):
        with pytest.raises(ValueError, match=says):
            Endpoint(url, "m")


def test_the_key_is_sent_and_never_shown(benchmark, monkeypatch, capsys):
    command, out = benchmark
    key = "sk-very-secret-123"
    monkeypatch.setenv("MY_KEY", key)
    plan = lambda n: 400 if n == 3 else 500 if n == 5 else "ok"
    with StubServer(plan=plan) as stub:
        endpoint = Endpoint(stub.url, "m", key_env="MY_KEY")
        assert cli.main([*command, *_endpoint(stub), "--key-env", "MY_KEY", "--workers", "1"]) == 1
        assert stub.headers[0]["Authorization"] == f"Bearer {key}"
    printed = capsys.readouterr()
    assert "[key]" in printed.out and "1 failed for good" in printed.out
    written = "".join(p.read_text() for p in out.parent.iterdir())
    for text in (printed.out, printed.err, written, repr(endpoint)):
        assert key not in text
    with pytest.raises(ValueError, match="unencrypted"):
        Endpoint("http://example.org/v1", "m", key_env="MY_KEY")
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ValueError, match="MY_KEY .* is not set"):
        Endpoint("https://example.org/v1", "m", key_env="MY_KEY")


def test_judging_a_hostile_server_rates_every_pair_once(benchmark, capsys):
    """A third of the requests fail in some way; some verdicts cannot be parsed; nothing is lost or repeated."""
    command, out = benchmark
    rng = random.Random(0)
    faults = [rng.choice(["ok", "ok", "ok", 500, 429, "garbage", "cut", "empty"]) for _ in range(1000)]
    reply = lambda prompt: "no idea" if "one says 2" in prompt else "fine\n1"
    with StubServer(plan=lambda n: 500 if faults[n] == 429 else faults[n], reply=reply) as stub:
        assert cli.main([*command, *_endpoint(stub), "--retries", "30"]) == 0
        assert set(stub.seen.values()) == {1} and len(stub.seen) == 3 * 2 * 4
        asked = stub.n
        assert cli.main([*command, *_endpoint(stub)]) == 0
        assert stub.n == asked
    printed = capsys.readouterr().out
    assert "4 unparsed" in printed and "24 of 24 ratings are there" in printed
    ratings = read_ratings(read_rows(out))
    assert ratings.label_counts == {1: 20, -1: 4} and not ratings.notes.counts
    assert {r["reviewer_id"] for r in read_rows(out)} == {1, 2, 3}


def test_a_killed_run_goes_on_without_losing_or_repeating(benchmark):
    command, out = benchmark
    with StubServer(plan=lambda n: "slow") as stub:
        program = "import sys; from qlora_ref.evaluation import cli; sys.exit(cli.main(sys.argv[1:]))"
        environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
        full = [*command, *_endpoint(stub), "--workers", "1"]
        process = subprocess.Popen([sys.executable, "-c", program, *full], env=environment, stdout=subprocess.DEVNULL)
        while len(stub.seen) < 6 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = out.read_bytes()
        assert 4 <= kept.count(b"\n") < 24
        out.write_bytes(kept + b'{"a": "one", "b": "tw')  # what a kill in the middle of a write leaves
        assert cli.main(full) == 0
        assert out.read_bytes().startswith(kept)
        assert len(read_ratings(read_rows(out)).votes) == 24  # duplicates would be refused
        # Only the call that was under way when the process died was asked twice.
        assert sum(stub.seen.values()) <= 24 + 1


def test_a_run_stops_when_the_endpoint_refuses_or_nothing_works(benchmark, capsys):
    command, out = benchmark
    with StubServer(plan=lambda n: "ok" if n < 5 else 401) as stub:
        with pytest.raises(UserError, match="goes on from there"):
            cli.main([*command, *_endpoint(stub), "--workers", "2"])
        assert stub.n <= 7 and len(read_rows(out)) == 5
    with StubServer(plan=lambda n: 400) as stub:
        with pytest.raises(UserError, match="10 calls in a row failed"):
            cli.main([*command, *_endpoint(stub), "--workers", "1"])
        assert stub.n == 10


def test_nothing_is_sent_before_the_estimate_is_accepted(benchmark, capsys, monkeypatch):
    command, out = benchmark
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with StubServer() as stub:
        flags = ["--base-url", stub.url, "--model", "m", "--price-in", "30", "--price-out", "60"]
        assert cli.main([*command, *flags, "--dry-run"]) == 0
        with pytest.raises(UserError, match="add --yes"):
            cli.main([*command, *flags])
        with pytest.raises(UserError, match="more than --max-cost"):
            cli.main([*command, *flags, "--yes", "--max-cost", "0.5"])
        assert stub.n == 0 and not out.exists()
    most = 24 * 1024
    prompt_bytes = sum(
        -(-len(m["content"].encode()) // 4)
        for q, c in enumerate(["math", "coding", "x", "x"])
        for a in ("one", "two", "chatgpt")
        for b in ("one", "two", "chatgpt")
        if a != b
        for m in judge_messages("threeclass", c, f"Question {q}?", f"{a} says {q} {{}} é", f"{b} says {q} {{}} é")
    )
    cost = (30 * prompt_bytes + 60 * most) / 1e6
    assert f"24 calls; {prompt_bytes:,} prompt tokens" in (text := capsys.readouterr().out)
    assert f"at most ${cost:.2f}" in text


def test_resuming_under_other_settings_is_refused(benchmark):
    command, out = benchmark
    with StubServer() as stub:
        assert cli.main([*command, *_endpoint(stub)]) == 0
        rows = out.read_text().splitlines(keepends=True)
        out.write_text("".join(rows[:-1]))
        other = [x if x != "m" else "n" for x in _endpoint(stub)]
        with pytest.raises(UserError, match=r"other settings \(model differ"):
            cli.main([*command, *other])
        out.write_text("".join(rows[:1] + rows))
        with pytest.raises(UserError, match="is there twice"):
            cli.main([*command, *_endpoint(stub)])


def test_relative_judging_feeds_the_relative_table(benchmark, capsys):
    command, out = benchmark
    with StubServer(reply=lambda p: "7 9\nwhy") as stub:
        assert cli.main([*command, *_endpoint(stub), "--kind", "relative"]) == 0
    assert len(stub.seen) == 2 * 2 * 4
    capsys.readouterr()
    assert cli.main(["relative", str(out), "--format", "json"]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    for line in tables["scores"]:
        # Three questions are (7, 9) in both orders; the math one is unparsed: its prompt wants the scores last.
        assert (line["chatgpt first"], line["system first"]) == (pytest.approx(900 / 7), pytest.approx(700 / 9))
        assert line["questions"] == 3


def test_replay_of_published_ratings_gives_them_back(data_dir, tmp_path, capsys):
    folder = data_dir / "evaluation"
    command = ["judge", "--questions", str(folder / "vicuna_questions.jsonl.gz"), "--out", str(tmp_path / "r.jsonl")]
    for size in ("7b", "13b"):
        command += ["--answers", f"guanaco-{size}={folder}/generations_vicuna_guanaco-{size}.jsonl.gz"]
    published = folder / "pairwise_vicuna_gpt4.jsonl.gz"
    assert cli.main([*command, "--replay", str(published)]) == 0
    pair = {"guanaco-7b", "guanaco-13b"}
    want = {(r["a"], r["b"], r["question_id"]): r["score"] for r in read_rows(published) if {r["a"], r["b"]} == pair}
    got = {(r["a"], r["b"], r["question_id"]): r["score"] for r in read_rows(tmp_path / "r.jsonl")}
    assert got == want and len(got) == 160


def test_answers_with_gaps_are_refused_or_named(benchmark, capsys):
    command, _ = benchmark
    path = next(Path(x.split("=")[1]) for x in command if x.startswith("two="))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]) + '{"question_id": 77, "text": "?"}\n')
    with pytest.raises(UserError, match=r"missing answer .* two 3 .* without a question .* two 77"):
        cli.main([*command, "--dry-run", "--base-url", "http://localhost/v1", "--model", "m"])
    flags = ["--dry-run", "--base-url", "http://localhost/v1", "--model", "m", "--bad-rows", "set-aside"]
    assert cli.main([*command, *flags]) == 0
    assert "18 calls" in capsys.readouterr().out


def test_only_one_process_writes_a_ledger(tmp_path):
    key = lambda row: row["k"]
    with Ledger(tmp_path / "l.jsonl", {"v": 1}, key) as ledger:
        ledger.append({"k": 1})
        with pytest.raises(BadInput, match="another process"), Ledger(tmp_path / "l.jsonl", {"v": 1}, key):
            pass
        with pytest.raises(RuntimeError, match="already"):
            ledger.append({"k": 1})
