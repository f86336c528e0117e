"""Training a reward model instead of a policy: `chosen` and `rejected` hold rewards, not log-probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefalign_jax.losses import ranks
from prefalign_jax.losses.ratios import Result, rewards
from prefalign_jax.types import PairLogps

LIKELIHOODS = ("ranking", "comparisons")


def bradley_terry(policy: PairLogps, reference: None = None, *, margin: float = 0.0, centre: float = 0.0) -> Result:
    """Reward model of pairs, by the Bradley-Terry model.

    -log sigmoid(r_w - r_l - margin m) + centre (r_w + r_l)^2

    Args:
      policy: [B] float32 rewards of each response, and the data's score gap m as `margin`.
      reference: none.
      margin: weight of the data's gap; 0 does without one, 1 is Llama 2's and TRL's.
      centre: weight that keeps rewards around 0, 0.01 by arXiv 2312.09244.

    Returns:
      (loss [B], metrics {name: [B]}).

    TRL: RewardTrainer, equal (`center_rewards_coefficient` is centre; it uses a margin whenever the data have one).
    Source: Ouyang et al., arXiv 2203.02155, Eq. 1; margin: Touvron et al., arXiv 2307.09288, Eq. 2; centring:
      Eisenstein et al., arXiv 2312.09244, Eq. 2.
    """
    gap = margin * policy.margin if margin else 0.0
    chosen, rejected = policy.chosen, policy.rejected
    loss = -jax.nn.log_sigmoid(chosen - rejected - gap) + centre * jnp.square(chosen + rejected)
    return loss, rewards(chosen, rejected)


def reward_ranking(
    policy: PairLogps, reference: None = None, *, likelihood: str = "ranking", centre: float = 0.0
) -> Result:
    """Reward model of whole rankings, by the Plackett-Luce model.

    sum_i log(1 + sum_{j: s_j < s_i} exp(r_j - r_i)), r the reward of each of K responses

    It is minus the log-likelihood of the data's ranking by Plackett and Luce, or of its comparisons by Bradley and
    Terry. Responses of equal score are not compared with each other.

    Args:
      policy: `responses` of [B] groups: float32 rewards in place of log-probabilities, and scores.
      reference: none.
      likelihood: ranking, the formula above; comparisons, the mean over all comparisons of
        -log sigmoid(r_i - r_j) for s_i > s_j, so that a prompt counts alike however many responses it has.
      centre: weight that keeps rewards around 0: of the mean over all comparisons of (r_i + r_j)^2.

    Returns:
      (loss [B], metrics {name: [B]}); of two responses it is `bradley_terry` either way.

    TRL: none of more than two responses.
    Source: Ouyang et al., arXiv 2203.02155, Eq. 1 (comparisons); rankings: Rafailov et al., arXiv 2305.18290, appendix
      A.3; centring: Eisenstein et al., arXiv 2312.09244, Eq. 2.
    """
    responses = policy.responses
    values = ranks.only_present(responses.logps, responses)
    gap = ranks.differences(values)
    number = jnp.maximum(ranks.over_comparisons(jnp.ones_like(gap), responses), 1)
    if likelihood == "comparisons":
        loss = ranks.over_comparisons(-jax.nn.log_sigmoid(gap), responses) / number
    else:
        loss = ranks.ranking_nll(values, responses)
    if centre:
        sums = jnp.square(values[..., :, None] + values[..., None, :])
        loss += centre * ranks.over_comparisons(sums, responses) / number
    measured = ranks.metrics(values, values, responses)
    return loss, {name: value for name, value in measured.items() if name.startswith("rewards/")}
