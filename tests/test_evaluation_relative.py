"""Table 6 from the published relative scores, and what the reader does with rows that break a rule."""

import gzip
import json
import math
import re

import numpy as np
import pytest

from qlora_ref.cli import UserError
from qlora_ref.evaluation import cli, paper
from qlora_ref.evaluation.records import BadInput, read_rows
from qlora_ref.evaluation.relative import relative_table

HALF_UNIT = 0.5e-6  # the expected file is rounded to six decimals


def row(question, first, score, system="sys", **more):
    return {"_where": f"made:{question}", "system": system, "first": first, "question_id": question} | {
        "score": score,
        **more,
    }


@pytest.fixture(scope="module")
def published(data_dir):
    return relative_table(read_rows(data_dir / "evaluation" / "relative_vicuna_gpt4.jsonl.gz"))


def test_all_36_systems_equal_the_expected_table(published, data_dir):
    expected = json.loads((data_dir / "evaluation" / "expected_table6.json").read_text())["systems"]
    assert {s.system for s in published.scores} == set(expected)
    for score in published.scores:
        want = expected[score.system]
        assert score.n_questions == want["n_questions"]
        for key in (k for k, v in want.items() if isinstance(v, float)):
            assert getattr(score, key) == pytest.approx(want[key], abs=HALF_UNIT * 1.001, rel=0), key
        for ours, theirs in ((score.baseline_first, "chatgpt_first"), (score.system_first, "system_first")):
            assert ours.n_valid == want[theirs]["n_valid"]
            assert (ours.sum_baseline, ours.sum_system) == (
                want[theirs]["sum_chatgpt"],
                want[theirs]["sum_system"],
            )


def test_78_of_84_printed_cells_and_a_reason_for_each_other(published, data_dir):
    cells = paper.compare_table6(published)
    missed = {(c["system"], c["cell"]): c["reason"] for c in cells if not c["matches"]}
    assert (len(cells), len(missed)) == (84, 6)
    want = json.loads((data_dir / "evaluation" / "expected_table6.json").read_text())["unmatched"]
    assert set(missed) == {(c["system"], c["cell"]) for c in want}
    assert all(reason in paper.TABLE6_ERRATA.values() for reason in missed.values())


def test_presentation_order_follows_from_the_answer_ids(data_dir):
    folder = data_dir / "evaluation"
    rows = read_rows(folder / "relative_vicuna_gpt4.jsonl.gz")
    ids = {r["answer_id"] for r in read_rows(folder / "generations_vicuna_chatgpt.jsonl.gz")}
    stored = [r.pop("first") for r in rows]
    relative_table(rows, baseline_answer_ids=ids)
    assert [r["first"] for r in rows] == stored
    rows[17]["first"] = "chatgpt" if stored[17] != "chatgpt" else rows[17]["system"]
    with pytest.raises(BadInput, match="answer ids say"):
        relative_table(rows, baseline_answer_ids=ids)


def test_rule_by_hand_with_a_zero_and_an_unparsed_half():
    rows = [row(1, "chatgpt", [8.0, 0.0]), row(1, "sys", [4.0, 8.0])]  # m = 2, c = 8
    rows += [row(2, "chatgpt", [-1, -1]), row(2, "sys", [5.0, 10.0])]  # m = 5, c = 10, from one order
    rows += [row(3, "chatgpt", [-1, -1]), row(3, "sys", [-1, -1])]  # dropped
    table = relative_table(rows)
    (score,) = table.scores
    assert score.mean_percent == pytest.approx(100 * (2 + 5) / (8 + 10))
    assert (score.baseline_first.percent, score.system_first.percent) == (0.0, pytest.approx(50.0))
    e_m, e_c = 1.96 * 1.5 / math.sqrt(2), 1.96 * 1.0 / math.sqrt(2)
    assert score.ci95_half_width_percent == pytest.approx(100 * (7 / 18 - (3.5 - e_m) / (9 + e_c)))
    assert (score.n_questions, table.n_unparsed) == (2, 3)
    assert table.notes.counts["question dropped, no valid order"] == 1


def test_paired_interval_covers_as_often_as_it_says():
    """95 % over repeated samples of 80 correlated questions; the paper's rule is wider than that."""
    rng = np.random.default_rng(0)
    repeats, covered, ratio_of_widths = 600, 0, []
    for _ in range(repeats):
        c = rng.uniform(6, 10, 80)
        m = np.clip(0.8 * c + rng.normal(0, 1, 80), 0, 10)
        rows = [
            row(q, f, [c[q], m[q]] if f == "chatgpt" else [m[q], c[q]]) for q in range(80) for f in ("chatgpt", "sys")
        ]
        (s,) = relative_table(rows).scores
        covered += abs(s.mean_percent - 80) <= s.paired_half_width_percent
        ratio_of_widths.append(s.ci95_half_width_percent / s.paired_half_width_percent)
    five_sd = 5 * math.sqrt(0.95 * 0.05 / repeats)
    assert abs(covered / repeats - 0.95) < five_sd
    assert min(ratio_of_widths) > 1


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (row(1, "chatgpt", [11, 5]), "out of range"),
        (row(1, "chatgpt", [-1, 5]), "out of range"),
        (row(1, "chatgpt", [math.nan, 5]), "out of range"),
        (row(1, "chatgpt", [True, 5]), "not a pair"),
        (row(1, "chatgpt", "8 5"), "not a pair"),
        (row(2, "sys", [7, 7]), "duplicate id, same score"),
        (row(2, "sys", [7, 8]), "duplicate id, different scores"),
        (row(True, "sys", [7, 7]), "question_id must be int"),
        (row(2, "other", [7, 7]), "first is 'other'"),
        (row(2, "sys", [7, 7], message_id="m"), "question_id and message_id"),
        (row(2, "sys", [7, 7], system=" sys"), "first is 'sys'"),
    ],
)
def test_bad_rows_are_refused_and_named(bad, says):
    with pytest.raises(BadInput, match=re.escape(says)):
        relative_table([row(2, "sys", [7, 7]), bad])


def test_bad_rows_set_aside_are_counted_and_change_nothing():
    good = [row(q, f, [7, 6]) for q in (1, 2) for f in ("chatgpt", "sys")]
    bad = [row(3, "sys", [70, 6]), row(2, "sys", [7, 6]), row(4, "sys", [1, 1]), row(4, "sys", [9, 9])]
    table = relative_table(good + bad, bad_rows="set-aside")
    assert table.scores == relative_table(good).scores
    assert sorted(table.notes.counts.values()) == [1, 1, 2]
    assert "made:3" in " ".join(table.notes.lines())


def test_a_missing_half_is_named():
    table = relative_table([row(1, "chatgpt", [8, 4]), row(1, "sys", [4, 8]), row(2, "sys", [4, 8])])
    (line,) = table.notes.lines()
    assert "missing half" in line and "sys 2, chatgpt first" in line


def test_a_truncated_or_damaged_file_is_refused(tmp_path):
    whole = gzip.compress("".join(json.dumps(row(q, "sys", [7, 6])) + "\n" for q in range(500)).encode())
    for name, content in (
        ("cut.jsonl.gz", whole[: len(whole) // 2]),
        ("flip.jsonl.gz", whole[:-6] + b"\0" * 6),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="truncated or damaged after [0-9]+ complete lines"):
            cli.main(["relative", str(tmp_path / name)])
    (tmp_path / "half.jsonl").write_text(json.dumps(row(1, "sys", [7, 6])) + '\n{"system": "sys", "sco')
    with pytest.raises(UserError, match=r"half.jsonl:2: not JSON"):
        cli.main(["relative", str(tmp_path / "half.jsonl")])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        cli.main(["relative", str(tmp_path / "empty.jsonl")])
    with pytest.raises(UserError, match="no such file"):
        cli.main(["relative", str(tmp_path / "absent.jsonl")])


def test_command_line_prints_table_rule_and_verdict(data_dir, capsys, tmp_path):
    path = str(data_dir / "evaluation" / "relative_vicuna_gpt4.jsonl.gz")
    assert cli.main(["relative", path]) == 0
    text = capsys.readouterr().out
    assert "78 of 84 cells" in text and "ratio of sums" in text and "gpt-4 68" in text
    assert cli.main(["relative", path, "--format", "json", "--out", str(tmp_path / "t.json")]) == 0
    loaded = json.loads((tmp_path / "t.json").read_text())
    assert len(loaded["tables"]["scores"]) == 36 and len(loaded["tables"]["cells that differ from the paper"]) == 6
    capsys.readouterr()
    assert cli.main(["relative", path, "--format", "csv", "--interval", "paired"]) == 0
    out = capsys.readouterr()
    assert out.out.splitlines()[0].startswith("system,chatgpt first") and "paired" in out.err
    guanaco = next(line for line in out.out.splitlines() if line.startswith("guanaco-65b"))
    assert float(guanaco.split(",")[4]) == pytest.approx(3.40, abs=0.005)
