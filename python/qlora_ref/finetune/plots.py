"""The loss curve of a run as a PNG."""

import os
from pathlib import Path
from typing import Any

_BLUE, _ORANGE, _GREY = "#1f6fb2", "#d1622b", "#8a8a8a"


def smooth(values: list[float], span: int) -> list[float]:
    """Trailing mean over `span` values."""
    return [sum(values[max(0, i + 1 - span) : i + 1]) / min(i + 1, span) for i in range(len(values))]


def plot_losses(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training loss (thin), its trailing mean, and held-out loss (dots) of one or two runs, against the step.

    runs: name -> records of metrics.jsonl. Written atomically.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, records), colour in zip(runs.items(), (_BLUE, _ORANGE, _GREY), strict=False):
        train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
        held = [(r["step"], r["eval_loss"]) for r in records if r.get("eval_loss") is not None]
        if train:
            steps, losses = zip(*train, strict=True)
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(list(losses), max(1, len(losses) // 20)), color=colour, linewidth=1.6,
                      label=f"{name}: training")  # fmt: skip
        if held:
            axes.plot(
                *zip(*held, strict=True), "o-", color=colour, markersize=4, linewidth=0.8, label=f"{name}: held out"
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per labelled token)")
    axes.grid(alpha=0.25)
    if axes.has_data():
        axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
