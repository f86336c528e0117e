"""Frozen weights in 8 or 4 bits: blocks along the input of a kernel, each with a scale of its own."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from prefalign_jax.options import choose
from prefalign_jax.types import Params

QUANTIZATIONS = ("int8", "nf4")
BLOCK = 64  # inputs that share a scale, or the largest power of two below that divides them

# Quantiles of the normal distribution, scaled to [-1, 1]; 0 is one of them. QLoRA, arXiv 2305.14314, appendix E.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def block_of(features_in: int) -> int:
    """How many inputs share a scale.

    Example:
      >>> block_of(576), block_of(24)
      (64, 8)
    """
    return min(BLOCK, features_in & -features_in)


def quantize(kernel: jax.Array, kind: str) -> dict[str, jax.Array]:
    """A kernel as codes and scales.

    Args:
      kernel: [..., in, out]; for 'nf4' in is even.
      kind: 'int8', w = code / 127 scale; 'nf4', w = NF4[code] scale; the scale is the block's largest |w|.

    Returns:
      {KIND: codes, 'scales': [..., in / block, out] float32}; codes are [..., in, out] int8, or [..., in / 2, out]
      uint8 with two 4-bit codes a byte, the first input's in the high bits.

    Raises:
      UserError: the kind is unknown.
    """
    choose("quantize", kind, dict.fromkeys(QUANTIZATIONS))
    *stack, features_in, features_out = kernel.shape
    block = block_of(features_in)
    blocks = kernel.astype(jnp.float32).reshape(*stack, features_in // block, block, features_out)
    scales = jnp.max(jnp.abs(blocks), axis=-2)
    unit = blocks / jnp.where(scales > 0, scales, 1.0)[..., None, :]
    if kind == "int8":
        codes = jnp.round(unit * 127).astype(jnp.int8).reshape(kernel.shape)
    else:
        middles = (NF4[1:] + NF4[:-1]) / 2
        nearest = sum((unit > middle).astype(jnp.uint8) for middle in middles)  # a binary search is slower
        nearest = nearest.reshape(*stack, features_in // 2, 2, features_out)
        codes = nearest[..., 0, :] * 16 + nearest[..., 1, :]
    return {kind: codes, "scales": scales}


def dequantize(codes: jax.Array, scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The kernel [..., in, out] that codes and scales stand for; int8 codes and packed NF4 ones tell by their type."""
    if codes.dtype == jnp.int8:
        unit = codes.astype(jnp.float32) / 127
    else:
        pair = jnp.stack([codes >> 4, codes & 15], axis=-2)
        unit = jnp.asarray(NF4)[pair.reshape(*codes.shape[:-2], -1, codes.shape[-1])]
    *stack, blocks, features_out = scales.shape
    unit = unit.reshape(*stack, blocks, -1, features_out)
    return (unit * scales[..., None, :]).reshape(*stack, -1, features_out).astype(dtype)


def quantized_paths(path: str, kind: str) -> tuple[str, ...]:
    """What stands in the place of a parameter: itself, or of a linear layer's kernel (codes, scales).

    Example:
      >>> quantized_paths("layers/mlp/up/kernel", "nf4"), quantized_paths("embed/embedding", "nf4")
      (('layers/mlp/up/nf4', 'layers/mlp/up/scales'), ('embed/embedding',))
    """
    linear = re.fullmatch(r"(layers/(?:attention|delta|mlp)/\w+)/kernel", path)
    return (f"{linear[1]}/{kind}", f"{linear[1]}/scales") if linear else (path,)


def quantize_params(params: Params, kind: str) -> Params:
    """A model's tree with the kernels of its linear layers quantized; embeddings, norms, biases and experts stay.

    Args:
      params: the parameter tree of `make_decoder`.
      kind: one of QUANTIZATIONS.

    Returns:
      The tree, with {KIND, scales} in the place of each kernel.
    """
    flat = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        paths = quantized_paths(path, kind)
        values = quantize(leaf, kind).values() if len(paths) > 1 else (leaf,)
        flat |= dict(zip(paths, values, strict=True))
    return traverse_util.unflatten_dict(flat, sep="/")


def dequantize_params(params: Params, dtype: str = "float32") -> Params:
    """The tree with plain kernels again."""
    flat = traverse_util.flatten_dict(params, sep="/")
    out = dict(flat)
    for path in flat:
        linear, _, name = path.rpartition("/")
        if name in QUANTIZATIONS:
            codes, scales = out.pop(path), out.pop(f"{linear}/scales")
            out[f"{linear}/kernel"] = dequantize(codes, scales, jnp.dtype(dtype))
    return traverse_util.unflatten_dict(out, sep="/")
