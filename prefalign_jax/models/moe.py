"""A mixture of experts in place of the MLP: a router picks a few experts for every token, and drops none."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
    """How a layer's tokens were spread over its E experts.

    Attributes:
      share: [E] float32, of the tokens' choices how many fell on each expert, per token: they sum to k.
      probability: [E] float32, mean of the router's probabilities.
    """

    share: jax.Array
    probability: jax.Array


def route(logits: jax.Array, k: int, *, renormalise: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Picks the k likeliest experts of each token.

    Args:
      logits: [N, E] of the router; the softmax is float32.
      k: experts a token.
      renormalise: let the weights of the chosen sum to 1.

    Returns:
      (weights [N, k] float32, experts [N, k] int32, probabilities [N, E] float32).
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(probabilities, k)
    if renormalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights, chosen, probabilities


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up."""
    return jax.nn.silu(gate) * up


def clamped_swiglu(gate: jax.Array, up: jax.Array, *, limit: float, alpha: float) -> jax.Array:
    """g sigmoid(alpha g) (u + 1), where g is at most the limit and u between it and its negative.

    Source: gpt-oss model card, arXiv 2508.10925, section 2.1, and its published code.

    Example:
      >>> print(clamped_swiglu(jnp.array(9.0), jnp.array(-9.0), limit=1.0, alpha=1.702))  # of 1 and -1
      0.0
    """
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def experts(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    biases: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    first: jax.Array | int = 0,
    *,
    act: Callable[[jax.Array, jax.Array], jax.Array] = swiglu,
) -> jax.Array:
    """sum over a token's experts of weight down(act(gate(x), up(x))), each expert on its own tokens only.

    Tokens are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`), so that the work is k experts a
    token, whatever their spread.

    Args:
      x: [N, D].
      gate, up: [E, D, F].
      down: [E, F, D].
      weights, chosen: [N, k], from `route`.
      biases: of gate and up [E, F], and of down [E, D].
      first: number of the first of these experts, where they are some of all; choices of others add nothing.
      act: (gate, up) -> what `down` reads.

    Returns:
      [N, D] in x's type.

    Source: Mixtral, Jiang et al., arXiv 2401.04088, section 2.1.
    """
    k, count = chosen.shape[1], gate.shape[0]
    expert = chosen.reshape(-1) - first
    local = (expert >= 0) & (expert < count)
    expert = jnp.where(local, expert, count)  # others come last, in no group
    order = jnp.argsort(expert, stable=True)
    token = order // k
    sizes = jnp.bincount(expert, length=count + 1)[:count].astype(jnp.int32)

    def multiply(rows: jax.Array, kernels: jax.Array, bias: jax.Array | None) -> jax.Array:
        out = jax.lax.ragged_dot(rows, kernels.astype(rows.dtype), sizes)
        if bias is None:
            return out
        own = bias.astype(rows.dtype).at[expert[order]].get(mode="clip", indices_are_sorted=True)
        return out + own

    rows = x[token]
    of_gate, of_up, of_down = biases or (None,) * 3
    out = multiply(act(multiply(rows, gate, of_gate), multiply(rows, up, of_up)), down, of_down)
    out = jnp.where(local[order][:, None], out * weights.reshape(-1)[order][:, None].astype(out.dtype), 0)
    return jnp.zeros_like(x).at[token].add(out)


def routing(chosen: jax.Array, probabilities: jax.Array, active: jax.Array) -> Routing:
    """How the active tokens were spread.

    Args:
      chosen: [N, k].
      probabilities: [N, E].
      active: [N] bool; padding is not.

    Returns:
      The `Routing`.
    """
    weight = active.astype(jnp.float32) / jnp.maximum(active.sum(), 1)
    one_hot = jax.nn.one_hot(chosen, probabilities.shape[1], dtype=jnp.float32).sum(1)
    return Routing(weight @ one_hot, weight @ probabilities)


def balance(layers: Routing) -> jax.Array:
    """E sum_e share_e probability_e, both averaged over the layers first: k where the experts are used alike.

    Args:
      layers: [layers, E] each.

    Returns:
      [] float32, the router's auxiliary loss.

    Source: Switch Transformers, Fedus et al., arXiv 2101.03961, Eq. 4, as transformers computes it for k experts.

    Example:
      >>> print(balance(Routing(jnp.full((2, 4), 0.5), jnp.full((2, 4), 0.25))))  # 2 of 4 experts, alike
      2.0
    """
    share, probability = layers.share.mean(0), layers.probability.mean(0)
    return share.shape[0] * jnp.sum(share * probability)
