"""Where arrays live: the mesh, (regex, spec) rules for parameters, and the shardings of state and batches."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefalign_jax.options import given
from prefalign_jax.types import Params, PreferenceBatch, TrainState, UserError

AXES = ("data", "fsdp", "context", "tensor")
ROWS = ("data", "fsdp")  # the axes that rows of a batch are dealt over

# Linear maps of a layer whose outputs are dealt over tensor, and those whose inputs are.
_IN = r"layers/(attention/([qkv]|gate)|delta/(qkv|z|a|b)|mlp/(gate|up))"
_OUT = r"layers/((attention|delta)/o|mlp/down)"
# First match wins; a parameter that matches none is an error. Layers are stacked, so axis 0 of a layer's kernel is
# depth.
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding|head/kernel", P("tensor", "fsdp")),
    (_IN + "/(kernel|int8|nf4|scales)", P(None, "fsdp", "tensor")),
    (_OUT + "/(kernel|int8|nf4|scales)", P(None, "tensor", "fsdp")),
    (_IN + "/(bias|lora_magnitude)", P(None, "tensor")),
    (_OUT + "/(bias|lora_magnitude)", P()),
    (_IN + "/lora_a", P(None, "fsdp")),
    (_IN + "/lora_b", P(None, "fsdp", "tensor")),
    (_OUT + "/lora_a", P(None, "tensor", "fsdp")),
    (_OUT + "/lora_b", P(None, None, "fsdp")),
    (r"layers/attention/sinks", P(None, "tensor")),
    (r"layers/delta/(taps|a_log|dt_bias)", P(None, "tensor")),
    (r"layers/experts/router/kernel", P(None, "fsdp")),
    (r"layers/experts/router/bias", P()),
    (r"layers/experts/(gate|up|down)/bias", P(None, "tensor")),
    (r"layers/experts/(gate|up)/kernel", P(None, "tensor", "fsdp")),
    (r"layers/experts/down/kernel", P(None, "tensor", None, "fsdp")),
    (r"position/embedding", P(None, "fsdp")),
    (r"head/bias", P("tensor")),
    (r"score/kernel", P(None, "fsdp")),
    (r".*norm/(scale|bias)", P()),
)


def axis_sizes(sizes: Mapping[str, int | None], devices: int) -> tuple[int, ...]:
    """Devices along each of AXES.

    Args:
      sizes: devices along each axis; at most one -1 stands for the rest, a missing axis for 1, and None for the rest
        unless another axis takes it, then for 1.
      devices: how many there are.

    Raises:
      UserError: an axis is unknown, or the sizes do not multiply to the number of devices.

    Example:
      >>> axis_sizes({"data": None, "tensor": 2}, 8), axis_sizes({"data": None, "fsdp": -1}, 8)
      ((4, 1, 1, 2), (1, 8, 1, 1))
    """
    for name in sizes:
        if name not in AXES:
            raise UserError(f"mesh.{name} is unknown; the axes are {', '.join(AXES)}")
    asked = [sizes.get(name, 1) for name in AXES]
    shape = [(1 if -1 in asked else -1) if size is None else size for size in asked]
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and known > 0 and devices % known == 0:
        shape[shape.index(-1)] = devices // known
    if any(size < 1 for size in shape) or math.prod(shape) != devices:
        raise UserError(
            f"mesh {given(sizes)} does not fit: the sizes must multiply to the {devices} device(s); one may be -1"
        )
    return tuple(shape)


def make_mesh(sizes: Mapping[str, int | None], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, context and tensor.

    Args:
      sizes: devices along each axis, as in `axis_sizes`.
      devices: to lay out; None for all.

    Returns:
      The mesh.

    Raises:
      UserError: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    try:
        devices = jax.devices() if devices is None else devices
    except (RuntimeError, AssertionError) as error:  # a platform was asked for that is not there
        reason = next(iter(str(error).splitlines()), "is JAX_PLATFORMS right?")
        raise UserError(f"no device: {reason}") from None
    shape = axis_sizes(sizes, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def groups_of(mesh: Mesh) -> int:
    """G, the number of data-parallel shards."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def mesh_of(params: Params) -> Mesh | None:
    """The mesh that parameters lie on, if it has axes to deal rows over."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return mesh if mesh is not None and set(ROWS) <= set(mesh.axis_names) else None


def spec_of(name: str, leaf: Any, rules: Sequence[tuple[str, P]] | None = None) -> P:
    """The spec of the first rule whose regex matches a parameter's whole path.

    Args:
      name: 'a/b/c'.
      leaf: the array or its shape.
      rules: (regex, spec); None is RULES.

    Raises:
      UserError: no rule matches, or the rule has more axes than the parameter.
    """
    known = RULES if rules is None else rules
    spec = next((spec for pattern, spec in known if re.fullmatch(pattern, name)), None)
    if spec is None:
        where = "the model's rules (sharding.RULES for the decoder)"
        raise UserError(f"no sharding rule matches parameter {name!r} {leaf.shape}; add one to {where}")
    if len(spec) > len(leaf.shape):
        raise UserError(f"the sharding rule for {name!r} has {len(spec)} axes, the parameter {len(leaf.shape)}")
    return spec


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

    def one(path, leaf) -> NamedSharding:
        spec = spec_of(_name(path), leaf, rules)
        sizes = [_size(mesh, axis) for axis in spec]
        fits = [
            axis if devices and size % devices == 0 else None
            for axis, devices, size in zip(spec, sizes, leaf.shape, strict=False)
        ]
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(one, params)


def what_stays_whole(mesh: Mesh, params: Params, rules: Sequence[tuple[str, P]] | None = None) -> list[str]:
    """A sentence for every axis of the mesh that does not divide all that its rules would have it divide.

    Args:
      mesh, params, rules: as in `param_shardings`.

    Returns:
      What stays whole along each such axis, and how much that is on a device.
    """
    meant: dict[str, list[tuple[str, Any, bool]]] = {}  # axis -> parameters that it is to divide, and whether it does
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        for entry, size in zip(spec_of(_name(path), leaf, rules), leaf.shape, strict=False):
            for axis in _axes(entry):
                meant.setdefault(axis, []).append((_name(path), leaf, size % _size(mesh, entry) == 0))
    sentences = []
    for axis, parameters in meant.items():
        whole = [(name, leaf) for name, leaf, divided in parameters if not divided]
        if not whole:
            continue
        gib = sum(leaf.size * leaf.dtype.itemsize for _, leaf in whole) / 2**30
        name, leaf = max(whole, key=lambda one: one[1].size)
        what = f"{len(whole)} of {len(parameters)} parameters, such as {name} {list(leaf.shape)}"
        what = what if len(whole) < len(parameters) else "any parameter"
        sentences.append(f"mesh.{axis}={mesh.shape[axis]} does not divide {what}; {gib:.2g} GiB stay whole on a device")
    return sentences


def _name(path: Sequence[Any]) -> str:
    return "/".join(str(key.key) for key in path)


def born(mesh: Mesh, make: Callable[..., Params], *args: Any) -> Params:
    """The parameters that make(*args) gives, made where they belong: no device ever holds them whole."""
    return jax.jit(make, out_shardings=param_shardings(mesh, jax.eval_shape(make, *args)))(*args)


def _size(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    """Devices along an entry of a spec: an axis, several, or none (0)."""
    names = _axes(axis)
    return math.prod(mesh.shape[name] for name in names) if names else 0


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def state_shardings(mesh: Mesh, state: TrainState, rules: Sequence[tuple[str, P]] | None = None) -> TrainState:
    """Shardings of a train state: what belongs to a parameter lies where it does, everything else is replicated.

    Args:
      mesh: the mesh.
      state: the state, or its shapes.
      rules: as in `param_shardings`.

    Returns:
      A TrainState of NamedSharding.
    """
    replicated = NamedSharding(mesh, P())
    params = param_shardings(mesh, state.params, rules)
    return TrainState(
        step=replicated,
        params=params,
        opt_state=_opt_state_shardings(state.opt_state, state.params, params, replicated),
        reference=None if state.reference is None else param_shardings(mesh, state.reference, rules),
        running=jax.tree.map(lambda _: replicated, state.running),
        ema=None if state.ema is None else params,
    )


def _opt_state_shardings(opt_state: Any, params: Params, shardings: Any, replicated: NamedSharding) -> Any:
    """Where an optimizer's state lies. The keys on the way to one of its arrays end with those of its parameter.

    A moment has the parameter's shape; Adafactor's means over rows or columns have it without the axis of the mean.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    placed = {_keys(path): (leaf, s) for (path, leaf), s in zip(leaves, jax.tree.leaves(shardings), strict=True)}

    def one(path: Sequence[Any], leaf: Any) -> NamedSharding:
        keys = _keys(path)
        param, sharding = next((placed[keys[i:]] for i in range(len(keys)) if keys[i:] in placed), (None, replicated))
        if param is None or leaf.shape == param.shape:
            return sharding
        axes = [axis for axis in range(param.ndim) if param.shape[:axis] + param.shape[axis + 1 :] == leaf.shape]
        if not axes:
            return replicated
        # Of a square matrix both means have one shape: v_row is of each row, v_col of each column.
        axis = axes[0] if getattr(path[-1], "name", "") == "v_col" else axes[-1]
        spec = [*sharding.spec, *[None] * (param.ndim - len(sharding.spec))]
        return NamedSharding(sharding.mesh, P(*spec[:axis], *spec[axis + 1 :]))

    return jax.tree_util.tree_map_with_path(one, opt_state)


def _keys(path: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def packing_of(mesh: Mesh) -> dict[str, Any]:
    """What packing has to know of a mesh: options of `make_pair_set`."""
    return dict(groups=groups_of(mesh), own=own_groups(mesh), context=mesh.shape["context"])


def own_groups(mesh: Mesh) -> list[int]:
    """The data-parallel shards that lie on this process's devices, in order."""
    shards = mesh.devices.reshape(groups_of(mesh), -1)
    here = jax.process_index()
    return [number for number, devices in enumerate(shards) if any(x.process_index == here for x in devices)]


def spread(mesh: Mesh) -> Callable[..., jax.Array]:
    """How tokens [R, L] are looked up in an embedding: (look_up, *ids) -> look_up(*ids) [R, L, D].

    The table's columns lie over fsdp. Each device looks up its own, and what was found is exchanged. XLA does so by
    itself where rows are dealt over fsdp alone. Over data too it gathers activations of the backward pass, where the
    tokens of a row are dealt over context the whole table.
    """
    alone = mesh.shape["fsdp"] == 1 or mesh.shape["data"] == mesh.shape["context"] == 1

    def lie(x: jax.Array, *axes: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))

    def place(look_up: Callable[..., jax.Array], *ids: jax.Array) -> jax.Array:
        if alone:
            return look_up(*ids)
        x = look_up(*(lie(one, "data", "context") for one in ids))
        whole = x.shape[-1] % mesh.shape["fsdp"]
        return lie(lie(x, "data", "context", None if whole else "fsdp"), ROWS, "context")

    return place


def deal_experts(mesh: Mesh) -> Callable[..., jax.Array]:
    """How a mixture's experts are computed: (experts, x, gate, up, down, weights, chosen, biases) -> experts(...).

    Whole experts are dealt over tensor. Each device computes what its own add to the tokens, which all of these devices
    have, and the sum is taken as that of a split MLP is.
    """

    def apply(experts: Callable[..., jax.Array], x: jax.Array, gate: jax.Array, *args: Any) -> jax.Array:
        devices = mesh.shape["tensor"]
        if devices == 1 or gate.shape[0] % devices:
            return experts(x, gate, *args)
        axes = (*ROWS, "context") if x.shape[0] % (groups_of(mesh) * mesh.shape["context"]) == 0 else None
        rows, kernel = P(axes), P("tensor")

        # With its check of what varies over tensor, jax 0.10 gives wrong gradients of x and the weights.
        options = dict(in_specs=(rows, kernel, kernel, kernel, rows, rows, kernel), out_specs=rows, check_vma=False)

        @functools.partial(jax.shard_map, mesh=mesh, **options)
        def part(x: jax.Array, gate: jax.Array, *args: Any) -> jax.Array:
            first = jax.lax.axis_index("tensor") * gate.shape[0]
            return jax.lax.psum(experts(x, gate, *args, first), "tensor")

        return part(x, gate, *args)

    return apply


def deal_texts(mesh: Mesh) -> Callable[..., jax.Array]:
    """How a kernel attends that XLA cannot divide: (kernel, q, k, v) -> kernel(q, k, v), [N, S, heads, d] each.

    What follows is of the heads, [heads]. Each device takes the texts of its rows, and its share of the heads.
    """

    def apply(kernel: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
        if mesh.size == 1:
            return kernel(*args)
        rows = ROWS if args[0].shape[0] % groups_of(mesh) == 0 else None
        spec = P(rows, None, "tensor")
        specs = (*(spec,) * 3, *(P("tensor"),) * (len(args) - 3))
        # No rule says along which axes what a kernel gives varies.
        return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(*args)

    return apply


def place_batch(mesh: Mesh | None, batch: PreferenceBatch) -> PreferenceBatch:
    """The batch on its shardings; without a mesh, as it is.

    Args:
      mesh: the mesh.
      batch: of NumPy arrays; its rows are those of `own_groups` alone.

    Returns:
      The batch of all groups.
    """
    if mesh is None:
        return batch
    shardings = batch_shardings(mesh, batch)
    if jax.process_count() == 1:
        return jax.device_put(batch, shardings)
    own, groups = own_groups(mesh), groups_of(mesh)

    def place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        if sharding.spec == P():
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
        rows = x.shape[1] // len(own)  # of a group

        def part(index: tuple[slice, ...]) -> np.ndarray:
            at = own.index((index[1].start or 0) // rows) * rows
            return x[index[0], at : at + rows, *index[2:]]

        return jax.make_array_from_callback((x.shape[0], rows * groups, *x.shape[2:]), sharding, part)

    return jax.tree.map(place, batch, shardings)


def batch_shardings(mesh: Mesh, batch: PreferenceBatch) -> PreferenceBatch:
    """Shardings of a batch [M, ...]: what is per pair is everywhere, rows are dealt over data and fsdp.

    A row's tokens, its trained tokens and its tiles of attention are each dealt over context: so all of these devices
    have as much to compute, and they gather the keys and values that they lack.
    """
    rows, replicated = NamedSharding(mesh, P(None, ROWS, "context")), NamedSharding(mesh, P())
    per_row = {"tokens", "segments", "branches", "positions", "source", "target", "slot", "tiles", "sequences"}
    per_row |= {"token_weight"}
    return PreferenceBatch(
        **{
            name: jax.tree.map(lambda _, name=name: rows if name in per_row else replicated, value)
            for name, value in batch._asdict().items()
        }
    )


def shapes_of(tree: Any) -> Any:
    """Shapes, types and, of what is on devices, shardings in place of arrays; a jitted function knows them by these."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)
