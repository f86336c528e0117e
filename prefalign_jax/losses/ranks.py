"""What losses of groups share: who is better than whom among the responses to a prompt, and the metrics of it.

Responses of equal score are never compared with each other. Where one response of a rank is wanted, such as the best,
those that share the rank stand for it by their mean. So no order of the responses matters, and neither does filler.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prefalign_jax.losses.ratios import Metrics
from prefalign_jax.types import PairLogps, Responses


def present(responses: Responses) -> jax.Array:
    """[B, K] bool, False for filler."""
    return jnp.asarray(responses.present) > 0


def only_present(values: jax.Array, responses: Responses, filler: float = 0.0) -> jax.Array:
    """[B, K] the values, and something else where a group has fewer responses."""
    return jnp.where(present(responses), values, filler)


def better(responses: Responses) -> jax.Array:
    """[B, K, K] bool, whether the first response is scored higher than the second."""
    scores, real = jnp.asarray(responses.scores), present(responses)
    return (scores[..., :, None] > scores[..., None, :]) & real[..., :, None] & real[..., None, :]


def alike(responses: Responses) -> jax.Array:
    """[B, K, K] bool, whether both responses have the same score, as each has with itself."""
    scores, real = jnp.asarray(responses.scores), present(responses)
    return (scores[..., :, None] == scores[..., None, :]) & real[..., :, None] & real[..., None, :]


def count(responses: Responses) -> jax.Array:
    """[B] int32, how many responses a group has."""
    return jnp.sum(present(responses), axis=-1)


def place(responses: Responses, number: jax.Array | int) -> jax.Array:
    """[B, K] weights that sum to 1: the response at a place of the ranking by score.

    Args:
      responses: of B groups.
      number: the place, [B] or one for all; 0 is the best.

    Returns:
      1 for that response, 1 / n for each of n that share the place; all 0 in a group that has no such place.

    Example:
      >>> two_alike = Responses(*jnp.zeros((2, 1, 3)), scores=jnp.array([[1.0, 2.0, 1.0]]), present=jnp.ones((1, 3)))
      >>> print(place(two_alike, 0), place(two_alike, 2))
      [[0. 1. 0.]] [[0.5 0.  0.5]]
    """
    ahead, shared = jnp.sum(better(responses), axis=-2), jnp.sum(alike(responses), axis=-1)
    number = jnp.broadcast_to(number, ahead.shape[:-1])[..., None]
    covers = present(responses) & (ahead <= number) & (number < ahead + shared)
    return covers.astype(responses.logps.dtype) / jnp.maximum(jnp.sum(covers, axis=-1, keepdims=True), 1)


def log_ratios(policy: PairLogps, reference: PairLogps) -> jax.Array:
    """[B, K] log pi - log pi_ref of every response, 0 for filler.

    Raises:
      ValueError: there is no reference.
    """
    if reference is None:
        raise ValueError("log-ratios need a reference, and there is none; declare needs={'reference'} too")
    # The reference is data, wherever it comes from: no gradient.
    held = only_present(jax.lax.stop_gradient(reference.responses.logps), policy.responses)
    return only_present(policy.responses.logps, policy.responses) - held


def per_token(values: jax.Array, responses: Responses) -> jax.Array:
    """[B, K] divided by the tokens of the response; an empty one counts as one token."""
    return values / jnp.maximum(only_present(responses.tokens, responses, 1.0), 1.0)


def differences(values: jax.Array) -> jax.Array:
    """[B, K, K] the first response's value minus the second's."""
    return values[..., :, None] - values[..., None, :]


def over_comparisons(values: jax.Array, responses: Responses) -> jax.Array:
    """[B] the sum of values [B, K, K] over all comparisons: the first response is better than the second."""
    return jnp.sum(jnp.where(better(responses), values, 0.0), axis=(-2, -1))


def ranking_nll(rewards: jax.Array, responses: Responses) -> jax.Array:
    """[B] sum_i log(1 + sum_{j worse than i} exp(r_j - r_i)): minus the log-likelihood of the ranking.

    It is Plackett and Luce's: the best is drawn first, in proportion to exp(r), then the best of the rest, and so on.
    Each of several responses of one score is held against all that are worse, and not against the others.
    """
    worse = better(responses)
    lowest = jnp.finfo(rewards.dtype).min / 2  # its exponential is 0 beside any reward's, and it has no NaN gradient
    field = jax.nn.logsumexp(jnp.where(worse, rewards[..., None, :], lowest), axis=-1)
    terms = -jax.nn.log_sigmoid(jnp.where(jnp.any(worse, axis=-1), rewards - field, 0.0))
    return jnp.sum(jnp.where(jnp.any(worse, axis=-1), terms, 0.0), axis=-1)


def metrics(rewards: jax.Array, logps: jax.Array, responses: Responses) -> Metrics:
    """The metrics of pairs under the same names, [B] each: of two responses they are those of the pair.

    Args:
      rewards, logps: [B, K].
      responses: of B groups.

    Returns:
      rewards/chosen and logps/chosen are the best response's, rewards/rejected and logps/rejected the mean of all
      others; rewards/accuracies is the share of the comparisons that the reward orders as the scores do, where equal
      rewards count one half. What a group without a comparison says nothing of is NaN, which means leave out.
    """
    best = place(responses, 0)
    others = present(responses) & (best == 0)
    compared = over_comparisons(jnp.ones_like(differences(rewards)), responses)

    def share(total: jax.Array, number: jax.Array) -> jax.Array:
        return jnp.where(number > 0, total / jnp.maximum(number, 1), jnp.nan)

    def sides(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        rest = share(jnp.sum(jnp.where(others, values, 0.0), axis=-1), jnp.sum(others, axis=-1))
        return jnp.sum(best * only_present(values, responses), axis=-1), rest

    (chosen, rejected), (chosen_logps, rejected_logps) = sides(rewards), sides(logps)
    right = over_comparisons((1 + jnp.sign(differences(rewards))) / 2, responses)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": share(right, compared),
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
