"""Low-rank adapters: a small trained tree beside a frozen model, of which the model without them is the reference."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import traverse_util

from prefalign_jax.models.quantize import QUANTIZATIONS, dequantize_params
from prefalign_jax.types import Params, UserError

A, B, MAGNITUDE = "lora_a", "lora_b", "lora_magnitude"
EXTRA = (A, B, MAGNITUDE, *QUANTIZATIONS, "scales")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which kernels get an adapter, and of what size.

    Attributes:
      targets: regex over paths of linear layers, such as 'layers/attention/[qv]' or 'layers/(attention|delta|mlp)/.*'.
      rank: r.
      alpha: the update is alpha / r A B.
      rank_stabilised: alpha / sqrt(r) instead.
      dora: train the length of every column of the kernel by itself, see `stretch`.
      dropout: share of an adapter's inputs that a training pass sets to zero; the kernel itself sees them all.
      full: parameters that are trained in full beside the adapters, by their first name: 'score' of a reward model,
        'embed' and 'head' where tokens were added to the vocabulary.
    """

    targets: str = r"layers/(attention|delta|mlp)/\w+"
    rank: int = 16
    alpha: float = 32.0
    rank_stabilised: bool = False
    dora: bool = False
    dropout: float = 0.0
    full: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """What A B is multiplied by.

        Source: LoRA, Hu et al., arXiv 2106.09685, section 4.1; rank-stabilised: Kalajdzievski, arXiv 2312.03732.
        """
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def init_adapters(key: jax.Array, params: Params, lora: Lora, dtype: str = "float32") -> Params:
    """Adapters that change nothing yet: A is drawn, uniform in +-1 / sqrt(in), B is zero.

    Args:
      key: of the draw.
      params: the model's, or their shapes; stacked kernels [..., in, out] get stacked adapters.
      lora: which, and of what size.
      dtype: of what is trained, whatever the type of the frozen kernels.

    Returns:
      {... {'lora_a': [..., in, r], 'lora_b': [..., r, out]}} at the paths of the targets, and for DoRA 'lora_magnitude'
      [..., out], the lengths of the kernel's columns; and copies of what is trained in full (`full_parameters`).

    Raises:
      UserError: no linear layer matches.
    """
    full = full_parameters(params, lora, dtype)
    params = jax.eval_shape(dequantize_params, params) if not lora.dora else dequantize_params(params)
    kernels = {
        path[: -len("/kernel")]: leaf
        for path, leaf in traverse_util.flatten_dict(params, sep="/").items()
        if path.startswith("layers/") and path.endswith("/kernel") and leaf.ndim == 3  # experts' kernels take none
    }
    chosen = {path: leaf for path, leaf in kernels.items() if re.fullmatch(lora.targets, path)}
    if not chosen:
        raise UserError(f"lora.targets={lora.targets!r} matches no linear layer; there are {', '.join(kernels)}")
    flat = {}
    for one, (path, leaf) in zip(jax.random.split(key, len(chosen)), chosen.items(), strict=True):
        *stack, features_in, features_out = leaf.shape
        bound = 1 / math.sqrt(features_in)
        flat[f"{path}/{A}"] = jax.random.uniform(one, (*stack, features_in, lora.rank), dtype, -bound, bound)
        flat[f"{path}/{B}"] = jnp.zeros((*stack, lora.rank, features_out), dtype)
        if lora.dora:
            flat[f"{path}/{MAGNITUDE}"] = lengths(leaf).astype(dtype)
    return {**traverse_util.unflatten_dict(flat, sep="/"), **full}


def full_parameters(params: Params, lora: Lora, dtype: str = "float32") -> Params:
    """Copies of what is trained in full beside the adapters, such as a reward model's score, which starts at zeros."""
    return {name: jax.tree.map(lambda x: jnp.array(x, dtype), params[name]) for name in lora.full}


def join(base: Params, adapters: Params) -> Params:
    """One tree of both, as the decoder reads it; nothing is computed or copied. What both have is the adapters'."""
    out = dict(base)
    for name, value in adapters.items():
        out[name] = join(base.get(name, {}), value) if isinstance(value, Mapping) else value
    return out


def merge(base: Params, adapters: Params, lora: Lora) -> Params:
    """The parameters of a model without adapters that computes the same: W + scale A B, for DoRA stretched.

    A merged kernel is of the wider of its and the adapter's types: one in bfloat16 would round the update away.
    """
    flat, extra = (traverse_util.flatten_dict(tree, sep="/") for tree in (dequantize_params(base), adapters))
    flat = {path: leaf for path, leaf in flat.items() if path.rpartition("/")[2] not in EXTRA}  # where they began
    merged = flat | {path: leaf for path, leaf in extra.items() if path in flat}  # what is trained in full
    for path in extra:
        if path.endswith(f"/{A}"):
            linear = path[: -len(A) - 1]
            a, b = (extra[f"{linear}/{name}"].astype(jnp.float32) for name in (A, B))
            kernel = flat[f"{linear}/kernel"]
            changed = kernel.astype(jnp.float32) + lora.scale * (a @ b)
            if lora.dora:
                changed = changed * (extra[f"{linear}/{MAGNITUDE}"] / lengths(changed))[..., None, :]
            merged[f"{linear}/kernel"] = changed.astype(jnp.promote_types(kernel.dtype, extra[path].dtype))
    return traverse_util.unflatten_dict(merged, sep="/")


def delta(x: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """scale x A B, [..., in] -> [..., out], without the product A B."""
    return (x @ a.astype(x.dtype)) @ b.astype(x.dtype) * jnp.asarray(scale, x.dtype)


def lengths(kernel: jax.Array) -> jax.Array:
    """Euclidean length of every column, [..., in, out] -> [..., out] float32."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=-2))


def stretch(kernel: jax.Array, a: jax.Array, b: jax.Array, magnitude: jax.Array, scale: float) -> jax.Array:
    """m / |W + scale A B| of every column, [out]: direction and length learn apart. The length below has no gradient.

    Source: DoRA, Liu et al., arXiv 2402.09353, Eq. 5 and section 4.3.
    """
    changed = kernel.astype(jnp.float32) + scale * (a.astype(jnp.float32) @ b.astype(jnp.float32))
    return magnitude / jax.lax.stop_gradient(lengths(changed))


def adapter_shapes(params: Params) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """(path of the linear layer, name, shape) of every array of a tree that a plain linear layer has not."""
    flat = {tuple(path.rsplit("/", 1)): x for path, x in traverse_util.flatten_dict(params, sep="/").items()}
    return tuple((*path, flat[path].shape) for path in sorted(flat) if path[-1] in EXTRA)
