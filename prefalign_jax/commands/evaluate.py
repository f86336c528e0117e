"""Measures a trained model on held-out pairs: --model=DIR --reference=DIR --data=FILE --loss=dpo --beta=0.1 --out=DIR.

Prints loss, accuracy, margins and log-probabilities with 95% intervals, by slice, and what became of the likelihood of
chosen and rejected responses; writes evaluation.json, slices.csv, margins.png, and tokens.html, in which every token of
some responses is coloured by its implicit reward. --model takes an exported directory, or the working directory of a
run; hyper-parameters of the loss are options of their own, such as --beta. Losses without a reference do without
--reference; with it they too are compared. --before=DIR measures a second model on the same pairs, and the change.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefalign_jax.cli.experiments import set_fields
from prefalign_jax.cli.parser import Parser
from prefalign_jax.files import writing
from prefalign_jax.options import flatten, given, split_names
from prefalign_jax.types import UserError

if TYPE_CHECKING:
    from prefalign_jax.experiment import Experiment

LENGTH = 1024  # tokens, where the models have as many positions
FIELDS = ("too_long", "seed", "batch_size", "dtype")  # options that are fields of an experiment
DATA_FIELDS = ("split", "format", "limit", "eval_fraction", "chat_template", "ascii_quotes")
DATA_FIELDS += ("pairs", "train_on", "keep_end", "mask_format")


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes."""
    parser = _parser()
    options, words = parser.read_others(argv)
    experiment = experiment_of(parser, options, words)
    from prefalign_jax.analysis.signs import fallen
    from prefalign_jax.evaluation.measure import measure_models
    from prefalign_jax.evaluation.report import as_text, write_report

    with writing(f"--out={options.out}"):
        options.out.mkdir(parents=True, exist_ok=True)
    result = measure_models(
        experiment,
        reference=options.reference,
        before=options.before,
        slice_by=split_names(options.slice_by),
        examples=options.examples,
    )
    against = f" against {options.reference}" if options.reference else ""
    hyper = ", ".join(f"{key}={value}" for key, value in result.loss.hyper.items())
    counted = f"{result.pairs:,} {result.loss.unit} of {result.prompts:,} prompts"
    about = f"{options.model}{against} on {options.data}: {counted}"
    print(f"{result.loss.name}({hyper}) of {about}\n\n{as_text(result)}\n")
    moved = result.displacement.get("chosen") or result.displacement.get("desirable")
    config = flatten({"loss": {"name": result.loss.name, **result.loss.hyper}})
    if moved and (said := fallen(moved.fell.mean, moved.change.mean, moved.responses, config)):
        print(f"displacement: {said}\n")
    settings = {name: getattr(options, name) for name in ("model", "reference", "before", "data")}
    written = write_report(options.out, result, about, {**settings, "max_length": experiment.config.max_length})
    print(f"in {options.out}: {', '.join(written)}")


def _parser() -> Parser:
    parser = Parser("prefalign evaluate", __doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="exported model, hub name, or the working directory of a run")
    add("--reference", metavar="DIR", help="what it is compared with, usually the model that the run started from")
    add("--before", metavar="DIR", help="another model, measured on the same pairs: the change has its interval")
    add("--data", required=True, metavar="FILE", help="pairs: a file, a directory or a hub name")
    add("--loss", default="dpo", metavar="NAME", help="any loss of `prefalign list` (default: dpo)")
    add("--out", required=True, type=Path, metavar="DIR", help="gets evaluation.json, slices.csv and the pictures")
    add("--slice_by", default="", metavar="FIELDS", help="fields of the rows, separated by commas, to slice by as well")
    add("--examples", type=int, default=4, metavar="N", help="pairs shown: highest, lowest, random (default: 4 each)")
    add("--max_length", type=int, metavar="N", help=f"tokens of prompt + longer response (default: {LENGTH} at most)")
    add("--too_long", default="drop", help="longer pairs: drop (default), truncate_prompt, truncate_response")
    add("--split", default="test", help="of a hub data set or a directory (default: test)")
    add("--format", help="of the rows, see `prefalign list`; told from their fields by default")
    add("--limit", type=int, metavar="N", help="records to read")
    add("--pairs", default="best_worst", help="of a group: best_worst (default), all, adjacent, random:N")
    add("--eval_fraction", type=float, default=0.0, metavar="X", help="measure what a run with this field held out")
    add("--seed", type=int, default=0, help="of that run, and of the examples at random (default: 0)")
    add("--chat_template", metavar="NAME", help="a name of prefalign list, a .jinja file; default: the tokenizer's")
    add("--chat_template_kwargs", metavar="JSON", help="variables of the template (default: those of --model's run)")
    add("--template_may_drop", metavar="PARTS", help="parts that it may leave out: system,... (default: the run's)")
    add("--special_in_text", help="special tokens that rows spell: keep as tokens, split (default: the run's, or keep)")
    add("--date", metavar="DAY", help="YYYY-MM-DD, for templates that print the date (default: the run's, or today)")
    parser.add_truth("--ascii_quotes", help="curly quotes and dashes to ASCII, as data.ascii_quotes of the run")
    add("--train_on", default="all", help="assistant messages of a response that count: all (default), last")
    parser.add_truth("--keep_end", help="count what the template writes after the end of turn, as data.keep_end")
    parser.add_truth("--mask_format", help="leave out what the template writes around messages, as data.mask_format")
    add("--batch_size", type=int, default=16, metavar="N", help="pairs at once (default: 16)")
    add("--dtype", default="float32", help="of activations: float32 (default) or bfloat16")
    return parser


def experiment_of(parser: Parser, options: argparse.Namespace, words: Sequence[str]) -> Experiment:
    """The experiment that the options describe; the other words are hyper-parameters of the loss.

    Raises:
      UserError: an option is unknown, or does not fit the loss or the models.
    """
    from prefalign_jax.config import defaults
    from prefalign_jax.data.template import CHAT_FIELDS
    from prefalign_jax.experiment import read
    from prefalign_jax.losses import make_loss
    from prefalign_jax.models.hf_io import load_config, resolve
    from prefalign_jax.models.loading import exported, told_in_run

    config = defaults(options.loss)
    hyper = [name for name in config.loss if name != "name"]
    for number, word in enumerate(words):
        if word.startswith("--") and word[2:].partition("=")[0] not in hyper:
            raise parser.unknown(words[number:], [f"--{name}" for name in hyper])
    parser.complete(options)
    set_fields(config.loss, words, lead="--")
    config.model.path, config.data.path = exported(options.model), options.data
    config.update({name: getattr(options, name) for name in FIELDS})
    config.data.update({name: getattr(options, name) for name in DATA_FIELDS})
    told = told_in_run(options.model, **{name: getattr(options, name) for name in CHAT_FIELDS})
    config.data.update({name: value for name, value in told.items() if value is not None})
    loss = make_loss(config.loss.name, **given(config.loss))
    paths = [path for path in (options.model, options.reference, options.before) if path]
    shapes = {path: load_config(resolve(exported(path))) for path in paths}
    config.max_length = options.max_length or min(LENGTH, *(shape.max_position for shape in shapes.values()))
    config.reference.kind = "copy" if "reference" in loss.needs else "none"
    experiment = read(config).dated(Path(options.model))
    if options.examples < 1:
        raise UserError(f"--examples={options.examples} must be at least 1")
    if "reference" in loss.needs and not options.reference:
        raise UserError(f"loss {loss.name!r} compares with a reference; write --reference=DIR")
    if "reward" in loss.needs and options.reference:
        raise UserError(f"loss {loss.name!r} measures a reward model, which has no reference; leave out --reference")
    for path, shape in shapes.items():
        if config.max_length > shape.max_position:
            raise UserError(
                f"--max_length={config.max_length} exceeds the {shape.max_position} positions of {path}; "
                "write at most that"
            )
        if shape.reward != ("reward" in loss.needs):
            kind, other = ("a reward model", "bradley_terry") if shape.reward else ("a language model", "dpo")
            raise UserError(f"{path} is {kind}, and loss {loss.name!r} is not for those; write --loss={other}, for one")
    return experiment
