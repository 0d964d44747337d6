"""`qlora-ref eval relative FILE`: the paper's Table 6 from a file of relative scores."""

from functools import partial

from . import paper
from .cli_common import add_bad_rows, add_output, emit, parser
from .records import read_rows
from .relative import RelativeTable, relative_table
from .report_tables import Result, Table


def main(argv: list[str]) -> int:
    p = parser("relative", "Scores in percent of a baseline system, both presentation orders, 95 % intervals.")
    p.add_argument("file", help="relative scores: .jsonl or .csv, plain or .gz")
    p.add_argument("--baseline", default="chatgpt", metavar="SYSTEM", help="the 100 %% system (default chatgpt)")
    p.add_argument("--interval", choices=("paper", "paired"), default="paper", help="paper's rule, or delta method")
    p.add_argument("--baseline-answers", metavar="FILE", help="answers with answer_id: derive who was shown first")
    p.add_argument("--plot", metavar="FILE", help="also draw the means with intervals (.svg, .png, .pdf)")
    add_bad_rows(p)
    add_output(p)
    args = p.parse_args(argv)
    ids = None
    if args.baseline_answers:
        ids = {str(row["answer_id"]) for row in read_rows(args.baseline_answers) if row.get("answer_id")}
    table = relative_table(read_rows(args.file), args.baseline, args.bad_rows, ids)
    plot = None
    if args.plot:
        from .report_plots import plot_relative

        plot = partial(plot_relative, table, args.plot, args.interval)
    emit(relative_result(table, args.interval), args, plot)
    return 0


def relative_result(table: RelativeTable, interval: str = "paper") -> Result:
    base = table.baseline
    notes = table.notes.lines() + paper.unknown_systems(s.system for s in table.scores)
    notes.insert(0, f"{table.n_rows:,} rows; {table.n_unparsed} unparsed ([-1, -1]), in no average")
    tables = [_main_table(table, interval), _estimators(table)]
    cells = paper.compare_table6(table) if base == "chatgpt" else []
    if cells:
        missed = [cell for cell in cells if not cell["matches"]]
        notes.append(f"{len(cells) - len(missed)} of {len(cells)} cells of the paper's Table 6 to the printed digit")
        tables.append(
            Table(
                "cells that differ from the paper",
                ["system", "cell", "computed", "paper", "reason"],
                [[c["system"], c["cell"], c["computed"], c["paper"], c["reason"]] for c in missed],
            )
        )
    settings = {
        "rule": "ratio of sums per order; per question the mean of its valid orders, then the ratio of sums",
        "interval": f"95 %, {interval}",
        "baseline": base,
    }
    return Result(f"Scores in percent of {base}", settings, tables, notes)


def _main_table(table: RelativeTable, interval: str) -> Table:
    columns = [
        "system",
        f"{table.baseline} first",
        "system first",
        "mean",
        "+-",
        "questions",
        "valid",
        "first bonus",
    ]
    rows = [
        [
            s.system,
            s.baseline_first.percent,
            s.system_first.percent,
            s.mean_percent,
            s.ci95_half_width_percent if interval == "paper" else s.paired_half_width_percent,
            s.n_questions,
            f"{s.baseline_first.n_valid}/{s.system_first.n_valid}",
            s.first_bonus_points,
        ]
        for s in table.scores
    ]
    return Table("scores", columns, rows)


def _estimators(table: RelativeTable) -> Table:
    """Other ways to average, none of them the paper's: they show how much the rule matters."""
    columns = ["system", "mean", "mean of two orders", "pooled", "mean of ratios", "+- paper", "+- paired"]
    rows = [
        [
            s.system,
            s.mean_percent,
            s.mean_of_two_orders_percent,
            s.pooled_all_ratings_percent,
            s.mean_of_ratios_percent,
            s.ci95_half_width_percent,
            s.paired_half_width_percent,
        ]
        for s in table.scores
    ]
    return Table("diagnostics", columns, rows)
