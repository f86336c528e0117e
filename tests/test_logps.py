import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from prefalign_jax.data.trees import Layout
from prefalign_jax.logps import (
    draws,
    places,
    policy_and_reference_logps,
    token_kl,
    token_logps,
    token_sum_squares,
)
from prefalign_jax.types import CHOSEN, REJECTED, SIDES
from small import FULL, MODEL, ORDINARY, first, hidden_of, logps_of, make_pairs, make_params, packed

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, 7, 8)).astype(np.float32)
HEAD = RNG.normal(size=(29, 8)).astype(np.float32)
TARGETS = RNG.integers(0, 29, (2, 7))


def direct(hidden, head, targets):
    logps = jax.nn.log_softmax(hidden @ head.T)
    return jnp.take_along_axis(logps, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 4, 10, 28, 29, 1000])
def test_chunks_give_the_direct_formula_in_value_and_gradient(chunk):
    cotangent = RNG.normal(size=TARGETS.shape).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_pulled(function, *args):
        value, pull = jax.vjp(function, *args)
        return value, pull(cotangent)

    value, pulled = value_and_pulled(lambda h, w: token_logps(h, w, TARGETS, chunk), HIDDEN, HEAD)
    expected, expected_pulled = value_and_pulled(lambda h, w: direct(h, w, TARGETS), HIDDEN, HEAD)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(pulled, expected_pulled, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_gradient_is_that_of_the_function_in_float64():
    with jax.enable_x64(True):
        args = (jnp.asarray(HIDDEN, jnp.float64), jnp.asarray(HEAD, jnp.float64))
        check_grads(lambda h, w: token_logps(h, w, TARGETS, 10), args, order=1, modes=("rev",))


def test_logits_far_apart_stay_finite_and_never_positive():
    hidden = jnp.float32([[[1e4, 0.0], [-1e4, 0.0], [0.0, 0.0]]])
    head = jnp.float32([[1, 0], [-1, 0], [0.5, 1], [0, 0]])
    value, pull = jax.vjp(lambda h, w: token_logps(h, w, jnp.array([[0, 0, 0]]), 3), hidden, head)
    np.testing.assert_allclose(value, [[0.0, -2e4, -np.log(4)]], rtol=1e-6)
    assert all(np.isfinite(g).all() for g in pull(jnp.ones((1, 3))))


def test_the_logits_are_never_whole_in_memory():
    hidden, head, targets = jnp.ones((64, 8)), jnp.ones((4096, 8)), jnp.zeros(64, jnp.int32)

    def largest(chunk):
        step = jax.jit(jax.grad(lambda h, w: token_logps(h, w, targets, chunk).sum(), (0, 1)))
        return step.lower(hidden, head).compile().memory_analysis().temp_size_in_bytes

    assert largest(256) < 64 * 4096 * 4 < largest(4096)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_gradient_in_bfloat16_is_that_in_float32_to_its_rounding(groups):
    hidden, targets = np.tile(HIDDEN, (groups, 1, 1)), np.tile(TARGETS, (groups, 1))

    def slopes(dtype):
        given = jnp.asarray(hidden, dtype), jnp.asarray(HEAD, dtype)
        return jax.jit(jax.grad(lambda h, w: token_logps(h, w, targets, 10).sum(), (0, 1)))(*given)

    for rounded, exact in zip(slopes("bfloat16"), slopes("float32"), strict=True):
        np.testing.assert_allclose(np.float32(rounded), exact, atol=0.02 * np.abs(exact).max())


def test_bfloat16_sums_in_float32():
    value = token_logps(jnp.asarray(HIDDEN, jnp.bfloat16), HEAD, TARGETS, 10)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, direct(HIDDEN, HEAD, TARGETS), atol=0.1)


@jax.jit
def _plain_logps(params, tokens):
    """[24] log-probabilities of tokens[1:] each given those before it, by the shifted formula, no packing."""
    zeros, positions = jnp.zeros_like(tokens)[None], jnp.arange(tokens.shape[0])[None]
    hidden = MODEL.hidden(params, tokens[None], positions, zeros, zeros)[0]
    return direct(hidden[:-1], MODEL.head(params), tokens[1:])


def one_by_one(params, pair):
    """Sums over one response at a time; what pads the sequence comes after it and is not counted."""
    size = len(pair.prompt)
    sides = []
    for response in (pair.chosen, pair.rejected):
        ids = np.concatenate([pair.prompt, response])
        logps = _plain_logps(params, np.pad(ids, (0, 25 - len(ids))))
        sides.append(logps[size - 1 : len(ids) - 1].sum())
    return (*sides, logps[: size - 1].sum())


@functools.cache
def alone(mix):
    """The three sums of each of five pairs one by one, and the gradient of their sum as mixed."""

    def total(params):
        sums = [one_by_one(params, pair) for pair in make_pairs(5)]
        return sum(
            w * x for w, x in zip(mix, [sums[i][side] for side in range(3) for i in range(5)], strict=True)
        ), sums

    (_, sums), grads = jax.value_and_grad(total, has_aux=True)(make_params())
    return sums, grads


@pytest.mark.parametrize("layout", [FULL, ORDINARY], ids=["tree", "ordinary"])
@pytest.mark.parametrize("groups", [1, 2])
def test_packed_layouts_equal_one_pair_at_a_time_in_value_and_gradient(layout, groups):
    params, pairs = make_params(), make_pairs(5)
    batch = first(packed(pairs, layout=layout, groups=groups))
    mix = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)

    def total(params):
        out = logps_of(MODEL, params, batch)
        return sum((w * x).sum() for w, x in zip(mix, (out.chosen, out.rejected, out.prompt), strict=True)), out

    (_, got), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    wanted, plain_grads = alone(tuple(mix.ravel()))
    np.testing.assert_allclose(
        np.stack([got.chosen, got.rejected, got.prompt], 1), np.array(wanted), rtol=2e-5, atol=2e-5
    )
    np.testing.assert_array_equal(got.chosen_tokens, [len(pair.chosen) for pair in pairs])
    np.testing.assert_array_equal(got.rejected_tokens, [len(pair.rejected) for pair in pairs])
    np.testing.assert_array_equal(got.prompt_tokens, [len(pair.prompt) - 1 for pair in pairs])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), grads, plain_grads)


def with_weights(pairs, values, seed=0):
    """The pairs with a weight for each token of their responses, drawn from `values`; some have none."""
    rng = np.random.default_rng(seed)
    weights = ((rng.choice(values, len(ids)) for ids in (pair.chosen, pair.rejected)) for pair in pairs)
    return [
        dataclasses.replace(pair, token_weights=tuple(map(np.float32, one))) if i else pair
        for i, (pair, one) in enumerate(zip(pairs, weights, strict=True))
    ]


@pytest.mark.parametrize("values", [(0, 1), (0, 0.5, 1, 2.5)], ids=["masks", "weights"])
@pytest.mark.parametrize("layout", [FULL, ORDINARY], ids=["tree", "ordinary"])
def test_each_token_counts_by_its_weight_and_is_read_in_any_case(layout, values):
    params, pairs = make_params(), with_weights(make_pairs(5), values)

    def plain(params):
        sums = []
        for pair in pairs:
            for ids, weights in zip(pair.responses, pair.token_weights or (None, None), strict=True):
                text = np.concatenate([pair.prompt, ids])
                logps = _plain_logps(params, np.pad(text, (0, 25 - len(text))))[len(pair.prompt) - 1 : len(text) - 1]
                sums.append((logps if weights is None else weights * logps).sum())
        return jnp.stack(sums).reshape(-1, 2)

    batch = first(packed(pairs, layout=layout, groups=2))
    assert (batch.token_weight is None) == (set(values) == {0, 1})
    mix = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32)

    def total(params):
        out = logps_of(MODEL, params, batch)
        return (mix * jnp.stack([out.chosen, out.rejected], 1)).sum(), out

    (_, got), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    wanted, wanted_slope = plain(params), jax.grad(lambda params: (mix * plain(params)).sum())(params)
    np.testing.assert_allclose(np.stack([got.chosen, got.rejected], 1), wanted, rtol=2e-5, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), slope, wanted_slope)
    for side, counts in enumerate((got.chosen_tokens, got.rejected_tokens)):
        given = [(pair.responses[side], pair.weights(side)) for pair in pairs]
        np.testing.assert_allclose(counts, [len(ids) if x is None else x.sum() for ids, x in given], rtol=1e-6)
    np.testing.assert_array_equal(got.prompt_tokens, [len(pair.prompt) - 1 for pair in pairs])


def test_the_rejected_response_changes_no_chosen_log_probability():
    params, pairs = make_params(), make_pairs(4)
    flipped = [pair.__class__(pair.prompt, pair.chosen, 60 - pair.rejected) for pair in pairs]
    before, after = (logps_of(MODEL, params, first(packed(p, layout=FULL))) for p in (pairs, flipped))
    np.testing.assert_array_equal(before.chosen, after.chosen)
    np.testing.assert_array_equal(before.prompt, after.prompt)
    assert (before.rejected != after.rejected).all()


def test_filler_pairs_change_nothing():
    params, pairs = make_params(), make_pairs(3)
    batch = first(packed(pairs, batch_size=5))
    out = logps_of(MODEL, params, batch)
    np.testing.assert_array_equal(batch.weight, [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(out.chosen_tokens[3:], 0)
    np.testing.assert_allclose(out.chosen[:3], logps_of(MODEL, params, first(packed(pairs))).chosen, rtol=2e-6)


# What some losses need besides


REF_HIDDEN = RNG.normal(size=HIDDEN.shape).astype(np.float32)
REF_HEAD = RNG.normal(size=HEAD.shape).astype(np.float32)


def direct_kl(hidden, head, ref_hidden, ref_head):
    logps, ref = jax.nn.log_softmax(hidden @ head.T), jax.nn.log_softmax(ref_hidden @ ref_head.T)
    return (jnp.exp(ref) * (ref - logps)).sum(-1)


@pytest.mark.parametrize("chunk", [4, 29])
def test_token_kl_is_the_direct_formula_in_value_and_gradient_and_gives_the_reference_none(chunk):
    args = (HIDDEN, HEAD, REF_HIDDEN, REF_HEAD)
    cotangent = RNG.normal(size=TARGETS.shape).astype(np.float32)
    value, pull = jax.vjp(lambda *a: token_kl(*a, chunk), *args)
    expected, expected_pull = jax.vjp(direct_kl, *args)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    got, wanted = pull(cotangent), expected_pull(cotangent)
    for one, other in zip(got[:2], wanted[:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert not np.any(got[2]) and not np.any(got[3])
    np.testing.assert_allclose(token_kl(HIDDEN, HEAD, HIDDEN, HEAD, chunk), 0.0, atol=2e-6)


@pytest.mark.parametrize("chunk", [4, 29])
def test_token_sum_squares_is_the_direct_formula(chunk):
    expected = np.log(np.square(jax.nn.softmax(HIDDEN @ HEAD.T)).sum(-1))
    np.testing.assert_allclose(token_sum_squares(HIDDEN, HEAD, chunk), expected, rtol=1e-5, atol=1e-6)
    uniform = token_sum_squares(np.zeros((1, 8), np.float32), HEAD, chunk)
    np.testing.assert_allclose(uniform, -np.log(29), rtol=1e-6)
    assert not np.any(jax.grad(lambda h: token_sum_squares(h, HEAD, chunk).sum())(HIDDEN))


def per_token(params, pair, response):
    """Log-probabilities of the response's tokens, one by one."""
    ids = np.concatenate([pair.prompt, response])
    return np.asarray(_plain_logps(params, np.pad(ids, (0, 25 - len(ids)))))[len(pair.prompt) - 1 : len(ids) - 1]


@pytest.mark.parametrize("layout", [Layout(), Layout(tree=False)], ids=["tree", "ordinary"])
@pytest.mark.parametrize("groups", [1, 2])
def test_shared_and_sampled_sums_take_as_many_tokens_as_the_shorter_response_has(layout, groups):
    params, pairs = make_params(), make_pairs(6)
    batch = first(packed(pairs, layout=layout, groups=groups))
    out = logps_of(MODEL, params, batch, needs={"shared", "sampled"})
    slot, place, draw = batch.slot.reshape(-1), np.asarray(places(batch)), np.asarray(draws(batch))
    for number, pair in enumerate(pairs):
        size = min(len(pair.chosen), len(pair.rejected))
        for side, response in ((CHOSEN, pair.chosen), (REJECTED, pair.rejected)):
            logps = per_token(params, pair, response)
            mine = slot == SIDES * number + side
            assert sorted(draw[mine]) == sorted(place[mine]) == list(range(len(response)))  # a shuffle
            np.testing.assert_allclose(out.shared[side][number], logps[:size].sum(), rtol=1e-4, atol=1e-5)
            chosen = np.argsort(place[mine])[draw[mine][np.argsort(place[mine])] < size]
            wanted = logps[np.sort(place[mine][chosen])].sum() if len(chosen) else 0.0
            np.testing.assert_allclose(out.sampled[side][number], wanted, rtol=1e-4, atol=1e-5)


def test_the_tokens_drawn_depend_on_the_pair_alone_and_not_on_its_batch():
    params, pairs = make_params(), make_pairs(6)
    batch = first(packed(pairs))
    whole = logps_of(MODEL, params, batch, needs={"sampled"})
    other = batch._replace(index=batch.index + 6)
    again = logps_of(MODEL, params, other, needs={"sampled"})
    assert not np.allclose(whole.sampled.chosen, again.sampled.chosen)  # other pairs draw otherwise
    turned = first(packed(pairs[::-1], groups=2))
    turned = turned._replace(index=batch.index[::-1].copy())
    moved = logps_of(MODEL, params, turned, needs={"sampled"})
    np.testing.assert_allclose(moved.sampled.chosen[::-1], whole.sampled.chosen, rtol=1e-4, atol=1e-5)


def test_every_place_of_a_response_is_drawn_equally_often():
    pairs = [p.__class__(p.prompt[:1], np.arange(1, 9, dtype=np.int32), p.rejected[:1]) for p in make_pairs(400)]
    batch = first(packed(pairs))
    place, draw, side = np.asarray(places(batch)), np.asarray(draws(batch)), batch.slot.reshape(-1) % SIDES
    drawn = place[(side == CHOSEN) & (draw < 1) & (batch.slot.reshape(-1) < SIDES * 400)]
    counts = np.bincount(drawn, minlength=8)
    assert counts.sum() == 400 and (np.square(counts - 50) / 50).sum() < 24.3  # chi-squared, 7 degrees, p = 0.001


@pytest.mark.parametrize("layout", [Layout(prompt=True, after=True), Layout(False, prompt=True, after=True)], ids=str)
def test_one_more_end_token_is_predicted_after_each_response_and_the_text_leaves_such_tokens_out(layout):
    params, eos = make_params(), 7
    pairs = [
        p.__class__(p.prompt, np.append(p.chosen, eos), np.append(p.rejected, eos).astype(np.int32))
        for p in make_pairs(5, longest=8)
    ]
    pairs[0] = pairs[0].__class__(np.array([3, eos, 4, eos, 5], np.int32), pairs[0].chosen, pairs[0].rejected)
    batch = first(packed(pairs, layout=layout))
    out = logps_of(MODEL, params, batch, needs={"after", "prompt"})
    for number, pair in enumerate(pairs):
        for side, response in ((0, pair.chosen), (1, pair.rejected)):
            with_eos = per_token(params, pair, np.append(response, eos).astype(np.int32))
            np.testing.assert_allclose(out[side][number], with_eos[:-1].sum(), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(out.after[side][number], with_eos[-1], rtol=1e-4, atol=1e-5)
        ids = np.concatenate([pair.prompt, pair.chosen])
        logps = per_token(params, pair.__class__(ids[:1], ids[1:], ids[1:]), ids[1:])
        np.testing.assert_allclose(out.text[number], logps[ids[1:] != eos].sum(), rtol=1e-4, atol=1e-5)
        assert out.text_tokens[number] == (ids[1:] != eos).sum()
        assert out.chosen_tokens[number] == len(pair.chosen)


def test_policy_and_reference_come_with_their_divergence_and_the_reference_gets_no_gradient():
    params, reference, pairs = make_params(0), make_params(1), make_pairs(4)
    batch = first(packed(pairs))
    needs = {"token_kl", "sum_squares"}
    both = jax.jit(functools.partial(policy_and_reference_logps, MODEL, needs=needs))
    policy, frozen = both(params, reference, batch)
    np.testing.assert_allclose(policy.chosen, logps_of(MODEL, params, batch).chosen, rtol=1e-6)
    np.testing.assert_allclose(frozen.rejected, logps_of(MODEL, reference, batch).rejected, rtol=1e-6)
    rows = batch.tokens, batch.positions, batch.segments, batch.branches
    hidden, other = (hidden_of(MODEL, p, *rows).reshape(-1, 16)[batch.source[0]] for p in (params, reference))
    kl = np.asarray(direct_kl(hidden, MODEL.head(params), other, MODEL.head(reference)))
    squares = np.log(np.square(jax.nn.softmax(hidden @ MODEL.head(params).T)).sum(-1))
    for side in (CHOSEN, REJECTED):
        mine = batch.slot[0] % SIDES == side
        for values, found in ((kl, policy.token_kl[side]), (squares, policy.sum_squares[side])):
            wanted = [values[mine & (batch.slot[0] // SIDES == number)].sum() for number in range(4)]
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)

    def total(reference):
        policy, frozen = both(params, reference, batch)
        return policy.token_kl.chosen.sum() + frozen.chosen.sum()

    assert all(not np.any(g) for g in jax.tree.leaves(jax.jit(jax.grad(total))(reference)))
