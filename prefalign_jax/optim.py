"""Config -> optax: learning-rate schedules, optimizers with PyTorch's meaning, and the weight-decay mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prefalign_jax.options import Checks, check_hyper, choose, hyper_parameters
from prefalign_jax.types import Params, UserError

# A schedule gives the share of the peak rate at steps from the end of the warm-up on; `make_schedule` adds the warm-up.


def constant(step: jax.Array, *, warmup_steps: int, total_steps: int) -> jax.Array:
    """1."""
    return jnp.ones_like(step)


def linear(step: jax.Array, *, warmup_steps: int, total_steps: int) -> jax.Array:
    """1 at the end of the warm-up, 0 at `total_steps` and after."""
    return jnp.clip((total_steps - step) / max(1, total_steps - warmup_steps), 0.0, 1.0)


def cosine(step: jax.Array, *, warmup_steps: int, total_steps: int) -> jax.Array:
    """Half a cosine wave: 1 at the end of the warm-up, 0 at `total_steps` and after."""
    done = jnp.clip((step - warmup_steps) / max(1, total_steps - warmup_steps), 0.0, 1.0)
    return 0.5 * (1.0 + jnp.cos(jnp.pi * done))


def inverse_sqrt(step: jax.Array, *, warmup_steps: int, total_steps: int, timescale: int = 0) -> jax.Array:
    """sqrt(t / (step - warmup_steps + t)); t is `timescale`, else `warmup_steps`, else 10,000 (whichever is not 0)."""
    t = timescale or warmup_steps or 10_000
    return jnp.sqrt(t / (jnp.maximum(step - warmup_steps, 0.0) + t))


SCHEDULES: dict[str, Callable[..., jax.Array]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
}


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
    decay = choose("schedule", name, SCHEDULES)
    own = [key for key in hyper_parameters(decay) if key not in ("warmup_steps", "total_steps")]
    check_hyper(f"schedule {name!r}", hyper, own, VALID)
    if not 0 <= peak < math.inf:
        raise UserError(f"learning_rate={peak!r} is out of range; write a number >= 0")
    for field, value, least in (("warmup_steps", warmup_steps, 0), ("total_steps", total_steps, 1)):
        if int(value) != value or value < least:
            raise UserError(f"{field}={value!r} is out of range; write a whole number of steps >= {least}")
    if warmup_steps > total_steps:
        raise UserError(
            f"warmup_steps={warmup_steps} exceeds the {total_steps} steps of the run; write at most that many"
        )

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)  # exact below 2**24 steps
        share = decay(step, warmup_steps=warmup_steps, total_steps=total_steps, **hyper)
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


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"adamw": adamw, "rmsprop": rmsprop, "sgd": sgd}

# One name, one meaning, whichever optimizer takes it.
VALID: Checks = {
    "b1": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "b2": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "decay": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "momentum": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "eps": (lambda x: 0 < x < math.inf, "a positive number"),
    "weight_decay": (lambda x: 0 <= x < math.inf, "a number >= 0"),
    "timescale": (lambda x: 0 <= x < math.inf, "a number >= 0"),
}


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
        return leaf.ndim > 1 and path[-1].key not in ("scale", "bias", "lora_magnitude")

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
