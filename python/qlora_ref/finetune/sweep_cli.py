"""`qlora-ref sweep GRID.yaml --output DIR`: run a grid of fine-tunes, resume it, summarise and plot it."""

import argparse
import os
from pathlib import Path
from typing import Any

from ..cli import UserError
from . import sweep
from .flags import Parser
from .peft_io import write_json
from .statistics import Comparison, compare

_COLOURS = ("#1f6fb2", "#d1622b", "#3c8d40", "#8a5fa8", "#8a8a8a", "#b5893a")


def main(argv: list[str]) -> int:
    """Exit status 0: every run done; 1: some failed (their errors are in the table); 130: interrupted."""
    parser = Parser(prog="qlora-ref sweep", description=(sweep.__doc__ or ""))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("grid", help="YAML file: base, arms, grid, permute, compare")
    parser.add_argument("--output", required=True, help="folder for sweep.sqlite, the runs, summary.json, sweep.png")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; with GPUs, one each in turn (1)")
    parser.add_argument("--summary", action="store_true", help="run nothing; summarise what is done")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}.")
    output = Path(args.output)
    study = sweep.load_study(Path(args.grid), output)
    failed = 0
    if not args.summary:
        try:
            failed = sweep.run_study(study, output, args.jobs)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here")
            return 130
    if not (output / "sweep.sqlite").exists():
        raise UserError(f"{output} holds no sweep yet; leave --summary out.")
    print(report(study, output))
    return 1 if failed else 0


def results(output: Path, column: str) -> dict[str, dict[str, float]]:
    """arm -> replicate -> value of finished runs."""
    found: dict[str, dict[str, float]] = {}
    query = f"SELECT arm, replicate, {column} FROM runs WHERE status = 'done' AND {column} IS NOT NULL"
    for arm, replicate, value in sweep.connect(output).execute(query):
        found.setdefault(arm, {})[replicate] = value
    return found


def summarise(study: sweep.Study, output: Path) -> dict[str, Any]:
    """Per arm: mean losses, and the paired comparison with the baseline before and after fine-tuning."""
    before, after = results(output, "loss_before"), results(output, "loss_after")
    arms = [a for a in dict.fromkeys(p.arm for p in study.runs) if a in after]
    rows: dict[str, Any] = {}
    for arm in arms:
        n = len(after[arm])
        rows[arm] = {
            "runs": n,
            "before": sum(before[arm].values()) / n,
            "after": sum(after[arm].values()) / n,
        }
        if study.baseline in after and arm != study.baseline:
            for name, values in (("before", before), ("after", after)):
                rows[arm][f"{name}_difference"] = compare(values[arm], values[study.baseline], study.margin).as_dict()
    return {"baseline": study.baseline, "margin": study.margin, "arms": rows}


def report(study: sweep.Study, output: Path) -> str:
    """The summary as a table; also written as summary.json, and drawn as sweep.png."""
    from tabulate import tabulate

    summary = summarise(study, output)
    if not summary["arms"]:
        raise UserError(f"{output}: no run is done; the errors are in the column 'error' of sweep.sqlite.")
    write_json(output / "summary.json", summary)
    if study.baseline:
        plot(summary, results(output, "loss_after"), output / "sweep.png")
    table = []
    for arm, row in summary["arms"].items():
        d = row.get("after_difference")
        line = [arm, row["runs"], f"{row['before']:.4f}", f"{row['after']:.4f}"]
        if d:
            line += [f"{row['before_difference']['mean']:+.4f}", f"{d['mean']:+.4f}", _interval(d)]
            line += [f"{d['p_difference']:.2g}", f"{d['p_equivalence']:.2g}", "yes" if d["equivalent"] else "no"]
        table.append(line)
    headers = ["arm", "runs", "before", "after"]
    if study.baseline:
        headers += ["before: minus base", "after: minus base", "95 % interval", "p(equal)"]
        headers += [f"p(TOST {study.margin:g})", "equivalent"]
    return tabulate(table, headers, disable_numparse=True)


def _interval(d: dict[str, Any]) -> str:
    return f"[{d['low']:+.4f}, {d['high']:+.4f}]"


def plot(summary: dict[str, Any], after: dict[str, dict[str, float]], path: Path) -> None:
    """Paired differences from the baseline after fine-tuning: every replicate, mean and 95 % interval, the margin."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    baseline, margin = summary["baseline"], summary["margin"]
    arms = [a for a in summary["arms"] if a != baseline]
    figure = Figure(figsize=(7.2, 1.2 + 0.55 * len(arms)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axvspan(-margin, margin, color="#e8eef4", label=f"equivalence margin, {margin:g} nats")
    axes.axvline(0, color="#8a8a8a", linewidth=0.8)
    for y, arm in enumerate(reversed(arms)):
        d = Comparison(**{k: v for k, v in summary["arms"][arm]["after_difference"].items() if k != "equivalent"})
        colour = _COLOURS[y % len(_COLOURS)]
        points = [after[arm][k] - after[baseline][k] for k in after[arm] if k in after[baseline]]
        axes.plot(points, [y + 0.18] * len(points), "o", color=colour, alpha=0.45, markersize=4)
        axes.errorbar(d.mean, y, xerr=[[d.mean - d.low], [d.high - d.mean]], fmt="s", color=colour, capsize=4)
    axes.set_yticks(range(len(arms)), reversed(arms))
    axes.set_ylim(-0.6, len(arms) - 0.2)
    axes.set_xlabel(f"held-out loss after fine-tuning minus {baseline} (nats per labelled token)")
    axes.legend(frameon=False, loc="best", fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
