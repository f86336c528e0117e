"""Losses of the margin h = a - b that are not DPO's logistic one: squares, hinges and other curves."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from prefalign_jax.losses.ratios import Result, exp_linear, log_ratios, reward_metrics
from prefalign_jax.losses.ratios import per_token as means
from prefalign_jax.types import PairLogps


def ipo(policy: PairLogps, reference: PairLogps, *, tau: float = 0.1, per_token: bool = False) -> Result:
    """Identity preference optimization (IPO).

    (h - 1 / (2 tau))^2

    The margin is regressed onto a finite target, so that certain labels cannot push it to infinity.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      tau: strength of the regularisation (TRL calls it beta), typically 0.01 to 1.
      per_token: h of the means per token, as TRL computes it, which says the authors confirmed it; the paper's formula
        and the code of DPO's authors sum.

    Returns:
      (loss [B], metrics {name: [B]}); rewards are tau times the summed log-ratios, as TRL reports them.

    TRL: `ipo` is per_token=True, equal.
    Source: Azar et al., arXiv 2310.12036, Eq. 17.
    """
    chosen, rejected = log_ratios(policy, reference)
    metrics = reward_metrics(tau * chosen, tau * rejected, policy)
    if per_token:
        chosen, rejected = means(chosen, rejected, policy)
    return jnp.square(chosen - rejected - 1 / (2 * tau)), metrics


def hinge(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Result:
    """Hinge loss of the reward margin, as in RSO.

    max(0, 1 - beta h)

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: inverse of the margin beyond which a pair is left alone.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: `hinge`, equal.
    Source: RSO, Liu et al., arXiv 2309.06657, section 3; after SLiC-HF, Zhao et al., arXiv 2305.10425.
    """
    chosen, rejected = log_ratios(policy, reference)
    return jax.nn.relu(1 - beta * (chosen - rejected)), reward_metrics(beta * chosen, beta * rejected, policy)


def exo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Result:
    """Efficient exact optimization (EXO).

    q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e), q = sigmoid(beta h)

    It is KL(policy's preference || label's), the reverse of DPO's direction.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: as in DPO.
      label_smoothing: e, in (0, 0.5); 0.001 in the paper. At 0 the divergence would be infinite.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: `exo_pair`, equal.
    Source: Ji et al., arXiv 2402.00856, Eq. 16.
    """
    chosen, rejected = log_ratios(policy, reference)
    x, e = beta * (chosen - rejected), label_smoothing
    right = jax.nn.sigmoid(x) * (jax.nn.log_sigmoid(x) - math.log1p(-e))
    wrong = jax.nn.sigmoid(-x) * (jax.nn.log_sigmoid(-x) - math.log(e))
    return right + wrong, reward_metrics(beta * chosen, beta * rejected, policy)


def discopop(policy: PairLogps, reference: PairLogps, *, beta: float = 0.05, temperature: float = 0.05) -> Result:
    """Discovered preference optimization (DiscoPOP).

    -(1 - m) log sigmoid(x) + m exp(-x), x = beta h, m = sigmoid(x / t)

    It is the log-ratio modulated loss: a blend of the logistic and the exponential loss that a language model
    discovered.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: 0.05 in the paper.
      temperature: t, in (0, 1]; 0.05 in the paper.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: `discopop`, equal where finite; NaN there once -x exceeds 88, because m and exp(-x) are taken apart.
    Source: Lu et al., arXiv 2406.08414, Eq. 5.
    """
    chosen, rejected = log_ratios(policy, reference)
    x, t = beta * (chosen - rejected), temperature
    logistic = -jax.nn.sigmoid(-x / t) * jax.nn.log_sigmoid(x)
    exponential = jnp.exp(jax.nn.log_sigmoid(x / t) - x)  # m exp(-x); the exponent is at most 0 but near x = 0
    return logistic + exponential, reward_metrics(beta * chosen, beta * rejected, policy)


def focal_po(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, gamma: float = 0.05) -> Result:
    """Focal preference optimization (FocalPO).

    -p^gamma log p, p = sigmoid(beta h)

    A pair that is ranked wrong counts less than in DPO, where focal loss, (1 - p)^gamma, would let it count more. Below
    p = exp(-1 / gamma) the slope turns, so that such a pair is given up: a reward margin of -20 at gamma = 0.05.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: as in DPO.
      gamma: 0 is `dpo`.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: none.
    Source: Liu et al., arXiv 2501.06645, as a review at themoonlight.io states its loss; the authors' code is not out.
    """
    chosen, rejected = log_ratios(policy, reference)
    log_p = jax.nn.log_sigmoid(beta * (chosen - rejected))
    return -jnp.exp(gamma * log_p) * log_p, reward_metrics(beta * chosen, beta * rejected, policy)


# f(x) of x = beta h: convex for all but Savage's.
SURROGATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "logistic": lambda x: -jax.nn.log_sigmoid(x) / math.log(2),
    "hinge": lambda x: jax.nn.relu(1 - x),
    "squared": lambda x: jnp.square(1 - x),
    "exponential": lambda x: exp_linear(-x),
    "truncated_quadratic": lambda x: jnp.square(jax.nn.relu(1 - x)),
    "savage": lambda x: jnp.square(jax.nn.sigmoid(-x)),
}


def gpo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, surrogate: str = "exponential") -> Result:
    """Generalized preference optimization (GPO).

    f(beta h), f = logistic, hinge, squared, exponential, truncated_quadratic or savage

    It is a surrogate of the 0-1 loss. logistic: DPO / log 2. hinge: SLiC's. squared:
    (1 - x)^2, IPO's up to scale. exponential: exp(-x). truncated_quadratic: max(0, 1 - x)^2. savage:
    1 / (1 + exp(x))^2.

    Args:
      policy, reference: [B] float32 log-probabilities, summed over each response.
      beta: as in DPO; the exponential goes on as a straight line beyond exp(30).
      surrogate: a key of SURROGATES.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: none of its own.
    Source: Tang et al., arXiv 2402.05749, section 3.
    """
    chosen, rejected = log_ratios(policy, reference)
    loss = SURROGATES[surrogate](beta * (chosen - rejected))
    return loss, reward_metrics(beta * chosen, beta * rejected, policy)
