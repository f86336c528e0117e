"""Averages of the trained weights, and which weights are evaluated, sampled and exported."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from optax import contrib

from prefalign_jax.types import Params, TrainState


def start(params: Params) -> Params:
    """The moving average before the first step: a copy of the parameters in float32.

    In bfloat16 a decay of 0.999 would round every move away.
    """
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)


def moved(average: Params, params: Params, decay: float) -> Params:
    """The exponential moving average after a step: decay * average + (1 - decay) * params.

    Example:
      >>> moved({"w": jnp.float32(1.0)}, {"w": jnp.float32(2.0)}, decay=0.75)["w"].item()
      1.25
    """
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new.astype(jnp.float32), average, params)


def schedule_free(state: TrainState) -> contrib.ScheduleFreeState | None:
    """The part of the optimizer's state that holds schedule-free AdamW's average, None for other optimizers."""

    def is_one(node: object) -> bool:
        return isinstance(node, contrib.ScheduleFreeState)

    return next(filter(is_one, jax.tree.leaves(state.opt_state, is_leaf=is_one)), None)


@jax.jit
def _average(own: contrib.ScheduleFreeState, params: Params) -> Params:
    """x = y + (1 / b1 - 1) (y - z), which is exactly y where nothing has been trained.

    optax's (y - (1 - b1) z) / b1 rounds there, and half of the accuracies at the start would be signs of that.
    """
    return jax.tree.map(lambda y, z: (y + (1.0 / own.b1 - 1.0) * (y - z)).astype(y.dtype), params, own.z)


def parts_of(state: TrainState, ema: bool | None = True) -> tuple[str, ...]:
    """The names of the parts of a state that `evaluated` reads."""
    if schedule_free(state) is not None:
        return "params", "opt_state"
    return ("ema",) if ema and state.ema is not None else ("params",)


def evaluated(state: TrainState, ema: bool | None = True) -> TrainState:
    """The state with the weights that are evaluated, sampled and exported in place of those that are trained.

    Args:
      state: of a run.
      ema: whether its moving average is used, if it has one.

    Returns:
      The same state, but for its parameters: the moving average; or schedule-free AdamW's average; or as they were.
    """
    if (own := schedule_free(state)) is not None:
        return state._replace(params=_average(own, state.params))
    return state._replace(params=state.ema) if ema and state.ema is not None else state
