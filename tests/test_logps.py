import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from prefalign_jax.logps import preference_logps, token_logps
from small import FULL, MODEL, ORDINARY, first, make_pairs, make_params, packed

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
    value, pull = jax.vjp(lambda h, w: token_logps(h, w, TARGETS, chunk), HIDDEN, HEAD)
    expected, expected_pull = jax.vjp(lambda h, w: direct(h, w, TARGETS), HIDDEN, HEAD)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(pull(cotangent), expected_pull(cotangent), strict=True):
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


@pytest.mark.parametrize("layout", [FULL, ORDINARY], ids=["tree", "ordinary"])
@pytest.mark.parametrize("groups", [1, 2])
def test_packed_layouts_equal_one_pair_at_a_time_in_value_and_gradient(layout, groups):
    params, pairs = make_params(), make_pairs(5)
    batch = first(packed(pairs, layout=layout, groups=groups))
    mix = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)

    def total(params):
        out = preference_logps(MODEL, params, batch)
        return sum((w * x).sum() for w, x in zip(mix, (out.chosen, out.rejected, out.prompt), strict=True)), out

    def plain(params):
        sums = [one_by_one(params, pair) for pair in pairs]
        return sum(mix[side, i] * sums[i][side] for i in range(5) for side in range(3)), sums

    (_, got), grads = jax.value_and_grad(total, has_aux=True)(params)
    (_, wanted), plain_grads = jax.value_and_grad(plain, has_aux=True)(params)
    np.testing.assert_allclose(
        np.stack([got.chosen, got.rejected, got.prompt], 1), np.array(wanted), rtol=2e-5, atol=2e-5
    )
    np.testing.assert_array_equal(got.chosen_tokens, [len(pair.chosen) for pair in pairs])
    np.testing.assert_array_equal(got.rejected_tokens, [len(pair.rejected) for pair in pairs])
    np.testing.assert_array_equal(got.prompt_tokens, [len(pair.prompt) - 1 for pair in pairs])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), grads, plain_grads)


def test_the_rejected_response_changes_no_chosen_log_probability():
    params, pairs = make_params(), make_pairs(4)
    flipped = [pair.__class__(pair.prompt, pair.chosen, 60 - pair.rejected) for pair in pairs]
    before, after = (preference_logps(MODEL, params, first(packed(p, layout=FULL))) for p in (pairs, flipped))
    np.testing.assert_array_equal(before.chosen, after.chosen)
    np.testing.assert_array_equal(before.prompt, after.prompt)
    assert (before.rejected != after.rejected).all()


def test_filler_pairs_change_nothing():
    params, pairs = make_params(), make_pairs(3)
    batch = first(packed(pairs, batch_size=5))
    out = preference_logps(MODEL, params, batch)
    np.testing.assert_array_equal(batch.weight, [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(out.chosen_tokens[3:], 0)
    np.testing.assert_allclose(out.chosen[:3], preference_logps(MODEL, params, first(packed(pairs))).chosen, rtol=2e-6)
