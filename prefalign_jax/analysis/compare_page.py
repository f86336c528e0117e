"""One page of an ablation: tables and curves over seeds, in a self-contained HTML file with its pictures beside it."""

from __future__ import annotations

import html
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
import matplotlib.figure
import matplotlib.ticker

from prefalign_jax import tables
from prefalign_jax.analysis.compare import (
    HELD_OUT,
    MAX_GAP,
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
from prefalign_jax.files import whole
from prefalign_jax.options import did_you_mean
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
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's: told apart by all
STYLES = ("-", "--", "-.", ":")
INK = "#1e2227"  # of text and axes in pictures; on the page the page's own colour takes its place
MOST_PAIRS = 6  # of groups compared each with each; more are compared with the first

_STYLE = """
:root { color-scheme: light dark; --ink: #1e2227; --soft: #5d6670; --line: #d9dde2; --page: #fff; --card: #f5f6f8;
  --link: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e5e9; --soft: #9aa3ad; --line: #363c44; --page: #15181c;
  --card: #1d2126; --link: #7db4ee; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink);
  background: var(--page); margin: 0 auto; padding: 2rem 1.25rem 5rem; max-width: 76rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { max-width: 46rem; margin: .4rem 0 .8rem; } .soft, caption, figcaption { color: var(--soft); font-size: .875rem; }
a { color: var(--link); } nav { margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
ul.notes { max-width: 46rem; padding-left: 1.1rem; } ul.notes li { margin: .25rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .3rem 0 .6rem; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .32rem .9rem .32rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th:first-child, td:first-child { text-align: left; } td.text, th.text { text-align: left; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
tbody th { font-weight: 500; }
td small { color: var(--soft); font-size: .8rem; display: block; line-height: 1.3; } .apart { font-weight: 700; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .6rem; background: var(--card); border-radius: 8px; }
figure svg { width: 100%; height: auto; display: block; } figcaption { padding: .2rem .3rem 0; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .6rem 0; font-size: .9rem; }
.key svg { width: 2rem; height: .7rem; vertical-align: middle; margin-right: .4rem; }
details { margin: .3rem 0; } summary { cursor: pointer; }
pre { background: var(--card); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto; font-size: .8rem; }
@media print { nav, details { display: none; } figure { break-inside: avoid; } }
"""


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
    notes = []
    whole = [run for run in runs if run.finished]
    if left_out := [run for run in runs if not run.finished]:
        said = [f"{run.name} (step {run.train[-1]['step'] if run.train else 0} of {_steps(run)})" for run in left_out]
        notes.append(f"{len(left_out)} of {len(runs)} runs are unfinished and in no table or curve: {', '.join(said)}.")
    if not whole:
        raise UserError(f"{title}: none of {len(runs)} run(s) is finished; the same command goes on with them")
    groups = group_runs(whole, group_by)
    metrics = _metrics(whole, metrics)
    columns = _columns(whole, columns, notes)
    one = len(whole) == 1
    for group in groups:
        if others := mixed(group):
            notes.append(f"Runs of {group.label} also differ in {', '.join(others)}: their interval is not over seeds.")
        if len(group.runs) == 1 and not one:
            notes.append(f"{group.label} has one run: there is no interval over seeds.")
    if not any(run.held_out for run in whole):
        notes.append("No run has held-out data: the last logged training step stands in, which is one noisy batch.")

    pictures: dict[str, matplotlib.figure.Figure] = {}
    sections = []
    if one:
        sections.append(("final", "Last values", _last(whole[0], metrics)))
    else:
        sections.append(("final", "Last values", _finals(groups, metrics)))
        if len(groups) > 1:
            sections.append(("differences", "Differences, paired by seed", _differences(groups, metrics)))
            sections.append(("compute", "At equal compute", _equal(groups, metrics, columns)))
    shown = [*metrics, *(name for name in TRAINING if name not in metrics)]
    shown = [name for name in shown if any(band(group, name) for group in groups)]
    for column in ("step", *([] if one else columns)):
        part = shown if column == "step" else metrics
        figures = {name: draw(groups, name, column) for name in part if any(band(g, name, column) for g in groups)}
        pictures |= {f"{_slug(name)}-{column}": figure for name, figure in figures.items()}
        panels = ""
        for name, figure in figures.items():
            caption = f"<figcaption>{_kinds(groups, name, column)}</figcaption>"
            panels += f"<figure>{svg(figure, f'{name} by {column}')}{caption}</figure>"
        key = _key(groups) if len(groups) > 1 else ""
        sections.append(
            (
                f"curves-{column}",
                f"Curves by {COLUMNS.get(column, column)}",
                key + f'<div class="panels">{panels}</div>',
            )
        )
    sections.append(("runs", "Runs and configs", _runs(groups)))

    seeds = sorted({run.config[SEED] for run in whole if SEED in run.config})
    lead = f"{_count(len(whole), 'run')}, {_count(len(groups), 'group')}, {'seed' if len(seeds) == 1 else 'seeds'} "
    lead += ", ".join(map(str, seeds)) or "unknown"
    body = f"<h1>{_esc(title)}</h1><p class='soft'>{_esc(lead)}</p>"
    body += "<nav>" + "".join(f'<a href="#{key}">{_esc(name)}</a>' for key, name, _ in sections) + "</nav>"
    if notes:
        body += '<ul class="notes">' + "".join(f"<li>{_esc(note)}</li>" for note in notes) + "</ul>"
    body += "".join(f'<h2 id="{key}">{_esc(name)}</h2>{text}' for key, name, text in sections)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_esc(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )
    beside = path.with_name(f"{path.stem}_pictures")
    return [_put(path, page.encode()), *(_put(beside / f"{name}.png", png(it)) for name, it in pictures.items())]


def markdown(runs: Sequence[Run], group_by: Sequence[str] | None = None, metrics: Sequence[str] | None = None) -> str:
    """Last values, and their differences from the first group's paired by seed, as tables in Markdown.

    Args:
      runs, group_by, metrics: as in `write_page`; unfinished runs are left out.

    Returns:
      Means over seeds with Student's 95% intervals, a row a group; the second table only where there are seeds to pair.

    Raises:
      UserError: as there.
    """
    whole = [run for run in runs if run.finished]
    groups, metrics = group_runs(whole, group_by), _metrics(whole, metrics)

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


def _finals(groups: Sequence[Group], metrics: Sequence[str]) -> str:
    rows = []
    for name in metrics:
        estimates = (over_seeds(group, _final_of(name)) for group in groups)
        rows.append([f"<th>{_esc(name)}</th>", *map(_cell, estimates)])
    text = _table(["metric", *(group.label for group in groups)], rows)
    return text + (
        "<p class='soft'>Mean over seeds at each run's last step, with Student's 95% interval of the mean in brackets "
        "and the number of seeds. It takes the seeds' values for normal. With two seeds it is wide: it says what two "
        "values can.</p>"
    )


def _last(run: Run, metrics: Sequence[str]) -> str:
    rows = []
    for name in metrics:
        first, last = ([row.get(name) for row in run.held_out] or [None])[0], final(run, name)
        low, high = (final(run, name + end) for end in ("_low", "_high"))
        wide = f"[{_fixed(low, 3)}, {_fixed(high, 3)}]" if math.isfinite(low) else ""
        before = _number(first) if first is not None else ""
        rows.append([f"<th>{_esc(name)}</th>", *(f"<td>{cell}</td>" for cell in (before, _number(last), wide))])
    text = _table(["metric", "first", "last", "95% over held-out pairs"], rows)
    return text + "<p class='soft'>One run: nothing here says how much another seed would change.</p>"


def _differences(groups: Sequence[Group], metrics: Sequence[str]) -> str:
    couples = list(itertools.combinations(groups, 2))
    note = ""
    if len(couples) > MOST_PAIRS:
        couples = [(groups[0], group) for group in groups[1:]]
        note = f" Each group is compared with {_esc(groups[0].label)}, the first."
    usable = [name for name in metrics if comparable(groups, name)]
    lone = [name for name in usable if sum(over_seeds(group, _final_of(name)).seeds > 0 for group in groups) < 2]
    usable = [name for name in usable if name not in lone]
    rows = []
    for name in usable:
        estimates = (paired(first, second, _final_of(name)) for first, second in couples)
        rows.append([f"<th>{_esc(name)}</th>", *(_cell(estimate, sign=True) for estimate in estimates)])
    text = _table(["metric", *(f"{second.label} − {first.label}" for first, second in couples)], rows)
    text += (
        "<p class='soft'>Mean over seeds of the difference between runs of the same seed, with Student's 95% interval; "
        f"bold where it leaves out 0.{note} One such interval in twenty leaves out 0 by chance: "
        "they are not corrected for being many.</p>"
    )
    if left := [name for name in metrics if name not in usable and name not in lone]:
        text += (
            f"<p class='soft'>Not compared: {_esc(', '.join(left))}. Losses and settings define these each for "
            "themselves, in other units or as a sum here and a mean there, so their difference says nothing. To "
            "compare on one quantity, measure the models with scripts/evaluate.py.</p>"
        )
    if "eval/rewards/accuracies" in usable and len({group.fields.get("loss.name") for group in groups}) > 1:
        text += (
            "<p class='soft'>An accuracy is the share of pairs that a loss's own reward ranks right: relative to the "
            "reference where it has one.</p>"
        )
    if lone:
        text += f"<p class='soft'>Measured in one group only: {_esc(', '.join(lone))}.</p>"
    return text


def _final_of(name: str) -> Callable[[Run], float]:
    return lambda run: final(run, name)


def _equal(groups: Sequence[Group], metrics: Sequence[str], columns: Sequence[str]) -> str:
    runs = [run for group in groups for run in group.runs]
    usable = [name for name in metrics if comparable(groups, name)]
    text = (
        "<p>Each run where it had spent what every run reached; between two of its evaluations on the line that joins "
        f"them, and empty where these are more than {MAX_GAP:.0%} of it apart (a smaller eval_steps fills it).</p>"
    )
    for column in ("step", *columns):
        x = reached_by_all(runs, column)
        spread = [float(run.spent()[column][-1]) for run in runs]
        if min(spread) == max(spread):
            text += f"<p>All runs end at {_number(x)} {_esc(COLUMNS.get(column, column))}: see the last values.</p>"
            continue
        rows = []
        for name in usable:

            def value(run: Run, name=name, column=column, x=x) -> float:
                return value_at(run, name, column, x)

            cells = [_cell(over_seeds(group, value)) for group in groups]
            if len(groups) == 2:
                cells.append(_cell(paired(*groups, value), sign=True))
            rows.append([f"<th>{_esc(name)}</th>", *cells])
        head = ["metric", *(group.label for group in groups)]
        head += [f"{groups[1].label} − {groups[0].label}"] * (len(groups) == 2)
        reached = f"{_number(x)} {COLUMNS.get(column, column)}"
        end = f"runs end between {_number(min(spread))} and {_number(max(spread))}"
        text += f"<h3>At {_esc(reached)}</h3>" + _table(head, rows, end)
    return text


def _runs(groups: Sequence[Group]) -> str:
    runs = [(group, run) for group in groups for run in group.runs]
    fields = differing([run for _, run in runs])
    spent = [name for name in COLUMNS if any(name in run.spent() for _, run in runs)]
    rows, blocks = [], ""
    for group, run in runs:
        of = run.spent()
        cells = [f"<td class='text'>{_esc(group.label)}</td>"]
        cells += [f"<td class='text'>{_esc(_plain(run.config.get(name)))}</td>" for name in fields]
        cells += [f"<td>{_number(float(of[name][-1])) if name in of else ''}</td>" for name in spent]
        rows.append([f"<th>{_esc(run.name)}</th>", *cells])
        config = "\n".join(f"{name}: {_plain(value)}" for name, value in run.config.items()) or "no config.json"
        blocks += f"<details><summary>{_esc(run.name)}: whole config</summary><pre>{_esc(config)}</pre></details>"
    head = ["run", "group", *fields, *spent]
    text = _table(head, rows, "Config fields that differ between runs, and what each run spent", 2 + len(fields))
    return text + blocks


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", texts: int = 1) -> str:
    """A table of cells that are HTML already; the first `texts` columns are text, the others numbers."""
    top = "".join(f"<th{' class=text' if number < texts else ''}>{_esc(name)}</th>" for number, name in enumerate(head))
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    said = f"<caption>{_esc(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{said}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(estimate: Estimate | None, sign: bool = False) -> str:
    """A mean, its interval and its seeds, with as many decimals as the interval warrants."""
    if estimate is None:
        return "<td><small>a seed twice</small></td>"
    (mean, low, high), seeds = estimate
    if not seeds:
        return "<td></td>"
    if not math.isfinite(low):
        return f"<td>{_number(mean, sign)}<small>n = {seeds}</small></td>"
    if high == low:  # no spread in a few values is no certainty
        return f"<td>{_number(mean, sign)}<small>n = {seeds}, all equal</small></td>"
    decimals = _decimals((high - low) / 2)
    apart = " class='apart'" if sign and not low <= 0 <= high else ""
    wide = f"[{_fixed(low, decimals)}, {_fixed(high, decimals)}]"
    return f"<td{apart}>{_fixed(mean, decimals, sign)}<small>{wide} n = {seeds}</small></td>"


def _decimals(half: float) -> int:
    """Decimals that show two digits of a half-width."""
    return min(6, max(0, 1 - math.floor(math.log10(half))))


def _fixed(value: float, decimals: int, sign: bool = False) -> str:
    return f"{value:{'+' if sign else ''},.{decimals}f}".replace("-", "−")


def _number(value: float, sign: bool = False) -> str:
    text = f"{value:{'+' if sign else ''},.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:{'+' if sign else ''}.4g}"
    return re.sub(r"e\+?(-?)0*(\d+)$", r"e\1\2", text).replace("-", "−")


def _plain(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _esc(text: object) -> str:
    return html.escape(str(text), quote=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _steps(run: Run) -> str:
    return str(run.config.get("steps", "?"))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name)


# Pictures


def draw(groups: Sequence[Group], metric: str, column: str = "step") -> matplotlib.figure.Figure:
    """A metric's curves against a measure of what was spent, a band around the mean of each group."""
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9, "axes.edgecolor": INK, "text.color": INK}):
        figure = matplotlib.figure.Figure(figsize=(4.4, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for number, group in enumerate(groups):
            of = band(group, metric, column)
            if of is None:
                continue
            colour, style = _look(number)
            marker = "o" if metric.startswith(HELD_OUT) and len(of.x) <= 40 else None
            # A label that begins with an underscore would be left out of the key.
            axes.plot(of.x, of.mean, style, color=colour, lw=1.4, marker=marker, ms=3, label=" " + group.label)
            if of.kind != "one run":
                axes.fill_between(of.x, of.low, of.high, color=colour, alpha=0.2, lw=0)
        side, name = (
            ("held out", metric.removeprefix(HELD_OUT)) if metric.startswith(HELD_OUT) else ("training", metric)
        )
        axes.set_title(f"{name}, {side}", fontsize=10, loc="left")
        axes.set_xlabel(COLUMNS.get(column, column))
        axes.tick_params(colors=INK)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
        axes.xaxis.label.set_color(INK)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(groups) > 1:
            axes.legend(fontsize=7.5, frameon=False)
    return figure


def _look(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]


def _kinds(groups: Sequence[Group], metric: str, column: str) -> str:
    """What the bands of a picture are."""
    bands: list[Band] = [of for group in groups if (of := band(group, metric, column))]
    kinds = dict.fromkeys(of.kind for of in bands)
    return _esc("band: " + "; ".join(kinds)) if kinds.keys() != {"one run"} else "one run each: no band"


def _key(groups: Sequence[Group]) -> str:
    dashes = {"-": "", "--": "6 3", "-.": "6 3 1 3", ":": "2 3"}
    items = []
    for number, group in enumerate(groups):
        colour, style = _look(number)
        stroke = f'stroke="{colour}" stroke-width="3" stroke-dasharray="{dashes[style]}"'
        line = f'<line x1="0" y1="5" x2="32" y2="5" {stroke}/>'
        items.append(f'<span><svg viewBox="0 0 32 10" aria-hidden="true">{line}</svg>{_esc(group.label)}</span>')
    return f'<div class="key">{"".join(items)}</div>'


def svg(figure: matplotlib.figure.Figure, label: str) -> str:
    """A figure as an SVG element on no ground, its ink the page's own colour."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{_esc(label)}"', 1)


def png(figure: matplotlib.figure.Figure) -> bytes:
    """A figure as a PNG file on white."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def _put(path: Path, content: bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    return path
