"""Which points of a sweep are members of one program, and how many of them memory has room for."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from prefalign_jax.analysis.runs import MARK, read_mark
from prefalign_jax.members import shared_fields
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.hf_io import load_config, resolve
from prefalign_jax.processes import note
from prefalign_jax.types import UserError

MOST = 16  # members of a program that is formed by memory: more gain little
SHARE = 0.5  # of the memory, that members are to fit in


class Point(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its directory.
      overrides: as the experiment's sweep() gave them.
      arguments: of the training script, all but --workdir.
      config: resolved, with dotted names.
    """

    name: str
    overrides: dict[str, Any]
    arguments: list[str]
    config: dict[str, Any]


def programs_of(
    points: Sequence[Point], workdir: Path, together: int | None, jobs: int = 1, devices: int = 0
) -> list[list[Point]]:
    """The points by programs, in the order of their first ones.

    A point that was begun goes on as it began: by itself, or with those that it began with. Others are members of one
    program if their configs differ in numbers alone (`members.shared_fields`).

    Args:
      points: that are not done.
      workdir: of the sweep.
      together: members of a program at most; None is as many as memory has room for, 1 is one a program.
      jobs: programs at a time, that share the memory.
      devices: over which the programs are dealt, one on each; the largest are halved until every device has one. 0 is
        for programs that share what there is.
    """
    if together is not None and together < 1:
        raise UserError(f"--together={together} must be auto, off, or at least 1")
    families: dict[str, list[Point]] = {}
    for point in points:
        key = f"alone {point.name}"
        if together != 1:
            mark = workdir / point.name / MARK
            if mark.exists():
                begun = read_mark(workdir / point.name)["together"]
                key = f"begun {begun}" if begun else key
            elif (shared := shared_fields(point.config)) is not None:
                key = json.dumps(shared, sort_keys=True)
        families.setdefault(key, []).append(point)
    programs = []
    for key, family in families.items():
        most = len(family)
        if len(family) > 1 and not key.startswith("begun"):
            own = math.inf if together else memory() / (1 if devices else jobs)
            most = min(together or MOST, room_for(family[0].config, own))
        count = -(-len(family) // max(1, most))
        programs += [family[len(family) * i // count : len(family) * (i + 1) // count] for i in range(count)]
    while len(programs) < devices:
        largest = max((some for some in programs if not _begun(some, workdir)), key=len, default=[])
        if len(largest) < 2:
            break
        half, at = len(largest) // 2, programs.index(largest)
        programs[at : at + 1] = [largest[:half], largest[half:]]
    if any(len(some) > 1 for some in programs):
        note(f"{len(points)} points in {len(programs)} programs, of {', '.join(str(len(some)) for some in programs)}")
    return programs


def _begun(points: Sequence[Point], workdir: Path) -> bool:
    """Whether these have begun as members of one program, which they then remain."""
    return any((workdir / point.name / MARK).exists() for point in points)


def room_for(config: Mapping[str, Any], memory: float) -> int:
    """How many members fit into a share of the memory, by what each holds of its own; 1 for a mixture of experts.

    That is its parameters, gradients and moments, and what the backward pass reads of the layers. An estimate: what XLA
    holds besides is not known before it compiles.

    Args:
      config: of one of them, with dotted names.
      memory: bytes of the device.
    """
    try:
        shape = load_config(resolve(config["model.path"]))
    except UserError:  # which the run itself will say
        return 1
    if shape.num_experts:  # no batching rule for products of ragged groups
        return 1
    model = make_decoder(shape)
    leaves = jax.tree.leaves(jax.eval_shape(lambda: model.init(jax.random.key(0))))
    weights = sum(leaf.size for leaf in leaves)
    if rank := config.get("lora.rank"):
        wide = shape.hidden_size + shape.intermediate_size
        weights = 7 * shape.num_layers * rank * wide
    elif config.get("lora.path"):
        weights //= 50
    tokens = 2 * config["batch_size"] // config["micro_steps"] * (config["max_length"] or 1024)
    kept = tokens * shape.num_layers * (12 * shape.hidden_size + 4 * shape.intermediate_size)
    logits = 4 * tokens * min(shape.vocab_size, config["vocabulary_chunk"])
    own = 4 * (4 * weights + kept + logits)
    return max(1, int(min(sys.maxsize, SHARE * memory / own)))


def memory() -> float:
    """Bytes of memory of the smallest NVIDIA device if there is one, else of the host; JAX would take it to ask."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return min(map(float, said)) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
