"""The update and the evaluation of one batch: pure functions, jitted once, no input or output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefalign_jax import averages
from prefalign_jax.logps import REFERENCE_NEEDS, VOCABULARY_CHUNK, policy_and_reference_logps, preference_logps
from prefalign_jax.losses import BoundLoss
from prefalign_jax.metrics import metric_sums, weighted_sum
from prefalign_jax.optim import apply_updates
from prefalign_jax.sharding import batch_shardings, place_batch, state_shardings
from prefalign_jax.types import LanguageModel, PairLogps, Params, PreferenceBatch, TrainState

Metrics = dict[str, jax.Array]


def both_logps(
    model: LanguageModel,
    loss: BoundLoss,
    params: Params,
    reference: Params | None,
    batch: PreferenceBatch,
    chunk: int = VOCABULARY_CHUNK,
    key: jax.Array | None = None,
) -> tuple[PairLogps, PairLogps | None]:
    """What the loss reads of a micro-batch, under the policy and under the reference if it needs one.

    Args:
      model: pure functions of params.
      loss: bound loss.
      params: of the policy.
      reference: parameters of the frozen copy; None where the batch carries cached log-probabilities or none are
        needed.
      batch: packed rows, without the micro-step axis.
      chunk: columns of logits at once.
      key: of the policy's dropout; None drops nothing.

    Returns:
      (policy, reference or None); no gradient reaches the reference.
    """
    if model.join is not None:
        params = model.join(jax.lax.stop_gradient(reference), params)
    if "reference" in loss.needs and batch.reference is None:
        if reference is None:
            raise ValueError(f"loss {loss.name!r} needs a reference: keep one in the state or in the batch")
        return policy_and_reference_logps(model, params, reference, batch, chunk, loss.needs, key)
    policy = preference_logps(model, params, batch, chunk, loss.needs, key)
    return policy, batch.reference if "reference" in loss.needs else None


def reference_logps(
    model: LanguageModel, loss: BoundLoss, reference: Params, batch: PreferenceBatch, chunk: int = VOCABULARY_CHUNK
) -> PairLogps:
    """What `both_logps` has of the reference; arguments as there. A batch may carry it in place of a computation."""
    return preference_logps(model, reference, batch, chunk, loss.needs & REFERENCE_NEEDS)


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    reference: Params | None = None,
    running: Mapping[str, float] | None = None,
    rules: Sequence[tuple[str, P]] | None = None,
    ema: bool = False,
) -> TrainState:
    """A state at step 0, its optimizer moments sharded as the parameters are.

    Args:
      params: put on their shardings, if they are not there already.
      optimizer: its `init` is run on the devices.
      mesh: the mesh.
      reference: parameters of the frozen copy, as params. The step donates the state: the two must share no buffers.
      running: of the loss, at the first step.
      rules: the model's, of sharding.
      ema: keep a moving average of the parameters.

    Returns:
      The state.
    """
    carried = {name: np.float32(value) for name, value in running.items()} if running else None
    shapes = TrainState(0, params, jax.eval_shape(optimizer.init, params), reference, carried, params if ema else None)
    shardings = state_shardings(mesh, shapes, rules)
    # All that the step returns lies on the mesh: a first state that did not would have it compiled twice.
    state = TrainState(np.int32(0), params, None, reference, carried)
    state = jax.device_put(state, shardings._replace(opt_state=None, ema=None))
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(state.params)
    average = jax.jit(averages.start, out_shardings=shardings.ema)(state.params) if ema else None
    return state._replace(opt_state=opt_state, ema=average)


def make_update(
    model: LanguageModel,
    loss: BoundLoss,
    optimizer: optax.GradientTransformation,
    *,
    schedule: Callable[[jax.Array], jax.Array] | None = None,
    chunk: int = VOCABULARY_CHUNK,
    move_reference: Callable[[jax.Array, Params, Params], Params] | None = None,
    router_weight: float = 0.0,
    stochastic_rounding: bool = False,
    ema_decay: float | None = None,
    seed: int | jax.Array = 0,
) -> Callable[[TrainState, PreferenceBatch], tuple[TrainState, Metrics]]:
    """update(state, batch) -> (state, metrics), the pure function that `make_train_step` compiles.

    loss = sum_i w_i loss_i / sum_i w_i over all pairs of all micro-steps and devices, divided once.

    A loss that needs the whole batch at once gets it, micro-steps or not: the log-probabilities of all micro-steps come
    first, then the loss and its gradient with respect to them, then each micro-step's share of the gradient.

    It may be traced with numbers in place of constants: in the loss, the optimizer, the schedule, the seed.

    Args:
      model: pure functions of params.
      loss: bound loss.
      optimizer: gradient clipping included.
      schedule: step -> learning rate, only to report it.
      chunk: columns of logits at once.
      move_reference: (steps done, new parameters, reference) -> new reference; None keeps it frozen.
      router_weight: of a mixture of experts' auxiliary loss in the objective; in any case it is the metric
        router_balance.
      stochastic_rounding: of bfloat16 parameters, see `optim.apply_updates`; the optimizer is then `in_float32`.
      ema_decay: of the moving average of the parameters, which the state then has.
      seed: of the rounding, and of the dropout of a model that has some. What is dropped is a function of the seed, the
        step, the micro-step and the place in the packed rows: a resumed run draws the same, another number of
        micro-steps does not.

    Returns:
      The function. Its batch has M micro-steps as leading axis; its metrics are scalars: loss, grad_norm (before
      clipping), learning_rate and the loss's own, averaged like the loss over the pairs that they apply to.
    """

    def logps(params: Params, reference: Params | None, micro: tuple[PreferenceBatch, jax.Array | None]):
        batch, key = micro
        return both_logps(model, loss, params, reference, batch, chunk, key)

    def objective(policy: PairLogps, frozen: PairLogps | None, total_weight: jax.Array, state: TrainState):
        """The loss of these pairs, as their part of the batch's mean; sums of the metrics; what is carried on."""
        policy = policy._replace(running=state.running)
        running = dict(loss.advance(policy, frozen)) if loss.running else state.running
        values, metrics = loss(policy._replace(running=running, router=None), frozen)
        if policy.router is not None:
            values, metrics = values + router_weight * policy.router, {**metrics, "router_balance": policy.router}
        sums = {name: metric_sums(metric, policy.weight) for name, metric in metrics.items()}
        return weighted_sum(values, policy.weight / total_weight), (sums, running)

    def at_once(state: TrainState, micro: tuple[PreferenceBatch, jax.Array | None], total_weight: jax.Array):
        """(loss, metric sums, running), gradient of one micro-step by itself."""

        def micro_loss(params: Params):
            return objective(*logps(params, state.reference, micro), total_weight, state)

        (value, (sums, running)), grads = jax.value_and_grad(micro_loss, has_aux=True)(state.params)
        return (value, sums, running), grads

    def accumulate(parts: Callable[[Any], Any], micros: Any) -> Any:
        """The sum over the micro-steps of parts(micro-step), added up in float32 at least and rounded once."""
        shapes = jax.eval_shape(parts, jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)
        total, _ = jax.lax.scan(lambda total, micro: (jax.tree.map(jnp.add, total, parts(micro)), None), zeros, micros)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), total, shapes)

    def part_by_part(state: TrainState, micros: tuple[PreferenceBatch, jax.Array | None], total_weight: jax.Array):
        """The same of all micro-steps, for a loss of one pair at a time."""

        def one(micro):
            (value, sums, _), grads = at_once(state, micro, total_weight)
            return (value, sums), grads

        (value, sums), grads = accumulate(one, micros)
        return (value, sums, state.running), grads

    def whole_batch(state: TrainState, micros: tuple[PreferenceBatch, jax.Array | None], total_weight: jax.Array):
        """The same, for a loss of the whole batch."""
        records = jax.lax.map(lambda micro: logps(state.params, state.reference, micro), micros)
        policy, frozen = (record and join(record) for record in records)
        (value, (sums, running)), slopes = jax.value_and_grad(objective, has_aux=True)(
            policy, frozen, total_weight, state
        )

        def one(micro_and_slopes):
            micro, slope = micro_and_slopes
            _, pull_back = jax.vjp(lambda params: logps(params, state.reference, micro)[0], state.params)
            return pull_back(slope)[0]

        return (value, sums, running), accumulate(one, (micros, split(slopes, records[0])))

    def step(state: TrainState, batch: PreferenceBatch) -> tuple[TrainState, Metrics]:
        total_weight = jnp.sum(batch.weight)
        keys = None
        if model.drops:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), batch.weight.shape[0])
        micros = (batch, keys)
        if batch.weight.shape[0] == 1:
            result, grads = at_once(state, jax.tree.map(lambda x: x[0], micros), total_weight)
        else:
            compute = whole_batch if "batch" in loss.needs else part_by_part
            result, grads = compute(state, micros, total_weight)
        value, sums, running = result
        metrics = {"loss": value, **{name: total / weight for name, (total, weight) in sums.items()}}

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics["grad_norm"] = optax.tree.norm(optax.tree.cast(grads, jnp.float32))
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        rounding = jax.random.fold_in(jax.random.key(~seed), state.step) if stochastic_rounding else None
        params = apply_updates(state.params, updates, rounding)
        reference = state.reference
        if move_reference is not None:
            reference = move_reference(state.step + 1, params, reference)
        ema = averages.moved(state.ema, params, ema_decay) if ema_decay is not None else state.ema
        return TrainState(state.step + 1, params, opt_state, reference, running, ema), metrics

    return step


def make_train_step(
    model: LanguageModel, loss: BoundLoss, optimizer: optax.GradientTransformation, mesh: Mesh, **options: Any
) -> Callable[[TrainState, PreferenceBatch], tuple[TrainState, Metrics]]:
    """step(state, batch) -> (state, metrics), jitted with explicit shardings; the state is donated.

    Args:
      model, loss, optimizer, **options: as `make_update` takes them.
      mesh: the mesh.

    Returns:
      The step; like every jitted function it has `lower`, and step.jitted(state, batch) is the jitted function that it
      calls for such states and batches.
    """
    step = make_update(model, loss, optimizer, **options)
    placed = None

    def jitted(state: TrainState, batch: PreferenceBatch):
        nonlocal placed
        if placed is None:  # the shardings need the structure of a state and a batch
            states = state_shardings(mesh, state, model.rules)
            batches = batch_shardings(mesh, batch)
            placed = jax.jit(
                step,
                in_shardings=(states, batches),
                out_shardings=(states, NamedSharding(mesh, P())),
                donate_argnums=0,
            )
        return placed

    def run(state: TrainState, batch: PreferenceBatch):
        return jitted(state, batch)(state, batch)

    run.jitted = jitted
    run.lower = lambda state, batch: jitted(state, batch).lower(state, batch)
    return run


def join(record: PairLogps) -> PairLogps:
    """The record of the whole batch from that of its micro-steps, [M, B] -> [M B]; batch-wide means are taken once."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), record._replace(mean_tokens=None))
    return flat._replace(mean_tokens=record.mean_tokens if record.mean_tokens is None else record.mean_tokens[0])


def split(slopes: PairLogps, record: PairLogps) -> PairLogps:
    """Gradients with respect to `join(record)` as those with respect to `record`; batch-wide means take none."""
    zeros = None if record.mean_tokens is None else jnp.zeros_like(record.mean_tokens)
    parts = jax.tree.map(
        lambda slope, x: slope.reshape(x.shape), slopes._replace(mean_tokens=None), record._replace(mean_tokens=None)
    )
    return parts._replace(mean_tokens=zeros)


def make_eval_step(
    model: LanguageModel,
    loss: BoundLoss,
    mesh: Mesh | None = None,
    chunk: int = VOCABULARY_CHUNK,
    members: bool = False,
) -> Callable[[Params, Params | None, PreferenceBatch], tuple[PairLogps, PairLogps | None]]:
    """logps(params, reference, batch) -> (policy, reference): what the loss reads of a batch's pairs.

    Args:
      model, loss, chunk: as in `make_train_step`.
      mesh: deals the rows of a batch to its devices; None computes on one.
      members: whether the parameters, and with them what is returned, have a leading axis of members.

    Returns:
      The function; `jitted` of it is the jitted one that it calls. Its batch has a leading axis of one micro-step.
    """

    def logps(params: Params, reference: Params | None, batch: PreferenceBatch):
        return both_logps(model, loss, params, reference, jax.tree.map(lambda x: x[0], batch), chunk)

    # What is per pair goes to every device, so that each of several processes has it.
    on_devices = jax.jit(
        jax.vmap(logps, in_axes=(0, None, None)) if members else logps, out_shardings=mesh and NamedSharding(mesh, P())
    )

    def run(params: Params, reference: Params | None, batch: PreferenceBatch):
        return on_devices(params, reference, place_batch(mesh, batch))

    run.jitted = on_devices
    return run
