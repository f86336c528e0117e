"""Reading a checkpoint: seconds and memory."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.inputs import llama_tensors, shape_of, write_checkpoint
from benchmarks.measuring import GIB, measured, resident
from prefalign_jax.models import hf_io
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.quantize import quantize_params
from prefalign_jax.options import choose
from prefalign_jax.sharding import make_mesh, param_shardings
from prefalign_jax.types import UserError


def import_(
    *, params: float = 1e9, dtype: str = "stored", quantize: str = "none", devices: int = 1, keep: str = ""
) -> dict[str, Any]:
    """A bfloat16 checkpoint in several files -> parameters on their devices, by hf_io.load_params in a fresh process.

    Args:
      params: about how many parameters the model has.
      dtype: of the parameters: stored, float32 or bfloat16.
      quantize: none, int8 or nf4.
      devices: along the mesh's axis fsdp; on a CPU that many are simulated.
      keep: directory to make the checkpoint in, or where an earlier run made it; none is a temporary one.

    Returns:
      What was measured. Anonymous memory is what the process allocated; where the device's memory is the host's, the
      parameters are taken off its peak. File-backed memory is mapped from the files, and free for others to take.
    """
    choose("--dtype", dtype, dict.fromkeys(("stored", "float32", "bfloat16")))
    choose("--quantize", quantize, dict.fromkeys(("none", "int8", "nf4")))
    if params <= 0 or devices < 1:
        raise UserError(f"--params={params:g} and --devices={devices} must be positive")
    with contextlib.ExitStack() as stack:
        directory = Path(keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="checkpoint-")))
        config = shape_of(params)
        tensors = dict(llama_tensors(config))
        write_checkpoint(directory, config, tensors)
        figures, anonymous, mapped = measured(
            "checkpoints.load", directory=str(directory), dtype=dtype, quantize=quantize, devices=devices
        )
    sizes = [2 * int(np.prod(shape)) for shape in tensors.values()]
    beyond = anonymous - (figures["parameter bytes"] if figures["device"] == "cpu" else 0)
    return {
        "device": figures["device"],
        "parameters, millions": sum(sizes) / 2e6,
        "seconds": figures["seconds"],
        "GiB/s of files": sum(sizes) / GIB / figures["seconds"],
        "parameters, GiB": figures["parameter bytes"] / GIB,
        "largest tensor, GiB": max(sizes) / GIB,
        "peak anonymous memory beyond the parameters, GiB": beyond / GIB,
        "anonymous memory before, GiB": figures["anonymous before"] / GIB,
        "peak file-backed memory, GiB": mapped / GIB,
        "beyond <= largest tensor + 1 GiB": beyond <= max(sizes) + GIB,
    }


def load(directory: str, dtype: str, quantize: str, devices: int) -> dict[str, Any]:
    """Loads the parameters; compilation is part of the time."""
    config, kind = hf_io.load_config(directory), None if quantize == "none" else quantize

    def init(key: jax.Array) -> Any:
        params = make_decoder(config).init(key)
        return quantize_params(params, kind) if kind else params

    shardings = param_shardings(make_mesh({"fsdp": devices}), jax.eval_shape(init, jax.random.key(0)))
    before, _ = resident(os.getpid())
    began = time.monotonic()
    params = hf_io.load_params(directory, config, dtype=dtype, quantize=kind, shardings=shardings)
    jax.block_until_ready(params)
    return {
        "seconds": time.monotonic() - began,
        "device": jax.default_backend(),
        "parameter bytes": sum(s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards),
        "anonymous before": before,
    }
