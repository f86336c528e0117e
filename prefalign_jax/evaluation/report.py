"""What an evaluation measured, as text for a terminal and as files."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefalign_jax.evaluation.held_out import Slice
from prefalign_jax.evaluation.measure import Evaluation
from prefalign_jax.files import whole, write_json, write_text
from prefalign_jax.intervals import FEW, Interval
from prefalign_jax.pages.plots import plot_margins
from prefalign_jax.pages.token_page import page
from prefalign_jax.tables import aligned


def as_text(result: Evaluation) -> str:
    """Tables of the metrics, of each slicing, and of the displacement."""
    head = ("metric", "mean, 95% interval", *(("before", "change") if result.before else ()))
    rows = [
        (name, shown(value), *((shown(result.before[name]), shown(result.change.get(name))) if result.before else ()))
        for name, value in result.metrics.items()
    ]
    out = [aligned(head, rows)]
    for by, parts in result.slices.items():
        if len(parts) < 2:
            continue
        names = list(next(iter(parts.values())).metrics)
        rows = [
            (value, f"{part.pairs:,} ({part.share:.0%})", *(shown(part.metrics[name]) for name in names))
            for value, part in parts.items()
        ]
        out.append(aligned((by, result.loss.unit, *names), rows))
    if result.displacement:
        moved = result.displacement.values()
        rows = [
            ("share that fell", *(shown(part.fell) for part in moved)),
            ("mean change, nats", *(shown(part.change) for part in moved)),
        ]
        for name in ("mean", "median", "worst"):
            falls = [getattr(part, name) for part in moved]
            rows.append((f"of those that fell, {name}", *(f"-{fall:.4g}" if fall else "-" for fall in falls)))
        out.append(aligned(("log-probability, policy - reference", *result.displacement), rows))
    out.append(f"A mean over fewer than {FEW} prompts has no interval.")
    return "\n\n".join(out)


def shown(interval: Interval | None) -> str:
    """An interval in a table.

    Example:
      >>> shown(Interval(0.5, 0.25, 0.75)), shown(Interval(0.5, math.nan, math.nan)), shown(None)
      ('0.5 [0.25, 0.75]', '0.5', '-')
    """
    if interval is None or math.isnan(interval.mean):
        return "-"
    mean, low, high = (f"{round(x, 12):.4g}" for x in interval)
    return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"


def write_report(out: Path, result: Evaluation, about: str, settings: Mapping[str, Any]) -> list[str]:
    """Writes evaluation.json, slices.csv, and where the loss gives them margins.png and tokens.html.

    Args:
      out: directory.
      result: what was measured.
      about: the models and the data, in words.
      settings: models, data and lengths, for evaluation.json.

    Returns:
      The files' names.
    """
    loss = result.loss
    record = {
        **settings,
        "loss": {"name": loss.name, **loss.hyper},
        loss.unit: result.pairs,
        "prompts": result.prompts,
        "dropped": result.dropped,
        "metrics": result.metrics,
        **({"metrics_before": result.before, "change": result.change} if result.before else {}),
        "slices": result.slices,
        "displacement": result.displacement,
    }
    write_json(out / "evaluation.json", plain(record))
    write_slices(out / "slices.csv", result.slices)
    written = ["evaluation.json", "slices.csv"]
    if result.margins is not None:
        plot_margins(out / "margins.png", result.margins)
        written.append("margins.png")
    if result.examples:
        beta = loss.hyper.get("beta", 1.0) if "reference" in loss.needs else 1.0
        write_text(out / "tokens.html", page(f"{loss.name}, token by token", about, result.examples, beta=beta))
        written.append("tokens.html")
    return written


def plain(value: Any) -> Any:
    """Records as JSON takes them; NaN is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "_asdict"):
        value = value._asdict()
    return {key: plain(part) for key, part in value.items()} if isinstance(value, Mapping) else value


def write_slices(path: Path, slices: Mapping[str, Mapping[str, Slice]]) -> None:
    """A row for each metric of each slice."""
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("by", "slice", "pairs", "share", "metric", "mean", "low", "high"))
        for by, parts in slices.items():
            for value, one in parts.items():
                for name, interval in one.metrics.items():
                    writer.writerow((by, value, one.pairs, one.share, name, *interval))
