"""Dropout: drawn from the key alone, where it says, in training passes only, and unbiased."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prefalign_jax.logps import policy_and_reference_logps
from prefalign_jax.losses import make_loss
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.dropout import Dropout, drop
from prefalign_jax.models.lora import Lora, init_adapters, join
from prefalign_jax.sharding import groups_of, make_mesh, param_shardings
from prefalign_jax.train_step import init_state, make_eval_step, make_train_step
from small import CONFIG, MODEL, first, hidden_of, logps_of, make_pairs, make_params, packed

PARAMS, BATCH = make_params(0), packed(make_pairs(4))
KEY = jax.random.key(7)
DROPPING = make_decoder(CONFIG, dropout=Dropout(residual=0.2, attention=0.2))
ALL = 1 - 1e-7  # nothing survives such a rate


def hidden(model, params=PARAMS, key=KEY):
    batch = first(BATCH)
    return hidden_of(model, params, batch.tokens, batch.positions, batch.segments, batch.branches, key=key)


def test_the_mean_over_draws_is_what_was_put_in():
    x = jnp.asarray(np.random.default_rng(0).normal(size=8), jnp.float32)
    draws = jax.vmap(lambda key: drop(x, 0.3, key))(jax.random.split(KEY, 20_000))
    np.testing.assert_allclose(draws.mean(0), x, atol=5 * np.sqrt(0.3 / 0.7 / 20_000) * np.abs(x).max())
    assert abs((draws == 0).mean() - 0.3) < 0.005


def test_what_each_rate_drops():
    nothing = make_decoder(CONFIG)
    zeroed = jax.tree.map(lambda x: x, PARAMS)
    zeroed["layers"]["attention"]["o"]["kernel"] *= 0
    attention = hidden(make_decoder(CONFIG, dropout=Dropout(attention=ALL)))
    np.testing.assert_allclose(attention, hidden(nothing, zeroed, None), rtol=1e-4, atol=1e-4)
    assert not hidden(make_decoder(CONFIG, dropout=Dropout(residual=ALL))).any()  # the norm of an empty stream
    lora = Lora(rank=2, dropout=ALL)
    adapters = jax.tree.map(lambda x: x + 0.3, init_adapters(KEY, PARAMS, lora))
    model = make_decoder(CONFIG, lora=lora)
    assert not np.allclose(hidden(model, join(PARAMS, adapters), None), hidden(nothing, key=None), atol=1e-3)
    np.testing.assert_allclose(hidden(model, join(PARAMS, adapters)), hidden(nothing, key=None), rtol=1e-5, atol=1e-5)


def test_the_key_decides_and_without_one_nothing_is_dropped():
    one, again, other = (hidden(DROPPING, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    np.testing.assert_array_equal(hidden(DROPPING, key=None), hidden(MODEL, key=None))
    recomputed = make_decoder(CONFIG, dropout=Dropout(0.2, 0.2), remat="full")
    np.testing.assert_allclose(hidden(recomputed, key=KEY), hidden(DROPPING), rtol=1e-5, atol=1e-5)


def test_layers_and_branches_draw_each_their_own():
    # With one zeroed branch a layer is the identity, so only the drops of the other are left in the difference.
    layers = jax.tree.map(lambda x: jnp.concatenate([x[:1], x[:1]]), PARAMS["layers"])
    params = {**PARAMS, "layers": layers}
    model = make_decoder(CONFIG, dropout=Dropout(residual=0.5))
    for silent in (("attention", "o"), ("mlp", "down")):
        part = jax.tree.map(lambda x: x, params)
        part["layers"][silent[0]][silent[1]]["kernel"] = jnp.zeros_like(
            params["layers"][silent[0]][silent[1]]["kernel"]
        )
        assert not np.allclose(hidden(model, part), hidden(model, part, jax.random.key(8)))
    tokens = jnp.full((1, 6), 3)
    zeros = jnp.zeros_like(tokens)
    out = hidden_of(model, params, tokens, zeros, zeros + 1, zeros, key=KEY)[0]
    assert len(np.unique(np.asarray(out).round(5), axis=0)) == 6  # the same token in the same place, six draws


def test_a_reference_pass_drops_nothing():
    reference, batch = make_params(1), first(BATCH)
    both = jax.jit(functools.partial(policy_and_reference_logps, DROPPING))
    policy, frozen = both(PARAMS, reference, batch, key=KEY)
    np.testing.assert_array_equal(frozen.chosen, logps_of(MODEL, reference, batch).chosen)
    np.testing.assert_array_equal(policy.chosen, logps_of(DROPPING, PARAMS, batch, key=KEY).chosen)
    assert not np.allclose(policy.chosen, logps_of(MODEL, PARAMS, batch).chosen)
    loss = make_loss("dpo")
    plain, dropping = (make_eval_step(model, loss)(PARAMS, reference, BATCH) for model in (MODEL, DROPPING))
    jax.tree.map(np.testing.assert_array_equal, plain, dropping)


MESH = make_mesh({"data": 2}, jax.devices()[:2])
SPREAD = packed(make_pairs(8), groups=groups_of(MESH))


ALONE = make_loss("dpo")
TOGETHER = ALONE._replace(needs=ALONE.needs | {"batch"})


@functools.cache
def step_of(whole_batch, seed):
    return make_train_step(DROPPING, TOGETHER if whole_batch else ALONE, optax.sgd(1.0), MESH, seed=seed)


def update(batch, seed=0, step=0, whole_batch=False):
    """(parameters after one step of SGD, metrics)."""
    place = lambda number: jax.device_put(make_params(number), param_shardings(MESH, make_params(number)))  # noqa: E731
    state = init_state(place(0), optax.sgd(1.0), MESH, place(1))._replace(step=jnp.int32(step))
    state, metrics = step_of(whole_batch, seed)(state, batch)
    return jax.device_get(state.params), {name: float(value) for name, value in metrics.items()}


def test_a_step_is_a_function_of_seed_and_step():
    _, start = update(SPREAD)
    assert update(SPREAD)[1] == start
    assert update(SPREAD, seed=1)[1]["loss"] != start["loss"]
    assert update(SPREAD, step=1)[1]["loss"] != start["loss"]


@pytest.mark.everything
def test_a_loss_of_the_whole_batch_sees_and_differentiates_the_same_draws():
    pairs = make_pairs(16)
    batch = packed(pairs, micro_steps=2, groups=groups_of(MESH))
    (params, metrics), (wanted, expected) = update(batch, whole_batch=True), update(batch)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, wanted)
    # The micro-steps draw apart: two that hold the same pairs do not lose the same.
    twice = packed(pairs[:8] * 2, micro_steps=2, groups=groups_of(MESH))
    halves = jax.tree.map(lambda x: x[:1], twice)
    assert update(twice)[1]["loss"] != update(halves)[1]["loss"]
