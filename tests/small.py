"""Small models and pairs that several tests use, and programs of them that a process compiles once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from prefalign_jax.data.pipeline import batch_of, make_pair_set
from prefalign_jax.data.trees import Layout
from prefalign_jax.logps import preference_logps
from prefalign_jax.models.decoder import DecoderConfig, make_decoder
from prefalign_jax.types import Pair

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    init_std=0.4,
)
# Of CONFIG: gated attention, and a gated delta rule in one layer.
DELTA = dict(attention_gate=True, delta_layers=(True, False), delta_key_heads=2, delta_key_dim=8)
DELTA |= dict(delta_value_heads=4, delta_value_dim=4)
decoder = functools.cache(make_decoder)
MODEL = decoder(CONFIG)


def make_params(seed: int = 0, model=MODEL):
    """Parameters large enough, norms included, that every part of the model matters; arrays of the caller's own."""
    return jax.tree.map(jnp.array, _params(seed, model))


@functools.cache
def _params(seed, model):
    params = model.init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x if x.ndim > 2 else x + 0.2 * rng.normal(size=x.shape).astype(x.dtype), params)


@functools.partial(jax.jit, static_argnames="model")
def hidden_of(model, params, tokens, positions, segments, branches, key=None):
    """The model's hidden states."""
    return model.hidden(params, tokens, positions, segments, branches, key=key)


def logps_of(model, params, batch, needs=(), key=None):
    """`preference_logps` of a batch."""
    return _logps(model, params, batch, frozenset(needs), key)


@functools.partial(jax.jit, static_argnames=("model", "needs"))
def _logps(model, params, batch, needs, key):
    return preference_logps(model, params, batch, needs=needs, key=key)


def make_pairs(count: int, seed: int = 0, longest: int = 12, vocabulary: int = CONFIG.vocab_size) -> list[Pair]:
    """Ragged pairs of random tokens."""
    rng = np.random.default_rng(seed)

    def ids():
        return rng.integers(1, vocabulary, rng.integers(1, longest + 1)).astype(np.int32)

    return [Pair(ids(), ids(), ids()) for _ in range(count)]


def packed(pairs, batch_size=None, **options):
    """One batch of all the pairs."""
    return batch_of(make_pair_set(pairs, batch_size or len(pairs), **options), np.arange(len(pairs)))


def first(batch):
    """The first micro-step of a batch."""
    return jax.tree.map(lambda x: x[0], batch)


FULL = Layout(prompt=True)
ORDINARY = Layout(tree=False, prompt=True)
