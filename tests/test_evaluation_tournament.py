"""Elo, Bradley-Terry, order bias and agreement, on the published tournament and on rows made for the purpose."""

import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest

from qlora_ref.cli import UserError
from qlora_ref.evaluation import agreement, bradley_terry, cli, elo
from qlora_ref.evaluation.order_bias import order_bias
from qlora_ref.evaluation.records import BadInput, read_rows
from qlora_ref.evaluation.tournament import Vote, average_orders, net_table, read_ratings, to_matches

WORKED = [Vote("x", "y", 1, 1), Vote("y", "z", 2, 3), Vote("z", "x", 3, 1)]


@pytest.fixture(scope="module")
def ratings(data_dir):
    return read_ratings(read_rows(data_dir / "evaluation" / "pairwise_vicuna_gpt4.jsonl.gz"))


@pytest.fixture(scope="module")
def expected(data_dir):
    return json.loads((data_dir / "evaluation" / "expected_elo_vicuna.json").read_text())


def human(a, b, item, labels, key="question_id"):
    return [
        {"_where": f"h:{item}.{i}", "a": a, "b": b, key: item, "annotator": i, "score": s} for i, s in enumerate(labels)
    ]


def test_labels_net_table_and_positions_are_exact(ratings, expected):
    assert {str(k): v for k, v in ratings.label_counts.items()} == expected["label_counts"]
    assert not ratings.notes.counts  # int(last_line), fallback -1, equals all 4,480 stored scores
    ours = net_table(ratings.votes)
    assert ours.keys() == expected["pairwise_net_table"].keys()
    for pair, want in expected["pairwise_net_table"].items():
        assert {k: ours[pair][k] for k in ("wins", "losses", "ties")} == {
            k: want[k] for k in ("wins", "losses", "ties")
        }
        assert ours[pair]["net"] == pytest.approx(want["net"], abs=0.5e-6 * 1.001)
    bias = order_bias(ratings.votes)
    assert (bias.first_wins, bias.second_wins, bias.ties, bias.unparsed) == tuple(expected["position"].values())


@pytest.mark.parametrize("k", [4, 32])
def test_file_order_replay_equals_the_expected_file(ratings, expected, k):
    final = elo.replay(to_matches(ratings.votes), elo.EloSettings(k=k))
    want = expected["deterministic_file_order"][f"K{k}"]
    assert final == pytest.approx(want, abs=1e-6, rel=0)
    n = len(ratings.votes)
    assert sum(final.values()) == pytest.approx(8000, rel=n * np.finfo(float).eps)


@pytest.mark.parametrize(
    ("preset", "run", "tolerance"), [("paper-vicuna", "drop_K4", 0.7), ("paper-oa", "drop_K32", 2.5)]
)
def test_mean_over_10000_orderings(ratings, expected, preset, run, tolerance):
    result = elo.mean_over_orderings(to_matches(ratings.votes), elo.PRESETS[preset], seed=1)
    want = expected["runs"][run]
    assert (result.n_matches, result.n_orderings) == (want["matches"], 10_000)
    for name, mean, sd, se in zip(result.names, result.mean, result.sd, result.se, strict=True):
        theirs = want["elo"][name]
        assert abs(mean - theirs["mean"]) < tolerance
        # Both means are estimates: 5 standard errors of their difference; the SD's own error is sd / sqrt(2 n).
        assert abs(mean - theirs["mean"]) < 5 * math.hypot(se, theirs["mc_se_of_mean"])
        assert abs(sd - theirs["sd_over_orderings"]) < 5 * sd / math.sqrt(2 * 10_000) * 1.1


@pytest.mark.parametrize(
    ("run", "ties", "unparsed", "orders"),
    [
        ("neg_as_tie_K4", "half", "tie", "separate"),
        ("ties_dropped_K4", "drop", "drop", "separate"),
        ("orders_averaged_K4", "half", "drop", "average"),
    ],
)
def test_each_setting_gives_its_own_expected_run(ratings, expected, run, ties, unparsed, orders):
    matches = to_matches(ratings.votes, ties, unparsed)
    matches = average_orders(matches) if orders == "average" else matches
    result = elo.mean_over_orderings(matches, elo.EloSettings(k=4), orderings=2000)
    want = expected["runs"][run]
    assert len(matches) == want["matches"]
    for name, mean, se in zip(result.names, result.mean, result.se, strict=True):
        assert abs(mean - want["elo"][name]["mean"]) < 5 * math.hypot(se, want["elo"][name]["mc_se_of_mean"])


def test_same_seed_same_result_and_chunks_do_not_matter(ratings, monkeypatch):
    matches = to_matches(ratings.votes[:200])
    one, two = (elo.mean_over_orderings(matches, orderings=50, seed=3).ratings() for _ in range(2))
    assert one == two != elo.mean_over_orderings(matches, orderings=50, seed=4).ratings()
    monkeypatch.setattr(elo, "_CHUNK", 7)
    chunked = elo.mean_over_orderings(matches, orderings=50, seed=3).ratings()
    assert chunked == pytest.approx(one, rel=50 * np.finfo(float).eps)


@pytest.mark.parametrize("k", [4.0, 32.0])
def test_vectorised_orderings_equal_the_replay(k):
    """Against the plain loop, ordering by ordering; the worked example of the notes in closed form."""
    matches = to_matches(WORKED)
    settings = elo.EloSettings(k=k)
    orders = np.array(list(itertools.permutations(range(3))))
    many = elo.replay_many(matches, orders, settings)
    for order, final in zip(orders, many, strict=True):
        turned = to_matches([WORKED[i] for i in order])
        assert dict(zip(matches.names, final, strict=True)) == pytest.approx(elo.replay(turned, settings), rel=1e-14)
    notes = {
        4.0: (
            [999.9884209309151, 998.0115127982992, 1002.0000662707856],
            [1000.0, 998.0057671877626, 1001.9942328122374],
        ),
        32.0: (
            [999.2298601853573, 984.736306793522, 1016.0338330211207],
            [1000.0, 984.3726823946283, 1015.6273176053718],
        ),
    }
    file_order, mean = notes[k]
    assert list(elo.replay(matches, settings).values()) == pytest.approx(file_order, rel=1e-14)
    exact = elo.mean_over_all_orderings(matches, settings)
    assert list(exact.mean) == pytest.approx(mean, rel=1e-14)
    assert not exact.se.any()


def test_elo_arithmetic_of_the_paper():
    assert elo.expected_score(1100, 1000) == pytest.approx(0.640, abs=5e-4)
    assert elo.expected_score(1010, 1000) - 0.5 == pytest.approx(0.0144, abs=5e-5)
    for bad in ({"k": 0}, {"k": math.nan}, {"scale": 0}, {"base": 1}, {"start": math.inf}):
        with pytest.raises(ValueError, match="Elo needs"):
            elo.EloSettings(**bad)


def test_bradley_terry_equals_the_expected_file(ratings, expected):
    model = bradley_terry.fit(to_matches(ratings.votes))
    assert model.ratings() == pytest.approx(expected["bradley_terry_elo_scale"], abs=0.5e-4 * 1.01, rel=0)
    assert np.mean(model.rating) == pytest.approx(1000)
    assert (model.low < model.rating).all() and (model.rating < model.high).all()


def test_bradley_terry_intervals_cover_the_truth():
    """Simulated tournaments with known strengths and a question effect: 95 % of intervals hold the truth."""
    rng = np.random.default_rng(0)
    truth = np.array([-0.6, -0.1, 0.2, 0.5])
    names, repeats, n_items = list("wxyz"), 120, 60
    covered = 0
    for _ in range(repeats):
        votes = []
        for item in range(n_items):
            for a, b in itertools.permutations(range(4), 2):
                p = 1 / (1 + math.exp(truth[b] - truth[a]))
                votes.append(Vote(names[a], names[b], item, 1 if rng.random() < p else 2))
        model = bradley_terry.fit(to_matches(votes))
        at = 1000 + 400 / math.log(10) * (truth - truth.mean())
        covered += ((model.low < at) & (at < model.high)).sum()
    share, n = covered / (4 * repeats), 3 * repeats  # four centred ratings have three degrees of freedom
    assert abs(share - 0.95) < 5 * math.sqrt(0.95 * 0.05 / n)


def test_bradley_terry_refuses_a_system_that_nobody_beats():
    votes = [Vote("best", "x", 1, 1), Vote("x", "y", 1, 1), Vote("y", "x", 2, 1), Vote("best", "y", 2, 1)]
    with pytest.raises(ValueError, match=re.escape("{best}")):
        bradley_terry.fit(to_matches(votes))


def test_open_assistant_rows_any_systems_and_message_ids(tmp_path, capsys):
    ids = ["0b2f", "77aa", "c3d1"]
    rows = [
        {"a": a, "b": b, "message_id": i, "score": s, "last_line": line}
        for a, b in (("mine-7b", "theirs"), ("theirs", "mine-7b"))
        for i, (s, line) in zip(ids, [(1, "1"), (-1, "Best answer: 2"), (3, "3")], strict=True)
    ]
    path = tmp_path / "oa.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert cli.main(["elo", str(path), "--preset", "paper-oa", "--orderings", "all"]) == 0
    text = capsys.readouterr().out
    assert "k 32.0" in text and "matches 4" in text and "mine-7b, theirs" in text
    assert cli.main(["elo", str(path), "--preset", "paper-oa", "--orderings", "all", "--loose"]) == 0
    text = capsys.readouterr().out
    assert "matches 6" in text and "2 x unparsed row recovered by the loose parser" in text


def test_human_majority_no_majority_and_first_appearance_order():
    rows = human("x", "y", 1, [1, 1, 2]) + human("y", "z", 2, [1, 2, 3]) + human("z", "x", 3, [3, 1, 1])
    mixed = [rows[i] for i in (0, 3, 6, 1, 4, 7, 2, 5, 8)]  # annotations interleaved; items keep their first place
    ratings = read_ratings(mixed)
    assert ratings.votes == WORKED
    assert (ratings.n_without_majority, ratings.label_counts) == (1, Counter({1: 5, 2: 2, 3: 2}))
    assert [v.item for v in read_ratings(rows, no_majority="drop").votes] == [1, 3]
    assert [v.label for v in read_ratings(rows, annotators="first").votes] == [1, 1, 3]
    assert [v.label for v in read_ratings(rows, annotators="each").votes] == [1, 1, 2, 1, 2, 3, 3, 1, 1]


@pytest.mark.parametrize("labels", [[1, 1], [1, 2, 3, 3]])
def test_human_items_need_three_annotations(labels):
    with pytest.raises(BadInput, match=re.escape(f"bard against chatgpt, item 9, which has {len(labels)}")):
        read_ratings(human("x", "y", 1, [1, 1, 1]) + human("bard", "chatgpt", 9, labels))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (human("x", "y", 1, [1, 1, -1]), "not one of 1, 2, 3"),
        (human("x", "x", 1, [1, 1, 1]), "against itself"),
        (human("x", "y", 1, [1, 1, 1])[:2] + human("x", "y", 1, [1, 1, 1])[:1], "duplicate id"),
        ([{"_where": "r", "a": "x", "b": "y", "question_id": 1, "score": 4}], "not one of 1, 2, 3, -1"),
        ([{"_where": "r", "a": "x", "b": "y", "question_id": 1, "score": 1.5}], "not one of 1, 2, 3, -1"),
        ([{"_where": "r", "a": "x", "b": "y", "score": 1}], "neither"),
        ([{"_where": "r", "a": "x", "question_id": 1, "score": 1}], "need the key b"),
        ([{"_where": "r", "system": "x", "first": "y", "question_id": 1, "score": [1, 2]}], "eval relative"),
    ],
)
def test_bad_rows_are_refused(rows, says):
    with pytest.raises(BadInput, match=re.escape(says)):
        read_ratings(rows)


def test_one_order_only_is_named_and_used():
    rows = [{"_where": "r", "a": "x", "b": "y", "question_id": 1, "score": 1}]
    ratings = read_ratings(rows)
    assert len(ratings.votes) == 1 and "one presentation order only" in ratings.notes.lines()[0]


def test_agreement_points_of_the_notes():
    counts = [[3, 0, 0], [2, 1, 0], [1, 1, 1], [0, 3, 0], [0, 1, 2]]
    assert agreement.fleiss_kappa(counts) == pytest.approx((8 / 15 - 0.36) / 0.64)
    labels = [[c + 1 for c in range(3) for _ in range(row[c])] for row in counts]
    found = agreement.item_agreement(labels, "", "")
    assert (found.agreement, found.unanimous) == (pytest.approx(8 / 15), pytest.approx(0.4))
    assert found.class_shares == pytest.approx((6 / 15, 6 / 15, 3 / 15))
    ranks = agreement.rank_agreement(
        dict(zip("abcd", (1010, 1000, 990, 980), strict=True)),
        dict(zip("abcd", (1005, 1010, 985, 990), strict=True)),
    )
    assert (ranks.kendall_tau, ranks.spearman_rho) == (pytest.approx(1 / 3), pytest.approx(0.6))
    assert math.isnan(agreement.fleiss_kappa([[2, 0, 0], [2, 0, 0]]))
    for bad in ([], [[1, 0, 0]], [[2, 0, 0], [3, 0, 0]]):
        with pytest.raises(ValueError, match="Fleiss"):
            agreement.fleiss_kappa(bad)


def test_orientation_of_the_swap_comparison(ratings):
    """Labels turn with the pair: a judge that always names the same system agrees with itself fully."""
    steady = [Vote("a", "b", i, 1 + i % 3) for i in range(9)]
    steady += [Vote("b", "a", i, {1: 2, 2: 1, 3: 3}[1 + i % 3]) for i in range(9)]
    assert agreement.after_swap(steady).kappa == pytest.approx(1)
    biased = [Vote("a", "b", i, 1) for i in range(9)] + [Vote("b", "a", i, 1) for i in range(9)]
    assert agreement.after_swap(biased).kappa == pytest.approx(-1)
    assert order_bias(biased).flipped_to_first == 9 and order_bias(biased).p_value == pytest.approx(2 / 2**9)
    assert agreement.after_swap(ratings.votes).n_items == 2227  # 2,240 less 13 with an unparsed order


def test_human_against_judge_from_files(tmp_path, capsys):
    people, judge = [], []
    for q, labels in enumerate([[1, 1, 1], [2, 2, 1], [1, 2, 3], [3, 3, 3], [2, 2, 2]]):
        people += human("x", "y", q, labels) + human("y", "z", q, labels)
        for pair, label in ((("x", "y"), labels[0]), (("y", "z"), -1 if q == 4 else labels[1])):
            judge.append({"a": pair[0], "b": pair[1], "question_id": q, "score": label})
    for name, rows in (("people", people), ("judge", judge)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [str(tmp_path / "judge.jsonl"), str(tmp_path / "people.jsonl")]
    assert cli.main(["agreement", *files, "--format", "json", "--orderings", "500"]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    between = next(t for t in tables["items"] if " against " in t["comparison"])
    # x,y: 1-1, 2-2, 1-tie, 3-3, 2-2; y,z: 1-1, 2-2, 2-tie, 3-3, the unparsed one dropped.
    assert (between["items"], between["agreement"]) == (9, pytest.approx(7 / 9))
    among = next(t for t in tables["items"] if "annotators" in t["comparison"])
    assert (among["items"], among["raters"], among["unanimous"]) == (10, 3, pytest.approx(0.6))
    assert tables["systems by mean Elo"][0]["systems"] == 3


def test_csv_import_maps_columns_and_words(tmp_path, capsys):
    source = tmp_path / "sheet.csv"
    source.write_text(
        "Left,Right,question_id,annotator,Verdict\n" + "".join(f"x,y,{q},{n},left\n" for q in (1, 2) for n in range(3))
    )
    out = tmp_path / "human.jsonl"
    command = ["import-csv", str(source), "--out", str(out)]
    with pytest.raises(UserError, match="need the keys a, b, score"):
        cli.main(command)
    columns = [f"--column={pair}" for pair in ("a=Left", "b=Right", "score=Verdict")]
    with pytest.raises(UserError, match="score is not one of 1, 2, 3"):
        cli.main(command + columns)
    assert not out.exists()
    assert cli.main([*command, *columns, "--label=left=1"]) == 0
    assert read_ratings(read_rows(out)).votes == [Vote("x", "y", q, 1) for q in (1, 2)]
    bad = tmp_path / "ragged.csv"
    bad.write_text("a,b,question_id,annotator,score\nx,y,1,0\n")
    with pytest.raises(UserError, match="this row differs"):
        cli.main(["elo", str(bad)])


def test_command_line_elo(data_dir, capsys):
    path = str(data_dir / "evaluation" / "pairwise_vicuna_gpt4.jsonl.gz")
    assert cli.main(["elo", path, "--preset", "paper-vicuna", "--orderings", "500", "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["k"] == 4 and result["settings"]["matches"] == 4467
    assert len(result["tables"]["paper Table 1"]) == 8
    assert all(line["within 5 se + 0.5"] for line in result["tables"]["paper Table 1"])
    assert cli.main(["elo", path, "--k", "16", "--orderings", "10", "--format", "csv", "--table", "ratings"]) == 0
    assert "k 16.0" in capsys.readouterr().err
    with pytest.raises(UserError, match="no table 'nets'"):
        cli.main(["elo", path, "--orderings", "10", "--table", "nets"])
    with pytest.raises(UserError, match="Did you mean 'elo'"):
        cli.main(["elos", path])
