"""Rotary position embedding and its scaling variants (arXiv 2104.09864; YaRN: 2309.00071; LongRoPE: 2402.13753)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

ROTATIONS = ("linear", "llama3", "yarn", "dynamic", "longrope")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the context a model was trained on.

    Attributes:
      kind: 'linear' divides every frequency by `factor`; 'llama3' only the low ones; 'yarn' blends by wavelength.
        'longrope' divides each by a number of its own, of which there are two lists. 'dynamic' changes the base for a
        text longer than the context, which this package refuses everywhere: what is left is the plain embedding, and
        the kind is kept for the export alone.
      factor: new context / original context.
      low_freq_factor, high_freq_factor: llama3's band, in turns over the original context.
      original_max_position: the original context, in tokens.
      beta_fast, beta_slow: yarn's band, in turns over the original context.
      truncate: whether yarn's band begins and ends at whole dimensions (gpt-oss: not).
      attention_factor: multiplier of cos and sin of yarn and longrope; None is 0.1 ln(factor) + 1 for yarn and
        sqrt(1 + ln(factor) / ln(original context)) for longrope.
      short_factor, long_factor: longrope's divisors, one for each frequency, of texts within and beyond the original
        context.
    """

    kind: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool = True
    attention_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, *, long: bool = False
) -> tuple[np.ndarray, float]:
    """Angular frequencies theta^(-2i/d), scaled, and the multiplier of cos and sin.

    Args:
      head_dim: d, even.
      theta: base of the geometric series.
      scaling: None for the plain embedding.
      long: whether they are of a text beyond the original context; only longrope makes a difference.

    Returns:
      (frequencies [head_dim / 2] float32 in radians per token, multiplier).
    """
    plain = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None or scaling.kind == "dynamic":
        return plain.astype(np.float32), 1.0
    if scaling.kind == "linear":
        return (plain / scaling.factor).astype(np.float32), 1.0
    if scaling.kind == "llama3":
        turns = scaling.original_max_position * plain / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1 above the band: unscaled; 0 below it: divided
        return (plain * (keep + (1 - keep) / scaling.factor)).astype(np.float32), 1.0
    if scaling.kind == "yarn":

        def dimension_of(turns: float) -> float:  # the dimension that makes `turns` turns over the original context
            return head_dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = dimension_of(scaling.beta_fast or 32.0), dimension_of(scaling.beta_slow or 1.0)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
        multiplier = scaling.attention_factor or (0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0)
        return (plain * (1 - ramp) + plain / scaling.factor * ramp).astype(np.float32), multiplier
    if scaling.kind == "longrope":
        factor, original = scaling.factor, scaling.original_max_position
        multiplier = scaling.attention_factor
        if multiplier is None:
            multiplier = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return (plain / np.array(scaling.long_factor if long else scaling.short_factor)).astype(np.float32), multiplier
    raise ValueError(f"rope scaling {scaling.kind!r} is unknown; write one of {', '.join(ROTATIONS)}")


def rotation(
    positions: jax.Array, segments: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each position's angles.

    With longrope a token that takes its segment beyond the original context turns the whole segment, what is before it
    included, by other angles, as transformers does with all texts of a call: the one place where a later token changes
    an earlier one. No other segment is changed. In the tree layout a segment is a pair, so a pair whose one response
    lies beyond and whose other lies within is turned as beyond, both of it. What counts are the tokens of the row, in
    which the last of a response is not.

    Args:
      positions: [R, L] int32.
      segments: [R, L] int32.
      head_dim, theta, scaling: as in `frequencies`.

    Returns:
      (cos, sin), each [R, L, head_dim / 2] float32.
    """
    freqs, multiplier = frequencies(head_dim, theta, scaling)
    freqs = jnp.asarray(freqs)[None, None, :]
    if scaling is not None and scaling.kind == "longrope":
        beyond = positions >= scaling.original_max_position
        same = segments[:, :, None] == segments[:, None, :]
        long = jnp.asarray(frequencies(head_dim, theta, scaling, long=True)[0])[None, None, :]
        freqs = jnp.where((same & beyond[:, None, :]).any(-1, keepdims=True), long, freqs)
    angles = positions[..., None].astype(jnp.float32) * freqs
    return jnp.cos(angles) * multiplier, jnp.sin(angles) * multiplier


def growth(positions: jax.Array, rate: float, original: int) -> jax.Array:
    """The multiplier of queries beyond the original context: 1 + rate ln(1 + floor(position / original)).

    Args:
      positions: [R, L] int32.
      rate: how fast it grows.
      original: the original context, in tokens.

    Returns:
      [R, L] float32; 1 within the original context.
    """
    return 1 + rate * jnp.log1p((positions // original).astype(jnp.float32))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Turns the pairs (x_i, x_{i + d/2}) by their angles, Hugging Face's order of the halves.

    Args:
      x: [R, L, heads, head_dim].
      cos, sin: [R, L, d / 2], d at most head_dim; what lies beyond the first d of a head stays as it is.
      interleaved: turn the pairs (x_2i, x_2i+1) in their place.

    Returns:
      The rotated x, same shape and type; the arithmetic is float32.
    """
    width = cos.shape[-1]
    pairs = (slice(0, 2 * width, 2), slice(1, 2 * width, 2)) if interleaved else (slice(width), slice(width, 2 * width))
    a, b = (x[..., one].astype(jnp.float32) for one in pairs)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = [a * cos - b * sin, b * cos + a * sin]
    if interleaved:
        turned = [jnp.stack(turned, axis=-1).reshape(*x.shape[:-1], 2 * width)]
    return jnp.concatenate([jnp.concatenate(turned, axis=-1).astype(x.dtype), x[..., 2 * width :]], axis=-1)
