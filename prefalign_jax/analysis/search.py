"""A search: trials whose values Optuna chooses, each a point as a sweep's; killed at any moment, it goes on."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TextIO

from ml_collections import ConfigDict

from prefalign_jax import processes
from prefalign_jax.analysis.programs import Point
from prefalign_jax.analysis.runs import latest_stage
from prefalign_jax.analysis.sweep import (
    DONE,
    FAILED,
    PRUNED,
    RUNNING,
    Job,
    State,
    Table,
    check_overrides,
    make_points,
    write_results,
)
from prefalign_jax.cli.experiments import config_of
from prefalign_jax.files import locked, read_json, write_json
from prefalign_jax.metrics import better, read_metrics
from prefalign_jax.processes import note, stop_signal
from prefalign_jax.types import UserError

EXTRA = "pip install 'prefalign_jax[search]'"
JOURNAL = "search.journal"  # what Optuna keeps: values, evaluations and states of all trials
SEARCH = "search.json"  # what was searched
DIGITS = 3  # of a value from a range, so that directories and commands stay readable


class Range(NamedTuple):
    """Values between two ends, which belong to it; evenly in the logarithm if `log`, whole numbers if `whole`."""

    low: float
    high: float
    log: bool
    whole: bool


Space = Mapping[str, Range | Sequence[Any]]  # a field -> its range, or the values to choose from


class Search(NamedTuple):
    """What is searched.

    Attributes:
      config: NAME or NAME:ARG of an experiment; its sweep() is not read.
      common: words --config.x=y for all trials.
      space: what varies.
      metric: a column of eval.jsonl; its last value is a trial's.
      mode: 'max' or 'min', which of its values is best.
      prune: whether trials are stopped whose evaluations are worse than the median of the others'.
      seed: of the sampler.
    """

    config: str
    common: Sequence[str]
    space: Space
    metric: str
    mode: str
    prune: bool = True
    seed: int = 0


def read_ranges(words: Sequence[str], config: ConfigDict) -> dict[str, Range]:
    """The ranges that a command line names.

    Args:
      words: FIELD=LOW..HIGH each, with ',log' behind it if it is even in the logarithm.
      config: whose fields they are; an integer field takes whole numbers.

    Raises:
      UserError: a word is none such.

    Example:
      >>> from prefalign_jax.config import defaults
      >>> read_ranges(["loss.beta=0.01..1,log", "warmup_steps=0..20"], defaults())["warmup_steps"]
      Range(low=0, high=20, log=False, whole=True)
    """
    ranges: dict[str, Range] = {}
    for word in words:
        field, _, text = word.partition("=")
        ends, comma, log = text.partition(",")
        low, dots, high = ends.partition("..")
        whole = _type(config, field) is int
        try:
            read = int if whole else float
            one = Range(read(low), read(high), log == "log", whole)
            if not (dots and (not comma or one.log) and one.low < one.high < math.inf and one.low > -math.inf):
                raise ValueError(word)
        except ValueError:
            kind = "whole numbers " * whole
            raise UserError(f"--range={word!r}: write {kind}FIELD=LOW..HIGH, or FIELD=LOW..HIGH,log") from None
        if one.log and one.low <= 0:
            raise UserError(f"--range={word!r}: zero has no logarithm; write a LOW above it, or leave log out")
        if field in ranges:
            raise UserError(f"--range names {field} twice; leave one of them out")
        ranges[field] = one
    return ranges


def _type(config: ConfigDict, field: str) -> type | None:
    *groups, last = field.split(".")
    for name in groups:
        config = config.get(name) if isinstance(config, ConfigDict) else None
    return config.get_type(last) if isinstance(config, ConfigDict) and last in config else None


def check(search: Search) -> None:
    """Raises UserError if a run would refuse a value at an end of a range, or one to choose from."""
    corners = [{field: v[end] for field, v in search.space.items() if isinstance(v, Range)} for end in (0, 1)]
    chosen = {field: v for field, v in search.space.items() if not isinstance(v, Range)}
    first = {field: values[0] for field, values in chosen.items()}
    others = [{**corners[0], **first, field: value} for field, values in chosen.items() for value in values[1:]]
    check_overrides(corners[0] | first, "--search", search.common)
    for overrides in [corners[0] | first, *([corners[1] | first] if corners[0] else []), *others]:
        make_points(search.config, search.common, [overrides])


class _Trial:
    """A trial while it runs: Optuna's record, the point that it is, and what its evaluations say."""

    def __init__(self, trial: Any, search: Search, workdir: Path, command: Sequence[str]):
        self.trial, self.search = trial, search
        self.point = _point(trial, search)
        self.state = State(self.point, workdir / self.point.name)
        self.job = Job([self.state], command)
        self.reported: set[int] = set(trial.storage.get_trial(trial._trial_id).intermediate_values)
        self.pruned: int | None = None  # the step of the evaluation after which it was told to stop
        if self.prunes and self.reported and trial.should_prune():  # the search was killed before it could
            self.pruned = max(self.reported)

    @property
    def prunes(self) -> bool:
        """Whether its evaluations are compared: those of a job with several trainings are not of one curve."""
        return self.search.prune and self.point.config["job"] == "train"

    def evaluations(self) -> dict[int, float]:
        """The metric at each step that was evaluated after the start, NaN where it is missing."""
        rows = read_metrics(latest_stage(self.state.directory) / "eval.jsonl")
        for row in rows:
            if self.search.metric not in row:
                listed = ", ".join(name for name in row if name != "step")
                raise UserError(f"--metric={self.search.metric} is no column of eval.jsonl; it has {listed}")
        return {row["step"]: math.nan if (x := row[self.search.metric]) is None else x for row in rows if row["step"]}

    def look(self) -> None:
        """Tells Optuna of new evaluations, in their order; tells the run to stop where one is too bad."""
        if not self.prunes or self.pruned is not None:
            return
        for step, value in self.evaluations().items():
            if step not in self.reported:
                self.reported.add(step)
                self.trial.report(value, step)
                if self.trial.should_prune():
                    self.pruned = step
                    break


def _optuna() -> ModuleType:
    try:
        import optuna
    except ModuleNotFoundError:
        raise UserError(f"--search=optuna needs the package optuna: {EXTRA}") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _point(trial: Any, search: Search) -> Point:
    """The point of a trial, whose values are those that Optuna suggests, or has suggested before."""
    overrides: dict[str, Any] = {}
    for field, values in search.space.items():
        if not isinstance(values, Range):
            overrides[field] = trial.suggest_categorical(field, list(values))
        elif values.whole:
            overrides[field] = trial.suggest_int(field, int(values.low), int(values.high), log=values.log)
        else:
            value = float(f"{trial.suggest_float(field, values.low, values.high, log=values.log):.{DIGITS}g}")
            overrides[field] = min(max(value, values.low), values.high)
    return make_points(search.config, search.common, [overrides])[0]


def _open(search: Search, workdir: Path) -> Any:
    """Optuna's study of a search, new or as it was left."""
    optuna = _optuna()
    told = search._asdict() | {"common": list(search.common)}
    told["space"] = {field: list(values) for field, values in search.space.items()}
    known = read_json(workdir / SEARCH, "an object", missing=told)
    for name, value in told.items():
        if known.get(name) != value:
            raise UserError(
                f"{workdir} has a search with {name}={known.get(name)!r}, not {value!r}; set it back or use another "
                "--workdir"
            )
    write_json(workdir / SEARCH, told)
    backend = optuna.storages.journal.JournalFileBackend(str(workdir / JOURNAL))
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="search",
        direction="maximize" if search.mode == "max" else "minimize",
        pruner=optuna.pruners.MedianPruner() if search.prune else optuna.pruners.NopPruner(),
        load_if_exists=True,
    )


def _next(study: Any, search: Search, known: Any = None) -> Any:
    """The next trial, or one that is known already.

    What it draws depends on its number and on what the study knows, not on when the search was begun.
    """
    optuna = _optuna()
    number = len(study.get_trials(deepcopy=False)) if known is None else known.number
    study.sampler = optuna.samplers.TPESampler(seed=(1_000_003 * search.seed + number) % 2**32)
    return study.ask() if known is None else optuna.trial.Trial(study, known._trial_id)


def run_search(
    search: Search,
    workdir: Path,
    command: Sequence[str],
    trials: int,
    *,
    jobs: int = 1,
    devices: Sequence[str] = (),
    stream: TextIO | None = None,
    poll: float = 0.3,
) -> int:
    """Runs trials until there are as many as asked for, each in WORKDIR/NAME; goes on where a search was stopped.

    A trial that was under way has its values, and its run goes on from its checkpoints. With one job the trials are
    those of a search that nothing stopped. With several they depend on which trial ends first.

    Args:
      search: what is searched.
      workdir: gets a directory for each trial, results.csv, results.json, search.json and search.journal.
      command: what runs a trial: these words, the point's arguments and --workdir.
      trials: how many there are to be, those of earlier calls counted.
      jobs: runs at a time.
      devices: numbers of accelerators, as in `sweep.run_sweep`.
      stream: where the table is shown; stderr by default.
      poll: seconds between looks.

    Returns:
      The exit status: 1 if a run failed, processes.STOPPED if told to stop, else 0.

    Raises:
      UserError: Optuna is not installed, another search or sweep is at work there, or it was another search.
    """
    optuna = _optuna()
    states = optuna.trial.TrialState
    jobs = len(devices) or jobs
    with locked(workdir), stop_signal() as stop:
        study = _open(search, workdir)
        left = study.get_trials(deepcopy=False, states=(states.RUNNING,))
        over = [t for t in study.get_trials(deepcopy=False) if t.state != states.RUNNING and t.params]
        points = {point.name: point for point in (_point(optuna.trial.FixedTrial(t.params), search) for t in over)}
        shown: list[State] = []
        running: list[_Trial] = []
        table = Table(stream or sys.stderr)
        told = failed = False
        try:
            while running or not stop.is_set():
                while not stop.is_set() and len(running) < jobs:
                    if not left and len(study.get_trials(deepcopy=False)) >= trials:
                        break
                    one = _Trial(_next(study, search, left.pop(0) if left else None), search, workdir, command)
                    points[one.point.name] = one.point
                    shown.append(one.state)
                    used = [other.job.device for other in running]
                    one.job.start(next((device for device in devices if device not in used), None))
                    running.append(one)
                if not running:
                    break
                for one in running:
                    one.look()
                    if one.pruned is not None:
                        one.job.stop()
                    one.job.poll(stop.is_set() or one.pruned is not None)
                    if one.state.state != RUNNING:
                        one.look()
                        failed |= _end(study, one) == FAILED
                        write_results([*points.values()], workdir)
                running = [one for one in running if one.state.state == RUNNING]
                if stop.is_set() and not told:
                    told = True
                    for one in running:
                        one.job.stop()
                table.show(shown)
                time.sleep(poll) if told else stop.wait(poll)
        finally:
            for one in running:
                one.job.kill()
        table.show(shown, last=True)
        write_results([*points.values()], workdir)
        return _conclude(study, search, workdir, failed, stop.is_set())


def _end(study: Any, one: _Trial) -> str:
    """Tells Optuna how a trial ended, and its directory if it was stopped early."""
    optuna, state = _optuna(), one.state
    if one.pruned is not None:
        one.job.end(state, pruned=one.pruned)
        state.state = PRUNED
        study.tell(one.trial, state=optuna.trial.TrialState.PRUNED)
    elif state.state == DONE:
        values = one.evaluations()
        value = values[max(values)] if values else math.nan
        if math.isnan(value):
            state.state, state.error = FAILED, f"its last {one.search.metric} is no number"
            study.tell(one.trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(one.trial, value)
    elif state.state == FAILED:
        study.tell(one.trial, state=optuna.trial.TrialState.FAIL)
    return state.state


def _conclude(study: Any, search: Search, workdir: Path, failed: bool, stopped: bool) -> int:
    """Says what came out; the exit status."""
    count = Counter(trial.state.name.lower() for trial in study.get_trials(deepcopy=False))
    over = f"{count['complete']} trials done, {count['pruned']} pruned, {count['fail']} failed"
    note(f"{over}; {workdir / 'results.csv'}")
    if count["complete"]:
        best = study.best_trial
        point = _point(_optuna().trial.FixedTrial(best.params), search)
        note(f"best: {search.metric} {best.value:.4g}, {workdir / point.name}")
    if stopped:
        note("stopped; the same command goes on from there")
        return processes.STOPPED
    return 1 if failed else 0


def read_search(
    config: str,
    common: Sequence[str],
    ranges: Sequence[str],
    choices: Mapping[str, Sequence[Any]],
    metric: str | None,
    mode: str | None,
    prune: bool = True,
) -> Search:
    """What a command line says is searched.

    Args:
      config: NAME or NAME:ARG of an experiment.
      common: words --config.x=y for all trials.
      ranges: words of `read_ranges`.
      choices: a field -> the values to choose from.
      metric: a column of eval.jsonl.
      mode: 'max' or 'min'; None is what is better of a metric whose name tells, as of a loss.
      prune: whether bad trials are stopped early.

    Raises:
      UserError: a mistake in any of it; Optuna is not installed.
    """
    _optuna()
    if not metric:
        raise UserError("--search needs --metric, a column of eval.jsonl such as eval/rewards/accuracies")
    if (mode := mode or better(metric)) is None:
        raise UserError(f"--metric={metric}: whether the most or the least of it is best is not known; set --mode")
    fields = config_of(config, common)
    space = {**read_ranges(ranges, fields), **choices}
    if not space:
        raise UserError("--search needs something to vary: --range FIELD=LOW..HIGH or --grid FIELD=VALUE,VALUE")
    if both := sorted({word.partition("=")[0] for word in ranges} & set(choices)):
        raise UserError(f"--range and --grid both vary {both[0]}; leave one of them out")
    search = Search(config, list(common), space, metric, mode, prune, fields.seed)
    check(search)
    return search
