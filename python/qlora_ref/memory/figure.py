"""The stacked-bar figure, one bar a model, like the memory figure (6) of the paper. Needs matplotlib."""

import io
from pathlib import Path

from . import categories as row
from .cards import CARDS
from .estimate import Estimate
from .report import GB, write_atomic

GROUPS = {
    "4-bit weights": (row.PACKED,),
    "quantization constants": (row.LEVEL1, row.LEVEL2),
    "16-bit weights": (row.PLAIN, row.EMBEDDINGS, row.SMALL),
    "adapters": (row.ADAPTERS,),
    "optimizer": (row.STATES,),
    "gradients": (row.GRADIENTS,),
    "activations": (row.TABLES, row.CHECKPOINTS, row.WORKING, row.SCRATCH, row.LOGITS),
}
COLORS = ("#33507a", "#7f9cc4", "#a9b7c9", "#e0a33a", "#c75b39", "#8c3b5a", "#5a9367", "#d9d9d9")


def bars(result: Estimate) -> dict[str, float]:
    """Height of every segment of one bar, GB."""
    out = {name: sum(result.categories[part] for part in parts) / GB for name, parts in GROUPS.items()}
    out["margin"] = (result.needed - result.allocated) / GB
    return out


def draw(results: list[Estimate], path: str | Path) -> None:
    """Write the figure as PNG or SVG, by the ending of `path`."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "qlora_ref"  # the same figure gives the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(1.8 + 1.3 * len(results), 4.8), layout="constrained")
    heights = [bars(result) for result in results]
    names = [result.architecture.name for result in results]
    bottom = [0.0] * len(results)
    for color, part in zip(COLORS, heights[0], strict=True):
        values = [height[part] for height in heights]
        axes.bar(names, values, bottom=bottom, label=part, color=color, width=0.62)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    for x, top in enumerate(bottom):
        axes.annotate(f"{top:.1f}", (x, top), ha="center", va="bottom")
    _card_lines(axes, max(bottom))
    s = results[0].settings
    axes.set_ylabel("GB needed on the card")
    axes.set_title(
        f"{s.batch} x {s.seq} tokens, rank {s.rank}, {s.optimizer}{', paged' if s.paged else ''}", fontsize=10
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="upper left")
    _save(figure, Path(path))
    pyplot.close(figure)


def _card_lines(axes, top: float) -> None:
    for card in CARDS:
        size = card.size / GB
        if size < 1.25 * top:
            axes.axhline(size, color="#888888", linewidth=0.7, linestyle=":")
            axes.annotate(
                card.name, (1.01, size), xycoords=("axes fraction", "data"), fontsize=7, ha="left", va="center"
            )


def _save(figure, path: Path) -> None:
    buffer = io.BytesIO()
    kind = path.suffix.lower().lstrip(".")
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    write_atomic(path, buffer.getvalue())
