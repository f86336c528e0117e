"""DPO where labels may be wrong: each pair corrected for flips, or the worst pairs of a batch counted less."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefalign_jax.losses.dpo import dpo
from prefalign_jax.losses.ratios import Result, batch_mean, log_ratios, reward_metrics
from prefalign_jax.types import PairLogps


def robust_dpo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Result:
    """Robust DPO for labels that are sometimes flipped (rDPO).

    [-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2 e)

    Its mean over labels that are flipped with probability e is DPO's loss on the true ones.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: as in DPO.
      label_smoothing: e, in [0, 0.5).

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: `robust`, equal.
    Source: Ray Chowdhury et al., arXiv 2403.00409, section 3.1.
    """
    chosen, rejected = log_ratios(policy, reference)
    x, e = beta * (chosen - rejected), label_smoothing
    loss = (-(1 - e) * jax.nn.log_sigmoid(x) + e * jax.nn.log_sigmoid(-x)) / (1 - 2 * e)
    return loss, reward_metrics(beta * chosen, beta * rejected, policy)


def dr_dpo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, beta_prime: float = 1.0) -> Result:
    """Distributionally robust DPO (Dr. DPO).

    -beta' log(batch mean of exp(-l / beta')), l = -log sigmoid(beta h)

    It has a soft minimum over the batch in place of the mean, so that pairs of great loss, whose
    labels are likely wrong, count less. The gradient is DPO's with pair i weighted by exp(-l_i / beta'), and the mean
    weight is 1.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and weights.
      reference: log-probabilities.
      beta: as in DPO.
      beta_prime: beta', how much the labels are trusted: as it grows the loss becomes DPO's mean. 1 in the authors'
        code.

    Returns:
      (loss [B], every pair's the batch's one value, metrics {name: [B]}); dr_weight is a pair's weight.

    TRL: none; equal to the authors' code, which takes the mean over a device's batch.
    Source: Wu et al., arXiv 2407.07880, and their code.
    """
    losses, metrics = dpo(policy, reference, beta=beta)
    scaled = jnp.where(policy.weight > 0, -losses / beta_prime, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scaled))
    top = jnp.where(jnp.isfinite(top), top, 0.0)  # of filler alone there is none
    shares = jnp.exp(scaled - top)
    mean = jnp.maximum(batch_mean(shares, policy), 1e-30)
    value = -beta_prime * (jnp.log(mean) + top)
    return jnp.broadcast_to(value, losses.shape), {**metrics, "dr_weight": shares / mean}
