"""What of direct alignment matters: SFT first, comparing within a pair, or the strength; paired by seed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import numpy as np

from prefalign_jax.analysis.compare import value_at
from prefalign_jax.analysis.runs import Run, find_runs
from prefalign_jax.intervals import Interval, t_interval
from prefalign_jax.kept import load_kept
from prefalign_jax.library import logps
from prefalign_jax.load_data import load_pairs
from prefalign_jax.pages.palette import look
from prefalign_jax.pages.pictures import styled
from prefalign_jax.policy import load
from prefalign_jax.progress import Progress
from prefalign_jax.tables import markdown
from prefalign_jax.types import UserError

METRICS = ("samples/reward", "eval/rewards/accuracies")  # the first of these that the runs have is compared
MOST_GAP = 1.0  # of the cost: sampling is dear, so evaluations are few, and the curves between them are smooth
PAIRWISE = ("dpo", "ipo", "orpo", "simpo")


class Point(NamedTuple):
    """Runs of one method after one share of SFT at one strength."""

    method: str
    share: float
    strength: float


Values = dict[Point, dict[int, float]]  # point -> seed -> value


def point_of(run: Run) -> Point:
    """What a run of the sweep of experiments/papers/direct_alignment.py is.

    Raises:
      UserError: it is a point of another sweep.
    """
    words = dict(word.partition("=")[::2] for word in str(run.overrides.get("config", "")).split(","))
    strengths = [value for name, value in run.overrides.items() if name.startswith("loss.")]
    if not {"method", "share"} <= words.keys() or len(strengths) != 1:
        raise UserError(f"{run.path} is no point of experiments/papers/direct_alignment.py")
    return Point(words["method"], float(words["share"]), float(strengths[0]))


def values_of(runs: Sequence[Run], metric: str, flops: Mapping[float, float] | None = None) -> Values:
    """The metric of each run at its end, or where all have cost the same.

    Args:
      runs: of the sweep.
      metric: a column of eval.jsonl.
      flops: what SFT on each share cost. A run is then read where it and the SFT before it cost what the cheapest run
        without SFT does in all; None reads every run at its end.

    Returns:
      The values; NaN where a run was not evaluated near that cost.
    """
    out: Values = defaultdict(dict)
    budget = None
    if flops is not None:
        whole = [run.spent()["flops"][-1] for run in runs if not point_of(run).share]
        budget = min(whole, default=np.nan)
    for run in runs:
        point = point_of(run)
        if budget is None:
            value = next((row[metric] for row in reversed(run.held_out) if row.get(metric) is not None), np.nan)
        else:
            left = min(budget - flops.get(point.share, 0.0), run.spent()["flops"][-1])
            value = value_at(run, metric, "flops", left, most_gap=MOST_GAP)
        out[point][run.config["seed"]] = float(value)
    return dict(out)


def values_since(runs: Sequence[Run], start: str) -> dict[str, Values]:
    """Share of held-out pairs whose chosen response has gained more since a model than the rejected one, for each run.

    mean of [g_w > g_l], g = log pi(y) - log start(y), summed over a response or its mean per token

    These are the same scales for all methods, whose own accuracies are of two: those with a reference compare summed
    log-ratios to it, and those without compare the policy's log-probabilities per token.

    Args:
      runs: of the sweep, on the same held-out pairs; their last checkpoints are read.
      start: the model, a directory or a hub name.

    Returns:
      {scale: the values}.
    """
    out: dict[str, Values] = {"summed": defaultdict(dict), "per token": defaultdict(dict)}
    began, pairs = load(start), None
    with Progress(len(runs), "run") as progress:
        for done, run in enumerate(runs, 1):
            kept = load_kept(run.path)
            if pairs is None:
                pairs = load_pairs(kept.experiment, kept.tokenizer).held_out
                before = logps(began, pairs)
            now = logps(began._replace(params=kept.params), pairs)
            chosen, rejected = now.chosen - before.chosen, now.rejected - before.rejected
            shares = (chosen > rejected, chosen / now.chosen_tokens > rejected / now.rejected_tokens)
            for values, share in zip(out.values(), shares, strict=True):
                values[point_of(run)][run.config["seed"]] = float(np.mean(share))
            progress.update(done)
    return out


def at_best(values: Values, method: str, share: float) -> dict[int, float]:
    """{seed: value} of a method at its best strength, chosen for each seed by the other seeds alone.

    So the choice does not profit from the noise of the value that is then reported.
    """
    strengths = {point: seeds for point, seeds in values.items() if (point.method, point.share) == (method, share)}
    out = {}
    for seed in dict.fromkeys(seed for seeds in strengths.values() for seed in seeds):
        others = {
            point: np.mean([value for other, value in seeds.items() if other != seed] or [seeds.get(seed, np.nan)])
            for point, seeds in strengths.items()
            if seed in seeds
        }
        out[seed] = strengths[max(others, key=others.get)][seed]
    return out


def _difference(first: Mapping[int, float], second: Mapping[int, float]) -> Interval:
    gaps = np.array([second[seed] - first[seed] for seed in first if seed in second])
    return t_interval(gaps[np.isfinite(gaps)])


def _mean(several: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """{seed: mean over methods}, of the seeds that all have."""
    seeds = set.intersection(*(set(one) for one in several)) if several else set()
    return {seed: float(np.mean([one[seed] for one in several])) for seed in sorted(seeds)}


def _spread(several: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """{seed: standard deviation over methods}."""
    seeds = set.intersection(*(set(one) for one in several)) if several else set()
    return {seed: float(np.std([one[seed] for one in several], ddof=1)) for seed in sorted(seeds)}


def said(name: str, gap: Interval, digits: int = 4) -> str:
    """A difference in words: whether its interval lies on one side of zero.

    Example:
      >>> said("SFT first", Interval(0.02, 0.01, 0.03))
      'SFT first: +0.0200 [0.0100, 0.0300]; the seeds tell it from zero.'
    """
    if math.isnan(gap.mean):
        return f"{name}: no seed has both."
    verdict = "the seeds tell it from zero" if gap.low > 0 or gap.high < 0 else "the seeds do not tell it from zero"
    return f"{name}: {gap.mean:+.{digits}f} [{gap.low:.{digits}f}, {gap.high:.{digits}f}]; {verdict}."


def answers(values: Values) -> list[str]:
    """The questions of the comparison, each with its paired difference over seeds.

    Args:
      values: from `values_of`, at share 0 and 1 for all methods.
    """
    methods = list(dict.fromkeys(point.method for point in values))
    best = {(method, share): at_best(values, method, share) for method in methods for share in (0.0, 1.0)}
    out = [
        said(f"SFT first, {method}", _difference(best[method, 0.0], best[method, 1.0]))
        for method in methods
        if best[method, 0.0] and best[method, 1.0]
    ]
    one, two = (_mean([best[method, share] for method in methods]) for share in (0.0, 1.0))
    out.append(said("SFT first, mean over methods", _difference(one, two)))
    for share, words in ((0.0, "in one stage"), (1.0, "after SFT")):
        pairwise = _mean([best[method, share] for method in methods if method in PAIRWISE])
        pointwise = _mean([best[method, share] for method in methods if method not in PAIRWISE])
        out.append(said(f"Pairwise minus pointwise, {words}, means over methods", _difference(pointwise, pairwise)))
        middle = [sorted(point for point in values if point[:2] == (method, share)) for method in methods]
        common = [values[points[len(points) // 2]] for points in middle if points]
        own = [best[method, share] for method in methods]
        gap = _difference(_spread(common), _spread(own))
        out.append(said(f"Spread between methods, {words}: at each one's best strength minus at the middle one", gap))
    return out


def table_of(values: Values) -> str:
    """Mean over seeds with Student's 95% interval, of each method after each share of SFT, at its best strength."""
    methods, shares = (sorted({point[at] for point in values}, key=str) for at in (0, 1))
    rows = []
    for method in sorted(methods, key=lambda name: (name not in PAIRWISE, name)):
        cells = []
        for share in shares:
            mean, low, high = t_interval(np.array([*at_best(values, method, share).values()]))
            cells.append(f"{mean:.4f} [{low:.4f}, {high:.4f}]" if mean == mean else "")
        rows.append([method, "pairwise" if method in PAIRWISE else "pointwise", *cells])
    return markdown(["method", "", *(f"SFT on {share:.0%}" for share in shares)], rows)


@styled
def draw(values: Values, metric: str) -> matplotlib.figure.Figure:
    """The same as a picture: a curve over the share of SFT for each method, dashed for those that are pointwise."""
    figure = matplotlib.figure.Figure(figsize=(8.5, 5.5))
    axes = figure.add_subplot()
    shares = sorted({point.share for point in values})
    for number, method in enumerate(dict.fromkeys(point.method for point in values)):
        places = [at for at, share in enumerate(shares) if at_best(values, method, share)]
        intervals = [t_interval(np.array([*at_best(values, method, shares[at]).values()])) for at in places]
        mean, low, high = np.array(intervals).T
        at = np.array(places) + (number - 3.5) * 0.05  # side by side, so that no bar hides another
        colour, _ = look(number)
        style = "o-" if method in PAIRWISE else "s--"
        axes.errorbar(at, mean, [mean - low, high - mean], fmt=style, color=colour, label=method, lw=1.2, capsize=2)
    axes.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
    axes.set_xlabel("share of the pairs whose chosen responses are trained on first")
    axes.set_ylabel(f"{metric}, mean over seeds")
    axes.legend(ncols=2)
    return figure


def report_direct_alignment(directory: Path, sft: Path | None = None, since: str | None = None) -> str:
    """Draws DIRECTORY/direct_alignment.png.

    Args:
      directory: --workdir of the sweep of experiments/papers/direct_alignment.py.
      sft: directory of the runs of SFT, named by their shares; for the comparison at equal compute.
      since: a model; the runs are then compared by `values_since`, at their ends.

    Returns:
      A table and the answers, in Markdown.

    Raises:
      UserError: a run is of another sweep, none measured one of METRICS, or both `sft` and `since` are given.
    """
    if sft is not None and since is not None:
        raise UserError("--since reads runs at their ends, and --sft on their way: give one of the two")
    runs = find_runs([directory])
    if since is not None:
        several = {f"gained since {Path(since).name}, {scale}": v for scale, v in values_since(runs, since).items()}
    else:
        metric = next((name for name in METRICS if any(name in row for run in runs for row in run.held_out)), None)
        if metric is None:
            raise UserError(f"{directory}: no run measured {' or '.join(METRICS)}")
        several = {metric: values_of(runs, metric)}
    parts = []
    for metric, values in several.items():
        parts += [f"{metric} at the end, of each method at its best strength", table_of(values), *answers(values), ""]
    metric, values = next(iter(several.items()))
    draw(values, metric).savefig(directory / "direct_alignment.png", dpi=120)
    if sft is not None:
        cost = {float(run.path.name): float(run.spent()["flops"][-1]) for run in find_runs([sft])}
        equal = values_of(runs, metric, {0.0: 0.0, **cost})
        parts += [
            "The same at equal compute, that of the cheapest run without SFT",
            table_of(equal),
            *answers(equal),
            "",
        ]
    seeds = max(len(by_seed) for by_seed in values.values())
    return "\n".join([*parts, f"{len(runs)} runs, {seeds} seeds; {directory / 'direct_alignment.png'}"])
