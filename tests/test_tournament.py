"""Scores of a prompt's responses by comparisons of two: shares of wins, and what becomes of lost verdicts."""

import numpy as np
import pytest

from prefalign_jax.data.records import Prompt
from prefalign_jax.judges.judge import Scores, Verdict
from prefalign_jax.judges.tournament import by_score, by_tournament
from prefalign_jax.types import Place

PROMPTS = [Prompt(text, "", Place("f", i)) for i, text in enumerate(("p", "q"))]


def test_a_score_is_given_to_each_response_of_each_prompt():
    def score(prompts, responses):
        assert [p.prompt for p in prompts] == ["p", "p", "q", "q", "q"]
        return Scores(np.arange(5.0), list(responses))

    first, second = by_score(score)(PROMPTS, [["a", "b"], ["c", "d", "e"]])
    assert (first.values.tolist(), first.reasons) == ([0.0, 1.0], ["a", "b"])
    assert (second.values.tolist(), second.reasons) == ([2.0, 3.0, 4.0], ["c", "d", "e"])


def test_a_response_scores_its_mean_preference_over_the_others():
    table = {("a", "b"): 1.0, ("a", "c"): 0.75, ("b", "c"): None}
    asked = []

    def judge(comparisons):
        asked.extend((c.prompt, c.first, c.second, c.tools) for c in comparisons)
        return [Verdict(c, table.get((c.first, c.second)), "refused") for c in comparisons]

    tools = ({"name": "f"},)
    prompts = [PROMPTS[0]._replace(tools=tools), PROMPTS[1]]
    first, second = by_tournament(judge)(prompts, [["a", " ", "b", "c"], ["b", "c"]])
    assert asked == [("p", "a", "b", tools), ("p", "a", "c", tools), ("p", "b", "c", tools), ("q", "b", "c", ())]
    np.testing.assert_array_equal(first.values, [0.875, np.nan, 0.0, 0.25])  # b and c by the one verdict they have
    assert first.reasons == ["", "empty response", "", ""]
    np.testing.assert_array_equal(second.values, [np.nan, np.nan])
    assert second.reasons == ["refused", "refused"]


@pytest.mark.parametrize("several", [[], ["a"], ["a", ""]])
def test_nothing_to_compare_with_is_no_score(several):
    (scores,) = by_tournament(lambda comparisons: [])(PROMPTS[:1], [several])
    assert np.isnan(scores.values).all() and all(scores.reasons) and len(scores.values) == len(several)
