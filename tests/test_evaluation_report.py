"""Tables in three forms, plots, and writing that is whole or not at all."""

import csv
import io
import json
import math
import os

import numpy as np
import pytest

from qlora_ref.cli import UserError
from qlora_ref.evaluation import cli
from qlora_ref.evaluation.bradley_terry import fit
from qlora_ref.evaluation.elo import mean_over_orderings
from qlora_ref.evaluation.report_plots import plot_elo
from qlora_ref.evaluation.report_tables import Result, Table, render, write_text
from qlora_ref.evaluation.tournament import Vote, to_matches

RESULT = Result(
    "A title",
    {"rule": "ours", "k": np.float64(4)},
    [
        Table(
            "first", ["system", "value", "n", "ok"],
            [['a,"b"', 1 / 3, 1234, True], ["é", math.nan, np.int64(2), False]],
        ),
        Table("second", ["x"], [[None]]),
    ],
    ["a note"],
)  # fmt: skip


def test_text_csv_and_json_hold_the_same():
    text = render(RESULT, "text")
    assert "rule ours; k 4" in text and "- a note" in text and "0.33" in text and "1,234" in text
    rows = list(csv.reader(io.StringIO(render(RESULT, "csv"))))
    assert rows == [["system", "value", "n", "ok"], ['a,"b"', repr(1 / 3), "1234", "True"], ["é", "", "2", "False"]]
    loaded = json.loads(render(RESULT, "json"))
    assert loaded["tables"]["first"][0] == {"system": 'a,"b"', "value": 1 / 3, "n": 1234, "ok": True}
    assert loaded["tables"]["first"][1]["value"] is None and loaded["settings"]["k"] == 4
    assert render(RESULT, "csv", "second") == 'x\n""\n'
    with pytest.raises(ValueError, match="no table 'third'"):
        render(RESULT, "text", "third")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "t.txt"
    write_text(path, "old")

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_plots_are_written_in_each_kind(tmp_path):
    names = ["a$b$", "<c>", "d"]
    votes = [Vote(x, y, i, 1 + (i + len(x)) % 3) for i in range(9) for x in names for y in names if x != y]
    matches = to_matches(votes)
    result, model = mean_over_orderings(matches, orderings=10), fit(matches)
    for suffix, magic in ((".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")):
        plot_elo(result, model, tmp_path / f"p{suffix}")
        assert (tmp_path / f"p{suffix}").read_bytes().startswith(magic)
    with pytest.raises(ValueError, match="must end in"):
        plot_elo(result, None, tmp_path / "p.gif")


def test_usage_lists_every_subverb_and_each_has_help(capsys):
    assert cli.main([]) == 0
    usage = capsys.readouterr().out
    for verb in cli.SUBVERBS:
        assert verb in usage
        with pytest.raises(SystemExit) as stop:
            cli.main([verb, "--help"])
        assert stop.value.code == 0
        assert f"qlora-ref eval {verb}" in capsys.readouterr().out
    with pytest.raises(UserError, match="no subverb"):
        cli.main(["nothing"])
