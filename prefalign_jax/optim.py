"""Config -> optax: learning-rate schedules, optimizers with PyTorch's meaning, and the weight-decay mask."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from prefalign_jax.options import Checks, check_hyper, choose, hyper_parameters
from prefalign_jax.types import Params, UserError

# A schedule gives the share of the peak rate at steps from the end of the warm-up on; `make_schedule` adds the warm-up.


def _done(step: jax.Array, first: int, last: int) -> jax.Array:
    """The share that is behind of the way between two steps, 0 before and 1 after."""
    return jnp.clip((step - first) / max(1, last - first), 0.0, 1.0)


def _above(floor: float, share: jax.Array) -> jax.Array:
    """The share of what lies above the floor, and the floor."""
    return floor + (1.0 - floor) * share if floor else share


def constant(step: jax.Array, *, warmup_steps: int, total_steps: int) -> jax.Array:
    """Constant schedule: 1."""
    return jnp.ones_like(step)


def linear(step: jax.Array, *, warmup_steps: int, total_steps: int, floor: float = 0.0) -> jax.Array:
    """Linear schedule: 1 at the end of the warm-up, `floor` at `total_steps` and after."""
    left = jnp.clip((total_steps - step) / max(1, total_steps - warmup_steps), 0.0, 1.0)
    return _above(floor, left)


def cosine(step: jax.Array, *, warmup_steps: int, total_steps: int, floor: float = 0.0) -> jax.Array:
    """Half a cosine wave: 1 at the end of the warm-up, `floor` at `total_steps` and after."""
    return _above(floor, 0.5 * (1.0 + jnp.cos(jnp.pi * _done(step, warmup_steps, total_steps))))


def polynomial(
    step: jax.Array, *, warmup_steps: int, total_steps: int, floor: float = 0.0, power: float = 2.0
) -> jax.Array:
    """Polynomial schedule: the share of the steps that is left to the power of `power`, down to `floor`."""
    return _above(floor, (1.0 - _done(step, warmup_steps, total_steps)) ** power)


def inverse_sqrt(step: jax.Array, *, warmup_steps: int, total_steps: int, timescale: int = 0) -> jax.Array:
    """sqrt(t / (step - warmup_steps + t)); t is `timescale`, else `warmup_steps`, else 10,000 (whichever is not 0)."""
    t = timescale or warmup_steps or 10_000
    return jnp.sqrt(t / (jnp.maximum(step - warmup_steps, 0.0) + t))


# How wsd falls: share of the decay that is behind -> share of the peak.
DECAYS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
    "sqrt": lambda done: 1.0 - jnp.sqrt(done),
}


def wsd(
    step: jax.Array,
    *,
    warmup_steps: int,
    total_steps: int,
    decay_ratio: float = 0.1,
    decay_shape: str = "linear",
    floor: float = 0.0,
) -> jax.Array:
    """Warmup-stable-decay schedule: 1, and in the last `decay_ratio` of all steps down to `floor`.

    Sources: Hu et al., arXiv 2404.06395; the decay 1 - sqrt: Haegele et al., arXiv 2405.18392.
    """
    first = total_steps - steps_of(decay_ratio, total_steps)
    if first < warmup_steps:
        raise UserError(
            f"schedule 'wsd': a warm-up of {warmup_steps} steps and a decay over decay_ratio={decay_ratio} of the run "
            f"do not fit into {total_steps} steps; write smaller ones"
        )
    return _above(floor, DECAYS[decay_shape](_done(step, first, total_steps)))


SCHEDULES: dict[str, Callable[..., jax.Array]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "polynomial": polynomial,
    "inverse_sqrt": inverse_sqrt,
    "wsd": wsd,
}
LENGTHS = ("warmup_steps", "total_steps")  # what every schedule is told; the rest are its own hyper-parameters


def steps_of(ratio: float, total: int) -> int:
    """A share of the steps of a run, rounded up, as transformers rounds its warm-up.

    Example:
      >>> steps_of(0.1, 25), steps_of(0.07, 100)  # 0.07 * 100 is a little above 7 in floating point
      (3, 7)
    """
    return math.ceil(round(ratio * total, 6))


def schedule_options(name: str) -> dict[str, Any]:
    """The hyper-parameters of a schedule with their defaults."""
    known = hyper_parameters(choose("schedule", name, SCHEDULES))
    return {key: value for key, value in known.items() if key not in LENGTHS}


def check_schedule(name: str, hyper: Mapping[str, Any]) -> None:
    """Refuses an unknown schedule, and hyper-parameters that it does not have or that are out of range."""
    check_hyper(f"schedule {name!r}", hyper, schedule_options(name), VALID)


def make_schedule(name: str, peak: float, warmup_steps: int, total_steps: int, **hyper: Any) -> optax.Schedule:
    """peak * (step / warmup_steps during the warm-up, then the named decay).

    Steps count from 0, with the values of `transformers.get_scheduler`: with warm-up, the update of step 0 has rate 0
    and step `warmup_steps` has the peak. (The DPO authors' code warms up by (step + 1) / (warmup_steps + 1) instead.)

    Args:
      name: a key of SCHEDULES.
      peak: highest rate.
      warmup_steps: updates of linear warm-up.
      total_steps: updates in the run.
      **hyper: what else the schedule takes.

    Returns:
      step [] int32 -> rate [] float32.

    Raises:
      UserError: an unknown schedule or hyper-parameter, or a value out of range.

    Example:
      >>> rate = make_schedule("linear", peak=1.0, warmup_steps=2, total_steps=6)
      >>> [float(rate(step)) for step in range(7)]
      [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    check_schedule(name, hyper)
    if not 0 <= peak < math.inf:
        raise UserError(f"learning_rate={peak!r} is out of range; write a number >= 0")
    for field, value, least in (("warmup_steps", warmup_steps, 0), ("total_steps", total_steps, 1)):
        if int(value) != value or value < least:
            raise UserError(f"{field}={value!r} is out of range; write a whole number of steps >= {least}")
    if warmup_steps > total_steps:
        raise UserError(
            f"warmup_steps={warmup_steps} exceeds the {total_steps} steps of the run; write at most that many"
        )
    decay = functools.partial(SCHEDULES[name], warmup_steps=warmup_steps, total_steps=total_steps, **hyper)
    jax.eval_shape(decay, jnp.float32(0))  # says now what does not fit together

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)  # exact below 2**24 steps
        share = decay(step)
        return peak * jnp.where(step < warmup_steps, step / max(1, warmup_steps), share)

    return schedule


def adamw(rate, mask, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0):
    """torch.optim.AdamW: p <- p - rate (m_hat / (sqrt(v_hat) + eps) + weight_decay p)."""
    return optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)


def rmsprop(rate, mask, *, decay: float = 0.99, eps: float = 1e-8):
    """torch.optim.RMSprop, the DPO authors': v <- decay v + (1 - decay) g^2; p <- p - rate g / (sqrt(v) + eps)."""
    # optax's own default puts eps under the root, which near v = 0 is another optimizer.
    return optax.rmsprop(rate, decay, eps, eps_in_sqrt=False)


def sgd(rate, mask, *, momentum: float = 0.0):
    """torch.optim.SGD: u <- momentum u + g; p <- p - rate u."""
    return optax.sgd(rate, momentum or None)


def lion(rate, mask, *, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.0):
    """p <- p - rate (sign(b1 m + (1 - b1) g) + weight_decay p); m <- b2 m + (1 - b2) g.

    Source: Chen et al., arXiv 2302.06675.
    """
    return optax.lion(rate, b1, b2, weight_decay=weight_decay, mask=mask)


def adafactor(
    rate,
    mask,
    *,
    decay_power: float = 0.8,
    clip_rms: float = 1.0,
    parameter_scale: bool = False,
    factor_from: int = 128,
    weight_decay: float = 0.0,
):
    """p <- p - rate (u / max(1, rms(u) / clip_rms) + weight_decay p), where u = g / sqrt(v) of every matrix by itself.

    v is the mean of g^2 with decay 1 - t^-decay_power at step t. Of a matrix of which both sides have at least
    `factor_from` only its rows' and columns' means are kept. With `parameter_scale` u is multiplied by rms(p) too.

    Source: Shazeer and Stern, arXiv 1804.04235.
    """
    parts = [optax.scale_by_factored_rms(decay_rate=decay_power, min_dim_size_to_factor=factor_from)]
    parts += [optax.clip_by_block_rms(clip_rms)]
    parts += [optax.scale_by_param_block_rms()] if parameter_scale else []
    return optax.chain(
        each_tensor(optax.chain(*parts)),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(rate),
    )


def muon(
    rate,
    mask,
    *,
    momentum: float = 0.95,
    update_rms: float = 0.2,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
):
    """p <- p - rate (s NewtonSchulz(momentum m' + (1 - momentum) g') + weight_decay p) of each layer's matrices.

    m is the mean of gradients, ' says that it is unbiased. Newton-Schulz's iteration makes the singular values about 1.
    s = update_rms sqrt(max(in, out)), by which AdamW's learning rates fit (Moonlight). With update_rms=0 it is
    sqrt(max(1, out / in)), as Jordan has it. Embeddings, head, score, norms and biases take AdamW's step.

    Sources: Jordan, https://kellerjordan.github.io/posts/muon; Moonlight: Liu et al., arXiv 2502.16982.
    """

    def dimensions(updates):
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), updates)

    def scale(update: jax.Array) -> jax.Array:
        rows, columns = update.shape[-2:]
        return update * (update_rms * max(rows, columns) ** 0.5 if update_rms else max(1.0, columns / rows) ** 0.5)

    orthogonal = optax.chain(
        contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=dimensions),
        optax.stateless_with_tree_map(lambda update, _: scale(update)),
    )
    return optax.chain(
        optax.partition({"muon": orthogonal, "adamw": optax.scale_by_adam(b1, b2, eps)}, takes_muon),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(rate),
    )


def schedule_free_adamw(
    rate, mask, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
):
    """Schedule-free AdamW: z <- z - rate (g(y) / (sqrt(v') + eps) + weight_decay y); x <- (1 - c) x + c z.

    Gradients are taken at y = (1 - b1) z + b1 x, which is what is trained here; x is what `averages.evaluated` gives. c
    is the step's share of the sum of all squared rates, where no rate counts less than the highest before it.

    Source: Defazio et al., arXiv 2405.15682.
    """
    if not b1 > 0:
        raise UserError("optimizer 'schedule_free_adamw': b1=0 is out of range; write a number in (0, 1)")
    step = optax.chain(
        optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(rate),
    )
    # optax counts the steps of the average from 1, and those of the rate from 0.
    return contrib.schedule_free(step, (lambda count: rate(count - 1)) if callable(rate) else rate, b1)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": adamw,
    "rmsprop": rmsprop,
    "sgd": sgd,
    "lion": lion,
    "adafactor": adafactor,
    "muon": muon,
    "schedule_free_adamw": schedule_free_adamw,
}

# One name, one meaning, whichever optimizer or schedule takes it.
VALID: Checks = {
    "b1": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "b2": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "decay": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "momentum": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "eps": (lambda x: 0 < x < math.inf, "a positive number"),
    "weight_decay": (lambda x: 0 <= x < math.inf, "a number >= 0"),
    "decay_power": (lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "clip_rms": (lambda x: 0 < x, "a positive number, inf for no clipping"),
    "factor_from": (lambda x: x >= 1, "a number of rows or columns >= 1"),
    "update_rms": (lambda x: 0 <= x < math.inf, "a number >= 0"),
    "timescale": (lambda x: 0 <= x < math.inf, "a number >= 0"),
    "floor": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "power": (lambda x: 0 < x < math.inf, "a positive number"),
    "decay_ratio": (lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "decay_shape": (lambda x: x in DECAYS, f"one of {', '.join(DECAYS)}"),
}

# Names of parameters that are no matrices -> how many axes they have in a layer.
AXES = dict.fromkeys(("scale", "bias", "sinks", "a_log", "dt_bias", "lora_magnitude"), 1) | {"taps": 3}


def stacked(path: Sequence[Any], leaf: Any) -> int:
    """How many leading axes of a parameter only number its vectors or matrices: layers, and experts within them."""
    if path[0].key != "layers":
        return 0
    return max(0, leaf.ndim - AXES.get(path[-1].key, 2))


def takes_muon(params: Params) -> Params:
    """For every parameter 'muon', if it is a matrix of a layer, or 'adamw'.

    Raises:
      UserError: none is a matrix of a layer.
    """

    def label(path, leaf) -> str:
        return "muon" if path[0].key == "layers" and path[-1].key not in AXES and leaf.ndim > 1 else "adamw"

    labels = jax.tree_util.tree_map_with_path(label, params)
    if "muon" not in jax.tree.leaves(labels):
        raise UserError("optimizer 'muon' is for matrices below 'layers', and these parameters have none")
    return labels


def each_tensor(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer of every vector or matrix by itself, where layers are stacked as if they were not.

    Its state is a tree like the parameters with the optimizer's own state in place of each.
    """

    def over(function: Callable[..., Any], path: Sequence[Any], leaf: Any) -> Callable[..., Any]:
        for _ in range(stacked(path, leaf)):
            function = jax.vmap(function)
        return function

    def init(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: over(optimizer.init, path, leaf)(leaf), params)

    def update(updates: Params, state: Any, params: Params) -> tuple[Params, Any]:
        leaves, structure = jax.tree_util.tree_flatten_with_path(params)
        of_each = zip(leaves, structure.flatten_up_to(updates), structure.flatten_up_to(state), strict=True)
        pairs = [over(optimizer.update, path, leaf)(grad, own, leaf) for (path, leaf), grad, own in of_each]
        return tuple(map(structure.unflatten, zip(*pairs, strict=True)))

    return optax.GradientTransformation(init, update)


def decay_mask(params: Params) -> Params:
    """Which parameters weight decay applies to: all but norm scales, biases, DoRA's magnitudes and other vectors.

    Stacked layers make a norm's scale [layers, D], so its name decides and not only its number of axes.

    Args:
      params: nested dict of arrays.

    Returns:
      The same nested dict of bools.

    Example:
      >>> decay_mask({"norm": {"scale": jnp.ones([2, 4])}, "q": {"kernel": jnp.ones([2, 4, 4])}})
      {'norm': {'scale': False}, 'q': {'kernel': True}}
    """

    def decays(path, leaf) -> bool:
        return leaf.ndim > 1 and path[-1].key not in AXES

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    optimizer: Mapping[str, Any],
    schedule: optax.Schedule | float,
    grad_clip: float | None = None,
    decay_mask: Callable[[Params], Params] = decay_mask,
) -> optax.GradientTransformation:
    """Clips the gradient by its global norm, then takes the optimizer's step.

    Args:
      optimizer: 'name', a key of OPTIMIZERS, and its hyper-parameters; the rest keep their defaults.
      schedule: step -> rate.
      grad_clip: largest global norm of the gradient; None does not clip.
      decay_mask: params -> tree of bools, where weight decay applies.

    Returns:
      A transformation whose `update` needs the parameters.

    Raises:
      UserError: an unknown optimizer or hyper-parameter, or a value out of range.

    Example:
      >>> make_optimizer({"name": "rmsprop", "beta": 0.9}, 1e-6)
      Traceback (most recent call last):
      prefalign_jax.types.UserError: optimizer 'rmsprop' has no hyper-parameter 'beta'; it has decay, eps
    """
    hyper = dict(optimizer)
    name = hyper.pop("name", None)
    make = choose("optimizer.name", name, OPTIMIZERS)
    known = {key: value for key, value in hyper.items() if not isinstance(value, jax.core.Tracer)}  # and checkable
    check_hyper(f"optimizer {name!r}", known, hyper_parameters(make), VALID)
    if grad_clip is None:
        return make(schedule, decay_mask, **hyper)
    if not 0 < grad_clip < math.inf:
        raise UserError(f"grad_clip={grad_clip!r} is out of range; write a positive number, or None for no clipping")
    return optax.chain(optax.clip_by_global_norm(grad_clip), make(schedule, decay_mask, **hyper))


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer with float32 moments and updates, whatever the parameters are stored as.

    Second moments of Adam change by a thousandth in a step, which bfloat16 rounds away.
    """

    def cast(tree: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    return optax.GradientTransformation(
        lambda params: optimizer.init(cast(params)),
        lambda updates, state, params: optimizer.update(cast(updates), state, cast(params)),
    )


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16, up or down at random, so that the expectation is x: small updates are not lost on average.

    Args:
      x: any shape, float32.
      key: of the draw.

    Returns:
      bfloat16 of the same shape; what is not finite stays.

    Example:
      >>> x = jnp.full(10_000, 1 + 2**-10)  # an eighth of the way from 1 to the next bfloat16 number
      >>> rounded = stochastic_round(x, jax.random.key(0)).astype(jnp.float32)
      >>> sorted(set(rounded.tolist())), abs(float(rounded.mean()) - (1 + 2**-10)) < 1e-4
      ([1.0, 1.0078125], True)
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def apply_updates(params: Params, updates: Params, key: jax.Array | None = None) -> Params:
    """params + updates, in the type that each parameter has.

    Args:
      params: nested dict.
      updates: the same.
      key: with one, bfloat16 parameters are rounded by `stochastic_round`; None rounds to the nearest.
    """
    if key is None:
        return optax.apply_updates(params, updates)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def one(leaf: jax.Array, update: jax.Array, key: jax.Array) -> jax.Array:
        total = leaf.astype(jnp.float32) + update
        return stochastic_round(total, key) if leaf.dtype == jnp.bfloat16 else total.astype(leaf.dtype)

    return structure.unflatten(map(one, leaves, structure.flatten_up_to(updates), keys))
