"""Verdicts -> how often the first model wins, with intervals over prompts, and as if lengths were equal."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from prefalign_jax.intervals import Interval, share_interval
from prefalign_jax.judges.judge import Verdict
from prefalign_jax.tables import aligned

Z = 1.96  # 95% of a normal distribution lies within -Z and Z
RIDGE = 0.01  # weight of the penalty that keeps the length regression finite


class WinRate(NamedTuple):
    """What the verdicts of one judge say of two models.

    Attributes:
      rate: mean preference for the first, ties as half, None without a verdict.
      length_controlled: the same, as if responses were equally long; None where their lengths say nothing.
      wins, ties, losses: verdicts above, at and below 0.5.
      lost: how many verdicts were lost for each reason; they enter nothing else.
      prompts: number of different prompts, the units of the intervals.
      mean_length: mean number of characters of (first, second).
      inconsistent: of the comparisons asked in both orders, the share whose two verdicts differ; None if none was.
      shown_first: in those, the mean preference for the response that stands first: 0.5 without position bias.
    """

    rate: Interval | None
    length_controlled: Interval | None
    wins: int
    ties: int
    losses: int
    lost: dict[str, int]
    prompts: int
    mean_length: tuple[float, float] | None
    inconsistent: float | None
    shown_first: float | None


def win_rate(verdicts: Sequence[Verdict]) -> WinRate:
    """Counts, the win rate and the length-controlled win rate, with 95% intervals clustered by prompt.

    The win rate's interval is `intervals.share_interval`, so the verdicts of one prompt are not taken for independent,
    and 20 wins out of 20 leave some doubt.

    Args:
      verdicts: of one judge, or of a person.

    Returns:
      The `WinRate`.
    """
    lost = collections.Counter(verdict.reason for verdict in verdicts if verdict.preference is None)
    kept = [verdict for verdict in verdicts if verdict.preference is not None]
    asked = [verdict.orders for verdict in kept if verdict.orders is not None]
    preferences = np.array([verdict.preference for verdict in kept], np.float64)
    names = [json.dumps(verdict.comparison.prompt, sort_keys=True) for verdict in kept]
    _, clusters = np.unique(np.array(names, object).astype(str), return_inverse=True) if names else (None, np.zeros(0))
    lengths = np.array([list(map(len, v.comparison.texts)) for v in kept], np.float64).reshape(-1, 2)
    return WinRate(
        rate=share_interval(preferences, clusters=clusters) if kept else None,
        length_controlled=length_controlled(preferences, lengths[:, 0] - lengths[:, 1], clusters) if kept else None,
        wins=int((preferences > 0.5).sum()),
        ties=int((preferences == 0.5).sum()),
        losses=int((preferences < 0.5).sum()),
        lost=dict(lost),
        prompts=len(set(names)),
        mean_length=tuple(lengths.mean(0).tolist()) if kept else None,
        inconsistent=float(np.mean([one != other for one, other in asked])) if asked else None,
        shown_first=float(np.mean([(one + 1 - other) / 2 for one, other in asked])) if asked else None,
    )


def length_controlled(preferences: np.ndarray, longer: np.ndarray, clusters: np.ndarray) -> Interval | None:
    """sigmoid(t) of the regression preference ~ sigmoid(t + f tanh(d / s)): the win rate at d = 0, equal lengths.

    d is the difference in characters and s its standard deviation. (t, f) minimise the cross-entropy, summed over the
    comparisons, plus RIDGE/2 (t^2 + f^2). The interval is sigmoid(t -+ 1.96 e) with e from the sandwich
    H^-1 (G/(G-1) sum_g u_g u_g') H^-1, H the Hessian and u_g the gradient of the comparisons of one prompt.

    AlpacaEval 2 has a third term, the difficulty of each of its 805 instructions, fitted on many models; it
    penalises by L1 with a cross-validated weight; and it adds comparisons with a terse and a verbose version of its
    baseline. None of that exists for other prompts, so its leaderboard's numbers differ from these.

    Args:
      preferences: [n] in [0, 1].
      longer: [n] characters of the first response minus those of the second.
      clusters: [n] number of the prompt of each.

    Returns:
      (rate, low, high), or None where it is not defined: all differences in length, or all preferences, are the same.

    Source: Dubois et al., arXiv 2404.04475, section 3.
    """
    if len(preferences) < 3 or np.ptp(longer) == 0 or np.ptp(preferences) == 0:
        return None
    inputs = np.stack([np.ones(len(longer)), np.tanh(longer / longer.std(ddof=1))], axis=1)
    weights, hessian = fit_logistic(inputs, preferences)
    residuals = _sigmoid(inputs @ weights) - preferences
    bread = np.linalg.inv(hessian)
    error = math.sqrt((bread @ _clustered(inputs * residuals[:, None], clusters) @ bread)[0, 0])
    return Interval(*(float(_sigmoid(weights[0] + z * error)) for z in (0.0, -Z, Z)))


def fit_logistic(inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method for sum_i cross-entropy(y_i, sigmoid(x_i w)) + RIDGE/2 |w|^2, each step halved until it descends.

    Args:
      inputs: [n, k].
      targets: [n] in [0, 1].

    Returns:
      (weights [k], Hessian [k, k] there).
    """

    def objective(weights: np.ndarray) -> float:
        logits = inputs @ weights
        return float((np.logaddexp(0, logits) - targets * logits).sum() + RIDGE / 2 * weights @ weights)

    weights = np.zeros(inputs.shape[1])
    while True:
        p = _sigmoid(inputs @ weights)
        hessian = inputs.T @ (inputs * (p * (1 - p))[:, None]) + RIDGE * np.eye(len(weights))
        step = np.linalg.solve(hessian, inputs.T @ (p - targets) + RIDGE * weights)
        before = objective(weights)
        while np.abs(step).max() > 1e-9 and objective(weights - step) > before:
            step = step / 2
        weights = weights - step
        if np.abs(step).max() <= 1e-9:
            return weights, hessian


def _clustered(scores: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """[k, k] G/(G-1) sum_g u_g u_g' of the sums u_g of scores [n, k] over each cluster."""
    _, numbers = np.unique(clusters, return_inverse=True)
    sums = np.zeros((numbers.max() + 1, scores.shape[1]))
    np.add.at(sums, numbers, scores)
    return sums.T @ sums * len(sums) / max(len(sums) - 1, 1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def plain(result: WinRate) -> dict[str, Any]:
    """The record as JSON values."""
    return {name: value._asdict() if isinstance(value, Interval) else value for name, value in result._asdict().items()}


def table(result: WinRate, first: str, second: str, judge: str) -> str:
    """The win rate in a few aligned lines, for a person."""

    def shown(rate: Interval | None) -> str:
        return "-" if rate is None else f"{rate.mean:.3f} [{rate.low:.3f}, {rate.high:.3f}]"

    rows = [
        (f"{first} against {second}", judge),
        ("win rate, ties as half (95% interval)", shown(result.rate)),
        ("length-controlled win rate", shown(result.length_controlled)),
        ("wins, ties, losses", f"{result.wins}, {result.ties}, {result.losses} on {result.prompts} prompts"),
    ]
    if result.mean_length:
        rows.append(("mean length in characters", "{:.0f} against {:.0f}".format(*result.mean_length)))
    if result.inconsistent is not None:
        rows.append(("verdicts that change with the order", f"{result.inconsistent:.3f}"))
        rows.append(("preference for the answer shown first", f"{result.shown_first:.3f}"))
    rows += [(f"lost: {reason}", count) for reason, count in result.lost.items()]
    return aligned((), rows)
