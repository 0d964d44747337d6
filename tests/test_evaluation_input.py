"""Odd but legal files, and files that are wrong in ways a reader does not look for: one sentence, nothing written."""

import json

import numpy as np
import pytest

from qlora_ref.cli import UserError
from qlora_ref.evaluation import agreement, cli
from qlora_ref.evaluation.records import read_rows
from qlora_ref.evaluation.relative import relative_table
from qlora_ref.evaluation.tournament import read_ratings

BOTH = [{"a": a, "b": b, "question_id": q, "score": 1 + q % 3} for q in range(6) for a, b in (("x", "y"), ("y", "x"))]


def people(labels_of):
    return [
        {"a": a, "b": b, "question_id": q, "annotator": n, "score": label}
        for (a, b, q), labels in labels_of.items()
        for n, label in enumerate(labels)
    ]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a":"x","b":"y","question_id":1,"score":1,"score":2}\n', "f.jsonl:1: the key score is there twice"),
        ("[" * 100_000, "f.jsonl:1: not a row"),
        ('{"a":"x","b":"y","question_id":1,"score":' + "9" * 5000 + "}\n", "f.jsonl:1: "),
        (lines([{**BOTH[0], "annotator": [1]}]), "annotator is not a number or a name"),
        (lines([{**BOTH[0], "annotator": None}]), "annotator is not a number or a name"),
    ],
)
def test_strange_lines_are_refused_with_their_place(tmp_path, content, says):
    (tmp_path / "f.jsonl").write_text(content)
    with pytest.raises(UserError, match=says):
        cli.main(["elo", str(tmp_path / "f.jsonl")])


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "f.csv").write_text("a,b,b,question_id,score\nx,y,z,1,1\n")
    with pytest.raises(UserError, match="two columns have the same name"):
        cli.main(["elo", str(tmp_path / "f.csv")])


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_the_same_ratings_however_they_are_written(tmp_path, newline, encoding):
    want = read_ratings([{**row, "_where": "here"} for row in BOTH]).votes
    columns = list(BOTH[0])
    csv = [columns, *([row[c] for c in columns] for row in BOTH)]
    decimals = [columns, *([float(v) if c == "score" else v for c, v in row.items()] for row in BOTH)]
    for name, text in (
        ("f.jsonl", lines(BOTH)),
        ("f.csv", "".join(",".join(map(str, row)) + "\n" for row in csv)),
        ("decimals.csv", "".join(",".join(map(str, row)) + "\n" for row in decimals)),
        ("decimals.jsonl", lines({**row, "score": float(row["score"])} for row in BOTH)),
    ):
        path = tmp_path / name
        path.write_bytes(text.replace("\n", newline).encode(encoding))
        got = read_ratings(read_rows(path)).votes
        assert got == want and all(type(vote.label) is int for vote in got), name


def test_relative_scores_from_a_spreadsheet(tmp_path):
    rows = [
        {"system": "s", "first": first, "question_id": q, "score": [q + 0.5, 8]}
        for q in (1, 2)
        for first in ("s", "chatgpt")
    ]
    text = "system,first,question_id,score\n"
    text += "".join(f'{r["system"]},{r["first"]},{r["question_id"]},"{r["score"]}"\n' for r in rows)
    (tmp_path / "r.csv").write_text(text)
    (tmp_path / "r.jsonl").write_text(lines(rows))
    one, other = (relative_table(read_rows(tmp_path / name)) for name in ("r.csv", "r.jsonl"))
    assert one.scores == other.scores
    (tmp_path / "r.csv").write_text(text.replace("[1.5, 8]", "[1.5, 8"))
    with pytest.raises(UserError, match="2 x score is not a pair of numbers"):
        cli.main(["relative", str(tmp_path / "r.csv")])


def test_the_baseline_is_not_scored_against_itself(tmp_path):
    rows = [{"system": s, "first": "chatgpt", "question_id": 1, "score": [8, 7]} for s in ("s", "chatgpt")]
    (tmp_path / "r.jsonl").write_text(lines(rows))
    with pytest.raises(UserError, match="the baseline scored against itself: r.jsonl:2"):
        cli.main(["relative", str(tmp_path / "r.jsonl")])


def test_incomplete_items_can_be_set_aside_and_are_named(tmp_path, capsys):
    rows = people({("x", "y", 1): [1, 1, 2], ("y", "x", 1): [2, 3, 9], ("x", "y", 2): [2, 2]})
    (tmp_path / "h.jsonl").write_text(lines(rows))
    command = ["elo", str(tmp_path / "h.jsonl"), "--orderings", "10"]
    with pytest.raises(UserError, match="1 bad row"):
        cli.main(command)
    assert cli.main([*command, "--bad-rows", "set-aside"]) == 0
    text = capsys.readouterr().out
    assert "matches 1;" in text and "2 x item without exactly 3 annotations (left out): y first, x, 1: 2;" in text


def test_swap_statistics_do_not_depend_on_how_annotations_become_matches(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = people({(a, b, q): rng.integers(1, 4, 3).tolist() for q in range(20) for a, b in (("x", "y"), ("y", "x"))})
    (tmp_path / "h.jsonl").write_text(lines(rows))
    found = []
    for how in ("majority", "each"):
        for verb, table in (("elo", "order bias"), ("agreement", "items")):
            command = [verb, str(tmp_path / "h.jsonl"), "--annotators", how, "--orderings", "10", "--format", "json"]
            assert cli.main(command) == 0
            found.append(json.loads(capsys.readouterr().out)["tables"][table])
    assert found[:2] == found[2:]
    ratings = read_ratings(read_rows(tmp_path / "h.jsonl"), annotators="each")
    assert len(ratings.votes) == 120 and agreement.after_swap(ratings.item_votes()).n_items == 20


@pytest.mark.parametrize("more", [["--base", "inf"], ["--scale", "inf"], ["--k", "inf", "--scale", "inf"]])
def test_elo_settings_are_finite(tmp_path, more):
    (tmp_path / "f.jsonl").write_text(lines(BOTH))
    with pytest.raises(UserError, match="finite numbers"):
        cli.main(["elo", str(tmp_path / "f.jsonl"), *more])


def test_bradley_terry_is_on_the_scale_of_the_elo_beside_it(tmp_path, capsys):
    rows = [{"a": "x", "b": "y", "question_id": q, "score": 1 if q < 7 else 2} for q in range(10)]
    (tmp_path / "f.jsonl").write_text(lines(rows))
    command = ["elo", str(tmp_path / "f.jsonl"), "--orderings", "10", "--format", "json"]
    assert cli.main([*command, "--start", "1500", "--scale", "100", "--base", "2"]) == 0
    x, y = json.loads(capsys.readouterr().out)["tables"]["ratings"]
    lead = 100 * np.log2(7 / 3)  # odds of 7 to 3, in units of 100 points a doubling
    assert x["bradley-terry"] - y["bradley-terry"] == pytest.approx(lead)
    assert x["bradley-terry"] + y["bradley-terry"] == pytest.approx(3000)


def test_a_refused_table_draws_no_plot(tmp_path):
    (tmp_path / "f.jsonl").write_text(lines(BOTH))
    command = ["elo", str(tmp_path / "f.jsonl"), "--orderings", "10", "--plot", str(tmp_path / "p.svg")]
    with pytest.raises(UserError, match="no table"):
        cli.main([*command, "--table", "nets"])
    with pytest.raises(UserError, match="is a folder"):
        cli.main([*command[:4], "--out", str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["f.jsonl"]


def test_a_label_that_is_no_verdict_is_refused(tmp_path):
    (tmp_path / "s.csv").write_text("a,b,question_id,annotator,score\nx,y,1,0,left\n")
    with pytest.raises(UserError, match="--label left=9: a verdict is 1"):
        cli.main(["import-csv", str(tmp_path / "s.csv"), "--out", str(tmp_path / "o.jsonl"), "--label=left=9"])
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    "flag", ["--max-cost=nan", "--price-in=-5", "--price-out=inf", "--timeout=0", "--timeout=nan", "--retries=-1"]
)
def test_limits_of_a_judge_run_are_numbers_that_limit(tmp_path, flag, capsys):
    """A cost limit of nan would never be exceeded, a negative price would hide what a run costs."""
    command = ["judge", "--questions", "q", "--answers", "a=a", "--out", str(tmp_path / "o.jsonl"), "--yes", flag]
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert stopped.value.code == 2 and f"argument {flag.split('=')[0]}: must be" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
