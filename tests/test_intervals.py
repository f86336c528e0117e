import functools
import math

import numpy as np
import pytest
import scipy.stats

from conftest import longer
from prefalign_jax.intervals import Interval, bootstrap_difference, bootstrap_mean, share_difference, t_interval, wilson

DRAWS = 700  # of a coverage: three standard errors are 2.5%
LOW, HIGH = 0.925, 0.975

# A share


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.92])
@pytest.mark.parametrize("size", [100, 400])
def test_a_95_percent_interval_covers_95_percent(share, size):
    right = np.random.default_rng(0).binomial(size, share, 20_000)
    bounds = np.array([wilson(count / size, size) for count in range(size + 1)])
    covered = (bounds[right, 0] <= share) & (share <= bounds[right, 1])
    assert 0.93 < covered.mean() < 0.97


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_interval_solves_the_score_equation(share):
    """|p - share| = z sqrt(p (1 - p) / n) at both ends: Wilson's definition."""
    size, z = 25, 1.96
    for p in wilson(share, size, z):
        assert 0 <= p <= 1
        np.testing.assert_allclose(abs(p - share), z * np.sqrt(p * (1 - p) / size), atol=1e-9)


def test_more_pairs_narrow_the_interval():
    widths = [np.diff(wilson(0.6, size))[0] for size in (10, 40, 160, 640)]
    assert widths == sorted(widths, reverse=True)
    np.testing.assert_allclose(widths[2] / widths[3], 2, rtol=0.02)


# Few seeds


@pytest.mark.parametrize("count", [2, 3, 5])
def test_students_interval_covers_however_few_the_values(count):
    values = np.random.default_rng(count).normal(3.0, 2.0, (4000, count))
    covered = np.mean([of.low <= 3.0 <= of.high for of in map(t_interval, values)])
    assert abs(covered - 0.95) < 0.011


def test_students_interval_is_scipys():
    values = np.array([0.31, 0.42, 0.55, 0.29])
    for level in (0.5, 0.95, 0.99):
        expected = scipy.stats.t.interval(level, 3, values.mean(), scipy.stats.sem(values))
        np.testing.assert_allclose(t_interval(values, level)[1:], expected, rtol=1e-12)


def test_one_value_has_no_interval_and_none_no_mean():
    one = t_interval(np.array([2.0]))
    assert one.mean == 2.0 and math.isnan(one.low) and math.isnan(one.high)
    assert all(math.isnan(x) for x in t_interval(np.zeros(0)))


# The bootstrap covers

SOURCES = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "exponential": (lambda rng, n: rng.exponential(size=n), 1.0),
    "bernoulli 0.3": (lambda rng, n: (rng.random(n) < 0.3).astype(float), 0.3),
    "changes of -1, 0, 1": (lambda rng, n: rng.choice([-1.0, 0.0, 1.0], n, p=[0.2, 0.5, 0.3]), 0.1),
}


def coverage(draw, truth, **how):
    """Share of intervals that hold the truth, over draws of (values, options)."""
    rng, held = np.random.default_rng(7), 0
    for number in range(DRAWS):
        values, options = draw(rng)
        of = bootstrap_mean(values, resamples=500, seed=number, **options, **how)
        held += of.low <= truth <= of.high
    return held / DRAWS


@pytest.mark.parametrize("size", [50, longer(200)])
@pytest.mark.parametrize("name", SOURCES)
def test_the_bootstrap_covers(name, size):
    draw, truth = SOURCES[name]
    assert LOW < coverage(lambda rng: (draw(rng, size), {}), truth) < HIGH


def test_the_bootstrap_covers_at_another_level():
    draw, truth = SOURCES["exponential"]
    assert 0.76 < coverage(lambda rng: (draw(rng, 60), {}), truth, level=0.8) < 0.84


def test_the_bootstrap_covers_under_unequal_weights():
    def draw(rng):
        return rng.exponential(size=120), {"weight": rng.uniform(0.2, 2.0, 120)}

    assert LOW < coverage(draw, 1.0) < HIGH


def clustered(rng, told: bool):
    """40 prompts of two to eight samples that share most of what they are."""
    prompts = np.repeat(np.arange(40), rng.integers(2, 9, 40))
    values = rng.normal(size=40)[prompts] + 0.3 * rng.normal(size=len(prompts))
    return values, {"clusters": prompts} if told else {}


def test_of_few_values_it_is_students_and_does_not_run_away():
    """Eleven answers were cut at 64 tokens and one ended after 3: some resamples have next to no spread."""
    lengths = np.array([64.0] * 11 + [3.0])
    assert bootstrap_mean(lengths) == pytest.approx(t_interval(lengths))
    assert 0 < bootstrap_mean(lengths).low
    for size in (2, 5, 19):
        assert LOW < coverage(lambda rng, size=size: (rng.normal(size=size), {}), 0.0) < HIGH


def test_samples_of_one_prompt_are_resampled_together():
    assert LOW < coverage(functools.partial(clustered, told=True), 0.0) < HIGH
    assert coverage(functools.partial(clustered, told=False), 0.0) < 0.75  # what the argument is for


def test_a_paired_difference_covers_and_is_narrower_than_two_means():
    held = 0
    for number in range(DRAWS):
        rng = np.random.default_rng(number)
        common = 3 * rng.normal(size=60)
        first, second = common + rng.exponential(size=60), common + rng.normal(size=60)
        of = bootstrap_difference(first, second, resamples=500, seed=number)
        held += of.low <= 1.0 <= of.high
    assert LOW < held / DRAWS < HIGH
    assert of.high - of.low < 0.5 * (np.subtract(*bootstrap_mean(first)[:0:-1]))


@pytest.mark.parametrize("apart", [0.02, 0.3])
@pytest.mark.parametrize("size", [24, 200])
def test_a_difference_of_shares_covers_where_next_to_nothing_differs_too(size, apart):
    rng, held = np.random.default_rng(5), 0
    for _ in range(DRAWS):
        one = rng.random(size) < 0.6
        other = np.where(rng.random(size) < apart, rng.random(size) < 0.3, one)
        of = share_difference(one, other)
        held += of.low <= 0.3 * apart <= of.high
    assert LOW < held / DRAWS


def test_a_difference_of_shares_turns_with_them_and_counts_prompts():
    rng = np.random.default_rng(6)
    one, other, weight = rng.integers(0, 2, 40), rng.integers(0, 2, 40), rng.uniform(0.5, 2, 40)
    mean, low, high = share_difference(one, other, weight)
    assert share_difference(other, one, weight) == pytest.approx((-mean, -high, -low))
    assert mean == pytest.approx(np.average(one - other, weights=weight)) and low < mean < high
    assert share_difference(one, other, 7 * weight) == pytest.approx((mean, low, high))
    twice = share_difference(*(np.repeat(x, 2) for x in (one, other, weight)), clusters=np.repeat(np.arange(40), 2))
    assert twice == pytest.approx((mean, low, high))  # the same prompts say no more


# What it is


def test_the_same_seed_gives_the_same_interval_and_many_resamples_hardly_another():
    values = np.random.default_rng(0).exponential(size=80)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    few, many = bootstrap_mean(values, resamples=5000), bootstrap_mean(values, resamples=20_000, seed=1)
    np.testing.assert_allclose(few, many, atol=0.03)


def test_resamples_in_parts_are_those_at_once(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    at_once = bootstrap_mean(values)
    monkeypatch.setattr("prefalign_jax.intervals.CELLS", 50 * 64)
    np.testing.assert_allclose(bootstrap_mean(values), at_once)  # the draws follow each other in the same order


def test_it_moves_and_scales_with_the_values():
    values = np.random.default_rng(1).exponential(size=60)
    np.testing.assert_allclose(bootstrap_mean(5 + 2 * values), 5 + 2 * np.array(bootstrap_mean(values)))
    mean, low, high = bootstrap_mean(-values)
    assert mean == pytest.approx(-values.mean()) and low < mean < high


def test_a_skewed_mean_may_lie_further_on_the_side_of_the_tail():
    mean, low, high = bootstrap_mean(np.random.default_rng(2).exponential(size=50))
    assert high - mean > 1.2 * (mean - low)


def test_weights_count_in_the_mean_and_zero_leaves_out_even_nan():
    values, weight = np.array([1.0, 4.0, 2.0, np.nan]), np.array([3.0, 1.0, 2.0, 0.0])
    assert bootstrap_mean(values, weight) == bootstrap_mean(values[:3], weight[:3])
    assert bootstrap_mean(values, weight).mean == pytest.approx(11 / 6)


def test_one_cluster_a_pair_is_no_clusters():
    values = np.random.default_rng(3).normal(size=30)
    assert bootstrap_mean(values, clusters=np.arange(30)) == bootstrap_mean(values)


@pytest.mark.parametrize("right", [1, 2, 49])
def test_ends_are_finite_where_resamples_have_no_spread(right):
    values = np.repeat([1.0, 0.0], [right, 50 - right])
    mean, low, high = bootstrap_mean(values)
    assert math.isfinite(low) and math.isfinite(high) and low < mean < high


def test_no_spread_no_width_and_one_cluster_no_ends():
    assert bootstrap_mean(np.full(9, 2.5)) == Interval(2.5, 2.5, 2.5)
    assert np.isnan(bootstrap_mean(np.arange(4.0), clusters=np.zeros(4))[1:]).all()


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (np.array([1.0, np.nan]), {}),
        (np.zeros(0), {}),
        (np.ones(3), {"weight": np.ones(2)}),
        (np.ones(3), {"weight": np.zeros(3)}),
        (np.ones(3), {"clusters": np.ones(4)}),
        (np.ones((2, 2)), {}),
    ],
)
def test_what_has_no_interval_is_refused(values, options):
    with pytest.raises(ValueError):
        bootstrap_mean(values, **options)


def test_a_difference_is_of_the_same_pairs():
    with pytest.raises(ValueError, match="same pairs"):
        bootstrap_difference(np.ones(3), np.ones(4))
