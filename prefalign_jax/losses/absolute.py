"""Losses of each log-ratio by itself, a of the chosen and b of the rejected response, and not of their margin alone."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from prefalign_jax.losses.ratios import Result, batch_mean, log_ratios, reward_metrics
from prefalign_jax.types import PairLogps

SHIFTS = ("running", "none")


def nca(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Result:
    """Noise-contrastive alignment (NCA) of a pair.

    -log sigmoid(beta a) - 1/2 log sigmoid(-beta a) - 1/2 log sigmoid(-beta b)

    The chosen response's own likelihood is held up.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: 0.01 in the authors' code.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: `nca_pair`, equal.
    Source: Chen et al., arXiv 2402.05369, section 4.1, for two responses.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    away = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * away, reward_metrics(chosen, rejected, policy)


def bco(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, shift: str = "running") -> Result:
    """Binary classifier optimization (BCO).

    -log sigmoid(beta a - d) - log sigmoid(-(beta b - d)), d the running mean of the rewards

    It is a binary classifier of responses. Its logit is the reward, shifted to the middle of what the run has seen.

    Args:
      policy: [B] float32 log-probabilities, summed over each response; `running` holds the shift d.
      reference: log-probabilities.
      beta: 0.01 in the paper.
      shift: 'running', or 'none' for d = 0.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: `bco_pair` is shift=none, equal; before 0.29, and in its BCOTrainer, it had the running mean, this batch in it.
    Source: Jung et al., arXiv 2404.04656, section 4.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    d = policy.running["shift"] if shift == "running" else 0.0
    loss = -jax.nn.log_sigmoid(chosen - d) - jax.nn.log_sigmoid(d - rejected)
    metrics = reward_metrics(chosen, rejected, policy)
    if shift == "running":
        metrics["bco_shift"] = jnp.full_like(chosen, d)
    return loss, metrics


def advance_bco(policy: PairLogps, reference: PairLogps, *, beta: float, **_) -> Mapping[str, jax.Array]:
    """The running mean of all rewards with those of this batch in it."""
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    return running_mean(policy.running, batch_mean((chosen + rejected) / 2, policy))


def running_mean(running: Mapping[str, jax.Array], value: jax.Array) -> dict[str, jax.Array]:
    """{'shift': mean over all steps so far, 'steps'} with one more."""
    steps = running["steps"] + 1
    return {"shift": running["shift"] + (value - running["shift"]) / steps, "steps": steps}


def sppo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.001) -> Result:
    """Self-play preference optimization (SPPO) with hard labels.

    (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2

    The log-ratios are regressed onto +-1 / (2 beta).

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: 0.001 in the paper (eta = 1000).

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: `sppo_hard`, equal; the authors' code has half of it, and soft win rates.
    Source: Wu et al., arXiv 2405.00675, Eq. 4.7 with win rates 1 and 0.
    """
    chosen, rejected = log_ratios(policy, reference)
    target = 1 / (2 * beta)
    loss = jnp.square(chosen - target) + jnp.square(rejected + target)
    return loss, reward_metrics(beta * chosen, beta * rejected, policy)


def apo_zero(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Result:
    """Anchored preference optimization that raises the chosen response (APO-zero).

    1 - sigmoid(beta a) + sigmoid(beta b)

    The chosen response is raised and the rejected one lowered. It is for data better than the model.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: 0.05 to 0.1.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: `apo_zero`, equal.
    Source: D'Oosterlinck et al., arXiv 2408.06266, Eq. 7, up to a constant.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected), reward_metrics(chosen, rejected, policy)


def apo_down(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Result:
    """Anchored preference optimization that lowers both responses (APO-down).

    sigmoid(beta a) + 1 - sigmoid(beta h)

    The rejected response is lowered more than the chosen one. It is for data worse than the model.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: 0.05 to 0.1.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: `apo_down`, equal.
    Source: D'Oosterlinck et al., arXiv 2408.06266, Eq. 8, up to a constant.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    loss = jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)
    return loss, reward_metrics(chosen, rejected, policy)


def kto_pair(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Result:
    """Kahneman-Tversky optimization (KTO) on pairs.

    [1 - sigmoid(beta (a - KL_l))] + [1 - sigmoid(beta (KL_w - b))], KL = max(0, batch mean of the side's log-ratio)

    The other side's mean log-ratio is the reference point; no gradient passes through it.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and weights.
      reference: log-probabilities.
      beta: as in DPO.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: had `kto_pair` before 0.9, half of this sum, with gradients through the KL.
    Source: Ethayarajh et al., arXiv 2402.01306, Eq. 7.
    """
    chosen, rejected = log_ratios(policy, reference)
    point = lambda ratio: jax.lax.stop_gradient(jnp.maximum(batch_mean(ratio, policy), 0.0))  # noqa: E731
    loss = jax.nn.sigmoid(-beta * (chosen - point(rejected))) + jax.nn.sigmoid(-beta * (point(chosen) - rejected))
    return loss, reward_metrics(beta * chosen, beta * rejected, policy)
