"""Measures a trained model on held-out pairs: --model=DIR --reference=DIR --data=FILE --loss=dpo --beta=0.1 --out=DIR.

Prints loss, accuracy, margins and log-probabilities with 95% intervals, by slice, and what became of the likelihood of
chosen and rejected responses; writes evaluation.json, slices.csv, margins.png, and tokens.html, in which every token of
some responses is coloured by its implicit reward. --model takes an exported directory, or the working directory of a
run; hyper-parameters of the loss are options of their own, such as --beta. Losses without a reference do without
--reference; with it they too are compared. --before=DIR measures a second model on the same pairs, and the change.
"""

import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging
from ml_collections import ConfigDict

from prefalign_jax.assemble import load_model
from prefalign_jax.config import defaults
from prefalign_jax.data.chat import load_tokenizer, tokenize_records
from prefalign_jax.data.pipeline import PairSet, make_pair_set, mismatched
from prefalign_jax.data.records import ascii_quotes, read_records, split_by_prompt
from prefalign_jax.evaluation.held_out import (
    FEW,
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
from prefalign_jax.experiment import Experiment, read
from prefalign_jax.files import whole
from prefalign_jax.intervals import Interval
from prefalign_jax.losses import BoundLoss, make_loss
from prefalign_jax.models.decoder import DecoderConfig
from prefalign_jax.models.hf_io import load_config, resolve
from prefalign_jax.options import did_you_mean, given, read_as
from prefalign_jax.pages.plots import plot_margins
from prefalign_jax.pages.token_page import Example, Response, choose_examples, page, pieces_of
from prefalign_jax.processes import note
from prefalign_jax.reference import compute
from prefalign_jax.sharding import make_mesh, packing_of
from prefalign_jax.train_step import make_eval_step
from prefalign_jax.types import LanguageModel, PairLogps, Params, UserError, one_line

LENGTH = 1024  # tokens, where the models have as many positions
# Name -> (type, default, meaning).
OPTIONS = {
    "model": ("string", None, "Exported model, or the working directory of a run"),
    "reference": ("string", None, "What it is compared with, usually the model that the run started from"),
    "before": ("string", None, "Another model, measured on the same pairs: the change is shown with its interval"),
    "data": ("string", None, "Pairs: a file, a directory or a hub name, as data.path of an experiment"),
    "loss": ("string", "dpo", "Any loss of docs/losses.md"),
    "out": ("string", None, "Directory for evaluation.json, slices.csv, margins.png and tokens.html"),
    "slice_by": ("string", "", "Fields of the rows, separated by commas, to slice by as well"),
    "examples": ("integer", 4, "Pairs on the page: so many with the highest margins, with the lowest, and at random"),
    "max_length": ("integer", None, f"Tokens of prompt + longer response; {LENGTH}, or as many as the models take"),
    "too_long": ("string", "drop", "What happens to longer pairs: drop, truncate_prompt, truncate_response"),
    "split": ("string", "test", "Part of a hub data set or a directory"),
    "format": ("string", None, "Of the rows, a key of data/formats.py; told from their fields by default"),
    "limit": ("integer", None, "Records to read"),
    "eval_fraction": ("float", 0.0, "Measure only the prompts that a run with this data.eval_fraction held out"),
    "seed": ("integer", 0, "Of that run, and of the examples at random"),
    "chat_template": ("string", None, "chatml, llama3, zephyr, a .jinja file; the tokenizer's own by default"),
    "ascii_quotes": ("bool", False, "Curly quotes and dashes to ASCII, as data.ascii_quotes of the run"),
    "keep_end": ("bool", False, "Count what the template writes after the end of turn, as data.keep_end of the run"),
    "batch_size": ("integer", 16, "Pairs at once"),
    "dtype": ("string", "float32", "Of activations: float32 or bfloat16"),
    "help": ("bool", False, "Show this text"),
}
# Those that are fields of an experiment.
FIELDS = ("too_long", "seed", "batch_size", "dtype")
DATA_FIELDS = ("split", "format", "limit", "eval_fraction", "chat_template", "ascii_quotes", "keep_end")


class Model(NamedTuple):
    """A model that is loaded, and where from."""

    path: str
    model: LanguageModel
    params: Params


class Measured(NamedTuple):
    """Of one model every pair's metrics and log-probabilities, and the reference's if there is one."""

    columns: dict[str, np.ndarray]
    policy: PairLogps
    reference: PairLogps | None


def experiment_of(values: flags.FlagValues, rest: Sequence[str]) -> Experiment:
    """The experiment that the options describe; what is no option is a hyper-parameter of the loss."""
    config = defaults(values.loss)
    hyper = {name: config.loss.get_type(name) for name in config.loss if name != "name"}
    for word in rest:
        name, equals, text = word.lstrip("-").partition("=")
        if not word.startswith("-") or name in values:
            raise UserError(f"unexpected argument {word!r}; options are written --name=value")
        if name not in hyper:
            raise UserError(f"--{name}: no such option; {did_you_mean(name, [*values, *hyper])}see --help")
        try:
            config.loss[name] = read_as(text if equals else "true", hyper[name]())
        except ValueError:
            raise UserError(f"--{name}={text}: expected a value of type {hyper[name].__name__}") from None
    for name in ("model", "data", "out"):
        if not values[name].value:
            raise UserError(f"--{name} is missing; see --help")
    config.model.path, config.data.path = exported(values.model), values.data
    config.update({name: values[name].value for name in FIELDS})
    config.data.update({name: values[name].value for name in DATA_FIELDS})
    loss = make_loss(config.loss.name, **given(config.loss))
    paths = [path for path in (config.model.path, values.reference, values.before) if path]
    shapes = {path: load_config(resolve(exported(path))) for path in paths}
    config.max_length = min(LENGTH, *(shape.max_position for shape in shapes.values()))
    if values.max_length is not None:
        config.max_length = values.max_length
    config.reference.kind = "copy" if "reference" in loss.needs else "none"
    experiment = read(config)
    _check(values, loss, shapes)
    return experiment


def _check(values: flags.FlagValues, loss: BoundLoss, shapes: Mapping[str, DecoderConfig]) -> None:
    if values.examples < 1:
        raise UserError(f"--examples={values.examples} must be at least 1")
    if "reference" in loss.needs and not values.reference:
        raise UserError(f"loss {loss.name!r} compares with a reference; write --reference=DIR")
    if "reward" in loss.needs and values.reference:
        raise UserError(f"loss {loss.name!r} measures a reward model, which has no reference; leave out --reference")
    for path, shape in shapes.items():
        if (values.max_length or 0) > shape.max_position:
            raise UserError(f"--max_length={values.max_length} exceeds the {shape.max_position} positions of {path}")
        if shape.reward != ("reward" in loss.needs):
            kind, other = ("a reward model", "bradley_terry") if shape.reward else ("a language model", "dpo")
            raise UserError(f"{path} is {kind}, and loss {loss.name!r} is not for those; write --loss={other}, for one")


def exported(path: str) -> str:
    """The export of a run's working directory; any other path as it is."""
    inside = Path(path) / "export"
    return str(inside) if (inside / "config.json").exists() else path


def read_pairs(experiment: Experiment, tokenizer: Any, columns: Sequence[str]) -> tuple[list, list, dict]:
    """(records, pairs, dropped counts by reason)."""
    config, data, loss = experiment.config, experiment.config.data, experiment.loss
    records, dropped = read_records(
        data.path, split=data.split, format=data.format, limit=data.limit, columns=columns, **loss.record_kind
    )
    if data.eval_fraction:
        records = split_by_prompt(records, data.eval_fraction, config.seed)[1]
    if data.ascii_quotes:
        records = [ascii_quotes(record) for record in records]
    pairs, counts = tokenize_records(
        records, tokenizer, max_length=config.max_length, too_long=config.too_long, keep_end=data.keep_end
    )
    dropped = {reason: dropped.get(reason, 0) + counts.get(reason, 0) for reason in {**dropped, **counts}}
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    if not pairs:
        raise UserError(f"{data.path}: no {loss.unit} left to measure, dropped {reasons}")
    note(f"{len(pairs)} {loss.unit}; dropped {reasons}")
    return records, mismatched(pairs, config.max_length) if "mismatched" in loss.needs else pairs, dropped


def load(config: ConfigDict, loss: BoundLoss, path: str, tokenizer: Any, mesh: jax.sharding.Mesh) -> Model:
    """A model whose tokens mean the same as the tokenizer's."""
    directory = exported(path)
    vocabulary = tokenizer.get_vocab()
    for token, number in load_tokenizer(directory).get_vocab().items():
        if vocabulary.get(token) != number:
            raise UserError(f"{path}: token {number} is {token!r}, and another in --model: the tokenizers must match")
    return Model(path, *load_model(config, directory, mesh, len(tokenizer), reward="reward" in loss.needs))


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


def displaced(loss: BoundLoss, found: Measured, prompts: np.ndarray) -> dict[str, Displacement]:
    """{response: displacement} of those that the loss is about, {} without a reference."""
    if found.reference is None:
        return {}
    weight, ours, theirs = found.policy.weight, found.policy, found.reference
    if "label" in loss.needs:
        good = ours.label > 0
        parts = {"desirable": ("chosen", weight * good), "undesirable": ("chosen", weight * ~good)}
    else:
        parts = {side: (side, weight) for side in ("chosen", "rejected")[: 1 + ("rejected" in loss.needs)]}
    return {
        name: displacement(getattr(ours, side), getattr(theirs, side), mass, prompts)
        for name, (side, mass) in parts.items()
        if mass.any()
    }


def scores_of(loss: BoundLoss, found: Measured) -> tuple[str, np.ndarray, bool]:
    """What the pairs are ordered by on the page, and whether a pair is right where that is positive."""
    if "rewards/margins" in found.columns:
        return "margin", found.columns["rewards/margins"], True
    if found.reference is None:
        return "log-probability", found.policy.chosen, False
    gain = found.policy.chosen - found.reference.chosen
    if "label" in loss.needs:
        return "log-ratio, signed by the label", gain * np.where(found.policy.label > 0, 1, -1), True
    return "log-ratio", gain, False


def examples_of(
    loss: BoundLoss,
    found: Measured,
    models: Mapping[str, Model | None],
    data: PairSet,
    tokenizer: Any,
    mesh: jax.sharding.Mesh,
    each: int,
    seed: int,
) -> list[Example]:
    """Pairs for the page; `models` are the reference, one from before, and the policy, None where there is none."""
    what, scores, signed = scores_of(loss, found)
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
            values = {model: rows[number][side] for model, rows in logps.items()}
            pieces = pieces_of(tokenizer, pair.prompt[-4:].tolist(), ids)
            coloured = {panel: values[panel] for panel in panels}
            responses.append(Response(name, ids, pieces, coloured, values.get("reference")))
        right = bool(scores[i] > 0) if signed else None
        prompt = tokenizer.decode(pair.prompt.tolist(), skip_special_tokens=False).rstrip("\ufffd")
        out.append(Example(group, f"{what} {scores[i]:+.3f}", right, str(pair.where), prompt, responses))
    return out


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def shown(interval: Interval | None) -> str:
    """An interval in a table."""
    if interval is None or math.isnan(interval.mean):
        return "-"
    mean, low, high = (f"{round(x, 12):.4g}" for x in interval)
    return mean if math.isnan(interval.low) else f"{mean} [{low}, {high}]"


def tables(
    metrics: Mapping[str, Interval],
    before: Mapping[str, Interval],
    change: Mapping[str, Interval],
    slices: Mapping[str, Mapping[str, Slice]],
    moved: Mapping[str, Displacement],
    unit: str,
) -> str:
    """Everything that is printed."""
    rows = [("metric", "mean, 95% interval", *(("before", "change") if before else ()))]
    rows += [
        (name, shown(value), *((shown(before[name]), shown(change.get(name))) if before else ()))
        for name, value in metrics.items()
    ]
    out = [table(rows)]
    for by, parts in slices.items():
        if len(parts) < 2:
            continue
        names = list(next(iter(parts.values())).metrics)
        rows = [(by, unit, *names)]
        rows += [
            (value, f"{part.pairs} ({part.share:.0%})", *(shown(part.metrics[name]) for name in names))
            for value, part in parts.items()
        ]
        out.append(table(rows))
    if moved:
        rows = [("log-probability, policy - reference", *moved)]
        rows.append(("share that fell", *(shown(part.fell) for part in moved.values())))
        rows.append(("mean change, nats", *(shown(part.change) for part in moved.values())))
        for name in ("mean", "median", "worst"):
            falls = [getattr(part, name) for part in moved.values()]
            rows.append((f"of those that fell, {name}", *(f"-{fall:.4g}" if fall else "-" for fall in falls)))
        out.append(table(rows))
    out.append(f"A mean over fewer than {FEW} prompts has no interval.")
    return "\n\n".join(out)


def plain(value: Any) -> Any:
    """Records as JSON takes them; NaN is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "_asdict"):
        value = value._asdict()
    return {key: plain(part) for key, part in value.items()} if isinstance(value, Mapping) else value


def write_slices(path: Path, slices: Mapping[str, Mapping[str, Slice]]) -> None:
    """A row for each metric of each slice."""
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("by", "slice", "pairs", "share", "metric", "mean", "low", "high"))
        for by, parts in slices.items():
            for value, measured in parts.items():
                for name, interval in measured.metrics.items():
                    writer.writerow((by, value, measured.pairs, measured.share, name, *interval))


def run(values: flags.FlagValues, rest: Sequence[str]) -> None:
    """Measures, prints and writes."""
    experiment = experiment_of(values, rest)
    config, loss, out = experiment.config, experiment.loss, Path(values.out)
    mesh = make_mesh(config.mesh)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from None
    if loss.running:  # the export does not have it
        note(f"{loss.name} carries {', '.join(loss.running)} through a run; measured as at its first step")
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template)
    by = [name for name in (values.slice_by or "").split(",") if name]
    records, pairs, dropped = read_pairs(experiment, tokenizer, by)
    prompts = prompt_numbers(pairs)
    with jax.default_matmul_precision(config.matmul_precision):
        policy, frozen, before = (
            load(config, loss, path, tokenizer, mesh) if path else None
            for path in (values.model, values.reference, values.before)
        )
        packing = dict(**packing_of(mesh), layout=experiment.layout, attends=policy.model.attends)
        data = make_pair_set(pairs, config.batch_size, **packing)
        if frozen:
            data = data._replace(reference=compute(frozen.model, frozen.params, data, mesh=mesh, needs=loss.needs))
        found = measure(loss, policy, frozen, data, mesh)
        earlier = before and measure(loss, before, frozen, data, mesh)
        examples = []
        if "reward" not in loss.needs:
            models = {"reference": frozen, "before": before, "policy": policy}
            examples = examples_of(loss, found, models, data, tokenizer, mesh, values.examples, config.seed)

    metrics, moved = intervals(found.columns, prompts), displaced(loss, found, prompts)
    old = intervals(earlier.columns, prompts) if earlier else {}
    change = changes(found.columns, earlier.columns, prompts) if earlier else {}
    kind = "completions" if "label" in loss.needs else "pairs" if "rejected" in loss.needs else "demonstrations"
    slices = by_slice(found.columns, prompts, slice_labels(pairs, records, kind))

    against = f" against {values.reference}" if values.reference else ""
    options = ", ".join(f"{key}={value}" for key, value in loss.hyper.items())
    count = int(prompts.max()) + 1
    about = f"{values.model}{against} on {values.data}: {len(pairs)} {loss.unit} of {count} prompts"
    print(f"{loss.name}({options}) of {about}\n\n{tables(metrics, old, change, slices, moved, loss.unit)}\n")
    result = {
        "model": values.model,
        "reference": values.reference,
        "before": values.before,
        "data": values.data,
        "loss": {"name": loss.name, **loss.hyper},
        "max_length": config.max_length,
        loss.unit: len(pairs),
        "prompts": count,
        "dropped": dropped,
        "metrics": metrics,
        **({"metrics_before": old, "change": change} if before else {}),
        "slices": slices,
        "displacement": moved,
    }
    with whole(out / "evaluation.json") as part:
        part.write_text(json.dumps(plain(result), indent=2) + "\n", encoding="utf-8")
    write_slices(out / "slices.csv", slices)
    written = ["evaluation.json", "slices.csv"]
    if "rewards/margins" in found.columns:
        plot_margins(out / "margins.png", found.columns["rewards/margins"])
        written.append("margins.png")
    if examples:
        beta = loss.hyper.get("beta", 1.0) if "reference" in loss.needs else 1.0
        with whole(out / "tokens.html") as part:
            part.write_text(page(f"{loss.name}, token by token", about, examples, beta=beta), encoding="utf-8")
        written.append("tokens.html")
    print(f"in {out}: {', '.join(written)}")


def main(argv: Sequence[str]) -> int:
    """The exit status: 2 after a mistake of the user's."""
    values = flags.FlagValues()
    for name, (kind, default, meaning) in OPTIONS.items():
        getattr(flags, f"DEFINE_{kind}")(name, default, meaning, flag_values=values)
    logging.set_verbosity(logging.WARNING)
    try:
        try:
            rest = values(list(argv), known_only=True)[1:]
        except flags.Error as error:
            raise UserError(one_line(error)) from None
        if values.help:
            print(f"{__doc__}\n{values}")
            return 0
        run(values, rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
