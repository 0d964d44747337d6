"""Draw the figures of docs/ that come from the definition: `python tools/plot_figures.py [--out docs/figures]`."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from qlora_ref.reference.codebook import NAMES, get_codebook
from qlora_ref.testing.quality import expected_error

BLOCKS = [2**k for k in range(5, 13)]


def levels():
    """Every table at block 64 as ticks on [-1, 1]."""
    figure, axis = plt.subplots(figsize=(9, 3.6))
    for row, name in enumerate(NAMES):
        values = torch.unique(get_codebook(name).levels)
        axis.plot(values, [row] * len(values), "|", markersize=16, markeredgewidth=1.6)
    axis.set_yticks(range(len(NAMES)), NAMES)
    axis.invert_yaxis()
    axis.set_xlabel("level (fraction of the block's absmax)")
    axis.set_title("Sixteen levels: every 4-bit data type, block size 64")
    return figure


def error_by_block_size():
    """Expected squared error of N(0,1) weights against block size, from the integral."""
    figure, axis = plt.subplots(figsize=(9, 4.2))
    for name in ("nf4", "fp4_bnb", "fp4_e2m1", "int4", "sf4", "bof4"):
        mse = [expected_error(torch.unique(get_codebook(name, b).levels), b).mse for b in BLOCKS]
        axis.plot(BLOCKS, mse, marker="o", markersize=3, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(BLOCKS, BLOCKS)
    axis.set_xlabel("block size")
    axis.set_ylabel("expected squared error (weights of variance 1)")
    axis.set_title("Small blocks beat clever codes: N(0,1) weights")
    axis.legend()
    axis.grid(alpha=0.3)
    return figure


FIGURES = {f.__name__: f for f in (levels, error_by_block_size)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "figures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        figure = draw()
        figure.savefig(out / f"{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        print(out / f"{name}.png")


if __name__ == "__main__":
    main()
