"""What can be done to a loss of log-ratios whatever its formula: other sums, another divergence, weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prefalign_jax.losses.ratios import exp_linear, log_ratios
from prefalign_jax.types import PairLogps, Sides

Records = tuple[PairLogps, PairLogps | None]


def shorten(policy: PairLogps, reference: PairLogps | None, *, ld_alpha: float = 1.0) -> Records:
    """log pi = (sum over the first min(n_w, n_l) tokens) + ld_alpha (sum over the tail of the longer response).

    Args:
      policy, reference: with `shared` sums.
      ld_alpha: 1 changes nothing, 0 leaves the tail out.

    Returns:
      Both, with these sums in place of the plain ones.

    Source: LD-DPO, Liu et al., arXiv 2409.06411, section 3.
    """

    def one(record: PairLogps) -> PairLogps:
        sums = (head + ld_alpha * (whole - head) for head, whole in zip(record.shared, record[:2], strict=True))
        return record._replace(**Sides(*sums)._asdict())

    return one(policy), reference and one(reference)


def downsample(policy: PairLogps, reference: PairLogps | None, *, sampled: bool = False) -> Records:
    """log pi = sum over min(n_w, n_l) tokens of each response, drawn at random from the longer one.

    Args:
      policy, reference: with `sampled` sums; both draw the same tokens.
      sampled: False changes nothing.

    Returns:
      Both, with these sums and counts in place of the plain ones.

    Source: SamPO, Lu et al., arXiv 2406.10957.
    """
    if not sampled:
        return policy, reference
    shorter = jnp.minimum(policy.chosen_tokens, policy.rejected_tokens)

    def one(record: PairLogps) -> PairLogps:
        return record._replace(**record.sampled._asdict(), chosen_tokens=shorter, rejected_tokens=shorter)

    return one(policy), reference and one(reference)


def _alpha_link(ratio: jax.Array, alpha: float) -> jax.Array:
    """(1 - u^-alpha) / alpha with u = exp(ratio); log u where alpha is 0, in whose neighbourhood expm1 keeps digits."""
    if abs(alpha) < 1e-6:
        return ratio
    x = -alpha * ratio
    return -jnp.where(x < 1, jnp.expm1(jnp.minimum(x, 1.0)), exp_linear(jnp.maximum(x, 1.0)) - 1) / alpha


# (log u, divergence_alpha) -> f'(u) - f'(1): what takes the log-ratio's place under the f-divergence. The constant
# cancels in a margin of sums, not in one of means per token.
DIVERGENCES: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "reverse_kl": lambda ratio, alpha: ratio,  # f = u log u
    "forward_kl": lambda ratio, alpha: 1 - exp_linear(-ratio),  # f = -log u
    "js": lambda ratio, alpha: jax.nn.log_sigmoid(ratio) + math.log(2),  # f = u log u - (u + 1) log((u + 1) / 2)
    "chi_squared": lambda ratio, alpha: ratio + _alpha_link(ratio, -1.0),  # f = u log u + (u - 1)^2 / 2
    "alpha": _alpha_link,  # f = (u^(1 - alpha) - (1 - alpha) u - alpha) / (alpha (alpha - 1))
    "alpha_trl": lambda ratio, alpha: _alpha_link(ratio, 1 - alpha),  # the same f, by TRL's alpha
}


def diverge(
    policy: PairLogps,
    reference: PairLogps,
    *,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Records:
    """The log-ratio log u becomes f'(u) - f'(1), for a pull to the reference by the f-divergence with generator f.

    reverse_kl: log u. forward_kl: 1 - 1 / u. js: log(2 u / (1 + u)). chi_squared: log u + u - 1, the reverse KL and the
    chi-squared divergence added. alpha: (1 - u^-alpha) / alpha, which runs from the reverse KL (0) to the forward KL
    (1). alpha_trl: (u^(alpha - 1) - 1) / (alpha - 1), the same with 1 - alpha.

    Args:
      policy, reference: log-probabilities.
      divergence: a key of DIVERGENCES. Where a power of u exceeds e^30 the line goes straight on (TRL's overflows at
        e^88).
      divergence_alpha: alpha.

    Returns:
      Records whose log-ratios are f'(u) - f'(1).

    Source: f-DPO, Wang et al., arXiv 2309.16240, section 4; chi_squared: Huang et al., arXiv 2407.13399.
    """
    if divergence == "reverse_kl":
        return policy, reference
    chosen, rejected = (DIVERGENCES[divergence](ratio, divergence_alpha) for ratio in log_ratios(policy, reference))
    zeros = jnp.zeros_like(chosen)
    return policy._replace(chosen=chosen, rejected=rejected), reference._replace(chosen=zeros, rejected=zeros)


def wpo_weight(policy: PairLogps, *, clip: bool) -> jax.Array:
    """min(1, w_w w_l) with w = exp(mean over the response's tokens of log p_t - log sum_v p_v^2), [B], no gradient.

    A response weighs as much as it is likely under the policy itself, against what a draw from it would be.

    Args:
      policy: with `sum_squares`.
      clip: at 1, as the authors' code does; TRL does not since 0.29.

    Source: WPO, Zhou et al., arXiv 2406.11827, Eq. 2.
    """
    chosen = (policy.chosen - policy.sum_squares.chosen) / jnp.maximum(policy.chosen_tokens, 1.0)
    rejected = (policy.rejected - policy.sum_squares.rejected) / jnp.maximum(policy.rejected_tokens, 1.0)
    weight = jnp.exp(chosen + rejected)
    return jax.lax.stop_gradient(jnp.minimum(weight, 1.0) if clip else weight)


class Modifier(NamedTuple):
    """A change of the records that a loss reads.

    Attributes:
      function: (policy, reference, **hyper-parameters) -> (policy, reference).
      active: hyper-parameters -> whether it changes anything.
      needs: what it reads when active.
    """

    function: Callable[..., Records]
    active: Callable[[Mapping[str, Any]], bool]
    needs: frozenset[str]


# In the order in which they are applied.
MODIFIERS: dict[str, Modifier] = {
    "ld_alpha": Modifier(shorten, lambda h: h["ld_alpha"] != 1.0, frozenset({"shared"})),
    "sampled": Modifier(downsample, lambda h: h["sampled"], frozenset({"sampled"})),
    "divergence": Modifier(diverge, lambda h: h["divergence"] != "reverse_kl", frozenset({"reference"})),
}
