"""Odds-ratio preference optimisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

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


def orpo(
    policy: PairLogps, reference: None = None, *, lam: float = 0.1, nll_over: str = "chosen", nll_mean: str = "pair"
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """NLL(chosen) - lambda log sigmoid(log odds(chosen) - log odds(rejected)), the odds of mean log-probabilities.

    The gradient of the second term is -lambda delta h, where delta = 1 / (1 + odds_w / odds_l) and
    h = grad log P_w / (1 - P_w) - grad log P_l / (1 - P_l); the paper's Eq. 8 to 10 print it with the opposite sign.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and token counts.
      reference: none.
      lam: the paper's lambda, which TRL calls beta; 0.1 to 1.
      nll_over: 'chosen' as the paper writes it, or 'prompt+chosen' as TRL and the authors' code compute it.
      nll_mean: 'pair' averages within a pair first, as the paper's expectation; 'batch' over all tokens, as TRL.

    Returns:
      (loss [B], metrics {name: [B]}) with TRL's names: logps/* and rewards/* (lambda times them) are means per token,
      log_odds_ratio is the log-sigmoid and log_odds_chosen its argument.

    Source: Hong et al., arXiv 2403.07691, Eq. 4 to 7.

    Example:
      >>> same = PairLogps(jnp.array([-2.0]), jnp.array([-2.0]), jnp.array([2.0]), jnp.array([2.0]))
      >>> loss, metrics = orpo(same, lam=0.5)  # NLL 1 per token, no preference: 1 + 0.5 log 2
      >>> print(loss, metrics["log_odds_ratio"])
      [1.3465736] [-0.6931472]
    """
    chosen = policy.chosen / jnp.maximum(policy.chosen_tokens, 1.0)
    rejected = policy.rejected / jnp.maximum(policy.rejected_tokens, 1.0)
    ratio = log_odds(chosen) - log_odds(rejected)
    log_odds_ratio = jax.nn.log_sigmoid(ratio)
    nll_loss = nll(policy, over=nll_over, mean=nll_mean)
    metrics = {
        "rewards/chosen": lam * chosen,
        "rewards/rejected": lam * rejected,
        "rewards/margins": lam * (chosen - rejected),
        "rewards/accuracies": (chosen > rejected).astype(chosen.dtype),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "nll_loss": nll_loss,
        "log_odds_ratio": log_odds_ratio,
        "log_odds_chosen": ratio,
    }
    return nll_loss - lam * log_odds_ratio, metrics
