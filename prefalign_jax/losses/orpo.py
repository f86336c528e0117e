"""Losses of the odds of a response, P / (1 - P) with P its likelihood per token: ORPO, and ASFT."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefalign_jax.losses.ratios import Metrics, Result, per_token, rewards
from prefalign_jax.losses.sft import nll
from prefalign_jax.types import PairLogps


def log_odds(x: jax.Array) -> jax.Array:
    """log(P / (1 - P)) = x - log(1 - exp x) from a log-probability x <= 0.

    Finite at x = 0 too: values above -eps^2, nearer than rounding leaves any mean of log-probabilities, count as -eps^2
    and keep the slope that holds there, so that a response of probability 1 can still be pushed down.

    Args:
      x: [B] mean log-probabilities.

    Returns:
      [B], the same type.
    """
    floor = jnp.finfo(x.dtype).eps ** 2
    x = x - jax.lax.stop_gradient(x - jnp.minimum(x, -floor))
    return x - jax.nn.log1mexp(-x)


RATIOS = ("odds", "probability")


def orpo(
    policy: PairLogps,
    reference: None = None,
    *,
    lam: float = 0.1,
    nll_over: str = "chosen",
    nll_mean: str = "pair",
    ratio: str = "odds",
    extra_eos: bool = False,
) -> Result:
    """Odds ratio preference optimization (ORPO).

    -log pi_w / n_w - lambda log sigmoid(log odds_w - log odds_l), odds = P / (1 - P), P = exp(log pi / n)

    The gradient of the second term is -lambda delta h, where delta = 1 / (1 + odds_w / odds_l) and
    h = grad log P_w / (1 - P_w) - grad log P_l / (1 - P_l); the paper's Eq. 8 to 10 print it with the opposite sign.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and token counts.
      reference: none.
      lam: the paper's lambda, which TRL calls beta; 0.1 to 1.
      nll_over: 'chosen' as the paper writes it; 'prompt+chosen' as TRL computes it; 'text', that without
        end-of-sequence tokens, as the authors' code does.
      nll_mean: 'pair' averages within a pair first, as the paper's expectation; 'batch' over all tokens, as TRL and the
        authors' code.
      ratio: 'odds', or 'probability' for log P_w - log P_l, the ablation of the paper's appendix B.
      extra_eos: the odds take in a second end-of-sequence token after each response, as the authors' mask does. With
        nll_over=text and nll_mean=batch this is their code, on rows that padding does not fill to the last.

    Returns:
      (loss [B], metrics {name: [B]}) with TRL's names: logps/* and rewards/* (lambda times them) are means per token,
      log_odds_ratio is the log-sigmoid and log_odds_chosen its argument.

    TRL: ORPOTrainer, equal with nll_over=prompt+chosen and nll_mean=batch; NaN there at P = 1 and for empty responses.
    Source: Hong et al., arXiv 2403.07691, Eq. 4 to 7.

    Example:
      >>> same = PairLogps(jnp.array([-2.0]), jnp.array([-2.0]), jnp.array([2.0]), jnp.array([2.0]))
      >>> loss, metrics = orpo(same, lam=0.5)  # NLL 1 per token, no preference: 1 + 0.5 log 2
      >>> print(loss, metrics["log_odds_ratio"])
      [1.3465736] [-0.6931472]
    """
    chosen, rejected, tokens = policy.chosen, policy.rejected, policy
    if extra_eos:
        chosen, rejected = chosen + policy.after.chosen, rejected + policy.after.rejected
        tokens = policy._replace(chosen_tokens=policy.chosen_tokens + 1, rejected_tokens=policy.rejected_tokens + 1)
    chosen, rejected = per_token(chosen, rejected, tokens)
    link = log_odds if ratio == "odds" else lambda x: x
    argument = link(chosen) - link(rejected)
    log_odds_ratio = jax.nn.log_sigmoid(argument)
    nll_loss = nll(policy, over=nll_over, mean=nll_mean)
    metrics = {
        **rewards(lam * chosen, lam * rejected),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "nll_loss": nll_loss,
        "log_odds_ratio": log_odds_ratio,
        "log_odds_chosen": argument,
    }
    return nll_loss - lam * log_odds_ratio, metrics


def orpo_beta(
    policy: PairLogps,
    reference: None = None,
    *,
    beta: float = 0.5,
    lam: float = 1.0,
    sft_weight: float = 1.0,
) -> Result:
    """ORPO with scaled log-odds.

    -w log pi_w / n_w - lambda log sigmoid(beta (log odds_w - log odds_l)), odds = P / (1 - P), P = exp(log pi / n)

    The log-odds are scaled by beta, as DPO's log-ratios are. With sft_weight=0 it is the form of two stages,
    which begins where supervised fine-tuning ended and does not go on with it.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and token counts.
      reference: none.
      beta: temperature of the log-odds; 0.2 to 0.7 in the comparison's best runs. 1 is `orpo`.
      lam: lambda, the weight of the preference; 1 in the comparison. (What TRL's ORPO calls beta is this one.)
      sft_weight: w, the weight of the negative log-likelihood: 1 for one stage, 0 after a stage of `sft`.

    Returns:
      (loss [B], metrics {name: [B]}): rewards/* are beta times the log-odds, logps/* means per token; log_odds_ratio is
      the log-sigmoid and log_odds_chosen its argument, as in `orpo`.

    TRL: none; ORPOTrainer is beta=1, and its `beta` is lambda.
    Source: Gorbatovski et al., arXiv 2502.01237, version 3, section 3.1.2; length normalisation: appendix A.1.
    """
    chosen, rejected, metrics = _log_odds(policy, beta)
    argument = chosen - rejected
    log_odds_ratio = jax.nn.log_sigmoid(argument)
    loss = sft_weight * metrics["nll_loss"] - lam * log_odds_ratio
    return loss, {**metrics, "log_odds_ratio": log_odds_ratio, "log_odds_chosen": argument}


def asft(
    policy: PairLogps,
    reference: None = None,
    *,
    beta: float = 1.0,
    lam: float = 1.0,
    sft_weight: float = 1.0,
) -> Result:
    """Aligned supervised fine-tuning (ASFT).

    -w log pi_w / n_w - lambda [log sigmoid(beta log odds_w) + log sigmoid(-beta log odds_l)], odds = P / (1 - P)

    Each response's odds are moved by themselves, where ORPO moves them against each other. At beta = 1
    the bracket is log P_w + log(1 - P_l), the binary cross-entropy of which response is which. With sft_weight=0 it is
    the form of two stages, which begins where supervised fine-tuning ended.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and token counts; P = exp(log pi / n).
      reference: none.
      beta: temperature of the log-odds, 1 in the method's own paper; 0.1 to 0.3 in the comparison's best runs.
      lam: lambda, the weight of the preference; 1 in the comparison.
      sft_weight: w, the weight of the negative log-likelihood: 1 for one stage, 0 after a stage of `sft`.

    Returns:
      (loss [B], metrics {name: [B]}): rewards/* are beta times the log-odds, logps/* means per token.

    TRL: none.
    Source: Wang et al., arXiv 2409.10571; beta and two stages: Gorbatovski et al., arXiv 2502.01237, version 3,
      sections 2.4 and 3.1.
    """
    chosen, rejected, metrics = _log_odds(policy, beta)
    preference = jax.nn.log_sigmoid(chosen) + jax.nn.log_sigmoid(-rejected)
    return sft_weight * metrics["nll_loss"] - lam * preference, metrics


def _log_odds(policy: PairLogps, beta: float) -> tuple[jax.Array, jax.Array, Metrics]:
    """(beta log odds_w, beta log odds_l, metrics of both and of the chosen one's negative log-likelihood)."""
    chosen, rejected = per_token(policy.chosen, policy.rejected, policy)
    scaled = beta * log_odds(chosen), beta * log_odds(rejected)
    metrics = {
        **rewards(*scaled),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "nll_loss": nll(policy, over="chosen", mean="pair"),
    }
    return *scaled, metrics
