"""The HTML report and the rating page, driven in a real browser, with model output that tries to be markup."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import evaluation_browser
from qlora_ref.cli import UserError
from qlora_ref.evaluation import cli
from qlora_ref.evaluation.answers import Answer, Question
from qlora_ref.evaluation.ledger import Ledger
from qlora_ref.evaluation.rating_page import RatingSession, fingerprint, make_server, make_tasks, row_key
from qlora_ref.evaluation.records import BadInput, read_rows
from qlora_ref.evaluation.report_html import embed_json, html_report, verdicts_of
from qlora_ref.evaluation.tournament import read_ratings

needs_browser = pytest.mark.skipif(bool(evaluation_browser.MISSING), reason=evaluation_browser.MISSING)

ATTACKS = [
    "<script>document.title = 'owned'</script>",
    "</script><script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "<!--<script>", "]]> & &lt;b&gt; \u2028 \u2029 %DATA% %SCRIPT% \\u003c ${1} `",
]  # fmt: skip


@pytest.fixture
def browser(tmp_path):
    with evaluation_browser.Browser(tmp_path / "profile") as page:
        yield page


@pytest.fixture
def report(tmp_path):
    """Two systems, five questions, both orders; every text is an attack."""
    questions = {
        i: Question(i, f"Q{i} {a}", "math" if i % 2 else "<b>x</b>", "question_id") for i, a in enumerate(ATTACKS)
    }
    systems = {name: {i: Answer(f"{name} {i} {a}") for i, a in enumerate(ATTACKS)} for name in ("one", "<i>two</i>")}
    rows = []
    for i, attack in enumerate(ATTACKS):
        scores = [(1, 2), (1, 1), (3, 3), (-1, 2), (2, 3)][i]
        for (a, b), score in zip((("one", "<i>two</i>"), ("<i>two</i>", "one")), scores, strict=True):
            rows.append({"_where": "r", "a": a, "b": b, "question_id": i, "score": score, "review": f"R{i} {attack}"})
    page = html_report("T <script>&", questions, systems, verdicts_of(rows), ["a <note>"])
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def visible(browser):
    """Questions of the cards on the page, in order."""
    return [int(text.split()[1]) for text in browser.run(
        "return [...document.querySelectorAll('article header .tag:first-child')].map(e => e.textContent)"
    )]  # fmt: skip


@needs_browser
def test_markup_in_any_text_stays_text(browser, report):
    browser.open(report.as_uri())
    assert browser.run("return document.title") == "T <script>&"
    assert browser.text("h1") == "T <script>&" and browser.text("#notes") == "a <note>"
    assert browser.text("#count") == "10 of 10 verdicts"
    for i, attack in enumerate(ATTACKS):
        card = browser.run("return [...document.querySelectorAll('article')][arguments[0]].textContent", 2 * i)
        assert f"Q{i} {attack}" in card and f"one {i} {attack}" in card and f"R{i} {attack}" in card
    # Only the page's own two scripts exist, and nothing was loaded from anywhere.
    assert browser.run("return [document.scripts.length, document.images.length]") == [2, 0]
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.console() == []


@needs_browser
def test_even_inserted_markup_cannot_run_or_load(browser, report):
    """The second line of defence: the page's policy."""
    browser.open(report.as_uri())
    browser.run(
        """const s = document.createElement('script'); s.textContent = "document.title = 'owned'";
        document.body.append(s);
        const d = document.createElement('div'); d.innerHTML = arguments[0]; document.body.append(d);""",
        "<img src='http://127.0.0.1:9/x.png' onerror=\"document.title='owned'\">",
    )
    browser.wait_for("document.images.length === 1 && document.images[0].complete")
    assert browser.run("return document.title") == "T <script>&"
    assert any("Content Security Policy" in entry["message"] for entry in browser.console())


@needs_browser
def test_filters_and_worst_cases(browser, report):
    browser.open(report.as_uri())
    browser.choose("#category", "math")
    assert visible(browser) == [1, 1, 3, 3]
    browser.choose("#category", "")
    browser.choose("#outcome", "unparsed")
    assert visible(browser) == [3]
    browser.choose("#outcome", "tie")
    assert visible(browser) == [2, 2, 4]
    browser.choose("#system", "one")
    browser.choose("#outcome", "win")
    assert visible(browser) == [0, 0, 1, 3]  # 1 as shown first, 3 by its parsed order
    browser.choose("#outcome", "loss")
    assert visible(browser) == [1, 4]
    browser.choose("#outcome", "")
    browser.choose("#order", "best")
    assert visible(browser) == [0, 0, 3, 1, 2, 2, 4, 1, 4]
    browser.choose("#order", "worst")
    assert visible(browser) == [4, 1, 4, 2, 2, 1, 0, 0, 3]
    browser.type("#words", "R3")
    assert visible(browser) == [3]
    assert browser.text("#count") == "1 of 10 verdicts"
    browser.click("article summary")
    assert browser.text("article .review").startswith("R3 <!--<script>")


@needs_browser
def test_report_of_the_published_ratings(browser, data_dir, tmp_path, capsys):
    folder = data_dir / "evaluation"
    out = tmp_path / "vicuna.html"
    command = ["report", str(folder / "relative_vicuna_gpt4.jsonl.gz"), "--out", str(out)]
    command += ["--questions", str(folder / "vicuna_questions.jsonl.gz")]
    for name in ("guanaco-7b", "guanaco-65b", "chatgpt"):
        command += ["--answers", f"{name}={folder}/generations_vicuna_{name}.jsonl.gz"]
    assert cli.main(command) == 0
    browser.open(out.as_uri())
    assert browser.text("#count") == "320 of 320 verdicts" and len(visible(browser)) == 20
    assert "alpaca-13b, whose answer is not given" in browser.text("#notes")
    browser.choose("#system", "guanaco-65b")
    browser.choose("#order", "worst")
    says = browser.run("return [...document.querySelectorAll('.verdict')].map(e => e.textContent)")
    rows = [r for r in read_rows(folder / "relative_vicuna_gpt4.jsonl.gz") if r["system"] == "guanaco-65b"]
    leads = sorted(s[0] - s[1] if r["first"] == "guanaco-65b" else s[1] - s[0] for r in rows for s in [r["score"]])
    found = []
    for text in says:  # "chatgpt 9 : 4 guanaco-65b"
        first, x, _, y, _ = text.split()
        found.append((float(x) - float(y)) * (1 if first == "guanaco-65b" else -1))
    assert found == leads[:20]
    browser.click("#more")
    assert len(visible(browser)) == 40
    assert browser.run("return document.images[0].naturalWidth") > 0
    if folder_for_shots := os.environ.get("QLORA_SCREENSHOTS"):
        browser.run("window.scrollTo(0, document.getElementById('filters').offsetTop)")
        browser.screenshot(Path(folder_for_shots) / "report.png")


def test_report_refuses_or_names_what_it_cannot_show():
    q = {1: Question(1, "Q", None, "question_id")}
    systems = {"a": {1: Answer("x")}, "b": {1: Answer("y")}}
    row = {"_where": "r", "a": "a", "b": "c", "question_id": 1, "score": 1}
    with pytest.raises(BadInput, match="verdict on c"):
        html_report("t", q, systems, verdicts_of([row]))
    page = html_report("t", q, systems, verdicts_of([row, {**row, "b": "b"}, {**row, "question_id": 7}]))
    assert "verdict on an unknown question" in page and "verdict on c" in page
    assert not set(embed_json(ATTACKS)) & set("<>&\u2028\u2029")


@pytest.fixture
def rating(tmp_path):
    """A session of one annotator over made-up answers that do not name their system, and its running server."""
    questions = {i: Question(i, f"Q{i} {a}", None, "question_id") for i, a in enumerate(ATTACKS)}
    systems = {"alpha": {i: Answer(f"first text {i} {a}") for i, a in enumerate(ATTACKS)}}
    systems["beta"] = {i: Answer(f"second text {i}") for i in range(5)}
    tasks = make_tasks(questions, systems, list(questions), seed=3)
    with Ledger(tmp_path / "human.jsonl", fingerprint(tasks, 3), row_key) as ledger:
        session = RatingSession(tasks, ledger, annotator=0, seed=3)
        server = make_server(session)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield session, f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "human.jsonl"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@needs_browser
def test_rating_page_is_blind_and_saves_every_answer(browser, rating):
    session, url, out = rating
    browser.open(url + "/")
    sides = []
    for n in range(5):
        browser.wait_for(f"document.getElementById('progress').textContent.startsWith('{n} of 5')")
        whole = browser.run("return document.documentElement.outerHTML")
        assert "alpha" not in whole and "beta" not in whole
        left, right = browser.text("#left"), browser.text("#right")
        sides.append(left.startswith("first text"))
        assert sides[-1] != right.startswith("first text")
        if os.environ.get("QLORA_SCREENSHOTS") and n == 0:
            browser.screenshot(Path(os.environ["QLORA_SCREENSHOTS"]) / "rating.png")
        if n % 2:  # by keyboard and by mouse, always for alpha
            browser.type("body", "1" if sides[-1] else "2")
        else:
            browser.click(f"button[data-score='{1 if sides[-1] else 2}']")
        browser.wait_for(f"document.getElementById('progress').textContent.startsWith('{n + 1} of 5')")
        assert out.read_text().count("\n") == n + 1  # on the disk before the next is shown
        if n == 2:
            browser.open(url + "/")  # a reload goes on where it was
    assert "All done" in browser.text("#progress") and browser.run("return document.title") == "Which answer is better?"
    assert set(sides) == {True, False}
    rows = read_rows(out)
    assert all((r["a"] if r["score"] == 1 else r["b"]) == "alpha" and r["annotator"] == 0 for r in rows)
    ratings = read_ratings(rows, raters=1)
    assert len(ratings.votes) == 5
    assert [e for e in browser.console() if "favicon" not in e["message"]] == []


def _ask(url, body=None, **headers):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_rating_server_refuses_strangers_and_repeats(rating):
    session, url, out = rating
    assert _ask(url + "/answer", {"id": 0, "score": 1})[0] == 200
    assert _ask(url + "/answer", {"id": 0, "score": 2})[0] == 200  # sent twice: the first one stands
    assert [r["score"] for r in read_rows(out)] == [1]
    for bad in ({"id": 0, "score": 4}, {"id": 99, "score": 1}, {"id": "0", "score": 1}, {"id": True, "score": 1}, {}):
        assert _ask(url + "/answer", bad)[0] == 400
    assert _ask(url + "/answer", {"id": 1, "score": 1}, Host="evil.example")[0] == 403
    assert _ask(url + "/next", Host="evil.example")[0] == 403
    assert _ask(url + "/answer", {"id": 1, "score": 1}, **{"Content-Type": "text/plain"})[0] == 403
    assert _ask(url + "/../../etc/passwd")[0] == 404
    assert len(read_rows(out)) == 1


def test_annotators_see_the_same_sides_in_another_order():
    questions = {i: Question(i, f"Q{i}", None, "question_id") for i in range(200)}
    systems = {name: {i: Answer("x") for i in questions} for name in "abc"}
    tasks = make_tasks(questions, systems, list(questions), seed=0)
    assert len(tasks) == 3 * 200 and tasks == make_tasks(questions, systems, list(questions), seed=0)
    left = sum(task.a < task.b for task in tasks)
    assert abs(left - 300) < 5 * (600 * 0.25) ** 0.5  # a fair coin, 5 standard deviations

    class NoLedger:
        keys = frozenset()

    orders = [[t.key for t in RatingSession(tasks, NoLedger(), n, 0).tasks] for n in (0, 1)]
    assert orders[0] != orders[1] and sorted(map(str, orders[0])) == sorted(map(str, orders[1]))


def test_rate_command_keeps_answers_through_a_kill(tmp_path):
    rows = [{"question_id": i, "text": f"Q{i}"} for i in range(3)]
    for name in ("q", "x", "y"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = ["rate", "--questions", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    command += ["--answers", f"x={tmp_path}/x.jsonl", "--answers", f"y={tmp_path}/y.jsonl"]
    program = "import sys; from qlora_ref.evaluation import cli; sys.exit(cli.main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", program, *command], env=environment, stdout=subprocess.PIPE, text=True
        )
        return process, process.stdout.readline().split()[1].rstrip("/")

    process, url = start()
    assert json.loads(_ask(url + "/answer", {"id": 1, "score": 3})[1])["done"] == 1
    with pytest.raises(UserError, match="another process"):
        cli.main(command)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process, url = start()
    assert json.loads(_ask(url + "/next")[1])["done"] == 1
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "1 of 3 rated by annotator 0" in said
