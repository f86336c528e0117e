"""Checkpoints of a run, by Orbax: save without waiting, restore onto any mesh, refuse another run's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from prefalign_jax.options import flatten
from prefalign_jax.sharding import shapes_of
from prefalign_jax.types import TrainState, UserError

# Fields that make a run what it is. The rest, such as its length or how often it logs, may change when it is resumed.
IDENTITY = (
    "loss",
    "lora",
    "model",
    "reference",
    "optimizer",
    "seed",
    "batch_size",
    "max_length",
    "too_long",
    "dtype",
    "data",
)
FREE = ("data.eval_path", "data.eval_split", "data.eval_limit", "data.cache_dir", "reference.cache_dir")


def open_checkpoints(
    directory: Path, *, keep: int = 2, best_metric: str | None = None, best_mode: str = "min"
) -> ocp.training.Checkpointer:
    """Opens a directory of checkpoints, made if missing.

    Args:
      directory: of the run.
      keep: how many of the latest stay.
      best_metric: name of an evaluation metric; the checkpoint with the best one stays as well.
      best_mode: 'min' or 'max'.

    Returns:
      Orbax's checkpointer; close it, which waits for what is being written.

    Raises:
      UserError: the directory cannot be made.
    """
    policies = ocp.training.preservation_policies
    policy: Any = policies.LatestN(keep)
    if best_metric:
        sign = 1.0 if best_mode == "max" else -1.0
        best = policies.BestN(
            get_metric_fn=lambda metrics: sign * metrics[best_metric], n=1, keep_checkpoints_without_metrics=False
        )
        policy = policies.AnyPreservationPolicy([policy, best])
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None
    return ocp.training.Checkpointer(Path(directory).absolute(), preservation_policy=policy)


def save(
    checkpoints: ocp.training.Checkpointer,
    state: TrainState,
    config: Mapping[str, Any],
    digests: Mapping[str, str],
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Starts writing a state; returns before it is on disk. A step that is there already is left alone.

    Args:
      checkpoints: from `open_checkpoints`.
      state: its reference is written only if it moves: a frozen one comes from where the run got it.
      config: plain dict, stored inside.
      digests: of what the run reads besides its config, by what it is; stored inside.
      metrics: evaluation metrics at this step.
    """
    step = int(state.step)
    if checkpoints.latest is not None and checkpoints.latest.step >= step:
        return
    tree = _tree(state, config)
    if jax.default_backend() == "cpu":
        # On the host the writer may see the very buffers that the next step's donation overwrites.
        tree = jax.tree.map(jnp.copy, tree)
    checkpoints.save_checkpointables_async(
        step,
        {"state": tree},
        force=True,
        metrics=dict(metrics) if metrics else None,
        custom_metadata={"config": dict(config), "digests": dict(digests)},
    )


def _tree(state: TrainState, config: Mapping[str, Any]) -> dict[str, Any]:
    tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    if state.running:
        tree["running"] = state.running
    if config.get("reference", {}).get("kind") == "moving":
        tree["reference"] = state.reference
    return tree


def restore(
    checkpoints: ocp.training.Checkpointer, state: TrainState, config: Mapping[str, Any], digests: Mapping[str, str]
) -> TrainState:
    """The latest saved state, or `state` itself where none is saved.

    Args:
      checkpoints: from `open_checkpoints`.
      state: freshly initialised; gives structure, types and shardings, and the reference. Where one is saved, what the
        saved one replaces is deleted, since the devices may not hold both.
      config: of this run.
      digests: of what this run reads.

    Returns:
      The state to go on from.

    Raises:
      UserError: the checkpoint is of a run with another model, loss, data or seed, or its shapes differ.
    """
    latest = checkpoints.latest
    if latest is None:
        return state
    where = f"{checkpoints.directory} (step {latest.step})"
    metadata = checkpoints.checkpointables_metadata(latest)
    stored = metadata.custom_metadata or {}
    if "config" not in stored:
        raise UserError(f"cannot resume {where}: it is no checkpoint of this program; use another --workdir")
    ours, theirs = flatten(config), flatten(stored["config"])
    for name in sorted(ours.keys() | theirs.keys(), key=lambda name: (not name.endswith("name"), name)):
        if name.split(".")[0] in IDENTITY and name not in FREE and ours.get(name) != theirs.get(name):
            raise UserError(
                f"cannot resume {where}: it was trained with {name}={theirs.get(name)!r}, not {ours.get(name)!r}; "
                "set it back or use another --workdir"
            )
    # Orbax, given other shapes, fails in many lines and leaves reads unfinished: so they are compared first.
    ours, theirs = _shapes(state.params), _shapes(metadata.metadata["state"]["params"])
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"cannot resume {where}: parameter {name} is {theirs.get(name, 'missing')} there and "
                f"{ours.get(name, 'missing')} in this model; use the same model or another --workdir"
            )
    for name, digest in digests.items():
        if stored.get("digests", {}).get(name) != digest:
            raise UserError(f"cannot resume {where}: the {name} have changed since; use another --workdir")
    fresh = _tree(state, config)
    abstract = shapes_of(fresh)
    jax.tree.map(lambda x: x.delete(), fresh)
    try:
        tree = checkpoints.load_checkpointables(latest, {"state": abstract})["state"]
    except Exception as error:  # Orbax raises many kinds, each over many lines
        raise UserError(
            f"cannot resume {where}: its arrays cannot be read; use an earlier copy or another --workdir"
        ) from error
    return state._replace(**tree)


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}
