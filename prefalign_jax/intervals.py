"""Intervals of means, shares and differences, at 95% unless told otherwise; tests hold them to what they claim."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

CELLS = 2**22  # resampled values in memory at once
FEW = 20  # clusters, or prompts, below which what they do not show no resample can


class Interval(NamedTuple):
    """An estimate and the ends of its interval; NaN ends where there is too little to say."""

    mean: float
    low: float
    high: float


def wilson(share: float, size: float, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share of `size` trials: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).

    Args:
      share: p in [0, 1].
      size: n > 0.
      z: 1.96 for 95%.

    Returns:
      (low, high).

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.

    Example:
      >>> print("%.4f %.4f" % wilson(0.5, 100))
      0.4038 0.5962
    """
    middle = share + z * z / (2 * size)
    spread = z * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    scale = 1 + z * z / size
    return max((middle - spread) / scale, 0.0), min((middle + spread) / scale, 1.0)


def t_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Student's interval of the mean of a few independent values, such as one a seed: m -+ t_{n-1} s / sqrt(n).

    Args:
      values: [N]; it is exact for normal values, however few.
      level: the share of such intervals that hold the true mean.

    Returns:
      The interval; its ends are NaN for a single value, which says nothing of the spread.

    Example:
      >>> print("%.3f %.3f %.3f" % t_interval(np.array([1.0, 2.0, 3.0])))
      2.000 -0.484 4.484
    """
    values = np.asarray(values, np.float64)
    if not values.size:
        return Interval(math.nan, math.nan, math.nan)
    mean, count = float(values.mean()), values.size
    if count == 1:
        return Interval(mean, math.nan, math.nan)
    half = float(_student(count - 1, level) * values.std(ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def _student(freedom: int, level: float) -> float:
    """Half the width of Student's interval, in standard errors."""
    from scipy.special import stdtrit  # a tenth of a second, which nothing else here needs

    return float(stdtrit(freedom, (1 + level) / 2))


def bootstrap_mean(
    values: np.ndarray,
    weight: np.ndarray | None = None,
    *,
    clusters: np.ndarray | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Studentised bootstrap interval of a weighted mean over pairs: m - t*_{high} s, m - t*_{low} s.

    t* = (m* - m) / s* over resamples of the pairs, s the standard error sqrt(G/(G-1) sum_g e_g^2) / sum w with
    e_g = sum_{i in g} w_i (x_i - m). Percentiles of m* alone miss a skewed mean too often: with 50 exponential values
    their 95% interval covers about 91%, this one 95%. With fewer than 20 clusters, of which some resamples have no
    spread to speak of, it is Student's: m -+ t_{G-1} s. For a share take `share_interval`.

    Args:
      values: [N] one number a pair.
      weight: [N], at least 0; equal if None. Pairs of weight 0 are left out.
      clusters: [N] what is drawn together, such as the prompt of each pair: several samples of one prompt are not
        independent, and whole prompts are resampled.
      level: the share of such intervals that hold the true mean.
      resamples: how many.
      seed: of the resamples; the same seed, the same interval.

    Returns:
      The interval. Without spread (all values equal) it has no width; with fewer than two clusters its ends are NaN.

    Raises:
      ValueError: shapes differ, a value of positive weight is not finite, or no weight is positive.

    Source: Efron and Tibshirani (1993), An introduction to the bootstrap, section 12.5.

    Example:
      >>> print("%.1f %.1f %.1f" % bootstrap_mean(np.arange(100.0)))
      49.5 43.9 55.1
    """
    values = np.asarray(values, np.float64)
    weight = np.ones_like(values) if weight is None else np.asarray(weight, np.float64)
    groups = np.arange(values.size) if clusters is None else np.asarray(clusters)
    if not values.shape == weight.shape == groups.shape == (values.size,):
        raise ValueError(f"values {values.shape}, weight {weight.shape} and clusters {groups.shape} must be alike [N]")
    counts = weight > 0
    values, weight, groups = values[counts], weight[counts], groups[counts]
    if not values.size or not np.isfinite(values).all() or not np.isfinite(weight).all():
        raise ValueError("bootstrap_mean takes finite values, at least one of positive weight")
    total, mass = _by_cluster(values, weight, groups)
    mean, error = (float(x) for x in _ratio(total, mass))
    size = len(mass)
    if size < 2:
        return Interval(mean, math.nan, math.nan)
    if size < FEW:
        half = _student(size - 1, level) * error
        return Interval(mean, mean - half, mean + half)
    rng = np.random.default_rng(seed)
    parts = []
    for begin in range(0, resamples, rows := max(1, CELLS // size)):
        draw = rng.integers(0, size, (min(rows, resamples - begin), size))
        means, errors = _ratio(total[draw], mass[draw])
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append(np.where(means == mean, 0.0, (means - mean) / errors))
    # A resample without spread is infinitely far off. 'nearest' never interpolates between infinities.
    t_low, t_high = np.quantile(np.concatenate(parts), [(1 - level) / 2, (1 + level) / 2], method="nearest")
    if error == 0:
        return Interval(mean, mean, mean)
    low, high = mean - t_high * error, mean - t_low * error
    return Interval(
        mean, float(low if math.isfinite(low) else values.min()), float(high if math.isfinite(high) else values.max())
    )


def _by_cluster(
    values: np.ndarray, weight: np.ndarray | None, clusters: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """[G] weighted sums and weights of clusters, of the pairs that have weight: a mean is a ratio of their two sums."""
    weight = np.ones(np.shape(values)) if weight is None else np.asarray(weight, np.float64)
    counts = weight > 0
    groups = np.arange(weight.size) if clusters is None else np.asarray(clusters)
    _, member = np.unique(groups[counts], return_inverse=True)
    return np.bincount(member, (weight * values)[counts]), np.bincount(member, weight[counts])


def _ratio(total: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of totals over sum of masses along the last axis, and its standard error."""
    size = total.shape[-1]
    mean = total.sum(-1) / mass.sum(-1)
    squares = np.square(total - mean[..., None] * mass).sum(-1)
    return mean, np.sqrt(squares * size / max(size - 1, 1)) / mass.sum(-1)


def share_interval(
    values: np.ndarray, weight: np.ndarray | None = None, clusters: np.ndarray | None = None
) -> Interval:
    """Wilson's 95% interval of a weighted share m of pairs, with the number of independent pairs that it is worth.

    n = m (1 - m) / v with v = G/(G-1) sum_g (sum_{i in g} w_i (x_i - m))^2 / (sum w)^2 over G clusters, but at most
    Kish's (sum w)^2 / sum w^2 pairs. Where v or m (1 - m) is 0, or with fewer than 20 clusters, too few to show how far
    they agree within, n is Kish's number of clusters: 20 right out of 20 leave some doubt.

    Args:
      values: [N] 0 or 1.
      weight: [N], at least 0; equal if None. Pairs of weight 0 are left out.
      clusters: [N] what is not independent, such as the prompt of each pair; each pair its own if None.

    Example:
      >>> print("%.2f %.2f %.2f" % share_interval(np.ones(20)))
      1.00 0.84 1.00
    """
    values = np.asarray(values, np.float64)
    weight = np.ones_like(values) if weight is None else np.asarray(weight, np.float64)
    total, mass = _by_cluster(values, weight, clusters)
    share, error = _ratio(total, mass)
    spread = share * (1 - share)
    size = _kish(mass)
    if error > 1e-6 and spread > 1e-12 and mass.size >= FEW:
        size = min(spread / error**2, _kish(weight))
    return Interval(float(share), *(float(end) for end in wilson(float(share), float(size))))


def share_difference(
    first: np.ndarray, second: np.ndarray, weight: np.ndarray | None = None, clusters: np.ndarray | None = None
) -> Interval:
    """Agresti and Min's 95% interval of the difference of two weighted shares of the same pairs.

    Wald's interval after half a cluster of the mean weight is added to each of the four cells: both right, one right,
    the other right, none right. So shares that differ on no pair, or on one, leave as much doubt as there is.

    Args:
      first, second: [N] in [0, 1], on the same pairs, in the same order.
      weight: [N], at least 0; equal if None. Pairs of weight 0 are left out.
      clusters: [N] what is not independent, such as the prompt of each pair; each pair its own if None.

    Returns:
      The difference of the shares as they are, and the interval.

    Source: Agresti and Min (2005), Simple improved confidence intervals for comparing matched proportions.

    Example:
      >>> print("%.3f %.3f %.3f" % share_difference(np.ones(24), np.ones(24)))
      0.000 -0.075 0.075
    """
    total, mass = _by_cluster(np.subtract(first, second, dtype=np.float64), weight, clusters)
    mean, usual = float(total.sum() / mass.sum()), mass.mean()
    middle = total.sum() / (mass.sum() + 2 * usual)
    squares = np.square(total - middle * mass).sum() + usual**2 * (1 + 2 * middle**2)
    half = 1.96 * math.sqrt(squares) / (mass.sum() + 2 * usual)
    return Interval(mean, max(float(middle - half), -1.0), min(float(middle + half), 1.0))


def _kish(weight: np.ndarray) -> float:
    """How many equal weights say as much."""
    return float(weight.sum() ** 2 / np.square(weight).sum())


def bootstrap_difference(first: np.ndarray, second: np.ndarray, weight: np.ndarray | None = None, **how) -> Interval:
    """Interval of mean(first - second), measured on the same pairs; what the pairs have in common cancels.

    Args:
      first, second: [N] of two policies on the same pairs, in the same order.
      weight: [N].
      **how: clusters, level, resamples, seed of `bootstrap_mean`.

    Raises:
      ValueError: they are not of the same pairs.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a paired difference is of the same pairs, but there are {first.shape} and {second.shape}")
    return bootstrap_mean(first - second, weight, **how)
