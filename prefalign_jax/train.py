"""A whole run, readable from top to bottom: data, model, loop, checkpoints, export."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from prefalign_jax import checkpoint, report
from prefalign_jax import reference as reference_logps
from prefalign_jax.config import duration, loss_of, resolved, validate
from prefalign_jax.data.chat import load_tokenizer, tokenize_records
from prefalign_jax.data.packing import Layout
from prefalign_jax.data.pipeline import digest_of, make_pair_set, train_batches
from prefalign_jax.data.records import Record, ascii_quotes, read_records, split_by_prompt
from prefalign_jax.evaluate import evaluate, summary
from prefalign_jax.export import export
from prefalign_jax.losses import LOSSES, BoundLoss
from prefalign_jax.metrics import Progress, device_memory, open_writer
from prefalign_jax.models.decoder import make_decoder
from prefalign_jax.models.hf_io import load_config, load_params, resize_embeddings, resolve
from prefalign_jax.names import did_you_mean
from prefalign_jax.optim import make_optimizer, make_schedule
from prefalign_jax.sharding import groups_of, make_mesh, param_shardings
from prefalign_jax.train_step import init_state, make_eval_step, make_train_step
from prefalign_jax.types import LanguageModel, Pair, Params, UserError


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
      workdir: gets metrics.jsonl, eval.jsonl, checkpoints/, curves.png and, at the end, export/.

    Returns:
      The `Result`.

    Raises:
      UserError: for a mistake in the config, the data or the model, before any step is taken.
    """
    validate(config)
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    loss = loss_of(config)
    mesh = make_mesh(config.mesh)
    plain = resolved(config)

    # Data: records -> pairs of token ids -> sets that know how to make batches.
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template)
    train_pairs, eval_pairs, dropped = load_pairs(config, loss, tokenizer)
    layout = Layout(config.data.layout == "tree", "rejected" in loss.needs, "prompt" in loss.needs)
    packing = dict(groups=groups_of(mesh), layout=layout, row_length=config.data.row_length)
    share = config.batch_size // config.micro_steps
    train_set = make_pair_set(train_pairs, config.batch_size, micro_steps=config.micro_steps, **packing)
    eval_set = make_pair_set(eval_pairs, share, **packing) if eval_pairs else None

    # Model: the policy, and what the loss compares it with.
    model, params = load_model(config, config.model.path, mesh, len(tokenizer))
    frozen = None
    if config.reference.kind != "none":
        if config.reference.path:
            frozen = load_model(config, config.reference.path, mesh, len(tokenizer), like=model)[1]
        else:
            frozen = jax.tree.map(jnp.copy, params)  # the step donates the policy's buffers
    if config.reference.kind == "cached":
        directory = Path(config.reference.cache_dir or workdir / "reference")
        sets = [set_ and cached_reference(set_, model, frozen, config, directory) for set_ in (train_set, eval_set)]
        train_set, eval_set = sets
        frozen = None  # its memory is free again

    # Optimizer, state, steps.
    total = duration(config, "", len(train_pairs)) or max(1, len(train_pairs) // config.batch_size)
    warmup = duration(config, "warmup", len(train_pairs)) or 0
    schedule = make_schedule(config.schedule, config.learning_rate, warmup, total)
    optimizer = make_optimizer(plain["optimizer"], schedule, config.grad_clip)
    train_step = make_train_step(model, loss, optimizer, mesh, schedule=schedule, chunk=config.vocabulary_chunk)
    eval_step = make_eval_step(model, loss, config.vocabulary_chunk)
    digest = digest_of(train_pairs)

    with contextlib.ExitStack() as open_files:
        checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints", **config.checkpoint)
        open_files.callback(checkpoints.close)
        state = checkpoint.restore(checkpoints, init_state(params, optimizer, mesh, frozen), plain, digest)
        del params
        start = int(state.step)
        writer, eval_writer = (
            open_files.enter_context(
                contextlib.closing(open_writer(workdir, name, tensorboard=config.tensorboard, resume_step=start))
            )
            for name in ("metrics", "eval")
        )
        resumed = f", resumed at step {start}" if start else ""
        pairs = f"{len(train_pairs)} pairs, {len(eval_pairs)} held out"
        note(f"{loss.name}: {pairs}, {total} steps of {config.batch_size}{resumed}")

        def evaluate_now(step: int) -> dict[str, float]:
            if eval_set is None:
                return {}
            means = summary(evaluate(eval_step, state.params, state.reference, eval_set))
            best = config.checkpoint.best_metric
            if best and best not in means:
                raise UserError(
                    f"checkpoint.best_metric={best!r} is not measured; {did_you_mean(best, means)}there are "
                    f"{', '.join(means)}"
                )
            eval_writer.write(step, means)
            return means

        means = {}
        if start == 0 and eval_set is not None:
            means = evaluate_now(0)
        progress = Progress(total, "step")
        meter = Meter(config.batch_size)
        waiting = None  # the step whose metrics are not yet fetched
        batches = train_batches(train_set, seed=config.seed, shuffle=config.data.shuffle, start=start, stop=total)
        saved = {"config": plain, "data_digest": digest}
        step = start
        with stop_requested() as stop:
            for step, batch in enumerate(batches, start + 1):
                state, metrics = train_step(state, batch)
                meter.add(batch)
                # Step n runs while the host reads step n - 1: the device never waits for logging.
                if waiting:
                    log(*waiting, writer, progress)
                logged = step in (1, total) or step % config.log_steps == 0
                waiting = (step, metrics, meter.read() if logged else None)
                if config.eval_steps and step % config.eval_steps == 0 and step < total:
                    means = evaluate_now(step)
                if stop.is_set():
                    break
                if config.save_steps and step % config.save_steps == 0 and step < total:
                    # The line of this step must be on disk before its checkpoint: a resumed run starts after it.
                    log(*waiting, writer, progress)
                    waiting = None
                    at_this_step = means if config.eval_steps and step % config.eval_steps == 0 else None
                    checkpoint.save(checkpoints, state, metrics=at_this_step, **saved)
        if waiting:
            log(*waiting, writer, progress)
        progress.close()
        if step < total:
            checkpoint.save(checkpoints, state, **saved)
            checkpoints.wait()
            note(f"stopped at step {step} of {total}, saved; the same command goes on from there")
        else:
            means = evaluate_now(total)
            checkpoint.save(checkpoints, state, metrics=means or None, **saved)

    before = report.read_metrics(workdir / "eval.jsonl")
    before = before[0] if before and before[0]["step"] == 0 else {}
    if step >= total:
        report.plot_curves(workdir)
        if config.export.enabled:
            card = {
                "base_model": config.model.path,
                "loss": loss.name,
                "formula": LOSSES[loss.name].function.__doc__.splitlines()[0],
                "hyper_parameters": loss.hyper,
                "data": {"training pairs": len(train_pairs), "held-out pairs": len(eval_pairs), "dropped": dropped},
                "metrics": means,
                "config": plain,
            }
            export(state.params, model.config, tokenizer, workdir / "export", dtype=config.export.dtype, card=card)
            note(f"exported to {workdir / 'export'}")
    return Result(step, step < total, before, means, model, state.params, tokenizer)


def load_pairs(
    config: ConfigDict, loss: BoundLoss, tokenizer: Any
) -> tuple[list[Pair], list[Pair], dict[str, dict[str, int]]]:
    """Reads, holds out and tokenizes; says on stderr what was dropped and why.

    Args:
      config: its data fields, max_length, too_long and seed.
      loss: whether the rejected response is wanted.
      tokenizer: Hugging Face tokenizer.

    Returns:
      (training pairs, held-out pairs, dropped counts by file and reason).

    Raises:
      UserError: a malformed row, or nothing left to train on.
    """
    data = config.data
    responses = ("chosen", "rejected") if "rejected" in loss.needs else ("chosen",)
    records, counts = read_records(data.path, split=data.split, responses=responses, limit=data.limit)
    dropped = {data.path: dict(counts)}
    held_out: list[Record] = []
    if data.eval_path:
        held_out, counts = read_records(
            data.eval_path, split=data.eval_split, responses=responses, limit=data.eval_limit
        )
        dropped[data.eval_path] = dict(counts)
    elif data.eval_fraction:
        records, held_out = split_by_prompt(records, data.eval_fraction, config.seed)
        held_out = held_out[: data.eval_limit]
    if data.ascii_quotes:
        records, held_out = ([ascii_quotes(record) for record in part] for part in (records, held_out))
    pairs = []
    for part, path in ((records, data.path), (held_out, data.eval_path or data.path)):
        tokenized, counts = tokenize_records(
            part, tokenizer, max_length=config.max_length, too_long=config.too_long, keep_end=data.keep_end
        )
        pairs.append(tokenized)
        for reason, count in counts.items():
            dropped[path][reason] = dropped[path].get(reason, 0) + count
    for path, counts in dropped.items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count) or "none"
        note(f"{path}: dropped {reasons}")
    if not pairs[0]:
        raise UserError(
            f"{data.path}: no pairs left to train on, dropped {dropped[data.path]}; max_length is {config.max_length}"
        )
    if held_out and not pairs[1]:
        raise UserError(f"{data.eval_path or data.path}: no held-out pairs left; max_length is {config.max_length}")
    return pairs[0], pairs[1], dropped


def load_model(
    config: ConfigDict, path: str, mesh: jax.sharding.Mesh, tokens: int, like: LanguageModel | None = None
) -> tuple[LanguageModel, Params]:
    """A model and its parameters on their shardings, the embeddings grown where the tokenizer has more tokens.

    Args:
      config: its model fields, dtype and seed.
      path: Hugging Face directory or hub name.
      mesh: the mesh.
      tokens: len(tokenizer).
      like: a model that this one must have the shape of.

    Returns:
      (model, params).

    Raises:
      UserError: files are missing or do not fit.
    """
    directory = resolve(path)
    shape = load_config(directory)
    options = dict(dtype=config.dtype, param_dtype=config.model.param_dtype, remat=config.model.remat)
    if config.model.random_init:
        model = make_decoder(shape, **options)
        shardings = param_shardings(mesh, jax.eval_shape(model.init, jax.random.key(0)))
        return model, jax.jit(model.init, out_shardings=shardings)(jax.random.key(config.seed))
    blank = jax.eval_shape(make_decoder(shape, **options).init, jax.random.key(0))
    params = load_params(directory, shape, dtype=config.model.param_dtype, shardings=param_shardings(mesh, blank))
    if tokens > shape.vocab_size:
        note(f"embeddings grown from {shape.vocab_size} to {tokens} rows for the tokens added to the vocabulary")
        params, shape = resize_embeddings(params, shape, tokens)
        params = jax.device_put(params, param_shardings(mesh, params))
    if like is not None and shape != like.config:
        raise UserError(
            f"reference.path={path!r} has another shape than model.path; a pair's two models share one vocabulary"
        )
    return make_decoder(shape, **options), params


def cached_reference(data, model: LanguageModel, params: Params, config: ConfigDict, directory: Path):
    """The set with the reference's log-probabilities, from the cache or computed now with progress."""
    path = directory / f"{reference_logps.cache_key(model, params, data.pairs, config.dtype)}.npz"

    def make():
        progress = Progress(len(data.pairs), "reference pair")
        one = make_pair_set(
            data.pairs, data.batch_size // data.micro_steps, groups=data.groups,
            layout=data.layout._replace(prompt=False), row_length=config.data.row_length,
        )  # fmt: skip
        logps = reference_logps.compute(model, params, one, chunk=config.vocabulary_chunk, progress=progress.update)
        progress.close()
        return logps

    return data._replace(reference=reference_logps.cached(path, make))


class Meter:
    """Tokens, pairs and seconds since the last logged step, counted on the host from the batches."""

    def __init__(self, pairs: int):
        self.pairs, self.began = pairs, time.monotonic()
        self.steps = self.tokens = self.trained = self.positions = 0

    def add(self, batch) -> None:
        """Counts one batch."""
        self.steps += 1
        self.tokens += int(np.count_nonzero(batch.segments))
        self.positions += batch.segments.size
        self.trained += int((batch.slot < 3 * batch.weight.shape[1]).sum())

    def read(self) -> dict[str, float]:
        """Rates since the last reading, and starts anew."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        out = {
            "step_time": seconds / self.steps,
            "pairs_per_second": self.steps * self.pairs / seconds,
            "tokens_per_second": self.tokens / seconds,
            "trained_tokens_per_second": self.trained / seconds,
            "packing_efficiency": self.tokens / self.positions,
            **device_memory(),
        }
        self.__init__(self.pairs)
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
def stop_requested() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets, so that the loop ends at a step and saves; a second Ctrl-C ends at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals reach only the main thread
        return

    def handle(number: int, frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def note(text: str) -> None:
    """One line for the person watching."""
    print(text, file=sys.stderr, flush=True)
