"""Counted operations against closed forms."""

import jax
import jax.numpy as jnp
import pytest

from prefalign_jax.cost.flops import count_flops
from prefalign_jax.logps import preference_logps, token_logps
from prefalign_jax.losses import make_loss
from prefalign_jax.models.attention import splash
from prefalign_jax.models.decoder import DecoderConfig, make_decoder
from prefalign_jax.models.lora import Lora, init_adapters
from prefalign_jax.train_step import both_logps
from prefalign_jax.types import TILE
from small import CONFIG, MODEL, first, make_pairs, make_params, packed

X = jnp.ones((6, 4))


def ragged(x, kernels):
    return jax.lax.ragged_dot(x, kernels, jnp.array([1, 2, 3])) ** 2


@pytest.mark.parametrize(
    "function, count",
    [
        (lambda x: x @ x.T, 2 * 6 * 6 * 4),
        (lambda x: jnp.einsum("bij,bkj->bik", x[None], x[None]), 2 * 6 * 6 * 4),
        (lambda x: jax.lax.scan(lambda c, _: (c @ x.T @ x, None), x, None, length=5)[0], 5 * 2 * 2 * 6 * 6 * 4),
        (lambda x: jax.jit(lambda y: y @ x.T)(x), 2 * 6 * 6 * 4),
        (lambda x: jax.value_and_grad(lambda y: (y @ x.T).sum())(x), 2 * 2 * 6 * 6 * 4),
        (lambda x: jax.grad(lambda y: (y @ x.T).sum())(x), 2 * 6 * 6 * 4),  # nobody reads the value
        (lambda x: jax.value_and_grad(jax.checkpoint(lambda y: jnp.sin(y @ x.T).sum()))(x), 3 * 2 * 6 * 6 * 4),
        (lambda x: jax.lax.cond(x.sum() > 0, lambda: x @ x.T, lambda: jnp.zeros((6, 6))), 2 * 6 * 6 * 4),
        (lambda x: ragged(x, jnp.ones((3, 4, 5))), 2 * 6 * 4 * 5),
        (
            lambda x: jax.grad(lambda y, k: ragged(y, k).sum(), argnums=(0, 1))(x, jnp.ones((3, 4, 5))),
            3 * 2 * 6 * 4 * 5,
        ),
        (lambda x: jax.lax.linalg.triangular_solve(jnp.eye(6), x, left_side=True), 6 * 6 * 4),
        (lambda x: jnp.sin(x) + x, 0),
        (
            lambda x: splash(*[x[None, :, None]] * 3, None, scale=1.0),
            0,
        ),  # a kernel's blocks are no count of its products
    ],
)
def test_closed_forms(function, count):
    assert count_flops(function, X) == count


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="unknown length"):
        count_flops(lambda x: jax.lax.while_loop(lambda y: y.sum() > 0, lambda y: y @ x.T @ x, x), X)


def scores(config: DecoderConfig, tiles: int) -> int:
    """Of one of attention's two products in all layers, by hand."""
    return 2 * config.num_layers * tiles * TILE**2 * config.num_heads * config.head_dim


def forward(config: DecoderConfig, rows: int, length: int, tiles: int) -> int:
    """Of the layers alone, by hand."""
    width, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    products = config.hidden_size * (2 * width + 2 * kv + 3 * config.intermediate_size)
    return 2 * config.num_layers * rows * length * products + 2 * scores(config, tiles)


def test_a_decoder_and_its_head():
    batch = first(packed(make_pairs(3)))
    rows, trained = batch.tokens.shape, batch.target.size
    head = 2 * trained * CONFIG.hidden_size * CONFIG.vocab_size
    found = count_flops(lambda params: preference_logps(MODEL, params, batch, chunk=1000), make_params())
    # Each of the vocabulary's chunks is one even share of it; 61 tokens fit in one.
    sums = found - forward(CONFIG, *rows, batch.tiles.shape[1]) - head
    assert sums == 0
    hidden, table = jnp.ones((5, 8)), jnp.ones((20, 8))
    gradient = jax.grad(lambda h, w: token_logps(h, w, jnp.arange(5), 20).sum(), argnums=(0, 1))
    assert count_flops(gradient, hidden, table) == 4 * 2 * 5 * 8 * 20  # the backward pass computes the logits again


@pytest.mark.parametrize("name, reference, units", [("dpo", True, 8), ("dpo", False, 6), ("orpo", False, 6)])
def test_dpo_and_orpo_in_units_of_one_forward_pass_over_one_response(name, reference, units):
    """With backward = 2 forwards: DPO 8 a pair, 6 with cached references, ORPO 6. The heads are kept out by D = 0."""
    model = make_decoder(CONFIG)
    loss, params = make_loss(name), make_params(0)
    batch = first(packed(make_pairs(2)))
    held = (
        batch._replace(reference=preference_logps(model, params, batch)) if name == "dpo" and not reference else batch
    )

    def objective(params):
        frozen = make_params(1) if reference else None
        policy, ref = both_logps(model, loss, params, frozen, held)
        return loss(policy, ref)[0].sum()

    found = count_flops(jax.grad(objective), params)
    once = forward(CONFIG, *batch.tokens.shape, batch.tiles.shape[1])
    # Both are traced again for the backward pass, where XLA drops the second, which nothing reads.
    found -= 2 * scores(CONFIG, batch.tiles.shape[1])
    head = 2 * batch.target.size * CONFIG.hidden_size * CONFIG.vocab_size
    heads = {8: 5, 6: 4}[units]  # forward, logits again and two gradients; one more for the reference
    assert (found - heads * head) / once == pytest.approx(units / 2, rel=0.02)


def test_the_gradients_of_frozen_kernels_are_not_computed():
    """Of the layers' kernels an adapter's gradient takes 2 forward passes where that of all weights takes 3."""
    batch, lora = first(packed(make_pairs(2))), Lora(rank=1)
    model, params = make_decoder(CONFIG, lora=lora), make_params()
    adapters = init_adapters(jax.random.key(0), params, lora)

    def objective(params, model):
        return preference_logps(model, params, batch)[0].sum()

    every = count_flops(jax.value_and_grad(lambda p: objective(p, MODEL)), params)
    few = count_flops(jax.value_and_grad(lambda a: objective(model.join(params, a), model)), adapters)
    kernels = forward(CONFIG, *batch.tokens.shape, 0)
    tables = 2 * batch.target.size * CONFIG.hidden_size * CONFIG.vocab_size  # the head's gradient
    shapes = [leaf.shape for leaf in jax.tree.leaves(adapters)]  # [layers, in, 1] and [layers, 1, out]
    own = 3 * 2 * batch.tokens.size * sum(layers * rows * columns for layers, rows, columns in shapes)
    assert every - few == pytest.approx(kernels + tables - own, rel=0.01)
