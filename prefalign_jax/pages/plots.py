"""Plots of a run, from the files it wrote."""

from __future__ import annotations

from pathlib import Path

import matplotlib.figure
import numpy as np

from prefalign_jax.files import whole
from prefalign_jax.metrics import read_metrics
from prefalign_jax.pages.palette import INK, PALETTE
from prefalign_jax.pages.pictures import styled

TRAINING, HELD_OUT = PALETTE["blue"], PALETTE["vermillion"]
GOOD, BAD = PALETTE["blue"], PALETTE["vermillion"]


@styled
def plot_curves(workdir: Path) -> Path:
    """Draws loss, accuracy, margins, log-probabilities, gradient norm and learning rate against steps into curves.png.

    Args:
      workdir: of a run.

    Returns:
      The picture's path.
    """
    train, held_out = read_metrics(workdir / "metrics.jsonl"), read_metrics(workdir / "eval.jsonl")
    panels = {
        "loss": ["loss"],
        "accuracy": ["rewards/accuracies"],
        "reward margin": ["rewards/margins"],
        "log-probability of chosen and rejected": ["logps/chosen", "logps/rejected"],
        "gradient norm": ["grad_norm"],
        "learning rate": ["learning_rate"],
    }
    shown = {title: names for title, names in panels.items() if any(name in row for row in train for name in names)}
    lines = max(1, -(-len(shown) // 3))
    figure = matplotlib.figure.Figure(figsize=(12, 3.2 * lines), layout="none")  # arranging them would draw all twice
    figure.subplots_adjust(0.05, 0.15 / lines, 0.99, 1 - 0.1 / lines, hspace=0.4, wspace=0.2)
    for number, (title, names) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(lines, 3, number)
        for name, style in zip(names, ("-", "--"), strict=False):
            for rows, key, colour, label in (
                (train, name, TRAINING, "training"),
                (held_out, f"eval/{name}", HELD_OUT, "held out"),
            ):
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if points:
                    side = " " + name.split("/")[1] if len(names) > 1 else ""
                    marker = "o" if rows is held_out else None
                    axes.plot(*zip(*points, strict=True), style, color=colour, marker=marker, ms=4, label=label + side)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter("{x:,g}")
        if len(axes.lines) > 1:
            axes.legend()
    path = workdir / "curves.png"
    figure.savefig(path)
    return path


@styled
def plot_margins(path: Path, margins: np.ndarray) -> None:
    """Histogram of the margins of held-out pairs: those right of zero are right.

    Args:
      path: of the .png file.
      margins: [N] reward of the chosen minus that of the rejected response.
    """
    figure = matplotlib.figure.Figure(figsize=(6, 3.5))
    axes = figure.add_subplot()
    edges = edges_around_zero(margins)
    for part, label, colour in (
        (margins[margins > 0], "right", GOOD),
        (margins[margins <= 0], "wrong", BAD),
    ):
        axes.hist(part, edges, color=colour, alpha=0.8, label=f"{len(part):,} {label}")
    axes.axvline(margins.mean(), color=INK, lw=1, ls="--", label=f"mean {margins.mean():+.3g}")
    axes.set_xlabel("reward margin of a held-out pair")
    axes.set_ylabel("pairs")
    axes.legend()
    with whole(path) as part:
        figure.savefig(part, format="png")


def edges_around_zero(values: np.ndarray, bars: int = 40) -> np.ndarray:
    """Edges of about so many equal bars that hold all values; zero is one of them, so no bar holds values either side.

    Example:
      >>> edges_around_zero(np.array([-1.0, 3.0]), 4)
      array([-1.,  0.,  1.,  2.,  3.,  4.])
    """
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    width = (high - low or 1.0) / bars
    return width * np.arange(np.floor(low / width), np.ceil(high / width) + 2)
