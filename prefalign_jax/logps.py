"""Hidden states -> per-token -> per-response log-probabilities, the vocabulary in chunks."""

from __future__ import annotations

import functools
from collections.abc import Set

import jax
import jax.numpy as jnp

from prefalign_jax.types import (
    AFTER_CHOSEN,
    AFTER_REJECTED,
    CHOSEN,
    PROMPT,
    REJECTED,
    SIDES,
    LanguageModel,
    PairLogps,
    Params,
    PreferenceBatch,
    Responses,
    Sides,
)

VOCABULARY_CHUNK = 8192  # columns of logits in memory at once
REFERENCE_NEEDS = frozenset(
    {"shared", "sampled", "group"}
)  # of what a loss may need, that which it reads of the reference too


def _chunks(vocabulary: int, chunk: int) -> tuple[int, int]:
    """(number of chunks, columns in each), as even as can be."""
    count = -(-vocabulary // chunk)
    return count, -(-vocabulary // count)


def _start(index, vocabulary, chunk):
    """First column of a chunk. The last one starts early rather than run over the end."""
    _, columns = _chunks(vocabulary, chunk)
    return jnp.minimum(index * columns, vocabulary - columns)


def _logits(hidden, head, index, chunk, softcap=None):
    """Chunk `index` of the logits, its first column, and its rows of the head.

    Columns of the last chunk that belong to the one before it are -inf.
    """
    _, columns = _chunks(head.shape[0], chunk)
    start = _start(index, head.shape[0], chunk)
    rows = jax.lax.dynamic_slice_in_dim(head, start, columns).astype(hidden.dtype)
    logits = jnp.einsum(
        "...d,vd->...v", hidden, rows, preferred_element_type=jnp.promote_types(hidden.dtype, "float32")
    )
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    fresh = start + jnp.arange(columns) >= index * columns
    return jnp.where(fresh.reshape((1,) * (logits.ndim - 1) + (-1,)), logits, -jnp.inf), start, rows


def _one_hot(targets, start, columns):
    return (targets - start)[..., None] == jnp.arange(columns).reshape((1,) * targets.ndim + (-1,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_logps(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    chunk: int = VOCABULARY_CHUNK,
    softcap: float | None = None,
) -> jax.Array:
    """log softmax(hidden head')[target], never holding more than `chunk` columns of logits.

    The forward pass keeps a running maximum and sum over the chunks; the backward pass computes the logits again.
    Differentiable in reverse mode, once.

    Args:
      hidden: [..., D].
      head: [V, D] output embedding, cast to hidden's type for the product; sums are float32 at least.
      targets: [...] int32 in [0, V).
      chunk: columns of logits at once.
      softcap: c; logits x become c tanh(x / c), None leaves them.

    Returns:
      [...] float32, at most 0.

    Example:
      >>> import numpy as np
      >>> h, w = jnp.eye(2), jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
      >>> np.testing.assert_allclose(
      ...     token_logps(h, w, jnp.array([0, 1]), 2), [1 - np.log(np.e + 2), 2 - np.log(np.e**2 + 2)], rtol=1e-6)
    """
    return _forward(hidden, head, targets, chunk, softcap)[0]


def _forward(hidden, head, targets, chunk, softcap):
    count, columns = _chunks(head.shape[0], chunk)

    def visit(carry, index):
        top, total, at_target = carry
        logits, start, _ = _logits(hidden, head, index, chunk, softcap)
        new_top = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[..., None]).sum(-1)
        hit = _one_hot(targets, start, columns) & (logits > -jnp.inf)
        at_target = at_target + jnp.where(hit, logits, 0.0).sum(-1)
        return (new_top, total, at_target), None

    kind = jnp.promote_types(hidden.dtype, "float32")
    # A finite floor in place of -inf: the first rescaling would else compute exp(-inf + inf).
    zeros = jnp.zeros(targets.shape, kind)
    (top, total, at_target), _ = jax.lax.scan(visit, (zeros + jnp.finfo(kind).min, zeros, zeros), jnp.arange(count))
    normaliser = top + jnp.log(total)
    return at_target - normaliser, (hidden, head, targets, normaliser)


def _backward(chunk, softcap, residuals, cotangent):
    hidden, head, targets, normaliser = residuals

    def d_logits(logits, index):
        start = _start(index, head.shape[0], chunk)
        one_hot = _one_hot(targets, start, logits.shape[-1]) & (logits > -jnp.inf)
        return cotangent[..., None] * (one_hot - jnp.exp(logits - normaliser[..., None]))

    return *_pull_back(hidden, head, chunk, softcap, d_logits), None


def _pull_back(hidden, head, chunk, softcap, d_logits):
    """Gradients of hidden and head from those of the logits, which are computed again chunk by chunk."""
    count, columns = _chunks(head.shape[0], chunk)

    def visit(carry, index):
        d_hidden, d_head = carry
        logits, start, rows = _logits(hidden, head, index, chunk, softcap)
        d = d_logits(logits, index)
        if softcap is not None:
            d = d * jnp.where(logits > -jnp.inf, 1 - jnp.square(logits / softcap), 0.0)
        d = d.astype(hidden.dtype)
        accumulate = dict(preferred_element_type=d_hidden.dtype)
        d_hidden = d_hidden + jnp.einsum("...v,vd->...d", d, rows, **accumulate)
        # hidden' d and then transposed: as d' hidden, XLA's CPU backend would compute all of d again, transposed.
        # All tokens in one axis: the backend has no bfloat16 product into float32 that sums over two.
        d_rows = jnp.einsum("td,tv->dv", *(x.reshape(-1, x.shape[-1]) for x in (hidden, d)), **accumulate).T
        old = jax.lax.dynamic_slice_in_dim(d_head, start, columns)
        return (d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, old + d_rows, start, 0)), None

    kind = jnp.promote_types(hidden.dtype, "float32")
    start = (jnp.zeros(hidden.shape, kind), jnp.zeros(head.shape, kind))
    (d_hidden, d_head), _ = jax.lax.scan(visit, start, jnp.arange(count))
    return d_hidden.astype(hidden.dtype), d_head.astype(head.dtype)


token_logps.defvjp(_forward, _backward)


def token_sum_squares(
    hidden: jax.Array, head: jax.Array, chunk: int = VOCABULARY_CHUNK, softcap: float | None = None
) -> jax.Array:
    """log sum_v p_v^2 of p = softmax(hidden head'), the log of the chance that two draws agree. No gradient.

    Args:
      hidden: [..., D].
      head: [V, D].
      chunk, softcap: as in `token_logps`.

    Returns:
      [...] float32, at most 0.
    """
    hidden, head = jax.lax.stop_gradient((hidden, head))
    count, _ = _chunks(head.shape[0], chunk)

    def visit(carry, index):
        top, total, squares = carry
        logits, _, _ = _logits(hidden, head, index, chunk, softcap)
        new_top = jnp.maximum(top, logits.max(-1))
        scale, terms = jnp.exp(top - new_top), jnp.exp(logits - new_top[..., None])
        return (new_top, total * scale + terms.sum(-1), squares * scale**2 + jnp.square(terms).sum(-1)), None

    zeros = jnp.zeros(hidden.shape[:-1], jnp.promote_types(hidden.dtype, "float32"))
    start = (zeros + jnp.finfo(zeros.dtype).min, zeros, zeros)
    (_, total, squares), _ = jax.lax.scan(visit, start, jnp.arange(count))
    return jnp.log(squares) - 2 * jnp.log(total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def token_kl(
    hidden: jax.Array,
    head: jax.Array,
    ref_hidden: jax.Array,
    ref_head: jax.Array,
    chunk: int = VOCABULARY_CHUNK,
    softcap: float | None = None,
) -> jax.Array:
    """KL(reference || policy) = sum_v p_ref log(p_ref / p) of next-token distributions, the vocabulary in chunks.

    Differentiable in the policy's arguments, in reverse mode, once; the reference gets no gradient.

    Args:
      hidden, head: [..., D] and [V, D] of the policy.
      ref_hidden, ref_head: the same of the reference.
      chunk, softcap: as in `token_logps`.

    Returns:
      [...] float32, in nats.
    """
    return _kl_forward(hidden, head, ref_hidden, ref_head, chunk, softcap)[0]


def _kl_forward(hidden, head, ref_hidden, ref_head, chunk, softcap):
    count, _ = _chunks(head.shape[0], chunk)

    def visit(carry, index):
        top, total, ref_top, ref_total, apart = carry
        logits, _, _ = _logits(hidden, head, index, chunk, softcap)
        ref_logits, _, _ = _logits(ref_hidden, ref_head, index, chunk, softcap)
        new_top, new_ref_top = jnp.maximum(top, logits.max(-1)), jnp.maximum(ref_top, ref_logits.max(-1))
        ref_scale, ref_terms = jnp.exp(ref_top - new_ref_top), jnp.exp(ref_logits - new_ref_top[..., None])
        total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[..., None]).sum(-1)
        difference = jnp.where(logits > -jnp.inf, ref_logits - logits, 0.0)
        apart = apart * ref_scale + (ref_terms * difference).sum(-1)
        return (new_top, total, new_ref_top, ref_total * ref_scale + ref_terms.sum(-1), apart), None

    zeros = jnp.zeros(hidden.shape[:-1], jnp.promote_types(hidden.dtype, "float32"))
    lowest = zeros + jnp.finfo(zeros.dtype).min
    carry, _ = jax.lax.scan(visit, (lowest, zeros, lowest, zeros, zeros), jnp.arange(count))
    top, total, ref_top, ref_total, apart = carry
    normaliser, ref_normaliser = top + jnp.log(total), ref_top + jnp.log(ref_total)
    kl = apart / ref_total - ref_normaliser + normaliser
    # Rounding may leave it just below 0.
    return jnp.maximum(kl, 0.0), (hidden, head, ref_hidden, ref_head, normaliser, ref_normaliser)


def _kl_backward(chunk, softcap, residuals, cotangent):
    hidden, head, ref_hidden, ref_head, normaliser, ref_normaliser = residuals

    def d_logits(logits, index):
        ref_logits, _, _ = _logits(ref_hidden, ref_head, index, chunk, softcap)
        p, p_ref = jnp.exp(logits - normaliser[..., None]), jnp.exp(ref_logits - ref_normaliser[..., None])
        return cotangent[..., None] * (p - p_ref)

    d_hidden, d_head = _pull_back(hidden, head, chunk, softcap, d_logits)
    return d_hidden, d_head, jnp.zeros_like(ref_hidden), jnp.zeros_like(ref_head)


token_kl.defvjp(_kl_forward, _kl_backward)


def _sums(values: jax.Array, batch: PreferenceBatch) -> jax.Array:
    """[B, SIDES] weighted sums of a value per trained token over the slots; of groups [B, 2 K + 1].

    Filler points at a slot past the last.
    """
    pairs, sides = batch.weight.shape[0], sides_of(batch)
    if batch.token_weight is not None:
        values = values.reshape(-1) * batch.token_weight.reshape(-1)
    sums = jax.ops.segment_sum(values.reshape(-1), batch.slot.reshape(-1), num_segments=sides * pairs)
    return sums.reshape(pairs, sides) if batch.slots is None else sums[batch.slots]


def sides_of(batch: PreferenceBatch) -> int:
    """How many sums a pair, or a group, has: of K responses, of the prompt, and of what follows each response."""
    return SIDES if batch.scores is None else 2 * batch.scores.shape[1] + 1


def token_counts(batch: PreferenceBatch) -> jax.Array:
    """[B, SIDES] float32, as `_sums`: trained tokens of each pair by side, each by how much it counts."""
    return _sums(jnp.ones(batch.slot.shape, jnp.float32), batch)


def _pairs_of(batch: PreferenceBatch) -> tuple[jax.Array, jax.Array]:
    """(pair, side) of every trained token, [G T] each; filler counts as some pair's side, and every sum drops it."""
    slot = batch.slot.reshape(-1)
    return jnp.minimum(slot // SIDES, batch.weight.shape[0] - 1), slot % SIDES


def _shorter(batch: PreferenceBatch) -> jax.Array:
    """[G T] float32: tokens of the shorter response of each trained token's pair."""
    counts = token_counts(batch._replace(token_weight=None))  # of tokens, however much each counts
    return jnp.minimum(counts[:, CHOSEN], counts[:, REJECTED])[_pairs_of(batch)[0]]


def places(batch: PreferenceBatch) -> jax.Array:
    """[G T] int32: how many tokens of its own slot come before each trained token; a slot's tokens lie in order."""
    slot = batch.slot.reshape(-1)
    order = jnp.arange(slot.size)
    first = jax.ops.segment_min(order, slot, num_segments=SIDES * batch.weight.shape[0] + 1)
    return order - first[slot]


def draws(batch: PreferenceBatch) -> jax.Array:
    """[G T] int32: the place of each trained token when those of its slot are shuffled.

    The order is a function of the pair's number in its data set alone: policy, reference, every epoch and every
    resumed run draw the same tokens.
    """
    slot = batch.slot.reshape(-1)
    pair, side = _pairs_of(batch)
    key = jnp.zeros(slot.shape, jnp.uint32)
    for part in (SIDES * jnp.asarray(batch.index)[pair] + side, places(batch)):  # MurmurHash3's finaliser for each
        key = (key ^ part.astype(jnp.uint32)) * jnp.uint32(0x85EBCA6B)
        key = (key ^ (key >> 13)) * jnp.uint32(0xC2B2AE35)
        key = key ^ (key >> 16)
    order = jnp.lexsort((key, slot))
    ranks = jnp.zeros_like(slot).at[order].set(jnp.arange(slot.size))
    first = jax.ops.segment_min(ranks, slot, num_segments=SIDES * batch.weight.shape[0] + 1)
    return ranks - first[slot]


def pair_logps(logps: jax.Array, batch: PreferenceBatch, needs: Set[str] = frozenset()) -> PairLogps:
    """Sums per-token log-probabilities over each response (and prompt, where the batch trains on it).

    Args:
      logps: [G, T] float32.
      batch: its `slot` says which of the SIDES B sums a token belongs to.
      needs: which of 'shared', 'sampled', 'after' and 'group' to fill in.

    Returns:
      `PairLogps` with [B] sums and counts.
    """
    sums, counts = _sums(logps, batch), token_counts(batch)
    prompt = sums.shape[1] // 2

    def partly(keep: jax.Array) -> Sides:
        kept = _sums(jnp.where(keep, logps.reshape(-1), 0.0), batch)
        return Sides(kept[:, CHOSEN], kept[:, REJECTED])

    out = PairLogps(
        chosen=sums[:, CHOSEN],
        rejected=sums[:, REJECTED],
        chosen_tokens=counts[:, CHOSEN],
        rejected_tokens=counts[:, REJECTED],
        prompt=sums[:, prompt],
        prompt_tokens=counts[:, prompt],
        mean_tokens=batch.mean_tokens,
        weight=batch.weight,
        margin=batch.margin,
        label=batch.label,
    )
    if "group" in needs:
        present = ~jnp.isnan(batch.scores)
        scores = jnp.where(present, batch.scores, 0.0)
        out = out._replace(
            responses=Responses(sums[:, :prompt], counts[:, :prompt], scores, present.astype(jnp.float32))
        )
    if "shared" in needs:
        out = out._replace(shared=partly(places(batch) < _shorter(batch)))
    if "sampled" in needs:
        out = out._replace(sampled=partly(draws(batch) < _shorter(batch)))
    if "after" in needs:
        pair, _ = _pairs_of(batch)
        # What is predicted after a response is its own last token again, the end of sequence.
        last = jax.ops.segment_max(batch.target.reshape(-1), batch.slot.reshape(-1), num_segments=sums.size)
        is_text = batch.target.reshape(-1) != last.reshape(sums.shape)[pair, AFTER_CHOSEN]
        text = _sums(jnp.where(is_text, logps.reshape(-1), 0.0), batch)
        tokens = _sums(is_text.astype(jnp.float32), batch)
        out = out._replace(
            after=Sides(sums[:, AFTER_CHOSEN], sums[:, AFTER_REJECTED]),
            text=text[:, PROMPT] + text[:, CHOSEN],
            text_tokens=tokens[:, PROMPT] + tokens[:, CHOSEN],
        )
    return out


def source_hidden(
    model: LanguageModel, params: Params, batch: PreferenceBatch, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """One pass over the packed rows: hidden states [G, T, D] that predict the trained tokens, the router's loss []."""
    rows = (batch.tokens, batch.positions, batch.segments, batch.branches)
    options = {"key": key} if model.drops and key is not None else {}
    if model.attends is not None:
        options[model.attends] = getattr(batch, model.attends)
    hidden, router = (
        model.routed(params, *rows, **options) if model.routed else (model.hidden(params, *rows, **options), None)
    )
    hidden = hidden.reshape(batch.source.shape[0], -1, hidden.shape[-1])
    return jnp.take_along_axis(hidden, batch.source[..., None], axis=1), router


def target_logps(
    model: LanguageModel, params: Params, batch: PreferenceBatch, chunk: int = VOCABULARY_CHUNK
) -> jax.Array:
    """[G, T] float32: log-probability of every trained token of a batch; `batch.slot` says whose it is."""
    hidden, _ = source_hidden(model, params, batch)
    return token_logps(hidden, model.head(params), batch.target, chunk, model.softcap)


def preference_logps(
    model: LanguageModel,
    params: Params,
    batch: PreferenceBatch,
    chunk: int = VOCABULARY_CHUNK,
    needs: Set[str] = frozenset(),
    key: jax.Array | None = None,
) -> PairLogps:
    """Log-probabilities of a batch's pairs, and what else is needed: the head runs on trained tokens only.

    Args:
      model: hidden states and head as functions of params.
      params: nested dict.
      batch: packed rows.
      chunk: columns of logits at once.
      needs: keys of losses.NEEDS; those that need a reference too are `policy_and_reference_logps`'s.
      key: of the model's dropout, for a training pass; None drops nothing.

    Returns:
      `PairLogps`, each [B] float32; for 'reward', rewards in place of log-probabilities.
    """
    hidden, router = source_hidden(model, params, batch, key)
    return _with_router(_from_hidden(model, params, hidden, batch, chunk, needs), router)


def policy_and_reference_logps(
    model: LanguageModel,
    params: Params,
    reference: Params,
    batch: PreferenceBatch,
    chunk: int = VOCABULARY_CHUNK,
    needs: Set[str] = frozenset(),
    key: jax.Array | None = None,
) -> tuple[PairLogps, PairLogps]:
    """`preference_logps` of both, no gradient to the reference, and what takes both at once.

    Args:
      model, batch, chunk, needs: as there.
      key: as there, of the policy's dropout: the reference drops nothing.
      params: of the policy.
      reference: of the reference.

    Returns:
      (policy, reference); for 'token_kl' the policy's has the KL divergences.
    """
    hidden, router = source_hidden(model, params, batch, key)
    ref_hidden = jax.lax.stop_gradient(source_hidden(model, reference, batch)[0])
    policy = _with_router(_from_hidden(model, params, hidden, batch, chunk, needs), router)
    if "token_kl" in needs:
        ref_head = jax.lax.stop_gradient(model.head(reference))
        kl = token_kl(hidden, model.head(params), ref_hidden, ref_head, chunk, model.softcap)
        policy = policy._replace(token_kl=_sides(kl, batch))
    frozen = _from_hidden(model, reference, ref_hidden, batch, chunk, needs & REFERENCE_NEEDS)
    return policy, jax.lax.stop_gradient(frozen)


def _from_hidden(model, params, hidden, batch, chunk, needs) -> PairLogps:
    head = model.head(params)
    if "reward" in needs:
        rewards = jnp.einsum("gtd,d->gt", hidden, head[0].astype(hidden.dtype), preferred_element_type=jnp.float32)
        return pair_logps(rewards, batch, needs & {"group"})
    out = pair_logps(token_logps(hidden, head, batch.target, chunk, model.softcap), batch, needs)
    if "sum_squares" in needs:
        out = out._replace(sum_squares=_sides(token_sum_squares(hidden, head, chunk, model.softcap), batch))
    return out


def _with_router(record: PairLogps, router: jax.Array | None) -> PairLogps:
    return record if router is None else record._replace(router=jnp.broadcast_to(router, record.chosen.shape))


def _sides(values: jax.Array, batch: PreferenceBatch) -> Sides:
    sums = _sums(values, batch)
    return Sides(sums[:, CHOSEN], sums[:, REJECTED])
