"""Several runs in one program: a train step vmapped over what they differ in; what they share is there once.

The members of a program are runs of one experiment that differ in their seed and in some numbers (`NUMBERS`). Each has
parameters and moments of its own. A frozen reference, or the base under adapters, has no axis of members: what it
computes for all is one big product. Those that see the same data in the same order have one batch. Nothing passes from
one member to another, so a member's numbers are those of the run alone, to rounding, and one that diverges changes no
other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from prefalign_jax.assemble import optimizer_of, update_options
from prefalign_jax.experiment import Experiment
from prefalign_jax.losses import LOSSES, MODIFIERS, hyper_of
from prefalign_jax.models.dropout import Dropout
from prefalign_jax.options import hyper_parameters
from prefalign_jax.sharding import batch_shardings, state_shardings
from prefalign_jax.train_step import Metrics, make_update, reference_logps
from prefalign_jax.types import LanguageModel, PreferenceBatch, TrainState

# Fields in which members may differ, beside the numbers that their loss itself takes.
NUMBERS = ("seed", "learning_rate", "warmup_steps", "warmup_examples", "warmup_epochs", "warmup_ratio")
NUMBERS += ("optimizer.weight_decay", "data.flip_labels", "model.dropout", "model.attention_dropout")
# Hyper-parameters of losses whose value decides what is computed: it has to be known when the program is made.
BRANCHING = ("reward_alpha", "centre", "bradley_terry.margin", "exo.label_smoothing", "cpo.label_smoothing")
FAILED = "failed.json"  # in the directory of a member that diverged: at which step, and what there is to say of it
# Which parts of a program's state have an axis of members.
AXES = TrainState(step=None, params=0, opt_state=0, reference=None, running=0, ema=0)
_MODIFYING = {key for modifier in MODIFIERS.values() for key in hyper_parameters(modifier.function)}


def shared_fields(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a run must have in common with others to be a member of one program with them.

    Args:
      fields: of its config, resolved, with dotted names.

    Returns:
      The fields that must be the same; None for a run that has to be a program by itself.
    """
    alone = (
        fields["job"] != "train"  # several trainings one after the other
        or fields["reference.kind"] == "moving"
        or fields["model.attention"] != "tiles"
        or fields["profile_steps"] is not None
        or fields["seed"] >= 2**31
    )
    if alone:
        return None
    free = {*NUMBERS, *(f"loss.{key}" for key in loss_numbers(fields["loss.name"]))}
    if fields["model.random_init"]:
        free.remove("seed")
    return {key: value for key, value in fields.items() if key not in free}


def loss_numbers(name: str) -> set[str]:
    """Hyper-parameters of a loss in which members may differ: those that change no more than numbers of its formula."""
    if name not in LOSSES:
        return set()
    numbers = {key for key, value in hyper_of(name).items() if type(value) is float}
    return {key for key in numbers if key not in _MODIFYING and not {key, f"{name}.{key}"} & {*BRANCHING}}


class Numbers(NamedTuple):
    """What K members differ in.

    Attributes:
      seed: [K] int32, of dropout and rounding.
      rates: [K, steps] float32, the learning rate of every step; 0 after a member's last.
      loss: {hyper-parameter: [K] float32}, those that differ.
      optimizer: {hyper-parameter: [K] float32}, those that differ.
      dropout: {rate: [K] float32}, those that differ, with their names in a config's `model`.
    """

    seed: jax.Array
    rates: jax.Array
    loss: dict[str, jax.Array]
    optimizer: dict[str, jax.Array]
    dropout: dict[str, jax.Array]


def numbers_of(experiments: Sequence[Experiment], pairs: Sequence[int]) -> Numbers:
    """The numbers of some experiments.

    Args:
      experiments: that have their `shared_fields` in common.
      pairs: in an epoch of each.
    """
    totals = [one.total_steps(count) for one, count in zip(experiments, pairs, strict=True)]
    rates = np.zeros((len(experiments), max(totals)), np.float32)
    for row, one, count, total in zip(rates, experiments, pairs, totals, strict=True):
        row[:total] = jax.vmap(one.learning_rate(count))(np.arange(total, dtype=np.int32))

    def differing(group: str, defaults: Mapping[str, Any]) -> dict[str, jax.Array]:
        known = [{**defaults, **one.plain[group]} for one in experiments]
        names = [name for name in known[0] if any(some[name] != known[0][name] for some in known)]
        return {name: jnp.array([some[name] for some in known], jnp.float32) for name in names}

    return Numbers(
        seed=jnp.array([one.config.seed for one in experiments], jnp.int32),
        rates=jnp.asarray(rates),
        loss=differing("loss", {}),
        optimizer=differing("optimizer", {"weight_decay": 0.0}),
        dropout=differing("model", {}),
    )


class Program(NamedTuple):
    """K members' train step, and the way of states in and out of it. The state of all has K as leading axis, but for
    the step and the reference, which all have in common.

    Attributes:
      step: (state, batch) -> (state, {metric: [K]}); the state is donated. The batch has the streams, then M as leading
        axes. Like every jitted function it has `lower`.
      empty: reference -> a state of all at step 0, to be filled.
      put: (state, k, state of one) -> the state with that of member k; the state is donated.
      take: (state, k) -> the state of member k.
      place: a batch of NumPy arrays -> on the devices.
    """

    step: Callable[[TrainState, PreferenceBatch], tuple[TrainState, Metrics]]
    empty: Callable[[Any], TrainState]
    put: Callable[[TrainState, int, TrainState], TrainState]
    take: Callable[[TrainState, int], TrainState]
    place: Callable[[PreferenceBatch], PreferenceBatch]


def make_program(
    experiments: Sequence[Experiment],
    numbers: Numbers,
    model: LanguageModel,
    mesh: Mesh,
    one: TrainState,
    stream_of: Sequence[int],
) -> Program:
    """The program of some experiments.

    Args:
      experiments: that have their `shared_fields` in common.
      numbers: of them.
      model: pure functions of params; where rates of dropout differ, one that has `dropping`.
      mesh: the mesh; each member's arrays are dealt to it as those of a run alone.
      one: the state of one of them, or its shapes.
      stream_of: [K] which of a step's batches is each member's. Those that read the same data in the same order have
        one batch, and a frozen reference reads it once.

    Returns:
      The `Program`.
    """
    first, count = experiments[0], len(experiments)
    options = update_options(first)

    def update(numbers: Numbers, state: TrainState, batch: PreferenceBatch) -> tuple[TrainState, Metrics]:
        def rate(step: jax.Array) -> jax.Array:
            return numbers.rates[step]

        optimizer = optimizer_of(first, rate, **numbers.optimizer)
        loss, own = first.loss_with(**numbers.loss), model
        if numbers.dropout:
            fields = {**first.plain["model"], **numbers.dropout}
            own = model.dropping(Dropout(fields["dropout"], fields["attention_dropout"]))
        step = make_update(own, loss, optimizer, schedule=rate, seed=numbers.seed, **options)
        return step(state, batch)

    def of_all(numbers: Numbers, state: TrainState, batches: PreferenceBatch) -> tuple[TrainState, Metrics]:
        loss = first.loss
        if "reference" in loss.needs and "token_kl" not in loss.needs and batches.reference is None:
            read = functools.partial(reference_logps, model, loss, state.reference, chunk=options["chunk"])
            batches = batches._replace(reference=jax.vmap(functools.partial(jax.lax.map, read))(batches))
        own = jax.tree.map(lambda x: x[np.array(stream_of)], batches)
        return jax.vmap(update, in_axes=(0, AXES, 0), out_axes=(AXES, 0))(numbers, state, own)

    alone = state_shardings(mesh, one, model.rules)
    whole = NamedSharding(mesh, P())

    def with_members(shardings: Any) -> Any:
        return jax.tree.map(lambda x: NamedSharding(mesh, P(None, *x.spec)), shardings)

    own = ("params", "opt_state", "running", "ema")  # what each member has of its own
    placed = alone._replace(**{name: with_members(getattr(alone, name)) for name in own})

    def of_members(state: TrainState) -> dict[str, Any]:
        return {name: getattr(state, name) for name in own}

    compiled = jax.jit(
        of_all,
        in_shardings=(None, placed, None),
        out_shardings=(placed, whole),
        donate_argnums=1,
    )
    blank = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *np.shape(x)), x.dtype), of_members(one))
    make = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), blank), out_shardings=of_members(placed))
    write = jax.jit(
        lambda all_of, k, some: jax.tree.map(lambda x, y: x.at[k].set(y), all_of, some),
        out_shardings=of_members(placed),
        donate_argnums=0,
    )
    read = jax.jit(lambda all_of, k: jax.tree.map(lambda x: x[k], all_of), out_shardings=of_members(alone))

    def empty(reference: Any) -> TrainState:
        return TrainState(jax.device_put(np.int32(0), whole), reference=reference, **make())

    def put(state: TrainState, k: int, some: TrainState) -> TrainState:
        return state._replace(step=some.step, **write(of_members(state), np.int32(k), of_members(some)))

    def take(state: TrainState, k: int) -> TrainState:
        return state._replace(**read(of_members(state), np.int32(k)))

    def place(batch: PreferenceBatch) -> PreferenceBatch:
        return jax.device_put(batch, with_members(batch_shardings(mesh, batch)))

    def step(state: TrainState, batch: PreferenceBatch) -> tuple[TrainState, Metrics]:
        return compiled(numbers, state, batch)

    step.lower = lambda state, batch: compiled.lower(numbers, state, batch)
    return Program(step, empty, put, take, place)
