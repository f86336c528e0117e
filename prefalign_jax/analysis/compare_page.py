"""One page of an ablation: tables and curves over seeds, in a self-contained HTML file with its pictures beside it."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import matplotlib.ticker

from prefalign_jax import tables
from prefalign_jax.analysis import quantities
from prefalign_jax.analysis.compare import (
    HELD_OUT,
    MAX_GAP,
    SAMPLES,
    SEED,
    Band,
    Estimate,
    Group,
    band,
    comparable,
    final,
    group_runs,
    mixed,
    over_seeds,
    paired,
    reached_by_all,
    value_at,
)
from prefalign_jax.analysis.runs import Run, differing
from prefalign_jax.analysis.signs import SIGNS, signs_of
from prefalign_jax.files import write_bytes
from prefalign_jax.options import did_you_mean
from prefalign_jax.pages.charts import SCRIPTS, Curve, Panel, chart_data, notice
from prefalign_jax.pages.frame import render
from prefalign_jax.pages.palette import INK, look
from prefalign_jax.pages.pictures import png, styled
from prefalign_jax.tables import Cell, Table
from prefalign_jax.types import UserError

# In the order of the page; what else was measured comes after.
FIRST = [f"eval/{name}" for name in ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")]
TRAINING = ("loss", "rewards/accuracies", "grad_norm")  # curves beside the held-out ones
COLUMNS = {
    "step": "steps",
    "flops": "FLOPs of matrix products",
    "seconds": "seconds of training",
    "tokens": "tokens",
    "trained_tokens": "trained tokens",
    "pairs": "pairs",
}
COMPUTE = ("flops", "trained_tokens", "seconds")
MOST_COLUMNS = 5  # of groups in a table with fewer metrics
MOST_PAIRS = 6  # of groups compared each with each; more are compared with the first


class Gaps(NamedTuple):
    """Differences between groups: the table, the group that all are compared with, and what is in no table.

    Attributes:
      against: empty where each is compared with each.
      incomparable: metrics that losses or settings define each for themselves.
      lone: metrics that one group alone measured.
      accuracies: whether losses with rewards of their own are compared by them.
    """

    table: Table
    against: str
    incomparable: list[str]
    lone: list[str]
    accuracies: bool


class Equal(NamedTuple):
    """What was measured at one amount of a measure of compute; no table where all runs end there."""

    reached: str
    ends: str
    table: Table | None


def write_page(
    runs: Sequence[Run],
    path: Path,
    *,
    title: str,
    group_by: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> list[Path]:
    """Writes the page of some runs, and its pictures as .png files in PAGE_pictures/ beside it.

    Args:
      runs: from `runs.find_runs`; one makes a page of its curves and last values.
      path: of the .html file.
      title: of the page.
      group_by: config fields; None takes all that differ but for the seed.
      metrics: columns of eval.jsonl and metrics.jsonl; None takes all that were held out.
      columns: measures of compute; None takes those of COMPUTE that the runs have.

    Returns:
      What was written, the page first.

    Raises:
      UserError: an unknown field, metric or column, or no run to report on.
    """
    finished = [run for run in runs if run.finished]
    if not finished:
        raise UserError(f"{title}: none of {len(runs)} run(s) is finished; the same command goes on with them")
    groups = group_runs(finished, group_by)
    notes = _notes(runs, groups)
    metrics = _metrics(finished, metrics)
    columns = _columns(finished, columns, notes)
    one = len(finished) == 1
    signs = [[(run.name, signs_of(run)) for run in group.runs] for group in groups]
    shown_signs = [(name, shown) for some in signs for name, shown in some if shown]
    sections = {"signs": "Worth a look"} if shown_signs else {}
    sections |= {"final": "Last values"}
    if len(groups) > 1:
        sections |= {"differences": "Differences, paired by seed", "compute": "At equal compute"}
    sections |= {"curves": "Curves", "runs": "Runs and configs"}
    used = ["step", *([] if one else columns)]
    panels, drawn = _curves(groups, metrics, [name for name in TRAINING if name not in metrics], used)

    seeds = sorted({run.config[SEED] for run in finished if SEED in run.config})
    lead = f"{_count(len(finished), 'run')}, {_count(len(groups), 'group')}, {'seed' if len(seeds) == 1 else 'seeds'} "
    page = render(
        "analysis/compare_page.html",
        title=title,
        lead=lead + (", ".join(map(str, seeds)) or "unknown"),
        sections=sections,
        notes=notes,
        one=one,
        signs=shown_signs,
        counted=None if one else _counted(groups, signs),
        final=_last(finished[0], metrics) if one else _finals(groups, metrics),
        gaps=_differences(groups, metrics) if len(groups) > 1 else None,
        max_gap=f"{MAX_GAP:.0%}",
        equal=_equal(groups, metrics, columns) if len(groups) > 1 else [],
        scripts=SCRIPTS,
        curves=chart_data(
            [group.label if len(groups) > 1 else "" for group in groups],
            {column: COLUMNS.get(column, column) for column in used},
            panels,
        ),
        notice=notice(),
        runs=_runs(groups),
        configs=[(run.name, _config(run)) for group in groups for run in group.runs],
    )
    beside = path.with_name(f"{path.stem}_pictures")
    pictures = [(beside / f"{_slug(name)}-{column}.png", draw_metric(groups, name, column)) for name, column in drawn]
    written = {path: page.encode(), **{file: png(figure) for file, figure in pictures}}
    for file, content in written.items():
        write_bytes(file, content)
    return [*written]


def _notes(runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    """What a reader has to know before the figures."""
    notes, finished = [], [run for run in runs if run.finished]
    if left_out := [run for run in runs if not run.finished]:
        said = [f"{run.name} (step {run.train[-1]['step'] if run.train else 0} of {_steps(run)})" for run in left_out]
        notes.append(f"{len(left_out)} of {len(runs)} runs are unfinished and in no table or curve: {', '.join(said)}.")
    for group in groups:
        if others := mixed(group):
            notes.append(f"Runs of {group.label} also differ in {', '.join(others)}: their interval is not over seeds.")
    alone = [group.label for group in groups if len(group.runs) == 1]
    if alone and len(finished) > 1:
        what = f"{alone[0]} has" if len(alone) == 1 else f"{len(alone)} of {len(groups)} groups have"
        names = "" if len(alone) in (1, len(groups)) else f" ({'; '.join(alone)})"
        notes.append(f"{what} one run: there is no interval over seeds{names}.")
    if not any(run.held_out for run in finished):
        notes.append("No run has held-out data: the last logged training step stands in, which is one noisy batch.")
    return notes


def _curves(
    groups: Sequence[Group], metrics: Sequence[str], training: Sequence[str], columns: Sequence[str]
) -> tuple[list[Panel], list[tuple[str, str]]]:
    """The charts, and (metric, column) of all that are not empty; training metrics are drawn by step alone."""
    panels, drawn = [], []
    runs = [run for group in groups for run in group.runs]
    for name in (*metrics, *training):
        bands = [
            [band(group, name, column) if column == "step" or name in metrics else None for group in groups]
            for column in columns
        ]
        there = [(name, column) for column, some in zip(columns, bands, strict=True) if any(some)]
        if there:
            curves = [[one and _curve(one) for one in some] if any(some) else None for some in bands]
            captions = [_kinds([one for one in some if one]) for some in bands]
            about = quantities.marks(name, runs)
            panels.append(
                Panel(_title(name), quantities.unit_of(name, runs), about, name.startswith(HELD_OUT), curves, captions)
            )
            drawn += there
    return panels, drawn


def _curve(curve: Band) -> Curve:
    return Curve(curve.x, curve.mean) if curve.kind == "one run" else Curve(curve.x, curve.mean, curve.low, curve.high)


def _title(metric: str) -> str:
    side = "held out" if metric.startswith(HELD_OUT) else "samples" if metric.startswith(SAMPLES) else "training"
    return f"{metric.removeprefix(HELD_OUT).removeprefix(SAMPLES)}, {side}"


def markdown(runs: Sequence[Run], group_by: Sequence[str] | None = None, metrics: Sequence[str] | None = None) -> str:
    """Last values, and their differences from the first group's paired by seed, as tables in Markdown.

    Args:
      runs, group_by, metrics: as in `write_page`; unfinished runs are left out.

    Returns:
      Means over seeds with Student's 95% intervals, a row a group; the second table only where there are seeds to pair.

    Raises:
      UserError: as there.
    """
    finished = [run for run in runs if run.finished]
    groups, metrics = group_runs(finished, group_by), _metrics(finished, metrics)

    def cell(estimate: Estimate | None, sign: bool = False) -> str:
        if estimate is None or not estimate.seeds:
            return ""
        mean, low, high = estimate.interval
        if not math.isfinite(low) or high == low:
            return _number(mean, sign)
        decimals = _decimals((high - low) / 2)
        return f"{_fixed(mean, decimals, sign)} [{_fixed(low, decimals)}, {_fixed(high, decimals)}]"

    rows = [
        [f"{group.label} ({_count(len(group.runs), 'seed')})"]
        + [cell(over_seeds(group, _final_of(name))) for name in metrics]
        for group in groups
    ]
    out = [tables.markdown(["", *metrics], rows)]
    usable = [name for name in metrics if comparable(groups, name)]
    if len(groups) > 1 and usable and all(len(group.runs) > 1 for group in groups):
        first, *others = groups
        rows = [
            [group.label, *(cell(paired(first, group, _final_of(name)), sign=True) for name in usable)]
            for group in others
        ]
        out.append(tables.markdown([f"minus {first.label}", *usable], rows))
    return "\n\n".join(out)


def _metrics(runs: Sequence[Run], asked: Sequence[str] | None) -> list[str]:
    """The metrics of the tables."""
    held_out = dict.fromkeys(name for run in runs for row in run.held_out for name in row if name != "step")
    held_out = [name for name in held_out if not name.endswith(("_low", "_high"))]
    training = dict.fromkeys(name for run in runs for row in run.train for name in row if name != "step")
    if not asked:
        ordered = [name for name in FIRST if name in held_out] + [name for name in held_out if name not in FIRST]
        return ordered or [name for name in TRAINING if name in training]
    for name in asked:
        if name not in (known := [*held_out, *training]):
            raise UserError(f"--metrics: no run has {name!r}; {did_you_mean(name, known)}there are {', '.join(known)}")
    return list(asked)


def _columns(runs: Sequence[Run], asked: Sequence[str] | None, notes: list[str]) -> list[str]:
    """The measures of compute that all runs have; says which of the usual ones are missing."""
    spent = [run.spent().keys() for run in runs]
    known = [name for name in spent[0] if name != "step" and all(name in keys for keys in spent)]
    for name in asked or ():
        if name not in known:
            raise UserError(
                f"--x: not every run says its {name!r}; {did_you_mean(name, known)}all say {', '.join(known)}"
            )
    if not asked and "flops" not in known:
        notes.append("Not all runs count their operations: equal compute is by trained tokens and by seconds.")
    return list(asked or [name for name in COMPUTE if name in known])


# Tables


def _counted(groups: Sequence[Group], signs: Sequence[Sequence[tuple[str, Mapping[str, str]]]]) -> Table:
    """How many runs of each group show each sign; `signs` are (name, signs) of the runs of each group."""
    rows = [
        [name, *(f"{n} of {len(some)}" if (n := sum(name in shown for _, shown in some)) else "" for some in signs)]
        for name in SIGNS
        if any(name in shown for some in signs for _, shown in some)
    ]
    return _narrow(Table("Runs that show a sign", ["sign", *(group.label for group in groups)], rows))


def _finals(groups: Sequence[Group], metrics: Sequence[str]) -> Table:
    rows = [[name, *(_cell(over_seeds(group, _final_of(name))) for group in groups)] for name in metrics]
    return _narrow(Table("Last values", ["metric", *(group.label for group in groups)], rows))


def _narrow(table: Table) -> Table:
    """Turned, so that groups are its rows, where there are more than MOST_COLUMNS of them and more than metrics."""
    if len(table.head) - 1 <= max(len(table.rows), MOST_COLUMNS):
        return table
    first, *others = zip(table.head, *table.rows, strict=True)
    return Table(table.title, ["group", *first[1:]], others)


def _last(run: Run, metrics: Sequence[str]) -> Table:
    rows = []
    for name in metrics:
        first, last = ([row.get(name) for row in run.held_out] or [None])[0], final(run, name)
        low, high = (final(run, name + end) for end in ("_low", "_high"))
        wide = f"[{_fixed(low, 3)}, {_fixed(high, 3)}]" if math.isfinite(low) else ""
        rows.append([name, _number(first) if first is not None else "", _number(last), wide])
    return Table("Last values", ["metric", "first", "last", "95% over held-out pairs"], rows)


def _differences(groups: Sequence[Group], metrics: Sequence[str]) -> Gaps:
    couples, against = list(itertools.combinations(groups, 2)), ""
    if len(couples) > MOST_PAIRS:
        couples, against = [(groups[0], group) for group in groups[1:]], groups[0].label
    usable = [name for name in metrics if comparable(groups, name)]
    lone = [name for name in usable if sum(over_seeds(group, _final_of(name)).seeds > 0 for group in groups) < 2]
    usable = [name for name in usable if name not in lone]
    rows = [
        [name, *(_cell(paired(first, second, _final_of(name)), sign=True) for first, second in couples)]
        for name in usable
    ]
    several = len({group.fields.get("loss.name") for group in groups}) > 1
    head = ["metric", *(f"{second.label} − {first.label}" for first, second in couples)]
    return Gaps(
        _narrow(Table("Differences", head, rows)),
        against,
        [name for name in metrics if name not in usable and name not in lone],
        lone,
        "eval/rewards/accuracies" in usable and several,
    )


def _final_of(name: str) -> Callable[[Run], float]:
    return lambda run: final(run, name)


def _value_at(name: str, column: str, x: float) -> Callable[[Run], float]:
    return lambda run: value_at(run, name, column, x)


def _equal(groups: Sequence[Group], metrics: Sequence[str], columns: Sequence[str]) -> list[Equal]:
    runs = [run for group in groups for run in group.runs]
    head = ["metric", *(group.label for group in groups)]
    head += [f"{groups[1].label} − {groups[0].label}"] * (len(groups) == 2)
    out, usable = [], [name for name in metrics if comparable(groups, name)]
    for column in ("step", *columns) if usable else ():
        x = reached_by_all(runs, column)
        ends = [float(run.spent()[column][-1]) for run in runs]
        reached = f"{_number(x)} {COLUMNS.get(column, column)}"
        if min(ends) == max(ends):
            out.append(Equal(reached, "", None))
            continue
        rows = []
        for name in usable:
            value = _value_at(name, column, x)
            cells = [_cell(over_seeds(group, value)) for group in groups]
            if len(groups) == 2:
                cells.append(_cell(paired(*groups, value), sign=True))
            rows.append([name, *cells])
        end = f"runs end between {_number(min(ends))} and {_number(max(ends))}"
        out.append(Equal(reached, end, _narrow(Table(reached, head, rows))))
    return out


def _runs(groups: Sequence[Group]) -> Table:
    runs = [(group, run) for group in groups for run in group.runs]
    fields = differing([run for _, run in runs])
    measures = [name for name in COLUMNS if any(name in run.spent() for _, run in runs)]
    rows = []
    for group, run in runs:
        spent = run.spent()
        cells = [group.label, *(_plain(run.config.get(name)) for name in fields)]
        cells += [_number(float(spent[name][-1])) if name in spent else "" for name in measures]
        rows.append([run.name, *cells])
    return Table("Runs", ["run", "group", *fields, *measures], rows)


def _config(run: Run) -> str:
    return "\n".join(f"{name}: {_plain(value)}" for name, value in run.config.items()) or "no config.json"


def _cell(estimate: Estimate | None, sign: bool = False) -> Cell:
    """A mean, its interval and its seeds, with as many decimals as the interval warrants."""
    if estimate is None:
        return Cell("", "a seed twice")
    (mean, low, high), seeds = estimate
    if not seeds:
        return Cell("")
    if not math.isfinite(low):
        return Cell(_number(mean, sign), f"n = {seeds}")
    if high == low:  # no spread in a few values is no certainty
        return Cell(_number(mean, sign), f"n = {seeds}, all equal")
    decimals = _decimals((high - low) / 2)
    wide = f"[{_fixed(low, decimals)}, {_fixed(high, decimals)}] n = {seeds}"
    return Cell(_fixed(mean, decimals, sign), wide, strong=sign and not low <= 0 <= high)


def _decimals(half: float) -> int:
    """Decimals that show two digits of a half-width."""
    return min(6, max(0, 1 - math.floor(math.log10(half))))


def _fixed(value: float, decimals: int, sign: bool = False) -> str:
    return f"{value:{'+' if sign else ''},.{decimals}f}".replace("-", "−")


def _number(value: float, sign: bool = False) -> str:
    text = f"{value:{'+' if sign else ''},.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:{'+' if sign else ''}.4g}"
    return re.sub(r"e\+?(-?)0*(\d+)$", r"e\1\2", text).replace("-", "−")


def _plain(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _steps(run: Run) -> str:
    return str(run.config.get("steps", "?"))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name)


# Pictures


@styled
def draw_metric(groups: Sequence[Group], metric: str, column: str = "step") -> matplotlib.figure.Figure:
    """A metric's curves against a measure of what was spent, a band around the mean of each group, the key beside."""
    beside = 0.6 + 0.06 * max(len(group.label) for group in groups) if len(groups) > 1 else 0.0
    figure = matplotlib.figure.Figure(figsize=(4.6 + beside, max(2.9, 0.4 + 0.17 * len(groups))))
    axes = figure.add_subplot()
    for number, group in enumerate(groups):
        curve = band(group, metric, column)
        if curve is None:
            continue
        colour, style = look(number)
        marker = "o" if metric.startswith(HELD_OUT) and len(curve.x) <= 40 else None
        # A label that begins with an underscore would be left out of the key.
        axes.plot(curve.x, curve.mean, style, color=colour, lw=1.4, marker=marker, ms=3, label=" " + group.label)
        if curve.kind != "one run":
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, lw=0)
    runs = [run for group in groups for run in group.runs]
    for value, label in quantities.marks(metric, runs):
        axes.axhline(value, color=INK, lw=0.8, ls=":", alpha=0.8)
        axes.annotate(label, (1, value), (0, 2), ("axes fraction", "data"), "offset points", ha="right", fontsize=7)
    axes.set_title(_title(metric))
    axes.set_xlabel(COLUMNS.get(column, column))
    axes.set_ylabel(quantities.unit_of(metric, runs))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    if axes.get_xlim()[1] < 1e7:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    if len(groups) > 1:
        figure.legend(loc="outside right upper")
    return figure


def _kinds(curves: Sequence[Band]) -> str:
    """What the bands of a chart are."""
    kinds = dict.fromkeys(curve.kind for curve in curves)
    if kinds.keys() <= {"one run"}:
        return "one run: no band" if len(curves) < 2 else "one run each: no band"
    return "band: " + "; ".join(kinds)
