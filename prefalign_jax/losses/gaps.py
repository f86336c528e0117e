"""Losses of the margin h that read by how much the scores of a pair differ, the data's score gap."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from prefalign_jax.losses.ratios import Result, log_ratios, reward_metrics
from prefalign_jax.types import PairLogps


def odpo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, alpha: float = 1.0) -> Result:
    """DPO with an offset (ODPO).

    -log sigmoid(beta h - alpha log(score_w - score_l))

    A pair must be told apart by as much as its scores differ.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and the data's score gap as `margin`; gaps below
        1e-6 count as that.
      reference: log-probabilities.
      beta: as in DPO.
      alpha: how much the gap matters, 0.5 to 1; below a gap of 1 the offset is negative.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: none; the authors' code is equal (beta scales no offset) and takes log 0.
    Source: Amini et al., arXiv 2402.10571, section 3.
    """
    chosen, rejected = log_ratios(policy, reference)
    x = beta * (chosen - rejected) - alpha * jnp.log(jnp.maximum(policy.margin, 1e-6))
    return -jax.nn.log_sigmoid(x), reward_metrics(beta * chosen, beta * rejected, policy)


def _kl(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(sigmoid(p) || sigmoid(q)) of two chances, from their log-odds."""
    right = jax.nn.sigmoid(p) * (jax.nn.log_sigmoid(p) - jax.nn.log_sigmoid(q))
    return right + jax.nn.sigmoid(-p) * (jax.nn.log_sigmoid(-p) - jax.nn.log_sigmoid(-q))


# (margin of the policy's rewards, margin of the data's) -> how far the first is from the second, 0 where they agree.
DISTANCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "backward_kl": lambda x, gap: _kl(gap, x),
    "forward_kl": _kl,
    "squared": lambda x, gap: jnp.square(x - gap),
}


def reward_aware_rpo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    eta: float = 1.0,
    distance: str = "backward_kl",
) -> Result:
    """Reward-aware preference optimization (reward-aware RPO).

    D(beta h, eta (score_w - score_l)), D = backward_kl, forward_kl or squared

    The margin of the policy's rewards is to be that of the data's scores, and not to grow without end. backward_kl is
    KL(sigmoid(gap) || sigmoid(beta h)): up to a constant, DPO whose label is as certain as the gap says. forward_kl is
    the same with the two exchanged, and squared is (beta h - gap)^2.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and the data's score gap as `margin`.
      reference: log-probabilities.
      beta: as in DPO.
      eta: scale of the scores: eta times a gap is the log-odds that the chosen response is the better one.
      distance: a key of DISTANCES.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: none; equal to `rpo_bwd_kl`, `rpo_fwd_kl` and `rpo_sq` of the authors' NeMo-Aligner. Of K responses their loss
      is `info_nca` up to a constant. (TRL's former `rpo_alpha` is `rpo`, another method.)
    Source: Sun et al., arXiv 2502.00203, and their code; backward_kl: Adler et al. (Nemotron-4), arXiv 2406.11704.
    """
    chosen, rejected = log_ratios(policy, reference)
    loss = DISTANCES[distance](beta * (chosen - rejected), eta * policy.margin)
    return loss, reward_metrics(beta * chosen, beta * rejected, policy)


def rebel(policy: PairLogps, reference: PairLogps, *, beta: float = 1.0) -> Result:
    """Regression of relative rewards (REBEL).

    (beta h - (score_w - score_l))^2

    It is policy optimisation as least squares. Its optimum over all pairs is the
    policy that maximises the score under the pull to the reference, pi_ref exp(score / beta) / Z.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and the data's score gap as `margin`.
      reference: log-probabilities; the method's own is the policy that wrote the responses, and moves.
      beta: 1 / eta of the paper, in units of the score.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: none; the authors' code is equal but for the factor eta^2.
    Source: Gao et al., arXiv 2404.16767, algorithm 1.
    """
    return reward_aware_rpo(policy, reference, beta=beta, distance="squared")
