"""Duplicates against definitions that compare every record with every other."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefalign_jax.data.duplicates import contradictions, exact_duplicates, jaccard, near_duplicates
from prefalign_jax.data.records import Record
from prefalign_jax.data.words import parts, shingles
from prefalign_jax.types import Place

# Few words and short texts, so that most lists hold duplicates of every kind.
TEXT = st.lists(st.sampled_from(["a", "b", "c", "A,"]), min_size=1, max_size=3).map(" ".join)
PAIR = st.tuples(TEXT, TEXT, TEXT).map(lambda texts: Record(*texts))
PAIRS = st.lists(PAIR, max_size=12)
RECORDS = st.lists(st.tuples(PAIR, st.booleans()).map(lambda x: x[0]._replace(label=x[1])), max_size=12)


def same(a: Record, b: Record) -> bool:
    return (a.prompt, a.chosen, a.rejected, a.label) == (b.prompt, b.chosen, b.rejected, b.label)


def alike(a: Record, b: Record, threshold: float, words: int) -> bool:
    sets = [[shingles(text, words) for text in parts(record)] for record in (a, b)]
    return a.label == b.label and all(jaccard(x, y) >= threshold for x, y in zip(*sets, strict=True))


def groups(records: list[Record], threshold: float, words: int) -> list[int]:
    """The first record that each is alike to, through others."""
    group = list(range(len(records)))
    for i, record in enumerate(records):
        for j in range(i):
            if alike(record, records[j], threshold, words):
                old, new = max(group[i], group[j]), min(group[i], group[j])
                group = [new if g == old else g for g in group]
    return group


@given(RECORDS)
def test_an_exact_duplicate_is_one_of_an_earlier_record(records):
    kept, dropped = exact_duplicates(records)
    assert kept == [r for i, r in enumerate(records) if not any(same(r, s) for s in records[:i])]
    assert dropped == {"exact duplicate": len(records) - len(kept)}


@given(RECORDS)
def test_contradictions_are_what_another_record_says_the_other_way_round(records):
    def against(a, b):
        swapped = same(a, b._replace(chosen=b.rejected, rejected=b.chosen)) and a.chosen != a.rejected
        return swapped or same(a, b._replace(label=not b.label))

    kept, dropped = contradictions(records)
    # A swapped pair of the other label says the same twice, which no reader makes: such lists are left out.
    if not any(
        (a.prompt, a.chosen, a.rejected, a.label) == (b.prompt, b.rejected, b.chosen, not b.label)
        for a in records
        for b in records
    ):
        assert kept == [r for r in records if not any(against(r, s) for s in records)]
    assert dropped == {"contradictory": len(records) - len(kept)}


@settings(max_examples=25, deadline=None)
@given(PAIRS, st.sampled_from([0.3, 0.6, 1.0]), st.integers(1, 2))
def test_whatever_is_dropped_as_near_is_alike_and_little_is_missed(records, threshold, words):
    kept, dropped = near_duplicates(records, threshold=threshold, words=words)
    group = groups(records, threshold, words)
    assert dropped == {"near duplicate": len(records) - len(kept)}
    # All that brute force keeps is kept; MinHash may miss some of the rest.
    left = iter(kept)
    assert all(any(r is k for k in left) for r, i in zip(records, range(len(records)), strict=True) if group[i] == i)
    if threshold == 1.0:  # equal sets have equal signatures
        assert len(kept) == len(set(group))


@settings(max_examples=25, deadline=None)
@given(RECORDS, st.integers(1, 3))
def test_a_threshold_of_1_is_equality_of_the_sets(records, words):
    kept, _ = near_duplicates(records, threshold=1.0, words=words)
    keys = [(r.label, *(shingles(text, words) for text in parts(r))) for r in records]
    assert kept == [r for i, r in enumerate(records) if keys[i] not in keys[:i]]


def variants(count: int, seed: int = 0) -> list[Record]:
    """Pairs of 40 words, in which between 0 and 9 words of each of 20 are replaced."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        base = rng.integers(0, 1000, (3, 40)).astype(str)
        for changed in rng.integers(0, 10, 20):
            text = base.copy()
            for part in text:
                part[rng.choice(40, changed, replace=False)] = rng.integers(1000, 9999, changed).astype(str)
            out.append(Record(*(" ".join(part) for part in text)))
    return out


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_minhash_finds_what_brute_force_finds(threshold):
    records = variants(5)
    group = groups(records, threshold, 3)
    kept, dropped = near_duplicates(records, threshold=threshold)
    wanted = len(records) - len(set(group))
    assert 10 < wanted < len(records) - 6, "some are alike and some are not"
    assert wanted - 3 <= dropped["near duplicate"] <= wanted
    # Which groups there are does not depend on the order, only which record is their first.
    order = random.Random(1).sample(range(len(records)), len(records))
    _, again = near_duplicates([records[i] for i in order], threshold=threshold)
    assert again == dropped
    assert near_duplicates(kept, threshold=threshold) == (kept, {"near duplicate": 0})


def test_the_permutations_are_seeded():
    records = variants(4)
    assert near_duplicates(records, seed=3) == near_duplicates(records, seed=3)


def test_another_answer_to_the_same_long_prompt_is_no_duplicate():
    prompt = " ".join(map(str, range(500)))
    records = [Record(prompt, "Yes, of course.", "No."), Record(prompt, "I do not know.", "No.")]
    assert near_duplicates(records, threshold=0.5)[1] == {"near duplicate": 0}
    assert near_duplicates([records[0], records[0]._replace(chosen="yes -- of COURSE")])[1] == {"near duplicate": 1}


def test_messages_count_with_all_their_fields():
    def pair(role):
        return Record([{"role": role, "content": "Hi"}], [{"role": "assistant", "content": "a"}], [])

    assert exact_duplicates([pair("user"), pair("system"), pair("user")])[1] == {"exact duplicate": 1}


def test_equal_completions_labelled_both_ways_are_contradictory():
    rows = [Record("a", "b", "", label=True), Record("a", "b", "", label=False), Record("a", "c", "", label=False)]
    assert contradictions(rows) == (rows[2:], {"contradictory": 2})


def test_both_orders_of_one_row_are_a_soft_preference():
    soft = [Record("a", "b", "c", 0.7, where=Place("x", 1)), Record("a", "c", "b", 0.3, where=Place("x", 1))]
    assert contradictions(soft) == (soft, {"contradictory": 0})
    hard = [Record("a", "b", "c", where=Place("x", 2)), Record("a", "c", "b", where=Place("x", 3))]
    assert contradictions([*soft, hard[0]])[0] == [*soft, hard[0]]
    assert contradictions([*hard, *soft]) == (soft, {"contradictory": 2})
