"""Checkpoints of a run, by Orbax: save without waiting, find damage, restore onto any mesh, refuse another run's."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from prefalign_jax.exits import lost_peer
from prefalign_jax.files import (
    checksum,
    intact,
    read_json,
    read_json_lines,
    remove_directory,
    sealed,
    write_json,
    write_text,
    writing,
)
from prefalign_jax.options import flatten
from prefalign_jax.processes import agreed, by_first, gathered, is_first, note, told_by_first
from prefalign_jax.quiet import hush_failed_writes
from prefalign_jax.sharding import shapes_of
from prefalign_jax.types import TrainState, UserError, WriteError, one_line

# Fields that make a run what it is: another value would give finished steps or the order of the data another meaning.
IDENTITY = (
    "loss",
    "lora",
    "model",
    "reference",
    "optimizer",
    "ema",
    "seed",
    "batch_size",
    "max_length",
    "too_long",
    "dtype",
    "matmul_precision",
    "data",
    "token_weights",
)
FREE = ("data.eval_path", "data.eval_split", "data.eval_limit", "data.cache_dir", "reference.cache_dir")
FREE += ("token_weights.cache_dir", "ema.evaluate")
# Fields that may change when a run is resumed and change what comes: each change is said and kept in the history.
TOLD = ("steps", "examples", "epochs", "learning_rate", "schedule", "warmup_steps", "warmup_examples", "warmup_epochs")
TOLD += (
    "warmup_ratio",
    "schedule_options",
    "ema.evaluate",
    "grad_clip",
    "micro_steps",
    "mesh",
    "vocabulary_chunk",
    "accuracy_ties",
    "samples",
)
TOLD += ("data.eval_path", "data.eval_split", "data.eval_limit", "eval_steps")
TOLD += ("early_stopping", "checkpoint.best_metric", "checkpoint.best_mode")
HELD_OUT = "held-out pairs"  # the name of their digest; they are told of too where they change under the same path
# Of these, what changes the numbers of an evaluation, by how the names of its metrics begin.
MEASURES = {
    "eval/": (HELD_OUT, "data.eval_path", "data.eval_split", "data.eval_limit", "accuracy_ties", "ema.evaluate"),
    "samples/": ("samples", "ema.evaluate"),
}
# Of these, what matters to steps that are still to come alone.
AHEAD = ("learning_rate", "schedule", "warmup_steps", "warmup_examples", "warmup_epochs", "warmup_ratio")
AHEAD += ("schedule_options", "grad_clip")
HISTORY = "history.jsonl"  # in the workdir: where a run was resumed with other values
_CHANGE = {"step": "an integer", "changed": {"*": ["anything"]}}  # a row of it

MANIFEST = "manifest.json"  # in each checkpoint: its files with their checksums, and its evaluation metrics
MEASURED = f"{MANIFEST}.measured"  # the metrics of one that was saved before its step was evaluated


class Checkpoints:
    """A directory of checkpoints, each in a directory named after its step; see `open_checkpoints`."""

    def __init__(self, directory: Path, keep: int, best_metric: str | None, best_mode: str):
        self.directory, self.keep, self.best_metric, self.best_mode = directory, keep, best_metric, best_mode
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.saving: Future[None] | None = None
        self.latest = max(self.steps(), default=-1)  # saved or being saved, the same in all processes
        self.resumed: Mapping[str, Any] = {}  # the config that a restored checkpoint was saved with
        self.resumed_digests: Mapping[str, str] = {}  # and the digests of what that run read

    def steps(self) -> list[int]:
        """What is on disk, in order."""
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def remove_after(self, step: int) -> None:
        """Removes what is saved of later steps."""
        for later in self.steps():
            if later > step:
                aside = (
                    self.directory / f".{later}.unfinished"
                )  # which nobody takes for a checkpoint if this is cut off
                (self.directory / str(later)).rename(aside)
                shutil.rmtree(aside)
        self.latest = max(self.steps(), default=-1)

    def metrics(self, step: int) -> dict[str, float]:
        """Of the evaluation at a step, {} if there was none or nobody can tell."""
        files = (self.directory / str(step) / name for name in (MEASURED, MANIFEST))
        known = (read_json(file, {"metrics": {"*": "a number"}})["metrics"] for file in files if intact(file))
        return next(known, {})

    def measured(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keeps the metrics of a step that was saved before it was evaluated, as one at which a run was stopped is."""

        def write() -> None:
            directory = self.directory / str(step)
            if intact(directory / MANIFEST) and not self.metrics(step):
                with sealed(directory / MEASURED) as file:
                    write_json(file, {"metrics": dict(metrics)})

        self.wait()
        by_first(write)

    def best(self) -> int | None:
        """The step that is best by `best_metric`, the first of several; None if none was evaluated."""
        values = {step: self.metrics(step).get(self.best_metric) for step in self.steps()}
        measured = {step: value for step, value in values.items() if value is not None}
        choose = max if self.best_mode == "max" else min
        return choose(measured, key=measured.__getitem__, default=None)

    def save(self, step: int, tree: Any, about: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Starts writing a checkpoint, after the one before it is written."""
        self.wait()
        self.latest, part = step, self.directory / f".{step}.unfinished"
        with self.told(step):
            written = ocp.save_checkpointables_async(part, {"state": tree}, custom_metadata=about, overwrite=True)
        self.saving = self.pool.submit(self.finish, step, part, written, dict(metrics))

    def finish(self, step: int, part: Path, written: ocp.AsyncResponse[None], metrics: dict[str, float]) -> None:
        """Waits until the arrays are on disk, adds the manifest, puts the checkpoint in its place, drops older ones."""
        with self.told(step), contextlib.ExitStack() as stack:
            if is_first():
                stack.callback(shutil.rmtree, part, ignore_errors=True)
            written.result()
            if is_first():
                about = {"metrics": metrics, "files": _checksums(part, _files(part))}
                with sealed(part / MANIFEST) as manifest:
                    write_json(manifest, about)
                part.rename(self.directory / str(step))
                kept = {*self.steps()[-self.keep :], self.best() if self.best_metric else None}
                for old in set(self.steps()) - kept:
                    shutil.rmtree(self.directory / str(old))

    @contextlib.contextmanager
    def told(self, step: int) -> Iterator[None]:
        """Whatever Orbax raises, of many kinds and over many lines, in one line."""
        try:
            with writing(f"checkpoint {self.directory / str(step)}"):
                yield
        except UserError:
            raise
        except Exception as error:
            if lost_peer(error):
                raise
            raise WriteError(f"checkpoint {self.directory / str(step)} cannot be written: {one_line(error)}") from error

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          WriteError: it could not be written.
        """
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.result()

    def close(self) -> None:
        """Waits until what was saved is on disk, and says if it could not be written."""
        try:
            self.wait()
        except Exception as error:  # on the way out after another failure, which is the one to tell
            note(one_line(error))
        self.pool.shutdown()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.wait()
        self.close()


def open_checkpoints(
    directory: Path, *, keep: int = 2, best_metric: str | None = None, best_mode: str = "min"
) -> Checkpoints:
    """Opens a directory of checkpoints, made if missing; what a killed run left unfinished there is removed.

    Args:
      directory: of the run.
      keep: how many of the latest stay.
      best_metric: name of an evaluation metric; the checkpoint with the best one stays as well.
      best_mode: 'min' or 'max'.

    Returns:
      The checkpoints; close them, which waits for what is being written.

    Raises:
      WriteError: the directory cannot be made.
    """
    directory = Path(directory).absolute()

    def prepare() -> None:
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            for path in directory.iterdir():
                if path.name.endswith(".unfinished") or ".orbax-checkpoint-tmp" in path.name:
                    remove_directory(path)

    by_first(prepare)
    hush_failed_writes()
    return Checkpoints(directory, keep, best_metric, best_mode)


def save(
    checkpoints: Checkpoints,
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

    Raises:
      WriteError: this checkpoint, or the one before it, cannot be written.
    """
    step = int(state.step)
    if checkpoints.latest >= step:
        return
    tree = _tree(state, config)
    if jax.default_backend() == "cpu":
        # On the host the writer may see the very buffers that the next step's donation overwrites.
        tree = jax.tree.map(jnp.copy, tree)
    checkpoints.save(step, tree, {"config": dict(config), "digests": dict(digests)}, metrics or {})


def _files(directory: Path) -> list[str]:
    """Names of the files of a checkpoint that its manifest lists."""
    files = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in files if not name.startswith(MANIFEST))


def _checksums(directory: Path, names: Sequence[str]) -> dict[str, str]:
    return {name: checksum(directory / name) for name in names}


def _damage(directory: Path) -> str:
    """What is wrong with a checkpoint, '' if nothing: several processes read a part of its files each, and all know."""
    try:
        names, manifest = _files(directory), directory / MANIFEST
        if any(directory.glob(f"{MANIFEST}*")):
            if not intact(manifest):
                raise ValueError(f"{MANIFEST} is not what was written")
            wanted = read_json(manifest, {"metrics": "an object", "files": {"*": "a string"}})["files"]
            share = names[jax.process_index() :: jax.process_count()]
            sums = _checksums(directory, share)
            bad = {name for name in share if sums[name] != wanted.get(name)} | (wanted.keys() - set(names))
            damage = f"{min(bad)} is not what was written" if bad else ""
        else:  # of a version that wrote no manifest
            read_json(directory / "_CHECKPOINT_METADATA", "an object")
            ocp.checkpointables_metadata(directory)
            damage = ""
    except Exception as error:  # what cannot be read fails in whatever way
        damage = one_line(error)
    return next(filter(None, gathered(damage)), "")


def _tree(state: TrainState, config: Mapping[str, Any]) -> dict[str, Any]:
    tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    if state.running:
        tree["running"] = state.running
    if state.ema is not None:
        tree["ema"] = state.ema
    if config.get("reference", {}).get("kind") == "moving":
        tree["reference"] = state.reference
    return tree


def newest(checkpoints: Checkpoints) -> int | None:
    """The latest step whose checkpoint is to the bit what was written; damaged ones after it are set aside.

    Args:
      checkpoints: from `open_checkpoints`.

    Returns:
      The step, None where there is none.
    """
    for step in reversed(agreed(checkpoints.steps())):
        path = checkpoints.directory / str(step)
        if not (damage := _damage(path)):
            if not agreed(any(path.glob(f"{MANIFEST}*"))):
                note(f"the checkpoint of step {step} has no checksums, as an earlier version wrote it; it is believed")
            return step
        aside = path.with_name(f"{step}.damaged-{secrets.token_hex(4)}")
        note(f"the checkpoint of step {step} is damaged ({damage}); set aside as {aside}")

        def move(path: Path = path, aside: Path = aside) -> None:
            with writing(aside):
                path.rename(aside)

        by_first(move)
        checkpoints.latest = -1
    return None


def restore(
    checkpoints: Checkpoints, state: TrainState, config: Mapping[str, Any], digests: Mapping[str, str]
) -> TrainState:
    """The latest undamaged state, or `state` itself where none is saved.

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
    step = newest(checkpoints)
    checkpoints.latest = -1 if step is None else step
    if step is None:
        return state
    path = checkpoints.directory / str(step)
    where = f"{checkpoints.directory} (step {step})"
    metadata = ocp.checkpointables_metadata(path)
    stored = metadata.custom_metadata or {}
    if "config" not in stored:
        raise UserError(f"cannot resume {where}: it is no checkpoint of this program; use another --workdir")
    checkpoints.resumed = stored["config"]
    ours, theirs = flatten(config), flatten(stored["config"])
    for name in sorted(ours.keys() | theirs.keys(), key=lambda name: (not name.endswith("name"), name)):
        if name.split(".")[0] in IDENTITY and name not in FREE and ours.get(name) != theirs.get(name):
            raise UserError(
                f"cannot resume {where}: it was trained with {name}={theirs.get(name)!r}, not {ours.get(name)!r}; "
                "set it back or use another --workdir"
            )
    # Orbax, given other shapes, fails in many lines and leaves reads unfinished: so they are compared first.
    _check_shapes(f"cannot resume {where}", state.params, metadata.metadata["state"]["params"])
    checkpoints.resumed_digests = stored.get("digests", {})
    for name, digest in digests.items():
        if name != HELD_OUT and checkpoints.resumed_digests.get(name) != digest:
            raise UserError(f"cannot resume {where}: the {name} have changed since; use another --workdir")
    fresh = _tree(state, config)
    abstract = shapes_of(fresh)
    jax.tree.map(lambda x: x.delete(), fresh)
    try:
        tree = ocp.load_checkpointables(path, {"state": abstract})["state"]
    except Exception as error:  # Orbax raises many kinds, each over many lines
        raise UserError(
            f"cannot resume {where}: its arrays cannot be read; use an earlier copy or another --workdir"
        ) from error
    return state._replace(**tree)


def chosen(checkpoints: Checkpoints, which: str) -> int:
    """The step of a kept checkpoint.

    Args:
      checkpoints: from `open_checkpoints`.
      which: 'last', 'best' by the metric that they were opened with, or the number of a step.

    Raises:
      UserError: there is none, or it is damaged.
    """
    kept = checkpoints.steps()
    where = f"{checkpoints.directory} has {', '.join(map(str, kept)) or 'no checkpoint'}"
    if which == "best":
        step = checkpoints.best() if checkpoints.best_metric else None
        if step is None:
            raise UserError(f"no checkpoint is known to be the best: set checkpoint.best_metric for that; {where}")
    else:
        step = kept[-1] if which == "last" and kept else int(which) if which.isdecimal() else None
    if step not in kept:
        raise UserError(f"there is no checkpoint {which!r}; {where}")
    if damage := _damage(checkpoints.directory / str(step)):
        raise UserError(f"the checkpoint of step {step} is damaged ({damage}); {where}")
    return step


def as_saved(checkpoints: Checkpoints, step: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config with the fields of TOLD as they were when a checkpoint was saved; it may have gone on with others.

    Args:
      checkpoints: from `open_checkpoints`.
      step: from `chosen`.
      config: of the run, as in its config.json; it stays as it is.
    """
    stored = ocp.checkpointables_metadata(checkpoints.directory / str(step)).custom_metadata or {}
    known = stored.get("config", {})
    unknown = ("examples", "epochs", *(("steps",) if known.get("steps") is None else ()))  # not as a number of steps
    out = copy.deepcopy(dict(config))
    for name in TOLD:
        group, _, field = name.rpartition(".")
        theirs, ours = (one.get(group, {}) if group else one for one in (known, out))
        if field in theirs and name not in unknown:
            ours[field] = theirs[field]
    return out


def better_one(checkpoints: Checkpoints, step: int, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """A sentence where another evaluation was better than that of the best checkpoint, '' where none was.

    Nothing is saved at step 0, and a run that is resumed may have removed what is best by another metric.

    Args:
      checkpoints: opened with the metric.
      step: of the best checkpoint.
      evaluations: rows of eval.jsonl.
    """
    name, sign = checkpoints.best_metric, 1 if checkpoints.best_mode == "max" else -1
    value = checkpoints.metrics(step)[name]
    row = max((row for row in evaluations if row.get(name) is not None), key=lambda row: sign * row[name], default={})
    if not row or sign * row[name] <= sign * value:
        return ""
    when = f"at step {row['step']}" if row["step"] else "before the first step"
    return f"{name} was best {when}, {row[name]:.4g}, and nothing is saved of that; step {step} has {value:.4g}"


def load_parts(checkpoints: Checkpoints, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
    """Some parts of a checkpoint's state alone.

    Args:
      checkpoints: from `open_checkpoints`.
      step: from `chosen`.
      like: {field of TrainState: arrays or shapes with the structure and shardings of what was saved}.

    Returns:
      {field: what was saved}.

    Raises:
      UserError: they have other shapes, or cannot be read.
    """
    path = checkpoints.directory / str(step)
    saved = ocp.checkpointables_metadata(path).metadata["state"]
    for name in like.keys() & {"params", "ema"}:
        _check_shapes(f"cannot read {path}", like[name], saved[name])
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            return ocp.load_checkpointables(path, {"state": shapes_of(dict(like))})["state"]
    except Exception as error:  # Orbax raises many kinds, each over many lines
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def changes(
    checkpoints: Checkpoints, config: Mapping[str, Any], digests: Mapping[str, str]
) -> dict[str, tuple[Any, Any]]:
    """What a resumed run does in another way than before: {field: (before, now)}, {} for a run that is new.

    Held-out pairs that have changed where no field says so are there by the first digits of their digests.
    """
    if not checkpoints.resumed:
        return {}
    before, now = flatten(checkpoints.resumed), flatten(config)
    names = [name for name in now if not {name, name.split(".")[0]}.isdisjoint(TOLD) and name in before]
    changed = {name: (before[name], now[name]) for name in names if before[name] != now[name]}
    pairs = [some[HELD_OUT][:8] for some in (checkpoints.resumed_digests, digests) if HELD_OUT in some]
    if len(set(pairs)) == 2 and not any(name.startswith("data.eval_") for name in changed):
        changed[HELD_OUT] = pairs[0], pairs[1]
    return changed


def record_changes(workdir: Path, step: int, changed: Mapping[str, tuple[Any, Any]]) -> list[dict[str, Any]]:
    """Keeps in the workdir at which step a run went on with other values.

    Args:
      workdir: of the run.
      step: that it is resumed at, 0 for a new run.
      changed: from `changes`.

    Returns:
      All that is kept, a row {'step': ..., 'changed': {field: [before, now]}} for each time.
    """
    path = Path(workdir) / HISTORY
    rows = read_changes(workdir, step)
    rows += [{"step": step, "changed": {name: list(pair) for name, pair in changed.items()}}] if changed else []
    if is_first() and (rows or path.exists()):
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def read_changes(workdir: Path, step: int) -> list[dict[str, Any]]:
    """What `record_changes` has kept of the steps before this one, as the first process reads it: it alone writes.

    Raises:
      UserError: the file has another form.
    """
    path = Path(workdir) / HISTORY
    rows = told_by_first(lambda: read_json_lines(path, _CHANGE))
    for number, row in enumerate(rows, 1):
        for name, values in row["changed"].items():
            if len(values) != 2:
                raise UserError(f"{path}, row {number}, field 'changed', field {name!r}: expected two values")
    return [row for row in rows if row["step"] < step]


class Timer:
    """When a run without save_steps saves: soon after its start, then after twice as long, at most 10 minutes apart.

    Args:
      every: save_steps; if it is set, time saves nothing.
    """

    FIRST, MOST = 10.0, 600.0  # seconds

    def __init__(self, every: int | None):
        self.wait = math.inf if every else self.FIRST
        self.since = time.monotonic()

    def due(self, asked: bool) -> bool:
        """Whether it is time, the same in all processes.

        Args:
          asked: whether several processes are to agree on it at this step, which costs them a message.
        """
        if self.wait == math.inf or (jax.process_count() > 1 and not asked):
            return False
        return agreed(time.monotonic() - self.since >= self.wait)

    def saved(self) -> None:
        """Counts from now on."""
        self.wait, self.since = min(2 * self.wait, max(self.MOST, self.wait)), time.monotonic()


def _check_shapes(what: str, ours: Any, theirs: Any) -> None:
    ours, theirs = _shapes(ours), _shapes(theirs)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{what}: parameter {name} is {theirs.get(name, 'missing')} there and "
                f"{ours.get(name, 'missing')} in this model; use the same model or another --workdir"
            )


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}
