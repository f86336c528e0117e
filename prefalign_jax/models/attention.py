"""Attention over packed tree rows: who sees whom, and grouped-query products: dense, tile by tile, text by text."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prefalign_jax.models.dropout import drop
from prefalign_jax.types import TILE, Sequences


def tree_mask(segments: jax.Array, branches: jax.Array) -> jax.Array:
    """Which token sees which: causal, within a segment, from a branch to itself and to the shared prompt (branch 0).

    Args:
      segments: [R, L] int32; padding is segment 0 and sees only padding, so that no softmax is empty.
      branches: [R, L] int32.

    Returns:
      [R, L, L] bool, True where token i (second axis) attends to token j (third axis).

    Example:
      One pair, a prompt of one token and two tokens on each branch: the rejected tokens skip the chosen ones.

      >>> mask = tree_mask(jnp.array([[1, 1, 1, 1, 1]]), jnp.array([[0, 1, 1, 2, 2]]))
      >>> print(mask[0].astype(int))
      [[1 0 0 0 0]
       [1 1 0 0 0]
       [1 1 1 0 0]
       [1 0 0 1 0]
       [1 0 0 1 1]]
    """
    length = segments.shape[1]
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    same_segment = segments[:, :, None] == segments[:, None, :]
    visible = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    return causal & same_segment & visible


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale q k') v with the softmax in float32.

    Args:
      q: [R, L, heads, d].
      k, v: [R, L, kv_heads, d]; consecutive groups of heads / kv_heads query heads share one.
      mask: [R, L, L] bool.
      scale: None is d^-1/2.
      softcap: c; scores x become c tanh(x / c), None leaves them.
      sinks: [heads]; one more score of every token, whose weight reads no value, so that the others sum to less than 1.
      dropout, key: of the weights; see `drop`.

    Returns:
      [R, L, heads, d] in q's type.

    Source: sinks: gpt-oss model card, arXiv 2508.10925, section 2.2.
    """
    rows, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(rows, length, kv_heads, heads // kv_heads, dim) * (dim**-0.5 if scale is None else scale)
    scores = jnp.einsum("rikgd,rjkd->rkgij", q, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]]
    weights = drop(weights.astype(v.dtype), dropout, key)
    return jnp.einsum("rkgij,rjkd->rikgd", weights, v).reshape(rows, length, heads, dim)


class Tiles(NamedTuple):
    """The parts of the [L, L] matrix of who sees whom that are not empty, TILE by TILE tokens each.

    Attributes:
      query, key: [G, A] int32, blocks of TILE tokens, counted through the rows of a group; a query block beyond the
        last marks filler.
      mask: [G, A, TILE, TILE] bool.
      distance: [G, A, TILE, TILE] int32, of positions, for layers with a window.
    """

    query: jax.Array
    key: jax.Array
    mask: jax.Array
    distance: jax.Array


def tree_tiles(tiles: jax.Array, segments: jax.Array, branches: jax.Array, positions: jax.Array) -> Tiles:
    """`tree_mask` where it is not empty; padding sees nothing.

    Args:
      tiles: [G, A, 2] int32 as in `PreferenceBatch`.
      segments, branches, positions: [R, L] int32.

    Returns:
      The `Tiles`.
    """
    groups = tiles.shape[0]
    query, key = tiles[..., 0], tiles[..., 1]
    blocks = segments.reshape(groups, -1, TILE).shape[1]
    order = jnp.broadcast_to(jnp.arange(blocks * TILE).reshape(blocks, TILE), (groups, blocks, TILE))

    def pair(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.reshape(groups, blocks, TILE)
        return _blocks(x, query)[..., :, None], _blocks(x, key)[..., None, :]

    (segment, other_segment), (branch, other_branch), (place, other_place), (at, other_at) = map(
        pair, (segments, branches, order, positions)
    )
    real = (query < blocks)[..., None, None]  # filler stands for the last block, of whatever row
    mask = real & (segment == other_segment) & (segment > 0) & (place >= other_place)
    return Tiles(query, key, mask & ((other_branch == 0) | (branch == other_branch)), at - other_at)


def _blocks(x: jax.Array, index: jax.Array) -> jax.Array:
    """[G, blocks, ...] and [G, A] -> [G, A, ...]."""
    return jax.vmap(lambda one, at: jnp.take(one, at, axis=0, mode="clip"))(x, index)


def tiled_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tiles: Tiles,
    *,
    window: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """As `attend`, computed where there is something to see: tiles of scores, their softmax joined by query block.

    The backward pass computes the scores again, so a layer keeps no more than its q, k and v.

    Args:
      q: [R, L, heads, d], L a multiple of TILE.
      k, v: [R, L, kv_heads, d].
      tiles: who sees whom.
      window: [] int32, positions that a token sees, itself included; 0 or None for all.
      scale, softcap, sinks, dropout, key: as in `attend`.

    Returns:
      [R, L, heads, d] in q's type; 0 where a token sees nothing.
    """
    rows, length, heads, dim = q.shape
    groups, kv_heads = tiles.query.shape[0], k.shape[2]
    share, blocks = heads // kv_heads, rows * length // groups // TILE

    def by_block(x: jax.Array) -> jax.Array:
        """[R, L, h, d] -> [G, blocks, kv_heads, h / kv_heads * TILE, d], of which whole blocks are multiplied."""
        x = x.reshape(groups, blocks, TILE, kv_heads, -1, dim).transpose(0, 1, 3, 4, 2, 5)
        return x.reshape(groups, blocks, kv_heads, -1, dim)

    def by_query(values: jax.Array) -> jax.Array:
        """Sums over the tiles of each query block."""
        total = functools.partial(jax.ops.segment_sum, num_segments=blocks, indices_are_sorted=True)
        return jax.vmap(total)(values, tiles.query)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attended(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
        q, k, v = _blocks(q, tiles.query), _blocks(k, tiles.key), _blocks(v, tiles.key)
        scores = jnp.einsum("gnkad,gnkcd->gnkac", q, k, preferred_element_type=jnp.float32)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        mask = tiles.mask if window is None else tiles.mask & ((window == 0) | (tiles.distance < window))
        mask = jnp.broadcast_to(mask[:, :, None, None], (*scores.shape[:3], share, TILE, TILE)).reshape(scores.shape)
        top = jnp.where(mask, scores, jnp.finfo(jnp.float32).min).max(-1)
        most = functools.partial(jax.ops.segment_max, num_segments=blocks, indices_are_sorted=True)
        top = jax.vmap(most)(jax.lax.stop_gradient(top), tiles.query)
        if sinks is not None:
            sink = jnp.repeat(sinks.astype(jnp.float32).reshape(1, 1, kv_heads, share), TILE, axis=-1)
            top = jnp.maximum(top, jax.lax.stop_gradient(sink))
            of_sink = jnp.exp(sink - top)
        top = _blocks(top, tiles.query)
        weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - top[..., None], 0.0)), 0.0)
        total = by_query(weights.sum(-1))
        total = total if sinks is None else total + of_sink
        weights = drop(weights, dropout, key).astype(v.dtype)
        out = by_query(jnp.einsum("gnkac,gnkcd->gnkad", weights, v, preferred_element_type=jnp.float32))
        return (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(q.dtype)

    q = by_block(q * (dim**-0.5 if scale is None else scale))
    out = attended(q, by_block(k), by_block(v), sinks).reshape(groups, blocks, kv_heads, share, TILE, dim)
    return out.transpose(0, 1, 4, 2, 3, 5).reshape(rows, length, heads, dim)


@jax.custom_vjp
def gathered(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Sums of things taken from other places; its gradient is the like, so nothing is ever added up in memory.

    Args:
      x: [G, P, ...].
      index: [G, K, Q] int32, which K of the P things each of Q sums has; -1 for none.
      inverse: [G, J, P] int32, which sums each thing is in.

    Returns:
      [G, Q, ...].
    """
    return _gathered(x, index)


def _gathered(x: jax.Array, index: jax.Array) -> jax.Array:
    def one(part: jax.Array) -> jax.Array:
        present = (part >= 0).reshape(*part.shape, *(1,) * (x.ndim - 2))
        return jnp.where(present, _blocks(x, part), jnp.zeros((), x.dtype))

    return functools.reduce(jnp.add, (one(index[:, k]) for k in range(index.shape[1])))


gathered.defvjp(
    lambda x, index, inverse: (_gathered(x, index), inverse),
    lambda inverse, slopes: (_gathered(slopes, inverse), None, None),
)


def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, scale: float, implementation: str = "cudnn"
) -> jax.Array:
    """NVIDIA's kernel. 'xla' for `implementation` computes the same anywhere, and writes scores to memory.

    Args:
      q: [N, S, heads, d], in bfloat16 for cuDNN, with d at most 128 and a multiple of 8.
      k, v: [N, S, kv_heads, d].
      lengths: [N] int32, tokens of each text; padding follows them.
      scale: of the scores.

    Returns:
      [N, S, heads, d] in q's type; anything for padding.
    """
    options = dict(scale=scale, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    return jax.nn.dot_product_attention(q, k, v, **options, implementation=implementation)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    window: jax.Array | None = None,
    windows: tuple[int, ...] = (),
    sinks: jax.Array | None = None,
    deal: Callable[..., jax.Array] = lambda kernel, *args: kernel(*args),
) -> jax.Array:
    """JAX's kernel for TPUs. On another device Pallas interprets it: the same numbers, for tests, very slowly.

    Blocks of 128 to 512 tokens that lie above the diagonal, or beyond a window, are skipped; those of padding are not.

    Args:
      q, k, v, lengths, scale: as in `cudnn`, of any type and head size; the lengths are not needed.
      softcap: as in `attend`.
      window: [] int32, as in `tiled_attend`: one of `windows`, or 0.
      windows: all that the model has, since a kernel is compiled for each.
      sinks: as in `attend`.
      deal: (kernel, q, k, v, *sinks) -> kernel(q, k, v, *sinks), by which devices do their share: XLA cannot divide a
        kernel.

    Returns:
      [N, S, heads, d] in q's type; anything for padding.
    """
    # Imported here, since it takes time that nothing else needs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    span = q.shape[1]
    padded = span + -span % 128
    block = math.gcd(padded, 512)

    def kernel(window: int, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
        shape = (padded, padded)
        mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
        run = kernels.make_splash_mha_single_device(
            masks.MultiHeadMask([mask] * q.shape[2]),
            block_sizes=kernels.BlockSizes(*[block] * 8),
            attn_logits_soft_cap=softcap,
            interpret=jax.default_backend() != "tpu",
        )
        run = jax.vmap(functools.partial(run, sinks=sinks))
        return jnp.moveaxis(run(*(jnp.moveaxis(x, 1, 2) for x in (q, k, v))), 2, 1)

    # A text that fits into a window is seen whole.
    distinct = (0, *sorted({one for one in windows if 0 < one < span}))
    branches = [functools.partial(deal, functools.partial(kernel, one)) for one in distinct]
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - span), (0, 0), (0, 0))) for x in (q * scale, k, v))
    which = 0 if window is None else jnp.argmax(jnp.array(distinct) == window)
    return jax.lax.switch(which, branches, q, k, v, *(() if sinks is None else (sinks,)))[:, :span]


KERNELS = {"cudnn": cudnn, "splash": splash}


def sequence_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sequences: Sequences,
    *,
    kernel: Callable[..., jax.Array],
    scale: float | None = None,
    sinks: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """As `attend`, text by text in a fused kernel for causal, padded sequences, which never writes scores to memory.

    Attention alone so sees a pair's prompt twice; everything before and after it is computed for the packed tokens. The
    backward pass computes all of it again, so a layer keeps no more than its q, k and v.

    Args:
      q: [R, L, heads, d].
      k, v: [R, L, kv_heads, d].
      sequences: the batch's.
      kernel: one of KERNELS.
      scale: None is d^-1/2.
      sinks: as in `attend`, of a kernel that takes them.
      **options: of the kernel.

    Returns:
      [R, L, heads, d] in q's type; 0 for padding.
    """
    groups, count, span = sequences.index.shape
    index = sequences.index.reshape(groups, 1, -1)
    place = jnp.moveaxis(sequences.place, -1, 1)
    # A prompt's tokens are read in the first text that has them.
    own = functools.reduce(lambda first, then: jnp.where(first >= 0, first, then), jnp.split(place, place.shape[1], 1))
    read = _blocks(own[:, 0], index[:, 0]) == jnp.arange(count * span)[None]
    lengths = jnp.maximum(jnp.sum(sequences.index >= 0, axis=-1, dtype=jnp.int32), 1).reshape(-1)
    options["scale"] = q.shape[-1] ** -0.5 if scale is None else scale

    def spread(x: jax.Array) -> jax.Array:
        """[R, L, h, d] -> [G N, S, h, d]."""
        x = gathered(x.reshape(groups, -1, *x.shape[2:]), index, place)
        return x.reshape(groups * count, span, *x.shape[2:])

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attended(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
        more = {} if sinks is None else {"sinks": sinks}
        out = kernel(*map(spread, (q, k, v)), lengths, **options, **more)
        out = out.reshape(groups, count * span, *out.shape[2:])
        return gathered(out, own, jnp.where(read[:, None], index, -1)).reshape(q.shape)

    return attended(q, k, v, sinks)
