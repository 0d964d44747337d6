"""`qlora-ref eval report ...`: the HTML page for reading answers and verdicts side by side."""

import argparse
from collections import Counter

from . import bradley_terry, elo
from .answers import read_all_answers, read_questions
from .cli_common import parser
from .records import read_rows
from .relative import relative_table
from .report_html import html_report, verdicts_of
from .report_plots import elo_figure, relative_figure, svg
from .report_tables import write_text
from .tournament import read_ratings, to_matches


def main(argv: list[str]) -> int:
    p = parser("report", "One static HTML page: questions, answers side by side, the judge's words. Opens offline.")
    p.add_argument("ratings", help="pairwise or relative ratings: .jsonl or .csv, plain or .gz")
    p.add_argument("--questions", required=True, metavar="FILE", help="question_id or message_id, text, category")
    p.add_argument("--answers", required=True, action="append", metavar="SYSTEM=FILE", help="once per system")
    p.add_argument("--out", required=True, metavar="FILE", help="where to write the .html")
    p.add_argument("--title", default="Answers and verdicts")
    p.add_argument("--baseline", default="chatgpt", metavar="SYSTEM", help="of relative ratings (chatgpt)")
    args = p.parse_args(argv)
    rows = read_rows(args.ratings)
    plot, notes = _checked(rows, args)
    page = html_report(
        args.title,
        read_questions(args.questions),
        read_all_answers(args.answers),
        verdicts_of(rows, args.baseline),
        notes,
        plot,
    )
    write_text(args.out, page)
    print(f"wrote {args.out} ({len(page.encode()) / 1e6:.1f} MB)")
    return 0


def _checked(rows: list[dict], args: argparse.Namespace) -> tuple[str, list[str]]:
    """The plot of all ratings, and what the readers found in them; they refuse bad rows."""
    if "system" in rows[0]:
        table = relative_table(rows, args.baseline)
        return svg(relative_figure(table)), table.notes.lines()
    per_item = Counter((row.get("a"), row.get("b"), row.get("question_id", row.get("message_id"))) for row in rows)
    ratings = read_ratings(rows, raters=max(per_item.values()))
    matches = to_matches(ratings.votes)
    try:
        model = bradley_terry.fit(matches)
    except ValueError as error:
        model = None
        ratings.notes.add("no Bradley-Terry rating", str(error))
    return svg(elo_figure(elo.mean_over_orderings(matches, orderings=1000), model)), ratings.notes.lines()
