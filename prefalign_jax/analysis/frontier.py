"""Reward against divergence: what each method buys, over strengths, seeds and the time of training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np

from prefalign_jax.analysis.runs import Run, find_runs
from prefalign_jax.files import read_json_lines
from prefalign_jax.generation.best_of_n import best_of_n, kl_bound
from prefalign_jax.intervals import Interval, t_interval
from prefalign_jax.pages.palette import look
from prefalign_jax.pages.pictures import styled
from prefalign_jax.tables import markdown
from prefalign_jax.types import UserError

REWARD, KL = "samples/reward", "samples/kl"
MARKERS = "osD^v<>P"
LIMITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # nats


class Point(NamedTuple):
    """One evaluation, its seeds together: `strength` tells the settings of a method apart, `seeds` says how many."""

    method: str
    strength: str
    step: int
    kl: float
    reward: float
    seeds: int


def points_of(runs: Sequence[Run]) -> list[Point]:
    """The evaluations of runs that measured samples, those of different seeds averaged.

    Args:
      runs: their `loss.name` is the method; what else of the loss differs is the strength.

    Raises:
      UserError: no run measured both reward and KL.
    """
    evaluations = defaultdict(list)
    for run in runs:
        loss = {key[5:]: value for key, value in run.config.items() if key.startswith("loss.") and value is not None}
        method = loss.pop("name", "?")
        strength = ", ".join(f"{key}={value}" for key, value in sorted(loss.items()))
        for row in run.held_out:
            if row.get(REWARD) is not None and row.get(KL) is not None:
                evaluations[method, strength, row["step"]].append((row[KL], row[REWARD]))
    if not evaluations:
        raise UserError("no run measured samples/reward and samples/kl; set samples.prompts and samples.reward")
    return [
        Point(method, strength, step, *np.mean(values, axis=0).tolist(), len(values))
        for (method, strength, step), values in evaluations.items()
    ]


def best_of_points(pairs: Path) -> list[tuple[int, float, float]]:
    """(n, KL bound, mean reward) of the best of n responses.

    Args:
      pairs: pairs.jsonl of the job `pairs`, with on_policy.pairing=all.
    """
    scores: dict[int, dict[str, float]] = defaultdict(dict)
    shape = {"prompt_number": "an integer", "chosen": "a string", "rejected": "a string"}
    shape |= {"score_chosen": "a number", "score_rejected": "a number"}
    for row in read_json_lines(pairs, shape):
        for side in ("chosen", "rejected"):
            scores[row["prompt_number"]][row[side]] = row[f"score_{side}"]
    if not scores:
        raise UserError(f"{pairs}: there is no pair; name the file that the job `pairs` wrote")
    most = max(len(known) for known in scores.values())
    whole = [list(known.values()) for known in scores.values() if len(known) == most]
    return [(n, kl_bound(n), float(np.mean([best_of_n(known, n) for known in whole]))) for n in range(1, most + 1)]


def best_within(runs: Sequence[Run], limits: Sequence[float]) -> dict[str, dict[Any, np.ndarray]]:
    """{method: {seed: [limits] best mean reward of its evaluations whose KL is at most each limit}}, NaN for none.

    The best of several noisy evaluations is above what the method would give again, the more the more there are.

    Args:
      runs: as for `points_of`.
      limits: in nats.
    """
    best: dict[str, dict[Any, np.ndarray]] = defaultdict(dict)
    for seed in dict.fromkeys(run.config.get("seed") for run in runs):
        same = [run for run in runs if run.config.get("seed") == seed]
        points = points_of(same) if any(row.get(REWARD) is not None for run in same for row in run.held_out) else []
        for method in dict.fromkeys(point.method for point in points):
            its = [point for point in points if point.method == method]
            values = [max((p.reward for p in its if p.kl <= x), default=np.nan) for x in limits]
            best[method][seed] = np.array(values)
    return dict(best)


def reward_within(runs: Sequence[Run], limits: Sequence[float], minus: str | None = None) -> dict[str, list[Interval]]:
    """`best_within` over seeds.

    Args:
      runs, limits: as there.
      minus: a method whose value with the same seed is taken off, which cancels what the seed decides; None for none.

    Returns:
      {method: [mean over seeds with Student's 95% interval at each limit]}, of the seeds that got there.
    """
    best = best_within(runs, limits)
    out = {}
    for method, by_seed in best.items():
        if method != minus:
            taken = best[minus] if minus else dict.fromkeys(by_seed, 0.0)
            columns = np.array([by_seed[seed] - taken[seed] for seed in by_seed if seed in taken]).T
            out[method] = [t_interval(column[np.isfinite(column)]) for column in columns]
    return out


@styled
def draw_frontier(points: Sequence[Point], best: Sequence[tuple[int, float, float]] = ()) -> matplotlib.figure.Figure:
    """Every evaluation as a dot, and for each method the best reward so far as KL grows."""
    figure = matplotlib.figure.Figure(figsize=(8.5, 5.5))
    axes = figure.add_subplot()
    methods = list(dict.fromkeys(point.method for point in points))
    for number, method in enumerate(methods):
        reached = sorted((p.kl, p.reward) for p in points if p.method == method)
        kl, reward = np.array(reached).T
        colour, style = look(number)
        axes.plot(kl, np.maximum.accumulate(reward), style, color=colour, alpha=0.8, lw=1.4, drawstyle="steps-post")
        axes.plot(kl, reward, MARKERS[number % len(MARKERS)], color=colour, ms=5, alpha=0.7, label=method)
    if best:
        axes.plot(
            [kl for _, kl, _ in best],
            [reward for *_, reward in best],
            "k*--",
            ms=9,
            label=f"best of 1 to {best[-1][0]} (KL bound)",
        )
    axes.set_xlabel("KL(policy || start), nats per response")
    axes.set_ylabel("mean true reward of samples")
    axes.legend()
    return figure


def report_frontier(directory: Path, pairs: Path | None = None) -> str:
    """Draws DIRECTORY/frontier.png.

    Args:
      directory: of a sweep whose runs have `samples`.
      pairs: pairs.jsonl of the job `pairs`, for the best of n.

    Returns:
      Tables of the best mean reward within each of LIMITS and of its differences to DPO, and what else there is to say.

    Raises:
      UserError: there is no run that measured reward and KL.
    """
    runs = find_runs([directory])
    points = points_of(runs)
    best = best_of_points(pairs) if pairs else []
    path = directory / "frontier.png"
    draw_frontier(points, best).savefig(path, dpi=120)
    tables = [_table("best mean reward at KL <=", reward_within(runs, LIMITS))]
    if "dpo" in {point.method for point in points}:
        tables.append(_table("minus dpo, paired by seed", reward_within(runs, LIMITS, minus="dpo"), sign="+"))
    bests = [f"best of {n}: reward {reward:.4f}, KL at most {kl:.3f}" for n, kl, reward in best]
    return "\n".join(
        ["\n\n".join(tables), *bests, f"{len(points)} evaluations of {max(p.seeds for p in points)} seeds; {path}"]
    )


def _table(title: str, values: Mapping[str, Sequence[Interval]], sign: str = "") -> str:
    rows = [
        [
            method,
            *(f"{mean:{sign}.4f}" + (f" [{low:.4f}, {high:.4f}]" if low == low else "") for mean, low, high in each),
        ]
        for method, each in values.items()
    ]
    return markdown([title, *(f"{limit:g}" for limit in LIMITS)], rows)
