"""Curves with bands as charts of a page that a reader can point at, zoom and hide: what pages/charts.js draws."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prefalign_jax.pages.palette import DASHES, look

# In this order. uPlot is the work of Leon Sorokin; its licence is beside it, and every page that holds it shows it.
SCRIPTS = ("pages/uplot.js", "pages/charts.js")
DIGITS = 5  # of a value, of which a chart can show three
MOST_POINTS = 2_000  # of a curve; a chart is a few hundred pixels wide


class Curve(NamedTuple):
    """A curve, with the band that it lies in or None."""

    x: np.ndarray  # [N]
    mean: np.ndarray  # [N]
    low: np.ndarray | None = None  # [N]
    high: np.ndarray | None = None  # [N]


class Panel(NamedTuple):
    """One chart.

    Attributes:
      title: what it shows.
      unit: of the values.
      marks: (value, label) of the lines by which curves are read.
      points: whether each value is marked, where there are few.
      curves: for each of the page's columns the curves of its groups, None for a group, or a column, that has none.
      captions: for each column, what stands beneath.
    """

    title: str
    unit: str
    marks: Sequence[tuple[float, str]]
    points: bool
    curves: Sequence[Sequence[Curve | None] | None]
    captions: Sequence[str]


def chart_data(groups: Sequence[str], columns: Mapping[str, str], panels: Sequence[Panel]) -> dict[str, Any]:
    """What `pages/charts.html` takes: plain values, with as many digits as a chart can show.

    Args:
      groups: their labels, of one group "".
      columns: {name: label of the axis}.
      panels: charts, in order.
    """
    styles = [look(number) for number in range(len(groups))]
    return {
        "groups": [
            {"label": label, "colour": colour, "dash": DASHES[style]}
            for label, (colour, style) in zip(groups, styles, strict=True)
        ],
        "columns": [{"name": name, "label": label} for name, label in columns.items()],
        "panels": [
            {
                **panel._asdict(),
                "curves": [curves and [curve and _plain(curve) for curve in curves] for curves in panel.curves],
                "captions": [
                    caption + _thinned(curves) for caption, curves in zip(panel.captions, panel.curves, strict=True)
                ],
            }
            for panel in panels
        ],
    }


def _plain(curve: Curve) -> list[list[float | None] | None]:
    every = _every(curve)
    return [None if values is None else [_rounded(value) for value in values[::every].tolist()] for values in curve]


def _every(curve: Curve) -> int:
    return math.ceil(len(curve.x) / MOST_POINTS)


def _thinned(curves: Sequence[Curve | None] | None) -> str:
    most = max((_every(curve) for curve in curves or () if curve), default=1)
    return f"; one point in {most} is drawn" if most > 1 else ""


def _rounded(value: float) -> float | int | None:
    """A number in few characters of JSON, None for one that JSON does not have.

    Example:
      >>> [_rounded(value) for value in (0.12345678, 20.0, float("nan"))]
      [0.12346, 20, None]
    """
    if not math.isfinite(value):
        return None
    value = float(f"{value:.{DIGITS}g}") if abs(value) < 10**DIGITS else round(value)
    return int(value) if value == int(value) else value


def notice() -> str:
    """uPlot's licence, which goes with every copy of it."""
    return importlib.resources.files("prefalign_jax.pages").joinpath("uplot.LICENSE").read_text(encoding="utf-8")
