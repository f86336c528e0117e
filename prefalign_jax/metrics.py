"""What a run says of itself: weighted means, JSONL and TensorBoard files, memory in use."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp

from prefalign_jax.files import parse_json, read_json_lines, write_text, writing
from prefalign_jax.processes import is_first
from prefalign_jax.torch_free import without_torch
from prefalign_jax.trackers import Trackers
from prefalign_jax.types import UserError

GIB = 2**30
# What is better of a metric, by its name: the least or the most. Of other metrics it depends on what is wanted.
_LESS_IS_BETTER = re.compile(r"(^|/)(\w+_)?loss(/|$)")
_MORE_IS_BETTER = re.compile(r"/(accuracies|margins)(_low|_high)?$|^samples/reward(_low|_high)?$")
ROW = {"step": "an integer", "*": "a number or null"}  # of a metrics file


def weighted_sum(values: jax.Array, weight: jax.Array) -> jax.Array:
    """sum_i w_i x_i over the pairs of positive weight; with weights that sum to 1, their mean.

    Args:
      values: [B]; what has weight 0 counts nothing, be it NaN, and gets no gradient.
      weight: [B], at least 0.

    Returns:
      [] the sum, 0 if no weight is positive.

    Example:
      >>> float(weighted_sum(jnp.array([1.0, 4.0, jnp.nan]), jnp.array([2.0, 1.0, 0.0])))
      6.0
    """
    return jnp.sum(jnp.where(weight > 0, values, 0.0) * weight)


def metric_sums(values: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum_i w_i x_i, sum_i w_i) over the pairs that a metric applies to: not NaN, and of positive weight.

    Their ratio is the mean; sums of several parts can be added first. It is NaN if the metric applies to no pair.

    Args:
      values: [B]; NaN where the metric says nothing of a pair.
      weight: [B], at least 0.

    Example:
      >>> total, weight = metric_sums(jnp.array([1.0, 4.0, jnp.nan]), jnp.array([2.0, 1.0, 1.0]))
      >>> float(total / weight)
      2.0
    """
    weight = jnp.where(jnp.isnan(values), 0.0, weight)
    return weighted_sum(values, weight), jnp.sum(weight)


def better(name: str) -> str | None:
    """Whether the least (min) or the most (max) of a metric is best; None where its name does not tell.

    Example:
      >>> better("eval/loss"), better("eval/rewards/accuracies"), better("samples/length")
      ('min', 'max', None)
    """
    if _LESS_IS_BETTER.search(name):
        return "min"
    return "max" if _MORE_IS_BETTER.search(name) else None


NEWS = ("loss", "grad_norm")  # metrics of all pairs: none of them can fail to apply


class Board:
    """TensorBoard's event file of one writer; each step is on disk when `write` returns.

    tensorboardX's own SummaryWriter leaves that to a thread: on a full disk the thread dies, and the run waits for it.

    Args:
      directory: of the file, made if missing.
      first: steps from here on that earlier files hold are void.

    Raises:
      ImportError: tensorboardX is not installed.
    """

    def __init__(self, directory: Path, first: int):
        with without_torch("tensorboardX"):
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.record_writer import RecordWriter

        self.directory, self.event = directory, Event
        name = f"events.out.tfevents.{time.time():.0f}.{secrets.token_hex(4)}"  # which no earlier file has
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self.file = RecordWriter(str(directory / name))
            for about in ({"file_version": "brain.Event:2"}, {"session_log": SessionLog(status=SessionLog.START)}):
                self.put(step=first, **about)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Appends a point for each number; one that is not finite, as of a metric that says nothing here, is left out.

        Raises:
          WriteError: they cannot be written.
        """
        from tensorboardX.summary import scalar

        with writing(self.directory):
            for name, value in numbers.items():
                if math.isfinite(value):
                    self.put(step=step, summary=scalar(name, value))
            self.file.flush()

    def put(self, **fields: Any) -> None:
        """Adds an event to what `flush` writes."""
        self.file.write(self.event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        """Closes the file."""
        with writing(self.directory):
            self.file.close()


class Writer(NamedTuple):
    """What metrics go to: a file of a name, and what is beside it; all None on the processes that do not write."""

    jsonl: TextIO | None
    board: Board | None
    trackers: Trackers | None = None
    name: str = "metrics"

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line, `step` first. JSON has no NaN and no infinity: they are written as null.

        A mean over none of a batch's pairs is NaN, and such a metric is left out. Of a loss or a gradient NaN is news.

        Args:
          step: of the run.
          metrics: name -> number, or array of one element.

        Raises:
          WriteError: it cannot be written.
        """
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        numbers = {name: x for name, x in numbers.items() if not math.isnan(x) or name.rpartition("/")[2] in NEWS}
        if self.jsonl is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
            with writing(self.jsonl.name):
                self.jsonl.write(json.dumps({"step": int(step), **finite}, allow_nan=False) + "\n")
        if self.board is not None:
            self.board.write(int(step), numbers)
        if self.trackers is not None:
            self.trackers.write(self.name, int(step), numbers)

    def close(self) -> None:
        """Closes the files; what was written is on disk. The trackers, which have several writers, stay open."""
        if self.jsonl is not None:
            with writing(self.jsonl.name):
                self.jsonl.close()
        if self.board is not None:
            self.board.close()


def open_writer(
    workdir: str | os.PathLike,
    name: str = "metrics",
    *,
    tensorboard: bool = True,
    resume_step: int = 0,
    trackers: Trackers | None = None,
) -> Writer:
    """Opens WORKDIR/NAME.jsonl, one line a logged step, and TensorBoard's event files in WORKDIR/tensorboard/NAME.

    A resumed run writes the steps after `resume_step` again, so what an interrupted run wrote of them is removed first,
    and a last line cut short with it.

    Args:
      workdir: made if missing.
      name: of the file.
      tensorboard: write event files too, if tensorboardX is installed.
      resume_step: the last step whose lines stay; 0 starts anew.
      trackers: that get every line too.

    Returns:
      The writer. In a run of several processes only the first one's writes.
    """
    if not is_first():
        return Writer(None, None)
    path = Path(workdir) / f"{name}.jsonl"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _keep_up_to(path, resume_step)
    board = None
    if tensorboard:
        with contextlib.suppress(ImportError):
            # One directory a writer: TensorBoard shows the files of one as one run.
            board = Board(path.parent / "tensorboard" / name, resume_step + 1 if resume_step else 0)
    with writing(path):
        file = path.open("a", buffering=1, encoding="utf-8")  # by line: a killed run loses at most one
    return Writer(file, board, trackers, name)


def _keep_up_to(path: Path, last: int) -> None:
    """Removes the lines of later steps and broken ones, all of them if `last` is 0; the file is never half written."""
    if path.exists():
        write_text(path, "".join(line + "\n" for line, row in _whole_lines(path) if row["step"] <= last and last))


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, row) of a metrics file, but for the lines that are broken."""
    with writing(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(UserError):
            yield line, parse_json(line, ROW, where=path)


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file that a killed run may have left, [] if there is none."""
    return [row for _, row in _whole_lines(path)]


def device_memory() -> dict[str, float]:
    """GiB in use and at most so far on the fullest of this process's devices.

    Returns:
      memory/device_gib and memory/device_peak_gib where the backend reports them; on the CPU, which does not,
      memory/host_peak_gib, the largest resident size of the process so far; else {}.
    """
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    keys = {"memory/device_gib": "bytes_in_use", "memory/device_peak_gib": "peak_bytes_in_use"}
    out = {
        name: max(s[key] for s in stats) / GIB for name, key in keys.items() if stats and all(key in s for s in stats)
    }
    if not out and jax.default_backend() == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        out["memory/host_peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    return out


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, [] if there is none. A last line without its end is still being written: no row.

    Raises:
      UserError: another line is broken, or is no row of numbers.
    """
    return read_json_lines(path, ROW)
