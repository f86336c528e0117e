"""Adapters: nothing at first, all that is trained, the same as merged weights; the base is the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conftest import longer
from prefalign_jax.losses import make_loss
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.lora import Lora, init_adapters, join, merge
from prefalign_jax.sharding import groups_of, make_mesh, param_shardings
from prefalign_jax.train_step import init_state, make_train_step
from prefalign_jax.types import UserError
from small import CONFIG, MODEL, first, logps_of, make_pairs, make_params, packed

LORA = Lora(rank=4, alpha=8.0)
ADAPTED = make_decoder(CONFIG, lora=LORA)
BASE, BATCH = make_params(0), first(packed(make_pairs(3)))


def drawn(lora=LORA, seed=1):
    """Adapters whose B is not zero any more."""
    adapters = init_adapters(jax.random.key(seed), BASE, lora)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), adapters)


def chosen_logps(model, params):
    return logps_of(model, params, BATCH).chosen


def test_fresh_dora_changes_nothing_but_rounding():
    lora = Lora(rank=4, dora=True)
    fresh = init_adapters(jax.random.key(0), BASE, lora)
    found = chosen_logps(make_decoder(CONFIG, lora=lora), join(BASE, fresh))
    np.testing.assert_allclose(found, chosen_logps(MODEL, BASE), rtol=1e-4, atol=1e-4)


def test_fresh_adapters_change_nothing_and_without_them_it_is_the_base():
    plain = chosen_logps(MODEL, BASE)
    fresh = init_adapters(jax.random.key(0), BASE, LORA)
    np.testing.assert_array_equal(chosen_logps(ADAPTED, join(BASE, fresh)), plain)
    np.testing.assert_array_equal(chosen_logps(ADAPTED, BASE), plain)
    assert not np.allclose(chosen_logps(ADAPTED, join(BASE, drawn())), plain)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("stabilised", [False, True])
def test_merged_weights_compute_the_same(stabilised, dora):
    lora = Lora(rank=4, alpha=8.0, rank_stabilised=stabilised, dora=dora)
    assert lora.scale == (4.0 if stabilised else 2.0)
    adapters = drawn(lora)
    merged = merge(BASE, adapters, lora)
    assert jax.tree.structure(merged) == jax.tree.structure(BASE)
    with_them = chosen_logps(make_decoder(CONFIG, lora=lora), join(BASE, adapters))
    np.testing.assert_allclose(chosen_logps(MODEL, merged), with_them, rtol=1e-4, atol=1e-4)


def test_the_targets_are_the_linear_layers_that_the_regex_names():
    adapters = init_adapters(jax.random.key(0), BASE, Lora(targets=r"layers/attention/[qv]", rank=2))
    assert adapters.keys() == {"layers"} and adapters["layers"].keys() == {"attention"}
    assert adapters["layers"]["attention"].keys() == {"q", "v"}
    a, b = (adapters["layers"]["attention"]["v"][name] for name in ("lora_a", "lora_b"))
    assert (a.shape, b.shape) == ((2, 16, 2), (2, 2, 16)) and not np.any(b)
    with pytest.raises(UserError, match="matches no linear layer; there are layers/"):
        init_adapters(jax.random.key(0), BASE, Lora(targets="attn"))


DATA, SPLIT = {"data": -1}, {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("dpo", SPLIT), *(longer(*more) for more in (("dpo", DATA), ("orpo", DATA), ("orpo", SPLIT)))],
    ids=str,
)
def test_only_adapters_are_trained_and_have_moments_and_the_base_is_the_reference(name, sizes):
    mesh, optimizer = make_mesh(sizes), optax.adamw(1e-2)
    place = lambda tree: jax.device_put(tree, param_shardings(mesh, tree))  # noqa: E731
    adapters = place(init_adapters(jax.random.key(0), BASE, LORA))
    state = init_state(adapters, optimizer, mesh, place(jax.tree.map(jnp.copy, BASE)))
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    assert size(state.opt_state) < 2 * size(adapters) + 10 < size(BASE)
    step = make_train_step(ADAPTED, make_loss(name), optimizer, mesh)
    batch = packed(make_pairs(4), groups=groups_of(mesh), micro_steps=2)
    losses = []
    for _ in range(6):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    if name == "dpo":
        np.testing.assert_allclose(losses[0], np.log(2), atol=1e-6)
    assert losses[-1] < losses[0] - 0.01
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.reference), jax.device_get(BASE))


def test_the_gradient_is_that_of_the_merged_weights_through_the_chain_rule():
    adapters = drawn()
    grads = jax.jit(jax.grad(lambda a: chosen_logps(ADAPTED, join(BASE, a)).sum()))(adapters)
    wanted = jax.jit(jax.grad(lambda a: chosen_logps(MODEL, merge(BASE, a, LORA)).sum()))(adapters)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4), grads, wanted)


def test_the_kernels_of_experts_take_no_adapters():
    config = dataclasses.replace(CONFIG, num_experts=3, mlp_bias=True, sinks=True)
    shapes = jax.eval_shape(make_decoder(config).init, jax.random.key(0))
    adapters = jax.eval_shape(lambda: init_adapters(jax.random.key(0), shapes, Lora(targets=r"layers/.*")))
    assert adapters["layers"].keys() == {"attention", "experts"} and adapters["layers"]["experts"].keys() == {"router"}
    with pytest.raises(UserError, match="matches no linear layer"):
        init_adapters(jax.random.key(0), shapes, Lora(targets="layers/experts/gate"))
