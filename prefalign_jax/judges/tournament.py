"""Scores of several responses to one prompt: of a reward as they are, of a judge the share of comparisons won."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from prefalign_jax.data.records import Prompt, told_by
from prefalign_jax.judges.judge import Comparison, Judge, Scorer, Scores

# (prompts, the responses to each) -> the scores of each prompt's responses.
Grader = Callable[[Sequence[Prompt], Sequence[Sequence[str]]], list[Scores]]


def by_score(score: Scorer) -> Grader:
    """Each response's own score."""

    def grade(prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[Scores]:
        flat = [prompt for prompt, several in zip(prompts, responses, strict=True) for _ in several]
        values, reasons = score(flat, [one for several in responses for one in several])
        ends = np.cumsum([0, *map(len, responses)])
        return [Scores(values[a:b], reasons[a:b]) for a, b in itertools.pairwise(ends)]

    return grade


def by_tournament(judge: Judge) -> Grader:
    """Each response against each other one: its score is the mean preference for it, in [0, 1].

    A response without text is in no comparison. Verdicts that are lost leave the mean to the others; a response without
    any has no score, for the reason of its first one.

    Example:
      >>> from prefalign_jax.judges.judge import by_reward
      >>> from prefalign_jax.judges.rewards import scorer
      >>> from prefalign_jax.types import Place
      >>> grade = by_tournament(by_reward(scorer("more_words")))
      >>> grade([Prompt("Hi", "", Place())], [["a b c", "a", "a b", "b a"]])[0].values.tolist()
      [1.0, 0.0, 0.5, 0.5]
    """

    def grade(prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[Scores]:
        places, comparisons = [], []
        for number, (prompt, several) in enumerate(zip(prompts, responses, strict=True)):
            spoken = [place for place, text in enumerate(several) if text.strip()]
            for pair in itertools.combinations(spoken, 2):
                first, second = (several[place] for place in pair)
                name = f"{number + 1}: {pair[0] + 1}, {pair[1] + 1}"
                comparisons.append(Comparison(prompt.prompt, first, second, name, **told_by(prompt)))
                places.append((number, *pair))
        won: list[list[list[float]]] = [[[] for _ in several] for several in responses]
        reasons = [["" if text.strip() else "empty response" for text in several] for several in responses]
        for (number, first, second), verdict in zip(places, judge(comparisons), strict=True):
            for place in (first, second):
                if verdict.preference is None:
                    reasons[number][place] = reasons[number][place] or verdict.reason
                else:
                    won[number][place].append(verdict.preference if place == first else 1 - verdict.preference)
        return [
            Scores(
                np.array([np.mean(one) if one else np.nan for one in shares]),
                ["" if one else why or "nothing to compare with" for one, why in zip(shares, lost, strict=True)],
            )
            for shares, lost in zip(won, reasons, strict=True)
        ]

    return grade
