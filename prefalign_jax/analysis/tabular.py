"""Preference alignment on a table: few prompts, few responses, every expectation a plain sum, the best policy known."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit, log_softmax, softmax

from prefalign_jax.losses import BoundLoss
from prefalign_jax.types import PairLogps, Responses


class Problem(NamedTuple):
    """X prompts with K responses each; a policy is its log-probabilities [X, K].

    Attributes:
      reward: [X, K], the true one.
      reference: [X, K], log pi_ref.
      prompts: [X], how often each prompt is drawn.
      drawn: [X, K], what the responses of pairs are drawn from; need not be the reference.
      tokens: [X, K], lengths of the responses.
    """

    reward: np.ndarray
    reference: np.ndarray
    prompts: np.ndarray
    drawn: np.ndarray
    tokens: np.ndarray


def make_problem(prompts: int = 3, responses: int = 5, seed: int = 0) -> Problem:
    """A problem drawn at random."""
    rng = np.random.default_rng(seed)
    shape = (prompts, responses)
    reward = rng.normal(size=shape)
    reference = log_softmax(rng.normal(size=shape), axis=-1)
    often = softmax(rng.normal(size=prompts))
    drawn = softmax(rng.normal(size=shape), axis=-1)
    return Problem(reward, reference, often, drawn, rng.integers(2, 9, shape).astype(float))


def both_orders(problem: Problem, preference: np.ndarray) -> np.ndarray:
    """[X, K, K] how often a pair is drawn, its first response preferred: two independent draws, alike ones left out.

    Args:
      problem: the problem.
      preference: [X, K, K], how often the first is preferred to the second.
    """
    drawn = problem.drawn
    return (
        problem.prompts[:, None, None] * drawn[:, :, None] * drawn[:, None, :] * preference * (1 - np.eye(len(drawn.T)))
    )


def bradley_terry(problem: Problem) -> np.ndarray:
    """[X, K, K] sigmoid(r(y) - r(y'))."""
    return expit(problem.reward[:, :, None] - problem.reward[:, None, :])


def population(
    loss: BoundLoss, weights: np.ndarray, tokens: np.ndarray, reference: np.ndarray | None = None
) -> Callable[[jax.Array], jax.Array]:
    """The expected loss as a function of the policy's logits [X, K].

    Args:
      loss: of pairs.
      weights: [X, K, K] as `both_orders` gives them.
      tokens: [X, K] lengths.
      reference: [X, K] log-probabilities, None for a loss without one.

    Returns:
      The function, differentiable.
    """
    x, w, l = np.nonzero(weights)  # noqa: E741 (the papers' names of the winner and the loser)
    counts = {"chosen_tokens": tokens[x, w], "rejected_tokens": tokens[x, l]}
    counts["mean_tokens"] = np.array([0.0, np.average(tokens[x, w], weights=weights[x, w, l])])

    def pairs(logps):
        return PairLogps(chosen=logps[x, w], rejected=logps[x, l], **counts)

    @jax.jit
    def expected(theta):
        losses, _ = loss(pairs(jax.nn.log_softmax(theta)), None if reference is None else pairs(reference))
        return jnp.vdot(weights[x, w, l], losses)

    return expected


class Groups(NamedTuple):
    """N groups of K responses each, and how often each group is drawn.

    Attributes:
      prompt: [N], of the group.
      responses: [N, K], numbers of the responses.
      scores: [N, K], more is better.
      weights: [N], how often; they sum to 1.
    """

    prompt: np.ndarray
    responses: np.ndarray
    scores: np.ndarray
    weights: np.ndarray


def rankings(problem: Problem) -> Groups:
    """All rankings of all responses to each prompt, drawn by Plackett and Luce's model of the true reward.

    The best is drawn first, in proportion to exp(reward), then the best of the rest, and so on.
    """
    prompts, k = problem.reward.shape
    orders = np.array(list(itertools.permutations(range(k))))
    ranked = problem.reward[:, orders]  # [X, K!, K], the best first
    rest = np.logaddexp.accumulate(ranked[..., ::-1], axis=-1)[..., ::-1]
    weights = problem.prompts[:, None] * np.exp(np.sum(ranked - rest, axis=-1))
    scores = np.broadcast_to(np.arange(k, 0, -1.0), (weights.size, k))
    return Groups(np.repeat(np.arange(prompts), len(orders)), np.tile(orders, (prompts, 1)), scores, weights.ravel())


def population_of_groups(
    loss: BoundLoss, groups: Groups, tokens: np.ndarray, reference: np.ndarray | None = None
) -> Callable[[jax.Array], jax.Array]:
    """The expected loss as a function of the policy's logits [X, K].

    Args:
      loss: of groups.
      groups: how often each is drawn.
      tokens: [X, K] lengths.
      reference: [X, K] log-probabilities, None for a loss without one.

    Returns:
      The function, differentiable.
    """
    prompt, numbers = groups.prompt[:, None], groups.responses
    lengths, present = tokens[prompt, numbers], np.ones(numbers.shape)
    best = np.argmax(groups.scores, axis=1, keepdims=True)
    best_tokens = np.take_along_axis(lengths, best, axis=1)[:, 0]
    mean_tokens = np.array([0.0, np.average(best_tokens, weights=groups.weights)])

    def record(logps):
        responses = Responses(logps[prompt, numbers], lengths, groups.scores, present)
        sides = (responses.logps[:, 0], responses.logps[:, 1], lengths[:, 0], lengths[:, 1])
        return PairLogps(*sides, mean_tokens=mean_tokens, responses=responses)

    @jax.jit
    def expected(theta):
        losses, _ = loss(record(jax.nn.log_softmax(theta)), None if reference is None else record(reference))
        return jnp.vdot(groups.weights, losses)

    return expected


def descend(f: Callable[[jax.Array], jax.Array], start: np.ndarray, steps: int, rate: float) -> np.ndarray:
    """[1 + steps, X, K] log-probabilities along gradient descent of f."""

    def step(theta, _):
        theta = theta - rate * jax.grad(f)(theta)
        return theta, theta

    path = jax.jit(lambda theta: jax.lax.scan(step, theta, length=steps)[1])(start)
    return log_softmax(np.concatenate([start[None], path]), axis=-1)


def expected_reward(problem: Problem, logps: np.ndarray) -> np.ndarray:
    """[...] sum_x p(x) sum_y pi(y|x) r(x, y) of policies [..., X, K]."""
    return np.einsum("x,...xk,xk->...", problem.prompts, np.exp(logps), problem.reward)


def divergence(problem: Problem, logps: np.ndarray) -> np.ndarray:
    """[...] KL(policy || reference) in nats, the mean over prompts, of policies [..., X, K]."""
    return np.einsum("x,...xk,...xk->...", problem.prompts, np.exp(logps), logps - problem.reference)


def frontier(problem: Problem, kl: np.ndarray) -> np.ndarray:
    """[...] the most reward that any policy has at a divergence.

    It is that of pi_ref exp(r / lambda) / Z for the lambda that gives this divergence (arXiv 2305.18290, Eq. 4).

    Args:
      problem: the problem.
      kl: [...] nats.
    """

    def tilted(inverse: np.ndarray) -> np.ndarray:
        return log_softmax(problem.reference + np.asarray(inverse)[..., None, None] * problem.reward, axis=-1)

    low, high = np.zeros_like(kl), np.full_like(kl, 1e5)  # of 1 / lambda, in which the divergence increases
    for _ in range(80):
        middle = (low + high) / 2
        short = divergence(problem, tilted(middle)) < kl
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return expected_reward(problem, tilted(high))
