"""The update and the evaluation of one batch: pure functions, jitted once, no input or output."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefalign_jax.logps import VOCABULARY_CHUNK, preference_logps
from prefalign_jax.losses import BoundLoss
from prefalign_jax.metrics import weighted_sum
from prefalign_jax.sharding import batch_shardings, place_batch, state_shardings
from prefalign_jax.types import LanguageModel, PairLogps, Params, PreferenceBatch, TrainState

Metrics = dict[str, jax.Array]


def pair_losses(
    model: LanguageModel,
    loss: BoundLoss,
    params: Params,
    reference: Params | None,
    batch: PreferenceBatch,
    chunk: int = VOCABULARY_CHUNK,
) -> tuple[jax.Array, Metrics]:
    """The loss and its metrics of every pair of a micro-batch.

    Args:
      model: pure functions of params.
      loss: bound loss.
      params: of the policy.
      reference: parameters of the frozen copy; None where the batch carries cached log-probabilities or none are
        needed.
      batch: packed rows, without the micro-step axis.
      chunk: columns of logits at once.

    Returns:
      (loss [B], metrics {name: [B]}).
    """
    policy = preference_logps(model, params, batch, chunk)
    return loss(policy, _reference_logps(model, loss, reference, batch, chunk))


def _reference_logps(model, loss, reference, batch, chunk) -> PairLogps | None:
    if "reference" not in loss.needs:
        return None
    if batch.reference is not None:
        return batch.reference
    if reference is None:
        raise ValueError(f"loss {loss.name!r} needs a reference: keep one in the state or in the batch")
    return jax.lax.stop_gradient(preference_logps(model, reference, batch, chunk))


def init_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh, reference: Params | None = None
) -> TrainState:
    """A state at step 0, its optimizer moments sharded as the parameters are.

    Args:
      params: on their shardings.
      optimizer: its `init` is run on the devices.
      mesh: the mesh.
      reference: parameters of the frozen copy. The step donates the state: they must not share buffers with params.

    Returns:
      The state.
    """
    shapes = TrainState(0, params, jax.eval_shape(optimizer.init, params), reference)
    shardings = state_shardings(mesh, shapes, optimizer)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), params, opt_state, reference)


def make_train_step(
    model: LanguageModel,
    loss: BoundLoss,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    schedule: Callable[[jax.Array], jax.Array] | None = None,
    chunk: int = VOCABULARY_CHUNK,
) -> Callable[[TrainState, PreferenceBatch], tuple[TrainState, Metrics]]:
    """step(state, batch) -> (state, metrics), jitted with explicit shardings; the state is donated.

    loss = sum_i w_i loss_i / sum_i w_i over all pairs of all micro-steps and devices, divided once.

    Args:
      model: pure functions of params.
      loss: bound loss.
      optimizer: gradient clipping included.
      mesh: the mesh.
      schedule: step -> learning rate, only to report it.
      chunk: columns of logits at once.

    Returns:
      The step. Its batch has M micro-steps as leading axis; its metrics are scalars: loss, grad_norm (before clipping),
      learning_rate and the loss's own, averaged like the loss.
    """

    def step(state: TrainState, batch: PreferenceBatch) -> tuple[TrainState, Metrics]:
        total_weight = jnp.sum(batch.weight)

        def micro_loss(params: Params, micro: PreferenceBatch):
            losses, metrics = pair_losses(model, loss, params, state.reference, micro, chunk)
            share = micro.weight / total_weight
            return weighted_sum(losses, share), {k: weighted_sum(m, share) for k, m in metrics.items()}

        def gradients(micro: PreferenceBatch):
            (value, metrics), grads = jax.value_and_grad(micro_loss, has_aux=True)(state.params, micro)
            return {"loss": value, **metrics}, grads

        def add(total, micro: PreferenceBatch):  # each micro-step's share of the weight is already inside
            return jax.tree.map(jnp.add, total, gradients(micro)), None

        first = jax.tree.map(lambda x: x[0], batch)
        if batch.weight.shape[0] == 1:
            metrics, grads = gradients(first)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, first))
            (metrics, grads), _ = jax.lax.scan(add, zeros, batch)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics["grad_norm"] = optax.tree.norm(grads)
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.reference), metrics

    compiled = None

    def place_and_run(state: TrainState, batch: PreferenceBatch):
        nonlocal compiled
        if compiled is None:  # the shardings need the structure of a state and a batch
            states = state_shardings(mesh, state, optimizer)
            batches = batch_shardings(mesh, batch)
            compiled = jax.jit(
                step,
                in_shardings=(states, batches),
                out_shardings=(states, NamedSharding(mesh, P())),
                donate_argnums=0,
            )
        return compiled(state, batch)

    return place_and_run


def make_eval_step(
    model: LanguageModel, loss: BoundLoss, mesh: Mesh | None = None, chunk: int = VOCABULARY_CHUNK
) -> Callable[[Params, Params | None, PreferenceBatch], Metrics]:
    """evaluate(params, reference, batch) -> {name: [B]} with the loss under 'loss': per pair, for the host to average.

    Args:
      model, loss, chunk: as in `make_train_step`.
      mesh: deals the rows of a batch to its devices; None computes on one.

    Returns:
      The jitted function. Its batch has a leading axis of one micro-step.
    """

    @jax.jit
    def on_devices(params: Params, reference: Params | None, batch: PreferenceBatch) -> Metrics:
        losses, metrics = pair_losses(model, loss, params, reference, jax.tree.map(lambda x: x[0], batch), chunk)
        return {"loss": losses, **metrics}

    return lambda params, reference, batch: on_devices(params, reference, place_batch(mesh, batch))
