"""Runs compared over seeds: groups, means and paired differences with intervals, curves with bands, equal compute."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from prefalign_jax.analysis.runs import Run, differing
from prefalign_jax.intervals import Interval, t_interval
from prefalign_jax.options import did_you_mean
from prefalign_jax.types import UserError

SEED = "seed"
HELD_OUT = "eval/"
SAMPLES = "samples/"
MAX_GAP = 0.25  # of x: values between evaluations further apart than this are not made up
SHARES = ("rewards/accuracies",)
# Metrics in units of the loss's coefficients.
OWN = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")


class Group(NamedTuple):
    """Runs that differ in nothing that is compared, only in their seeds."""

    label: str
    fields: dict[str, Any]
    runs: tuple[Run, ...]


class Band(NamedTuple):
    """A group's curve: the mean over its runs and what it lies in."""

    x: np.ndarray  # [N]
    mean: np.ndarray  # [N]
    low: np.ndarray  # [N]
    high: np.ndarray  # [N]
    kind: str  # what low and high are


class Estimate(NamedTuple):
    """A mean over seeds with its interval, and how many seeds it is of."""

    interval: Interval
    seeds: int


def group_runs(runs: Sequence[Run], by: Sequence[str] | None = None) -> list[Group]:
    """Groups runs that agree in some config fields, in order of appearance.

    Args:
      runs: to group.
      by: the fields; None takes what the points of a sweep override, or where there are others every field that differs
        between runs, but for the seed.

    Returns:
      The groups, each with a label that tells it from the others, as short as can be.

    Raises:
      UserError: a field that no config has, or a run without a config among several.
    """
    known = dict.fromkeys(name for run in runs for name in run.config)
    for name in by or ():
        if name not in known:
            raise UserError(f"--group_by: the configs have no field {name!r}; {did_you_mean(name, known)}".rstrip("; "))
    if len(runs) > 1 and (bare := [run for run in runs if not run.config]):
        raise UserError(f"{bare[0].path} has no config.json to group it by; run its command once more, which writes it")
    points = [{name: value for name, value in run.overrides.items() if name != SEED} for run in runs]
    if by is None and all(points):
        return _by_points(runs, points)
    by = [name for name in differing(runs) if name != SEED] if by is None else list(by)
    parts: dict[str, list[Run]] = {}
    for run in runs:
        parts.setdefault(json.dumps([run.config.get(name) for name in by]), []).append(run)
    fields = [{name: members[0].config.get(name) for name in by} for members in parts.values()]
    labels = _labels(fields, runs)
    return [Group(*group, tuple(members)) for *group, members in zip(labels, fields, parts.values(), strict=True)]


def _by_points(runs: Sequence[Run], points: Sequence[dict[str, Any]]) -> list[Group]:
    """Groups of what points of a sweep override; a config's argument shows without the name of its first field."""
    shown = dict.fromkeys(name for name in differing(runs) if name != SEED)
    parts: dict[str, list[Run]] = {}
    for run, point in zip(runs, points, strict=True):
        given = [
            str(value).partition("=")[2] or str(value) if name == "config" else f"{name.removeprefix('loss.')}={value}"
            for name, value in point.items()
        ]
        parts.setdefault(", ".join(given), []).append(run)
    return [
        Group(label, {name: members[0].config.get(name) for name in shown}, tuple(members))
        for label, members in parts.items()
    ]


def _labels(fields: Sequence[dict[str, Any]], runs: Sequence[Run]) -> list[str]:
    """The loss's name, and as many other fields as it takes to tell the groups apart."""
    labels = [str(one.get("loss.name", "")) for one in fields]
    for name in fields[0]:
        if len(set(labels)) == len(labels):
            break
        if name != "loss.name" and len({json.dumps(one[name]) for one in fields}) > 1:
            given = [f"{name.removeprefix('loss.')}={one[name]}" if one[name] is not None else "" for one in fields]
            labels = [", ".join(filter(None, pair)) for pair in zip(labels, given, strict=True)]
    alone = runs[0].config.get("loss.name") or runs[0].name
    return [label or (alone if len(fields) == 1 else "default") for label in labels]


def mixed(group: Group) -> list[str]:
    """Fields other than the seed that differ within a group: its interval is then not over seeds alone."""
    return [name for name in differing(group.runs) if name != SEED]


# Values of one run


def points(run: Run, metric: str, column: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """A run's curve.

    Args:
      run: the run.
      metric: a column of eval.jsonl if it begins with 'eval/' or 'samples/', else of metrics.jsonl.
      column: what x is: step, or a key of `runs.totals`.

    Returns:
      (x [N], values [N]); empty where the run lacks either.
    """
    measured = run.held_out if metric.startswith((HELD_OUT, SAMPLES)) else run.train
    rows = [row for row in measured if row.get(metric) is not None]
    x, values = (np.array([row[name] for row in rows], np.float64) for name in ("step", metric))
    if column != "step":
        spent = run.spent()
        if column not in spent:
            return np.zeros(0), np.zeros(0)
        x = np.interp(x, [0.0, *spent["step"]], [0.0, *spent[column]])
    return x, values


def final(run: Run, metric: str) -> float:
    """A metric's last value, NaN if there is none."""
    _, values = points(run, metric)
    return float(values[-1]) if values.size else math.nan


def value_at(run: Run, metric: str, column: str, x: float, most_gap: float = MAX_GAP) -> float:
    """A metric where a run has spent x, between two evaluations on the line that joins them.

    Args:
      run, metric, column: as for `points`.
      x: how much.
      most_gap: of x, between two evaluations.

    Returns:
      The value; NaN before the first and after the last one, and between two further apart than most_gap allows.
    """
    xs, values = points(run, metric, column)
    after = int(np.searchsorted(xs, x * (1 - 1e-9)))
    if after == len(xs):
        return math.nan
    if math.isclose(xs[after], x, rel_tol=1e-6):
        return float(values[after])
    if after == 0 or xs[after] - xs[after - 1] > most_gap * x:
        return math.nan
    return float(np.interp(x, xs[after - 1 : after + 1], values[after - 1 : after + 1]))


def reached_by_all(runs: Sequence[Run], column: str) -> float:
    """The most of a column that every run has spent, NaN if one of them does not say."""
    spent = [run.spent().get(column) for run in runs]
    return math.nan if any(values is None for values in spent) else float(min(values[-1] for values in spent))


# Over seeds


def over_seeds(group: Group, value: Callable[[Run], float]) -> Estimate:
    """Mean of a value over a group's runs with Student's 95% interval; runs without it are left out of the count."""
    values = np.array([value(run) for run in group.runs])
    values = values[np.isfinite(values)]
    return Estimate(t_interval(values), values.size)


def paired(first: Group, second: Group, value: Callable[[Run], float]) -> Estimate | None:
    """Mean over seeds of the second's value minus the first's with the same seed, which cancels what the seed decides.

    Args:
      first, second: groups.
      value: of a run.

    Returns:
      The estimate over the seeds that both have; None if a group has a seed twice, so that there are no pairs.
    """
    sides = []
    for group in (first, second):
        seeds = [run.config.get(SEED) for run in group.runs]
        if len(set(seeds)) < len(seeds):
            return None
        sides.append({seed: value(run) for seed, run in zip(seeds, group.runs, strict=True)})
    gaps = np.array([sides[1][seed] - sides[0][seed] for seed in sides[0] if seed in sides[1]])
    gaps = gaps[np.isfinite(gaps)]
    return Estimate(t_interval(gaps), gaps.size)


def band(group: Group, metric: str, column: str = "step") -> Band | None:
    """A group's curve: at each x that all its runs reach, their mean and Student's 95% interval, or all of two runs.

    Args:
      group: the runs; between its own points a run counts with the line that joins them.
      metric, column: as for `points`.

    Returns:
      The band; None where no run has both.
    """
    curves = [(x, y) for x, y in (points(run, metric, column) for run in group.runs) if x.size]
    if not curves:
        return None
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(grid >= low) & (grid <= high)]
    values = np.array([np.interp(grid, x, y) for x, y in curves])
    mean = values.mean(0)
    if len(curves) == 1:
        return Band(grid, mean, mean, mean, "one run")
    if len(curves) == 2:
        return Band(grid, mean, values.min(0), values.max(0), "both runs")
    ends = np.array([t_interval(column) for column in values.T]).reshape(-1, 3)
    return Band(grid, mean, ends[:, 1], ends[:, 2], f"95% interval over {len(curves)} seeds")


def comparable(groups: Sequence[Group], metric: str) -> bool:
    """Whether a held-out or training metric is the same quantity in all groups.

    A loss defines its loss and rewards, in units of its coefficients; another loss, or another option of one, also what
    it means by log-probabilities (ORPO's are per token, DPO's sums). Only accuracies are shares of the same pairs.
    """
    name = metric.removeprefix(HELD_OUT)
    runs = [run for group in groups for run in group.runs]
    fields = [field for field in differing(runs) if field.startswith("loss.")]
    if not fields or name in SHARES:
        return True
    coefficients = all(type(run.config.get(field)) in (int, float) for field in fields for run in runs)
    return coefficients and name not in OWN
