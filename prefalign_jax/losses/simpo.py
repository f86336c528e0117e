"""Losses of likelihoods without a reference: SimPO, RePO, SimPER, AlphaPO, CPO, SLiC-HF, RRHF, unlikelihood."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefalign_jax.losses.ratios import Result, exp_linear, per_token, reward_metrics, smoothed
from prefalign_jax.losses.sft import nll
from prefalign_jax.types import PairLogps

CPO_SURROGATES = ("sigmoid", "hinge", "ipo")


def shaped(logp: jax.Array, reward_alpha: float) -> jax.Array:
    """(1 - p^-alpha) / alpha of p = exp(logp): log p at alpha = 0; a straight line where p^-alpha exceeds e^30."""
    if reward_alpha == 0:
        return logp
    x = -reward_alpha * logp
    small = jnp.abs(x) < 1
    return -jnp.where(small, jnp.expm1(jnp.where(small, x, 0.0)), exp_linear(x) - 1) / reward_alpha


def simpo(
    policy: PairLogps,
    reference: None = None,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> Result:
    """Simple preference optimization (SimPO).

    -log sigmoid(beta (log pi_w / n_w - log pi_l / n_l) - gamma)

    The reward is the likelihood per token, with a target margin and no reference.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and token counts.
      reference: none.
      beta: 2 to 10.
      gamma: target margin; gamma / beta 0 to 1.
      label_smoothing: e, in [0, 0.5).

    Returns:
      (loss [B], metrics {name: [B]}); logps/* are means per token.

    TRL: CPOTrainer's `simpo` with `cpo_alpha=0`, equal (`simpo_gamma` is gamma).
    Source: Meng et al., arXiv 2405.14734, section 2.
    """
    chosen, rejected = per_token(policy.chosen, policy.rejected, policy)
    loss = smoothed(beta * (chosen - rejected) - gamma, label_smoothing)
    return loss, reward_metrics(beta * chosen, beta * rejected, policy, means=True)


def repo(policy: PairLogps, reference: None = None, *, gamma: float = 0.4) -> Result:
    """ReLU-based preference optimization (RePO).

    max(0, gamma - log pi_w / n_w + log pi_l / n_l)

    It is SimPO's limit as beta grows. A pair whose margin exceeds gamma has no
    gradient, all others have the same.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and token counts.
      reference: none.
      gamma: target margin of the log-likelihoods per token, in [0, 1]; 0.4 in the paper's analysis, 0.6 in a script.

    Returns:
      (loss [B], metrics {name: [B]}); rewards and logps/* are means per token.

    TRL: none; the authors' code is equal.
    Source: Wu et al., arXiv 2503.07426, section 3.1 (revised version), and their code.
    """
    chosen, rejected = per_token(policy.chosen, policy.rejected, policy)
    loss = jax.nn.relu(gamma - chosen + rejected)
    return loss, reward_metrics(chosen, rejected, policy, means=True)


def simper(policy: PairLogps, reference: None = None) -> Result:
    """Alignment by inverse perplexity (SimPER).

    -exp(log pi_w / n_w) + exp(log pi_l / n_l)

    The inverse perplexity of the chosen response is raised, that of the rejected one lowered. It has neither a
    reference nor a hyper-parameter, and a response that is unlikely has hardly a gradient.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and token counts.
      reference: none.

    Returns:
      (loss [B], metrics {name: [B]}); rewards and logps/* are means per token.

    TRL: none; the authors' code is equal.
    Source: Xiao et al., arXiv 2502.00883, and their code.
    """
    chosen, rejected = per_token(policy.chosen, policy.rejected, policy)
    return jnp.exp(rejected) - jnp.exp(chosen), reward_metrics(chosen, rejected, policy, means=True)


def alphapo(
    policy: PairLogps,
    reference: None = None,
    *,
    beta: float = 2.5,
    gamma: float = 0.1,
    reward_alpha: float = 0.25,
) -> Result:
    """SimPO with a shaped reward (AlphaPO).

    -log sigmoid(beta (r_w - r_l) - gamma), r = (1 - p^-alpha) / alpha, p = exp(log pi / n)

    Alpha bends the shape of the reward; alpha -> 0 is SimPO.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and token counts.
      reference: none.
      beta: as in SimPO.
      gamma: target margin, 0.1 in the paper.
      reward_alpha: alpha, any number; 0.25 in the paper.

    Returns:
      (loss [B], metrics {name: [B]}); logps/* are means per token.

    TRL: CPOTrainer's `alphapo` (`simpo` with `alpha`), equal.
    Source: Gupta et al., arXiv 2501.03884, section 3.
    """
    chosen, rejected = (shaped(x, reward_alpha) for x in per_token(policy.chosen, policy.rejected, policy))
    loss = -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)
    return loss, reward_metrics(beta * chosen, beta * rejected, policy, means=True)


def cpo(
    policy: PairLogps,
    reference: None = None,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    surrogate: str = "sigmoid",
    reward_alpha: float = 0.0,
) -> Result:
    """Contrastive preference optimization (CPO).

    -log sigmoid(beta (log pi_w - log pi_l)) - alpha log pi_w / n_w

    It is DPO with a uniform reference, and imitation of the chosen response.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and token counts.
      reference: none.
      beta: as in DPO.
      alpha: weight of the negative log-likelihood.
      label_smoothing: e, in [0, 0.5); of the sigmoid.
      surrogate: sigmoid; hinge, max(0, 1 - beta (..)); ipo, (.. - 1 / (2 beta))^2.
      reward_alpha: replaces log pi by (1 - pi^-alpha) / alpha, see `alphapo`.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: CPOTrainer's `sigmoid`, `hinge` and `ipo`, equal but for what they are given: its `ipo` means per token, its
      NLL a mean over the batch's chosen tokens.
    Source: Xu et al., arXiv 2401.08417, Eq. 3 and 5.
    """
    chosen, rejected = shaped(policy.chosen, reward_alpha), shaped(policy.rejected, reward_alpha)
    h = chosen - rejected
    if surrogate == "hinge":
        loss = jax.nn.relu(1 - beta * h)
    elif surrogate == "ipo":
        loss = jnp.square(h - 1 / (2 * beta))
    else:
        loss = smoothed(beta * h, label_smoothing)
    imitation = nll(policy, over="chosen", mean="pair")
    metrics = reward_metrics(beta * chosen, beta * rejected, policy)
    return loss + alpha * imitation, {**metrics, "nll_loss": imitation}


def slic(policy: PairLogps, reference: None = None, *, delta: float = 1.0, lam: float = 0.1) -> Result:
    """Sequence likelihood calibration (SLiC).

    max(0, delta - log pi_w + log pi_l) - lambda log pi_w

    It asks for a margin between likelihoods, and imitates the chosen response.

    Args:
      policy: [B] float32 log-probabilities, summed over each response.
      reference: none.
      delta: the margin, 0.5 to 10.
      lam: weight of imitation, 0.1 to 10; the paper imitates the SFT target, which in preference data is the chosen.

    Returns:
      (loss [B], metrics {name: [B]}); rewards are log-probabilities.

    TRL: none (its `hinge` is the normalised form with a reference).
    Source: Zhao et al., arXiv 2305.10425, section 2.
    """
    loss = jax.nn.relu(delta - policy.chosen + policy.rejected) - lam * policy.chosen
    return loss, reward_metrics(policy.chosen, policy.rejected, policy)


def rrhf(policy: PairLogps, reference: None = None, *, lam: float = 1.0) -> Result:
    """Rank responses to align with human feedback (RRHF), of a pair.

    max(0, log pi_l / n_l - log pi_w / n_w) - lambda log pi_w

    The two responses are ranked by likelihood per token, and the better one is imitated.

    Args:
      policy: [B] float32 log-probabilities, summed over each response, and token counts.
      reference: none.
      lam: weight of imitation, 0.1 to 10 in SimPO's comparison. The paper weighs both alike; its code has a mean over
        tokens there and 100 before the ranking.

    Returns:
      (loss [B], metrics {name: [B]}); rewards and logps/* are means per token.

    TRL: none.
    Source: Yuan et al., arXiv 2304.05302, section 3, as in Meng et al., arXiv 2405.14734.
    """
    chosen, rejected = per_token(policy.chosen, policy.rejected, policy)
    return jax.nn.relu(rejected - chosen) - lam * policy.chosen, reward_metrics(chosen, rejected, policy, means=True)


def unlikelihood(policy: PairLogps, reference: None = None, *, alpha: float = 0.1) -> Result:
    """Unlikelihood training.

    -log pi_w + alpha log pi_l

    The DPO paper's baseline raises the chosen and lowers the rejected response, with no bound on either.

    Args:
      policy: [B] float32 log-probabilities, summed over each response.
      reference: none.
      alpha: in [0, 1].

    Returns:
      (loss [B], metrics {name: [B]}); rewards are log-probabilities.

    TRL: none.
    Source: Rafailov et al., arXiv 2305.18290, section 6. (Welleck et al., arXiv 1908.04319, bound it:
      -log(1 - p) of each token.)
    """
    return alpha * policy.rejected - policy.chosen, reward_metrics(policy.chosen, policy.rejected, policy)
