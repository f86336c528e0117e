"""The baseline that trains nothing: draw n responses, give the best."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def best_of_n(scores: Sequence[float], n: int) -> float:
    """The mean score of the best of n responses, over all ways to take n of those at hand; unbiased.

    sum_i C(i - 1, n - 1) / C(N, n) * score_(i), scores in ascending order.

    Args:
      scores: of N independent responses to one prompt.
      n: 1 to N.

    Returns:
      The mean.

    Raises:
      ValueError: n is out of range.

    Example:
      >>> best_of_n([1.0, 2.0, 3.0], 1), best_of_n([3.0, 1.0, 2.0], 2), best_of_n([1.0, 2.0, 3.0], 3)
      (2.0, 2.6666666666666665, 3.0)
    """
    total = len(scores)
    if not 1 <= n <= total:
        raise ValueError(f"n={n} must lie in 1 to {total}, the number of scores")
    ways = math.comb(total, n)
    return float(sum(math.comb(i, n - 1) / ways * x for i, x in enumerate(np.sort(scores))))


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n, in nats: what KL(best of n || the policy) is at most, and is if no two scores are equal.

    Source: Beirami et al., arXiv 2401.01879, Theorem 1.

    Example:
      >>> kl_bound(1), round(kl_bound(4), 4)
      (0.0, 0.6363)
    """
    return math.log(n) - (n - 1) / n
