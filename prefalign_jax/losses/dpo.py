"""Direct preference optimisation and the losses that share its margin h = log-ratio(chosen) - log-ratio(rejected)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefalign_jax.types import PairLogps

Metrics = dict[str, jax.Array]


def log_ratios(policy: PairLogps, reference: PairLogps | None) -> tuple[jax.Array, jax.Array]:
    """(log pi - log pi_ref) of chosen and rejected, [B] each; without a reference, log pi itself."""
    if reference is None:
        return policy.chosen, policy.rejected
    # The reference is data, wherever it comes from: no gradient.
    return (
        policy.chosen - jax.lax.stop_gradient(reference.chosen),
        policy.rejected - jax.lax.stop_gradient(reference.rejected),
    )


def reward_metrics(chosen: jax.Array, rejected: jax.Array, policy: PairLogps) -> Metrics:
    """TRL's metrics per pair: implicit rewards, their margin, strict accuracy (a tie counts 0), summed log-probs."""
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(chosen.dtype),
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }


def dpo(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> tuple[jax.Array, Metrics]:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), with h the difference of the summed log-ratios.

    Args:
      policy: [B] float32 log-probabilities, summed over each response.
      reference: the same under the reference; ignored by construction (pass None) if `reference_free`.
      beta: strength of the pull towards the reference; lower is weaker. Typically 0.01 to 0.5.
      label_smoothing: e, the assumed probability that a label is flipped (conservative DPO), in [0, 0.5).
        The authors' code has it; TRL since 0.29 accepts and ignores it.
      reference_free: h of the policy's log-probabilities alone.

    Returns:
      (loss [B], metrics {name: [B]}).

    Raises:
      ValueError: a reference is missing, or given though `reference_free`.

    Source: Rafailov et al., arXiv 2305.18290, Eq. 7; label smoothing: their code and E. Mitchell's note on conservative
      DPO.

    Example:
      >>> logps = PairLogps(jnp.array([-3.0]), jnp.array([-3.0]), jnp.ones(1), jnp.ones(1))
      >>> print(dpo(logps, logps)[0])  # log 2 where policy and reference agree
      [0.6931472]
    """
    if reference_free == (reference is not None):
        raise ValueError("dpo takes a reference exactly when reference_free=False")
    chosen, rejected = log_ratios(policy, reference)
    x = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(x) - label_smoothing * jax.nn.log_sigmoid(-x)
    return loss, reward_metrics(beta * chosen, beta * rejected, policy)


def ipo(
    policy: PairLogps, reference: PairLogps, *, tau: float = 0.1, per_token: bool = False
) -> tuple[jax.Array, Metrics]:
    """(h - 1 / (2 tau))^2: a margin regressed onto a finite target, so that certain labels cannot push it to infinity.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      tau: strength of the regularisation (TRL calls it beta), typically 0.01 to 1.
      per_token: h of the means per token, as TRL computes it; the authors' code sums.

    Returns:
      (loss [B], metrics {name: [B]}); rewards are tau times the summed log-ratios, as TRL reports them.

    Source: Azar et al., arXiv 2310.12036, Eq. 17.
    """
    chosen, rejected = log_ratios(policy, reference)
    metrics = reward_metrics(tau * chosen, tau * rejected, policy)
    if per_token:
        chosen = chosen / jnp.maximum(policy.chosen_tokens, 1.0)
        rejected = rejected / jnp.maximum(policy.rejected_tokens, 1.0)
    return jnp.square(chosen - rejected - 1 / (2 * tau)), metrics


def hinge(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> tuple[jax.Array, Metrics]:
    """max(0, 1 - beta h).

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: inverse of the margin beyond which a pair is left alone.

    Returns:
      (loss [B], metrics {name: [B]}).

    Source: SLiC-HF, arXiv 2305.10425, Eq. 1, as normalised by RSO, arXiv 2309.06657, Eq. 9.
    """
    chosen, rejected = log_ratios(policy, reference)
    return jax.nn.relu(1 - beta * (chosen - rejected)), reward_metrics(beta * chosen, beta * rejected, policy)
