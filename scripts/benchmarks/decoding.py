"""Generation beside transformers'."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.inputs import SHAPES
from benchmarks.measuring import measured
from prefalign_jax.generation.generate import sample
from prefalign_jax.generation.sampling import Sampling
from prefalign_jax.models import hf_io
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.types import UserError


def decode(
    *, model: str = "", rows: str = "1,32", prompt: int = 32, new_tokens: int = 64, rounds: int = 2, cores: int = 1
) -> dict[str, Any]:
    """Greedy generation beside transformers' on PyTorch: float32, the same weights, prompts and numbers of tokens.

    The two take turns, each time in a fresh process, which runs once unmeasured, for compilation, and then three times.

    Args:
      model: a Hugging Face directory; none is random weights in the shape of SmolLM2-135M.
      rows: batch sizes.
      prompt, new_tokens: of every row; nothing stops before.
      rounds: processes of each.
      cores: that either may use, as many threads as cores. More than are idle make the two wait in different ways, and
        what is measured then is the waiting.

    Returns:
      For each batch size the medians in new tokens a second, their ratio, and how many tokens are the same.
    """
    if min(prompt, new_tokens, rounds, cores, *map(int, rows.split(","))) < 1:
        raise UserError("--rows, --prompt, --new_tokens, --rounds and --cores must be positive")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
        directory = model or str(Path(scratch) / "random")
        if not model:
            config = SHAPES["smollm2-135m"]
            hf_io.save_params(make_decoder(config).init(jax.random.key(0)), config, directory)
        for count in map(int, rows.split(",")):
            turns: dict[str, list[dict[str, Any]]] = {"ours": [], "transformers": []}
            for _ in range(rounds):
                for who, results in turns.items():
                    options = dict(directory=directory, rows=count, prompt=prompt, new_tokens=new_tokens, cores=cores)
                    results.append(measured("decoding.decode_step", who=who, devices=1, **options)[0])
            rates = {
                who: count * new_tokens / float(np.median([s for one in results for s in one["seconds"]]))
                for who, results in turns.items()
            }
            figures |= {f"{who}, {count} rows, tokens/s": rate for who, rate in rates.items()}
            figures[f"ratio, {count} rows"] = rates["ours"] / rates["transformers"]
            tokens = (np.array(results[0]["tokens"]) for results in turns.values())
            figures[f"same tokens, {count} rows"] = float(np.mean(np.equal(*tokens)))
            figures[f"ours, {count} rows, first run with compilation, s"] = turns["ours"][0]["first"]
    return figures


def decode_step(
    directory: str,
    who: str,
    rows: int,
    prompt: int,
    new_tokens: int,
    cores: int,
    devices: int = 1,
    dtype: str = "float32",
) -> dict[str, Any]:
    """One side of `decode`: seconds of the first run and of three more, and the tokens."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])  # before either library starts its threads
    config = hf_io.load_config(directory)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, (rows, prompt)).astype(np.int32)
    if who == "ours":
        model, params = make_decoder(config, dtype=dtype), hf_io.load_params(directory, config, dtype=dtype)
        options = dict(seed=0, stop_tokens=[], sampling=Sampling(temperature=0.0), batch_size=rows)

        def run() -> list[list[int]]:
            drawn = sample(model, params, list(ids), max_new_tokens=new_tokens, **options)
            return [one.tokens.tolist() for (one,) in drawn]
    else:
        import torch
        import transformers

        torch.set_num_threads(cores)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
        theirs.generation_config.eos_token_id = None  # nothing stops
        text = torch.from_numpy(ids).long()
        options = dict(attention_mask=torch.ones_like(text), do_sample=False, pad_token_id=0)

        def run() -> list[list[int]]:
            return theirs.generate(text, max_new_tokens=new_tokens, **options)[:, prompt:].tolist()

    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        tokens = run()
        seconds.append(time.perf_counter() - began)
    return {"first": seconds[0], "seconds": seconds[1:], "tokens": tokens}
