"""How much likelier one model finds each token of the responses than another: computed once, and kept on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prefalign_jax.assemble import check_tokenizer, load_model
from prefalign_jax.data.pairs import Pairs, concatenate, digest_of
from prefalign_jax.data.pipeline import make_pair_set
from prefalign_jax.data.token_weights import contrasted, trained_tokens
from prefalign_jax.data.trees import Layout
from prefalign_jax.evaluation.held_out import response_logps
from prefalign_jax.experiment import Experiment
from prefalign_jax.load_data import Data
from prefalign_jax.models.hf_io import fingerprint, load_config, resolve
from prefalign_jax.processes import note, told_by_first
from prefalign_jax.progress import Progress
from prefalign_jax.reference import cached_arrays
from prefalign_jax.sharding import packing_of
from prefalign_jax.types import UserError

FORMAT = 1  # raise it whenever the numbers of an old cache would no longer be right
MODELS = ("positive", "negative")  # fields of `token_weights`


def weigh_tokens(experiment: Experiment, data: Data, tokenizer: Any, mesh: jax.sharding.Mesh, workdir: Path) -> Data:
    """The data with the weights that two models give to the tokens, see `contrasted`; without models, as they are.

    Args:
      experiment: its `token_weights` name the models.
      data: the pairs.
      tokenizer: of the policy, which the models must share.
      mesh: where each model lies, one after the other.
      workdir: of the run; the ratios are in its `token_weights` unless the config names another place.

    Returns:
      The data; training and held-out pairs have the weights.

    Raises:
      UserError: a model is missing, or reads other tokens.
    """
    config, fields = experiment.config, experiment.config.token_weights
    if not fields.positive:
        return data
    for name in MODELS:
        field, path = f"token_weights.{name}", fields[name]
        positions = load_config(resolve(path)).max_position
        if positions < config.max_length:
            raise UserError(f"{field}={path!r} has {positions} positions, and max_length is {config.max_length}")
        check_tokenizer(field, path, tokenizer, data.training)
    directory = Path(fields.cache_dir or workdir / "token_weights")
    files = told_by_first(lambda: [fingerprint(resolve(fields[name]), whole=True) for name in MODELS])
    numbers = [config.dtype, config.matmul_precision, config.model.param_dtype, config.model.quantize]

    parts = {name: part for name, part in (("training", data.training), ("held_out", data.held_out)) if part}
    pairs = concatenate(list(parts.values()))  # each model is read once
    what = f"{FORMAT} {files} {numbers} {digest_of(pairs)}"
    ratios = cached_arrays(
        directory / f"{hashlib.sha256(what.encode()).hexdigest()}.npz",
        lambda: {"ratios": token_ratios(experiment, pairs, len(tokenizer), mesh)},
        lambda arrays: arrays["ratios"],
        "the log-ratios of the tokens are",
    )
    ends = np.cumsum([trained_tokens(part).sum() for part in parts.values()])
    each = zip(parts.items(), np.split(ratios, ends[:-1]), strict=True)
    data = data._replace(**{name: contrasted(part, some, **experiment.contrast) for (name, part), some in each})
    means = data.training.sums(lambda weights: weights)[:, 1:3].sum(0) / trained_tokens(data.training).sum(0)
    note(f"weights of training tokens: on average {means[0]:.3f} in chosen responses, {means[1]:.3f} in rejected ones")
    return data


def token_ratios(experiment: Experiment, pairs: Pairs, tokens: int, mesh: jax.sharding.Mesh) -> np.ndarray:
    """log pi_plus - log pi_minus of every trained token, by a pass of each model over the data.

    Args:
      experiment: its `token_weights` name the models.
      pairs: the data.
      tokens: len(tokenizer).
      mesh: where each model lies, one after the other.

    Returns:
      [N] float32, pair by pair, first the chosen response, then the rejected one.
    """
    config = experiment.config
    share = config.batch_size // config.micro_steps
    layout = Layout(tree=config.data.layout == "tree")
    logps = []
    with Progress(len(MODELS) * len(pairs), "weighted pair") as progress:
        for number, name in enumerate(MODELS):
            model, params = load_model(config, config.token_weights[name], mesh, tokens)
            packing = packing_of(mesh) | dict(
                row_length=config.data.row_length, attends=model.attends, group=experiment.group
            )
            plain = make_pair_set(pairs, share, layout=layout, **packing)

            def update(done: int, before: int = number * len(pairs)) -> None:
                progress.update(before + done)

            options = dict(mesh=mesh, chunk=config.vocabulary_chunk, progress=update)
            sides = response_logps(model, params, plain, **options)
            logps.append(np.concatenate([side for pair in sides for side in pair]))
            del model, params  # before the other one comes
    return logps[0] - logps[1]
