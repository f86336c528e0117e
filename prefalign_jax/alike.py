"""What all processes of a run must have alike before its first step: options, code, data, weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import jax
from ml_collections import ConfigDict

from prefalign_jax.data.pairs import digest_of
from prefalign_jax.experiment import Experiment
from prefalign_jax.load_data import Data
from prefalign_jax.models.hf_io import fingerprint, resolve
from prefalign_jax.options import flatten
from prefalign_jax.processes import check_alike

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers")
# Fields of a config that name a model.
MODELS = ("model.path", "reference.path", "samples.reference", "token_weights.positive", "token_weights.negative")


def check_config(config: ConfigDict) -> None:
    """Stops all processes unless their configs and their code are the same; nothing may be computed together before.

    Args:
      config: of this process.

    Raises:
      UserError: naming the first field that differs, in all processes.
    """
    if jax.process_count() == 1:
        return
    fields = {name: repr(value) for name, value in flatten(config.to_dict()).items()}
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    check_alike({**fields, "the code of prefalign_jax": _code(), **versions})


def check_inputs(experiment: Experiment, data: Data) -> None:
    """Stops all processes unless they have read the same pairs and are about to read the same models.

    Raises:
      UserError: naming what differs, in all processes.
    """
    if jax.process_count() == 1:
        return
    fields = flatten(experiment.plain)
    inputs = {"the training pairs": digest_of(data.training), "the held-out pairs": digest_of(data.held_out)}
    inputs |= {f"the files of {name}": fingerprint(resolve(fields[name])) for name in MODELS if fields.get(name)}
    if fields.get("lora.path"):
        inputs["the files of lora.path"] = fingerprint(fields["lora.path"])
    check_alike(inputs)


def check_state(digests: Mapping[str, str], total: int, start: int) -> None:
    """Stops all processes unless they have computed the same digests and are about to do the same steps.

    Args:
      digests: of what was read and is on the devices, by name.
      total: steps of the run.
      start: the step to go on from.

    Raises:
      UserError: naming what differs, in all processes.
    """
    check_alike({**digests, "the length of the run": total, "the step to go on from": start})


def _code() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
