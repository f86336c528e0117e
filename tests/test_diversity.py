import itertools

import numpy as np
import pytest

from prefalign_jax.generation.diversity import distinct, diversity, overlap
from prefalign_jax.intervals import bootstrap_mean

WORDS = "the cat sat on a mat".split()


def draw(count: int, seed: int = 0, longest: int = 8) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [rng.choice(WORDS, rng.integers(0, longest + 1)).tolist() for _ in range(count)]


def grams(sample, n):
    return [tuple(sample[i : i + n]) for i in range(len(sample) - n + 1)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_counts_n_grams_of_all_samples_together(n):
    samples = draw(20)
    every = [gram for sample in samples for gram in grams(sample, n)]
    assert distinct(samples, n) == len(set(every)) / len(every)
    assert distinct(samples * 3, n) == pytest.approx(distinct(samples, n) / 3)


def test_distinct_extremes():
    assert distinct([["a"], ["b"]], 1) == 1
    assert distinct([["a"] * 10], 2) == 1 / 9
    assert distinct([["a"], []], 2) == 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_overlap_matches_n_grams_one_to_one(n):
    for first, second in itertools.combinations(draw(12, seed=1), 2):
        a, b = grams(first, n), grams(second, n)
        left, matched = list(b), 0
        for gram in a:
            if gram in left:
                left.remove(gram)
                matched += 1
        expected = 2 * matched / (len(a) + len(b)) if a or b else float(first == second)
        assert overlap(first, second, n) == overlap(second, first, n) == pytest.approx(expected)


def test_overlap_of_a_sample_with_itself_is_one_whatever_its_length():
    for sample in draw(10):
        assert overlap(sample, list(sample), 3) == 1
    assert overlap(["a"], ["b"], 3) == 0


def test_token_ids_are_as_good_as_words():
    words = [sample for sample in draw(12) if sample]
    tokens = [np.array([WORDS.index(word) for word in sample], np.int32) for sample in words]
    prompts = [i // 3 for i in range(len(words))]
    assert diversity(words, prompts) == diversity(tokens, prompts)


def test_prompts_count_the_same_however_many_samples_they_have():
    """The overlap is a mean over pairs of a prompt, then over prompts; a prompt with one sample has none."""
    samples = [["a", "b"], ["a", "b"], ["a"], ["a"], ["c"], ["z"]]
    found = diversity(samples, ["p", "p", "q", "q", "q", "alone"])
    assert found.overlap[1].mean == pytest.approx((1 + 1 / 3) / 2)
    assert (found.samples, found.prompts) == (6, 3)
    assert diversity([["a"], ["b"]], ["p", "q"]).overlap is None


def test_copies_of_one_sample_are_no_diversity():
    one = diversity([WORDS] * 4, ["p", "p", "q", "q"])
    assert all(interval.mean == 1 for interval in one.overlap.values())


def test_lengths_have_the_interval_of_their_prompts():
    samples, prompts = draw(60), np.arange(60) // 3
    found = diversity(samples, prompts.tolist()).length
    lengths = np.array([len(sample) for sample in samples])
    assert found == bootstrap_mean(lengths, clusters=prompts)
    assert found.mean == pytest.approx(lengths.mean())


def test_cut_off_is_what_reached_the_limit_without_an_end():
    samples = [[1, 2, 9], [1, 2, 3], [1, 9], [4, 5, 6], []]
    found = diversity(samples, range(5), limit=3, end=9)
    assert found.cut.mean == pytest.approx(2 / 5)
    assert found.cut.low < 0.4 < found.cut.high
    assert diversity(samples, range(5)).cut is None
