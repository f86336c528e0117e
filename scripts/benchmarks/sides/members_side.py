"""K members of one program beside one run alone: seconds of a DPO step, of all weights or of adapters over one base.

Reads a specification, prints JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax_device import device_figures
from our_side import of_one_shape, pairs_of

from prefalign_jax.assemble import new_adapters, step_of
from prefalign_jax.config import defaults
from prefalign_jax.data.pipeline import batch_of, batches_of, make_pair_set, train_order
from prefalign_jax.experiment import Experiment, read
from prefalign_jax.members import make_program, numbers_of
from prefalign_jax.models import hf_io
from prefalign_jax.models.decoder import cast, make_decoder
from prefalign_jax.models.lora import Lora
from prefalign_jax.options import given
from prefalign_jax.sharding import born, make_mesh, place_batch
from prefalign_jax.train_step import init_state
from prefalign_jax.types import Params, TrainState


def experiment_of(spec: dict, number: int) -> Experiment:
    """Of a member: they differ in the seed and the learning rate."""
    config = defaults("dpo")
    config.steps, config.batch_size, config.dtype = spec["steps"], spec["size"], spec["dtype"]
    config.seed, config.learning_rate = number, spec["learning_rate"] * (1 + number)
    config.lora.rank = spec["lora"] or None
    return read(config, complete=False)


def main() -> None:
    """Some steps alone, then as many together."""
    spec = json.loads(sys.argv[1])
    experiments = [experiment_of(spec, number) for number in range(spec["members"])]
    first = experiments[0]
    lora = Lora(**given(first.config.lora)) if spec["lora"] else None
    model, mesh = make_decoder(hf_io.load_config(spec["model"]), dtype=spec["dtype"], lora=lora), make_mesh({"data": 1})
    pairs = pairs_of(spec["pairs"])
    data = make_pair_set(pairs, spec["size"], layout=first.layout, attends=model.attends)
    members, steps = range(spec["members"]), range(spec["steps"])
    orders = [train_order(data, seed=k, shuffle=True, stop=spec["steps"]) for k in members]
    data = of_one_shape(data, (batch_of(data, order(n)) for order in orders for n in steps))
    optimizer, step = step_of(first, model, mesh, first.learning_rate(len(pairs)))

    reference = cast(jax.tree.map(jnp.copy, born(mesh, model.init, jax.random.key(0))), spec["dtype"])

    def began(kept: Params | None) -> TrainState:
        params = new_adapters(first, lora, reference, mesh) if lora else born(mesh, model.init, jax.random.key(0))
        return init_state(params, optimizer, mesh, kept, {}, model.rules)

    def timed(seconds: list[float], cpu: list[float], take: Callable[[], Any]) -> Any:
        start, cpu_start = time.perf_counter(), time.process_time()
        state, metrics = take()
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
        return state

    state, alone = began(reference), ([], [])
    for n in steps:
        state = timed(*alone, lambda n=n, state=state: step(state, place_batch(mesh, batch_of(data, orders[0](n)))))
    of_one = device_figures()
    numbers = numbers_of(experiments, [len(pairs)] * len(experiments))
    program = make_program(experiments, numbers, model, mesh, state, list(members))  # each has its own order
    states, together = program.empty(state.reference), ([], [])
    del state
    for k in members:
        states = program.put(states, k, began(None))
    for n in steps:

        def take(n=n, states=states):
            batch = batches_of([data] * len(orders), [order(n) for order in orders])
            return program.step(states, program.place(batch))

        states = timed(*together, take)
    times = dict(zip(("alone", "alone, cpu", "seconds", "cpu"), (*alone, *together), strict=True))
    print(json.dumps({**device_figures(), "alone, peak_bytes": of_one["peak_bytes"], **times}))


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):  # as training has it unless told otherwise
        main()
