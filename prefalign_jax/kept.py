"""A kept checkpoint of a run, finished or stopped, as a model again."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from prefalign_jax import averages, checkpoint
from prefalign_jax.assemble import adapters_of, drawn_dtype, load_model, optimizer_of
from prefalign_jax.data.chat import load_tokenizer
from prefalign_jax.data.datasheet import as_markdown
from prefalign_jax.experiment import Experiment, from_json
from prefalign_jax.export import export_adapters, export_run
from prefalign_jax.files import locked, read_json
from prefalign_jax.metrics import read_metrics
from prefalign_jax.models.lora import Lora, full_parameters, init_adapters, join, merge
from prefalign_jax.processes import note
from prefalign_jax.sharding import make_mesh, state_shardings
from prefalign_jax.types import LanguageModel, Params, TrainState, UserError, one_line


class Kept(NamedTuple):
    """What a checkpoint holds, and what it belongs to.

    Attributes:
      experiment: of the run, as it was when the checkpoint was saved.
      step: of the checkpoint.
      metrics: its evaluation, {} if there was none.
      model: without adapters.
      params: of the model, adapters merged into their base.
      tokenizer: with the run's chat template.
      lora, adapters: what was trained in place of the model's own weights, None for none.
    """

    experiment: Experiment
    step: int
    metrics: dict[str, float]
    model: LanguageModel
    params: Params
    tokenizer: Any
    lora: Lora | None
    adapters: Params | None


def load_kept(workdir: str | Path, which: str = "last") -> Kept:
    """Reads a kept checkpoint.

    Args:
      workdir: of a run by itself, finished or stopped.
      which: 'last', 'best' by the run's checkpoint.best_metric, or the number of a step.

    Raises:
      UserError: there is no such checkpoint, or it cannot be read.
    """
    workdir = Path(workdir)
    fields = read_json(workdir / "config.json", "an object")
    experiment = from_json(fields)
    config, reward = experiment.config, "reward" in experiment.loss.needs
    with checkpoint.open_checkpoints(workdir / "checkpoints", **config.checkpoint) as checkpoints:
        step = checkpoint.chosen(checkpoints, which)
        if which == "best" and (
            better := checkpoint.better_one(checkpoints, step, read_metrics(workdir / "eval.jsonl"))
        ):
            note(better)
        experiment = from_json(checkpoint.as_saved(checkpoints, step, fields))
        metrics = checkpoints.metrics(step)
        mesh, tokenizer = make_mesh({"data": -1}), load_tokenizer(config.model.path, config.data.chat_template)
        loaded, lora = adapters_of(config, reward, len(tokenizer))
        path, random_init = config.model.path, config.model.random_init
        model, base = load_model(config, path, mesh, len(tokenizer), random_init, reward, lora)
        if lora is None:
            params = _weights(checkpoints, step, experiment, base, mesh)
            return Kept(experiment, step, metrics, model, params, tokenizer, None, None)
        if loaded:
            base = join(base, {**full_parameters(base, lora, drawn_dtype(config)), **loaded})
        make = functools.partial(init_adapters, lora=lora, dtype=drawn_dtype(config))
        adapters = _weights(checkpoints, step, experiment, jax.jit(make)(jax.random.key(0), base), mesh)
    return Kept(experiment, step, metrics, model, merge(base, adapters, lora), tokenizer, lora, adapters)


def _weights(
    checkpoints: checkpoint.Checkpoints, step: int, experiment: Experiment, params: Params, mesh: jax.sharding.Mesh
) -> Params:
    """The weights of a checkpoint that its run evaluates and exports; `params` are arrays like those that it trains."""
    optimizer = optimizer_of(experiment, lambda step: 0.0)
    ema = jax.eval_shape(averages.start, params) if experiment.averaged else None
    like = TrainState(np.int32(0), params, jax.eval_shape(optimizer.init, params), ema=ema)
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like, state_shardings(mesh, like)
    )
    use_ema = experiment.config.ema.evaluate
    parts = {name: getattr(placed, name) for name in averages.parts_of(like, use_ema)}
    return averages.evaluated(like._replace(**checkpoint.load_parts(checkpoints, step, parts)), use_ema).params


def export_kept(workdir: str | Path, which: str = "last", directory: str | Path | None = None) -> Path:
    """Exports a kept checkpoint as its run would have.

    Args:
      workdir: of the run. Nobody may be training there.
      which: see `load_kept`.
      directory: where to; None is WORKDIR/export-STEP. Adapters go beside it, to DIRECTORY-adapters.

    Returns:
      Where it was exported to.

    Raises:
      UserError: as `load_kept` and `export.export`.
    """
    workdir = Path(workdir)
    read_json(workdir / "config.json", "an object")  # a directory without one is no run's, and is left as it is
    with locked(workdir):
        kept = load_kept(workdir, which)
        directory = Path(directory) if directory else workdir / f"export-{kept.step}"
        sheet = workdir / "datasheet.json"
        try:
            data = as_markdown(read_json(sheet, "an object"), level=3)
        except (AttributeError, LookupError, TypeError) as error:
            raise UserError(f"{sheet}: it is no datasheet ({one_line(error)}); start the run again") from None
        history = checkpoint.read_changes(workdir, kept.step)
        about = dict(data=data, metrics=kept.metrics, history=history, directory=directory)
        export_run(kept.experiment, kept.params, kept.model.config, kept.tokenizer, workdir, **about)
        if kept.lora:
            beside = directory.with_name(f"{directory.name}-adapters")
            export_adapters(kept.experiment, kept.adapters, kept.lora, kept.model.config, workdir, beside)
    return directory
