"""One side of `benchmark.py train`: this package's own training step. Reads a specification, prints JSON."""

import json
import sys
import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax_device import device_figures, matmul_rate

from prefalign_jax.data.packing import Shape, shape_of
from prefalign_jax.data.pipeline import PairSet, make_pair_set, train_batches
from prefalign_jax.data.trees import Layout
from prefalign_jax.losses import make_loss
from prefalign_jax.models import hf_io
from prefalign_jax.models.decoder import cast, make_decoder
from prefalign_jax.models.lora import Lora, init_adapters
from prefalign_jax.reference import compute
from prefalign_jax.sharding import make_mesh, param_shardings
from prefalign_jax.train_step import init_state, make_train_step
from prefalign_jax.types import Pair, PreferenceBatch


def pairs_of(path: str) -> list[Pair]:
    """The pairs that all sides train on, {'prompt': [[...], ...], 'chosen': ..., 'rejected': ...}."""
    with open(path, encoding="utf-8") as file:
        sides = json.load(file)
    return [Pair(*(np.array(ids, np.int32) for ids in three)) for three in zip(*sides.values(), strict=True)]


def of_one_shape(data: PairSet, batches: Iterable[PreferenceBatch]) -> PairSet:
    """The set with a shape that holds each of these batches and no other, where compilation is dear."""
    return data._replace(shapes=(Shape(*np.max([shape_of(batch) for batch in batches], axis=0).tolist()),))


def main() -> None:
    """Trains a few steps."""
    spec = json.loads(sys.argv[1])
    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(seconds) if name.endswith("backend_compile_duration") else None
    )
    config = hf_io.load_config(spec["model"])
    lora = Lora(rank=spec["lora"], alpha=float(spec["lora"])) if spec["lora"] else None
    model = make_decoder(config, dtype=spec["dtype"], remat=spec["remat"], attention=spec["attention"], lora=lora)
    mesh = make_mesh({"data": 1})
    shardings = param_shardings(mesh, jax.eval_shape(model.init, jax.random.key(0)))
    stored = spec["param_dtype"]
    if spec.get("drawn"):  # the directory holds a shape alone
        make = make_decoder(config, param_dtype=stored).init
        params = jax.jit(make, out_shardings=shardings)(jax.random.key(0))
    else:
        params = hf_io.load_params(spec["model"], config, dtype=stored, shardings=shardings)
    # ORPO as TRL computes it: the NLL of prompt and chosen response, over all tokens of the batch.
    as_trl = {"nll_over": "prompt+chosen", "nll_mean": "batch"} if spec["loss"] == "orpo" else {}
    loss = make_loss(spec["loss"], **as_trl)
    pairs = pairs_of(spec["pairs"])
    used = spec["steps"] * spec["size"]
    layout = Layout(prompt="prompt" in loss.needs)
    options = dict(layout=layout, attends=model.attends, group=spec["group"])
    data = make_pair_set(pairs, spec["size"], **options)  # shapes are those of the whole set
    kept = np.arange(used)
    data = data._replace(
        pairs=pairs[:used], lengths=data.lengths.of(kept), sharing=data.sharing and data.sharing.of(kept)
    )
    if spec.get("one_program"):
        data = of_one_shape(data, train_batches(data, seed=0, shuffle=False, start=0, stop=spec["steps"]))
    frozen = None
    if "reference" in loss.needs:
        if spec["reference"] == "cached":
            data = data._replace(reference=compute(model, params, data, mesh=mesh))
        elif not lora:
            frozen = cast(jax.tree.map(jnp.copy, params), spec["dtype"])
    if lora:
        frozen = params
        params = init_adapters(jax.random.key(0), params, lora, "float32")
    optimizer = optax.adamw(spec["learning_rate"], weight_decay=0.0)
    step = make_train_step(model, loss, optimizer, mesh)
    state = init_state(params, optimizer, mesh, frozen)
    del params
    programs = len(compiled)
    losses, chosen, seconds, cpu, waits, tokens, trained, positions, cold = ([] for _ in range(9))
    batches = train_batches(data, seed=0, shuffle=False, start=0, stop=spec["steps"])
    for _ in range(spec["steps"]):
        began, cpu_began, compiled_before = time.perf_counter(), time.process_time(), len(compiled)
        batch = next(batches)
        waits.append(time.perf_counter() - began)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        chosen.append(float(metrics["logps/chosen"]))
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
        cold.append(len(compiled) > compiled_before)
        tokens.append(int(np.count_nonzero(batch.segments)))
        positions.append(batch.segments.size)
        trained.append(int(data.laid_out(batch.index.reshape(-1)).trained.sum()))
    # 2 operations a parameter and token: forward 1, backward 2 units; the frozen reference one more, adapters none for
    # the kernels' gradients. The head counts on trained tokens alone, attention and what is padding not at all.
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(model.init, jax.random.key(0)))
    body = sum(x.size for path, x in leaves if "layers" in jax.tree_util.keystr(path))
    units = (2 if lora else 3) + (1 if "reference" in loss.needs and spec["reference"] != "cached" else 0)
    head = config.vocab_size * config.hidden_size
    useful = [2 * units * (body * t + head * n) for t, n in zip(tokens, trained, strict=True)]
    measured = {
        **device_figures(),  # before the products below
        "losses": losses,
        "chosen_logps": chosen[0],
        "seconds": seconds,
        "cpu_seconds": cpu,
        "cold": cold,
        "wait_seconds": waits,
        "tokens": tokens,
        "positions": positions,
        "trained": trained,
        "programs": sum(s > 0.1 for s in compiled[programs:]),
        "compile_seconds": sum(compiled[programs:]),
        "useful_flops": useful,
        "matmul_flops": matmul_rate(spec["dtype"]),
        "versions": {"jax": jax.__version__},
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    with jax.default_matmul_precision("highest"):  # as training has it unless told otherwise
        main()
