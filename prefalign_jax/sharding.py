"""Where arrays live: the mesh, (regex, spec) rules for parameters, and the shardings of state and batches."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefalign_jax.types import Params, PreferenceBatch, TrainState, UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that rows of a batch are dealt over

# First match wins; a parameter that matches none is an error. Layers are stacked, so axis 0 of a layer's kernel is
# depth.
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding|head/kernel", P("tensor", "fsdp")),
    (r"layers/attention/[qkv]/kernel", P(None, "fsdp", "tensor")),
    (r"layers/(attention/[qkv]|mlp/(gate|up))/(int8|nf4|scales)", P(None, "fsdp", "tensor")),
    (r"layers/(attention/o|mlp/down)/(int8|nf4|scales)", P(None, "tensor", "fsdp")),
    (r"layers/(attention/[qkv]|mlp/(gate|up))/lora_a", P(None, "fsdp")),
    (r"layers/(attention/[qkv]|mlp/(gate|up))/lora_b", P(None, None, "tensor")),
    (r"layers/(attention/[qkv]|mlp/(gate|up))/lora_magnitude", P(None, "tensor")),
    (r"layers/(attention/o|mlp/down)/lora_magnitude", P()),
    (r"layers/(attention/o|mlp/down)/lora_a", P(None, "tensor")),
    (r"layers/(attention/o|mlp/down)/lora_b", P(None, None, "fsdp")),
    (r"layers/attention/[qkv]/bias", P(None, "tensor")),
    (r"layers/attention/o/kernel", P(None, "tensor", "fsdp")),
    (r"layers/mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/mlp/(gate|up)/bias", P(None, "tensor")),
    (r"layers/mlp/down/kernel", P(None, "tensor", "fsdp")),
    (r"layers/experts/router/kernel", P(None, "fsdp")),
    (r"layers/experts/(gate|up)/kernel", P(None, None, "fsdp", "tensor")),
    (r"layers/experts/down/kernel", P(None, None, "tensor", "fsdp")),
    (r"layers/(attention/o|mlp/down)/bias", P()),
    (r"position/embedding", P(None, "fsdp")),
    (r"head/bias", P("tensor")),
    (r"score/kernel", P(None, "fsdp")),
    (r".*norm/(scale|bias)", P()),
)


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh with axes data, fsdp and tensor over all devices.

    Args:
      sizes: devices along each axis; at most one -1 stands for the rest, a missing axis for 1.

    Returns:
      The mesh.

    Raises:
      UserError: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    for name in sizes:
        if name not in AXES:
            raise UserError(f"mesh.{name} is unknown; the axes are {', '.join(AXES)}")
    shape = [sizes.get(name, 1) for name in AXES]
    try:
        devices = jax.device_count()
    except (RuntimeError, AssertionError) as error:  # a platform was asked for that is not there
        reason = next(iter(str(error).splitlines()), "is JAX_PLATFORMS right?")
        raise UserError(f"no device: {reason}") from None
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and known > 0 and devices % known == 0:
        shape[shape.index(-1)] = devices // known
    if any(size < 1 for size in shape) or math.prod(shape) != devices:
        raise UserError(
            f"mesh {dict(sizes)} does not fit: the sizes must multiply to the {devices} device(s); one may be -1"
        )
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def groups_of(mesh: Mesh) -> int:
    """G, the number of data-parallel shards."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def param_shardings(mesh: Mesh, params: Params, rules: Sequence[tuple[str, P]] | None = None) -> Any:
    """The sharding of every parameter by the first rule whose regex matches its whole path.

    An axis of the mesh that does not divide its dimension is left out there: that dimension stays whole.

    Args:
      mesh: the mesh.
      params: nested dict of arrays or shapes.
      rules: (regex over 'a/b/c', spec); None is RULES.

    Returns:
      A tree of NamedSharding of the same structure.

    Raises:
      UserError: no rule matches a parameter.
    """

    known = RULES if rules is None else rules

    def one(path, leaf) -> NamedSharding:
        name = "/".join(str(key.key) for key in path)
        spec = next((spec for pattern, spec in known if re.fullmatch(pattern, name)), None)
        if spec is None:
            where = "the model's rules (sharding.RULES for the decoder)"
            raise UserError(f"no sharding rule matches parameter {name!r} {leaf.shape}; add one to {where}")
        if len(spec) > len(leaf.shape):
            raise UserError(f"the sharding rule for {name!r} has {len(spec)} axes, the parameter {len(leaf.shape)}")
        sizes = [_size(mesh, axis) for axis in spec]
        fits = [
            axis if devices and size % devices == 0 else None
            for axis, devices, size in zip(spec, sizes, leaf.shape, strict=False)
        ]
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(one, params)


def _size(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    """Devices along an entry of a spec: an axis, several, or none (0)."""
    names = (axis,) if isinstance(axis, str) else axis or ()
    return math.prod(mesh.shape[name] for name in names) if names else 0


def state_shardings(
    mesh: Mesh,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    rules: Sequence[tuple[str, P]] | None = None,
) -> TrainState:
    """Shardings of a train state: optimizer moments lie where their parameters do, everything else is replicated.

    Args:
      mesh: the mesh.
      state: the state, or its shapes.
      optimizer: that made `state.opt_state`.
      rules: as in `param_shardings`.

    Returns:
      A TrainState of NamedSharding.
    """
    replicated = NamedSharding(mesh, P())
    params = param_shardings(mesh, state.params, rules)
    opt_state = optax.tree.map_params(
        optimizer, lambda _, s: s, state.opt_state, params, transform_non_params=lambda _: replicated
    )
    return TrainState(
        step=replicated,
        params=params,
        opt_state=opt_state,
        reference=None if state.reference is None else param_shardings(mesh, state.reference, rules),
        running=jax.tree.map(lambda _: replicated, state.running),
    )


def place_batch(mesh: Mesh | None, batch: PreferenceBatch) -> PreferenceBatch:
    """The batch on its shardings; without a mesh, as it is."""
    return batch if mesh is None else jax.device_put(batch, batch_shardings(mesh, batch))


def batch_shardings(mesh: Mesh, batch: PreferenceBatch) -> PreferenceBatch:
    """Shardings of a batch [M, ...]: rows and their trained tokens over data and fsdp, what is per pair replicated."""
    rows, replicated = NamedSharding(mesh, P(None, ROWS)), NamedSharding(mesh, P())
    per_row = {"tokens", "segments", "branches", "positions", "source", "target", "slot", "tiles", "sequences"}
    return PreferenceBatch(
        **{
            name: jax.tree.map(lambda _, name=name: rows if name in per_row else replicated, value)
            for name, value in batch._asdict().items()
        }
    )
