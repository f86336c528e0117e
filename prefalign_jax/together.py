"""Several runs as members of one program: one loop, and for each its own directory, as if it had been run alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from prefalign_jax import checkpoint
from prefalign_jax.assemble import Assembled, assemble, new_adapters, optimizer_of
from prefalign_jax.cost.flops import count_flops
from prefalign_jax.cost.throughput import Meter
from prefalign_jax.data.pairing import WHICH_PAIRS
from prefalign_jax.data.pipeline import alike, batches_of, packed_ahead, train_order
from prefalign_jax.evaluation.contrast import weigh_tokens
from prefalign_jax.evaluation.in_training import make_evaluation
from prefalign_jax.experiment import Experiment, read
from prefalign_jax.files import locked, write_json
from prefalign_jax.load_data import Data, load_pairs
from prefalign_jax.members import FAILED, Program, make_program, numbers_of, shared_fields
from prefalign_jax.options import split_names
from prefalign_jax.processes import note, stop_signal
from prefalign_jax.progress import Progress
from prefalign_jax.sharding import make_mesh, shapes_of
from prefalign_jax.trackers import check_installed
from prefalign_jax.train import Run, announcement, check_finite, due, evaluates_and_saves, fitted, order_of
from prefalign_jax.train_step import init_state
from prefalign_jax.types import PreferenceBatch, TrainState, UserError


def train_together(points: Sequence[tuple[ConfigDict, Path]]) -> bool:
    """Trains several runs in one program, each in its own directory; goes on where they stopped.

    A member that diverges is stopped, which the file FAILED in its directory says, and the others go on.

    Args:
      points: (config, workdir) of each; they differ in numbers alone, see `members.shared_fields`.

    Returns:
      Whether they were told to stop before the end.

    Raises:
      UserError: a mistake in a config, the data or the model, or runs that cannot be members of one program.
    """
    experiments = [read(config) for config, _ in points]
    shared = [shared_fields(one.fields) for one in experiments]
    if None in shared or any(fields != shared[0] for fields in shared) or jax.process_count() > 1:
        raise UserError("these runs cannot be members of one program; use --together=off")
    check_installed(split_names(experiments[0].config.log_to))
    with contextlib.ExitStack() as stack:
        for _, workdir in points:
            stack.enter_context(locked(workdir))
        stack.enter_context(jax.default_matmul_precision(experiments[0].config.matmul_precision))
        return _train(experiments, [workdir for _, workdir in points], stack)


def _train(experiments: Sequence[Experiment], workdirs: Sequence[Path], stack: contextlib.ExitStack) -> bool:
    # Data and models: what members have in common is read once.
    ready, tokenizer = [], None
    for one, workdir in zip(experiments, workdirs, strict=True):
        one, tokenizer = fitted(one, workdir, tokenizer)
        ready.append(one)
    config, mesh = ready[0].config, make_mesh(ready[0].config.mesh)
    if mesh.size > 1:
        raise UserError(
            f"members of one program are on one device, and this process sees {mesh.size}; let each program see one of "
            "them with --devices=0,1,..., or use --together=off"
        )
    runs = [
        Run(one, workdir, tokenizer, data, began, stack)
        for one, workdir, (data, began) in zip(
            ready, workdirs, assembled(ready, workdirs, tokenizer, mesh), strict=True
        )
    ]

    # State: all at the step where all can go on. A member that has ended keeps its place, and nobody looks at it.
    start = common_step([run for run in runs if not (has_failed(run) or is_complete(run))])
    streams: dict[tuple[int, int], int] = {}  # data and seed -> number
    stream_of = [streams.setdefault((id(run.began.training), run.experiment.config.seed), len(streams)) for run in runs]
    program, state = put_together(runs, mesh, stream_of)
    state = state._replace(step=jax.device_put(np.int32(start), state.step.sharding))
    live = [k for k, run in enumerate(runs) if not has_failed(run)]
    for k in live:
        if why := runs[k].cannot_go_on():
            raise UserError(f"{runs[k].workdir} is trained to step {runs[k].start}, and {why}; use another --workdir")
        runs[k].open_files(stack)

    # Loop, as that of a run alone.
    evaluate = make_evaluation(ready, [run.began for run in runs], workdirs, tokenizer, mesh, members=True)
    longest = max(run.total for run in runs)
    firsts = [runs[stream_of.index(number)] for number in range(len(streams))]
    sets = alike([run.began.training for run in firsts])
    orders = [
        train_order(data, **order_of(one.experiment), stop=longest) for one, data in zip(firsts, sets, strict=True)
    ]
    batches = packed_ahead(lambda n: batches_of(sets, [order(n) for order in orders]), start, longest)
    meters = meters_of([sets[number] for number in stream_of], program, state)
    timer = checkpoint.Timer(config.save_steps)
    log = Log(runs, live, stack.enter_context(Progress(longest, "step", start=start)))
    note(f"{len(runs)} runs in one program, {len(live)} to go on with")
    for line in dict.fromkeys(line for k in live for line in announcement(runs[k])):  # once what several would say
        note(line)

    complete = [k for k in live if runs[k].over(runs[k].start)]

    def settle(step: int, evaluating: Sequence[int], saving: bool = False) -> None:
        """Evaluates members, saves all if it is time to, and concludes those that end here or ended long ago."""
        steps = {k: runs[k].start if k in complete else step for k in live}
        means = evaluate(state, [steps[k] if k in evaluating else None for k in range(len(runs))]) if evaluating else []
        for k, at in steps.items():
            if k in evaluating:
                try:
                    runs[k].evaluated(at, means[k])
                except UserError as error:
                    give_up(runs[k], at, error)
                    live.remove(k)
                    continue
            if runs[k].over(at):
                conclude(runs[k], program.take(state, k)._replace(step=np.int32(at)))
                live.remove(k)
            elif saving:
                runs[k].save(program.take(state, k))

    settle(start, [k for k in live if k in complete or runs[k].to_evaluate_first()])
    step = start
    with stop_signal() as stop, contextlib.closing(log):
        for step, batch in enumerate(meters[0].waited(batches), start + 1):
            if not live:
                break
            on_devices = program.place(batch)
            state, metrics = program.step(state, on_devices)
            rates = {}
            for k, meter in enumerate(meters):
                meter.add(batch._replace(index=batch.index[stream_of[k]]), on_devices)
                if step in (1, runs[k].total) or due(step, config.log_steps):
                    meter.waiting = meters[0].waiting
                    rates[k] = meter.read()
            log.flush()
            log.put(step, metrics, rates)
            if stop.is_set():
                break
            ending = [k for k in live if step == runs[k].total]
            evaluating, saving = evaluates_and_saves(config, step, timer.due(bool(rates)))
            if ending or evaluating or saving:
                log.flush()
                with contextlib.ExitStack() as pause:
                    for meter in meters:
                        pause.enter_context(meter.paused())
                    settle(step, live if evaluating else ending, saving)
                    if saving:
                        timer.saved()
        log.flush()
        for k in live:
            runs[k].save(program.take(state, k))
        for k in live:
            runs[k].checkpoints.wait()
    if live:
        note(f"stopped at step {step} of {longest}, saved; the same command goes on from there")
    return bool(live)


# What they begin with


def data_key(experiment: Experiment) -> str:
    """The same for experiments with `shared_fields` in common that train on the same pairs."""
    data, sources = experiment.plain["data"], experiment.sources_for("train")
    drawn = data["flip_labels"] or data["eval_fraction"] or data["pairs"] != WHICH_PAIRS[0]
    drawn = drawn or len(sources) > 1 or any(source.fraction < 1 for source in experiment.sources)
    return json.dumps([data, experiment.config.seed if drawn else None], sort_keys=True, default=str)


def assembled(
    experiments: Sequence[Experiment], workdirs: Sequence[Path], tokenizer: Any, mesh: jax.sharding.Mesh
) -> list[tuple[Data, Assembled]]:
    """For each run its pairs and what it begins with. The same pairs are read once, and all have one reference."""
    parts: dict[str, tuple[Data, Assembled]] = {}
    out: list[tuple[Data, Assembled]] = []
    for one, workdir in zip(experiments, workdirs, strict=True):
        key = data_key(one)
        if key not in parts:
            data = weigh_tokens(one, load_pairs(one, tokenizer), tokenizer, mesh, workdir)
            began = assemble(one, data, tokenizer, mesh, workdir)
            if parts:
                first = out[0][1]
                began = began._replace(model=first.model, reference=first.reference, started=first.started)
            parts[key] = data, began
        data, began = parts[key]
        if began.lora and not one.config.lora.path:
            began = began._replace(params=new_adapters(one, began.lora, began.reference, mesh))
        out.append((data, began))
    return out


def put_together(runs: Sequence[Run], mesh: jax.sharding.Mesh, stream_of: Sequence[int]) -> tuple[Program, TrainState]:
    """The program of some runs, and their states in one: where each stopped, or its beginning."""
    model, reference = runs[0].began.model, runs[0].began.reference
    numbers = numbers_of([run.experiment for run in runs], [len(run.data.training) for run in runs])
    program = state = None
    for k, run in enumerate(runs):
        optimizer = optimizer_of(run.experiment, lambda step: 0.0)
        params = jax.tree.map(jnp.copy, run.began.params)  # others have them too, and a checkpoint replaces them
        own = init_state(
            params, optimizer, mesh, reference, run.experiment.loss.running, model.rules, run.experiment.averaged
        )
        if program is None:
            program = make_program([run.experiment for run in runs], numbers, model, mesh, own, stream_of)
            state = program.empty(reference)
        state = program.put(state, k, own if has_failed(run) else run.restored(own))
    return program, state


def meters_of(sets: Sequence[Any], program: Program, state: TrainState) -> list[Meter]:
    """A meter for each member, of its share of the program's time and operations."""
    abstract, known = shapes_of(state), {}

    def flops_of(batch: PreferenceBatch) -> int:
        shapes = str(jax.tree.map(jnp.shape, batch))
        if shapes not in known:
            known[shapes] = count_flops(program.step, abstract, shapes_of(batch))
        return known[shapes]

    return [Meter(data, flops_of, members=len(sets)) for data in sets]


# How they end


def has_failed(run: Run) -> bool:
    """Whether it has diverged."""
    return (run.workdir / FAILED).exists()


def is_complete(run: Run) -> bool:
    """Whether its last step is saved, or the one at which early stopping has ended it."""
    step = checkpoint.newest(run.checkpoints)
    return step is not None and (step == run.total or run.stops_early(step))


def common_step(runs: Sequence[Run]) -> int:
    """The last step that all have saved, 0 for none; what a killed program saved of some after it is removed."""
    while len({checkpoint.newest(run.checkpoints) or 0 for run in runs}) > 1:
        last = min(checkpoint.newest(run.checkpoints) or 0 for run in runs)
        for run in runs:
            run.checkpoints.remove_after(last)
    return max((checkpoint.newest(run.checkpoints) or 0 for run in runs), default=0)


def conclude(run: Run, state: TrainState) -> None:
    """What comes after the last step of a run."""
    run.save(state)
    run.checkpoints.wait()
    run.finish(state)


def give_up(run: Run, step: int, error: UserError) -> None:
    """Writes down why a run does not go on."""
    run.failed = True
    write_json(run.workdir / FAILED, {"step": step, "error": str(error)})
    note(f"{run.workdir.name}: {error}; the others go on")


class Log:
    """The metrics of the members' steps, fetched when the next step is already running.

    Args:
      runs: all members.
      live: the numbers of those that go on; one that diverges is taken out.
      progress: takes every step.
    """

    def __init__(self, runs: Sequence[Run], live: list[int], progress: Progress):
        self.runs, self.live, self.progress = runs, live, progress
        self.waiting: tuple[int, dict[str, jax.Array], dict[int, dict[str, float]]] | None = None

    def put(self, step: int, metrics: dict[str, jax.Array], rates: dict[int, dict[str, float]]) -> None:
        """Keeps a step's metrics [K] until `flush`; those of members with rates are written."""
        self.waiting = step, metrics, rates

    def flush(self) -> None:
        """Fetches what waits and writes it; notes which members have diverged."""
        if self.waiting is None:
            return
        (step, metrics, rates), self.waiting = self.waiting, None
        columns, losses = jax.device_get(metrics), []
        for k in [*self.live]:
            values = {name: float(column[k]) for name, column in columns.items()}
            if k in rates:
                self.runs[k].logged(step, values | rates[k])
            try:
                check_finite(step, values)
                losses.append(values["loss"])
            except UserError as error:
                give_up(self.runs[k], step, error)
                self.live.remove(k)
        self.progress.update(step, {"mean loss": float(np.mean(losses))} if losses else {})

    def close(self) -> None:
        """Ends the line of progress."""
        self.progress.close()
