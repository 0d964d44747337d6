"""`qlora-ref eval elo FILE`: rates a tournament, as the paper did and as it should have."""

import argparse
import math
from dataclasses import asdict, replace
from functools import partial

import numpy as np

from . import bradley_terry, elo, paper
from .cli_common import add_bad_rows, add_human, add_output, emit, parser, positive_int, whole_number
from .order_bias import order_bias
from .records import read_rows
from .report_tables import Result, Table
from .tournament import Matches, Ratings, average_orders, net_table, read_ratings, to_matches


def _orderings(text: str) -> int | str:
    if text == "all":
        return text
    try:
        return positive_int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or all, not {text!r}") from None


def add_elo_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("Elo (a preset, and any of its settings on its own)")
    g.add_argument("--preset", choices=sorted(elo.PRESETS), default="paper-vicuna")
    g.add_argument("--k", type=float, help="points at stake in a match (paper-vicuna 4, paper-oa 32)")
    g.add_argument("--start", type=float, help="first rating (1000)")
    g.add_argument("--base", type=float, help="odds for a lead of SCALE points (10)")
    g.add_argument("--scale", type=float, help="(400)")
    g.add_argument("--orderings", type=_orderings, default=elo.PAPER_ORDERINGS, metavar="N|all")
    g.add_argument("--seed", type=whole_number, default=0)
    g.add_argument("--ties", choices=("half", "drop"), default="half", help="half a win each, or leave out")
    g.add_argument("--unparsed", choices=("drop", "tie"), default="drop", help="rows with score -1")
    g.add_argument("--orders", choices=("separate", "average"), default="separate", help="presentation orders")
    g.add_argument("--loose", action="store_true", help="re-read unparsed rows loosely (not the paper's rule)")


def settings_of(args: argparse.Namespace) -> elo.EloSettings:
    given = {key: getattr(args, key) for key in ("k", "start", "base", "scale") if getattr(args, key) is not None}
    return replace(elo.PRESETS[args.preset], **given)


def ratings_of(path: str, args: argparse.Namespace) -> Ratings:
    rows = read_rows(path)
    return read_ratings(rows, args.bad_rows, args.annotators, args.no_majority, args.raters, args.loose)


def matches_of(ratings: Ratings, args: argparse.Namespace) -> Matches:
    matches = to_matches(ratings.votes, args.ties, args.unparsed)
    return average_orders(matches) if args.orders == "average" and len(matches) else matches


def rate(matches: Matches, args: argparse.Namespace) -> elo.EloResult:
    settings = settings_of(args)
    if args.orderings == "all":
        return elo.mean_over_all_orderings(matches, settings)
    return elo.mean_over_orderings(matches, settings, args.orderings, args.seed)


def main(argv: list[str]) -> int:
    p = parser("elo", "Rates a tournament of pairwise, Open Assistant or human ratings.")
    p.add_argument("file", help="ratings: .jsonl or .csv, plain or .gz")
    p.add_argument("--plot", metavar="FILE", help="also draw the ratings with intervals (.svg, .png, .pdf)")
    add_elo_options(p)
    add_human(p)
    add_bad_rows(p)
    add_output(p)
    args = p.parse_args(argv)
    ratings = ratings_of(args.file, args)
    matches = matches_of(ratings, args)
    result = rate(matches, args)
    notes = ratings.notes.lines() + paper.unknown_systems(matches.names)
    try:
        s = result.settings
        # Odds of `base` for a lead of `scale`, as in the Elo column beside it.
        model = bradley_terry.fit(matches, s.start, s.scale / math.log10(s.base))
    except ValueError as error:
        model = None
        notes.append(str(error))
    plot = None
    if args.plot:
        from .report_plots import plot_elo

        plot = partial(plot_elo, result, model, args.plot)
    emit(_result(ratings, matches, result, model, notes, args), args, plot)
    return 0


def _result(
    ratings: Ratings,
    matches: Matches,
    result: elo.EloResult,
    model: bradley_terry.BradleyTerry | None,
    notes: list[str],
    args: argparse.Namespace,
) -> Result:
    settings: dict = {"preset": args.preset} | asdict(result.settings)
    settings |= {"ties": args.ties, "unparsed": args.unparsed, "presentation orders": args.orders}
    settings |= {"orderings": result.n_orderings, "seed": result.seed, "matches": result.n_matches}
    settings |= {"rows": ratings.n_rows, "judge": ratings.kind}
    if ratings.kind == "human":
        settings |= {"annotators": args.annotators, "no majority": args.no_majority}
        notes.append(f"{ratings.n_without_majority} of {len(ratings.annotations)} items without a majority")
    tables = [_ratings_table(matches, result, model), _labels_table(ratings), _bias_table(ratings)]
    net = net_table(ratings.votes)
    tables.append(
        Table("net wins", ["pair", "wins", "losses", "ties", "net"], [[k, *v.values()] for k, v in net.items()])
    )
    if args.preset == "paper-vicuna" and ratings.kind == "judge" and set(matches.names) == set(paper.TABLE1_ELO):
        tables.append(_paper_table(result))
    return Result("Tournament", settings, tables, notes)


def _ratings_table(matches: Matches, result: elo.EloResult, model: bradley_terry.BradleyTerry | None) -> Table:
    once = elo.replay(matches, result.settings)
    played = np.bincount(matches.a, minlength=len(matches.names)) + np.bincount(matches.b, minlength=len(matches.names))
    columns = ["system", "matches", "elo", "sd", "se", "file order", "bradley-terry", "low 95", "high 95"]
    rows = []
    for i in np.argsort(-result.mean, kind="stable"):
        name = matches.names[i]
        bt = (model.rating[i], model.low[i], model.high[i]) if model else (None, None, None)
        rows.append([name, int(played[i]), result.mean[i], result.sd[i], result.se[i], once[name], *bt])
    return Table("ratings", columns, rows, {"file order": 4, "bradley-terry": 4, "low 95": 1, "high 95": 1})


def _labels_table(ratings: Ratings) -> Table:
    names = {1: "first shown wins", 2: "second shown wins", 3: "tie", -1: "unparsed"}
    what = "annotations" if ratings.kind == "human" else "rows"
    return Table("labels", ["label", "meaning", what], [[k, names[k], ratings.label_counts[k]] for k in names])


def _bias_table(ratings: Ratings) -> Table:
    """One vote an item and order: of `--annotators each` the majorities, whose two orders can be compared."""
    several = len({(v.a, v.b, v.item) for v in ratings.votes}) < len(ratings.votes)
    bias = order_bias(ratings.item_votes() if several else ratings.votes)
    return Table("order bias", ["statistic", "value"], [list(kv) for kv in asdict(bias).items()])


def _paper_table(result: elo.EloResult) -> Table:
    """Table 1 beside ours. Both are Monte-Carlo means and Table 1 is rounded: 5 SE of ours plus half a point."""
    rows = []
    for name, mean, se in zip(result.names, result.mean, result.se, strict=True):
        printed = paper.TABLE1_ELO[name]
        within = bool(abs(mean - printed) <= 5 * se + 0.5)
        rows.append([name, mean, printed, mean - printed, within])
    rows.sort(key=lambda row: -row[2])
    return Table("paper Table 1", ["system", "elo", "paper", "difference", "within 5 se + 0.5"], rows)
