"""A whole run, readable from top to bottom: data, model, loop, checkpoints, export."""

from __future__ import annotations

import contextlib
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from prefalign_jax import checkpoint
from prefalign_jax.assemble import adapters_of, drawn_dtype, load_model, step_of, with_reference
from prefalign_jax.cost.flops import count_flops
from prefalign_jax.cost.throughput import Meter
from prefalign_jax.data.chat import load_tokenizer
from prefalign_jax.data.datasheet import as_markdown, make_datasheet, write_datasheet
from prefalign_jax.data.pairs import digest_of
from prefalign_jax.data.pipeline import make_pair_set, train_batches
from prefalign_jax.evaluation.held_out import evaluate, summary
from prefalign_jax.evaluation.policy_samples import draw, measure, scorer_of
from prefalign_jax.experiment import Experiment, read
from prefalign_jax.export import export, hub_token, push
from prefalign_jax.files import locked, write_json
from prefalign_jax.generation.sample_files import write_jsonl
from prefalign_jax.load_data import load_pairs, load_prompts
from prefalign_jax.metrics import open_writer, read_metrics
from prefalign_jax.models.decoder import cast
from prefalign_jax.models.endings import stop_ids
from prefalign_jax.models.hf_io import (
    load_config,
    resolve,
)
from prefalign_jax.models.lora import full_parameters, init_adapters, join, merge
from prefalign_jax.models.peft_io import save_adapters
from prefalign_jax.optim import make_schedule
from prefalign_jax.options import did_you_mean
from prefalign_jax.pages import plots
from prefalign_jax.processes import agreed, by_first, is_first, note, stop_requested, stop_signal
from prefalign_jax.progress import Progress
from prefalign_jax.reference import params_digest
from prefalign_jax.sharding import born, make_mesh, packing_of, param_shardings, place_batch, shapes_of
from prefalign_jax.train_step import init_state, make_eval_step
from prefalign_jax.types import LanguageModel, Params, UserError


class Result(NamedTuple):
    """What a run leaves in memory: its last step, whether it was told to stop, and its evaluation before and after."""

    step: int
    stopped: bool
    before: dict[str, float]
    after: dict[str, float]
    model: LanguageModel
    params: Params
    tokenizer: Any


def train(config: ConfigDict, workdir: str | Path) -> Result:
    """Trains, from data to an exported model; goes on where an earlier run in the same directory stopped.

    Args:
      config: with the fields of config.defaults.
      workdir: gets config.json, datasheet.json, datasheet.md, metrics.jsonl, eval.jsonl, checkpoints/, curves.png and,
        at the end, export/.

    Returns:
      The `Result`.

    Raises:
      UserError: for a mistake in the config, the data or the model, before any step is taken.
    """
    experiment = read(config)
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
    mesh = make_mesh(experiment.config.mesh)

    # Data: records -> pairs of token ids.
    # A model that does not fit is found before a long reading of data.
    experiment = experiment.fitted(load_config(resolve(experiment.config.model.path)).max_position)
    config, plain, loss = experiment.config, experiment.plain, experiment.loss
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template)
    data = load_pairs(experiment, tokenizer)
    train_pairs, eval_pairs = data.training, data.held_out
    digests = {"training pairs": digest_of(train_pairs)}

    # Model: the policy, sets that know how to make batches for it, and what the loss compares it with.
    reward = "reward" in loss.needs
    adapters, lora = adapters_of(config, reward, len(tokenizer))
    model, params = load_model(config, config.model.path, mesh, len(tokenizer), config.model.random_init, reward, lora)
    packing = dict(layout=experiment.layout, row_length=config.data.row_length, attends=model.attends)
    packing |= packing_of(mesh)
    share = config.batch_size // config.micro_steps
    train_set = make_pair_set(train_pairs, config.batch_size, micro_steps=config.micro_steps, **packing)
    eval_set = make_pair_set(eval_pairs, share, **packing) if eval_pairs else None
    about = dict(
        read=data.read_from, stages=data.stages, steps=experiment.cleaning, mixture=data.sources, chat=data.chat
    )
    about |= dict(kind=loss.kind, tokenizer=tokenizer, digest=digests["training pairs"])
    datasheet = make_datasheet(plain, train_set, **about)
    if config.model.router_weight and model.routed is None:
        raise UserError(
            f"model.router_weight={config.model.router_weight} applies to mixtures of experts; this is none"
        )
    digests["weights in model.path"] = params_digest(params)
    frozen = None
    if config.reference.path:
        other, frozen = load_model(config, config.reference.path, mesh, len(tokenizer))
        if other.config != model.config:
            raise UserError(
                f"reference.path={config.reference.path!r} has another shape than model.path; they must match"
            )
        digests["weights in reference.path"] = params_digest(frozen)
    elif lora:  # what the adapters are added to, and the reference
        frozen = params
    elif config.reference.kind != "none":
        frozen = jax.tree.map(jnp.copy, params)  # the step donates the policy's buffers
    if config.reference.kind == "copy" and frozen is not None and not lora:
        frozen = cast(frozen, config.dtype)  # half the memory in bfloat16, the same log-probabilities
    # Samples are compared with where the run began, which the step keeps if that is the reference.
    started = None
    questions = load_prompts(config.samples.prompts, config.samples.limit) if config.samples.prompts else []
    score = scorer_of(config.samples.reward) if config.samples.reward else None
    if questions and config.samples.reference:
        started = load_model(config, config.samples.reference, mesh, len(tokenizer))
    elif questions and not lora and (config.reference.path or config.reference.kind != "copy"):
        started = model, jax.tree.map(jnp.copy, params)
    if adapters:
        adapters = {**full_parameters(params, lora, drawn_dtype(config)), **adapters}
        adapters = jax.device_put(adapters, param_shardings(mesh, adapters))
        frozen = join(frozen, adapters)
        digests["adapters in lora.path"] = params_digest(adapters)
    if config.reference.kind == "cached":
        directory = Path(config.reference.cache_dir or workdir / "reference")
        weights = digests.get("weights in reference.path", digests["weights in model.path"])
        if adapters:  # the reference has them, at this scale
            weights += f" {digests['adapters in lora.path']} {lora}"
        train_set, eval_set = (
            set_ and with_reference(set_, model, frozen, weights, config, mesh, directory, loss.needs)
            for set_ in (train_set, eval_set)
        )
        frozen = frozen if lora else None  # its memory is free again
    if lora:
        key = jax.random.key(config.seed)
        make = functools.partial(init_adapters, key, lora=lora, dtype=drawn_dtype(config))
        params = jax.tree.map(jnp.copy, adapters) or born(mesh, make, frozen)

    # Optimizer, state, steps.
    total = experiment.total_steps(len(train_pairs))
    profile = experiment.profiled
    if profile and profile[-1] > total:
        raise UserError(f"profile_steps={config.profile_steps!r} ends after the {total} steps of the run")
    warmup = experiment.warmup_steps(len(train_pairs))
    schedule = make_schedule(config.schedule, config.learning_rate, warmup, total)
    optimizer, train_step = step_of(experiment, model, mesh, schedule)
    every = config.reference.every if config.reference.kind == "moving" else 0
    if every >= total:
        raise UserError(f"reference.every={every} is not reached in a run of {total} steps; write a smaller one")
    eval_step = make_eval_step(model, loss, mesh, config.vocabulary_chunk)

    # Where an earlier run in this directory stopped, or the beginning.
    checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints", **config.checkpoint)
    stack.callback(checkpoints.close)
    state = init_state(params, optimizer, mesh, frozen, loss.running, model.rules)
    del params  # a saved state takes their place
    state = checkpoint.restore(checkpoints, state, plain, digests)
    if is_first():
        write_json(workdir / "config.json", {**plain, "steps": total})  # not before it is known to be this run's
        write_datasheet(workdir, datasheet)
    start = int(state.step)
    kept = start if start < total else start - 1  # a complete run's last evaluation is made again
    writer = open_writer(workdir, tensorboard=config.tensorboard, resume_step=start)
    eval_writer = open_writer(workdir, "eval", tensorboard=config.tensorboard, resume_step=kept)
    stack.callback(writer.close)
    stack.callback(eval_writer.close)
    pairs = f"{len(train_pairs)} {loss.unit}, {len(eval_pairs)} held out"
    resumed = f", resumed at step {start}" if 0 < start < total else ", already complete" if start else ""
    note(f"{loss.name}: {pairs}, {total} steps of {config.batch_size}{resumed}")

    def draw_now(step: int) -> dict[str, float]:
        policy = model.join(state.reference, state.params) if model.join else state.params
        stop_tokens = stop_ids(resolve(config.model.path), tokenizer)
        options = dict(stop_tokens=stop_tokens, per_prompt=config.samples.per_prompt, seed=config.seed)
        drawn = draw(model, policy, tokenizer, questions, config.samples, **options)
        means, scores = measure(drawn, config.samples, score, started or (model, state.reference), mesh)
        rows = [
            {"prompt": prompt, "response": text, "model": workdir.name, "step": step, "seed": config.seed}
            for prompt, text in zip(drawn.prompts, drawn.texts, strict=True)
        ]
        if scores is not None:
            rows = [{**row, "reward": float(value)} for row, value in zip(rows, scores, strict=True)]
        if is_first():
            write_jsonl(workdir / "samples" / f"{step}.jsonl", rows)
        return means

    def evaluate_now(step: int) -> dict[str, float]:
        means = {}
        if eval_set is not None:
            means = summary(evaluate(eval_step, loss, state.params, state.reference, eval_set, state.running))
        if questions:
            means |= draw_now(step)
        if not means:
            return {}
        best = config.checkpoint.best_metric
        if best and best not in means:
            hint = did_you_mean(best, means)
            raise UserError(f"checkpoint.best_metric={best!r} is not measured; {hint}there are {', '.join(means)}")
        if best and not math.isfinite(means[best]):
            raise UserError(f"{best} is {means[best]} at step {step}, and checkpoint.best_metric needs a number")
        eval_writer.write(step, means)
        return means

    def save(metrics: dict[str, float] | None = None) -> None:
        checkpoint.save(checkpoints, state, plain, digests, metrics)

    def due(step: int, every: int | None) -> bool:
        return bool(every) and step % every == 0

    # At the start, and where the earlier run was stopped after the step but before its evaluation.
    evaluated = agreed([row["step"] for row in read_metrics(workdir / "eval.jsonl")])
    if start == 0 or (due(start, config.eval_steps) and start not in evaluated and start < total):
        evaluate_now(start)
    progress = stack.enter_context(Progress(total, "step", start=start))
    abstract = shapes_of(state)
    meter = Meter(train_set, lambda batch: count_flops(train_step, abstract, shapes_of(batch)))
    waiting = None  # the step whose metrics are not yet fetched
    step, means = start, {}
    order = dict(seed=config.seed, shuffle=config.data.shuffle, balance=config.data.balance)
    batches = train_batches(train_set, **order, start=start, stop=total)
    if profile and profile[0] <= start:
        note(f"profile_steps={config.profile_steps}: passed already, nothing is traced")
        profile = range(0)
    with stop_signal() as stop, contextlib.ExitStack() as trace:
        for step, batch in enumerate(meter.waited(batches), start + 1):
            if step in profile[:1]:
                jax.block_until_ready(state)
                trace.enter_context(jax.profiler.trace(workdir / "profile", create_perfetto_trace=True))
            on_devices = place_batch(mesh, batch)
            state, metrics = train_step(state, on_devices)
            meter.add(batch, on_devices)
            if step in profile[-1:]:
                jax.block_until_ready(state)
                trace.close()
                note(f"steps {profile[0]} to {profile[-1]} traced in {workdir / 'profile'}")
            # Step n runs while the host reads step n - 1: the device never waits for logging.
            if waiting:
                log(*waiting, writer, progress)
            logged = step in (1, total) or step % config.log_steps == 0
            waiting = (step, metrics, meter.read() if logged else None)
            if stop.is_set() or stop_requested(step) or step == total:
                break
            evaluating = due(step, config.eval_steps)
            # Only what is saved can be the best.
            saving = due(step, config.save_steps) or (evaluating and config.checkpoint.best_metric)
            if evaluating or saving:
                # The line of this step must be on disk before its checkpoint: a resumed run starts after it.
                log(*waiting, writer, progress)
                waiting = None
                with meter.paused():
                    means = evaluate_now(step) if evaluating else {}
                    if saving:
                        save(means or None)
        if waiting:
            log(*waiting, writer, progress)
        progress.close()
        if step < total:
            save()
        else:
            means = evaluate_now(step)
            save(means or None)
        checkpoints.wait()

    evaluations = agreed(read_metrics(workdir / "eval.jsonl"))
    before = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else {}
    params = merge(state.reference, state.params, lora) if lora else state.params
    result = Result(step, step < total, before, means, model, params, tokenizer)
    if result.stopped:
        note(f"stopped at step {step} of {total}, saved; the same command goes on from there")
        return result
    if is_first():
        plots.plot_curves(workdir)
    if config.export.enabled:
        card = {
            "base_model": config.model.path,
            "loss": loss.name,
            "formula": loss.formula,
            "hyper_parameters": loss.hyper,
            "data": as_markdown(datasheet, level=3),
            "metrics": means,
            "config": plain,
        }
        export(params, model.config, tokenizer, workdir / "export", dtype=config.export.dtype, card=card)
        note(f"exported to {workdir / 'export'}")
        if config.export.push_to:
            by_first(lambda: note(f"pushed to {push(workdir / 'export', config.export.push_to)}"))
        if lora:
            try:
                options = dict(base=config.model.path, quantized=config.model.quantize)
                save_adapters(state.params, model.config, lora, workdir / "adapters", **options)
                note(f"adapters in PEFT's format in {workdir / 'adapters'}")
            except UserError as error:  # the format lacks such layers; the merged export has them
                note(str(error))
    return result


def log(
    step: int, metrics: dict[str, jax.Array], rates: dict[str, float] | None, writer: Any, progress: Progress
) -> None:
    """Fetches one step's metrics, which waits for that step; writes them with its rates if it is a logged step."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if rates is not None:
        writer.write(step, values | rates)
    if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
        raise UserError(
            f"diverged at step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; "
            "try a lower learning_rate or a longer warm-up (the last checkpoint is kept)"
        )
    progress.update(step, {"loss": values["loss"]})
