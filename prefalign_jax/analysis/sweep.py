"""A sweep: many runs of one experiment, each a process or several in one; killed at any moment, it goes on."""

from __future__ import annotations

import csv
import datetime
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TextIO

from prefalign_jax import processes
from prefalign_jax.analysis.programs import Point, programs_of
from prefalign_jax.analysis.runs import MARK, last_row, latest_stage, read_config, read_mark, read_run
from prefalign_jax.cli.experiments import config_of, sweep_of
from prefalign_jax.experiment import read
from prefalign_jax.files import hold, locked, read_json, write_json, write_text, writing
from prefalign_jax.members import FAILED as MEMBER_FAILED
from prefalign_jax.options import split_values
from prefalign_jax.processes import note, stop_signal
from prefalign_jax.tables import aligned
from prefalign_jax.types import UserError

LOCK = ".point_lock"  # held by the run of a point for as long as it lives, whatever becomes of the sweep
LOG = "log.txt"
PROGRAM = "program.json"  # of several points: what each is run with
LONGEST_NAME = 80
# On a CPU a step takes large blocks from the C library and gives them back. glibc is told to keep them, in large pages:
# fetched from the system anew they cost a small model a tenth to a fifth of its time (docs/performance.md). A value
# that the environment has already wins.
_KEEP = 2**35  # bytes; smaller blocks are kept
MEMORY = {
    "GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={_KEEP}:glibc.malloc.trim_threshold={_KEEP}"
}
WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"
PRUNED = "pruned"  # a trial of a search that was stopped early


# From an experiment file to points


def read_grid(words: Sequence[str], seeds: int | None = None) -> dict[str, list[Any]]:
    """The values of each field that a command line varies.

    Args:
      words: FIELD=VALUE,VALUE each; commas in brackets separate nothing.
      seeds: N for the seeds 0 to N - 1.

    Raises:
      UserError: a word is none such, or a field is named twice.

    Example:
      >>> read_grid(["loss.beta=0.05,0.1", "loss.name=dpo,0.8*dpo + 0.2*sft"], seeds=2)
      {'loss.beta': [0.05, 0.1], 'loss.name': ['dpo', '0.8*dpo + 0.2*sft'], 'seed': [0, 1]}
    """
    grid: dict[str, list[Any]] = {}
    for word in words:
        field, equals, text = word.partition("=")
        values = [value.strip() for value in split_values(text)]
        if not (field and equals and all(values)):
            raise UserError(f"--grid={word!r}: write FIELD=VALUE,VALUE such as loss.beta=0.05,0.1")
        if field in grid:
            raise UserError(f"--grid names {field} twice; write its values after each other, with commas")
        grid[field] = [_value(value) for value in values]
    if seeds is not None:
        if seeds < 1:
            raise UserError(f"--seeds={seeds} must be at least 1")
        if "seed" in grid:
            raise UserError("--seeds and --grid seed= both name seeds; leave one of them out")
        grid["seed"] = list(range(seeds))
    return grid


def _value(text: str) -> str | bool | int | float:
    """A value as a sweep() would write it."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def read_points(
    config: str, common: Sequence[str] = (), grid: Mapping[str, Sequence[Any]] = types.MappingProxyType({})
) -> list[Point]:
    """The points of an experiment's sweep() and of a grid, each checked as its run would check it.

    Args:
      config: NAME or NAME:ARG of an experiment. A point's own 'config' is joined to ARG after a comma, so it wins.
      common: words --config.x=y for all points.
      grid: {field: values}; every point of sweep() is run with each combination of them. An experiment without sweep()
        then has one point.

    Returns:
      The points, in the order of sweep(); the last field of the grid varies fastest.

    Raises:
      UserError: no sweep(), two equal points, or a point that no run would take.
    """
    experiment = config.partition(":")[0]
    config_of(config, common)  # a mistake in the file or in `common` is no point's
    listed = sweep_of(experiment, needed=not grid)
    if not listed:
        raise UserError(f"{experiment}: sweep() gives no point; write at least one dict, which may be empty")
    for number, overrides in enumerate(listed, 1):
        check_overrides(overrides, f"{experiment}: sweep(), point {number}", common)
        if both := sorted(set(overrides) & set(grid)):
            raise UserError(f"--grid {both[0]}= varies what sweep() of {experiment} varies; leave it out")
    check_overrides({field: values[0] for field, values in grid.items()}, "--grid", common)
    listed = [{**one, **dict(zip(grid, each, strict=True))} for one in listed for each in product(*grid.values())]
    return make_points(config, common, listed)


def make_points(config: str, common: Sequence[str], listed: Sequence[Mapping[str, Any]]) -> list[Point]:
    """A point for each dict of overrides, checked as its run would check it.

    Args:
      config: NAME or NAME:ARG of an experiment.
      common: words --config.x=y for all points.
      listed: overrides of each.

    Raises:
      UserError: two equal points, or a point that no run would take.
    """
    experiment, _, argument = config.partition(":")
    points = []
    for number, (name, overrides) in enumerate(zip(names_of(listed), listed, strict=True), 1):
        joined = ",".join(filter(None, (argument, overrides.get("config"))))
        spec = f"{experiment}:{joined}" if joined else experiment
        words = [f"--config.{key}={_text(value)}" for key, value in overrides.items() if key != "config"]
        try:
            fields = read(config_of(spec, [*common, *words])).fields
        except UserError as error:
            raise UserError(f"{experiment}: the sweep's point {number} ({name}): {error}") from None
        plain = json.loads(json.dumps(fields))
        points.append(Point(name, overrides, [f"--config={spec}", *common, *words], plain))
    return points


def check_overrides(overrides: Any, where: str, common: Sequence[str]) -> None:
    """Raises UserError unless these are fields with plain values that no option sets too."""
    if not isinstance(overrides, Mapping):
        raise UserError(f"{where}: expected a dict of overrides, found {type(overrides).__name__}")
    for key, value in overrides.items():
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
            raise UserError(f"{where}: {key!r} is no field; write a dotted name such as 'loss.beta'")
        if not isinstance(value, str | bool | int | float):
            raise UserError(f"{where}: {key}={value!r}; write a string, a number or a truth value, or leave it out")
        if any(re.match(rf"--?(no)?config\.{re.escape(key)}(=|$)", word) for word in common):
            raise UserError(f"--config.{key} on the command line sets what the sweep varies; leave one of them out")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def names_of(listed: Sequence[Mapping[str, Any]]) -> list[str]:
    """Short, readable, distinct names for directories; each depends on its own point unless two would be alike.

    Args:
      listed: overrides of each point.

    Raises:
      UserError: two points are the same.

    Example:
      >>> names_of([{"loss.name": "dpo", "loss.beta": 0.1, "seed": 0}, {"config": "loss=orpo", "data.limit": 9}, {}])
      ['dpo-beta=0.1-seed=0', 'loss=orpo-limit=9', 'default']
    """
    names, digests = [], []
    for overrides in listed:
        keys = [key.removesuffix(".name").split(".")[-1] for key in overrides]
        words = []
        for key, short in zip(overrides, keys, strict=True):
            label = "" if key in ("loss.name", "config") else f"{short if keys.count(short) == 1 else key}="
            words.append(label + _text(overrides[key]))
        text = "-".join(words) or "default"
        name = re.sub(r"[^A-Za-z0-9.+=_-]+", "_", text).lstrip(".-_") or "point"
        digest = hashlib.sha256(json.dumps(dict(overrides), sort_keys=True).encode()).hexdigest()[:8]
        if name != text or len(name) > LONGEST_NAME:
            name = f"{name[: LONGEST_NAME - 9]}-{digest}"
        names.append(name)
        digests.append(digest)
    if repeated := [number for number, digest in enumerate(digests, 1) if digest in digests[: number - 1]]:
        first = digests.index(digests[repeated[0] - 1]) + 1
        raise UserError(f"sweep(): points {first} and {repeated[0]} are the same; leave one out")
    count = Counter(name.casefold() for name in names)
    return [f"{name}-{d}" if count[name.casefold()] > 1 else name for name, d in zip(names, digests, strict=True)]


# Running them


class State:
    """A point's state while the sweep lives."""

    def __init__(self, point: Point, directory: Path):
        self.point, self.directory = point, directory
        self.state, self.error = WAITING, ""


class Job:
    """What one process runs: a point, or several that are members of one program.

    Args:
      members: the points.
      command: what runs them.
    """

    def __init__(self, members: Sequence[State], command: Sequence[str]):
        self.members, self.command = members, command
        self.log = members[0].directory / LOG
        self.process: subprocess.Popen | None = None
        self.device: str | None = None
        self.log_start = 0

    @property
    def together(self) -> list[str]:
        """The names of points that are run in one program; [] for a point by itself."""
        return [one.point.name for one in self.members] if len(self.members) > 1 else []

    @property
    def state(self) -> str:
        """Of the process: WAITING, RUNNING, or that of a point which has ended."""
        states = [one.state for one in self.members]
        return next((state for state in (RUNNING, WAITING) if state in states), states[0])

    def settle(self, state: str, error: str = "") -> None:
        """Sets the state of all its points."""
        for one in self.members:
            one.state, one.error = state, error

    def start(self, device: str | None = None) -> None:
        """Starts the run, unless one that a killed sweep left behind holds a point: `poll` then tries again.

        Args:
          device: number of the only accelerator that it sees, for as long as it runs; None lets it see all.
        """
        self.settle(RUNNING)
        self.device = device
        locks: list[int] = []
        try:
            for one in self.members:
                with writing(one.directory):
                    one.directory.mkdir(parents=True, exist_ok=True)
                lock = hold(one.directory / LOCK)
                if lock is None:
                    return
                locks.append(lock)
            for one in self.members:
                write_json(one.directory / MARK, _mark(one.point, None, self.together))
            with writing(self.log), self.log.open("ab") as log:
                self.log_start = log.tell()
                self.process = subprocess.Popen(
                    [*self.command, *self.arguments()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=locks,  # the run inherits the locks, so they are let go of when the run ends
                    start_new_session=True,  # Ctrl-C reaches the sweep alone, which tells the runs once
                    env={**MEMORY, **os.environ, **seeing(self.device)},
                )
        finally:
            for lock in locks:
                os.close(lock)

    def arguments(self) -> list[str]:
        """What follows the command: of one point its arguments, of several a file that has those of all."""
        first, *others = self.members
        if not others:
            return [*first.point.arguments, f"--workdir={first.directory}"]
        runs = [{"arguments": one.point.arguments, "workdir": str(one.directory)} for one in self.members]
        write_json(first.directory / PROGRAM, runs)
        for one in others:
            write_text(one.directory / LOG, f"a member of one program; what that says is in {self.log}\n")
        return [f"--runs={first.directory / PROGRAM}"]

    def poll(self, stopping: bool) -> None:
        """Looks whether the run has ended, and how."""
        if self.process is None:
            if stopping:
                self.settle(STOPPED)
            else:
                self.start(self.device)
            return
        status = self.process.poll()
        if status is None:
            return
        if status == 0:
            for one in self.members:
                self.end(one)
        elif status in (processes.STOPPED, -signal.SIGTERM) and stopping:
            self.settle(STOPPED)
        else:
            self.settle(FAILED, self.last_error(status))

    def stop(self) -> None:
        """Tells its process to stop, if it runs."""
        if self.process and self.process.poll() is None:
            self.process.terminate()

    def kill(self) -> None:
        """Ends its process, if it still runs: only after a second Ctrl-C or a fault of ours."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def end(self, one: State, **more: Any) -> None:
        """Takes down what became of a point whose process has ended well, and `more`; a member may have diverged."""
        if self.together and (one.directory / MEMBER_FAILED).exists():
            one.state = FAILED
            one.error = read_json(one.directory / MEMBER_FAILED, {"step": "an integer", "error": "a string"})["error"]
            write_json(one.directory / MARK, _mark(one.point, None))  # it is tried again by itself
            (one.directory / MEMBER_FAILED).unlink()
            return
        run = latest_stage(one.directory).relative_to(one.directory)
        write_json(one.directory / MARK, _mark(one.point, {"run": str(run), **more}, self.together))
        one.state = DONE

    def last_error(self, status: int) -> str:
        """The line that says why the run failed: its 'error: ...', or the last of what it said."""
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("error: ")]
        return (told or lines or [""])[-1].removeprefix("error: ") or f"exit status {status}"


def _mark(point: Point, done: dict[str, Any] | None, together: Sequence[str] = ()) -> dict[str, Any]:
    mark = {"overrides": point.overrides, "arguments": point.arguments, "config": point.config, "done": done}
    return mark | ({"together": list(together)} if together else {})


def seeing(device: str | None) -> dict[str, str]:
    """The environment of a process that sees one NVIDIA GPU, or one TPU chip, of several; {} for None.

    Example:
      >>> seeing("2")["CUDA_VISIBLE_DEVICES"], seeing(None)
      ('2', {})
    """
    if device is None:
        return {}
    of_one_chip = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
    return {"CUDA_VISIBLE_DEVICES": device, "TPU_VISIBLE_DEVICES": device, **of_one_chip}


def run_sweep(
    points: Sequence[Point],
    workdir: Path,
    command: Sequence[str],
    *,
    jobs: int = 1,
    devices: Sequence[str] = (),
    together: int | None = 1,
    program: Sequence[str] = (),
    stream: TextIO | None = None,
    poll: float = 0.3,
) -> int:
    """Runs the points that are not done, each in WORKDIR/NAME, and collects what all of them measured.

    A point is done when its run has ended with status 0 and its mark says so; it is not run again. Any other goes on
    from its checkpoints, for its run is the same command in the same directory. A run that outlived a killed sweep
    is waited for.

    Args:
      points: from `read_points`.
      workdir: of the sweep; gets a directory for each point, results.csv and results.json.
      command: what runs a point: these words, the point's arguments and --workdir.
      jobs: processes at a time.
      devices: numbers of accelerators, for each of which there is one process at a time, that sees no other; () lets
        all see all.
      together: points that are members of one program at most, see `programs_of`; 1 runs each by itself.
      program: what runs several points in one program: these words and --runs=FILE.
      stream: where the table is shown; stderr by default.
      poll: seconds between looks.

    Returns:
      The exit status: 1 if a run failed, processes.STOPPED if told to stop, else 0.

    Raises:
      UserError: another sweep is at work there, or a point of the same name was another.
    """
    check_jobs(jobs, devices)
    jobs = len(devices) or jobs
    with locked(workdir), stop_signal() as stop:
        states = {point.name: State(point, workdir / point.name) for point in points}
        for one in states.values():
            one.state = DONE if _done(one.point, workdir) is not None else WAITING
        waiting = [one.point for one in states.values() if one.state == WAITING]
        queue = [
            Job([states[point.name] for point in some], program if len(some) > 1 else command)
            for some in programs_of(waiting, workdir, together, jobs, len(devices))
        ]
        others = len({mark.parent.name for mark in workdir.glob(f"*/{MARK}")} - {point.name for point in points})
        if others:
            note(f"{others} other point(s) in {workdir} are not in this sweep and are left as they are")
        table = Table(stream or sys.stderr)
        told = False
        try:
            while any(job.state == RUNNING for job in queue) or (
                not stop.is_set() and any(job.state == WAITING for job in queue)
            ):
                for job in queue:
                    running = [j.device for j in queue if j.state == RUNNING]
                    if job.state == WAITING and not stop.is_set() and len(running) < jobs:
                        job.start(next((device for device in devices if device not in running), None))
                    elif job.state == RUNNING:
                        job.poll(stop.is_set())
                        if job.state == DONE:
                            write_results(points, workdir)
                if stop.is_set() and not told:
                    told = True
                    for job in queue:
                        job.stop()
                table.show([*states.values()])
                if not (stop.is_set() and told):
                    stop.wait(poll)
                else:
                    time.sleep(poll)
        finally:
            for job in queue:
                job.kill()
        table.show([*states.values()], last=True)
        write_results(points, workdir)
    count = Counter(one.state for one in states.values())
    failed = [one for one in states.values() if one.state == FAILED]
    for one in failed:
        note(f"{one.point.name} failed: {one.error} ({one.directory / LOG})")
    note(f"{count[DONE]} of {len(points)} points done, {len(failed)} failed; {workdir / 'results.csv'}")
    if stop.is_set():
        note("stopped; the same command goes on from there")
        return processes.STOPPED
    return 1 if failed else 0


def check_jobs(jobs: int, devices: Sequence[str]) -> None:
    """Raises UserError unless there is at least one job, and no device is named twice."""
    if jobs < 1:
        raise UserError(f"--jobs={jobs} must be at least 1")
    if len({*devices}) < len(devices) or "" in devices:
        raise UserError(f"--devices={','.join(devices)} must name each device once, as in --devices=0,1,2,3")


def _done(point: Point, workdir: Path) -> dict[str, Any] | None:
    """What the mark of a point says when it is done, None if it is not.

    Raises:
      UserError: the mark is of another point with the same name.
    """
    if not (workdir / point.name / MARK).exists():
        return None
    mark = read_mark(workdir / point.name)
    for ours, theirs in ((point.config, mark["config"]), (point.overrides, mark["overrides"])):
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise UserError(
                    f"{workdir / point.name} was made with {name}={theirs.get(name)!r}, not {ours.get(name)!r}; "
                    "set it back or use another --workdir"
                )
    return mark["done"]


class Table:
    """The states of all points, rewritten in place on a terminal, else a line for each change."""

    def __init__(self, stream: TextIO):
        self.stream, self.terminal = stream, stream.isatty()
        self.height = 0
        self.shown: dict[str, str] = {}

    def show(self, queue: Sequence[State], last: bool = False) -> None:
        """Shows what has changed; `last` leaves the whole table standing."""
        if not self.terminal:
            for job in queue:
                if self.shown.get(job.point.name, WAITING) != job.state:
                    self.stream.write(f"{job.point.name}: {job.state}{job.error and f': {job.error}'}\n")
                self.shown[job.point.name] = job.state
            self.stream.flush()
            return
        columns, lines = shutil.get_terminal_size()
        text = table_of([progress_of(job.directory, job.point.name, job.state) for job in queue])
        if not last and len(text) > lines - 2:  # what has scrolled away cannot be rewritten
            kept = [row for row, job in zip(text[1:], queue, strict=True) if job.state not in (WAITING, DONE)]
            count = Counter(job.state for job in queue)
            text = [text[0], *kept[: lines - 4], f"{count[WAITING]} waiting, {count[DONE]} done"]
        up = f"\x1b[{self.height}A" if self.height else ""
        self.stream.write(up + "".join(f"\r\x1b[K{line[: columns - 1]}\n" for line in text) + "\x1b[J")
        self.stream.flush()
        self.height = len(text)


def progress_of(directory: Path, name: str, state: str) -> tuple[str, ...]:
    """(name, state, step/total, loss, time left) of a point, from what its run has written."""
    stage = latest_stage(directory)
    row = last_row(stage / "metrics.jsonl")
    if state == WAITING and not row:
        return name, state, "", "", ""
    total = read_config(stage).get("steps")
    step, loss = row.get("step", 0), row.get("loss")
    left = ""
    if state == RUNNING and total and row.get("step_time"):
        members = read_mark(directory)["together"] if (directory / MARK).exists() else []
        seconds = row["step_time"] * max(1, len(members))  # a member's time is its share of the program's
        left = str(datetime.timedelta(seconds=round((total - step) * seconds)))
    label = f" ({stage.name})" if stage != directory else ""
    return name, state + label, f"{step}/{total or '?'}", f"{loss:.4f}" if loss is not None else "", left


def table_of(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of an aligned table, numbers to the right.

    Example:
      >>> print(*table_of([("dpo", "done", "10/10", "0.6931", "")]), sep="\\n")
      point  state   step    loss  left
      dpo    done   10/10  0.6931
    """
    return aligned(("point", "state", "step", "loss", "left"), list(rows)).split("\n")


# What they measured


def results(points: Sequence[Point], workdir: Path) -> list[dict[str, Any]]:
    """One row a point, from the files of its run.

    Args:
      points: of the sweep.
      workdir: of the sweep.

    Returns:
      Rows of name, state ('done', 'pruned' or 'unfinished'), the overrides, and where it is over: steps, seconds of
      training, pairs, tokens and trained tokens, the last evaluation, and the first with 'first/' before its names.
    """
    rows = []
    for point in points:
        done = _done(point, workdir)
        state = "unfinished" if done is None else PRUNED if "pruned" in done else DONE
        row = {"name": point.name, "state": state, **point.overrides}
        if done is not None:
            run = read_run(workdir / point.name / done["run"], point.name, workdir / point.name)
            spent = {name: float(values[-1]) for name, values in run.spent().items()}
            steps = int(spent.pop("step", 0))
            row |= {"steps": steps, **spent}
            if "batch_size" in run.config:
                row["pairs"] = steps * run.config["batch_size"]
            if run.held_out:
                first, last = ({k: v for k, v in run.held_out[n].items() if k != "step"} for n in (0, -1))
                row |= last | {f"first/{name}": value for name, value in first.items()}
        rows.append(row)
    return rows


def write_results(points: Sequence[Point], workdir: Path) -> None:
    """Writes results.csv and results.json anew from the files of all points."""
    rows = results(points, workdir)
    columns = dict.fromkeys(key for row in sorted(rows, key=len, reverse=True) for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(workdir / "results.csv", text.getvalue())
    write_json(workdir / "results.json", rows)


def commands(points: Sequence[Point], workdir: Path, command: Sequence[str]) -> list[str]:
    """What a sweep would run, a shell command a point."""
    return [shlex.join([*command, *point.arguments, f"--workdir={workdir / point.name}"]) for point in points]
