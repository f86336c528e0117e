"""Losses tuned by a running statistic of the margins: DPO whose beta, and SimPO whose target, follows the batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefalign_jax.losses.ratios import Result, batch_mean, log_ratios, per_token, reward_metrics
from prefalign_jax.types import PairLogps


def beta_dpo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    momentum: float = 0.9,
    keep: float = 0.8,
) -> Result:
    """DPO with a dynamic beta (beta-DPO).

    -log sigmoid(beta' h), beta' = max(0.001, beta (1 + alpha (mean h of the pairs kept - running mean of h)))

    Batches whose pairs are far apart get a larger beta; the share 1 - keep of the pairs, those whose margin lies
    furthest from the running mean, is left out.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and weights; `running` holds the mean margin,
        this batch in it.
      reference: log-probabilities.
      beta: as in DPO, the one around which beta' varies.
      alpha: how much it varies, 0.6 in the paper.
      momentum: of the running mean; see `advance_beta_dpo`.
      keep: share of the batch's pairs that is kept, 0.8 in the paper; 1 keeps all.

    Returns:
      (loss [B], metrics {name: [B]}); the loss of a kept pair is divided by the share kept, so that the batch's mean is
      that of the kept pairs.

    TRL: none. The authors draw the kept pairs by Gaussian weights exp(-(h - mean)^2 / 2 std^2), here the likeliest are
      kept, so that a run depends on no draw; their running mean also moves with every micro-step and evaluation.
    Source: Wu et al., arXiv 2407.08639, section 4; their code.
    """
    chosen, rejected = log_ratios(policy, reference)
    h = chosen - rejected
    gap, mean = jax.lax.stop_gradient(h), policy.running["mean_margin"]
    present = policy.weight > 0
    distance = jnp.where(present, jnp.abs(gap - mean), jnp.inf)
    rank = jnp.argsort(jnp.argsort(distance))
    total = jnp.sum(present)
    # The sliver keeps what rounding leaves just below a whole number.
    kept = present & (rank < jnp.maximum(jnp.floor(keep * total + 1e-3), 1))
    share = batch_mean(kept.astype(h.dtype), policy)
    gaps = batch_mean(jnp.where(kept, gap, 0.0), policy) / jnp.maximum(share, 1e-30)
    adapted = jnp.maximum(beta * (1 + alpha * (gaps - mean)), 1e-3)
    loss = jnp.where(kept, -jax.nn.log_sigmoid(adapted * h), 0.0) / jnp.maximum(share, 1e-30)
    metrics = reward_metrics(beta * chosen, beta * rejected, policy)
    return loss, {**metrics, "beta": jnp.broadcast_to(adapted, h.shape), "kept": kept.astype(h.dtype)}


def advance_beta_dpo(policy: PairLogps, reference: PairLogps, *, momentum: float, **_) -> dict[str, jax.Array]:
    """The running mean of the margin: momentum times itself plus (1 - momentum) times this batch's mean."""
    chosen, rejected = log_ratios(policy, reference)
    now = batch_mean(chosen - rejected, policy)
    return {"mean_margin": momentum * policy.running["mean_margin"] + (1 - momentum) * now}


def alpha_dpo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 2.5,
    gamma: float = 1.5,
    alpha: float = 0.2,
    momentum: float = 0.9,
) -> Result:
    """DPO with an adaptive reward margin (alpha-DPO).

    -log sigmoid(beta (log pi_w / n_w - log pi_l / n_l - alpha z) - gamma), z = (g - mean) / std, g = a/n_w - b/n_l

    It is SimPO whose target margin is larger for pairs that the policy tells apart better than the reference does, and
    smaller for the others. No gradient passes through z.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, token counts and weights; `running` holds the
        statistics of g, this batch in them.
      reference: log-probabilities.
      beta: as in SimPO; 2.5 to 10 in the authors' scripts.
      gamma: target margin of a pair with z = 0; 0.6 beta in one of the authors' scripts.
      alpha: how much the target follows z; 0 is `simpo`.
      momentum: of the running mean and standard deviation; see `advance_alpha_dpo`.

    Returns:
      (loss [B], metrics {name: [B]}); logps/* are means per token, target_margin is gamma + beta alpha z.

    TRL: none. The authors' running statistics begin at 0 uncorrected, so that their first z are some ten times as
      large; here they are corrected as Adam's moments are, and a deviation below 1e-6 counts as that.
    Source: Wu et al., arXiv 2410.10148, and their code.
    """
    chosen, rejected = per_token(policy.chosen, policy.rejected, policy)
    seen = policy.running["gap_seen"]
    mean, std = (policy.running[key] / jnp.where(seen > 0, seen, 1.0) for key in ("gap_mean", "gap_std"))
    z = jnp.where(seen > 0, (_gap(policy, reference) - mean) / jnp.maximum(std, 1e-6), 0.0)
    target = gamma + beta * alpha * z
    metrics = reward_metrics(beta * chosen, beta * rejected, policy, means=True)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - target), {**metrics, "target_margin": target}


def _gap(policy: PairLogps, reference: PairLogps) -> jax.Array:
    """[B] the difference of the log-ratios per token, without gradient."""
    chosen, rejected = per_token(*log_ratios(policy, reference), policy)
    return jax.lax.stop_gradient(chosen - rejected)


def advance_alpha_dpo(policy: PairLogps, reference: PairLogps, *, momentum: float, **_) -> dict[str, jax.Array]:
    """Running mean and standard deviation of g: momentum times themselves plus (1 - momentum) times this batch's.

    `gap_seen` is the same mean of ones. Divided by it the others are means of what was seen, with no part of the zeros
    that they began with.
    """
    gap = _gap(policy, reference)
    mean = batch_mean(gap, policy)
    now = {"gap_mean": mean, "gap_std": jnp.sqrt(batch_mean(jnp.square(gap - mean), policy)), "gap_seen": 1.0}
    return {key: momentum * policy.running[key] + (1 - momentum) * value for key, value in now.items()}
