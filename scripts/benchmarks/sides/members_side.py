"""K members of one program beside one run alone: seconds of a DPO step. Reads a specification, prints JSON."""

import json
import sys
import time

import jax
import jax.numpy as jnp
from jax_device import device_figures
from our_side import of_one_shape, pairs_of

from prefalign_jax.assemble import step_of
from prefalign_jax.config import defaults
from prefalign_jax.data.pipeline import batch_of, batches_of, make_pair_set, train_order
from prefalign_jax.experiment import Experiment, read
from prefalign_jax.members import make_program, numbers_of
from prefalign_jax.models import hf_io
from prefalign_jax.models.decoder import cast, make_decoder
from prefalign_jax.sharding import born, make_mesh, place_batch
from prefalign_jax.train_step import init_state


def experiment_of(spec: dict, number: int) -> Experiment:
    """Of a member: they differ in the seed and the learning rate."""
    config = defaults("dpo")
    config.steps, config.batch_size, config.dtype = spec["steps"], spec["size"], spec["dtype"]
    config.seed, config.learning_rate = number, spec["learning_rate"] * (1 + number)
    return read(config, complete=False)


def main() -> None:
    """Some steps alone, then as many together."""
    spec = json.loads(sys.argv[1])
    experiments = [experiment_of(spec, number) for number in range(spec["members"])]
    first = experiments[0]
    model, mesh = make_decoder(hf_io.load_config(spec["model"]), dtype=spec["dtype"]), make_mesh({"data": 1})
    pairs = pairs_of(spec["pairs"])
    data = make_pair_set(pairs, spec["size"], layout=first.layout, attends=model.attends)
    members, steps = range(spec["members"]), range(spec["steps"])
    orders = [train_order(data, seed=k, shuffle=True, stop=spec["steps"]) for k in members]
    data = of_one_shape(data, (batch_of(data, order(n)) for order in orders for n in steps))
    optimizer, step = step_of(first, model, mesh, first.learning_rate(len(pairs)))

    def began(reference):
        return init_state(born(mesh, model.init, jax.random.key(0)), optimizer, mesh, reference, {}, model.rules)

    reference = cast(jax.tree.map(jnp.copy, born(mesh, model.init, jax.random.key(0))), spec["dtype"])
    state, alone = began(reference), []
    for n in steps:
        start = time.perf_counter()
        state, metrics = step(state, place_batch(mesh, batch_of(data, orders[0](n))))
        jax.block_until_ready(metrics)
        alone.append(time.perf_counter() - start)
    of_one = device_figures()
    numbers = numbers_of(experiments, [len(pairs)] * len(experiments))
    program = make_program(experiments, numbers, model, mesh, state, list(members))  # each has its own order
    states, together = program.empty(state.reference), []
    del state
    for k in members:
        states = program.put(states, k, began(None))
    for n in steps:
        start = time.perf_counter()
        batch = batches_of([data] * len(orders), [order(n) for order in orders])
        states, metrics = program.step(states, program.place(batch))
        jax.block_until_ready(metrics)
        together.append(time.perf_counter() - start)
    of_one = {"alone, peak_bytes": of_one["peak_bytes"]}
    print(json.dumps({**device_figures(), **of_one, "alone": alone, "seconds": together}))


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):  # as training has it unless told otherwise
        main()
