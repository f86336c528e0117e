"""Losses that compare distributions over the whole batch, not one pair with itself: alignment by optimal transport."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefalign_jax.losses.ratios import Result, log_ratios, reward_metrics, smoothed
from prefalign_jax.types import PairLogps


def matched(values: jax.Array, others: jax.Array, weight: jax.Array) -> jax.Array:
    """For each value the other of the same rank, [B]: the optimal transport between two samples on a line.

    Args:
      values, others: [B].
      weight: [B]; filler (0) comes last in both, and is matched with itself.

    Example:
      >>> print(matched(jnp.array([3.0, 1.0, 2.0]), jnp.array([10.0, 30.0, 20.0]), jnp.ones(3)))
      [30. 10. 20.]
    """
    order = jnp.argsort(jnp.where(weight > 0, values, jnp.inf))
    other_order = jnp.argsort(jnp.where(weight > 0, others, jnp.inf))
    return jnp.zeros_like(others).at[order].set(others[other_order])


def aot(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """Alignment by optimal transport (AOT), paired.

    smoothed -log sigmoid(beta (x_(i) - r_(i))), sorted over the batch: x of log pi_w - log pi_l, r the reference's

    The distribution of the policy's margins is to dominate that of the reference's, quantile by quantile.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and weights; filler takes no part, other weights
        only weigh the loss of their pair.
      reference: log-probabilities.
      beta: as in DPO.
      label_smoothing: e, in [0, 0.5).

    Returns:
      (loss [B] of the pair whose policy margin has that rank, metrics {name: [B]}).

    TRL: `aot`, equal on one device; there a device sorts its own share, here the whole global batch is sorted.
    Source: Melnyk et al., arXiv 2406.05882, section 3.
    """
    chosen, rejected = log_ratios(policy, reference)
    of_reference = jax.lax.stop_gradient(reference.chosen - reference.rejected)
    margin = policy.chosen - policy.rejected
    x = beta * (margin - matched(margin, of_reference, policy.weight))
    return smoothed(x, label_smoothing), reward_metrics(beta * chosen, beta * rejected, policy)


def aot_unpaired(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """Alignment by optimal transport (AOT), unpaired.

    smoothed -log sigmoid(beta (a_(i) - b_(i))), a and b each sorted over the batch

    The distribution of the chosen log-ratios is to dominate that of the rejected.

    Args:
      policy, reference, beta, label_smoothing: as in `aot`.

    Returns:
      (loss [B] of the pair whose chosen log-ratio has that rank, metrics {name: [B]}).

    TRL: `aot_unpaired` (`aot_pair` in older versions), equal on one device, as for `aot`.
    Source: Melnyk et al., arXiv 2406.05882, section 3.
    """
    chosen, rejected = log_ratios(policy, reference)
    x = beta * (chosen - matched(chosen, rejected, policy.weight))
    return smoothed(x, label_smoothing), reward_metrics(beta * chosen, beta * rejected, policy)
