"""Floating-point operations of a function, counted from what it traces to: nothing is run and no weights are needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr

from prefalign_jax.sharding import ROWS


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Multiplications and additions in the matrix products of a function, 2 m n k for [m, k] x [k, n].

    Solving a triangular system counts as half of such a product.

    What is not a matrix product (norms, softmax, activations) is left out, as in counts of "model FLOPs". A loop counts
    as often as it runs: unlike XLA's cost analysis, which takes the body of a scan once. What nothing reads is not
    computed, as when compiled: the gradient of a frozen kernel, say. Kernels of attention, cuDNN's and
    splash, count 0.

    Args:
      function: of arrays; a gradient, say, or a whole train step.
      args: its arguments, or `jax.ShapeDtypeStruct`s in their place.

    Returns:
      The count, over all devices.

    Raises:
      ValueError: a loop of unknown length has matrix products in it.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jax.ShapeDtypeStruct((8, 4), "float32")
      >>> count_flops(lambda x: x @ x.T, x), count_flops(lambda x: jax.lax.map(lambda row: row @ x.T, x), x)
      (512, 512)
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return _of_jaxpr(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _of_jaxpr(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    shapes = [getattr(variable.aval, "shape", ()) for variable in equation.invars]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[0][axis] for axis in contracted)
    if name == "triangular_solve":  # half of the product of the two
        return math.prod(shapes[1]) * shapes[0][-1]
    if name.startswith("ragged_dot"):  # [m, k] x [groups, k, n], or [m, k] x [m, n] -> [groups, k, n]: a row, a group
        return 2 * math.prod(shapes[0]) * equation.outvars[0].aval.shape[-1]
    if name == "pallas_call":  # what it holds is one block's
        return 0
    inner = [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in jax.tree.leaves(list(params.values()), is_leaf=_is)]
    counts = [_of_jaxpr(x) for x in inner if isinstance(x, Jaxpr)]
    if name == "cond":
        return max(counts)
    if name == "while" and any(counts):
        raise ValueError("a loop of unknown length has matrix products in it")
    if name in ("custom_vjp_call", "custom_jvp_call"):
        counts = counts[:1]
    if name == "shard_map":  # of one device: rows lie on so many, and those along tensor repeat them
        specs = (*params["in_specs"], *params["out_specs"])
        axes = {*jax.tree.leaves([tuple(spec) for spec in specs])} & {*ROWS, "context"}
        return math.prod(params["mesh"].shape[axis] for axis in axes) * sum(counts)
    return (params["length"] if name == "scan" else 1) * sum(counts)


def _is(value: Any) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))
