"""Which responses are compared, which is preferred, and what is left out, with its reason."""

import numpy as np
import pytest

from prefalign_jax.data.pairing import Choice, Scored, pair_up
from prefalign_jax.types import UserError

NAN = float("nan")
FOUR = Scored(["a", "b", "c", "d"], [0.0, 2.0, 1.0, 2.5])


def test_the_best_against_the_worst():
    assert pair_up([FOUR, Scored(["x", "y"], [5.0, -5.0])]) == ([(0, Choice(3, 0)), (1, Choice(0, 1))], {})


def test_all_pairs_of_four_are_six_and_the_higher_score_is_chosen():
    pairs, dropped = pair_up([FOUR], pairing="all")
    assert len(pairs) == 6 and not dropped
    assert all(FOUR.scores[choice.chosen] > FOUR.scores[choice.rejected] for _, choice in pairs)
    assert len({frozenset(choice) for _, choice in pairs}) == 6


@pytest.mark.parametrize(
    "scored, options, reason",
    [
        (Scored(["a", "b"], [1.0, 1.0]), {}, "tie"),
        (Scored(["a", "b"], [1.0, 1.4]), {"min_gap": 0.5}, "scores too close"),
        (Scored(["a", "a"], [1.0, 2.0]), {}, "identical responses"),
        (Scored(["a", " "], [1.0, 2.0]), {}, "empty response"),
        (Scored(["a"], [1.0]), {}, "fewer than two scored responses"),
        (Scored(["a", "b"], [1.0, NAN]), {}, "fewer than two scored responses"),
    ],
)
def test_what_is_left_out_is_counted_by_its_reason(scored, options, reason):
    assert pair_up([scored], **options) == ([], {reason: 1})
    assert pair_up([scored], pairing="all", **options) == ([], {reason: 1})


def test_a_response_without_a_score_is_in_no_pair():
    pairs, _ = pair_up([Scored(["a", "b", "c"], [NAN, 1.0, 3.0])], pairing="all")
    assert pairs == [(0, Choice(2, 1))]


def test_noisy_labels_follow_bradley_and_terry():
    prompts = [Scored(["a", "b"], [0.0, 1.0])] * 4000
    for sharpness in (0.0, 1.0, 3.0):
        pairs, dropped = pair_up(prompts, labels="bradley_terry", sharpness=sharpness)
        share = np.mean([choice.chosen == 1 for _, choice in pairs])
        assert share == pytest.approx(1 / (1 + np.exp(-sharpness)), abs=0.03) and not dropped
    ties, _ = pair_up([Scored(["a", "b"], [1.0, 1.0])] * 4000, labels="bradley_terry")
    assert np.mean([choice.chosen for _, choice in ties]) == pytest.approx(0.5, abs=0.03)
    far = pair_up([Scored(["a", "b"], [-1e6, 1e6])], labels="bradley_terry")
    assert far == ([(0, Choice(1, 0))], {})


def test_tosses_depend_on_the_seed_and_the_prompts_place_alone():
    prompts = [FOUR] * 30
    options = dict(pairing="all", labels="bradley_terry")
    first, again = (pair_up(prompts, **options)[0] for _ in range(2))
    assert first == again == pair_up(prompts + [FOUR], **options)[0][: len(first)]
    assert first != pair_up(prompts, **options, seed=1)[0]


def test_an_unknown_name_is_one_line():
    with pytest.raises(UserError, match="pairing='worst' is unknown; write one of best_worst, all"):
        pair_up([FOUR], pairing="worst")
    with pytest.raises(UserError, match="labels='noisy' is unknown; write one of true, bradley_terry"):
        pair_up([FOUR], labels="noisy")
