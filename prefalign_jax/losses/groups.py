"""Losses of groups: all K responses to a prompt at once, with a score for each; see ranks.py for how ties count.

Of response i: s_i is its score, n_i its tokens, and r_i = beta (log pi - log pi_ref) its reward, unless a loss says
otherwise. Of two responses each is a loss of pairs, which its docstring names.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from prefalign_jax.losses import ranks
from prefalign_jax.losses.ratios import Result, exp_linear
from prefalign_jax.types import PairLogps, Responses

GAINS = ("exponential", "score", "none")
DISCOUNTS = ("log", "none")
WIN_RATES = ("scores", "ranks")
_LARGEST = 1e15  # of the scores that gains are made of: what they weigh stays within float32


def plackett_luce(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Result:
    """DPO on whole rankings, by the Plackett-Luce model.

    sum_i log(1 + sum_{j: s_j < s_i} exp(r_j - r_i))

    It is minus the log-likelihood that the best is drawn first, then the best of the rest, and so on, each in
    proportion to exp(r). Its optimum over rankings that a reward gives is DPO's: pi_ref exp(reward / beta) / Z.
    Responses of equal score are not compared with each other; each is held against all that are worse.

    Args:
      policy, reference: `responses` of [B] groups: log-probabilities, summed over each response, and scores.
      beta: as in DPO.

    Returns:
      (loss [B], metrics {name: [B]}); of two responses it is `dpo`.

    TRL: none.
    Source: Rafailov et al., arXiv 2305.18290, appendix A.3.

    Example:
      >>> logps = jnp.full((1, 3), -4.0)
      >>> three = Responses(logps, jnp.ones((1, 3)), scores=jnp.array([[3.0, 1.0, 2.0]]), present=jnp.ones((1, 3)))
      >>> best_two = PairLogps(*jnp.full((4, 1), -4.0), responses=three)
      >>> print(plackett_luce(best_two, best_two)[0])  # log 3! where policy and reference agree: any order is as likely
      [1.7917595]
    """
    responses = policy.responses
    rewards = beta * ranks.log_ratios(policy, reference)
    return ranks.ranking_nll(rewards, responses), ranks.metrics(rewards, responses.logps, responses)


def lipo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.05,
    gain: str = "exponential",
    discount: str = "log",
) -> Result:
    """Listwise preference optimization (LiPO-lambda).

    -sum_{i, j: s_i > s_j} |G_i - G_j| |1 / D_i - 1 / D_j| log sigmoid(r_i - r_j), G = 2^s - 1, D = log2(1 + rank)

    It is DPO of all comparisons, each weighted by what exchanging the two would change in the ranking's discounted
    gain. The rank is that by r, 1 for the largest; where rewards are equal, as
    all are at the first step, the scores decide. No gradient passes through the weights.

    Args:
      policy, reference: `responses` of [B] groups: log-probabilities, summed over each response, and scores.
      beta: 0.05 in the paper.
      gain: exponential, G = 2^s - 1, for scores in [0, 1] as the paper has (beyond 2^43 a straight line); score, G = s;
        none, 1 in place of |G_i - G_j|.
      discount: log, or none for 1 in place of |1 / D_i - 1 / D_j|. With gain=none it is DPO of all comparisons.

    Returns:
      (loss [B], metrics {name: [B]}); of two responses it is `dpo`, times a constant unless neither weight is used.

    TRL: none.
    Source: Liu et al., arXiv 2402.01878, Eq. 8; the logarithm's base is that of the library which they use.
    """
    responses = policy.responses
    rewards = beta * ranks.log_ratios(policy, reference)
    weight = _gain(responses, gain) * _discount(rewards, responses, discount)  # ranks are steps: no slope
    losses = -weight * jax.nn.log_sigmoid(ranks.differences(rewards))
    return ranks.over_comparisons(losses, responses), ranks.metrics(rewards, responses.logps, responses)


def _gain(responses: Responses, gain: str) -> jax.Array:
    """[B, K, K] |G_i - G_j|."""
    if gain == "none":
        return jnp.ones_like(ranks.differences(responses.logps))
    scores = jnp.clip(ranks.only_present(responses.scores, responses), -_LARGEST, _LARGEST)
    return jnp.abs(ranks.differences(exp_linear(math.log(2) * scores) if gain == "exponential" else scores))


def _discount(rewards: jax.Array, responses: Responses, discount: str) -> jax.Array:
    """[B, K, K] |1 / D_i - 1 / D_j|; of those that share a rank each has the mean rank."""
    if discount == "none":
        return jnp.ones_like(ranks.differences(rewards))
    by_score = ranks.better(responses)
    both = by_score | jnp.swapaxes(by_score, -2, -1) | ranks.alike(responses)
    gap = ranks.differences(rewards)
    ahead = both & ((gap > 0) | ((gap == 0) & by_score))  # the first is ranked before the second
    level = both & (gap == 0) & ranks.alike(responses)
    rank = 0.5 + jnp.sum(ahead, axis=-2) + jnp.sum(level, axis=-2) / 2  # each is level with itself
    return jnp.abs(ranks.differences(1 / jnp.log2(1 + jnp.maximum(rank, 1.0))))


def _shares(policy: PairLogps, alpha: float) -> jax.Array:
    """[B, K] softmax(s / alpha) over the responses of a group."""
    responses = policy.responses
    lowest = jnp.finfo(responses.logps.dtype).min / 2
    scores = ranks.only_present(jnp.asarray(responses.scores) / alpha, responses, lowest)
    return ranks.only_present(jax.nn.softmax(scores, axis=-1), responses)


def info_nca(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, alpha: float = 1.0) -> Result:
    """Noise-contrastive alignment with explicit rewards (InfoNCA).

    -sum_i w_i log softmax(r)_i, w = softmax(s / alpha)

    It is the cross-entropy of which response is picked by the policy's reward to which is picked by the data's.

    Args:
      policy, reference: `responses` of [B] groups: log-probabilities, summed over each response, and scores.
      beta: 0.01 in the authors' script.
      alpha: temperature of the scores; the authors' script divides by 0.0001, which leaves the best response alone.

    Returns:
      (loss [B], metrics {name: [B]}); of two responses it is `dpo` as alpha -> 0.

    TRL: none.
    Source: Chen et al., arXiv 2402.05369, section 3.
    """
    responses = policy.responses
    rewards = beta * ranks.log_ratios(policy, reference)
    lowest = jnp.finfo(rewards.dtype).min / 2
    chances = jax.nn.log_softmax(ranks.only_present(rewards, responses, lowest), axis=-1)
    loss = -jnp.sum(_shares(policy, alpha) * ranks.only_present(chances, responses), axis=-1)
    return loss, ranks.metrics(rewards, responses.logps, responses)


def nca_group(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, alpha: float = 1.0) -> Result:
    """Noise-contrastive alignment (NCA) of a group.

    -sum_i [w_i log sigmoid(r_i) + 1 / K log sigmoid(-r_i)], w = softmax(s / alpha)

    Each of K responses has its own likelihood moved, where InfoNCA moves them against each other.

    Args:
      policy, reference: `responses` of [B] groups: log-probabilities, summed over each response, and scores.
      beta: 0.01 in the authors' script.
      alpha: temperature of the scores; 0.0001 in the authors' script, which leaves the best response alone.

    Returns:
      (loss [B], metrics {name: [B]}); of two responses it is `nca` as alpha -> 0.

    TRL: none of more than two responses.
    Source: Chen et al., arXiv 2402.05369, section 4.1.
    """
    responses = policy.responses
    rewards = beta * ranks.log_ratios(policy, reference)
    towards = jnp.sum(_shares(policy, alpha) * jax.nn.log_sigmoid(rewards), axis=-1)
    away = jnp.sum(ranks.only_present(jax.nn.log_sigmoid(-rewards), responses), axis=-1)
    loss = -towards - away / jnp.maximum(ranks.count(responses), 1)
    return loss, ranks.metrics(rewards, responses.logps, responses)


def sppo_group(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.001,
    win_rate: str = "scores",
    own: bool = True,
) -> Result:
    """Self-play preference optimization (SPPO) with estimated win rates.

    sum_i [log(pi / pi_ref)_i - (p_i - 1/2) / beta]^2, p_i = mean_j sigmoid(s_i - s_j)

    The log-ratio of each response is regressed onto how often it beats the group.

    Args:
      policy, reference: `responses` of [B] groups: log-probabilities, summed over each response, and scores.
      beta: 0.001 in the paper (eta = 1000).
      win_rate: scores, sigmoid(s_i - s_j), for the scores of a reward model; ranks, 1 for the better one, 1/2 for both
        where scores are equal, for scores of any other unit.
      own: the mean takes in the response itself, which it beats half the time, as the paper does.

    Returns:
      (loss [B], metrics {name: [B]}); of two responses it is `sppo` with win_rate=ranks and own=False. The sum over the
      responses is K times the authors' mean.

    TRL: none of more than two responses.
    Source: Wu et al., arXiv 2405.00675, section 4 and algorithm 1; win rates of scores: their code.
    """
    responses = policy.responses
    ratios = ranks.log_ratios(policy, reference)
    gap = ranks.differences(ranks.only_present(responses.scores, responses))
    wins = (1 + jnp.sign(gap)) / 2 if win_rate == "ranks" else jax.nn.sigmoid(gap)
    total = jnp.sum(jnp.where(ranks.present(responses)[..., None, :], wins, 0.0), axis=-1)
    number = ranks.count(responses)[..., None]
    rate = total / jnp.maximum(number, 1) if own else (total - 0.5) / jnp.maximum(number - 1, 1)
    loss = jnp.sum(ranks.only_present(jnp.square(ratios - (rate - 0.5) / beta), responses), axis=-1)
    return loss, ranks.metrics(beta * ratios, responses.logps, responses)


def rrhf_group(policy: PairLogps, reference: None = None, *, lam: float = 1.0) -> Result:
    """Rank responses to align with human feedback (RRHF), of a group.

    sum_{i, j: s_i > s_j} max(0, log pi_j / n_j - log pi_i / n_i) - lambda log pi_best

    All K responses are ranked by likelihood per token, and the best one is imitated.

    Args:
      policy: `responses` of [B] groups: log-probabilities, summed over each response, token counts and scores.
      reference: none.
      lam: weight of imitation. The paper weighs both alike; its code has a mean over tokens there and 100 before the
        ranking.

    Returns:
      (loss [B], metrics {name: [B]}); of two responses it is `rrhf`; rewards and logps/* are means per token.

    TRL: none.
    Source: Yuan et al., arXiv 2304.05302, section 3.
    """
    responses = policy.responses
    logps = ranks.only_present(responses.logps, responses)
    means = ranks.per_token(logps, responses)
    ranking = ranks.over_comparisons(jax.nn.relu(-ranks.differences(means)), responses)
    imitation = jnp.sum(ranks.place(responses, 0) * logps, axis=-1)
    return ranking - lam * imitation, ranks.metrics(means, means, responses)


def tpo(
    policy: PairLogps,
    reference: None = None,
    *,
    beta: float = 0.01,
    alpha: float = 1.0,
    nll_mean: str = "pair",
) -> Result:
    """Triple preference optimization (TPO).

    -log sigmoid(beta (log pi_w - log pi_l)) - alpha log pi_gold / n_gold

    The best response of the group (gold) is imitated, and the second (w) is preferred to the worst (l). Of
    two responses the gold one is the chosen one too.

    Args:
      policy: `responses` of [B] groups: log-probabilities, summed over each response, token counts and scores.
      reference: none.
      beta: 0.01 in the authors' runs.
      alpha: weight of the negative log-likelihood; in the authors' runs 1 for base models and 0.05 for tuned ones.
      nll_mean: 'pair' divides by the gold response's tokens, so that every group counts alike; 'batch' by the mean
        number of tokens of the batch's gold responses, as TRL and the authors' code do.

    Returns:
      (loss [B], metrics {name: [B]}); of two responses it is `cpo`.

    TRL: TPOTrainer's `sigmoid`, equal with nll_mean=batch; its rewards/* are of w and l.
    Source: Saeidi et al., arXiv 2405.16681, version 2, and their code.
    """
    rewards = beta * ranks.only_present(policy.responses.logps, policy.responses)
    return _triple(policy, rewards, policy.responses.logps, 0.0, alpha, nll_mean)


def tpo_l(
    policy: PairLogps,
    reference: None = None,
    *,
    beta: float = 2.0,
    gamma: float = 1.6,
    alpha: float = 1.0,
    nll_mean: str = "pair",
) -> Result:
    """Length-controlled triple preference optimization (TPO-L).

    -log sigmoid(beta (log pi_w / n_w - log pi_l / n_l) - gamma) - alpha log pi_gold / n_gold

    It is TPO with likelihoods per token and a target margin, as SimPO's.

    Args:
      policy: `responses` of [B] groups: log-probabilities, summed over each response, token counts and scores.
      reference: none.
      beta: 2 to 10 in most of the authors' runs, 0.01 in others.
      gamma: target margin, 0.3 to 10.
      alpha: as in TPO.
      nll_mean: as in TPO.

    Returns:
      (loss [B], metrics {name: [B]}); of two responses it is `simpo` plus alpha times the NLL of the chosen one;
      logps/* are means per token.

    TRL: TPOTrainer's `tpo-l`, equal with nll_mean=batch (`tpo_l_gamma` is gamma); its rewards/* are of w and l.
    Source: Saeidi et al., arXiv 2405.16681, version 2, and their code.
    """
    means = ranks.per_token(ranks.only_present(policy.responses.logps, policy.responses), policy.responses)
    return _triple(policy, beta * means, means, gamma, alpha, nll_mean)


def _triple(
    policy: PairLogps, rewards: jax.Array, logps: jax.Array, gamma: float, alpha: float, nll_mean: str
) -> Result:
    """-log sigmoid(r_w - r_l - gamma) + alpha NLL(gold)."""
    responses = policy.responses
    last = ranks.count(responses) - 1
    gold = ranks.place(responses, 0)
    chosen = ranks.place(responses, jnp.clip(last - 1, 0, 1))
    rejected = ranks.place(responses, jnp.maximum(last, 0))
    margin = jnp.sum((chosen - rejected) * rewards, axis=-1)
    held = ranks.only_present(responses.logps, responses)
    each = held / jnp.maximum(policy.mean_tokens[1], 1.0) if nll_mean == "batch" else ranks.per_token(held, responses)
    imitation = -jnp.sum(gold * each, axis=-1)
    loss = -jax.nn.log_sigmoid(margin - gamma) + alpha * imitation
    return loss, {**ranks.metrics(rewards, logps, responses), "nll_loss": imitation}
