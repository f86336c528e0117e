"""Pairs with the same prompt share its tokens and those of equal responses; groups have K responses to a prompt."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import longer
from prefalign_jax.data.packing import deal_whole
from prefalign_jax.data.pairs import Origin, as_pairs, from_list
from prefalign_jax.data.pipeline import batch_of, eval_batches, make_pair_set, train_batches
from prefalign_jax.data.trees import Layout, sharing_of
from prefalign_jax.reference import compute
from prefalign_jax.sharding import make_mesh, packing_of, param_shardings, place_batch
from prefalign_jax.types import Pair, Place, UserError
from small import FULL, MODEL, ORDINARY, first, logps_of, make_pairs, make_params, packed


def group(seed, count, weights=None):
    """A prompt with so many responses."""
    one, *others = make_pairs(-(-count // 2), seed=seed)
    responses = [ids for pair in (one, *others) for ids in (pair.chosen, pair.rejected)][:count]
    rng = np.random.default_rng(seed)
    values = [np.float32(rng.choice(weights, len(ids))) for ids in responses] if weights else [None] * count
    return one.prompt, responses, values


def all_pairs(counts, weights=None):
    """Of prompts with so many responses each the pairs of any two."""
    return [
        Pair(prompt, responses[i], responses[j], token_weights=(values[i], values[j]) if weights else ())
        for seed, count in enumerate(counts)
        for prompt, responses, values in [group(seed, count, weights)]
        for i, j in itertools.combinations(range(count), 2)
    ]


def test_what_is_equal_is_found_and_weights_tell_responses_apart():
    pairs = [*all_pairs([3]), *all_pairs([2, 2])]  # the first prompt and two of its responses come again
    sharing = sharing_of(as_pairs(pairs), Layout())
    assert sharing.prompt.tolist() == [0, 0, 0, 0, 4]
    assert len(np.unique(sharing.responses[:4])) == 3 and (sharing.responses[3] == sharing.responses[0]).all()
    weighed = dataclasses.replace(pairs[0], token_weights=(np.zeros(len(pairs[0].chosen), np.float32), None))
    sharing = sharing_of(as_pairs([pairs[0], weighed]), Layout())
    assert sharing.responses[0, 0] != sharing.responses[1, 0] and sharing.responses[0, 1] == sharing.responses[1, 1]
    # Texts that differ in more than case and spaces are not compared.
    told_apart = from_list([pairs[0], pairs[0]], [Origin(prompt=1), Origin(prompt=2)])
    assert sharing_of(told_apart, Layout()).prompt.tolist() == [0, 1]


@pytest.mark.parametrize("layout", [FULL, ORDINARY, Layout(rejected=False), Layout(rewards=True)], ids=str)
@pytest.mark.parametrize(
    ("options", "weights"),
    [longer(dict(groups=1), None), (dict(groups=2, row_length=64), (0, 0.5, 1))],
    ids=["whole", "weights, rows, two shards"],
)
def test_shared_tokens_give_what_separate_pairs_give_in_value_and_gradient(layout, options, weights):
    params, pairs = make_params(), all_pairs([4, 2, 1, 3], weights)
    mix = np.random.default_rng(1).normal(size=(3, len(pairs) + 1)).astype(np.float32)

    def value_and_slope(batch):
        def total(params):
            out = logps_of(MODEL, params, batch)
            sums = (out.chosen, out.rejected, out.prompt)
            return sum((w * x).sum() for w, x in zip(mix, sums, strict=True)), out

        (_, out), slope = jax.value_and_grad(total, has_aux=True)(params)
        return out, slope

    size = len(pairs) + 1
    one, other = (first(packed(pairs, size, layout=layout, group=group, **options)) for group in (False, True))
    assert one.slots is None and other.slots.shape == (size, 5)
    assert (other.segments > 0).sum() < (one.segments > 0).sum()
    (got, slope), (wanted, wanted_slope) = map(value_and_slope, (other, one))
    for name in ("chosen", "rejected", "prompt", "chosen_tokens", "rejected_tokens", "prompt_tokens", "weight"):
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), rtol=2e-5, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), slope, wanted_slope)


def test_each_prompt_and_each_response_is_laid_down_once():
    pairs = all_pairs([4, 2, 1, 3])
    sets = [
        (prompt, responses) for seed, count in ((0, 4), (1, 2), (3, 3)) for prompt, responses, _ in [group(seed, count)]
    ]
    batch = first(packed(pairs, group=True))
    assert (batch.segments > 0).sum() == sum(len(p) + sum(len(r) - 1 for r in responses) for p, responses in sets)
    assert (batch.slot < 5 * len(pairs)).sum() == sum(len(r) for _, responses in sets for r in responses)
    texts = sorted([*p, *r[:-1]] for p, responses in sets for r in responses)
    sequences = first(packed(pairs, group=True, attends="sequences")).sequences
    tokens = first(packed(pairs, group=True, attends="sequences")).tokens.reshape(-1)
    index, place = sequences.index[0], sequences.place[0]
    assert sorted(tokens[text[text >= 0]].tolist() for text in index if text[0] >= 0) == texts
    for token, where in enumerate(place):
        assert sorted(where[where >= 0]) == np.flatnonzero(index.reshape(-1) == token).tolist()


def test_another_branch_or_another_prompt_changes_nothing():
    params, pairs = make_params(), all_pairs([4, 3])

    def chosen(pairs):
        return np.asarray(logps_of(MODEL, params, first(packed(pairs, group=True))).chosen)

    last = pairs[2].rejected  # the fourth response of the first prompt, which is chosen nowhere
    other = [
        dataclasses.replace(pair, rejected=last[::-1] + 1) if pair.rejected is last or (len(pair.rejected) == len(last)
        and (pair.rejected == last).all()) else pair
        for pair in pairs
    ]  # fmt: skip
    other = [*other[:6], *(dataclasses.replace(pair, prompt=pair.prompt[::-1]) for pair in other[6:])]
    np.testing.assert_allclose(chosen(pairs)[:6], chosen(other)[:6], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "layout", [Layout(group=True, prompt=True), Layout(group=True, tree=False)], ids=["tree", "flat"]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_groups_of_any_size_equal_one_response_at_a_time(layout, groups):
    params, counts = make_params(), [4, 2, 5, 3]
    sets = [group(seed, count) for seed, count in enumerate(counts)]
    given = [Pair(p, r[0], r[1], others=tuple(r[2:]), scores=tuple(range(len(r), 0, -1))) for p, r, _ in sets]
    alone = [Pair(p, response, response) for p, responses, _ in sets for response in responses]
    mix = np.random.default_rng(1).normal(size=(5, 5)).astype(np.float32)
    present = np.arange(5) < np.array([*counts, 0])[:, None]

    def grouped(params):
        out = logps_of(MODEL, params, first(packed(given, 5, layout=layout, groups=groups)), {"group"})
        return (mix * out.responses.logps).sum(), out

    def one_by_one(params):
        out = logps_of(MODEL, params, first(packed(alone)))
        return (mix[present] * out.chosen).sum(), out

    (_, got), slope = jax.value_and_grad(grouped, has_aux=True)(params)
    (_, wanted), wanted_slope = jax.value_and_grad(one_by_one, has_aux=True)(params)
    np.testing.assert_array_equal(got.responses.present, present)
    np.testing.assert_allclose(got.responses.logps[present], wanted.chosen, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(got.responses.tokens[present], wanted.chosen_tokens)
    np.testing.assert_array_equal(got.responses.scores[0], [4, 3, 2, 1, 0])
    assert not np.asarray(got.responses.logps)[~present].any() and np.isfinite(got.responses.scores).all()
    np.testing.assert_array_equal(got.chosen, got.responses.logps[:, 0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), slope, wanted_slope)
    if layout.prompt:
        np.testing.assert_array_equal(got.prompt_tokens[:4], [len(p) - 1 for p, _, _ in sets])


def test_a_cached_reference_is_that_of_separate_pairs_and_of_groups():
    params, pairs = make_params(), all_pairs([4, 1, 3])
    one, other = (compute(MODEL, params, make_pair_set(pairs, 4, group=group)) for group in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), one, other)
    groups = [
        Pair(p, r[0], r[1], others=tuple(r[2:]), scores=(1.0,) * len(r)) for p, r, _ in (group(0, 4), group(2, 3))
    ]
    data = make_pair_set(groups, 2, layout=Layout(group=True))
    out = compute(MODEL, params, data, needs=frozenset({"group"}))
    batch = first(batch_of(data._replace(reference=out), np.array([1, 0])))
    np.testing.assert_array_equal(batch.reference.responses.logps[0, :3], out.responses.logps[1, :3])
    np.testing.assert_allclose(out.responses.logps[0, 0], one.chosen[0], rtol=2e-5)


# Order


def numbers(data, stop, **options):
    return [batch.index for batch in train_batches(data, seed=0, shuffle=True, start=0, stop=stop, **options)]


def test_pairs_of_a_prompt_come_together_and_each_once_an_epoch():
    pairs = all_pairs([4] * 8)  # 48 pairs
    data = make_pair_set(pairs, 12, group=True)
    batches = numbers(data, 8)
    for epoch in (batches[:4], batches[4:]):
        assert sorted(i for batch in epoch for i in batch.flat) == list(range(48))
    assert all(sorted(np.bincount(batch[0] // 6))[-2:] == [6, 6] for batch in batches)
    assert [batch.tolist() for batch in batches[:4]] != [batch.tolist() for batch in batches[4:]]  # shuffled anew
    parts = numbers(make_pair_set(pairs, 12, group=True, micro_steps=2), 8)
    assert [sorted(x.flat) for x in parts] == [sorted(x.flat) for x in batches]
    assert all(len(set(part // 6)) == 1 for batch in parts for part in batch)
    rest = [x.index for x in train_batches(data, seed=0, shuffle=True, start=5, stop=8)]
    np.testing.assert_array_equal(rest, batches[5:])


def test_prompts_are_shuffled_anew_in_every_epoch():
    data = make_pair_set(all_pairs([3] * 8), 3, group=True)  # a prompt is a batch
    prompts = [int(batch[0, 0]) // 3 for batch in numbers(data, 24, balance=False)]
    epochs = [prompts[:8], prompts[8:16], prompts[16:]]
    assert all(sorted(epoch) == [*range(8)] for epoch in epochs)
    assert len(set(map(tuple, [*epochs, range(8)]))) == 4


@pytest.mark.parametrize("size", [4, 5, 16])
def test_batches_hold_exactly_as_many_pairs_whatever_the_groups(size):
    pairs = all_pairs([4, 2, 5, 3, 3, 1, 2, 6, 2, 2])
    for options in (dict(), dict(balance=False)):
        batches = numbers(make_pair_set(pairs, size, group=True), 3 * len(pairs) // size, **options)
        assert all(batch.shape == (1, size) for batch in batches)
        flat = np.concatenate([batch[0] for batch in batches])[: 3 * len(pairs) // size * size]
        assert np.bincount(flat, minlength=len(pairs)).max() - np.bincount(flat, minlength=len(pairs)).min() <= 2
    shown = [batch.index for batch in eval_batches(make_pair_set(pairs, size, group=True))]
    assert [i for batch in shown for i in batch.flat if i >= 0] == list(range(len(pairs)))


@pytest.mark.parametrize("seed", range(20))
def test_what_belongs_together_is_dealt_whole_where_there_is_room(seed):
    rng = np.random.default_rng(seed)
    bins, capacity = int(rng.integers(1, 6)), int(rng.integers(1, 12))
    things, units = iter(range(bins * capacity)), []
    while part := list(itertools.islice(things, int(rng.integers(1, 9)))):
        units.append(part)
    loads = rng.integers(1, 100, len(units)).tolist()
    dealt = deal_whole(units, loads, bins, capacity)
    assert [len(part) for part in dealt] == [capacity] * bins
    assert sorted(itertools.chain(*dealt)) == list(range(bins * capacity))
    split = sum(len({next(b for b, part in enumerate(dealt) if thing in part) for thing in unit}) - 1 for unit in units)
    assert split <= sum(-(-len(unit) // capacity) - 1 for unit in units) + bins
    assert dealt == deal_whole(units, loads, bins, capacity)


def test_by_default_tokens_are_shared_where_that_saves_some():
    alike, different = all_pairs([4] * 6), make_pairs(36)
    assert make_pair_set(different, 6, group=None).sharing is None
    assert make_pair_set(different, 6, group=True).sharing is not None
    for options in (dict(), dict(groups=2), dict(micro_steps=2), dict(row_length=128)):
        assert make_pair_set(alike, 6, group=None, **options).sharing is not None
    assert make_pair_set(alike, 6).sharing is None


def test_a_batch_always_fits_whatever_it_holds():
    rng = np.random.default_rng(0)
    pairs = [*all_pairs([6, 4, 4]), *make_pairs(10, seed=3, longest=80)]
    for options in (dict(groups=1), dict(groups=3), dict(groups=2, row_length=320)):
        data = make_pair_set(pairs, 9, group=True, **options)
        for _ in range(20):
            batch_of(data, rng.choice(len(pairs), 9, replace=rng.random() < 0.5))


@pytest.mark.parametrize("grouped", [longer(False), True], ids=["pairs", "groups"])
def test_eight_devices_give_what_one_gives_in_value_and_gradient(grouped):
    params, pairs, options, needs = make_params(), all_pairs([4, 3, 4, 2, 3, 4], (0, 0.5, 1)), dict(group=True), ()
    if grouped:
        layout, needs = Layout(group=True), ("group",)
        sets, options = [group(seed, 3 + seed % 3, (0, 1)) for seed in range(6)], dict(layout=layout)
        pairs = [
            Pair(p, r[0], r[1], others=tuple(r[2:]), scores=(1.0,) * len(r), token_weights=tuple(w)) for p, r, w in sets
        ]
    mesh = make_mesh({"data": 4, "fsdp": 2})
    one = first(packed(pairs, 32, **options))
    many = jax.tree.map(lambda x: x[0], place_batch(mesh, packed(pairs, 32, **options, **packing_of(mesh))))
    mix = np.random.default_rng(1).normal(size=(2, 32)).astype(np.float32)

    def value_and_slope(params, batch):
        def total(params):
            out = logps_of(MODEL, params, batch, needs)
            sums = (out.responses.logps[:, 0], out.responses.logps[:, 2]) if grouped else (out.chosen, out.rejected)
            return (mix * jnp.stack(sums)).sum(), out

        (_, out), slope = jax.value_and_grad(total, has_aux=True)(params)
        return jax.device_get((out, slope))

    (got, slope), (wanted, wanted_slope) = (
        value_and_slope(jax.device_put(params, param_shardings(mesh, params)), many),
        value_and_slope(params, one),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), slope, wanted_slope)


def test_a_group_without_scores_is_refused():
    with pytest.raises(
        UserError, match=r"x, row 3: a group of responses has no scores; tokenize them for a loss of groups"
    ):
        make_pair_set([dataclasses.replace(make_pairs(1)[0], where=Place("x", 3))], 1, layout=Layout(group=True))
