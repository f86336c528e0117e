"""Judges measured on benchmarks: how often each is right, with intervals, by subset, and in both orders."""

from __future__ import annotations

import collections
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefalign_jax.files import locked, write_json, write_text
from prefalign_jax.intervals import FEW, Interval, share_difference, share_interval
from prefalign_jax.judges.benchmarks import OVERALLS, RULES, Questions, read_questions
from prefalign_jax.judges.judge import Verdict
from prefalign_jax.judges.kinds import deal_options, make_judge
from prefalign_jax.pages.frame import render
from prefalign_jax.processes import note
from prefalign_jax.tables import Cell, Table, aligned
from prefalign_jax.types import UserError


class Score(NamedTuple):
    """How often a judge is right on a benchmark, or on a part of it.

    Attributes:
      accuracy: with its 95% interval, whole prompts taken as independent; None without a verdict that counts.
      change: accuracy minus that of the first judge on the pairs that both judged; None for the first itself, and on
        fewer than FEW prompts.
      pairs: how many count.
      prompts: how many different ones those have.
      ties: verdicts that prefer neither response, whatever they are worth.
      lost: pairs without a verdict, by reason; they count nowhere else.
      consistent: share of the verdicts that are the same in both orders; None for judges that see no order.
      orders: share that is right when the better response is shown first, and when it is second, a tie half.
    """

    accuracy: Interval | None
    change: Interval | None
    pairs: int
    prompts: int
    ties: int
    lost: dict[str, int]
    consistent: float | None
    orders: tuple[float, float] | None


class Measured(NamedTuple):
    """A benchmark, and of each judge the score on the whole and on each subset."""

    questions: Questions
    whole: dict[str, Score]
    subsets: dict[str, dict[str, Score]]


def measure(questions: Questions, verdicts: Mapping[str, Sequence[Verdict]]) -> Measured:
    """Scores of several judges on one benchmark.

    Args:
      questions: what was asked.
      verdicts: of each judge, in the order of the comparisons.

    Returns:
      The scores. The whole weighs the subsets as the benchmark does, so that an interval is of its own number.
    """
    subsets = np.array(questions.subsets, object)
    keys = [json.dumps(comparison.prompt, sort_keys=True) for comparison in questions.comparisons]
    _, prompts = np.unique(np.array(keys, object).astype(str), return_inverse=True)
    worth = {judge: _worth(questions, said) for judge, said in verdicts.items()}
    first = next(iter(worth.values()))

    def score(judge: str, part: np.ndarray) -> Score:
        values, said = worth[judge][part], [v for v, inside in zip(verdicts[judge], part, strict=True) if inside]
        counts, both = ~np.isnan(values), ~np.isnan(values) & ~np.isnan(first[part])
        weight, other = _weights(questions, subsets[part], counts), _weights(questions, subsets[part], both)
        asked = [verdict.orders for verdict in said if verdict.orders is not None]
        change = None
        if worth[judge] is not first and len(np.unique(prompts[part][both])) >= FEW:
            change = share_difference(values[both], first[part][both], other[both], prompts[part][both])
        return Score(
            share_interval(values[counts], weight[counts], prompts[part][counts]) if counts.any() else None,
            change,
            int(counts.sum()),
            len(np.unique(prompts[part][counts])),
            sum(verdict.preference == 0.5 for verdict in said),
            dict(collections.Counter(verdict.reason for verdict in said if verdict.preference is None)),
            float(np.mean([one == two for one, two in asked])) if asked else None,
            tuple(np.mean(asked, axis=0).tolist()) if asked else None,
        )

    names = sorted(set(questions.subsets))
    return Measured(
        questions,
        {judge: score(judge, np.ones(len(subsets), bool)) for judge in worth},
        {name: {judge: score(judge, subsets == name) for judge in worth} for name in names},
    )


def _worth(questions: Questions, verdicts: Sequence[Verdict]) -> np.ndarray:
    """[N] what each verdict counts by the benchmark's rule, NaN where it is left out or lost."""
    rule = RULES[questions.benchmark.rule]
    return np.array([np.nan if v.preference is None else rule.worth(v) for v in verdicts], np.float64)


def _weights(questions: Questions, subsets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[N] weights under which a mean over the pairs that count is the benchmark's mean over its subsets."""
    sizes = collections.Counter(subsets[counts].tolist())
    shares = OVERALLS[questions.benchmark.overall][0](sizes)
    return np.array([shares[name] / sizes[name] if sizes[name] else 0.0 for name in subsets.tolist()], np.float64)


def bench_judges(
    data: Sequence[str | Path],
    judges: Sequence[str],
    out: Path,
    *,
    options: Sequence[str] = (),
    limit: int | None = None,
) -> str:
    """Judges benchmarks, and writes judge_bench.json and judge_bench.html.

    Finished scores and replies are kept in `out`, so that a run that was stopped goes on.

    Args:
      data: files, or directories of files.
      judges: KIND:WHAT each, see `kinds.make_judge`; options of that judge alone may follow, a space before each.
      out: directory for the files.
      options: NAME=VALUE, for every judge that has it.
      limit: at most so many pairs of a benchmark, spread evenly over it.

    Returns:
      The tables of the result.

    Raises:
      UserError: a file cannot be read, a judge is unknown, no judge has an option, or another process writes to `out`.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit={limit} must be at least 1")
    made = _judges(judges, options)
    benchmarks = read_questions(data, limit)
    for questions in benchmarks:
        for unread in questions.unread[:3]:
            note(f"left out: {unread}")
    comparisons = [comparison for questions in benchmarks for comparison in questions.comparisons]
    keys = [json.dumps(comparison._replace(id=""), sort_keys=True) for comparison in comparisons]
    distinct = dict(zip(keys, comparisons, strict=True))
    verdicts: dict[str, dict[str, Verdict]] = {}
    with locked(out, "--out"):
        for number, (name, (spec, given)) in enumerate(made.items(), 1):
            note(f"judge {number} of {len(made)}: {name}, {len(distinct):,} pairs")
            said = make_judge(spec, given, out)(list(distinct.values()))
            verdicts[name] = dict(zip(distinct, said, strict=True))
        results, at = [], 0
        for questions in benchmarks:
            part = keys[at : at + len(questions.comparisons)]
            at += len(part)
            results.append(measure(questions, {name: [said[key] for key in part] for name, said in verdicts.items()}))
        about = {name: {"judge": spec, "options": given} for name, (spec, given) in made.items()}
        record = {"judges": about, "limit": limit, "benchmarks": [plain(result) for result in results]}
        write_json(out / "judge_bench.json", record)
        title = f"{len(made)} judges on {len(results)} benchmarks"
        write_text(out / "judge_bench.html", page(title, results, about))
    return "\n\n".join(map(as_text, results))


def _judges(words: Sequence[str], options: Sequence[str]) -> dict[str, tuple[str, list[str]]]:
    """{a short name: (what makes the judge, its options)}."""
    try:
        split = [shlex.split(word) for word in words]
    except ValueError as error:
        raise UserError(f"--judge: {error}; put quotes around a path with a space") from None
    specs = [parts[0] if parts else "" for parts in split]
    for spec in specs:
        if spec.startswith("human:"):
            raise UserError(f"--judge={spec}: a person's verdicts are of other pairs; write another kind of judge")
    dealt = deal_options(specs, options, ("--judge", "--option"))
    for spec, (_, *own) in zip(specs, split, strict=True):
        deal_options([spec], own, ("--judge", "--judge"))  # before the first judge begins
    made = [(spec, [*given, *parts[1:]]) for spec, given, parts in zip(specs, dealt, split, strict=True)]
    short = [" ".join([_short(spec), *parts[1:]]) for spec, parts in zip(specs, split, strict=True)]
    whole = [" ".join(parts) for parts in split]
    names = [one if short.count(one) == 1 else word for one, word in zip(short, whole, strict=True)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--judge={twice[0]}: given twice; write each judge once")
    return dict(zip(names, made, strict=True))


def _short(spec: str) -> str:
    """A judge with the last part alone of each of its paths.

    Example:
      >>> _short("dpo:runs/a/export,models/base"), _short("endpoint:https://HOST/v1")
      ('dpo:export,base', 'endpoint:https://HOST/v1')
    """
    kind, colon, what = spec.partition(":")
    if "://" in what:
        return spec
    return kind + colon + ",".join(Path(part).name or part for part in what.split(","))


# The result for people and for programs


def shown(interval: Interval | None, sign: str = "") -> str:
    """An interval in a table.

    Example:
      >>> shown(Interval(0.5, 0.25, 0.75)), shown(Interval(0.1, -0.2, 0.3), "+"), shown(None)
      ('0.500 [0.250, 0.750]', '+0.100 [-0.200, +0.300]', '-')
    """
    if interval is None:
        return "-"
    mean, low, high = (f"{x:{sign}.3f}" for x in interval)
    return f"{mean} [{low}, {high}]"


def share(value: float | None) -> str:
    """A share in a table."""
    return "-" if value is None else f"{value:.3f}"


def heading(result: Measured) -> str:
    """What was asked, in a line."""
    questions = result.questions
    dropped = ", ".join(f"{count} {reason}" for reason, count in questions.dropped.items())
    prompts = len({json.dumps(comparison.prompt, sort_keys=True) for comparison in questions.comparisons})
    asked = f"{len(questions.comparisons):,} pairs of {prompts:,} prompts"
    return f"{questions.benchmark.title}: {asked}" + (f"; left out: {dropped}" if dropped else "")


def counted(result: Measured) -> str:
    """How the benchmark counts, in words."""
    benchmark = result.questions.benchmark
    return f"Rule: {RULES[benchmark.rule].words}. The whole: {OVERALLS[benchmark.overall][1]}."


def summary(result: Measured) -> Table:
    """A row for each judge, its score on the whole; without the columns that say nothing of any judge."""
    head = ("judge", "accuracy", "minus the first judge's", "consistent", "better shown first / second", "ties", "lost")
    rows = [
        (
            judge,
            shown(score.accuracy),
            shown(score.change, "+"),
            share(score.consistent),
            " / ".join(map(share, score.orders)) if score.orders else "-",
            score.ties,
            ", ".join(f"{count} {reason}" for reason, count in score.lost.items()) or "-",
        )
        for judge, score in result.whole.items()
    ]
    kept = [i for i in range(len(head)) if any(row[i] != "-" for row in rows)]
    return Table("", [head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def as_text(result: Measured) -> str:
    """The table of a benchmark for a terminal."""
    table = summary(result)
    return f"{heading(result)}\n{counted(result)}\n{aligned(table.head, table.rows)}"


def page(title: str, results: Sequence[Measured], judges: Mapping[str, Mapping[str, Any]]) -> str:
    """A page with all judges on all benchmarks, and each benchmark by subset; it loads nothing from elsewhere.

    Args:
      title: of the page.
      results: of each benchmark.
      judges: {name: {'judge': what makes it, 'options': what it is given}}.
    """

    def cell(score: Score) -> Cell:
        if score.accuracy is None:
            return Cell("-")
        mean, low, high = score.accuracy
        return Cell(f"{mean:.3f}", f"{low:.3f} to {high:.3f}", strong=not low <= 0.5 <= high)

    names = list(judges)
    whole = [(result.questions.benchmark.title, *(cell(result.whole[name]) for name in names)) for result in results]
    parts = []
    for result in results:
        rows = [
            (name, len([x for x in result.questions.subsets if x == name]), *(cell(scores[judge]) for judge in names))
            for name, scores in result.subsets.items()
        ]
        by_subset = Table("By subset", ("subset", "pairs", *names), rows) if len(rows) > 1 else None
        source = result.questions.benchmark.source
        unread = result.questions.unread
        parts.append((heading(result), counted(result), source, summary(result), by_subset, unread))
    specs = [(name, " ".join([about["judge"], *about["options"]])) for name, about in judges.items()]
    head = Table("Accuracy", ("benchmark", *names), whole)
    return render("judges/bench.html", title=title, head=head, parts=parts, specs=specs)


def plain(result: Measured) -> dict[str, Any]:
    """A benchmark's scores as JSON values."""

    def score(one: Score) -> dict[str, Any]:
        return {
            name: value._asdict() if isinstance(value, Interval) else value for name, value in one._asdict().items()
        }

    questions = result.questions
    return {
        "name": questions.name,
        "title": questions.benchmark.title,
        "rule": questions.benchmark.rule,
        "overall": questions.benchmark.overall,
        "pairs": len(questions.comparisons),
        "dropped": dict(questions.dropped),
        "unread": questions.unread,
        "judges": {judge: score(one) for judge, one in result.whole.items()},
        "subsets": {
            name: {judge: score(one) for judge, one in scores.items()} for name, scores in result.subsets.items()
        },
    }
