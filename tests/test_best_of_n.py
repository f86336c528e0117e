"""The best of n: an unbiased mean, and a divergence that a table confirms."""

import itertools

import numpy as np
import pytest

from prefalign_jax.generation.best_of_n import best_of_n, kl_bound


def test_it_is_the_mean_over_all_subsets():
    scores = np.random.default_rng(0).normal(size=7).round(1)
    for n in range(1, 8):
        subsets = [max(subset) for subset in itertools.combinations(scores, n)]
        assert best_of_n(scores, n) == pytest.approx(np.mean(subsets), rel=1e-12)
    for n in (0, 8):
        with pytest.raises(ValueError, match="1 to 7"):
            best_of_n(scores, n)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_divergence_on_a_table(n):
    """P(best = i) = P(all at most i) - P(all below i); the bound is reached as probabilities become small."""
    for size, slack in ((4, None), (20_000, 1e-3)):
        p = np.random.default_rng(1).dirichlet(np.ones(size) * 5)
        below = np.concatenate([[0], np.cumsum(p)])
        best = below[1:] ** n - below[:-1] ** n
        kl = np.sum(np.where(best > 0, best * np.log(np.maximum(best, 1e-300) / p), 0.0))
        assert kl <= kl_bound(n) + 1e-9
        if slack:
            assert kl == pytest.approx(kl_bound(n), abs=slack)
