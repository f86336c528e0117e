"""How varied and how long sampled responses are: distinct n-grams, overlap of samples of one prompt, lengths."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from prefalign_jax.intervals import Interval, bootstrap_mean, share_interval

ORDERS = (1, 2, 3, 4)  # n of the n-grams


class Diversity(NamedTuple):
    """What `diversity` measures; n-grams by n.

    Attributes:
      samples, prompts: how many.
      distinct: {n: different n-grams over all n-grams of all samples}; it falls as there are more of them.
      overlap: {n: mean overlap of two samples of one prompt}; None where no prompt has two.
      length: mean number of words or tokens.
      cut: the share of samples that the limit cut off; None without a limit.
    """

    samples: int
    prompts: int
    distinct: dict[int, float]
    overlap: dict[int, Interval] | None
    length: Interval
    cut: Interval | None


def n_grams(sample: Sequence[Hashable], n: int) -> collections.Counter:
    """How often each n-gram occurs in a list of words or tokens."""
    return collections.Counter(zip(*(sample[i:] for i in range(n)), strict=False))


def distinct(samples: Sequence[Sequence[Hashable]], n: int) -> float:
    """distinct-n: different n-grams over n-grams, of all samples together; 0 if none is n long.

    Source: Li et al., arXiv 1510.03055, section 5.

    Example:
      >>> distinct(["a b a".split(), "a b".split()], 1), distinct(["a b a".split(), "a b".split()], 2)
      (0.4, 0.6666666666666666)
    """
    counts = collections.Counter(itertools.chain.from_iterable(n_grams(sample, n).elements() for sample in samples))
    return len(counts) / counts.total() if counts else 0.0


def overlap(first: Sequence[Hashable], second: Sequence[Hashable], n: int) -> float:
    """2 sum_g min(a(g), b(g)) / (sum_g a(g) + sum_g b(g)), a and b the counts of n-grams g in the two samples.

    It is 1 for the same n-grams, 0 for none in common, and symmetric; where neither is n long, 1 if they are equal.

    Example:
      >>> overlap("a b c".split(), "b c d".split(), 2)
      0.5
    """
    a, b = n_grams(first, n), n_grams(second, n)
    both = a.total() + b.total()
    return 2 * (a & b).total() / both if both else float(list(first) == list(second))


def diversity(
    samples: Sequence[Sequence[Hashable]],
    prompts: Sequence[Hashable],
    *,
    limit: int | None = None,
    end: Hashable = None,
) -> Diversity:
    """Measures samples, with 95% intervals in which whole prompts are the units.

    Args:
      samples: lists of words or tokens.
      prompts: of which prompt each is a sample.
      limit: most tokens a sample could have. One of that length that does not end with `end` was cut off.
      end: the end-of-sequence token.

    Returns:
      The `Diversity`. Its overlap is the mean over the pairs of samples of a prompt, then over prompts.
    """
    numbers: dict[Hashable, int] = {}
    clusters = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])
    groups: list[list[Sequence[Hashable]]] = [[] for _ in numbers]
    for sample, cluster in zip(samples, clusters, strict=True):
        groups[cluster].append(sample)
    several = [list(itertools.combinations(group, 2)) for group in groups if len(group) > 1]
    overlaps = None
    if several:
        overlaps = {
            n: bootstrap_mean(np.array([np.mean([overlap(*pair, n) for pair in pairs]) for pairs in several]))
            for n in ORDERS
        }
    cut = None
    if limit is not None:
        is_cut = [len(sample) >= limit and (not len(sample) or sample[-1] != end) for sample in samples]
        cut = share_interval(np.array(is_cut), clusters=clusters)
    return Diversity(
        samples=len(samples),
        prompts=len(numbers),
        distinct={n: distinct(samples, n) for n in ORDERS},
        overlap=overlaps,
        length=bootstrap_mean(np.array([len(sample) for sample in samples], np.float64), clusters=clusters),
        cut=cut,
    )
