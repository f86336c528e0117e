"""A whole run, readable from top to bottom: data, policy and reference, state, resume, loop, finish."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from prefalign_jax import checkpoint
from prefalign_jax.alike import check_config, check_inputs, check_state
from prefalign_jax.assemble import assemble, step_of
from prefalign_jax.cost.flops import count_flops
from prefalign_jax.cost.throughput import Meter
from prefalign_jax.cost.tracing import Tracer
from prefalign_jax.data.chat import load_tokenizer
from prefalign_jax.data.datasheet import as_markdown, write_datasheet
from prefalign_jax.data.memory import RowsOrPath
from prefalign_jax.data.pipeline import train_batches
from prefalign_jax.data.template import prints_date
from prefalign_jax.evaluation.contrast import weigh_tokens
from prefalign_jax.evaluation.held_out import evaluate, summary
from prefalign_jax.evaluation.policy_samples import make_sampler
from prefalign_jax.experiment import Experiment, read
from prefalign_jax.export import export_adapters, export_run, hub_token
from prefalign_jax.files import locked, write_json
from prefalign_jax.load_data import Data, datasheet_of, load_pairs
from prefalign_jax.metrics import Writer, open_writer, read_metrics
from prefalign_jax.models.hf_io import load_config, resolve
from prefalign_jax.models.lora import Lora, merge
from prefalign_jax.options import did_you_mean
from prefalign_jax.pages import plots
from prefalign_jax.processes import by_first, is_first, note, stop_requested, stop_signal, told_by_first
from prefalign_jax.progress import Progress
from prefalign_jax.sharding import make_mesh, place_batch, shapes_of
from prefalign_jax.train_step import init_state, make_eval_step
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
    config: ConfigDict, workdir: str | Path, *, data: RowsOrPath | None = None, eval_data: RowsOrPath | None = None
) -> Result:
    """Trains, from data to an exported model; goes on where an earlier run in the same directory stopped.

    Args:
      config: with the fields of config.defaults.
      workdir: gets config.json, datasheet.json, datasheet.md, metrics.jsonl, eval.jsonl, checkpoints/, curves.png and,
        at the end, export/.
      data: in place of the config's data.path: a path, a hub name, a list of dicts, or a datasets.Dataset. A run whose
        rows have changed is not resumed.
      eval_data: the same in place of data.eval_path.

    Returns:
      The `Result`.

    Raises:
      UserError: for a mistake in the config, the data or the model, before any step is taken.
    """
    check_config(config)
    experiment = read(config, data=data, eval_data=eval_data)
    if config.export.push_to:
        hub_token(config.export.push_to)  # that it is missing is said now, not after the training
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        by_first(lambda: stack.enter_context(locked(workdir)))
        if not workdir.is_dir():
            raise UserError(f"--workdir={workdir} is not on a file system that all processes share; use one that is")
        stack.enter_context(jax.default_matmul_precision(config.matmul_precision))
        return _train(experiment, workdir, stack)


def _train(experiment: Experiment, workdir: Path, stack: contextlib.ExitStack) -> Result:
    # Data: rows -> records -> pairs of token ids. A model that does not fit is found before a long reading.
    experiment = experiment.fitted(load_config(resolve(experiment.config.model.path)).max_position)
    tokenizer = load_tokenizer(experiment.config.model.path, experiment.config.data.chat_template)
    if prints_date(tokenizer):
        experiment = experiment.dated(workdir)
    config, plain, loss = experiment.config, experiment.plain, experiment.loss
    mesh = make_mesh(config.mesh)
    data = load_pairs(experiment, tokenizer)
    check_inputs(experiment, data)
    data = weigh_tokens(experiment, data, tokenizer, mesh, workdir)
    total = experiment.total_steps(len(data.training))

    # Policy and reference, and batches for them.
    began = assemble(experiment, data, tokenizer, mesh, workdir)
    model, lora, training, digests = began.model, began.lora, began.training, began.digests
    datasheet = datasheet_of(experiment, data, training, tokenizer)
    sample = make_sampler(experiment, model, began.started, tokenizer, mesh, workdir)

    # State: what a step takes and gives.
    optimizer, train_step = step_of(experiment, model, mesh, experiment.learning_rate(len(data.training)))
    eval_step = make_eval_step(model, loss, mesh, config.vocabulary_chunk)
    state = init_state(began.params, optimizer, mesh, began.reference, loss.running, model.rules)

    # Resume: where an earlier run in this directory stopped, or the beginning.
    checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints", **config.checkpoint)
    stack.callback(checkpoints.close)
    state = checkpoint.restore(checkpoints, state, plain, digests)
    check_state(digests, total, int(state.step))
    start = int(state.step)
    changed = checkpoint.changes(checkpoints, plain)
    late = ", ".join(name for name in changed if name.split(".")[0] in checkpoint.AHEAD)
    if start > total or (start == total and late):
        why = f"{total} are asked for" if start > total else f"no step is left for another {late}"
        return left_alone(workdir, start, why, model, merged(state, lora), tokenizer)
    history = checkpoint.record_changes(workdir, start, changed)
    if is_first():  # not before it is known to be this run's
        write_json(workdir / "config.json", {**plain, "steps": total} | ({"history": history} if history else {}))
        write_datasheet(workdir, datasheet)
    kept = start if start < total else start - 1  # a complete run's last evaluation is made again
    writers = dict(tensorboard=config.tensorboard)
    writer = stack.enter_context(contextlib.closing(open_writer(workdir, resume_step=start, **writers)))
    eval_writer = stack.enter_context(contextlib.closing(open_writer(workdir, "eval", resume_step=kept, **writers)))
    announce(experiment, data, start, total, changed)

    def evaluate_now(step: int) -> dict[str, float]:
        means = {}
        if began.held_out is not None:
            columns = evaluate(eval_step, loss, state.params, state.reference, began.held_out, state.running)
            means = summary(columns)
        means |= sample(state, step)
        if means:
            check_best(config.checkpoint.best_metric, means, step)
            eval_writer.write(step, means)
        return means

    def due(step: int, every: int | None) -> bool:
        return bool(every) and step % every == 0

    # Loop. First comes the evaluation at the start, or one that an earlier run was stopped before.
    evaluated = [row["step"] for row in evaluations(workdir)]
    if start == 0 or (due(start, config.eval_steps) and start not in evaluated and start < total):
        evaluate_now(start)
    order = dict(seed=config.seed, shuffle=config.data.shuffle, balance=config.data.balance)
    batches = train_batches(training, **order, start=start, stop=total)
    abstract = shapes_of(state)
    meter = Meter(training, lambda batch: count_flops(train_step, abstract, shapes_of(batch)))
    timer = checkpoint.Timer(config.save_steps)
    step, means, log = start, {}, Log(writer, stack.enter_context(Progress(total, "step", start=start)))
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
            if stop.is_set() or stop_requested(step) or step == total:
                break
            evaluating = due(step, config.eval_steps)
            # Only what is saved can be the best.
            saving = due(step, config.save_steps) or timer.due(logged)
            saving |= evaluating and bool(not config.save_steps or config.checkpoint.best_metric)
            if evaluating or saving:
                log.flush()  # this step's line is on disk before its checkpoint: a resumed run starts after it
                with meter.paused():
                    means = evaluate_now(step) if evaluating else {}
                    if saving:
                        checkpoint.save(checkpoints, state, plain, digests, means)
                        timer.saved()
        log.close()
        means = evaluate_now(step) if step == total else {}
        checkpoint.save(checkpoints, state, plain, digests, means)
        checkpoints.wait()

    # Finish.
    result = Result(step, step < total, first_evaluation(workdir), means, model, merged(state, lora), tokenizer)
    if result.stopped:
        note(f"stopped at step {step} of {total}, saved; the same command goes on from there")
        return result
    if is_first():
        draw_curves(workdir)
    if config.export.enabled:
        which = config.export.checkpoint  # the last is at hand, and its files need not be read
        if which != "last" and (at := checkpoint.chosen(checkpoints, which)) != step:
            means = checkpoints.metrics(at)
            state = state._replace(params=checkpoint.load_params(checkpoints, at, state.params))
        about = dict(data=as_markdown(datasheet, level=3), metrics=means, history=history)
        export_run(experiment, merged(state, lora), model.config, tokenizer, workdir, **about)
        if lora:
            export_adapters(experiment, state.params, lora, model.config, workdir)
    return result


def announce(
    experiment: Experiment, data: Data, start: int, total: int, changed: Mapping[str, tuple[Any, Any]]
) -> None:
    """Says what is trained on what, from where on, and which values have changed since."""
    config, loss = experiment.config, experiment.loss
    resumed = f", resumed at step {start}" if 0 < start < total else ", already complete" if start else ""
    pairs = f"{len(data.training)} {loss.unit}, {len(data.held_out)} held out"
    saves = "" if config.save_steps else "; saved with each evaluation, and by time at most 10 minutes apart"
    note(f"{loss.name}: {pairs}, {total} steps of {config.batch_size}{resumed}{saves}")
    warmup = experiment.warmup_steps(len(data.training))
    if warmup == total:
        rate = "is 0 in the only step, which changes nothing" if total == 1 else "rises to the end of the run"
        note(f"the learning rate {rate}: the warm-up of {warmup} is as long as the run")
    if changed:
        words = (f"{name} {before} -> {now}" for name, (before, now) in changed.items())
        note(f"resumed with other values: {', '.join(words)}")


def draw_curves(workdir: Path) -> None:
    """Draws curves.png, or says why not: a picture costs nobody a trained model."""
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
      writer: takes the logged steps.
      progress: takes every step.
    """

    def __init__(self, writer: Writer, progress: Progress):
        self.writer, self.progress = writer, progress
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
            self.writer.write(step, values | rates)
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            raise UserError(
                f"diverged at step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; "
                "try a lower learning_rate or a longer warm-up (the last checkpoint is kept)"
            )
        self.progress.update(step, {"loss": values["loss"]})

    def close(self) -> None:
        """Writes what waits, and ends the line of progress."""
        self.flush()
        self.progress.close()


def check_best(best: str | None, means: Mapping[str, float], step: int) -> None:
    """Refuses a checkpoint.best_metric that an evaluation does not have, or has no number for."""
    if best and best not in means:
        hint = did_you_mean(best, means)
        raise UserError(f"checkpoint.best_metric={best!r} is not measured; {hint}there are {', '.join(means)}")
    if best and not math.isfinite(means[best]):
        raise UserError(f"{best} is {means[best]} at step {step}, and checkpoint.best_metric needs a number")
