import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import longer
from prefalign_jax.data.trees import Layout
from prefalign_jax.models.attention import (
    attend,
    cudnn,
    gathered,
    sequence_attend,
    splash,
    tiled_attend,
    tree_mask,
    tree_tiles,
)
from prefalign_jax.types import Pair
from small import first, make_pairs, packed

SINKS = jnp.array([-1.0, 0.5, 2.0, 0.0, 3.0, -4.0])


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
def test_attend_equals_a_loop_over_heads_and_rows(sinks):
    rng = np.random.default_rng(0)
    rows, length, heads, kv_heads, dim = 2, 5, 6, 2, 4
    q = rng.normal(size=(rows, length, heads, dim))
    k, v = rng.normal(size=(2, rows, length, kv_heads, dim))
    mask = np.tril(rng.random((rows, length, length)) < 0.7) | np.eye(length, dtype=bool)
    wanted = np.zeros_like(q)
    for r in range(rows):
        for h in range(heads):
            for i in range(length):
                seen = np.flatnonzero(mask[r, i])
                scores = k[r, seen, h // 3] @ q[r, i, h] / np.sqrt(dim)
                weights = np.exp(scores) / (np.exp(scores).sum() + (0 if sinks is None else np.exp(sinks[h])))
                wanted[r, i, h] = weights @ v[r, seen, h // 3]
    got = attend(*(jnp.float32(x) for x in (q, k, v)), jnp.asarray(mask), sinks=sinks)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_rejected_token_sees_the_prompt_and_its_own_branch_only():
    #                   prompt  chosen  rejected  next pair  padding
    segments = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 0]])
    branches = np.array([[0, 0, 1, 1, 2, 2, 0, 2, 0]])
    sees = tree_mask(jnp.asarray(segments), jnp.asarray(branches))[0]
    assert [np.flatnonzero(row).tolist() for row in sees] == [
        *[[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [6], [6, 7], [8]],
    ]


@functools.partial(jax.jit, static_argnums=0)
def slopes_and_values(function, q, k, v, sinks=None):
    """(gradients, output) of a function that returns (a sum of its output, the output)."""
    slopes, values = jax.grad(function, (0, 1, 2, 3), has_aux=True)(q, k, v, sinks)
    return jax.tree.leaves(slopes), values


@pytest.mark.parametrize("row_length", [None, 192])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "scale": 0.3}, {"window": 20, "sinks": SINKS}], ids=" ".join)
def test_tile_by_tile_is_the_dense_product_with_its_gradients(row_length, options):
    """Two groups, several rows, scores so large that a tile of another row would overflow."""
    batch = first(packed(make_pairs(9, longest=60), groups=2, row_length=row_length))
    rows, length = batch.tokens.shape
    rng = np.random.default_rng(0)
    q, weight = (jnp.float32(rng.normal(size=(rows, length, 6, 8))) for _ in range(2))
    k, v = (jnp.float32(rng.normal(size=(rows, length, 2, 8))) for _ in range(2))
    k = k.at[0].mul(60.0)
    real = batch.segments > 0
    mask = np.asarray(tree_mask(batch.segments, batch.branches))
    sinks = options.get("sinks")
    options = {name: value for name, value in options.items() if name != "sinks"}
    window = options.get("window")
    if window:
        mask = mask & (batch.positions[:, :, None] - batch.positions[:, None, :] < window)
    tiles = tree_tiles(batch.tiles, batch.segments, batch.branches, batch.positions)

    def weighted(out):
        return (out * weight)[real].sum(), out

    def dense(q, k, v, sinks):
        plain = {name: value for name, value in options.items() if name != "window"}
        return weighted(attend(q, k, v, jnp.asarray(mask), sinks=sinks, **plain))

    def tiled(q, k, v, sinks):
        return weighted(tiled_attend(q, k, v, tiles, sinks=sinks, **options))

    (wanted, plain), (got, out) = (slopes_and_values(f, q, k, v, sinks) for f in (dense, tiled))
    assert len(got) == (3 if sinks is None else 4)
    np.testing.assert_allclose(plain[real], out[real], rtol=1e-5, atol=1e-5)
    assert (np.asarray(out)[~real] == 0).all()
    for one, other in zip(wanted, got, strict=True):
        scale = np.abs(one).max()
        np.testing.assert_allclose(one / scale, other / scale, atol=2e-5)


def test_filler_tiles_reach_no_other_row():
    """They stand for the last block, whose segment 1 here is another pair than the first block's."""
    pairs = make_pairs(2, longest=1)
    long = [
        Pair(*(np.tile(x, n) for x, n in zip((p.prompt, p.chosen, p.rejected), (90, 40, 40), strict=True)))
        for p in pairs
    ]
    batch = first(packed(long, row_length=192))
    assert batch.tokens.shape == (2, 192) and batch.segments[1, -60] == 1
    assert batch.tiles[0, -1].tolist() == [6, 0]
    rng = np.random.default_rng(0)
    q, k, v = (jnp.float32(rng.normal(size=(2, 192, 2, 8))) for _ in range(3))
    k = k.at[0].mul(300.0)
    tiles = tree_tiles(batch.tiles, batch.segments, batch.branches, batch.positions)
    assert not tiles.mask[0, -1].any()
    for gradient in jax.jit(jax.grad(lambda *x: tiled_attend(*x, tiles).sum(), (0, 1, 2)))(q, k, v):
        assert np.isfinite(gradient).all()


@pytest.mark.everything
def test_dropped_weights_of_tiles_leave_the_mean():
    batch = first(packed(make_pairs(4, longest=20)))
    rng = np.random.default_rng(0)
    shape = (*batch.tokens.shape, 4, 8)
    q, k, v = (jnp.float32(rng.normal(size=shape)) for _ in range(3))
    tiles = tree_tiles(batch.tiles, batch.segments, batch.branches, batch.positions)
    keys = jax.random.split(jax.random.key(0), 400)
    drawn = jax.jit(jax.vmap(lambda key: tiled_attend(q, k, v, tiles, dropout=0.3, key=key)))(keys)
    np.testing.assert_allclose(drawn.mean(0), tiled_attend(q, k, v, tiles), atol=0.3)
    assert float(jnp.abs(drawn[0] - drawn[1]).max()) > 0.1


XLA = functools.partial(cudnn, implementation="xla")  # that cuDNN computes the same is for a GPU to show


@pytest.mark.parametrize(
    ("kernel", "layout", "groups", "options"),
    [
        pytest.param(XLA, Layout(), 2, {}, id="as cuDNN"),
        pytest.param(XLA, Layout(tree=False), 1, {}, id="as cuDNN, ordinary"),
        longer(XLA, Layout(rejected=False), 2, {}, id="as cuDNN, chosen alone"),
        pytest.param(splash, Layout(), 2, {}, id="splash"),
        pytest.param(splash, Layout(tree=False), 1, {"softcap": 5.0}, id="splash, soft-capped"),
        pytest.param(
            splash, Layout(), 1, {"window": 20, "windows": (0, 20, 1000), "sinks": SINKS}, id="splash, window"
        ),
        longer(splash, Layout(), 1, {"window": 1000, "windows": (0, 20, 1000)}, id="splash, wide window"),
    ],
)
def test_text_by_text_is_the_dense_product_with_its_gradients(kernel, layout, groups, options):
    """Heads in groups; padding within texts, between them and at the end of rows."""
    batch = first(packed(make_pairs(9, longest=60), groups=groups, layout=layout, attends="sequences"))
    rows, length = batch.tokens.shape
    rng = np.random.default_rng(0)
    q, weight = (jnp.float32(rng.normal(size=(rows, length, 6, 8))) for _ in range(2))
    k, v = (jnp.float32(rng.normal(size=(rows, length, 2, 8))) for _ in range(2))
    real, mask = batch.segments > 0, np.asarray(tree_mask(batch.segments, batch.branches))
    if "window" in options:
        mask = mask & (batch.positions[:, :, None] - batch.positions[:, None, :] < options["window"])
    sequences, sinks = jax.tree.map(jnp.asarray, batch.sequences), options.get("sinks")
    options = {name: value for name, value in options.items() if name != "sinks"}

    def weighted(out):
        return (out * weight)[real].sum(), out

    def dense(q, k, v, sinks):
        return weighted(attend(q, k, v, jnp.asarray(mask), scale=0.3, softcap=options.get("softcap"), sinks=sinks))

    def text_by_text(q, k, v, sinks):
        return weighted(sequence_attend(q, k, v, sequences, kernel=kernel, scale=0.3, sinks=sinks, **options))

    (wanted, plain), (got, found) = (slopes_and_values(f, q, k, v, sinks) for f in (dense, text_by_text))
    np.testing.assert_allclose(found[real], plain[real], rtol=1e-5, atol=1e-5)
    assert (np.asarray(found)[~real] == 0).all()
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(one).max())


@pytest.mark.parametrize("span", [64, 192, 640])
def test_splash_takes_texts_of_any_length(span):
    """In blocks of 128 tokens, of which some are skipped."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.float32(rng.normal(size=(1, span, 2, 8))) for _ in range(3))
    plain = attend(q, k, v, jnp.tril(jnp.ones((1, span, span), bool)), scale=0.3)
    np.testing.assert_allclose(jax.jit(functools.partial(splash, scale=0.3))(q, k, v, None), plain, atol=1e-5)


def test_gathered_sums_and_their_gradient():
    x = jnp.arange(6.0).reshape(1, 3, 2)
    index = jnp.array([[[0, 2, -1, 1], [1, -1, -1, 2]]])  # sums: x0 + x1, x2, nothing, x1 + x2
    inverse = jnp.array([[[0, 0, 1], [-1, 3, 3]]])
    out, pull_back = jax.vjp(lambda x: gathered(x, index, inverse), x)
    np.testing.assert_array_equal(out[0], [[2, 4], [4, 5], [0, 0], [6, 8]])
    np.testing.assert_array_equal(pull_back(jnp.ones_like(out))[0][0], [[1, 1], [2, 2], [2, 2]])
