"""Dropout, drawn from one key that is handed down; without a key nothing is dropped."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Shares of what is set to zero in a training pass. An adapter's own share is `Lora.dropout`.

    Attributes:
      residual: of the embeddings, and of what attention and MLP each add to the residual stream.
      attention: of the attention weights.
    """

    residual: float | jax.Array = 0.0
    attention: float | jax.Array = 0.0

    @property
    def draws(self) -> bool:
        """Whether anything is drawn. A rate that is traced may be 0, which then keeps everything."""
        return not (_is_zero(self.residual) and _is_zero(self.attention))


def _is_zero(rate: float | jax.Array) -> bool:
    return not isinstance(rate, jax.Array) and rate == 0


def drop(x: jax.Array, rate: float | jax.Array, key: jax.Array | None) -> jax.Array:
    """Sets a share of x to zero and divides the rest by 1 - rate, so that the mean stays.

    Args:
      x: any shape.
      rate: in [0, 1); 0 draws nothing.
      key: of the draw; None leaves x as it is.

    Returns:
      x's shape and type.

    Source: Srivastava et al. (2014), Dropout, section 10 (scaling in training rather than in use).

    Example:
      >>> out = drop(jnp.ones(1000), 0.25, jax.random.key(0))
      >>> sorted({round(float(x), 3) for x in out})
      [0.0, 1.333]
    """
    if key is None or _is_zero(rate):
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def fork(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """Keys for the parts of what has one."""
    return [None] * count if key is None else list(jax.random.split(key, count))
