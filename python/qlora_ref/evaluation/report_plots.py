"""Ratings with their intervals, drawn by matplotlib without a display."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bradley_terry import BradleyTerry
from .elo import EloResult
from .relative import RelativeTable

_SUFFIXES = (".svg", ".png", ".pdf")


def _figure(n_rows: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.3 * n_rows), layout="constrained")
    return figure, figure.subplots()


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, parse_math=False)  # a name may hold a dollar sign
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def save(figure: Any, path: str | Path) -> None:
    """Writes .svg, .png or .pdf, whole or not at all."""
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"--plot {path}: the name must end in {', '.join(_SUFFIXES)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        figure.savefig(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg")
    return out.getvalue()


def relative_figure(table: RelativeTable, interval: str = "paper") -> Any:
    """Mean percent of the baseline with the 95 % interval, and the two presentation orders as ticks."""
    scores = [s for s in table.scores if s.n_questions]
    figure, axes = _figure(len(scores))
    halves = [s.ci95_half_width_percent if interval == "paper" else s.paired_half_width_percent for s in scores]
    at = range(len(scores))
    axes.errorbar([s.mean_percent for s in scores], at, xerr=halves, fmt="o", color="C0", capsize=3, label="mean, 95 %")
    axes.plot([s.baseline_first.percent for s in scores], at, "|", color="C1", label=f"{table.baseline} shown first")
    axes.plot([s.system_first.percent for s in scores], at, "|", color="C2", label="system shown first")
    axes.axvline(100, color="gray", linewidth=0.8)
    _rows(axes, [s.system for s in scores])
    axes.set_xlabel(f"percent of {table.baseline}")
    axes.legend(fontsize="small")
    return figure


def elo_figure(result: EloResult, model: BradleyTerry | None) -> Any:
    """Elo: mean over orderings with the SD of one ordering. Bradley-Terry: rating with its 95 % interval."""
    order = sorted(range(len(result.names)), key=lambda i: -result.mean[i])
    figure, axes = _figure(len(order))
    at = range(len(order))
    axes.errorbar(
        result.mean[order], [y - 0.12 for y in at], xerr=result.sd[order], fmt="o", capsize=3,
        label=f"Elo, K = {result.settings.k:g}: mean of {result.n_orderings:,} orderings, SD of one",
    )  # fmt: skip
    if model is not None:
        arms = [model.rating[order] - model.low[order], model.high[order] - model.rating[order]]
        axes.errorbar(
            model.rating[order], [y + 0.12 for y in at], xerr=arms, fmt="s", capsize=3, label="Bradley-Terry, 95 %"
        )
    _rows(axes, [result.names[i] for i in order])
    axes.set_xlabel("rating")
    axes.legend(fontsize="small")
    return figure


def plot_relative(table: RelativeTable, path: str | Path, interval: str = "paper") -> None:
    save(relative_figure(table, interval), path)


def plot_elo(result: EloResult, model: BradleyTerry | None, path: str | Path) -> None:
    save(elo_figure(result, model), path)
