"""Hidden states -> per-token -> per-response log-probabilities, the vocabulary in chunks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from prefalign_jax.types import CHOSEN, PROMPT, REJECTED, LanguageModel, PairLogps, Params, PreferenceBatch

VOCABULARY_CHUNK = 8192  # columns of logits in memory at once


def _chunks(vocabulary: int, chunk: int) -> tuple[int, int]:
    """(number of chunks, columns in each), as even as can be."""
    count = -(-vocabulary // chunk)
    return count, -(-vocabulary // count)


def _logits(hidden, head, index, chunk):
    """Chunk `index` of the logits, its first column, and its rows of the head.

    The last chunk starts early rather than run over the end; columns that belong to the chunk before it are -inf.
    """
    vocabulary = head.shape[0]
    _, columns = _chunks(vocabulary, chunk)
    start = jnp.minimum(index * columns, vocabulary - columns)
    rows = jax.lax.dynamic_slice_in_dim(head, start, columns).astype(hidden.dtype)
    logits = jnp.einsum(
        "...d,vd->...v", hidden, rows, preferred_element_type=jnp.promote_types(hidden.dtype, "float32")
    )
    fresh = start + jnp.arange(columns) >= index * columns
    return jnp.where(fresh.reshape((1,) * (logits.ndim - 1) + (-1,)), logits, -jnp.inf), start, rows


def _one_hot(targets, start, columns):
    return (targets - start)[..., None] == jnp.arange(columns).reshape((1,) * targets.ndim + (-1,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_logps(hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk: int = VOCABULARY_CHUNK) -> jax.Array:
    """log softmax(hidden head')[target], never holding more than `chunk` columns of logits.

    The forward pass keeps a running maximum and sum over the chunks; the backward pass computes the logits again.
    Differentiable in reverse mode, once.

    Args:
      hidden: [..., D].
      head: [V, D] output embedding, cast to hidden's type for the product; sums are float32 at least.
      targets: [...] int32 in [0, V).
      chunk: columns of logits at once.

    Returns:
      [...] float32, at most 0.

    Example:
      >>> import numpy as np
      >>> h, w = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
      >>> np.testing.assert_allclose(
      ...     token_logps(h, w, jnp.array([0, 1]), 2), [1 - np.log(np.e + 2), 2 - np.log(np.e**2 + 2)], rtol=1e-6)
    """
    return _forward(hidden, head, targets, chunk)[0]


def _forward(hidden, head, targets, chunk):
    count, columns = _chunks(head.shape[0], chunk)

    def visit(carry, index):
        top, total, at_target = carry
        logits, start, _ = _logits(hidden, head, index, chunk)
        new_top = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[..., None]).sum(-1)
        mine = _one_hot(targets, start, columns) & (logits > -jnp.inf)
        at_target = at_target + jnp.where(mine, logits, 0.0).sum(-1)
        return (new_top, total, at_target), None

    kind = jnp.promote_types(hidden.dtype, "float32")
    # A finite floor in place of -inf: the first rescaling would else compute exp(-inf + inf).
    zeros = jnp.zeros(targets.shape, kind)
    (top, total, at_target), _ = jax.lax.scan(visit, (zeros + jnp.finfo(kind).min, zeros, zeros), jnp.arange(count))
    normaliser = top + jnp.log(total)
    return at_target - normaliser, (hidden, head, targets, normaliser)


def _backward(chunk, residuals, cotangent):
    hidden, head, targets, normaliser = residuals
    count, columns = _chunks(head.shape[0], chunk)

    def visit(carry, index):
        d_hidden, d_head = carry
        logits, start, rows = _logits(hidden, head, index, chunk)
        one_hot = _one_hot(targets, start, columns) & (logits > -jnp.inf)
        d_logits = cotangent[..., None] * (one_hot - jnp.exp(logits - normaliser[..., None]))
        d_logits = d_logits.astype(hidden.dtype)
        accumulate = dict(preferred_element_type=d_hidden.dtype)
        d_hidden = d_hidden + jnp.einsum("...v,vd->...d", d_logits, rows, **accumulate)
        d_rows = jnp.einsum("...v,...d->vd", d_logits, hidden, **accumulate)
        old = jax.lax.dynamic_slice_in_dim(d_head, start, columns)
        return (d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, old + d_rows, start, 0)), None

    kind = jnp.promote_types(hidden.dtype, "float32")
    start = (jnp.zeros(hidden.shape, kind), jnp.zeros(head.shape, kind))
    (d_hidden, d_head), _ = jax.lax.scan(visit, start, jnp.arange(count))
    return d_hidden.astype(hidden.dtype), d_head.astype(head.dtype), None


token_logps.defvjp(_forward, _backward)


def token_counts(batch: PreferenceBatch) -> jax.Array:
    """[B, 3] float32: trained tokens of each pair by side (chosen, rejected, prompt)."""
    pairs = batch.weight.shape[0]
    ones = jnp.ones(batch.slot.size, jnp.float32)
    return jax.ops.segment_sum(ones, batch.slot.reshape(-1), num_segments=3 * pairs).reshape(pairs, 3)


def pair_logps(logps: jax.Array, batch: PreferenceBatch) -> PairLogps:
    """Sums per-token log-probabilities over each response (and prompt, where the batch trains on it).

    Args:
      logps: [G, T] float32.
      batch: its `slot` says which of the 3 B sums a token belongs to.

    Returns:
      `PairLogps` with [B] sums and counts.
    """
    pairs = batch.weight.shape[0]
    # Filler points at slot 3 B, which segment_sum drops.
    sums = jax.ops.segment_sum(logps.reshape(-1), batch.slot.reshape(-1), num_segments=3 * pairs).reshape(pairs, 3)
    counts = token_counts(batch)
    return PairLogps(
        chosen=sums[:, CHOSEN],
        rejected=sums[:, REJECTED],
        chosen_tokens=counts[:, CHOSEN],
        rejected_tokens=counts[:, REJECTED],
        prompt=sums[:, PROMPT],
        prompt_tokens=counts[:, PROMPT],
        mean_tokens=batch.mean_tokens,
    )


def preference_logps(
    model: LanguageModel, params: Params, batch: PreferenceBatch, chunk: int = VOCABULARY_CHUNK
) -> PairLogps:
    """Log-probabilities of a batch's pairs: one pass over the packed rows, the head on trained tokens only.

    Args:
      model: hidden states and head as functions of params.
      params: nested dict.
      batch: packed rows.
      chunk: columns of logits at once.

    Returns:
      `PairLogps`, each [B] float32.
    """
    hidden = model.hidden(params, batch.tokens, batch.positions, batch.segments, batch.branches)
    groups = batch.source.shape[0]
    hidden = hidden.reshape(groups, -1, hidden.shape[-1])
    hidden = jnp.take_along_axis(hidden, batch.source[..., None], axis=1)
    return pair_logps(token_logps(hidden, model.head(params), batch.target, chunk), batch)
