"""What runs left in their directories, read back: config, metrics, and the totals that their rates add up to."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefalign_jax.early_stopping import stopping_of
from prefalign_jax.files import parse_json, read_json
from prefalign_jax.metrics import ROW, read_metrics
from prefalign_jax.options import flatten
from prefalign_jax.types import UserError

RATE = "_per_second"
COUNTS = ("flops",)  # columns that count what was done since the row before
MARK = "point.json"  # what a sweep keeps of a point, in its directory
TAIL = 2**16  # bytes at the end of a file that hold its last line


class Run(NamedTuple):
    """One run.

    Attributes:
      name: its directory, relative to what was asked for.
      path: its directory.
      config: the resolved config with dotted names, {} where an earlier version wrote none.
      train: rows of metrics.jsonl.
      held_out: rows of eval.jsonl.
      overrides: of the sweep's point that it is, {} for a run by itself.
      earlier: totals of the stages before it, of a job with several.
      datasheet: what is known of its data, {} where nothing was written.
    """

    name: str
    path: Path
    config: dict[str, Any]
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    overrides: Mapping[str, Any] = {}
    earlier: Mapping[str, float] = {}
    datasheet: Mapping[str, Any] = {}

    def spent(self) -> dict[str, np.ndarray]:
        """`totals` at each logged row, with what earlier stages spent."""
        own = totals(self.train)
        return {name: values + (self.earlier.get(name, 0.0) if name != "step" else 0.0) for name, values in own.items()}

    @property
    def finished(self) -> bool:
        """Whether its last step is the one that its config asks for, or early stopping has ended it."""
        stopping = stopping_of(self.config)
        complete = bool(self.train) and self.train[-1]["step"] >= self.config.get("steps", 0)
        return complete or (stopping is not None and stopping.ends(self.held_out))


def last_row(path: Path) -> dict[str, Any]:
    """The last whole row of a metrics file that may be growing, {} if there is none yet; reads only the file's end."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().split(b"\n")[:-1]
        return parse_json(lines[-1], ROW, where=path) if lines else {}
    except (OSError, UserError):
        return {}


def latest_stage(directory: Path) -> Path:
    """Where the run writes: the directory itself, or of a job of several stages the one that was written to last."""
    files = [*directory.glob("metrics.jsonl"), *directory.glob("*/metrics.jsonl")]
    return max(files, key=lambda file: file.stat().st_mtime_ns).parent if files else directory


def read_mark(point: Path) -> dict[str, Any]:
    """What a sweep keeps of a point: its overrides, its config with dotted names, in 'done' the 'run' or None.

    In 'together' are the names of the points that it is run with in one program, [] if it is run by itself. Of a trial
    that a search stopped early 'done' has the step of its last evaluation, as 'pruned'.
    """
    done = ("null", {"run": "a string", "pruned?": "an integer"})
    shape = {"overrides?": "an object", "config?": "an object", "done": done}
    mark = read_json(point / MARK, {**shape, "together?": ["a string"]})
    return {"overrides": {}, "config": {}, "together": [], **mark}


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a run, {} where an earlier version wrote none."""
    shape = {"steps?": "an integer or null", "batch_size?": "an integer", "loss?": {"name?": "a string"}}
    return read_json(path / "config.json", shape, missing={})


def read_run(path: Path, name: str, point: Path | None = None) -> Run:
    """Reads one run.

    Args:
      path: its directory.
      name: to show.
      point: the directory of the sweep's point whose last stage it is; None for a run by itself.

    Raises:
      UserError: a file is broken.
    """
    config = flatten(read_config(path))
    overrides, earlier = {}, {}
    if point is not None:
        overrides, config = read_mark(point)["overrides"], from_within(config, point)
        for file in point.rglob("metrics.jsonl"):
            if file.parent != path:
                for total, values in totals(read_metrics(file)).items():
                    earlier[total] = earlier.get(total, 0.0) + float(values[-1])
    rows = read_metrics(path / "metrics.jsonl"), read_metrics(path / "eval.jsonl")
    datasheet = read_json(path / "datasheet.json", {"stages?": "an object", "training?": "an object"}, missing={})
    return Run(name, path, config, *rows, overrides, earlier, datasheet)


def from_within(config: Mapping[str, Any], point: Path) -> dict[str, Any]:
    """Paths into a point's own directory, told from there: an earlier stage's model is not another for each seed."""

    def told(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        _, inside, rest = value.rpartition(f"/{point.name}/")  # wherever the sweep has been moved to
        return rest if inside and (point / rest).exists() else value

    return {name: told(value) for name, value in config.items()}


def find_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs in some directories: each a run itself, a sweep, or any directory that holds runs.

    Of a sweep's point only the run that its mark names counts: the last stage, where a job has several.

    Args:
      directories: to search.

    Returns:
      Runs in order of their names; those without a single logged step too.

    Raises:
      UserError: a directory is not there or holds no run.
    """
    runs = []
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; name the --workdir of a run or of a sweep")
        points = [mark.parent for mark in directory.rglob(MARK)]
        marks = {point: read_mark(point)["done"] for point in points}
        directories_of_runs = [point / done["run"] if done else latest_stage(point) for point, done in marks.items()]
        directories_of_runs += [
            file.parent
            for file in directory.rglob("metrics.jsonl")
            if not any(point in file.parents for point in points)
        ]
        if not directories_of_runs:
            raise UserError(f"{directory}: no run is there: no metrics.jsonl in it or below")
        for path in sorted(set(directories_of_runs)):
            place = path.relative_to(directory)
            parts = [directory.resolve().name] * (len(directories) > 1 or not place.parts) + list(place.parts)
            point = next((point for point in points if point == path or point in path.parents), None)
            runs.append(read_run(path, "/".join(parts), point))
    return runs


def settings(run: Run) -> dict[str, Any]:
    """Its config with dotted names, without steps that only follow from how many pairs an epoch has."""
    counted = run.config.get("epochs") or run.config.get("examples")
    return {name: value for name, value in run.config.items() if name != "steps" or not counted}


def differing(runs: Iterable[Run]) -> list[str]:
    """The fields of `settings` that are not the same in all runs, in the config's order; loss.name first."""
    configs = [settings(run) for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    names_that_differ = [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]
    return sorted(names_that_differ, key=lambda name: name != "loss.name")


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """What was spent up to each logged row, from the rates in the rows.

    A row's step_time and rates are means over the steps since the row before it, so its steps times them is what these
    steps took. Only after a stop may a row's means be over fewer steps than that; they then stand for all of them.

    Args:
      rows: of metrics.jsonl.

    Returns:
      {'step', 'seconds', each X of a column X_per_second, and COUNTS: [rows] float64}, of what every row has. Seconds
      are of training: compilation included, evaluation and saving left out.

    Example:
      >>> rows = [{"step": 1, "step_time": 3.0, "tokens_per_second": 5.0}]
      >>> rows += [{"step": 5, "step_time": 0.5, "tokens_per_second": 40.0}]
      >>> {name: values.tolist() for name, values in totals(rows).items()}
      {'step': [1.0, 5.0], 'seconds': [3.0, 5.0], 'tokens': [15.0, 95.0]}
    """
    if not rows:
        return {}
    steps = np.array([row["step"] for row in rows], np.float64)
    out = {"step": steps}

    def column(name: str) -> np.ndarray:
        return np.array([math.nan if row.get(name) is None else row[name] for row in rows], np.float64)

    seconds = np.diff(steps, prepend=0.0) * column("step_time")
    columns = {"seconds": seconds}
    columns |= {name.removesuffix(RATE): seconds * column(name) for name in rows[-1] if name.endswith(RATE)}
    columns |= {name: column(name) for name in COUNTS if name in rows[-1]}
    return out | {name: np.cumsum(values) for name, values in columns.items() if np.isfinite(values).all()}
