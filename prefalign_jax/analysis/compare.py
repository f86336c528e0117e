"""Runs compared over seeds: groups, means and paired differences with intervals, curves with bands, equal compute."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prefalign_jax.analysis.runs import Run, differing, settings
from prefalign_jax.intervals import Interval, t_interval
from prefalign_jax.options import did_you_mean
from prefalign_jax.types import UserError

SEED = "seed"
HELD_OUT = "eval/"
SAMPLES = "samples/"
LONGEST = 64  # characters of a group's label
LONG_VALUE = 32  # characters of a field and its value from which a path is shortened
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
    if by is None and all(run.overrides.keys() - {SEED} for run in runs):
        groups = _by_points(runs)
        if not any(mixed(group) for group in groups):  # as they are in two sweeps of the same fields of two configs
            return groups
    by = [name for name in differing(runs) if name != SEED] if by is None else list(by)
    parts: dict[str, list[Run]] = {}
    for run in runs:
        parts.setdefault(json.dumps([settings(run).get(name) for name in by]), []).append(run)
    fields = [dict(zip(by, json.loads(key), strict=True)) for key in parts]
    alone = str(runs[0].config.get("loss.name") or runs[0].name)
    labels = _labels(fields, alone)
    return [Group(*group, tuple(members)) for *group, members in zip(labels, fields, parts.values(), strict=True)]


def _by_points(runs: Sequence[Run]) -> list[Group]:
    """Groups of what points of a sweep override."""
    shown = dict.fromkeys(name for name in differing(runs) if name != SEED)
    parts: dict[str, list[Run]] = {}
    for run in runs:
        point = {name: value for name, value in run.overrides.items() if name != SEED}
        parts.setdefault(json.dumps(point), []).append(run)
    points = [json.loads(key) for key in parts]
    names = dict.fromkeys(name for point in points for name in point)
    # All of a sweep's own fields are in its labels, also one that here has a single value.
    labels = _whole([{name: _said(name, point.get(name)) for name in names} for point in points])
    return [
        Group(label, {name: members[0].config.get(name) for name in shown}, tuple(members))
        for label, members in zip(labels, parts.values(), strict=True)
    ]


def _labels(fields: Sequence[dict[str, Any]], alone: str) -> list[str]:
    """The loss's name, and as few other fields as tell the groups of one loss apart."""
    parts = []
    for one in fields:
        alike = [other for other in fields if other.get("loss.name") == one.get("loss.name")]
        names = ["loss.name", *_telling(alike)]
        parts.append({name: _said(name, one.get(name)) for name in names})
    return [label or (alone if len(fields) == 1 else "default") for label in _whole(parts)]


def _telling(fields: Sequence[dict[str, Any]]) -> list[str]:
    """Names of fields that tell these groups apart, each time the one that tells most apart, the loss's first."""
    rest = sorted(fields[0], key=lambda name: not name.startswith("loss."))
    names: list[str] = []

    def told_apart(names: Sequence[str]) -> int:
        return len({json.dumps([one.get(name) for name in names]) for one in fields})

    while rest and told_apart(names) < len(fields):
        names.append(max(rest, key=lambda name: told_apart([*names, name])))
        rest.remove(names[-1])
    return names


def _said(name: str, value: Any) -> str:
    """A field and its value; a config's argument and the loss's name show without the name of the field."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value)
    if name == "config":
        return text.partition("=")[2] or text
    return text if name == "loss.name" else f"{name.removeprefix('loss.')}={text}"


def _whole(parts: Sequence[Mapping[str, str]]) -> list[str]:
    """Labels of what is said of each group, cut to LONGEST characters; numbers tell those apart that are then equal."""
    shortened: list[dict[str, str]] = [{} for _ in parts]
    for name in dict.fromkeys(name for one in parts for name in one):
        for one, text in zip(shortened, _shortened([one.get(name, "") for one in parts]), strict=True):
            one[name] = text
    labels = [", ".join(filter(None, one.values())) for one in shortened]
    labels = [label if len(label) <= LONGEST else label[: LONGEST - 1] + "…" for label in labels]
    times = collections.Counter(labels)
    seen: collections.Counter[str] = collections.Counter()
    for number, label in enumerate(labels):
        if times[label] > 1:
            seen[label] += 1
            labels[number] = f"{label} ({seen[label]})"
    return labels


def _shortened(texts: Sequence[str]) -> list[str]:
    """Long paths by their last parts, as many of them as tell them apart.

    Example:
      >>> _shortened(["data.path=/a/long/way/to/the/files/odds.jsonl", "data.path=/a/long/way/to/the/files/ties.jsonl"])
      ['data.path=…/odds.jsonl', 'data.path=…/ties.jsonl']
    """
    if max(map(len, texts)) <= LONG_VALUE:
        return list(texts)

    def last(text: str, count: int) -> str:
        name, equals, value = text.partition("=")
        parts = value.split("/")
        return f"{name}=…/{'/'.join(parts[-count:])}" if equals and len(parts) > count else text

    counts = range(1, max(text.count("/") for text in texts) + 2)
    tries = ([last(text, count) for text in texts] for count in counts)
    return next(one for one in tries if len(set(one)) == len(set(texts)))


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
    it means by log-probabilities (ORPO's are per token, DPO's sums). Accuracies are shares of the same pairs, and
    what is measured on samples has nothing to do with the loss.
    """
    name = metric.removeprefix(HELD_OUT)
    runs = [run for group in groups for run in group.runs]
    if metric.startswith(SAMPLES):
        return not any(field.startswith("samples.") for field in differing(runs))
    fields = [field for field in differing(runs) if field.startswith("loss.")]
    if not fields or name in SHARES:
        return True
    coefficients = all(type(run.config.get(field)) in (int, float) for field in fields for run in runs)
    return coefficients and name not in OWN
