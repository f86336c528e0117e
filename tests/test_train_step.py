"""One update: exactly weighted whatever the micro-steps, compiled once, sharded as asked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conftest import longer
from prefalign_jax.data.packing import pack
from prefalign_jax.data.pipeline import make_pair_set
from prefalign_jax.data.trees import Layout
from prefalign_jax.losses import make_loss
from prefalign_jax.reference import mover
from prefalign_jax.sharding import groups_of, make_mesh, param_shardings
from prefalign_jax.train_step import both_logps, init_state, make_eval_step, make_train_step
from small import MODEL, first, make_pairs, make_params, packed

ONE = make_mesh({"data": 2}, jax.devices()[:2])
SGD = optax.sgd(1.0)  # so that the update is the gradient


def weighted(pairs, weights):
    return [pair.__class__(pair.prompt, pair.chosen, pair.rejected, w) for pair, w in zip(pairs, weights, strict=True)]


def state_of(mesh, reference=True, optimizer=SGD, seed=0, running=None):
    return init_state(make_params(seed), optimizer, mesh, make_params(1) if reference else None, running)


def gradient(loss, batch, mesh=ONE):
    """(gradient as a step of SGD at rate 1 takes it, metrics)."""
    state = state_of(mesh, "reference" in loss.needs, running=loss.running)
    before = jax.device_get(state.params)
    state, metrics = make_train_step(MODEL, loss, SGD, mesh)(state, batch)
    return jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params), jax.device_get(metrics)


LOSSES = {
    "dpo": make_loss("dpo", beta=0.5),
    "orpo over the batch's tokens": make_loss("orpo", nll_over="prompt+chosen", nll_mean="batch"),
    # What these compare a pair with is the whole batch, whatever the micro-steps and devices.
    "aot": make_loss("aot", beta=0.5),
    "kto": make_loss("kto", beta=0.5),
    "beta_dpo": make_loss("beta_dpo", beta=0.5, momentum=0.0),
    "alpha_dpo": make_loss("alpha_dpo", momentum=0.0),
    "dr_dpo": make_loss("dr_dpo", beta=0.5),
    "orpo as its authors": make_loss("orpo", nll_over="text", nll_mean="batch", extra_eos=True),
    "a mixture of everything": make_loss("0.8*ld_dpo + 0.2*bco + tdpo2 + wpo + sampo + sft", beta=0.5),
}
# What needs most of the step: the whole batch, whatever the micro-steps.
CORE = ("aot",)


@pytest.mark.parametrize("name", [name if name in CORE else longer(name) for name in LOSSES])
def test_micro_steps_filler_and_unequal_weights_give_the_plain_weighted_mean(name):
    loss = LOSSES[name]
    layout = Layout(prompt="prompt" in loss.needs, after="after" in loss.needs)
    pairs = weighted(make_pairs(5, seed=2), [1.0, 3.0, 0.5, 1.0, 2.0])
    pairs = [dataclasses.replace(pair, label=number % 2 == 0) for number, pair in enumerate(pairs)]
    params, reference = make_params(0), make_params(1) if "reference" in loss.needs else None
    whole = first(packed(pairs, layout=layout))  # one group, no micro-steps, no filler

    def mean(params):
        policy, frozen = both_logps(MODEL, loss, params, reference, whole)
        running = dict(loss.advance(policy._replace(running=loss.running), frozen)) if loss.running else None
        losses, metrics = loss(policy._replace(running=running), frozen)
        return (losses * whole.weight).sum() / whole.weight.sum(), metrics

    (value, metrics), wanted = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    for micro_steps in (1, 3):  # three micro-steps of two pairs, the last with a filler
        batch = packed(pairs, batch_size=6, micro_steps=micro_steps, groups=groups_of(ONE), layout=layout)
        grads, got = gradient(loss, batch)
        np.testing.assert_allclose(got["loss"], value, rtol=1e-5)
        for key, per_pair in metrics.items():
            applies = ~np.isnan(per_pair)
            wanted_mean = np.average(per_pair[applies], weights=whole.weight[applies])
            np.testing.assert_allclose(got[key], wanted_mean, rtol=1e-4, atol=1e-5, err_msg=key)
        np.testing.assert_allclose(got["grad_norm"], optax.tree.norm(wanted), rtol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), grads, wanted)


@pytest.mark.everything
def test_gradients_of_bfloat16_weights_are_added_up_and_measured_in_float32():
    pairs, norms = make_pairs(32), {}
    for dtype, micro_steps in (("float32", 1), ("bfloat16", 1), ("bfloat16", 32)):
        rounded = [optax.tree.cast(optax.tree.cast(make_params(seed), "bfloat16"), dtype) for seed in (0, 1)]
        state = init_state(rounded[0], SGD, ONE, rounded[1])
        batch = packed(pairs, micro_steps=micro_steps, groups=groups_of(ONE))
        _, metrics = make_train_step(MODEL, LOSSES["dpo"], SGD, ONE)(state, batch)
        norms[dtype, micro_steps] = float(metrics["grad_norm"])
    exact = norms.pop(("float32", 1))
    np.testing.assert_allclose(list(norms.values()), exact, rtol=5e-4)


def test_the_order_of_the_pairs_changes_nothing():
    pairs = make_pairs(6, seed=4)
    grads, metrics = gradient(LOSSES["dpo"], packed(pairs, groups=groups_of(ONE)))
    again, metrics_again = gradient(LOSSES["dpo"], packed(pairs[::-1], groups=groups_of(ONE)))
    np.testing.assert_allclose(metrics["loss"], metrics_again["loss"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), grads, again)


def test_equal_policy_and_reference_give_log_2():
    loss = LOSSES["dpo"]
    state = state_of(ONE, seed=1)
    _, metrics = make_train_step(MODEL, loss, SGD, ONE)(state, packed(make_pairs(4), groups=groups_of(ONE)))
    np.testing.assert_allclose(metrics["loss"], np.log(2), atol=1e-6)


def test_the_step_compiles_once_a_shape_and_donates_its_state():
    optimizer = optax.adamw(1e-3)
    pairs = make_pairs(12)
    shapes = make_pair_set(pairs, 4, groups=groups_of(ONE)).shapes[-1:]
    batches = [pack(pairs[i : i + 4], range(4), 4, shapes, groups=groups_of(ONE)) for i in (0, 4, 8)]
    state = state_of(ONE, optimizer=optimizer)
    step = make_train_step(MODEL, LOSSES["dpo"], optimizer, ONE)
    state, _ = step(state, batches[0])
    for batch in batches[1:]:
        old = state
        state, metrics = step(state, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old.opt_state)))
    assert step.jitted(state, batch)._cache_size() == 1
    assert int(state.step) == 3 and np.isfinite(metrics["loss"])


def test_the_reference_stays_as_it_is():
    state = state_of(ONE)
    before = jax.device_get(state.reference)
    state, _ = make_train_step(MODEL, LOSSES["dpo"], SGD, ONE)(state, packed(make_pairs(4), groups=groups_of(ONE)))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.reference))


def test_state_and_moments_keep_their_shardings():
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    optimizer = optax.adamw(1e-3)
    state = state_of(mesh, optimizer=optimizer)
    wanted = param_shardings(mesh, state.params)
    step = make_train_step(MODEL, LOSSES["dpo"], optimizer, mesh)
    after, _ = step(state, packed(make_pairs(4), groups=groups_of(mesh)))
    moments = after.opt_state[0]
    for tree in (after.params, after.reference, moments.mu, moments.nu):
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), tree, wanted))
    assert any(not s.is_fully_replicated for s in jax.tree.leaves(wanted))


def test_evaluation_is_per_pair():
    batch = packed(make_pairs(3), batch_size=4)
    found = make_eval_step(MODEL, LOSSES["dpo"])(make_params(0), make_params(1), batch)
    wanted = both_logps(MODEL, LOSSES["dpo"], make_params(0), make_params(1), first(batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)
    assert found[0].chosen.shape == (4,)


def test_a_needed_reference_that_is_nowhere_is_an_error():
    with pytest.raises(ValueError, match="needs a reference"):
        both_logps(MODEL, LOSSES["dpo"], make_params(), None, first(packed(make_pairs(2))))


def test_bfloat16_activations_keep_the_loss_in_float32():
    from prefalign_jax.models.decoder import make_decoder
    from small import CONFIG

    low = make_decoder(CONFIG, dtype="bfloat16")
    batch = first(packed(make_pairs(3)))
    losses, _ = LOSSES["dpo"](*both_logps(low, LOSSES["dpo"], make_params(0), make_params(1), batch))
    assert losses.dtype == jnp.float32 and np.isfinite(losses).all()


def test_what_a_loss_carries_goes_from_step_to_step_and_micro_steps_count_once():
    loss = make_loss("bco", beta=0.5)
    pairs = make_pairs(6, seed=3)
    shifts = []
    for micro_steps in (1, 3):
        state = state_of(ONE, running=loss.running)
        step = make_train_step(MODEL, loss, SGD, ONE)
        batch = packed(pairs, micro_steps=micro_steps, groups=groups_of(ONE))
        for _ in range(2):
            state, metrics = step(state, batch)
        assert float(state.running["steps"]) == 2
        np.testing.assert_allclose(metrics["bco_shift"], state.running["shift"], rtol=1e-6)
        shifts.append(float(state.running["shift"]))
    np.testing.assert_allclose(*shifts, rtol=1e-3)


@pytest.mark.parametrize("mixup", [1.0, 0.25])
def test_a_moving_reference_follows_the_policy_every_so_many_steps(mixup):
    loss, batch = LOSSES["dpo"], packed(make_pairs(4), groups=groups_of(ONE))
    state = state_of(ONE)
    step = make_train_step(MODEL, loss, optax.sgd(0.1), ONE, move_reference=mover(mixup, 2))
    wanted = jax.device_get(state.reference)
    for number in range(1, 5):
        state, _ = step(state, batch)
        if number % 2 == 0:
            wanted = jax.tree.map(lambda p, r: mixup * np.asarray(p) + (1 - mixup) * r, state.params, wanted)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.reference, wanted)
