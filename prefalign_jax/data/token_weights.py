"""By how much each token of a response counts in the sums of a loss: by its place, or by what two models think of it.

Weights multiply those that the pairs have already, such as 0 for what is read and not trained.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from prefalign_jax.data.pairs import Origin, Pairs, concatenate, from_list
from prefalign_jax.types import Pair

_BLOCK = 8192  # pairs that are copied at once


def decayed(pairs: Pairs, gamma: float) -> Pairs:
    """Temporal decay (D2PO): w_t = gamma^t at the t-th trained token of a response, counted from 0.

    DPO's margin of such sums is sum_t gamma^t (log pi - log pi_ref) of the chosen response less that of the rejected
    one: earlier tokens contribute more, and long responses no more than 1 / (1 - gamma) tokens.

    Args:
      pairs: the tokens; those of weight 0 are passed over and not counted.
      gamma: in (0, 1]; 1 changes nothing, the paper has 0.98.

    Returns:
      The pairs with these weights; no token is copied.

    Source: Shao et al., arXiv 2502.14340. The authors' code counts t from 1, which is DPO with beta gamma in place of
      beta, and where a loss divides by tokens it divides by their number, not by their weights.

    Example:
      >>> one = Pair(np.int32([1]), np.int32([2, 3, 4]), np.int32([5]))
      >>> decayed(from_list([one]), 0.5)[0].token_weights[0].tolist()
      [1.0, 0.5, 0.25]
    """
    if gamma == 1:
        return pairs
    weights = list(pairs.token_weights)
    for number, (tokens, given) in enumerate(zip(pairs.buffers, weights, strict=True)):
        starts = pairs.start[:, 1:][(pairs.buffer[:, 1:] == number) & (pairs.length[:, 1:] > 0)]
        if not len(starts):
            continue  # it holds prompts
        given = np.ones(len(tokens), np.float32) if given is None else given
        before = np.cumsum(given != 0) - (given != 0)  # trained tokens in front of each
        first = np.zeros(len(tokens), np.int64)
        first[starts] = starts
        weights[number] = given * np.float32(gamma ** (before - before[np.maximum.accumulate(first)]))
    return pairs.with_token_weights(weights)


def trained_tokens(pairs: Pairs) -> np.ndarray:
    """[P, 2] int64, how many tokens of the chosen and of the rejected response have a weight other than 0."""
    return pairs.sums(lambda weights: weights != 0)[:, 1:3].astype(np.int64)


def contrasted(
    pairs: Pairs, ratios: np.ndarray, *, k: float = 1.0, mu: float = 1.0, low: float = -0.5, high: float = 1.5
) -> Pairs:
    """Importance of tokens (TIS-DPO): w_t = k exp(mu r_t) in chosen responses, k exp(-mu r_t) in rejected ones.

    r_t = clamp(log pi_plus - log pi_minus of token t, low, high) estimates the token's reward by two models, of which
    pi_plus writes the better responses. So tokens that earn a response its label count more than those against it.

    Args:
      pairs: the tokens.
      ratios: [N] float32, log pi_plus - log pi_minus of each token whose weight is not 0: pair by pair, first the
        chosen response, then the rejected one.
      k: what all weights are multiplied by, 1 in the paper.
      mu: how strongly a weight follows the ratio, 1 in the paper.
      low, high: what ratios are clamped to, -0.5 and 1.5 in the paper.

    Returns:
      The pairs with these weights. Their tokens are copied, for a response may be chosen here and rejected there.

    Source: Liu et al., arXiv 2410.04350, section 4. The loss there has a further term, the difference of the responses'
      weighted KL divergences; `tdpo1` and `tdpo2` have such a one.

    Example:
      >>> one = Pair(np.int32([1]), np.int32([2, 3]), np.int32([4]))
      >>> weights = contrasted(from_list([one]), np.float32([0, 9, 1]))[0].token_weights
      >>> [np.log(each).round(3).tolist() for each in weights]
      [[0.0, 1.5], [-1.0]]
    """
    counts = trained_tokens(pairs)
    if counts.sum() != len(ratios):
        raise ValueError(f"{len(ratios)} ratios for {counts.sum()} trained tokens")
    parts, weights = [], np.clip(ratios, low, high)
    ends = np.cumsum(counts)
    for start in range(0, len(pairs), _BLOCK):
        block = pairs[start : start + _BLOCK]
        weighted: list[Pair] = []
        for number, pair in enumerate(block, start):
            sides = []
            for side, ids in enumerate((pair.chosen, pair.rejected)):
                end = ends[2 * number + side]
                strength = mu if side == 0 else -mu
                own = pair.weights(side)
                own = np.ones(len(ids), np.float32) if own is None else own.copy()
                own[own != 0] *= k * np.exp(strength * weights[end - counts[number, side] : end])
                sides.append(own)
            weighted.append(dataclasses.replace(pair, token_weights=tuple(sides)))
        about = zip(block.source.tolist(), block.held_out.tolist(), block.prompt_key.tolist(), strict=True)
        parts.append(from_list(weighted, [Origin(*one) for one in about]))
    return dataclasses.replace(concatenate(parts), dropped=pairs.dropped, needs=pairs.needs)
