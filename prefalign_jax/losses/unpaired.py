"""Losses of single completions labelled desirable or not: `chosen` holds the completion, whatever its label.

Metrics of desirable completions are NaN for undesirable ones and the other way round: they do not apply, and means
leave them out.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from prefalign_jax.losses.absolute import running_mean
from prefalign_jax.losses.ratios import Metrics, Result, batch_mean
from prefalign_jax.types import PairLogps


def _ratio(policy: PairLogps, reference: PairLogps) -> jax.Array:
    """log pi - log pi_ref of the completion, [B]."""
    return policy.chosen - jax.lax.stop_gradient(reference.chosen)


def _metrics(reward: jax.Array, policy: PairLogps) -> Metrics:
    """TRL's: rewards and log-probabilities by label."""
    desirable = policy.label > 0.5
    return {
        "rewards/chosen": jnp.where(desirable, reward, jnp.nan),
        "rewards/rejected": jnp.where(desirable, jnp.nan, reward),
        "logps/chosen": jnp.where(desirable, policy.chosen, jnp.nan),
        "logps/rejected": jnp.where(desirable, jnp.nan, policy.chosen),
    }


def kto(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Result:
    """Kahneman-Tversky optimization (KTO).

    w_D (1 - sigmoid(beta (r - z))) if desirable, w_U (1 - sigmoid(beta (z - r))) if not, r = log pi / pi_ref

    z = max(0, mean over the batch of the log-ratio of a completion of another prompt) estimates KL(pi || pi_ref); no
    gradient passes through it.

    Args:
      policy: [B] float32 log-probabilities of the completion (`chosen`) and of the mismatched one (`rejected`), labels
        and weights.
      reference: log-probabilities.
      beta: 0.01 to 0.5.
      desirable_weight, undesirable_weight: w_D n_D / (w_U n_U) between 1 and 4/3 by the paper.

    Returns:
      (loss [B], metrics {name: [B]}); kl is z.

    TRL: KTOTrainer's `kto`, equal; there a completion is mismatched within its device's batch.
    Source: Ethayarajh et al., arXiv 2402.01306, Eq. 7; the ratio of the weights: Eq. 8.
    """
    ratio = _ratio(policy, reference)
    mismatched = jax.lax.stop_gradient(policy.rejected - reference.rejected)
    z = jnp.maximum(batch_mean(mismatched, policy), 0.0)
    desirable = policy.label > 0.5
    value = jax.nn.sigmoid(beta * jnp.where(desirable, z - ratio, ratio - z))
    loss = jnp.where(desirable, desirable_weight, undesirable_weight) * value
    return loss, {**_metrics(beta * ratio, policy), "kl": jnp.full_like(ratio, z)}


def apo_zero_unpaired(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Result:
    """Anchored preference optimization (APO-zero) of single completions.

    w_D (1 - sigmoid(beta r)) if desirable, w_U sigmoid(beta r) if not, r = log pi / pi_ref

    Args:
      policy: [B] float32 log-probabilities of the completion and labels.
      reference: log-probabilities.
      beta: as in APO-zero.
      desirable_weight, undesirable_weight: as in KTO.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: KTOTrainer's `apo_zero_unpaired`, equal.
    Source: D'Oosterlinck et al., arXiv 2408.06266, Eq. 7, one side at a time.
    """
    reward = beta * _ratio(policy, reference)
    desirable = policy.label > 0.5
    value = jax.nn.sigmoid(jnp.where(desirable, -reward, reward))
    return jnp.where(desirable, desirable_weight, undesirable_weight) * value, _metrics(reward, policy)


def bco_unpaired(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Result:
    """Binary classifier optimization (BCO) of single completions.

    -log sigmoid(beta r - d) if desirable, -log sigmoid(-(beta r - d)) if not, d the running mean of the rewards

    Args:
      policy: [B] float32 log-probabilities of the completion, labels and weights; `running` holds the shift d.
      reference: log-probabilities.
      beta: as in DPO.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: BCOTrainer's (until 1.13) without its density-ratio weights, equal for batches of one size.
    Source: Jung et al., arXiv 2404.04656, section 4.
    """
    reward = beta * _ratio(policy, reference)
    x = reward - policy.running["shift"]
    loss = -jax.nn.log_sigmoid(jnp.where(policy.label > 0.5, x, -x))
    return loss, {**_metrics(reward, policy), "bco_shift": jnp.full_like(x, policy.running["shift"])}


def advance_bco_unpaired(policy: PairLogps, reference: PairLogps, *, beta: float) -> Mapping[str, jax.Array]:
    """The running mean of all rewards with those of this batch in it."""
    return running_mean(policy.running, batch_mean(beta * _ratio(policy, reference), policy))
