"""What losses share: log-ratios to the reference, means per token, smooth steps, and the metrics that people plot."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefalign_jax.types import PairLogps

Metrics = dict[str, jax.Array]
Result = tuple[jax.Array, Metrics]  # (loss [B], metrics {name: [B]})


def log_ratios(policy: PairLogps, reference: PairLogps) -> tuple[jax.Array, jax.Array]:
    """(a, b) = log pi - log pi_ref of chosen and rejected, [B] each.

    Raises:
      ValueError: there is no reference.
    """
    if reference is None:
        raise ValueError("log-ratios need a reference, and there is none; declare needs={'rejected', 'reference'}")
    # The reference is data, wherever it comes from: no gradient.
    return (
        policy.chosen - jax.lax.stop_gradient(reference.chosen),
        policy.rejected - jax.lax.stop_gradient(reference.rejected),
    )


def per_token(chosen: jax.Array, rejected: jax.Array, policy: PairLogps) -> tuple[jax.Array, jax.Array]:
    """Both divided by the tokens of their response; an empty one counts as one token."""
    return chosen / jnp.maximum(policy.chosen_tokens, 1.0), rejected / jnp.maximum(policy.rejected_tokens, 1.0)


def smoothed(x: jax.Array, e: float) -> jax.Array:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x): the cross-entropy of a preference that is wrong with chance e."""
    return -(1 - e) * jax.nn.log_sigmoid(x) - e * jax.nn.log_sigmoid(-x)


def exp_linear(x: jax.Array, bend: float = 30.0) -> jax.Array:
    """exp(x), and beyond the bend its tangent, so that neither it nor its square overflows float32.

    Example:
      >>> print(exp_linear(jnp.array([0.0, -1.0])), exp_linear(1e4) > 1e17)
      [1.         0.36787945] True
    """
    return jnp.exp(jnp.minimum(x, bend)) * (1 + jnp.maximum(x - bend, 0.0))


def batch_mean(values: jax.Array, policy: PairLogps) -> jax.Array:
    """[] the weighted mean over the pairs of the whole batch; filler counts nothing."""
    weight = policy.weight
    return jnp.sum(jnp.where(weight > 0, values * weight, 0.0)) / jnp.maximum(jnp.sum(weight), 1e-30)


def rewards(chosen: jax.Array, rejected: jax.Array) -> Metrics:
    """Metrics of two rewards under TRL's names, [B] each: themselves, their margin, accuracy.

    The accuracy is 1/2 where the rewards are equal, as they are where policy and reference agree. TRL counts 0 there,
    see `loss.ties_as_trl`.
    """
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (1 + jnp.sign(chosen - rejected)) / 2,
    }


def with_logps(metrics: Metrics, policy: PairLogps) -> Metrics:
    """The metrics, with TRL's names for the policy's summed log-probabilities."""
    return {**metrics, "logps/chosen": policy.chosen, "logps/rejected": policy.rejected}


def reward_metrics(chosen: jax.Array, rejected: jax.Array, policy: PairLogps, means: bool = False) -> Metrics:
    """TRL's metrics per pair: implicit rewards, and log-probabilities as sums or as means per token."""
    metrics = with_logps(rewards(chosen, rejected), policy)
    if means:
        metrics["logps/chosen"], metrics["logps/rejected"] = per_token(policy.chosen, policy.rejected, policy)
    return metrics
