"""What a training step costs: time and operations as its sizes grow, and the memory that it holds."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measuring import measured
from prefalign_jax.cost.flops import count_flops
from prefalign_jax.data.pipeline import batch_of, make_pair_set
from prefalign_jax.losses import make_loss
from prefalign_jax.models import hf_io
from prefalign_jax.models.decoder import DecoderConfig, make_decoder
from prefalign_jax.models.lora import Lora, init_adapters
from prefalign_jax.models.quantize import quantize_params
from prefalign_jax.sharding import make_mesh, shapes_of
from prefalign_jax.train_step import init_state, make_train_step
from prefalign_jax.types import Pair, TrainState, UserError


def cost(
    *, tokens: int = 64, vocabulary: int = 8192, layers: int = 6, width: int = 256, pairs: int = 8, steps: int = 4
) -> dict[str, Any]:
    """How the time of a DPO step grows with tokens, vocabulary, depth, width and batch: each doubled in turn.

    Args:
      tokens: of a response; a prompt has twice as many.
      vocabulary, layers, width: of the model, whose heads have 64 dimensions.
      pairs: in a batch.
      steps: of each, the first not counted.

    Returns:
      For each the time and the counted operations, both as multiples of the base's.

    Raises:
      UserError: the width is no multiple of 64.
    """
    if width < 64 or width % 64:
        raise UserError(f"width={width} is out of range; write a multiple of 64")
    base = dict(tokens=tokens, vocabulary=vocabulary, layers=layers, width=width, pairs=pairs)
    return measured("step_cost.cost_step", base=base, steps=steps, devices=1)[0]


def cost_step(base: dict[str, int], steps: int, devices: int) -> dict[str, Any]:
    """The steps of `cost`, in a process of its own."""
    figures: dict[str, Any] = {}
    for name in (None, *base):
        sizes = base | ({name: 2 * base[name]} if name else {})
        heads = sizes["width"] // 64
        config = DecoderConfig(
            sizes["vocabulary"],
            sizes["width"],
            3 * sizes["width"],
            sizes["layers"],
            heads,
            heads,
            64,
            tie_embeddings=True,
        )
        model, mesh, optimizer = make_decoder(config), make_mesh({"data": 1}), optax.adamw(1e-6)
        rng = np.random.default_rng(0)
        lengths = [2 * sizes["tokens"], sizes["tokens"], sizes["tokens"]]
        drawn = [
            [rng.integers(1, sizes["vocabulary"], n).astype(np.int32) for n in lengths] for _ in range(sizes["pairs"])
        ]
        data = make_pair_set([Pair(*ids) for ids in drawn], sizes["pairs"])
        batch = batch_of(data, np.arange(sizes["pairs"]))
        params = model.init(jax.random.key(0))
        state = init_state(params, optimizer, mesh, jax.tree.map(jnp.copy, params))
        del params
        step, seconds = make_train_step(model, make_loss("dpo"), optimizer, mesh), []
        flops = count_flops(step, shapes_of(state), batch)
        for _ in range(steps):
            began = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
        time_of = float(np.median(seconds[1:]))
        if name is None:
            figures |= {"base, s": time_of, "base, GFLOP": flops / 1e9, "base, compilation, s": seconds[0] - time_of}
        else:
            figures[f"{name} x 2: time x"] = time_of / figures["base, s"]
            figures[f"{name} x 2: operations x"] = flops / 1e9 / figures["base, GFLOP"]
            figures[f"{name} x 2: compilation x"] = (seconds[0] - time_of) / figures["base, compilation, s"]
    return figures


# What is trained -> its adapters, and the bits of the frozen base.
TRAINED: dict[str, tuple[Lora | None, str | None]] = {
    "all weights": (None, None),
    "LoRA": (Lora(rank=16), None),
    "DoRA": (Lora(rank=16, dora=True), None),
    "LoRA over int8": (Lora(rank=16), "int8"),
    "LoRA over nf4": (Lora(rank=16), "nf4"),
}


def memory(*, model: str = "", pairs: int = 16, length: int = 64, remat: str = "full") -> dict[str, Any]:
    """What a DPO step holds, as XLA has it of the compiled program; nothing is run and no weights are read.

    Args:
      model: directory with a config.json.
      pairs: in the batch.
      length: tokens of each prompt and each response.
      remat: what the backward pass keeps of a layer.

    Returns:
      For each of TRAINED the MiB of what stays from step to step (weights, moments, reference) and of what does not.
    """
    if not model:
        raise UserError("--model is missing: a directory with a config.json")
    config, rng, out = hf_io.load_config(model), np.random.default_rng(0), {}
    drawn = [[rng.integers(3, config.vocab_size, length).astype(np.int32) for _ in range(3)] for _ in range(pairs)]
    data = [Pair(*ids) for ids in drawn]
    batch = batch_of(make_pair_set(data, pairs), np.arange(pairs))
    mesh, optimizer, loss = make_mesh({"data": 1}), optax.adamw(1e-4), make_loss("dpo")
    for name, (lora, bits) in TRAINED.items():
        decoder = make_decoder(config, lora=lora, remat=remat)

        def state(key: jax.Array, decoder=decoder, lora=lora, bits=bits) -> TrainState:
            base = decoder.init(key)
            base = quantize_params(base, bits) if bits else base
            params = init_adapters(key, base, lora) if lora else base
            return TrainState(jnp.int32(0), params, optimizer.init(params), base)

        abstract = jax.eval_shape(state, jax.random.key(0))
        figures = make_train_step(decoder, loss, optimizer, mesh).lower(abstract, batch).compile().memory_analysis()
        trained = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
        out[f"{name}: trained, millions"] = trained / 1e6
        out[f"{name}: kept, MiB"] = figures.argument_size_in_bytes / 2**20
        out[f"{name}: during the step, MiB"] = figures.temp_size_in_bytes / 2**20
    return out
