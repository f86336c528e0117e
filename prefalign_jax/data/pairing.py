"""Scored responses of one prompt -> preference pairs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from prefalign_jax.types import UserError


class Scored(NamedTuple):
    """The responses to one prompt and what they are worth, NaN where nobody could tell."""

    responses: Sequence[str]
    scores: Sequence[float]


class Choice(NamedTuple):
    """One pair: the places of the chosen and the rejected response among the prompt's."""

    chosen: int
    rejected: int


def _best_worst(scores: np.ndarray) -> Iterable[tuple[int, int]]:
    order = scores.argsort(kind="stable")
    return [(order[-1], order[0])]


def _all(scores: np.ndarray) -> Iterable[tuple[int, int]]:
    return itertools.combinations(range(len(scores)), 2)


PAIRINGS = {"best_worst": _best_worst, "all": _all}
LABELS = ("true", "bradley_terry")


def pair_up(
    scored: Sequence[Scored],
    *,
    pairing: str = "best_worst",
    min_gap: float = 0.0,
    labels: str = "true",
    sharpness: float = 1.0,
    seed: int = 0,
) -> tuple[list[tuple[int, Choice]], dict[str, int]]:
    """Chooses which responses to compare, and which of them is preferred.

    Args:
      scored: for each prompt its responses and scores.
      pairing: 'best_worst', one pair a prompt, or 'all' pairs of two responses.
      min_gap: a pair whose scores are less apart is left out.
      labels: 'true', the higher score is chosen and a tie is left out; 'bradley_terry', the first is chosen with
        probability sigmoid(sharpness * difference of scores), so a tie is a toss.
      sharpness: of the labels' noise, in units of 1 / score.
      seed: of the tosses; those of a prompt do not depend on the other prompts.

    Returns:
      (index of the prompt, the pair) in order, and how many pairs were left out for what reason.

    Raises:
      UserError: a name is unknown.

    Source: Bradley and Terry (1952); all pairs of 4 samples as in the DPO paper's sentiment task, arXiv 2305.18290,
      section 6.

    Example:
      >>> pair_up([Scored(["a", "b", "c"], [1.0, 3.0, 2.0])])
      ([(0, Choice(chosen=1, rejected=0))], {})
    """
    if pairing not in PAIRINGS:
        raise UserError(f"pairing={pairing!r} is unknown; write one of {', '.join(PAIRINGS)}")
    if labels not in LABELS:
        raise UserError(f"labels={labels!r} is unknown; write one of {', '.join(LABELS)}")
    pairs, dropped = [], Counter()
    for number, (responses, scores) in enumerate(scored):
        tosses = np.random.default_rng((seed, number))
        places = np.flatnonzero(np.isfinite(scores))
        if len(places) < 2:
            dropped["fewer than two scored responses"] += 1
            continue
        for first, second in PAIRINGS[pairing](np.asarray(scores, np.float64)[places]):
            first, second, toss = int(places[first]), int(places[second]), tosses.random()
            gap = scores[first] - scores[second]
            if responses[first] == responses[second]:
                dropped["identical responses"] += 1
            elif not (responses[first].strip() and responses[second].strip()):
                dropped["empty response"] += 1
            elif abs(gap) < min_gap:
                dropped["scores too close"] += 1
            elif labels == "true" and gap == 0:
                dropped["tie"] += 1
            else:
                wins = gap > 0 if labels == "true" else toss < 0.5 + 0.5 * np.tanh(sharpness * gap / 2)
                pairs.append((number, Choice(first, second) if wins else Choice(second, first)))
    return pairs, dict(dropped)
