"""Looking at the data of an experiment before it is trained: a report, and a page of its pairs token by token."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from prefalign_jax.data.alphabet import Alphabet
from prefalign_jax.data.chat import iter_pairs, load_tokenizer
from prefalign_jax.data.counts import new_counts
from prefalign_jax.data.mixture import Source, read_source
from prefalign_jax.data.pipeline import PairSet, batch_of, make_pair_set, train_batches
from prefalign_jax.data.reading import Tally
from prefalign_jax.data.statistics import token_lengths
from prefalign_jax.data.template import prints_date
from prefalign_jax.data.values import Malformed, number
from prefalign_jax.experiment import read
from prefalign_jax.files import write_json, write_text
from prefalign_jax.inspection.data_page import page, pictures, shown_pairs, written_pair
from prefalign_jax.inspection.data_report import as_text, make_report, tables_of
from prefalign_jax.load_data import load_pairs, source_records, watched
from prefalign_jax.models.hf_io import load_config, resolve
from prefalign_jax.processes import note
from prefalign_jax.types import UserError

FIRST = 24  # pairs of the first steps on the page
EACH = 3  # pairs of each kind of extreme
NO_LIMIT = 2**30  # tokens
RESPONSES = ("chosen", "rejected")
LATER = ("held-out prompts", "weights")  # stages after tokenization
SCORES = (
    "margin",
    *(form.format(side) for form in ("score_{}", "{}_score", "rating_{}", "{}-rating") for side in RESPONSES),
)


def inspect(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Reads, cleans, tokenizes and packs as a run with this config would, and shows it.

    Args:
      config: with the fields of config.defaults; of the model only config.json and the tokenizer are read.
      workdir: gets data.json and data.html.

    Returns:
      What data.json says.

    Raises:
      UserError: for a mistake in the config or the data.
    """
    experiment = read(config)
    sources = experiment.sources_for("train")
    if not sources or not config.model.path:
        raise UserError(f"set data.path or data.mix, and model.path; job={config.job!r} has no data before it runs")
    experiment = experiment.fitted(load_config(resolve(config.model.path)).max_position)
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template)
    if prints_date(tokenizer):
        experiment = experiment.dated(workdir)
    config, kind, layout = experiment.config, experiment.loss.kind, experiment.layout
    data = load_pairs(experiment, tokenizer)
    loses = Alphabet(tokenizer).loses
    counts = new_counts(len(sources))
    records = list(source_records(sources, experiment, counts, experiment.cleaning, loses=loses))
    records = [record for record in records if not record.held_out]
    how = dict(max_length=config.max_length, too_long=config.too_long, keep_end=config.data.keep_end)
    how |= dict(mask_format=config.data.mask_format, chat=experiment.chat)
    if {stage.name for stage in data.stages["training"]} & set(LATER):
        kept = {(pair.where, pair.label) for pair in data.training}
        tokenized = {
            (r.where, r.label) for r, pair in iter_pairs(records, tokenizer, **how) if not isinstance(pair, str)
        }
        records = [record for record in records if (record.where, record.label) not in tokenized - kept]
    unlimited = iter_pairs(records, tokenizer, **how | {"max_length": NO_LIMIT})
    full = [pair for _, pair in unlimited if not isinstance(pair, str)]
    options = dict(micro_steps=config.micro_steps, layout=layout, row_length=config.data.row_length)
    options["group"] = experiment.group
    pairs = make_pair_set(data.training, config.batch_size, **options)
    scores = scores_of(config, sources)
    stages = {part: [stage._asdict() for stage in some] for part, some in data.stages.items()}
    report = {"sources": [one._asdict() for one in data.read_from], "mixture": data.sources, "stages": stages}
    report["noticed"] = {part: remarks.as_json() for part, remarks in data.noticed.items()}
    report |= {"unread": data.unread, "notes": data.notes}
    options = dict(kind=kind, max_length=config.max_length, watch=watched, loses=loses)
    report |= make_report(records, data.training, full, scores, **options)

    total = np.array([len(pair.prompt) + max(map(len, pair.responses)) for pair in full], np.int64)
    drawn = {"tokens": token_lengths(data.training), "total": {"prompt + longer response": total}, "scores": scores}
    masked = config.data.mask_format
    shown = [
        (name, [written_pair(one, tokenizer, kind, *titled(one.index, pairs), masked=masked) for one in group])
        for name, group in groups_of_pairs(config, pairs, layout, tokenizer.eos_token_id)
    ]
    tables = tables_of(report)
    about = f"{len(data.training)} {kind} for {experiment.loss.name}; max_length {config.max_length}, "
    about += f"too_long {config.too_long}"
    text = page(f"Data of {', '.join(map(str, sources))}", about, tables, pictures(drawn, config.max_length), shown)
    write_json(workdir / "data.json", report)
    write_text(workdir / "data.html", text)
    print(as_text(tables))
    note(f"{workdir / 'data.html'} shows {sum(len(some) for _, some in shown)} pairs token by token")
    return report


def titled(index: int, data: PairSet) -> tuple[str, str]:
    """(title, where) of a pair."""
    return f"pair {index}", str(data.pairs[index].where)


def groups_of_pairs(config: ConfigDict, data: PairSet, layout: Any, eos: int) -> list[tuple[str, list[Any]]]:
    """(name, pairs): those of the first steps, as the run would take them, and extremes; all off packed batches."""
    steps = -(-FIRST // config.batch_size)
    batches = train_batches(
        data, seed=config.seed, shuffle=config.data.shuffle, balance=config.data.balance, start=0, stop=steps
    )
    first = [one for batch in batches for one in shown_pairs(batch, layout, eos)][:FIRST]
    lengths = data.lengths
    responses = lengths.responses
    orders = {
        "longest": -(lengths.prompt + responses.max(1)),
        "longest prompts": -lengths.prompt,
        "shortest responses": responses.min(1),
    }
    if responses.shape[1] > 1:
        orders |= {
            "chosen is much longer": responses[:, 1] - responses[:, 0],
            "rejected is much longer": responses[:, 0] - responses[:, 1],
        }
    out = [("first steps", first)]
    for name, order in orders.items():
        index = np.argsort(order, kind="stable")[: min(EACH, config.batch_size)]
        out.append((name, list(shown_pairs(batch_of(data, index), layout, eos))))
    return out


def scores_of(config: ConfigDict, sources: Sequence[Source]) -> dict[str, np.ndarray]:
    """The scores that the training rows have, by the name of their field: {name: [rows that have one]}."""
    scores: dict[str, list[float]] = {name: [] for name in SCORES}
    for source in sources:
        options = dict(seed=config.seed, responses=("chosen",), columns=SCORES)
        with contextlib.suppress(UserError):  # rows that the loss reads, but not as demonstrations
            for record in read_source(source, 0, Tally(), **options):
                for name, value in record.columns:
                    with contextlib.suppress(Malformed):  # no number, or none that a loss could read
                        scores[name].append(number(value, name))
    return {name: np.array(values, np.float64) for name, values in scores.items() if values}
