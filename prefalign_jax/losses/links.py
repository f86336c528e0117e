"""DPO with another link: other functions of the two log-ratios a and b whose difference the logistic loss is of."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefalign_jax.losses.dpo import dpo
from prefalign_jax.losses.modifiers import diverge
from prefalign_jax.losses.ratios import Result, log_ratios, reward_metrics, with_logps
from prefalign_jax.types import PairLogps


def f_dpo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    divergence: str = "js",
    divergence_alpha: float = 0.5,
) -> Result:
    """DPO under an f-divergence (f-DPO).

    -log sigmoid(beta (f'(u_w) - f'(u_l))), u = pi / pi_ref

    `divergence` does the same to any loss of the margin.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: as in DPO.
      divergence: reverse_kl, forward_kl, js, chi_squared, alpha (the paper's), alpha_trl; see modifiers.diverge.
      divergence_alpha: of the last two.

    Returns:
      (loss [B], metrics {name: [B]}); rewards are beta (f'(u) - f'(1)), the implicit rewards of the divergence.

    TRL: `f_divergence_type`, equal (its alpha divergence is alpha_trl since 0.29, alpha before); its rewards/* stay
      beta log u.
    Source: Wang et al., arXiv 2309.16240, section 4.
    """
    changed = diverge(policy, reference, divergence=divergence, divergence_alpha=divergence_alpha)
    loss, metrics = dpo(*changed, beta=beta)
    return loss, with_logps(metrics, policy)


def chi_po(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, reward_max: float = 10.0) -> Result:
    """Chi-squared preference optimization (chi-PO).

    -log sigmoid(clip(beta (u_w + log u_w - u_l - log u_l), -2 R, 2 R)), u = pi / pi_ref

    It is DPO under the sum of the KL and the chi-squared divergence, which holds a response that has become much
    likelier than under the reference. `divergence=chi_squared` without the clip does the same to any loss of the
    margin.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: as in DPO. Near the reference u + log u is twice as steep as log u; for a response that has become likelier
        it grows as u itself, beyond e^30 as a straight line.
      reward_max: R, the range of rewards that one believes in: a pair whose margin exceeds 2 R either way has no
        gradient.

    Returns:
      (loss [B], metrics {name: [B]}); rewards are beta (u + log u - 1), the implicit rewards of the divergence.

    TRL: none.
    Source: Huang et al., arXiv 2407.13399, algorithm 1.
    """
    chosen, rejected = log_ratios(*diverge(policy, reference, divergence="chi_squared"))
    x = jnp.clip(beta * (chosen - rejected), -2 * reward_max, 2 * reward_max)
    return -jax.nn.log_sigmoid(x), reward_metrics(beta * chosen, beta * rejected, policy)


def dpo_shift(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, lam: float = 0.7) -> Result:
    """DPO with a discounted rejected response (DPO-Shift).

    -log sigmoid(beta (a - lambda b))

    The rejected response's reward counts less, so that the chosen response does not fall with it. The price is a
    smaller margin.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: as in DPO.
      lam: f(lambda) of the paper, in (0, 1]; 1 is `dpo`. 0.7 in the authors' recipe. Their code can also
        move it along a line from step to step, which this loss does not.

    Returns:
      (loss [B], metrics {name: [B]}); rewards are DPO's, without lambda, as the authors report them.

    TRL: none; the authors' code is equal.
    Source: Yang et al., arXiv 2502.07599, and their code.
    """
    chosen, rejected = log_ratios(policy, reference)
    loss = -jax.nn.log_sigmoid(beta * (chosen - lam * rejected))
    return loss, reward_metrics(beta * chosen, beta * rejected, policy)
