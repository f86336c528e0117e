"""Responses to one prompt -> preference pairs, by their scores or by whose they are; and groups of scored ones.

`choose_pairs` takes the pairs that the scores of data say. `pair_up` compares samples; its labels may be noisy, so that
a tie may be a pair too. `put_over` asks for no scores.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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


WHICH_PAIRS = ("best_worst", "all", "adjacent", "random:N")  # which pairs of a group there are
_RANDOM = re.compile(r"random:([1-9][0-9]{0,8})")


def check_pairs(field: str, how: str) -> None:
    """Refuses what `choose_pairs` does not know, in the name of a config's field."""
    if how not in WHICH_PAIRS[:-1] and not _RANDOM.fullmatch(how):
        raise UserError(
            f"{field}={how!r} is unknown; write one of {', '.join(WHICH_PAIRS)}, with a number from 1 on for N"
        )


def choose_pairs(scores: Sequence[float], how: str, draw: Callable[[Choice], float]) -> tuple[list[Choice], int]:
    """Chooses which responses of a prompt are compared.

    Args:
      scores: of the responses, more is better; no response is better than one of the same score.
      how: 'best_worst', the first of the best over the first of the worst; 'all', every response over each that is
        worse; 'adjacent', every response over each of the next lower score; 'random:N', N of all.
      draw: a pair -> a number in [0, 1); 'random:N' takes the N lowest.

    Returns:
      (the pairs, those of better responses first; how many were left out because the two are equally good). Of
      'best_worst' that is one or none.

    Example:
      >>> choose_pairs([1.0, 3.0, 2.0], "adjacent", lambda pair: 0.0)
      ([Choice(chosen=1, rejected=2), Choice(chosen=2, rejected=0)], 0)
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    if how == "best_worst":
        pairs = [Choice(order[0], scores.index(scores[order[-1]]))]
    else:
        pairs = [Choice(*two) for two in itertools.combinations(order, 2)]
    better = [pair for pair in pairs if scores[pair.chosen] > scores[pair.rejected]]
    ties = len(pairs) - len(better)
    if how == "adjacent":
        levels = sorted(set(scores), reverse=True)
        below = dict(itertools.pairwise(levels))
        better = [pair for pair in better if below[scores[pair.chosen]] == scores[pair.rejected]]
    return draw_some(better, how, draw), ties


def draw_some(pairs: list[Choice], how: str, draw: Callable[[Choice], float]) -> list[Choice]:
    """The N pairs with the lowest numbers for 'random:N', in their order; all of them for another `how`."""
    if not (drawn := _RANDOM.fullmatch(how)):
        return pairs
    lowest = sorted(range(len(pairs)), key=lambda i: draw(pairs[i]))[: int(drawn[1])]
    return [pairs[i] for i in sorted(lowest)]


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


def group_up(scored: Sequence[Scored]) -> tuple[list[tuple[int, list[int]]], dict[str, int]]:
    """Keeps of each prompt the responses that can be compared.

    Args:
      scored: for each prompt its responses and scores.

    Returns:
      (index of the prompt, the places of two or more of its responses) in order, and how many responses or prompts were
      left out for what reason: of equal responses the first is kept.

    Example:
      >>> group_up([Scored(["a", "b", "a", " "], [1.0, 3.0, 1.0, 2.0]), Scored(["a", "b"], [1.0, 1.0])])
      ([(0, [0, 1])], {'identical responses': 1, 'empty response': 1, 'tie': 1})
    """
    groups, dropped = [], Counter()
    for number, (responses, scores) in enumerate(scored):
        places: list[int] = []
        for place in np.flatnonzero(np.isfinite(scores)).tolist():
            if not responses[place].strip():
                dropped["empty response"] += 1
            elif responses[place] in [responses[i] for i in places]:
                dropped["identical responses"] += 1
            else:
                places.append(place)
        if len(places) < 2:
            dropped["fewer than two scored responses"] += 1
        elif len({scores[i] for i in places}) == 1:
            dropped["tie"] += 1
        else:
            groups.append((number, places))
    return groups, dict(dropped)


def put_over(
    better: Sequence[Sequence[str]], worse: Sequence[Sequence[str]]
) -> tuple[list[tuple[int, Choice]], dict[str, int]]:
    """Pairs of one's k-th response to a prompt over another's k-th, whatever they say.

    Args:
      better, worse: for each prompt equally many responses.

    Returns:
      (index of the prompt, the places in `better` and in `worse`) in order, and how many pairs were left out for what
      reason; a pair that a prompt has already is left out.

    Example:
      >>> put_over([["a", "b"]], [["c", "b"]])
      ([(0, Choice(chosen=0, rejected=0))], {'identical responses': 1})
    """
    pairs, dropped = [], Counter()
    for number, (ours, theirs) in enumerate(zip(better, worse, strict=True)):
        known: set[tuple[str, str]] = set()
        for place, pair in enumerate(zip(ours, theirs, strict=True)):
            if pair[0] == pair[1]:
                dropped["identical responses"] += 1
            elif not all(text.strip() for text in pair):
                dropped["empty response"] += 1
            elif pair in known:
                dropped["the same pair twice"] += 1
            else:
                known.add(pair)
                pairs.append((number, Choice(place, place)))
    return pairs, dict(dropped)
