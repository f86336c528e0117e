import dataclasses
import hashlib
import itertools

import jax
import numpy as np
import pytest

from prefalign_jax.data.packing import mean_tokens
from prefalign_jax.data.pairs import digest_of
from prefalign_jax.data.pipeline import batch_of, eval_batches, make_pair_set, mismatched, train_batches
from prefalign_jax.data.trees import Layout
from prefalign_jax.types import CHOSEN, REJECTED, SIDES, Pair, PairLogps, UserError
from small import make_pairs

PAIRS = make_pairs(10)
DATA = make_pair_set(PAIRS, 4)


def order(data=DATA, stop: int = 15, **options) -> list[int]:
    """The numbers of the pairs of the first batches, one after the other."""
    options = dict(seed=0, shuffle=True, start=0, stop=stop) | options
    return [int(i) for batch in train_batches(data, **options) for i in batch.index.reshape(-1)]


def equal(one, other) -> bool:
    one, other = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def responses(batch) -> dict[tuple[int, int], list[int]]:
    """{(number of the pair in its data set, side): the response's tokens}, read back from slots and targets."""
    found = {}
    for m, index in enumerate(batch.index):
        for slot, target in zip(batch.slot[m].flat, batch.target[m].flat, strict=True):
            if slot < SIDES * len(index):
                found.setdefault((int(index[slot // SIDES]), int(slot % SIDES)), []).append(int(target))
    return found


# Training order


def test_a_run_resumes_by_its_step_alone():
    whole = list(train_batches(DATA, seed=3, shuffle=True, start=0, stop=9))
    for start in (1, 4, 8):
        rest = list(train_batches(DATA, seed=3, shuffle=True, start=start, stop=9))
        assert len(rest) == 9 - start
        assert all(equal(one, other) for one, other in zip(rest, whole[start:], strict=True))
    assert not equal(whole[0], whole[1])


def test_batches_are_the_same_in_every_run():
    assert order(seed=5) == order(seed=5)


def test_an_epoch_holds_every_pair_once_and_is_shuffled_anew():
    """Ten pairs, four a batch: batches span epochs and epochs do not start with a batch."""
    epochs = [tuple(epoch) for epoch in np.array(order()).reshape(-1, 10).tolist()]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 6
    assert len(set(epochs)) == 6
    assert tuple(range(10)) not in epochs


def test_without_shuffling_every_epoch_is_in_the_order_of_the_file():
    assert order(shuffle=False, seed=9) == [*range(10)] * 6


def test_another_seed_gives_another_order():
    assert len({tuple(order(seed=seed)) for seed in range(4)}) == 4


def test_the_order_does_not_depend_on_how_batches_are_cut():
    data = make_pair_set(PAIRS, 6, micro_steps=2)
    assert order(data, stop=10, balance=False) == order(DATA, stop=15, balance=False)


def test_the_shuffle_favours_no_place():
    """The first of six pairs over many seeds: each comes first about equally often."""
    data = make_pair_set(PAIRS[:6], 2)
    counts = np.bincount([order(data, stop=1, seed=seed, balance=False)[0] for seed in range(240)], minlength=6)
    assert counts.min() >= 18
    assert counts.max() <= 70


def test_balanced_batches_hold_about_as_many_tokens_and_every_pair_once_an_epoch():
    pairs = make_pairs(64, longest=300)
    data = make_pair_set(pairs, 8, micro_steps=2)
    for balance, spread in ((False, 1.2), (True, 1.1)):
        batches = list(train_batches(data, seed=0, shuffle=True, start=0, stop=16, balance=balance))
        tokens = np.array([np.count_nonzero(batch.segments[m]) for batch in batches for m in (0, 1)])
        assert (tokens.max() < spread * tokens.min()) == balance
        for epoch in (batches[:8], batches[8:]):
            assert sorted(i for batch in epoch for i in batch.index.reshape(-1)) == list(range(64))
    assert len(data.shapes) <= 4


def test_the_longest_pair_comes_at_any_time():
    data = make_pair_set(make_pairs(64, longest=60), 8)
    longest = int(np.argmax(data.lengths.pieces.sum(1)))
    found = set()
    for seed in range(24):
        batches = train_batches(data, seed=seed, shuffle=True, start=0, stop=8)
        found |= {n for n, batch in enumerate(batches) if longest in batch.index}
    assert len(found) >= 5


def test_one_pair_may_be_a_batch():
    found = order(make_pair_set(PAIRS, 1), stop=20)
    assert [sorted(found[:10]), sorted(found[10:])] == [list(range(10))] * 2


def test_the_longest_pair_fits_twice_where_two_epochs_meet():
    """Last of one epoch and first of the next: one batch holds it twice."""
    short = np.ones(1, np.int32)
    pairs = [Pair(short, *np.ones((2, 60), np.int32)), *[Pair(short, short, short)] * 2]
    batches = list(train_batches(make_pair_set(pairs, 2), seed=0, shuffle=True, start=0, stop=60))
    assert len(batches) == 60
    assert [0, 0] in [batch.index[0].tolist() for batch in batches], "it never happens here"


def test_more_pairs_in_a_batch_than_in_the_set_are_repeated():
    data = make_pair_set(PAIRS[:3], 4)
    found = order(data, stop=3)
    assert [sorted(found[i : i + 3]) for i in range(0, 12, 3)] == [[0, 1, 2]] * 4


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [64, 61])
def test_micro_steps_change_no_batch_and_a_run_may_go_on_with_others(shuffle, count):
    pairs, options = make_pairs(count, longest=40), dict(seed=3, shuffle=shuffle)

    def batches(micro_steps, start, stop):
        data = make_pair_set(pairs, 8, micro_steps=micro_steps)
        return [
            np.sort(batch.index, axis=None).tolist() for batch in train_batches(data, **options, start=start, stop=stop)
        ]

    whole = batches(1, 0, 16)
    for micro_steps in (2, 4, 8):
        assert batches(micro_steps, 0, 16) == whole
    assert batches(1, 0, 4) + batches(8, 4, 16) == whole
    if count == 64:
        assert sorted(sum(whole[:8], [])) == list(range(64))  # each pair once an epoch


def test_micro_steps_hold_about_as_many_tokens_each():
    pairs = make_pairs(64, longest=60)
    data = make_pair_set(pairs, 16, micro_steps=4)
    for batch in train_batches(data, seed=0, shuffle=True, start=0, stop=4):
        tokens = (batch.segments > 0).sum((1, 2))
        assert tokens.max() - tokens.min() <= data.lengths.pieces.sum(1).max()


@pytest.mark.parametrize(("micro_steps", "groups"), [(1, 1), (2, 1), (2, 2)])
def test_a_batch_holds_the_tokens_of_the_pairs_it_names(micro_steps, groups):
    data = make_pair_set(PAIRS, 4, micro_steps=micro_steps, groups=groups)
    for batch in train_batches(data, seed=1, shuffle=True, start=0, stop=5):
        assert batch.index.shape == batch.weight.shape == (micro_steps, 4 // micro_steps)
        assert batch.source.shape[:2] == (micro_steps, groups)
        found = responses(batch)
        # A pair may be in a batch twice where two epochs meet.
        for number, times in zip(*np.unique(batch.index, return_counts=True), strict=True):
            assert found[number, CHOSEN] == PAIRS[number].chosen.tolist() * times
            assert found[number, REJECTED] == PAIRS[number].rejected.tolist() * times


# Evaluation


@pytest.mark.parametrize("count", [1, 3, 4, 8, 10])
def test_evaluation_covers_every_pair_once_and_fills_with_weight_zero(count):
    pairs = [Pair(p.prompt, p.chosen, p.rejected, 1.5) for p in PAIRS[:count]]
    batches = list(eval_batches(make_pair_set(pairs, 4)))
    index = np.concatenate([batch.index[0] for batch in batches])
    weight = np.concatenate([batch.weight[0] for batch in batches])
    filler = -count % 4
    assert index.tolist() == [*range(count)] + [-1] * filler
    assert weight.tolist() == [1.5] * count + [0.0] * filler
    found = {key: value for batch in batches for key, value in responses(batch).items()}
    assert found.keys() == {(number, side) for number in range(count) for side in (CHOSEN, REJECTED)}
    assert all(found[number, CHOSEN] == pair.chosen.tolist() for number, pair in enumerate(pairs))


def test_token_means_are_of_the_whole_set_in_evaluation_and_of_the_batch_in_training():
    means = {tuple(batch.mean_tokens[0].tolist()) for batch in eval_batches(DATA)}
    assert means == {tuple(mean_tokens(PAIRS).tolist())}
    for batch in train_batches(DATA, seed=0, shuffle=True, start=0, stop=3):
        np.testing.assert_array_equal(batch.mean_tokens[0], mean_tokens([PAIRS[i] for i in batch.index[0]]))


# Reference columns


def with_reference(data):
    columns = np.arange(4)[:, None] * 100.0 + np.arange(len(data.pairs))[None, :]
    return data._replace(reference=PairLogps(*columns.astype(np.float32)))


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_cached_logps_follow_their_pairs(micro_steps):
    data = with_reference(make_pair_set(PAIRS, 4, micro_steps=micro_steps))
    for batch in train_batches(data, seed=2, shuffle=True, start=0, stop=6):
        for offset, name in enumerate(("chosen", "rejected", "chosen_tokens", "rejected_tokens")):
            np.testing.assert_array_equal(getattr(batch.reference, name), 100 * offset + batch.index)
        assert batch.reference.prompt is None


def test_filler_has_a_reference_and_no_weight():
    *_, last = eval_batches(with_reference(DATA))
    assert last.index[0].tolist() == [8, 9, -1, -1]
    np.testing.assert_array_equal(last.reference.chosen[0, :2], [8, 9])
    assert np.isfinite(last.reference.chosen).all()
    assert last.weight[0].tolist() == [1, 1, 0, 0]


def test_no_reference_stays_none():
    assert batch_of(DATA, np.arange(4)).reference is None


# Mismatched completions


def unpaired(prompts, completions=None) -> list[Pair]:
    """Examples with these prompts, and as completion their number, or these."""
    completions = completions or [(i,) for i in range(len(prompts))]
    none = np.zeros(0, np.int32)
    return [
        Pair(np.array(prompt, np.int32), np.array(completion, np.int32), none)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


@pytest.mark.parametrize("count", range(2, 7))
def test_mismatched_takes_an_example_of_the_next_prompt(count):
    """Every order of up to three prompts, of which one begins another; an example's completion is its number."""
    for prompts in itertools.product([(1,), (1, 2), (3,)], repeat=count):
        if len(set(prompts)) == 1:
            continue
        for i, pair in enumerate(mismatched(unpaired(prompts), 9)):
            other = int(pair.rejected[0])
            following = next(j % count for j in range(i + 1, i + count) if prompts[j % count] != prompts[i])
            assert prompts[other] == prompts[following] != prompts[i], (prompts, i)


def test_mismatched_completions_of_preference_pairs_are_of_either_label():
    """Chosen and rejected of one prompt follow each other: each gets its like of the next prompt."""
    found = mismatched(unpaired([(1,), (1,), (2,), (2,), (3,), (3,), (3,)]), 9)
    assert [int(pair.rejected[0]) for pair in found] == [2, 3, 4, 5, 0, 1, 0]
    round_the_end = mismatched(unpaired([(1,), (2,), (1,), (1,)]), 9)
    assert [int(pair.rejected[0]) for pair in round_the_end] == [1, 2, 1, 1]


def test_mismatched_changes_nothing_else():
    pairs = [dataclasses.replace(p, weight=1.0 + i, margin=float(i), label=i % 2 == 0) for i, p in enumerate(PAIRS)]
    before = digest_of(pairs)
    found = mismatched(pairs, 24)
    assert digest_of(pairs) == before
    assert digest_of([dataclasses.replace(f, rejected=p.rejected) for f, p in zip(found, pairs, strict=True)]) == before
    assert [f.rejected.tolist() for f in found] == [pairs[(i + 1) % 10].chosen.tolist() for i in range(10)]
    assert digest_of(mismatched(pairs, 24)) == digest_of(found)
    # Applied again it finds the same: what was `rejected` does not matter.
    assert digest_of(mismatched(found, 24)) == digest_of(found)


def test_mismatched_completions_are_cut_on_the_right_to_what_fits():
    pairs = unpaired([(1,), (2, 2, 2)], [(4, 5, 6), (7, 8, 9, 10)])
    for max_length, expected in {
        5: [[7, 8, 9, 10], [4, 5]],
        4: [[7, 8, 9], [4]],
        6: [[7, 8, 9, 10], [4, 5, 6]],
        99: [[7, 8, 9, 10], [4, 5, 6]],
    }.items():
        assert [pair.rejected.tolist() for pair in mismatched(pairs, max_length)] == expected
    with pytest.raises(UserError, match=r"^example 1: its prompt of 3 tokens leaves no room .* max_length .* is 3\)$"):
        mismatched(pairs, 3)


@pytest.mark.parametrize("count", [1, 3])
def test_mismatched_needs_two_prompts(count):
    message = rf"^all {count} examples have the same prompt.*apo_zero_unpaired or bco_unpaired, which need none$"
    with pytest.raises(UserError, match=message):
        mismatched(unpaired([(1, 2)] * count), 9)
    assert list(mismatched([], 9)) == []


# Errors


def test_no_pairs_is_an_error():
    with pytest.raises(UserError, match="no pairs"):
        make_pair_set([], 4)


def test_a_row_shorter_than_the_longest_pair_is_an_error():
    with pytest.raises(UserError, match="data.row_length=8"):
        make_pair_set(make_pairs(10, longest=12), 4, row_length=8, layout=Layout())


# Digest


def changed_pairs():
    """Every small change of three pairs, by name."""
    base = Pair(*(np.array(ids, np.int32) for ids in ([1, 2, 3], [4, 5], [6])))
    rest = make_pairs(2, seed=7)

    def like(prompt=(1, 2, 3), chosen=(4, 5), rejected=(6,), **fields):
        return Pair(*(np.array(ids, np.int32) for ids in (prompt, chosen, rejected)), **fields)

    return {
        "base": [base, *rest],
        "a prompt token": [like(prompt=(1, 2, 9)), *rest],
        "a chosen token": [like(chosen=(4, 9)), *rest],
        "a rejected token": [like(rejected=(9,)), *rest],
        "prompt | chosen": [like(prompt=(1, 2), chosen=(3, 4, 5)), *rest],
        "chosen | rejected": [like(chosen=(4,), rejected=(5, 6)), *rest],
        "all in the prompt": [like(prompt=(1, 2, 3, 4, 5, 6), chosen=(), rejected=()), *rest],
        "sides swapped": [like(chosen=(6,), rejected=(4, 5)), *rest],
        "no rejected": [like(rejected=()), *rest],
        "a weight": [like(weight=0.5), *rest],
        "a margin": [like(margin=0.5), *rest],
        "a label": [like(label=False), *rest],
        "the order of the pairs": [*rest, base],
        "a pair less": [base, *rest[:1]],
        "a pair twice": [base, base, *rest],
    }


def test_the_digest_changes_with_any_token_role_weight_margin_label_or_order():
    digests = {name: digest_of(pairs) for name, pairs in changed_pairs().items()}
    twins = [(a, b) for a, b in itertools.combinations(digests, 2) if digests[a] == digests[b]]
    assert twins == []


def test_the_digest_is_of_values_not_of_their_storage():
    wide = [Pair(*(ids.astype(np.int64) for ids in (p.prompt, p.chosen, p.rejected)), p.weight) for p in PAIRS]
    lists = [Pair(p.prompt.tolist(), p.chosen.tolist(), p.rejected.tolist(), 1) for p in PAIRS]
    assert digest_of(PAIRS) == digest_of(wide) == digest_of(lists) == digest_of(make_pairs(10))
    assert len(digest_of(PAIRS)) == len(hashlib.sha256().hexdigest())
