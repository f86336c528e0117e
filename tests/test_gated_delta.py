import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import longer
from prefalign_jax.models.gated_delta import causal_convolution, earlier, gated_delta_rule, gated_delta_steps

RNG = np.random.default_rng(0)
HEADS, DK, DV = 3, 8, 5


def row(*parts):
    """(segments, branches) of (segment, branch, tokens)."""
    return tuple(np.concatenate([np.full(part[2], part[i], np.int32) for part in parts]) for i in (0, 1))


# Prompts that end within a chunk, with it or chunks before a branch; a branch without a prompt; padding.
ROWS = [
    row((1, 0, 70), (1, 1, 30), (1, 2, 90), (1, 3, 10), (2, 0, 5), (2, 1, 3), (2, 2, 40), (0, 0, 8)),
    row((1, 0, 20), (1, 1, 100), (1, 2, 70), (2, 1, 10), (2, 2, 9), (3, 0, 20), (3, 1, 1), (3, 2, 26)),
    row((1, 0, 64), (1, 1, 64), (1, 2, 64), (2, 0, 64)),
]
SEGMENTS, BRANCHES = (np.stack(x) for x in zip(*ROWS, strict=True))
SHAPE = SEGMENTS.shape
REAL = SEGMENTS > 0


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


Q = unit(RNG.normal(size=(*SHAPE, HEADS, DK)))
K = unit(RNG.normal(size=(*SHAPE, HEADS, DK)))
V = RNG.normal(size=(*SHAPE, HEADS, DV)).astype(np.float32)
G = -RNG.exponential(0.3, size=(*SHAPE, HEADS)).astype(np.float32)
BETA = RNG.uniform(0.05, 1, size=(*SHAPE, HEADS)).astype(np.float32)
INPUTS = (Q, K, V, G, BETA)


def texts():
    """(row, indices of one text's tokens)"""
    for r, (segments, branches) in enumerate(zip(SEGMENTS, BRANCHES, strict=True)):
        for s in range(1, segments.max() + 1):
            for b in sorted({*branches[segments == s]} - {0}) or [0]:
                yield r, np.flatnonzero((segments == s) & ((branches == 0) | (branches == b)))


def recurrence(q, k, v, g, beta):
    """Eq. 10 of arXiv 2412.06464 for one head, token by token."""

    def token(state, one):
        q, k, v, g, beta = one
        state = jnp.exp(g) * state
        state = state + beta * jnp.outer(k, v - state.T @ k)
        return state, state.T @ q

    return jax.lax.scan(token, jnp.zeros((DK, DV)), (q, k, v, g, beta))[1]


def text_by_text(*inputs):
    out = jnp.zeros((*SHAPE, HEADS, DV))
    for r, at in texts():
        values = jax.vmap(recurrence, in_axes=1, out_axes=1)(*(x[r, at] for x in inputs))
        out = out.at[r, at].set(values)  # a prompt's are the same in each of its texts
    return out


@pytest.mark.parametrize("chunk", [50, 64, *map(longer, (16, 128, 999))])
def test_a_tree_is_every_text_by_itself(chunk):
    found = gated_delta_rule(*map(jnp.asarray, (*INPUTS, SEGMENTS, BRANCHES)), chunk)
    np.testing.assert_allclose(found, text_by_text(*INPUTS), atol=5e-6)
    assert (np.asarray(found)[~REAL] == 0).all()


def test_step_by_step_it_goes_on_from_a_state():
    """A text behind padding, in two parts."""
    (r, at), behind = next(texts()), 5
    real = np.pad(np.ones((1, len(at)), np.int32), ((0, 0), (behind, 0)))
    inputs = [np.pad(x[None, r, at], ((0, 0), (behind, 0), (0, 0)) + ((0, 0),) * (x.ndim - 3), "edge") for x in INPUTS]
    state, found = jnp.zeros((1, HEADS, DK, DV)), []
    for part in (slice(60), slice(60, None)):
        out, state = gated_delta_steps(*(jnp.asarray(x[:, part]) for x in (*inputs, real)), state)
        found.append(out[0])
    np.testing.assert_allclose(np.concatenate(found)[behind:], text_by_text(*INPUTS)[r, at], atol=5e-6)


def test_its_gradients_too():
    weight = RNG.normal(size=(*SHAPE, HEADS, DV)).astype(np.float32)

    def pulled(function):
        return jax.jit(jax.grad(lambda *x: (function(*x) * weight).sum(), range(5)))(*map(jnp.asarray, INPUTS))

    tree = functools.partial(gated_delta_rule, segments=jnp.asarray(SEGMENTS), branches=jnp.asarray(BRANCHES))
    for found, wanted in zip(pulled(tree), pulled(text_by_text), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_the_convolution_reads_a_texts_own_tokens():
    x = RNG.normal(size=(*SHAPE, 6)).astype(np.float32)
    kernel = RNG.normal(size=(4, 6)).astype(np.float32)
    found = np.asarray(causal_convolution(x, kernel, earlier(jnp.asarray(SEGMENTS), jnp.asarray(BRANCHES), 4)))
    for r, at in texts():
        padded = np.pad(x[r, at], ((3, 0), (0, 0)))
        wanted = sum(kernel[i] * padded[3 - i : len(padded) - i] for i in range(4))
        np.testing.assert_allclose(found[r, at], wanted, atol=1e-5)


@pytest.mark.parity
def test_a_text_is_transformers_own():
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    q, k, v, g, beta = (torch.from_numpy(x[2:, :128].copy()) for x in INPUTS)
    wanted, _ = torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta)
    found = gated_delta_rule(*map(jnp.asarray, (Q * DK**-0.5, *INPUTS[1:], SEGMENTS, BRANCHES)))
    np.testing.assert_allclose(found[2, :128], wanted[0].numpy(), atol=5e-6)
