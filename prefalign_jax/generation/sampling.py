"""From logits to the distribution that a token is drawn from: temperature, cuts of the tail, repetition penalty."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prefalign_jax.types import UserError


class Parts(NamedTuple):
    """What of a `Sampling` a compiled program depends on; numbers that it does not are `Sampling.numbers`."""

    greedy: bool
    top_k: int
    top_p: bool
    min_p: bool
    repetition_penalty: bool


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The defaults draw from the model's own distribution.

    The steps are taken in transformers' order: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
      temperature: the logits are divided by it; 0 takes the likeliest token.
      top_k: keep so many of the likeliest tokens, 0 for all.
      top_p: keep the likeliest tokens that together have this probability, 1 for all.
      min_p: keep tokens at least this share as likely as the likeliest, 0 for all.
      repetition_penalty: tokens of the prompt and the response so far have positive logits divided by it and negative
        ones multiplied, 1 for none.

    Raises:
      UserError: a number is out of range, or cuts the tail where the likeliest token is taken anyway.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, fits, says in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0 and self.top_k == int(self.top_k), "a whole number, 0 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0, 1 for none"),
        ):
            if not fits:
                raise UserError(f"{name}={getattr(self, name)!r} is out of range; write {says}")
        for field in dataclasses.fields(self)[1:4]:
            if self.temperature == 0 and getattr(self, field.name) != field.default:
                raise UserError(f"{field.name} has no effect at temperature 0, where the likeliest token is taken")

    @property
    def parts(self) -> Parts:
        """What is compiled in."""
        used = (self.top_p < 1, self.min_p > 0, self.repetition_penalty != 1)
        return Parts(self.temperature == 0, int(self.top_k), *used)

    @property
    def numbers(self) -> dict[str, np.float32]:
        """What is not."""
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        return {name: np.float32(getattr(self, name)) for name in names}


def adjust(logits: jax.Array, seen: jax.Array, parts: Parts, numbers: dict[str, jax.Array]) -> jax.Array:
    """All the steps; those that are off cost nothing.

    Args:
      logits: [R, V] float32.
      seen: [R, V] bool, which tokens are in the text so far; not read without a repetition penalty.
      parts, numbers: of the `Sampling`.

    Returns:
      [R, V] logits of the distribution to draw from, or to take the largest of; -inf is never drawn.
    """
    if parts.repetition_penalty:
        logits = repetition_penalty(logits, seen, numbers["repetition_penalty"])
    if parts.greedy:
        return logits
    logits = logits / numbers["temperature"]
    if parts.top_k:
        logits = top_k(logits, parts.top_k)
    if parts.top_p:
        logits = top_p(logits, numbers["top_p"])
    if parts.min_p:
        logits = min_p(logits, numbers["min_p"])
    return logits


def repetition_penalty(logits: jax.Array, seen: jax.Array, penalty: float | jax.Array) -> jax.Array:
    """x / penalty for positive and x * penalty for negative logits of seen tokens.

    Args:
      logits: [R, V].
      seen: [R, V] bool.
      penalty: above 0; above 1 makes repetition less likely.

    Source: CTRL, Keskar et al., arXiv 1909.05858, section 4.1; of negative logits as transformers'
      RepetitionPenaltyLogitsProcessor, without which a penalty would favour them.

    Example:
      >>> print(repetition_penalty(jnp.array([[2.0, -2.0, 2.0]]), jnp.array([[True, True, False]]), 2.0))
      [[ 1. -4.  2.]]
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """-inf for all but the k largest logits of each row, and ties with the k-th, as transformers' TopKLogitsWarper.

    Example:
      >>> print(top_k(jnp.array([[0.0, 3.0, 1.0, 2.0]]), 2))
      [[-inf   3. -inf   2.]]
    """
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def top_p(logits: jax.Array, p: float | jax.Array) -> jax.Array:
    """-inf for all but the fewest likeliest tokens whose probabilities sum to p or more.

    Ties with the last that is kept are kept too; transformers' TopPLogitsWarper keeps those that its sort puts first.

    Source: Holtzman et al., arXiv 1904.09751, section 3.1.

    Example:
      >>> print(top_p(jnp.log(jnp.array([[0.5, 0.125, 0.25, 0.125]])), 0.7) > -jnp.inf)
      [[ True False  True False]]
    """
    ordered = -jnp.sort(-logits, axis=-1)
    share = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    kept = (before < p).at[:, 0].set(True)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def min_p(logits: jax.Array, p: float | jax.Array) -> jax.Array:
    """-inf for tokens less likely than p times the likeliest, as transformers' MinPLogitsWarper.

    Source: Nguyen et al., arXiv 2407.01082, section 3.

    Example:
      >>> print(min_p(jnp.log(jnp.array([[0.6, 0.3, 0.1]])), 0.2) > -jnp.inf)
      [[ True  True False]]
    """
    return jnp.where(logits < logits.max(-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)
