"""A whole run, readable from top to bottom: data, model, loop, checkpoints, export."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from prefalign_jax import checkpoint, report
from prefalign_jax.config import cleaning_of, duration, given, kind_of, loss_of, profiled, resolved, validate
from prefalign_jax.data.chat import iter_pairs, load_tokenizer
from prefalign_jax.data.cleaning import BoundStep, Stage, benchmark_names, clean
from prefalign_jax.data.mixture import (
    Source,
    in_proportion,
    leaked,
    prompt_key,
    prompt_keys,
    source_digest,
    sources_of,
)
from prefalign_jax.data.mixture import source_records as mixture_records
from prefalign_jax.data.packing import Layout
from prefalign_jax.data.pairs import Origin, Pairs, digest_of, from_list
from prefalign_jax.data.pipeline import PairSet, make_pair_set, mismatched, train_batches
from prefalign_jax.data.records import Record, Text, ascii_quotes, flip_labels, iter_prompts, read_prompts
from prefalign_jax.data.records import draw as draw_number
from prefalign_jax.data.rows import content_digest, count_rows, read_rows
from prefalign_jax.data.token_cache import Made, cached_tokens, token_key
from prefalign_jax.datasheet import ReadFrom, as_markdown, make_datasheet, read_from, write_datasheet
from prefalign_jax.drawn import draw, measure, scorer_of
from prefalign_jax.evaluate import evaluate, summary
from prefalign_jax.export import export, hub_token, push
from prefalign_jax.files import user_cache, write_json
from prefalign_jax.flops import count_flops
from prefalign_jax.generate import stop_ids
from prefalign_jax.losses import BoundLoss
from prefalign_jax.metrics import Progress, device_memory, open_writer
from prefalign_jax.models.decoder import DecoderConfig, Placement, cast, make_decoder
from prefalign_jax.models.dropout import Dropout
from prefalign_jax.models.hf_io import (
    load_config,
    load_params,
    pad_vocabulary,
    resize_embeddings,
    resolve,
)
from prefalign_jax.models.lora import Lora, init_adapters, join, merge
from prefalign_jax.models.peft_io import load_adapters, save_adapters
from prefalign_jax.models.quantize import quantize_params
from prefalign_jax.names import did_you_mean
from prefalign_jax.optim import in_float32, make_optimizer, make_schedule
from prefalign_jax.processes import agreed, by_first, is_first, note, stop_requested
from prefalign_jax.reference import cache_key, cached, compute, mover, params_digest
from prefalign_jax.runs import read_metrics
from prefalign_jax.samples import write_jsonl
from prefalign_jax.sharding import born, deal_experts, make_mesh, packing_of, param_shardings, place_batch, spread
from prefalign_jax.train_step import init_state, make_eval_step, make_train_step
from prefalign_jax.types import LanguageModel, PairLogps, Params, PreferenceBatch, UserError

SHOWN = 10_000  # records that are cleaned and tokenized too quickly to show
ROLES = {"train": "training", "eval": "held out", "test": "test set, kept out"}  # of sources, by their use
CHUNK = 8192  # pairs tokenized before they are written


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
    validate(config)
    if config.export.push_to:
        hub_token(config.export.push_to)  # that it is missing is said now, not after the training
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        by_first(lambda: stack.enter_context(locked(workdir)))
        if not workdir.is_dir():
            raise UserError(f"--workdir={workdir} is not on a file system that all processes share; use one that is")
        stack.enter_context(jax.default_matmul_precision(config.matmul_precision))
        return _train(config, workdir, stack)


def _train(config: ConfigDict, workdir: Path, stack: contextlib.ExitStack) -> Result:
    loss = loss_of(config)
    mesh = make_mesh(config.mesh)
    plain = resolved(config)

    # Data: records -> pairs of token ids.
    load_config(resolve(config.model.path))  # a model that does not fit is found before a long reading of data
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template)
    data = load_pairs(config, loss, tokenizer)
    train_pairs, eval_pairs = data.training, data.held_out
    digests = {"training pairs": digest_of(train_pairs)}

    # Model: the policy, sets that know how to make batches for it, and what the loss compares it with.
    reward = "reward" in loss.needs
    adapters, lora = adapters_of(config, reward)
    model, params = load_model(config, config.model.path, mesh, len(tokenizer), config.model.random_init, reward, lora)
    packing = dict(layout=layout_of(config, loss), row_length=config.data.row_length, attends=model.attends)
    packing |= packing_of(mesh)
    share = config.batch_size // config.micro_steps
    train_set = make_pair_set(train_pairs, config.batch_size, micro_steps=config.micro_steps, **packing)
    eval_set = make_pair_set(eval_pairs, share, **packing) if eval_pairs else None
    about = dict(
        read=data.read_from, stages=data.stages, steps=cleaning_of(config), mixture=data.sources, chat=data.chat
    )
    about |= dict(kind=kind_of(loss), tokenizer=tokenizer, digest=digests["training pairs"])
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
        adapters = {**({"score": params["score"]} if reward else {}), **adapters}  # trained in full, new or not
        adapters = jax.device_put(adapters, param_shardings(mesh, adapters))
        frozen = join(frozen, adapters)
        digests["adapters in lora.path"] = params_digest(adapters)
    if config.reference.kind == "cached":
        directory = Path(config.reference.cache_dir or workdir / "reference")
        weights = digests.get("weights in reference.path", digests["weights in model.path"])
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
    total = duration(config, "", len(train_pairs)) or max(1, len(train_pairs) // config.batch_size)
    profile = profiled(config)
    if profile and profile[-1] > total:
        raise UserError(f"profile_steps={config.profile_steps!r} ends after the {total} steps of the run")
    warmup = duration(config, "warmup", len(train_pairs)) or 0
    schedule = make_schedule(config.schedule, config.learning_rate, warmup, total)
    optimizer, train_step = step_of(config, model, loss, mesh, schedule)
    every = plain["reference"]["every"] if config.reference.kind == "moving" else 0
    if every >= total:
        raise UserError(f"reference.every={every} is not reached in a run of {total} steps; write a smaller one")
    eval_step = make_eval_step(model, loss, mesh, config.vocabulary_chunk)

    # Where an earlier run in this directory stopped, or the beginning.
    checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints", **config.checkpoint)
    stack.callback(checkpoints.close)
    state = init_state(params, optimizer, mesh, frozen, loss.running, model.rules)
    state = checkpoint.restore(checkpoints, state, plain, digests)
    if is_first():
        write_json(workdir / "config.json", {**plain, "steps": total})  # not before it is known to be this run's
        write_datasheet(workdir, datasheet)
    del params
    start = int(state.step)
    kept = start if start < total else start - 1  # a complete run's last evaluation is made again
    writer = open_writer(workdir, tensorboard=config.tensorboard, resume_step=start)
    eval_writer = open_writer(workdir, "eval", tensorboard=config.tensorboard, resume_step=kept)
    stack.callback(writer.close)
    stack.callback(eval_writer.close)
    pairs = f"{len(train_pairs)} {unit_of(loss)}, {len(eval_pairs)} held out"
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
    progress = Progress(total, "step")
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
        report.plot_curves(workdir)
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
                save_adapters(state.params, model.config, lora, workdir / "adapters", base=config.model.path)
                note(f"adapters in PEFT's format in {workdir / 'adapters'}")
            except UserError as error:  # the format lacks such layers; the merged export has them
                note(str(error))
    return result


class Data(NamedTuple):
    """What a run is trained and evaluated on, and what became of the rest.

    Attributes:
      training, held_out: the pairs.
      dropped: for 'training' and 'held out' the counts by reason.
      sources: of a mixture's training sources what each gave: its pairs, share and dropped counts.
      read_from: every file or data set that was read, benchmarks of the cleaning included.
      stages: for 'training' and 'held out' what became of the records, part by part.
      chat: whether there are messages, which go through the chat template.
    """

    training: Pairs
    held_out: Pairs
    dropped: dict[str, dict[str, int]]
    sources: list[dict[str, Any]]
    read_from: list[ReadFrom]
    stages: dict[str, list[Stage]]
    chat: bool


def load_pairs(config: ConfigDict, loss: BoundLoss, tokenizer: Any) -> Data:
    """Reads, holds out, cleans and tokenizes; says on stderr what was dropped and why.

    Args:
      config: its data fields, max_length, too_long and seed.
      loss: whether the rejected response is wanted.
      tokenizer: Hugging Face tokenizer.

    Returns:
      The `Data`.

    Raises:
      UserError: a malformed row, or nothing left to train on.
    """
    data, unit = config.data, unit_of(loss)
    sources = sources_of(data)
    training, counts = tokenized_sources([s for s in sources if s.use == "train"], tokenizer, config, loss, "training")
    others = [s for s in sources if s.use == "eval"]
    stages = stages_of(counts, "training")
    if others:
        held_out, more = tokenized_sources(others, tokenizer, config, loss, "held out")
        counts["held out"] = more["held out"]
        stages["held out"] = stages_of(more, "held out")["held out"]
    else:
        more = {"read": []}
        held_out, training = training.select(training.held_out), training.select(~training.held_out)
    counts["training"] += [step["dropped"] for step in counts["cleaning"]]
    if counts["flipped"]:
        note(f"labels of {counts['flipped']} of {counts['to flip']} training pairs flipped")

    # No prompt on both sides, whatever its case and spaces, and in whatever source.
    tests = [prompt_keys(source) for source in sources if source.use == "test"]
    if tests and (mask := leaked(held_out, np.concatenate(tests))).any():
        held_out = held_out.select(~mask)
        counts["held out"].append({"prompt of a test set": int(mask.sum())})
        stages["held out"].append(Stage("test sets", len(mask), len(held_out), counts["held out"][-1]))
    mask = leaked(training, np.concatenate([held_out.prompt_key, *tests]))
    if mask.any() and (data.leaks or ("report" if data.eval_path else "drop")) == "report":
        note(f"{mask.sum()} training {unit} have a prompt that is held out too; data.leaks=drop leaves them out")
    elif mask.any():
        training = training.select(~mask)
        counts["training"].append({"prompt held out": int(mask.sum())})
        stages["training"].append(Stage("held-out prompts", len(mask), len(training), counts["training"][-1]))

    if training:
        chosen = in_proportion(training.source, [s.weight for s in sources if s.use == "train"], config.seed)
        if len(chosen) < len(training):
            counts["training"].append({"beyond its source's weight": len(training) - len(chosen)})
            stages["training"].append(Stage("weights", len(training), len(chosen), counts["training"][-1]))
            training = training.select(chosen)
    dropped = {part: dict(added(counts[part])) for part in ("training", "held out")}
    reasons = {part: listed(some) for part, some in dropped.items()}
    changed = listed(added(step["repaired"] for step in counts["cleaning"]))
    changed = "" if changed == "none" else f"; changed {changed}"
    note(f"training data: {len(training)} {unit}; dropped {reasons['training']}{changed}")
    about = []
    if data.mix is not None:
        for number, source in enumerate(s for s in sources if s.use == "train"):
            there = int((training.source == number).sum())
            share = there / max(1, len(training))
            about.append({"source": str(source), unit: there, "share": share, "dropped": counts["training"][number]})
            note(f"  {source}: {there} ({share:.1%}); dropped {listed(counts['training'][number])}")
    if held_out or others:
        note(f"held out data: {len(held_out)} {unit}; dropped {reasons['held out']}")
    name = data.path or "data.mix"
    if not training:
        raise UserError(
            f"{name}: no {unit} left to train on, dropped {reasons['training']}; max_length is {config.max_length}"
        )
    if (others or data.eval_fraction) and not held_out:
        where = ", ".join(source.name for source in others) or name
        raise UserError(f"{where}: no held-out {unit} left; dropped {reasons['held out']}")
    if "mismatched" in loss.needs:
        training, held_out = mismatched(training, config.max_length), mismatched(held_out, config.max_length)
    rows = iter([*counts["read"], *more["read"]])
    kept = [source for use in ("train", "eval") for source in sources if source.use == use]
    places = [read_from(source.name, source.part, ROLES[source.use], next(rows)) for source in kept]
    places += [read_from(source.name, source.part, ROLES["test"]) for source in sources if source.use == "test"]
    places += [read_from(name, "test", "benchmark") for name in benchmark_names(cleaning_of(config))]
    return Data(training, held_out, dropped, about, places, stages, counts["chat"])


def stages_of(counts: Mapping[str, Any], which: str) -> dict[str, list[Stage]]:
    """What became of the records up to their tokenization, from the counts of `tokenized_sources`.

    Args:
      counts: of all its sources.
      which: 'training', of which a part may be held out, or 'held out'.
    """
    tokenized = {part: collections.Counter(counts["tokenized"][part]) for part in ("training", "held out")}
    every, reasons = sum(counts["read"]), dict(added(counts[which]) - tokenized[which])
    stages: dict[str, list[Stage]] = {"training": [], "held out": []}
    stages[which].append(Stage("read", every + sum(reasons.values()), every, reasons))
    if taken := counts["held"] + counts["over"]:
        stages["training"].append(Stage("hold out", every, every - taken, {"held out": taken}))
        others = {"for training": every - taken, "over data.eval_limit": counts["over"]}
        stages["held out"].append(Stage("hold out", every, counts["held"], others))
    stages["training"] += [Stage(**step) for step in counts["cleaning"]]
    if counts["to flip"]:
        flipped = {"flipped label": counts["flipped"]}
        stages["training"].append(Stage("flip labels", counts["to flip"], counts["to flip"], {}, flipped))
    for part, some in stages.items():
        if some:
            lost, before = dict(tokenized[part]), some[-1].after
            some.append(Stage("tokenize", before, before - sum(lost.values()), lost))
    return stages


def added(counts: Iterable[Mapping[str, int]]) -> collections.Counter:
    """Several counts by reason as one."""
    return sum(map(collections.Counter, counts), collections.Counter())


def listed(counts: Mapping[str, int]) -> str:
    """Counts by reason, in words."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count) or "none"


def tokenized_sources(
    sources: Sequence[Source], tokenizer: Any, config: ConfigDict, loss: BoundLoss, which: str
) -> tuple[Pairs, dict[str, Any]]:
    """The pairs of some sources, from the cache if they were tokenized before; many show their progress.

    Args:
      sources: read one after the other.
      tokenizer: Hugging Face tokenizer.
      config: its data fields, max_length, too_long and seed.
      loss: which records it takes.
      which: 'training' or 'held out', for the progress.

    Returns:
      (the pairs, those of the held-out prompts marked; for 'training' and 'held out' what each source lost by reason).
    """
    data, seed, kind = config.data, config.seed, record_kind(loss)
    steps = cleaning_of(config) if which == "training" else []
    options = dict(max_length=config.max_length, too_long=config.too_long, keep_end=data.keep_end)
    drawn = data.eval_fraction, data.flip_labels, data.eval_limit if data.eval_fraction else None
    path = None
    if data.cache_dir != "":
        directory = Path(data.cache_dir or user_cache() / "tokens")
        what = dict(
            sources=list(map(source_digest, sources)), kind=kind, drawn=drawn, ascii=data.ascii_quotes, **options
        )
        if any(drawn) or any(source.fraction < 1 for source in sources):
            what["seed"] = seed
        if steps:
            others = [source_digest(source) for source in sources_of(data) if source.use == "eval"]
            what["cleaning"] = steps, [content_digest(name, "test") for name in benchmark_names(steps)], others
        path = directory / f"{token_key(tokenizer, **what)}.arrow"

    def make() -> Made:
        counts = new_counts(len(sources))
        rows = [count_rows(source.name, source.part) for source in sources]
        progress = Progress(None if None in rows else sum(rows), f"{which} record")

        def chunks() -> Iterator[Pairs]:
            pairs = iter_pairs(source_records(sources, config, loss, counts, steps, progress), tokenizer, **options)
            while some := list(itertools.islice(pairs, CHUNK)):
                for record, pair in some:
                    if isinstance(pair, str):
                        part = "held out" if record.held_out else "training"
                        counts[part][record.source][pair] += 1
                        counts["tokenized"][part][pair] += 1
                kept = [(record, pair) for record, pair in some if not isinstance(pair, str)]
                origins = [Origin(r.source, r.held_out, prompt_key(r.prompt)) for r, _ in kept]
                yield from_list([pair for _, pair in kept], origins)
            progress.close()

        return chunks(), lambda: counts

    return cached_tokens(path, make)


def new_counts(sources: int) -> dict[str, Any]:
    """What is counted of some sources on the way to their pairs, nothing yet; JSON values.

    Returns:
      'training', 'held out': for each source the records lost, by reason; 'tokenized': of these those lost in
      tokenization; 'read': records of each source; 'held', 'over': records held out, and beyond the limit of those;
      'cleaning': the stages; 'flipped', 'to flip': labels; 'chat': whether there are messages.
    """
    counts: dict[str, Any] = {
        part: [collections.Counter() for _ in range(sources)] for part in ("training", "held out")
    }
    counts["tokenized"] = {part: collections.Counter() for part in ("training", "held out")}
    return (
        counts
        | {"read": [0] * sources, "cleaning": [], "chat": False}
        | dict.fromkeys(("held", "over", "flipped", "to flip"), 0)
    )


def source_records(
    sources: Sequence[Source],
    config: ConfigDict,
    loss: BoundLoss,
    counts: dict[str, Any],
    steps: Sequence[BoundStep] = (),
    progress: Progress | None = None,
) -> Iterator[Record]:
    """The records of some sources as they are tokenized: read, marked if held out, cleaned, labels flipped.

    Args:
      sources: read one after the other.
      config: its data fields and seed.
      loss: which records it takes.
      counts: of `new_counts`; added to as the iterator goes on.
      steps: of cleaning; with any, all records are read before the first one comes.
      progress: of the reading.
    """
    data, seed = config.data, config.seed
    kind = record_kind(loss)
    scored = any(step.step.scores for step in steps) and not kind["margin"]
    if scored:
        kind["margin"] = True

    def as_read() -> Iterator[Record]:
        done = itertools.count(1)
        fraction, limit = data.eval_fraction, data.eval_limit
        for number, source in enumerate(sources):
            part = "held out" if source.use == "eval" else "training"
            for record in mixture_records(source, number, counts[part][number], seed=seed, **kind):
                counts["read"][number] += 1
                if progress and (count := next(done)) % 1024 == 0 and count > SHOWN:
                    progress.update(count)
                if fraction and source.use == "train" and draw_number(seed, record.prompt) < fraction:
                    if limit and counts["held"] >= limit:
                        counts["over"] += 1
                        continue
                    counts["held"] += 1
                    record = record._replace(held_out=True)
                yield record._replace(margin=math.nan) if scored and record.held_out else record
            if not counts["read"][number]:
                reasons = listed(counts[part][number]).replace("none", "there was no row")
                raise UserError(f"{source.name}: no record is left ({reasons})")

    def cleaned() -> Iterator[Record]:
        records = list(as_read())
        held_out = [record for record in records if record.held_out]
        prompts = [record.prompt for record in held_out]
        for source in sources_of(data):
            if source.use == "eval" and any(step.options.get("held_out_too") for step in steps):
                prompts += [
                    one.prompt for one in iter_prompts(read_rows(source.name, source.part), collections.Counter())
                ]
        kept, stages = clean([record for record in records if not record.held_out], steps, prompts, watched)
        counts["cleaning"] = [stage._asdict() for stage in stages]
        yield from held_out
        yield from (record._replace(margin=math.nan) if scored else record for record in kept)

    flip, ascii_ = data.flip_labels, data.ascii_quotes
    for record in cleaned() if steps else as_read():
        if flip and not record.held_out:
            (record,), flipped = flip_labels([record], flip, seed)
            counts["flipped"] += flipped
            counts["to flip"] += 1
        counts["chat"] = counts["chat"] or not isinstance(record.prompt, str)
        yield ascii_quotes(record) if ascii_ else record


def watched(records: list[Record], what: str) -> Iterable[Record]:
    """The records; of many it shows how far they were gone through."""
    if len(records) <= SHOWN:
        return records

    def shown() -> Iterator[Record]:
        progress = Progress(len(records), f"{what}: record")
        for number, record in enumerate(records, 1):
            yield record
            progress.update(number)
        progress.close()

    return shown()


def load_prompts(path: str, limit: int | None) -> list[Text]:
    """Reads prompts to sample from; says on stderr what was dropped and why."""
    prompts, dropped = read_prompts(path, limit=limit)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    note(f"{path}: {len(prompts)} prompts; dropped {reasons}")
    return [one.prompt for one in prompts]


def adapters_of(config: ConfigDict, reward: bool) -> tuple[Params | None, Lora | None]:
    """(adapters to go on from or None, what adapters are trained or None)."""
    if config.lora.path:
        shape = dataclasses.replace(load_config(resolve(config.model.path)), reward=reward)
        adapters, lora = load_adapters(config.lora.path, shape)
        return adapters, dataclasses.replace(lora, dropout=config.lora.dropout or 0.0)
    return None, Lora(**given(config.lora)) if config.lora.rank else None


def record_kind(loss: BoundLoss) -> dict[str, Any]:
    """Which records a loss takes, as options of `read_records`."""
    return dict(
        responses=("chosen", "rejected") if "rejected" in loss.needs else ("chosen",),
        unpaired="label" in loss.needs,
        margin="margin" in loss.needs,
    )


def layout_of(config: ConfigDict, loss: BoundLoss) -> Layout:
    """What of a pair a loss has laid out."""
    return Layout(
        tree=config.data.layout == "tree",
        rejected="rejected" in loss.needs,
        prompt="prompt" in loss.needs,
        after="after" in loss.needs,
        rewards="reward" in loss.needs,
    )


def unit_of(loss: BoundLoss) -> str:
    """What the loss counts: pairs, or the completions of unpaired data."""
    return "completions" if "label" in loss.needs else "pairs"


def drawn_dtype(config: ConfigDict) -> str:
    """The type of parameters that no file holds."""
    return "float32" if config.model.param_dtype == "stored" else config.model.param_dtype


def step_of(
    config: ConfigDict, model: LanguageModel, loss: BoundLoss, mesh: jax.sharding.Mesh, schedule: optax.Schedule
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """(optimizer, train step) of a config."""
    plain = resolved(config)
    optimizer = make_optimizer(plain["optimizer"], schedule, config.grad_clip)
    if config.model.stochastic_rounding:
        optimizer = in_float32(optimizer)
    moving = plain["reference"] if config.reference.kind == "moving" else None
    return optimizer, make_train_step(
        model,
        loss,
        optimizer,
        mesh,
        schedule=schedule,
        chunk=config.vocabulary_chunk,
        move_reference=moving and mover(moving["mixup"], moving["every"]),
        router_weight=config.model.router_weight,
        stochastic_rounding=config.model.stochastic_rounding,
        seed=config.seed,
    )


def decoder_of(
    config: ConfigDict, shape: DecoderConfig, mesh: jax.sharding.Mesh, lora: Lora | None = None
) -> LanguageModel:
    """The decoder of this shape, computed on a mesh as a config says; `lora` is of the adapters that it is to take."""
    if config.max_length > shape.max_position:
        raise UserError(f"max_length={config.max_length} exceeds the model's {shape.max_position} positions")
    options = dict(dtype=config.dtype, param_dtype=drawn_dtype(config), remat=config.model.remat, lora=lora)
    if config.model.attention == "cudnn":
        device = jax.devices()[0].device_kind
        if "NVIDIA" not in device:
            raise UserError(f"model.attention='cudnn' needs an NVIDIA GPU, and this is {device}; write 'tiles'")
        if mesh.shape["context"] > 1:
            raise UserError("model.attention='cudnn' takes whole rows; write 'tiles', or mesh.context=1")
    options |= dict(attention=config.model.attention, placement=Placement(spread(mesh), deal_experts(mesh)))
    return make_decoder(shape, **options, dropout=Dropout(config.model.dropout, config.model.attention_dropout))


def drawn_params(config: ConfigDict, shape: DecoderConfig, key: jax.Array) -> Params:
    """Parameters that no file holds, quantized if the config says so."""
    params, kind = make_decoder(shape, param_dtype=drawn_dtype(config)).init(key), config.model.quantize
    return quantize_params(params, kind) if kind else params


def load_model(
    config: ConfigDict,
    path: str,
    mesh: jax.sharding.Mesh,
    tokens: int,
    random_init: bool = False,
    reward: bool = False,
    lora: Lora | None = None,
) -> tuple[LanguageModel, Params]:
    """A model and its parameters on their shardings, the embeddings grown where the tokenizer has more tokens.

    Args:
      config: its model fields, dtype, max_length and seed.
      path: Hugging Face directory or hub name.
      mesh: the mesh.
      tokens: len(tokenizer).
      random_init: take only the shape from `path` and draw the parameters.
      reward: a reward head in place of the output embedding.
      lora: of the adapters that the model is to take; its parameters are frozen then, and keep the type of their file.

    Returns:
      (model, params), without adapters; the kernels quantized if the config says so.

    Raises:
      UserError: files are missing or do not fit, or max_length exceeds what the model was made for.
    """
    directory = resolve(path)
    shape = dataclasses.replace(load_config(directory), reward=reward)
    size, multiple = max(shape.vocab_size, tokens), config.model.pad_vocabulary
    grown = dataclasses.replace(shape, vocab_size=size, vocab_padding=-size % multiple)
    model = decoder_of(config, grown, mesh, lora)
    if random_init:
        return model, born(mesh, lambda: drawn_params(config, grown, jax.random.key(config.seed)))
    blank = jax.eval_shape(lambda: drawn_params(config, shape, jax.random.key(0)))
    options = dict(dtype="stored" if lora else config.model.param_dtype, quantize=config.model.quantize)
    params = load_params(directory, shape, shardings=param_shardings(mesh, blank), **options)
    if tokens > shape.vocab_size:
        note(f"embeddings grown from {shape.vocab_size} to {tokens} rows for the tokens added to the vocabulary")
    if grown != shape:
        tables = {name: params[name] for name in ("embed", "head") if name in params}

        def grow(tables: Params) -> Params:
            return pad_vocabulary(*resize_embeddings(tables, shape, size), multiple)[0]

        params = params | born(mesh, grow, tables)
    return model, params


def with_reference(
    data: PairSet,
    model: LanguageModel,
    params: Params,
    weights: str,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    directory: Path,
    needs: Set[str],
) -> PairSet:
    """The set with the reference's log-probabilities, from the cache or computed now; `weights` digests the params."""
    numbers = f"{config.dtype} {config.matmul_precision}"
    path = directory / f"{cache_key(model, weights, data.pairs, numbers, needs)}.npz"

    def make() -> PairLogps:
        progress = Progress(len(data.pairs), "reference pair")
        share = data.batch_size // data.micro_steps
        layout = data.layout._replace(prompt=False, after=False)
        packing = packing_of(mesh) | dict(row_length=config.data.row_length, attends=model.attends)
        plain = make_pair_set(data.pairs, share, layout=layout, **packing)
        options = dict(mesh=mesh, chunk=config.vocabulary_chunk, progress=progress.update, needs=needs)
        logps = compute(model, params, plain, **options)
        progress.close()
        return logps

    return data._replace(reference=cached(path, make))


class Meter:
    """Tokens, pairs, operations and seconds since the last logged step, counted on the host for all devices."""

    def __init__(self, data: PairSet, flops_of: Callable[[PreferenceBatch], int]):
        self.data = data
        self.flops_of, self.known = flops_of, {}  # a count for each shape of batch
        self.reset()

    def reset(self) -> None:
        """Counts from nothing, from now."""
        self.began = time.monotonic()
        self.steps = self.tokens = self.trained = self.positions = self.flops = 0
        self.waiting = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of what is no training, such as evaluation."""
        stopped = time.monotonic()
        yield
        self.began += time.monotonic() - stopped

    def waited(self, batches: Iterator[PreferenceBatch]) -> Iterator[PreferenceBatch]:
        """The batches; the time that they are waited for is counted."""
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.waiting += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def add(self, batch: PreferenceBatch, on_devices: PreferenceBatch) -> None:
        """Counts one batch, given as NumPy arrays and as it lies on the devices."""
        lengths = self.data.lengths.of(batch.index[batch.index >= 0])
        self.steps += 1
        self.tokens += int(lengths.pieces.sum())
        self.positions += on_devices.segments.size
        self.trained += int(lengths.trained.sum())
        shapes = on_devices.tokens.shape, on_devices.target.shape, on_devices.tiles.shape
        if shapes not in self.known:
            self.known[shapes] = self.flops_of(on_devices)
        self.flops += self.known[shapes]

    def read(self) -> dict[str, float]:
        """Rates since the last reading, and starts anew."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        out = {
            "step_time": seconds / self.steps,
            "pairs_per_second": self.steps * self.data.batch_size / seconds,
            "tokens_per_second": self.tokens / seconds,
            "trained_tokens_per_second": self.trained / seconds,
            "packing_efficiency": self.tokens / self.positions,
            "input_wait": self.waiting / seconds,
            "flops": self.flops,
            **device_memory(),
        }
        self.reset()
        return out


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


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets, so that the loop ends at a step and saves; a second Ctrl-C ends at once.

    Of several processes none may stop by itself: there JAX takes the SIGTERM, and `processes.stop_requested` tells all.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals reach only the main thread
        return

    def handle(number: int, frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT), handle)
    if jax.process_count() > 1:
        handlers = {signal.SIGINT: lambda number, frame: os.kill(os.getpid(), signal.SIGTERM)}
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def shapes_of(tree: Any) -> Any:
    """Shapes and types in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Makes the directory and holds it: two runs that write the same files would leave neither's.

    Args:
      workdir: of the run.

    Raises:
      UserError: it cannot be made, or another run holds it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however the process ends
        except OSError:
            raise UserError(f"--workdir={workdir}: another run is writing there; use another") from None
        yield
