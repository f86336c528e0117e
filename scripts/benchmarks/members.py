"""Members of one program beside one run alone."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inputs import SHAPES
from benchmarks.measuring import GIB, PLATFORMS
from benchmarks.peers import side, write_inputs
from prefalign_jax.options import choose
from prefalign_jax.types import UserError


def members(
    *,
    shape: str = "smollm2-135m",
    members: int = 16,
    lora: int = 8,
    lengths: str = "32+16",
    pairs: int = 1,
    steps: int = 3,
    dtype: str = "float32",
    device: str = "cpu",
) -> dict[str, Any]:
    """Seconds of a DPO step of K members in one program beside those of one run alone, which comes first.

    Args:
      shape: of the model, a key of SHAPES; its weights are random.
      members: of the program, each with its own order of the pairs.
      lora: rank of adapters over one base, 0 trains all weights.
      lengths: P+R, tokens of every prompt and response.
      pairs: in a batch of a member.
      steps: of each, the first not counted.
      dtype: of the computation.
      device: cpu or gpu.

    Returns:
      Medians of the steps, and how many times as fast the members are as runs one after the other.

    Raises:
      UserError: a mistake in the options, or the process failed.
    """
    choose("--shape", shape, SHAPES)
    choose("--device", device, PLATFORMS)
    if min(members, pairs, steps - 1) < 1 or lora < 0:
        raise UserError("--members and --pairs must be positive, --steps at least 2, --lora not negative")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        model, data = write_inputs(Path(scratch), shape, dtype, lengths, pairs, steps, sys.maxsize, weights=False)
        spec = dict(model=str(model), pairs=str(data), members=members, lora=lora, size=pairs, steps=steps)
        spec |= dict(dtype=dtype, learning_rate=1e-6)
        return of_members(side(sys.executable, "members_side.py", spec, device), members)


def of_members(measured: Mapping[str, Any], count: int) -> dict[str, Any]:
    """What members_side.py measured, by the medians of all steps but the first."""
    names = ("seconds", "alone", "cpu", "alone, cpu")
    together, alone, cpu, cpu_alone = (float(np.median(measured[name][1:])) for name in names)
    return {
        "device": measured["device"],
        "members": count,
        "together, s a step": together,
        "alone, s a step": alone,
        "times as fast as one after the other": count * alone / together,
        "processor seconds a member, alone = 1": cpu / (count * cpu_alone),
        "together, peak memory, GiB": measured["peak_bytes"] / GIB,
        "alone, peak memory, GiB": measured["alone, peak_bytes"] / GIB,
    }
