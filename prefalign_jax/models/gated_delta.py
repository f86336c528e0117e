"""Gated delta rule over packed tree rows: a prompt's state is read by every one of its branches."""

from __future__ import annotations

import jax
import jax.numpy as jnp

CHUNK = 64


def gated_delta_rule(q, k, v, g, beta, segments, branches, chunk: int = CHUNK) -> jax.Array:
    """The gated delta rule: o_t = S_t' q_t, S_t = exp(g_t) S + beta_t k_t (v_t - exp(g_t) S' k_t)'.

    S is the state after the token that comes before t in its text. Along a text S_t = sum_j exp(G_t - G_j) k_j u_j', G
    the sum of g. What a token writes, u, solves a triangular system: u_t + beta_t sum_(j < t) exp(G_t - G_j) (k_t' k_j)
    u_j = beta_t v_t. Both sums are over what the token sees, so a tree is no more than attention's mask. A chunk of
    tokens is solved at once. What lies before it are two states: of the last token's text, and of that text's prompt,
    from which other branches start.

    Args:
      q, k: [R, L, heads, dk], normed; q scaled.
      v: [R, L, heads, dv].
      g: [R, L, heads] float32, at most 0.
      beta: [R, L, heads].
      segments, branches: [R, L] int32.
      chunk: tokens solved at once.

    Returns:
      [R, L, heads, dv] float32; 0 for padding.

    Source: Yang et al., arXiv 2412.06464, Eq. 10 and section 3.3.
    """
    rows, length, heads, dk = q.shape
    chunk = min(chunk, length)
    real = (segments > 0)[..., None]
    g, beta = jnp.where(real, g, 0.0), jnp.where(real, beta, 0.0)

    def chunks(x):  # [R, L, ...] -> [n, R, chunk, ...]
        x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, -1, chunk, *x.shape[2:]), 1, 0)

    def step(carry, one):
        q, k, v, g, beta, segment, branch = one  # of a row
        (cur, prompt), (segment_before, branch_before) = carry
        order = jnp.arange(chunk)
        sees = (order[:, None] >= order[None]) & (segment[:, None] == segment[None])
        sees &= (branch[None] == 0) | (branch[:, None] == branch[None])
        opened = (segment == segment_before) & (segment > 0)
        own = opened & (branch == branch_before)
        c = jnp.einsum("ij,jh->hi", sees.astype(jnp.float32), g)  # G since the chunk, or the branch, began
        decay = jnp.where(sees[None], jnp.exp(jnp.where(sees[None], c[:, :, None] - c[:, None, :], 0.0)), 0.0)
        fade = jnp.where(opened[None], jnp.exp(c), 0.0)  # [h, i]

        def read(x):  # what lies before the chunk: [i, h, dk] -> [h, i, dv]
            mine, shared = (jnp.einsum("ihd,hde->hie", x, state) for state in (cur, prompt))
            return fade[..., None] * jnp.where(own[None, :, None], mine, shared)

        b = beta.T[..., None]  # [h, i, 1]
        system = jnp.einsum("ihd,jhd->hij", k, k) * decay * b
        system = jnp.where((order[:, None] > order[None])[None], system, 0.0) + jnp.eye(chunk)[None]
        u = jax.lax.linalg.triangular_solve(
            system, b * (jnp.moveaxis(v, 1, 0) - read(k)), left_side=True, lower=True, unit_diagonal=True
        )
        out = read(q) + jnp.einsum("ihd,jhd,hij,hje->hie", q, k, decay, u)

        def state(at):  # after the token `at`: [h, dk, dv]
            before = jnp.where(own[at], cur, prompt) * fade[:, at, None, None]
            return before + jnp.einsum("jhd,hj,hje->hde", k, decay[:, at], u)

        last = chunk - 1
        of_prompt = (segment == segment[last]) & (branch == 0)
        at = jnp.max(jnp.where(of_prompt, order, -1))
        kept = jnp.where(opened[last], prompt, 0.0)  # the prompt ended before, or there is none
        carry = (state(last), jnp.where(at >= 0, state(jnp.maximum(at, 0)), kept)), (segment[last], branch[last])
        return carry, jnp.moveaxis(out, 0, 1)

    zeros = jnp.zeros((rows, heads, dk, v.shape[-1]), jnp.float32)
    start = (zeros, zeros), (jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int32))
    inputs = tuple(chunks(x.astype(jnp.float32)) for x in (q, k, v, g, beta)) + (chunks(segments), chunks(branches))
    step = jax.checkpoint(jax.vmap(step), prevent_cse=False)
    _, out = jax.lax.scan(step, start, inputs)
    return jnp.moveaxis(out, 0, 1).reshape(rows, -1, heads, v.shape[-1])[:, :length]


def gated_delta_steps(q, k, v, g, beta, segments, state) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule token by token, for texts that go on: one a row, padding before it.

    Args:
      q, k, v, g, beta, segments: as in `gated_delta_rule`.
      state: [R, heads, dk, dv] float32, after the token before these.

    Returns:
      ([R, L, heads, dv] float32, the state after the last token).
    """
    real = (segments > 0)[..., None]
    g, beta = jnp.where(real, g, 0.0), jnp.where(real, beta, 0.0)

    def step(state, one):
        q, k, v, g, beta = one
        state = state * jnp.exp(g)[..., None, None]
        u = beta[..., None] * (v - jnp.einsum("rhd,rhde->rhe", k, state))
        state = state + jnp.einsum("rhd,rhe->rhde", k, u)
        return state, jnp.einsum("rhd,rhde->rhe", q, state)

    inputs = tuple(jnp.moveaxis(x.astype(jnp.float32), 1, 0) for x in (q, k, v, g, beta))
    state, out = jax.lax.scan(step, state, inputs)
    return jnp.moveaxis(out, 0, 1), state


def parents(segments, branches) -> jax.Array:
    """[R, L] index of the token before each in its text, -1 for none: what a causal convolution reads, tap by tap."""
    order = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    before = lambda x, fill: jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=fill)  # noqa: E731
    end = before(jax.lax.cummax(jnp.where(branches == 0, order, -1), axis=1), -1)  # the last prompt's token before
    end_of = jnp.take_along_axis(segments, jnp.maximum(end, 0), axis=1)
    follows = (before(segments, 0) == segments) & (before(branches, -1) == branches)
    shared = (end >= 0) & (end_of == segments)
    return jnp.where(segments == 0, -1, jnp.where(follows, order - 1, jnp.where(shared, end, -1)))


def earlier(segments, branches, taps: int) -> jax.Array:
    """[taps, R, L] index of the n-th token before each in its text, itself for n = 0, -1 for none."""
    parent, at = parents(segments, branches), jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    places = [at]
    for _ in range(taps - 1):
        at = jnp.where(at >= 0, jnp.take_along_axis(parent, jnp.maximum(at, 0), axis=1), -1)
        places.append(at)
    return jnp.stack(places)


def causal_convolution(x, kernel, places) -> jax.Array:
    """sum_n kernel[n] x[the n-th token before], [R, L, D], [taps, D] and `earlier`; Hugging Face has taps backwards."""
    out = 0.0
    for tap, at in zip(kernel, places, strict=True):
        seen = jnp.take_along_axis(x, jnp.maximum(at, 0)[..., None], axis=1)
        out = out + jnp.where((at >= 0)[..., None], seen, 0.0) * tap[None, None]
    return out
