"""A trained model, its reference and an earlier model on the same held-out pairs: metrics, slices, displacement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from prefalign_jax.assemble import load_model
from prefalign_jax.data.chat import check_tokens, load_tokenizer, tokenize_records
from prefalign_jax.data.pipeline import PairSet, make_pair_set, mismatched
from prefalign_jax.data.records import Record, ascii_quotes, read_records, split_by_prompt
from prefalign_jax.data.remarks import Remarks, lines
from prefalign_jax.evaluation.held_out import (
    Displacement,
    Slice,
    by_slice,
    changes,
    columns_of,
    displacement,
    intervals,
    prompt_numbers,
    response_logps,
    set_logps,
    slice_labels,
)
from prefalign_jax.experiment import Experiment
from prefalign_jax.intervals import Interval
from prefalign_jax.losses import BoundLoss
from prefalign_jax.models.loading import exported
from prefalign_jax.pages.token_page import Example, Response, choose_examples, pieces_of
from prefalign_jax.processes import note
from prefalign_jax.reference import compute
from prefalign_jax.sharding import make_mesh, packing_of
from prefalign_jax.train_step import make_eval_step
from prefalign_jax.types import LanguageModel, Pair, PairLogps, Params, UserError


class Model(NamedTuple):
    """A model that is loaded, and where from."""

    path: str
    model: LanguageModel
    params: Params


class Measured(NamedTuple):
    """Every pair's metrics and log-probabilities under a model, and the reference's if there is one."""

    columns: dict[str, np.ndarray]
    policy: PairLogps
    reference: PairLogps | None


class Evaluation(NamedTuple):
    """What was measured.

    Attributes:
      loss: whose metrics these are.
      pairs, prompts: how many.
      dropped: rows that are no pairs, by reason.
      metrics: mean and interval of each.
      before, change: the same of the earlier model, and the difference; {} without one.
      slices: {what they are cut by: {value: slice}}.
      displacement: {response: how its log-probability moved away from the reference's}; {} without one.
      margins: [pairs] reward margins, None where the loss has none.
      examples: pairs token by token; none of a reward model.
    """

    loss: BoundLoss
    pairs: int
    prompts: int
    dropped: dict[str, int]
    metrics: dict[str, Interval]
    before: dict[str, Interval]
    change: dict[str, Interval]
    slices: dict[str, dict[str, Slice]]
    displacement: dict[str, Displacement]
    margins: np.ndarray | None
    examples: list[Example]


def measure_models(
    experiment: Experiment, *, reference: str | None, before: str | None, slice_by: Sequence[str], examples: int
) -> Evaluation:
    """Measures the model of an experiment on its data.

    Args:
      experiment: its data are the held-out pairs.
      reference: the model that it is compared with, None where the loss needs none.
      before: another model, measured on the same pairs.
      slice_by: fields of the rows to slice by, besides lengths and turns.
      examples: pairs to show token by token: so many with the highest margins, with the lowest, and at random.

    Raises:
      UserError: a model or the data cannot be read, or the models' tokenizers differ.
    """
    config, loss = experiment.config, experiment.loss
    mesh = make_mesh(config.mesh)
    if loss.running:  # the export does not have it
        note(f"{loss.name} carries {', '.join(loss.running)} through a run; measured as at its first step")
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template)
    records, pairs, dropped = held_out_pairs(experiment, tokenizer, slice_by)
    prompts = prompt_numbers(pairs)
    with jax.default_matmul_precision(config.matmul_precision):
        policy, frozen, earlier = (
            _load(experiment, path, tokenizer, mesh) if path else None
            for path in (config.model.path, reference, before)
        )
        packing = dict(
            **packing_of(mesh), layout=experiment.layout, attends=policy.model.attends, group=experiment.group
        )
        data = make_pair_set(pairs, config.batch_size, **packing)
        if frozen:
            data = data._replace(reference=compute(frozen.model, frozen.params, data, mesh=mesh, needs=loss.needs))
        now = measure(loss, policy, frozen, data, mesh)
        then = earlier and measure(loss, earlier, frozen, data, mesh)
        shown = []
        if "reward" not in loss.needs:
            models = {"reference": frozen, "before": earlier, "policy": policy}
            shown = examples_of(loss, now, models, data, tokenizer, mesh, examples, config.seed)
    kind = "completions" if "label" in loss.needs else "pairs" if "rejected" in loss.needs else "demonstrations"
    return Evaluation(
        loss=loss,
        pairs=len(pairs),
        prompts=int(prompts.max()) + 1,
        dropped=dropped,
        metrics=intervals(now.columns, prompts),
        before=intervals(then.columns, prompts) if then else {},
        change=changes(now.columns, then.columns, prompts) if then else {},
        slices=by_slice(now.columns, prompts, slice_labels(pairs, records, kind)),
        displacement=displaced(loss, now, prompts),
        margins=now.columns.get("rewards/margins"),
        examples=shown,
    )


def held_out_pairs(
    experiment: Experiment, tokenizer: Any, columns: Sequence[str]
) -> tuple[list[Record], list[Pair], dict[str, int]]:
    """(records, pairs, dropped counts by reason) of the experiment's data.

    Raises:
      UserError: no pair is left.
    """
    config, loss = experiment.config, experiment.loss
    data = config.data
    records, dropped = read_records(
        data.path,
        split=data.split,
        format=data.format,
        limit=data.limit,
        columns=columns,
        seed=config.seed,
        **experiment.record_kind,
    )
    if data.eval_fraction:
        records = split_by_prompt(records, data.eval_fraction, config.seed)[1]
    if data.ascii_quotes:
        records = [ascii_quotes(record) for record in records]
    remarks = Remarks()
    how = dict(max_length=config.max_length, too_long=config.too_long, keep_end=data.keep_end, chat=experiment.chat)
    how["mask_format"] = data.mask_format
    pairs, counts = tokenize_records(records, tokenizer, **how, remarks=remarks)
    dropped = {reason: dropped.get(reason, 0) + counts.get(reason, 0) for reason in {**dropped, **counts}}
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    if not pairs:
        raise UserError(f"{data.path}: no {loss.unit} left to measure, dropped {reasons}")
    note(f"{len(pairs)} {loss.unit}; dropped {reasons}")
    for line in lines(remarks, data.special_in_text == "split"):
        note(line)
    return records, mismatched(pairs, config.max_length) if "mismatched" in loss.needs else pairs, dropped


def _load(experiment: Experiment, path: str, tokenizer: Any, mesh: jax.sharding.Mesh) -> Model:
    """A model whose tokens mean the same as the tokenizer's."""
    directory = exported(path)
    check_tokens(path, directory, tokenizer, "--model: the tokenizers must match")
    reward = "reward" in experiment.loss.needs
    return Model(path, *load_model(experiment.config, directory, mesh, len(tokenizer), reward=reward))


def measure(loss: BoundLoss, policy: Model, frozen: Model | None, data: PairSet, mesh: jax.sharding.Mesh) -> Measured:
    """Runs the pairs, whose reference log-probabilities are in the data if there is a reference, through a model."""
    step = make_eval_step(policy.model, loss, mesh)
    reference, to_run = None, data
    if "token_kl" in loss.needs:  # it compares whole distributions, so both models run at once
        if frozen.model.config != policy.model.config:
            raise UserError(f"loss {loss.name!r} compares whole distributions; {frozen.path} has another shape")
        reference, to_run = frozen.params, data._replace(reference=None)
    ours, theirs = set_logps(step, policy.params, reference, to_run)
    return Measured(columns_of(loss, ours, theirs, loss.running or None), ours, data.reference)


def displaced(loss: BoundLoss, measured: Measured, prompts: np.ndarray) -> dict[str, Displacement]:
    """{response: displacement} of those that the loss is about, {} without a reference."""
    ours, theirs = measured.policy, measured.reference
    if theirs is None:
        return {}
    if "label" in loss.needs:
        good = ours.label > 0
        parts = {"desirable": ("chosen", ours.weight * good), "undesirable": ("chosen", ours.weight * ~good)}
    else:
        parts = {side: (side, ours.weight) for side in ("chosen", "rejected")[: 1 + ("rejected" in loss.needs)]}
    return {
        name: displacement(getattr(ours, side), getattr(theirs, side), mass, prompts)
        for name, (side, mass) in parts.items()
        if mass.any()
    }


# Pairs token by token


def scores_of(loss: BoundLoss, measured: Measured) -> tuple[str, np.ndarray, bool]:
    """What the pairs are ordered by on the page, and whether a pair is right where that is positive."""
    if "rewards/margins" in measured.columns:
        return "margin", measured.columns["rewards/margins"], True
    if measured.reference is None:
        return "log-probability", measured.policy.chosen, False
    gain = measured.policy.chosen - measured.reference.chosen
    if "label" in loss.needs:
        return "log-ratio, signed by the label", gain * np.where(measured.policy.label > 0, 1, -1), True
    return "log-ratio", gain, False


def _spread(values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Values of the trained tokens of a response as values of all; NaN for those that are not trained."""
    if weights is None:
        return values
    out = np.full(len(weights), np.nan, np.float32)
    out[weights != 0] = values
    return out


def examples_of(
    loss: BoundLoss,
    measured: Measured,
    models: Mapping[str, Model | None],
    data: PairSet,
    tokenizer: Any,
    mesh: jax.sharding.Mesh,
    each: int,
    seed: int,
) -> list[Example]:
    """Pairs for the page; `models` are the reference, one from before, and the policy, None where there is none."""
    what, scores, signed = scores_of(loss, measured)
    chosen = choose_examples(scores, each, seed)
    pairs = [data.pairs[i] for _, i in chosen]
    layout = data.layout._replace(prompt=False, after=False)
    packing = packing_of(mesh) | dict(attends=models["policy"].model.attends)
    part = make_pair_set(pairs, min(len(pairs), data.batch_size), layout=layout, **packing)
    logps = {name: response_logps(m.model, m.params, part, mesh=mesh) for name, m in models.items() if m}
    panels = [name for name in logps if name != "reference" or "before" not in logps]
    out = []
    for number, (group, i) in enumerate(chosen):
        pair, responses = pairs[number], []
        names = ("desirable" if pair.label else "undesirable",) if "label" in loss.needs else ("chosen", "rejected")
        for side, name in enumerate(names[: 1 + ("rejected" in loss.needs)]):
            ids = (pair.chosen, pair.rejected)[side].tolist()
            weights = pair.weights(side)
            values = {model: _spread(rows[number][side], weights) for model, rows in logps.items()}
            pieces = pieces_of(tokenizer, pair.prompt[-4:].tolist(), ids)
            coloured = {panel: values[panel] for panel in panels}
            responses.append(Response(name, ids, pieces, coloured, values.get("reference"), weights))
        right = bool(scores[i] > 0) if signed else None
        prompt = tokenizer.decode(pair.prompt.tolist(), skip_special_tokens=False).rstrip("\ufffd")
        out.append(Example(group, f"{what} {scores[i]:+.3f}", right, str(pair.where), prompt, responses))
    return out
