"""A whole run, readable from top to bottom: data, policy and reference, state, resume, loop, finish."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from prefalign_jax import averages, checkpoint
from prefalign_jax.alike import check_config, check_inputs, check_state
from prefalign_jax.analysis.runs import read_run
from prefalign_jax.analysis.signs import signs_of
from prefalign_jax.assemble import Assembled, assemble, step_of
from prefalign_jax.callbacks import Callbacks
from prefalign_jax.cost.flops import count_flops
from prefalign_jax.cost.throughput import Meter
from prefalign_jax.cost.tracing import Tracer
from prefalign_jax.data.chat import load_tokenizer
from prefalign_jax.data.datasheet import as_markdown, write_datasheet
from prefalign_jax.data.memory import RowsOrPath
from prefalign_jax.data.pipeline import train_batches
from prefalign_jax.data.template import prints_date
from prefalign_jax.evaluation.contrast import weigh_tokens
from prefalign_jax.evaluation.in_training import make_evaluation
from prefalign_jax.experiment import Experiment, read
from prefalign_jax.export import export_adapters, export_run, hub_token, without_secrets
from prefalign_jax.files import locked, write_json
from prefalign_jax.load_data import Data, datasheet_of, load_pairs
from prefalign_jax.metrics import open_writer, read_metrics, whole_rows
from prefalign_jax.models.hf_io import load_config, resolve
from prefalign_jax.models.lora import Lora, merge
from prefalign_jax.options import did_you_mean, flatten, split_names
from prefalign_jax.processes import by_first, is_first, note, stop_requested, stop_signal, told_by_first
from prefalign_jax.progress import Progress
from prefalign_jax.sharding import make_mesh, place_batch, shapes_of
from prefalign_jax.trackers import TRACKERS, About, Trackers, check_installed, open_trackers
from prefalign_jax.train_step import init_state
from prefalign_jax.types import LanguageModel, Params, TrainState, UserError, one_line


class Result(NamedTuple):
    """What a run leaves in memory: its last step, whether it was told to stop, and its evaluation before and after."""

    step: int
    stopped: bool
    before: dict[str, float]
    after: dict[str, float]
    model: LanguageModel
    params: Params
    tokenizer: Any


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    data: RowsOrPath | None = None,
    eval_data: RowsOrPath | None = None,
    callbacks: Callbacks = Callbacks(),
) -> Result:
    """Trains, from data to an exported model; goes on where an earlier run in the same directory stopped.

    Args:
      config: with the fields of config.defaults.
      workdir: gets config.json, datasheet.json, datasheet.md, metrics.jsonl, eval.jsonl, checkpoints/, curves.png and,
        at the end, export/.
      data: in place of the config's data.path: a path, a hub name, a list of dicts, or a datasets.Dataset. A run whose
        rows have changed is not resumed.
      eval_data: the same in place of data.eval_path.
      callbacks: what is called on the way, and may end the run.

    Returns:
      The `Result`.

    Raises:
      UserError: for a mistake in the config, the data or the model, before any step is taken.
    """
    check_config(config)
    experiment = read(config, data=data, eval_data=eval_data)
    if config.export.push_to:
        hub_token(config.export.push_to)  # that it is missing is said now, not after the training
    by_first(lambda: check_installed(split_names(config.log_to)))
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        by_first(lambda: stack.enter_context(locked(workdir)))
        if not workdir.is_dir():
            raise UserError(f"--workdir={workdir} is not on a file system that all processes share; use one that is")
        stack.enter_context(jax.default_matmul_precision(config.matmul_precision))
        return _train(experiment, workdir, stack, callbacks)


def _train(experiment: Experiment, workdir: Path, stack: contextlib.ExitStack, callbacks: Callbacks) -> Result:
    # Data: rows -> records -> pairs of token ids. A model that does not fit is found before a long reading.
    experiment, tokenizer = fitted(experiment, workdir)
    config, loss = experiment.config, experiment.loss
    mesh = make_mesh(config.mesh)
    data = load_pairs(experiment, tokenizer)
    check_inputs(experiment, data)
    data = weigh_tokens(experiment, data, tokenizer, mesh, workdir)
    total = experiment.total_steps(len(data.training))

    # Policy and reference, and batches for them.
    began = assemble(experiment, data, tokenizer, mesh, workdir)
    model, training = began.model, began.training

    # State: what a step takes and gives.
    optimizer, train_step = step_of(experiment, model, mesh, experiment.learning_rate(len(data.training)))
    state = init_state(began.params, optimizer, mesh, began.reference, loss.running, model.rules, experiment.averaged)

    # Resume: where an earlier run in this directory stopped, or the beginning.
    run = Run(experiment, workdir, tokenizer, data, began, stack, callbacks)
    evaluate = make_evaluation([experiment], [began], [workdir], tokenizer, mesh)
    state = run.restored(state)
    start = run.start
    if why := run.cannot_go_on():
        return left_alone(workdir, start, why, model, merged(run.shown(state), began.lora), tokenizer)
    run.open_files(stack)
    for line in announcement(run):
        note(line)

    # Loop. First comes the evaluation at the start, or one that an earlier run was stopped before.
    if run.to_evaluate_first():
        run.evaluated(start, *evaluate(state, [start]))
        run.say_signs()
    batches = train_batches(training, **order_of(experiment), start=start, stop=start if run.over(start) else total)
    abstract = shapes_of(state)
    meter = Meter(training, lambda batch: count_flops(train_step, abstract, shapes_of(batch)))
    timer = checkpoint.Timer(config.save_steps)
    step, log = start, Log(run, stack.enter_context(Progress(total, "step", start=start)))
    with stop_signal() as stop, Tracer(experiment.profiled, start, workdir / "profile") as tracer:
        for step, batch in enumerate(meter.waited(batches), start + 1):
            tracer.before(step, state)
            on_devices = place_batch(mesh, batch)
            state, metrics = train_step(state, on_devices)
            meter.add(batch, on_devices)
            tracer.after(step, state)
            # Step n runs while the host reads step n - 1: the device never waits for logging.
            log.flush()
            logged = step in (1, total) or due(step, config.log_steps)
            log.put(step, metrics, meter.read() if logged else None)
            if stop.is_set() or stop_requested(step) or run.over(step):
                break
            evaluating, saving = evaluates_and_saves(config, step, timer.due(logged))
            if evaluating or saving:
                log.flush()  # this step's line is on disk before its checkpoint: a resumed run starts after it
                with meter.paused():
                    if evaluating and run.evaluated(step, *evaluate(state, [step])):
                        run.say_signs()
                    if saving and not run.over(step):
                        run.save(state)
                        timer.saved()
                if run.over(step):
                    break
        log.close()
        if run.over(step) and not run.means_at(step):
            run.evaluated(step, *evaluate(state, [step]))
        run.save(state)
        run.checkpoints.wait()

    # Finish.
    means, stopped = run.means_at(step), not run.over(step)
    weights = merged(run.shown(state), began.lora)
    result = Result(step, stopped, first_evaluation(workdir), means, model, weights, tokenizer)
    if stopped:
        note(f"stopped at step {step} of {total}, saved; the same command goes on from there")
        return result
    run.finish(state)
    run.say_signs(ended=True)
    return result


def fitted(experiment: Experiment, workdir: Path, tokenizer: Any = None) -> tuple[Experiment, Any]:
    """(the experiment with what its model and its directory decide, the tokenizer, read unless it is given)."""
    config = experiment.config
    experiment = experiment.fitted(load_config(resolve(config.model.path)).max_position)
    tokenizer = tokenizer or load_tokenizer(config.model.path, config.data.chat_template)
    return experiment.dated(workdir) if prints_date(tokenizer) else experiment, tokenizer


def due(step: int, every: int | None) -> bool:
    """Whether something is done at a step that is done every so many."""
    return bool(every) and step % every == 0


def evaluates_and_saves(config: FrozenConfigDict, step: int, timed: bool) -> tuple[bool, bool]:
    """Whether a step that is not the last is followed by an evaluation, and by a checkpoint; `timed`: it is time to."""
    evaluating = due(step, config.eval_steps)
    # Only what is saved can be the best.
    best = evaluating and bool(not config.save_steps or config.checkpoint.best_metric)
    return evaluating, due(step, config.save_steps) or timed or best


def order_of(experiment: Experiment) -> dict[str, Any]:
    """In which order the pairs come; options of `train_batches`."""
    config = experiment.config
    return dict(seed=config.seed, shuffle=config.data.shuffle, balance=config.data.balance)


class Run:
    """What a run has beside its state: where it begins and ends, and what it writes into its directory.

    Args:
      experiment: fitted to its model.
      workdir: of the run, which is locked.
      tokenizer: of the policy.
      data: the pairs.
      began: what it begins with.
      stack: closes what is opened.
      callbacks: what is called on the way.
    """

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        tokenizer: Any,
        data: Data,
        began: Assembled,
        stack: contextlib.ExitStack,
        callbacks: Callbacks = Callbacks(),
    ):
        self.experiment, self.workdir, self.tokenizer = experiment, workdir, tokenizer
        self.data, self.began, self.callbacks = data, began, callbacks
        self.total = experiment.total_steps(len(data.training))
        self.datasheet = datasheet_of(experiment, data, began.training, tokenizer)
        self.checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints", **experiment.config.checkpoint)
        stack.callback(self.checkpoints.close)
        self.start, self.changed, self.history = 0, {}, []
        self.trackers: Trackers | None = None
        self.ending = False  # before the last step, by early stopping or a callback
        self.failed = False  # as a member of a program that goes on
        self.latest: tuple[int, dict[str, float]] = -1, {}  # step of the last evaluation, and what it measured
        self.said: set[str] = set()  # signs

    def restored(self, state: TrainState) -> TrainState:
        """The state to go on from: where an earlier run in the directory stopped, or the one that is given."""
        plain, digests = self.experiment.plain, self.began.digests
        state = checkpoint.restore(self.checkpoints, state, plain, digests)
        check_state(digests, self.total, int(state.step))
        self.start, self.changed = int(state.step), checkpoint.changes(self.checkpoints, plain, digests)
        self.check_measures()
        self.ending = self.start > 0 and self.stops_early(self.start)
        return state

    def check_measures(self) -> None:
        """Refuses to choose the best among evaluations that measured different things."""
        best = self.experiment.config.checkpoint.best_metric or ""
        measures = next((names for start, names in checkpoint.MEASURES.items() if best.startswith(start)), ())
        for name, (before, now) in self.changed.items():
            if not {name, name.split(".")[0]}.isdisjoint(measures):
                raise UserError(
                    f"cannot resume {self.workdir}: its evaluations had {name}={before!r}, not {now!r}, and "
                    f"checkpoint.best_metric={best!r} compares all of them; set it back or use another --workdir"
                )

    def over(self, step: int) -> bool:
        """Whether the run ends at a step that it has reached."""
        return self.ending or step == self.total

    def stops_early(self, step: int) -> bool:
        """Whether early stopping ends it at a step: a function of what was measured up to there, which is on disk."""
        stopping = self.experiment.early_stopping
        return bool(stopping) and stopping.ends([row for row in evaluations(self.workdir) if row["step"] <= step])

    def cannot_go_on(self) -> str:
        """Why what is there cannot become what is asked for, '' if it can."""
        late = ", ".join(name for name in self.changed if name.split(".")[0] in checkpoint.AHEAD)
        if self.start > self.total:
            return f"{self.total} are asked for"
        return f"no step is left for another {late}" if self.over(self.start) and late else ""

    def open_files(self, stack: contextlib.ExitStack) -> None:
        """Writes what is known at the start, and opens the files of metrics; not before the directory is this run's."""
        config, start = self.experiment.config, self.start
        self.history = checkpoint.record_changes(self.workdir, start, self.changed)
        if is_first():
            about = {**self.experiment.plain, "steps": self.total}
            write_json(self.workdir / "config.json", about | ({"history": self.history} if self.history else {}))
            write_datasheet(self.workdir, self.datasheet)
        kept = start - 1 if self.over(start) else start  # a complete run's last evaluation is made again
        by_first(lambda: self.open_trackers(stack))
        writers = dict(tensorboard=config.tensorboard, trackers=self.trackers)
        self.writer = stack.enter_context(contextlib.closing(open_writer(self.workdir, resume_step=start, **writers)))
        self.eval_writer = stack.enter_context(
            contextlib.closing(open_writer(self.workdir, "eval", resume_step=kept, **writers))
        )

    def open_trackers(self, stack: contextlib.ExitStack) -> None:
        """Begins the run's runs in trackers, or goes on with them; before the files of metrics lose what is void."""
        names = [name for name in split_names(self.experiment.config.log_to) if name in TRACKERS]
        if not names:
            return
        params = flatten(without_secrets(self.experiment.plain)) | {"steps": self.total}
        for row in self.history:
            params |= {f"from step {row['step']}: {name}": now for name, (_, now) in row["changed"].items()}
        rows = {name: whole_rows(self.workdir / f"{name}.jsonl") for name in ("metrics", "eval")}
        about = About(self.workdir, params)
        self.trackers = open_trackers(names, about, rows, self.start, bool(self.changed))
        stack.push(lambda kind, *_: self.trackers.close(failed=self.failed or kind is not None))

    def to_evaluate_first(self) -> bool:
        """Whether an evaluation comes before the first step."""
        evaluated = [row["step"] for row in evaluations(self.workdir)]
        missing = due(self.start, self.experiment.config.eval_steps) and self.start not in evaluated
        return self.start == 0 or (missing and not self.over(self.start))

    def evaluated(self, step: int, means: dict[str, float]) -> dict[str, float]:
        """Writes down what was measured, and looks whether the run ends with it; returns it."""
        if means:
            check_best(self.experiment.config.checkpoint.best_metric, means, step)
            self.checkpoints.measured(step, means)
            self.eval_writer.write(step, means)
            self.latest = step, means
            if step < self.total and self.stops_early(step):
                stopping = self.experiment.early_stopping
                waited = f"{stopping.metric} has not improved in {stopping.patience} evaluations"
                note(f"{waited}; the run ends at step {step}")
                self.ending = True
            self.tell("on_eval", step, means)
        return means

    def means_at(self, step: int) -> dict[str, float]:
        """What was measured at a step, {} if nothing was."""
        return self.latest[1] if self.latest[0] == step else {}

    def logged(self, step: int, values: dict[str, float]) -> None:
        """Writes down the metrics of a step."""
        self.writer.write(step, values)
        self.tell("on_step", step, values)

    def tell(self, what: str, step: int, about: Any) -> None:
        """Calls a callback, which may end the run."""
        if self.callbacks.told(what, step, about) and not self.ending:
            note(f"{what} ends the run")
            self.ending = True

    def say_signs(self, ended: bool = False) -> None:
        """Says what the run shows for the first time, and at its end all that it shows; see `analysis.signs`."""
        if not is_first():
            return
        try:
            shown = signs_of(read_run(self.workdir, self.workdir.name))
        except Exception as error:  # of whatever kind: a remark costs nobody a run
            note(f"{self.workdir}: nothing is said of the run: {one_line(error)}")
            return
        for name, text in shown.items():
            if ended or name not in self.said:
                note(f"{name}: {text}")
        self.said |= shown.keys()

    def shown(self, state: TrainState) -> TrainState:
        """The state with the weights that are evaluated and exported, which may be an average."""
        return averages.evaluated(state, self.experiment.config.ema.evaluate)

    def save(self, state: TrainState) -> None:
        """Starts writing a checkpoint, with what was measured at its step."""
        step, saved = int(state.step), self.checkpoints.latest
        checkpoint.save(self.checkpoints, state, self.experiment.plain, self.began.digests, self.means_at(step))
        if saved < step and self.callbacks.on_save:
            self.checkpoints.wait()
            self.tell("on_save", step, self.checkpoints.directory / str(step))

    def finish(self, state: TrainState) -> None:
        """Draws the curves and exports, once the last checkpoint is on disk."""
        config, lora, workdir = self.experiment.config, self.began.lora, self.workdir
        means = self.means_at(int(state.step))
        if is_first():
            draw_curves(workdir)
        if config.export.enabled:
            which = config.export.checkpoint  # the last is at hand, and its files need not be read
            at = int(state.step) if which == "last" else checkpoint.chosen(self.checkpoints, which)
            if which == "best" and (better := checkpoint.better_one(self.checkpoints, at, evaluations(workdir))):
                note(f"the checkpoint of step {at} is exported: {better}")
            if at != int(state.step):
                use_ema = config.ema.evaluate
                saved = checkpoint.as_saved(self.checkpoints, at, self.experiment.plain)
                # The metrics are those of the weights that were evaluated then.
                means = self.checkpoints.metrics(at) if saved["ema"]["evaluate"] == use_ema else {}
                parts = {name: getattr(state, name) for name in averages.parts_of(state, use_ema)}
                state = state._replace(**checkpoint.load_parts(self.checkpoints, at, parts))
            state = self.shown(state)
            about = dict(data=as_markdown(self.datasheet, level=3), metrics=means, history=self.history)
            shape = self.began.model.config
            export_run(self.experiment, merged(state, lora), shape, self.tokenizer, workdir, **about)
            if lora:
                export_adapters(self.experiment, state.params, lora, shape, workdir)


def announcement(run: Run) -> list[str]:
    """Lines that say what is trained on what, from where on, and which values have changed since."""
    experiment, data, start, total = run.experiment, run.data, run.start, run.total
    config, loss = experiment.config, experiment.loss
    resumed = (", already complete" if run.over(start) else f", resumed at step {start}") if start else ""
    pairs = f"{len(data.training)} {loss.unit}, {len(data.held_out)} held out"
    saves = "" if config.save_steps else "; saved with each evaluation, and by time at most 10 minutes apart"
    lines = [f"{loss.name}: {pairs}, {total} steps of {config.batch_size}{resumed}{saves}"]
    if config.optimizer.name != "adamw" or experiment.averaged:
        lines.append("; ".join(f"{name}: {words}" for name, words in experiment.training.items()))
    warmup = experiment.warmup_steps(len(data.training))
    if warmup == total:
        rate = "is 0 in the only step, which changes nothing" if total == 1 else "rises to the end of the run"
        lines.append(f"the learning rate {rate}: the warm-up of {warmup} is as long as the run")
    if run.changed:
        words = (f"{name} {before} -> {now}" for name, (before, now) in run.changed.items())
        lines.append(f"resumed with other values: {', '.join(words)}")
    return lines


def draw_curves(workdir: Path) -> None:
    """Draws curves.png, or says why not: a picture costs nobody a trained model."""
    from prefalign_jax.pages import plots  # matplotlib takes half a second to import

    try:
        plots.plot_curves(workdir)
    except Exception as error:  # of whatever kind
        note(f"{workdir / 'curves.png'} is not drawn: {one_line(error)}")


def merged(state: TrainState, lora: Lora | None) -> Params:
    """The parameters of the trained model, adapters merged into their base."""
    return merge(state.reference, state.params, lora) if lora else state.params


def evaluations(workdir: Path) -> list[dict[str, Any]]:
    """The rows of eval.jsonl, the same in all processes."""
    return told_by_first(lambda: read_metrics(workdir / "eval.jsonl"))


def first_evaluation(workdir: Path) -> dict[str, float]:
    """What was measured before the first step, {} if nothing was."""
    rows = evaluations(workdir)
    return rows[0] if rows and rows[0]["step"] == 0 else {}


def left_alone(workdir: Path, step: int, why: str, model: LanguageModel, params: Params, tokenizer: Any) -> Result:
    """Of a run that cannot become what it is asked to be: nothing in its directory changes."""
    note(f"{workdir} is trained to step {step} already, and {why}; it is left as it is")
    rows = evaluations(workdir)
    last = {name: value for name, value in (rows[-1] if rows else {}).items() if name != "step"}
    return Result(step, False, first_evaluation(workdir), last, model, params, tokenizer)


class Log:
    """The metrics of a run's steps, fetched when the next step is already running.

    Args:
      run: takes the logged steps.
      progress: takes every step.
    """

    def __init__(self, run: Run, progress: Progress):
        self.run, self.progress = run, progress
        self.waiting: tuple[int, dict[str, jax.Array], dict[str, float] | None] | None = None

    def put(self, step: int, metrics: dict[str, jax.Array], rates: dict[str, float] | None) -> None:
        """Keeps a step's metrics until `flush`; without rates they are only looked at, not written."""
        self.waiting = step, metrics, rates

    def flush(self) -> None:
        """Fetches what waits, which waits for that step, and writes it.

        Raises:
          UserError: the run has diverged.
        """
        if self.waiting is None:
            return
        (step, metrics, rates), self.waiting = self.waiting, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if rates is not None:
            self.run.logged(step, values | rates)
        check_finite(step, values)
        self.progress.update(step, {"loss": values["loss"]})

    def close(self) -> None:
        """Writes what waits, and ends the line of progress."""
        self.flush()
        self.progress.close()


def check_finite(step: int, values: Mapping[str, float]) -> None:
    """Refuses to go on after a step that has diverged."""
    if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
        raise UserError(
            f"diverged at step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; "
            "try a lower learning_rate or a longer warm-up (the last checkpoint is kept)"
        )


def check_best(best: str | None, means: Mapping[str, float], step: int) -> None:
    """Refuses a checkpoint.best_metric that an evaluation does not have, or has no number for."""
    if best and best not in means:
        hint = did_you_mean(best, means)
        raise UserError(f"checkpoint.best_metric={best!r} is not measured; {hint}there are {', '.join(means)}")
    if best and not math.isfinite(means[best]):
        raise UserError(f"{best} is {means[best]} at step {step}, and checkpoint.best_metric needs a number")
