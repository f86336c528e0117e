"""Plots of a run, from the files it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.figure

TRAIN_COLOUR, HELD_OUT_COLOUR = "#2c6fbb", "#d1495b"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, [] if there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    figure = matplotlib.figure.Figure(figsize=(12, 3.2 * lines), layout="constrained")
    for number, (title, names) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(lines, 3, number)
        for name, style in zip(names, ("-", "--"), strict=False):
            for rows, key, colour, label in (
                (train, name, TRAIN_COLOUR, "training"),
                (held_out, f"eval/{name}", HELD_OUT_COLOUR, "held out"),
            ):
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if points:
                    side = " " + name.split("/")[1] if len(names) > 1 else ""
                    marker = "o" if rows is held_out else None
                    axes.plot(*zip(*points, strict=True), style, color=colour, marker=marker, ms=4, label=label + side)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize=8)
    path = workdir / "curves.png"
    figure.savefig(path, dpi=110)
    return path
