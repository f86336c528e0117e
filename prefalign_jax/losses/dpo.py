"""Logistic losses of the margin h = a - b of two log-ratios: DPO and what adds an offset, a weight or a term to it.

a = log pi(y_w|x) - log pi_ref(y_w|x), b the same of y_l; all are sums over the response unless a loss says otherwise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefalign_jax.losses.modifiers import downsample, shorten, wpo_weight
from prefalign_jax.losses.ratios import (
    Result,
    log_ratios,
    per_token,
    reward_metrics,
    smoothed,
    with_logps,
)
from prefalign_jax.losses.sft import nll
from prefalign_jax.types import PairLogps


def dpo(
    policy: PairLogps,
    reference: PairLogps | None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> Result:
    """Direct preference optimization (DPO).

    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)

    Args:
      policy: [B] float32 log-probabilities, summed over each response.
      reference: the same under the reference; None if `reference_free`.
      beta: strength of the pull towards the reference; lower is weaker. Typically 0.01 to 0.5.
      label_smoothing: e, the assumed probability that a label is flipped (conservative DPO), in [0, 0.5).
      reference_free: h of the policy's log-probabilities alone.

    Returns:
      (loss [B], metrics {name: [B]}).

    Raises:
      ValueError: a reference is missing, or given though `reference_free`.

    TRL: `sigmoid`, equal; label smoothing, which the authors' code has, is accepted and ignored there since 0.29.
    Source: Rafailov et al., arXiv 2305.18290, Eq. 7; label smoothing: E. Mitchell, A note on DPO with noisy
      preferences, 2023, Eq. 3.

    Example:
      >>> logps = PairLogps(jnp.array([-3.0]), jnp.array([-3.0]), jnp.ones(1), jnp.ones(1))
      >>> print(dpo(logps, logps)[0])  # log 2 where policy and reference agree
      [0.6931472]
    """
    if reference_free == (reference is not None):
        raise ValueError("dpo takes a reference exactly when reference_free=False")
    chosen, rejected = (policy.chosen, policy.rejected) if reference_free else log_ratios(policy, reference)
    loss = smoothed(beta * (chosen - rejected), label_smoothing)
    return loss, reward_metrics(beta * chosen, beta * rejected, policy)


def ln_dpo(policy: PairLogps, reference: PairLogps, *, beta: float = 5.0) -> Result:
    """Length-normalized DPO (LN-DPO).

    -log sigmoid(beta (a / n_w - b / n_l))

    It is DPO of log-ratios per token, so that length earns nothing.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response, and token counts.
      beta: about 5: a mean is smaller than a sum.

    Returns:
      (loss [B], metrics {name: [B]}); rewards are beta times the means per token.

    TRL: `sigmoid_norm`, equal; its rewards/* are beta times the sums.
    Source: Lambert et al. (Tulu 3), arXiv 2411.15124, section 5.
    """
    chosen, rejected = per_token(*log_ratios(policy, reference), policy)
    loss = -jax.nn.log_sigmoid(beta * (chosen - rejected))
    return loss, reward_metrics(beta * chosen, beta * rejected, policy)


def r_dpo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, alpha: float = 0.05) -> Result:
    """Length-regularized DPO (R-DPO).

    -log sigmoid(beta h + alpha (n_w - n_l))

    The reward is r - alpha n under the same pull to the reference. The policy need not learn what length explains of a
    preference.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response, and token counts.
      beta: as in DPO.
      alpha: reward of a token, 0.05 to 1 in SimPO's comparison.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: none.
    Source: Park et al., arXiv 2403.19159, section 4.
    """
    chosen, rejected = log_ratios(policy, reference)
    x = beta * (chosen - rejected) + alpha * (policy.chosen_tokens - policy.rejected_tokens)
    return -jax.nn.log_sigmoid(x), reward_metrics(beta * chosen, beta * rejected, policy)


def dpop(policy: PairLogps, reference: PairLogps, *, beta: float = 0.3, lam: float = 50.0) -> Result:
    """DPO-Positive (DPOP).

    -log sigmoid(beta (h - lambda max(0, -a)))

    The chosen response may not become less likely than under the reference.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: 0.3 in the paper.
      lam: lambda, 5 to 500; 50 in the paper.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: none.
    Source: Pal et al. (Smaug), arXiv 2402.13228, section 3 (from version 2 on; the first has its brackets wrong).
    """
    chosen, rejected = log_ratios(policy, reference)
    x = beta * (chosen - rejected - lam * jax.nn.relu(-chosen))
    return -jax.nn.log_sigmoid(x), reward_metrics(beta * chosen, beta * rejected, policy)


def rpo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, alpha: float = 1.0) -> Result:
    """Iterative reasoning preference optimization (Iterative RPO).

    -log sigmoid(beta h) - alpha log pi(y_w|x) / n_w

    It is DPO and imitation of the chosen response, which keeps it likely.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response, and token counts.
      beta: as in DPO.
      alpha: weight of the negative log-likelihood; 1 in the paper, 0.005 in arXiv 2405.16436.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: `rpo_alpha` before 0.29 (0.9 weighted the other term); now `loss_type=["sigmoid", "sft"]`. Its NLL is a mean
      over the batch's tokens.
    Source: Pang et al. (Iterative RPO), arXiv 2404.19733, section 2, version 3.
    """
    loss, metrics = dpo(policy, reference, beta=beta)
    imitation = nll(policy, over="chosen", mean="pair")
    return loss + alpha * imitation, {**metrics, "nll_loss": imitation}


def cal_dpo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.002) -> Result:
    """Calibrated DPO (Cal-DPO).

    -log sigmoid(h) + 1/2 [(a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2]

    The log-ratios are calibrated to +-1 / (2 beta), so the chosen one rises and the rejected one falls.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: 0.001 to 0.002 in the authors' scripts.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: none; the authors' code is equal.
    Source: Xiao et al., arXiv 2412.14516, section 4; the factor 1/2 is their code's.
    """
    chosen, rejected = log_ratios(policy, reference)
    target = 1 / (2 * beta)
    calibration = 0.5 * (jnp.square(chosen - target) + jnp.square(rejected + target))
    loss = -jax.nn.log_sigmoid(chosen - rejected) + calibration
    return loss, reward_metrics(beta * chosen, beta * rejected, policy)


def tdpo1(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Result:
    """Token-level DPO, first form (TDPO1).

    -log sigmoid(beta (h - (KL_l - KL_w))), KL = sum_t KL(pi_ref || pi) at the response's tokens

    It is DPO derived token by token, which brings in the divergence along each response.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and `token_kl`.
      reference: log-probabilities.
      beta: as in DPO.

    Returns:
      (loss [B], metrics {name: [B]}); kl/chosen and kl/rejected are the sums, in nats.

    TRL: none; equal to the authors' code.
    Source: Zeng et al., arXiv 2404.11999, section 4.3.
    """
    return _tdpo(policy, reference, beta, policy.token_kl.rejected - policy.token_kl.chosen)


def tdpo2(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, alpha: float = 0.5) -> Result:
    """Token-level DPO, second form (TDPO2).

    -log sigmoid(beta (h - alpha (KL_l - stop_gradient(KL_w))))

    It is TDPO1 whose chosen divergence is not pushed up.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and `token_kl`.
      reference: log-probabilities.
      beta: as in DPO.
      alpha: weight of the divergences, 0.5 in the paper.

    Returns:
      (loss [B], metrics {name: [B]}); kl/chosen and kl/rejected are the sums, in nats.

    TRL: none; equal to the authors' code.
    Source: Zeng et al., arXiv 2404.11999, section 4.3.
    """
    chosen_kl = jax.lax.stop_gradient(policy.token_kl.chosen)
    return _tdpo(policy, reference, beta, alpha * (policy.token_kl.rejected - chosen_kl))


def _tdpo(policy: PairLogps, reference: PairLogps, beta: float, divergence: jax.Array) -> Result:
    chosen, rejected = log_ratios(policy, reference)
    metrics = reward_metrics(beta * chosen, beta * rejected, policy)
    kl = {"kl/chosen": policy.token_kl.chosen, "kl/rejected": policy.token_kl.rejected}
    return -jax.nn.log_sigmoid(beta * (chosen - rejected - divergence)), {**metrics, **kl}


def ld_dpo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, ld_alpha: float = 0.5) -> Result:
    """Length-desensitized DPO (LD-DPO).

    -log sigmoid(beta h), h of sums whose tail beyond min(n_w, n_l) tokens counts ld_alpha

    The tail of the longer response counts less. `ld_alpha` does the same to any loss of log-ratios.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response and over their `shared` tokens.
      beta: as in DPO.
      ld_alpha: 1 is DPO, 0 leaves the tail out.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: `ld_alpha`, equal; its logps/* are the shortened sums. Before 0.29 it shortened the policy's alone.
    Source: Liu et al., arXiv 2409.06411, section 3.
    """
    loss, metrics = dpo(*shorten(policy, reference, ld_alpha=ld_alpha), beta=beta)
    return loss, with_logps(metrics, policy)


def sampo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Result:
    """DPO with a down-sampled divergence (SamPO).

    -log sigmoid(beta h), h of sums over min(n_w, n_l) tokens drawn at random from each response

    Down-sampling takes the length out of the margin; `sampled` does the same to any loss of log-ratios.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response and over their `sampled` tokens.
      beta: as in DPO.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: none. The authors draw anew at each step, and for policy and reference apart; here both take the same tokens,
      as the paper writes it, and a pair keeps its draw, so that runs are reproducible and the reference can be cached.
    Source: Lu et al., arXiv 2406.10957, section 3.
    """
    loss, metrics = dpo(*downsample(policy, reference, sampled=True), beta=beta)
    return loss, with_logps(metrics, policy)


def wpo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, clip: bool = True) -> Result:
    """Weighted preference optimization (WPO).

    -min(1, w_w w_l) log sigmoid(beta h), w = exp(mean_t(log p_t - log sum_v p_v^2)) without gradient

    Pairs that the policy itself would write weigh more; `weighting=wpo` does the same to any loss of log-ratios.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and `sum_squares`.
      reference: log-probabilities.
      beta: as in DPO.
      clip: at 1, as the authors' code does.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: `use_weighting` is clip=False, equal; it clipped before 0.29.
    Source: Zhou et al., arXiv 2406.11827, Eq. 2.
    """
    loss, metrics = dpo(policy, reference, beta=beta)
    weight = wpo_weight(policy, clip=clip)
    return weight * loss, {**metrics, "wpo_weight": weight}
