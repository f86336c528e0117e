import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefalign_jax.data.records import Record
from prefalign_jax.data.statistics import (
    beginnings,
    length_bias,
    quantiles,
    repeated_prompts,
    truncation,
)
from prefalign_jax.intervals import wilson
from prefalign_jax.types import Pair, Place


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30))
def test_quantiles_are_values_and_in_order(values):
    found = quantiles(values)
    mean = found.pop("mean")
    assert mean == pytest.approx(sum(values) / len(values))
    assert list(found.values()) == sorted(found.values()) and set(found.values()) <= set(values)
    assert (found["least"], found["most"]) == (min(values), max(values))
    below = sum(value <= found["median"] for value in values)
    assert 2 * below >= len(values)


def test_length_bias_is_what_counting_gives():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.integers(1, 9, (2, 300))
    chosen[:100] += 3
    found = length_bias(chosen, rejected)
    longer = sum(a > b for a, b in zip(chosen, rejected, strict=True))
    shorter = sum(a < b for a, b in zip(chosen, rejected, strict=True))
    assert (found["longer"], found["shorter"], found["equal"]) == (longer, shorter, 300 - longer - shorter)
    assert found["longer_wins"] == pytest.approx(longer / (longer + shorter))
    # Independent pairs: the interval is Wilson's of a plain share.
    np.testing.assert_allclose((found["low"], found["high"]), wilson(found["longer_wins"], longer + shorter), atol=2e-3)
    # The rule, applied: a draw for equal lengths.
    points = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(chosen, rejected, strict=True)]
    assert (found["rule"], found["accuracy"]) == ("longer", pytest.approx(np.mean(points)))
    other = length_bias(rejected, chosen)
    assert (other["rule"], other["accuracy"]) == ("shorter", pytest.approx(found["accuracy"]))
    assert other["mean_difference"] == pytest.approx(-found["mean_difference"])


def test_pairs_of_one_prompt_are_not_independent():
    chosen = np.repeat(np.random.default_rng(0).integers(1, 9, 40), 10)
    rejected = np.full(400, 4)
    apart = length_bias(chosen, rejected)
    together = length_bias(chosen, rejected, np.repeat(np.arange(40), 10))
    assert together["longer_wins"] == apart["longer_wins"]
    assert together["high"] - together["low"] > 2 * (apart["high"] - apart["low"])


def test_lengths_that_say_nothing():
    assert length_bias([], []) == {}
    found = length_bias([3, 3], [3, 3])
    assert (found["accuracy"], "longer_wins" in found) == (0.5, False)


def pair(prompt, chosen, rejected, where):
    return Pair(*(np.ones(n, np.int32) for n in (prompt, chosen, rejected)), where=Place(where, 1))


def test_truncation_counts_what_is_lost():
    full = [pair(3, 4, 2, "a"), pair(8, 4, 2, "b"), pair(3, 12, 2, "c"), pair(9, 9, 9, "d")]
    kept = [full[0], pair(6, 4, 2, "b"), pair(3, 7, 2, "c")]
    assert truncation(full, kept, 10) == {
        "pairs": 4,
        "too_long": 3,
        "dropped": 1,
        "cut_prompt": 1,
        "cut_response": 1,
        "tokens": 9 + 14 + 17 + 27,
        "lost_prompt_tokens": 2 + 9,
        "lost_response_tokens": 5 + 18,
    }


def test_prompts_are_counted():
    hh = "\n\nHuman: How do I do this now?\n\nAssistant:"
    records = [Record(hh, "a", "b"), Record(hh, "c", "d"), Record("How do I do this, then?", "e", "f")]
    assert repeated_prompts(records) == {"prompts": 2, "records_of_an_earlier_prompt": 1, "most_of_one_prompt": 2}
    assert beginnings(records) == []
    assert beginnings([*records, Record("How do I do this,", "g", "h")]) == [("How do I do this,", 2)]
