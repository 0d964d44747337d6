"""`qlora-ref eval agreement FILE [FILE2]`: a judge with itself after the swap, annotators, or two judges."""

import contextlib
from dataclasses import asdict

from . import agreement
from .cli_common import add_bad_rows, add_human, add_output, emit, parser
from .cli_elo import add_elo_options, matches_of, rate, ratings_of, settings_of
from .report_tables import Result, Table
from .tournament import Ratings

_COLUMNS = [
    "comparison",
    "items",
    "raters",
    "kappa",
    "agreement",
    "unanimous",
    "share 1",
    "share 2",
    "share 3",
]


def main(argv: list[str]) -> int:
    p = parser("agreement", "One file: annotators among themselves, or a judge after the swap. Two: also each other.")
    p.add_argument("file", help="ratings: .jsonl or .csv, plain or .gz")
    p.add_argument("other", nargs="?", help="a second judge's ratings of the same systems")
    add_elo_options(p)
    add_human(p)
    add_bad_rows(p)
    add_output(p)
    args = p.parse_args(argv)
    files = [args.file] + ([args.other] if args.other else [])
    judges = [ratings_of(path, args) for path in files]
    found = [(name, value) for path, judge in zip(files, judges, strict=True) for name, value in _alone(path, judge)]
    notes = [note for judge in judges for note in judge.notes.lines()]
    tables = []
    if args.other:
        try:
            found.append((f"{files[0]} against {files[1]}", agreement.between_judges(*judges)))
        except ValueError as error:
            notes.append(str(error))
        tables.append(_system_level(judges, args))
    if not found and not tables:
        raise ValueError("nothing to compare: no item was judged in both orders. Give a second file of ratings.")
    tables.insert(0, Table("items", _COLUMNS, [_row(name, value) for name, value in found], dict.fromkeys(_COLUMNS, 4)))
    notes += [f"{name}: orientation {v.orientation}; {v.missing}" for name, v in found]
    if any(value.kappa != value.kappa for _, value in found):
        notes.append("kappa is undefined where all ratings fall into one class")
    settings = {"kappa": "Fleiss, classes 1/2/3 (first, second, tie)", "preset": args.preset}
    settings |= asdict(settings_of(args)) | {
        "orderings": args.orderings,
        "seed": args.seed,
        "ties": args.ties,
        "unparsed": args.unparsed,
        "presentation orders": args.orders,
        "items without a majority": "tie",
    }
    if any(judge.kind == "human" for judge in judges):
        settings |= {"annotators in Elo": args.annotators, "no majority in Elo": args.no_majority}
    emit(Result("Agreement", settings, tables, notes), args)
    return 0


def _alone(path: str, judge: Ratings) -> list[tuple[str, agreement.ItemAgreement]]:
    found = []
    if judge.kind == "human" and len(next(iter(judge.annotations.values()))) > 1:
        found.append((f"{path}: among annotators", agreement.among_annotators(judge)))
    with contextlib.suppress(ValueError):  # no item in both orders: nothing to say, not a fault of the file
        found.append((f"{path}: after the swap", agreement.after_swap(judge.item_votes())))
    return found


def _row(name: str, a: agreement.ItemAgreement) -> list:
    return [name, a.n_items, a.n_raters, a.kappa, a.agreement, a.unanimous, *a.class_shares]


def _system_level(judges: list[Ratings], args) -> Table:
    ranks = agreement.rank_agreement(*(rate(matches_of(j, args), args).ratings() for j in judges))
    row = [len(ranks.systems), ranks.kendall_tau, ranks.spearman_rho, ", ".join(ranks.systems)]
    columns = ["systems", "kendall tau", "spearman rho", "shared"]
    return Table("systems by mean Elo", columns, [row], {"kendall tau": 4, "spearman rho": 4})
