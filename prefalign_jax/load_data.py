"""The data of a run: a config's sources -> the pairs it is trained and evaluated on, and what became of the rest."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefalign_jax.data.alphabet import Alphabet
from prefalign_jax.data.chat import iter_pairs
from prefalign_jax.data.cleaning import BoundStep, Loses, Stage, benchmark_names, clean
from prefalign_jax.data.counts import HELD_OUT, TRAINING, Counts, added, from_json, listed, new_counts
from prefalign_jax.data.datasheet import ReadFrom, make_datasheet, read_from
from prefalign_jax.data.fields import SUPERVISED
from prefalign_jax.data.mixture import (
    Source,
    in_proportion,
    leaked,
    prompt_key,
    prompt_keys,
    read_source,
    source_digest,
    source_prompts,
)
from prefalign_jax.data.pairing import WHICH_PAIRS
from prefalign_jax.data.pairs import Origin, Pairs, digest_of, from_list
from prefalign_jax.data.pipeline import PairSet, mismatched
from prefalign_jax.data.reading import draw_number
from prefalign_jax.data.records import Prompt, Record, ascii_quotes, flip_labels, read_prompts
from prefalign_jax.data.remarks import Remarks, lines
from prefalign_jax.data.rows import content_digest, count_rows, files_left_out
from prefalign_jax.data.template import prints_date
from prefalign_jax.data.token_cache import Made, cached_tokens, token_key
from prefalign_jax.data.token_weights import decayed
from prefalign_jax.data.trees import over_prompts
from prefalign_jax.experiment import Experiment
from prefalign_jax.files import user_cache
from prefalign_jax.processes import note
from prefalign_jax.progress import Progress
from prefalign_jax.types import UserError

SHOWN = 10_000  # records that are cleaned and tokenized too quickly to show
ROLES = {"train": "training", "eval": "held out", "test": "test set, kept out"}  # of sources, by their use
CHUNK = 8192  # pairs tokenized before they are written


class Data(NamedTuple):
    """What a run is trained and evaluated on, and what became of the rest.

    Attributes:
      training, held_out: the pairs.
      dropped: for 'training' and 'held out' the counts by reason.
      sources: of a mixture's training sources what each gave: its pairs, share and dropped counts.
      read_from: every file or data set that was read, benchmarks of the cleaning included.
      stages: for 'training' and 'held out' what became of the records, part by part.
      chat: whether there are messages, which go through the chat template.
      noticed: for 'training' and 'held out' what was noticed of the records of its sources; what is held out of the
        training sources is under 'training'.
      unread: for 'training' and 'held out' {field: rows} that nobody reads.
      notes: for 'training' and 'held out' {what: records} that are read in part.
    """

    training: Pairs
    held_out: Pairs
    dropped: dict[str, dict[str, int]]
    sources: list[dict[str, Any]]
    read_from: list[ReadFrom]
    stages: dict[str, list[Stage]]
    chat: bool
    noticed: dict[str, Remarks]
    unread: dict[str, dict[str, int]]
    notes: dict[str, dict[str, int]]


def load_pairs(experiment: Experiment, tokenizer: Any) -> Data:
    """Reads, holds out, cleans and tokenizes; says on stderr what was dropped and why.

    Args:
      experiment: what is read, cleaned and tokenized, and how; it is fitted to its model.
      tokenizer: Hugging Face tokenizer.

    Returns:
      The `Data`.

    Raises:
      UserError: a malformed row, or nothing left to train on.
    """
    config, data, unit = experiment.config, experiment.config.data, experiment.loss.unit
    trained, others = experiment.sources_for("train"), experiment.sources_for("eval")
    say_left_out(trained)
    training, counts = tokenized_sources(trained, tokenizer, experiment, TRAINING)
    stages, read, noticed = counts.stages(TRAINING), counts.read, {TRAINING: counts.noticed}
    unread, notes = {TRAINING: dict(added(counts.unread))}, {TRAINING: counts.noted()}
    if others:
        held_out, more = tokenized_sources(others, tokenizer, experiment, HELD_OUT)
        counts.lost[HELD_OUT], read = more.lost[HELD_OUT], read + more.read
        stages[HELD_OUT], noticed[HELD_OUT] = more.stages(HELD_OUT)[HELD_OUT], more.noticed
        unread[HELD_OUT], notes[HELD_OUT] = dict(added(more.unread)), more.noted()
    else:
        held_out, training = training.select(training.held_out), training.select(~training.held_out)
    lost = counts.lost
    lost[TRAINING] += [step.dropped for step in counts.cleaning]
    if counts.flipped:
        note(f"labels of {counts.flipped} of {counts.flippable} training pairs flipped")

    training, held_out = kept_apart(experiment, training, held_out, lost, stages)
    dropped = {part: dict(added(lost[part])) for part in (TRAINING, HELD_OUT)}
    reasons = {part: listed(some) for part, some in dropped.items()}
    changed = listed(added(step.repaired for step in counts.cleaning))
    changed = "" if changed == "none" else f"; changed {changed}"
    note(f"training data: {len(training)} {unit}; dropped {reasons[TRAINING]}{changed}{counts.remarks()}")
    about = []
    if experiment.mixed:
        for number, source in enumerate(trained):
            from_source = int((training.source == number).sum())
            share = from_source / max(1, len(training))
            about.append({"source": str(source), unit: from_source, "share": share, "dropped": lost[TRAINING][number]})
            note(f"  {source}: {from_source} ({share:.1%}); dropped {listed(lost[TRAINING][number])}")
    if held_out or others:
        note(f"held out data: {len(held_out)} {unit}; dropped {reasons[HELD_OUT]}{more.remarks() if others else ''}")
    for part, remarks in noticed.items():
        for line in lines(remarks, config.data.special_in_text == "split"):
            note(f"{part} data: {line}")
    name = "data.mix" if experiment.mixed else trained[0].name
    if not training:
        raise UserError(
            f"{name}: no {unit} left to train on, dropped {reasons[TRAINING]}; max_length is {config.max_length}"
        )
    if (others or data.eval_fraction) and not held_out:
        where = ", ".join(source.name for source in others) or name
        raise UserError(f"{where}: no held-out {unit} left; dropped {reasons[HELD_OUT]}")
    if (gamma := config.token_weights.decay) is not None:
        training, held_out = decayed(training, gamma), decayed(held_out, gamma)
    if "mismatched" in experiment.loss.needs:
        training, held_out = mismatched(training, config.max_length), mismatched(held_out, config.max_length)
    if data.mean_over == "prompts":
        training, held_out = over_prompts(training), over_prompts(held_out)
    places = read_places(experiment, read)
    return Data(training, held_out, dropped, about, places, stages, counts.chatted > 0, noticed, unread, notes)


def say_left_out(sources: Sequence[Source]) -> None:
    """Says which files of directories are not read for training."""
    for source in sources:
        if left := files_left_out(source.name, source.part):
            shown = ", ".join(f"{name} ({split})" for name, split in [*left.items()][:4])
            note(f"{source.name}: not read for training{', among others' * (len(left) > 4)}: {shown}")


def read_places(experiment: Experiment, records: Sequence[int]) -> list[ReadFrom]:
    """What was read: sources, with how many records each gave, test sets and benchmarks."""
    sources = experiment.sources_for("train") + experiment.sources_for("eval")
    places = [
        read_from(source.name, source.part, ROLES[source.use], count)
        for source, count in zip(sources, records, strict=True)
    ]
    places += [read_from(source.name, source.part, ROLES["test"]) for source in experiment.sources_for("test")]
    return places + [read_from(name, "test", "benchmark") for name in benchmark_names(experiment.cleaning)]


def kept_apart(
    experiment: Experiment,
    training: Pairs,
    held_out: Pairs,
    lost: dict[str, list[Mapping[str, int]]],
    stages: dict[str, list[Stage]],
) -> tuple[Pairs, Pairs]:
    """The pairs without prompts that are on another side too, and of each source its share.

    Args:
      experiment: its sources, their weights, and data.leaks.
      training, held_out: the tokenized pairs.
      lost, stages: what is left out is added, by its reason.

    Returns:
      (training, held out).
    """
    data, unit = experiment.config.data, experiment.loss.unit
    # No prompt on both sides, whatever its case and spaces, and in whatever source.
    openings = experiment.loss.kind == SUPERVISED and data.train_on == "all"
    tests = [prompt_keys(source, openings) for source in experiment.sources_for("test")]
    if tests and (mask := leaked(held_out, np.concatenate(tests))).any():
        held_out = held_out.select(~mask)
        lost[HELD_OUT].append({"prompt of a test set": int(mask.sum())})
        stages[HELD_OUT].append(Stage("test sets", len(mask), len(held_out), lost[HELD_OUT][-1]))
    mask = leaked(training, np.concatenate([held_out.prompt_key, *tests]))
    if mask.any() and (data.leaks or ("report" if data.eval_path else "drop")) == "report":
        note(f"{mask.sum()} training {unit} have a prompt that is held out too; data.leaks=drop leaves them out")
    elif mask.any():
        training = training.select(~mask)
        lost[TRAINING].append({"prompt held out": int(mask.sum())})
        stages[TRAINING].append(Stage("held-out prompts", len(mask), len(training), lost[TRAINING][-1]))

    if training:
        chosen = in_proportion(
            training.source, [source.weight for source in experiment.sources_for("train")], experiment.config.seed
        )
        if len(chosen) < len(training):
            lost[TRAINING].append({"beyond its source's weight": len(training) - len(chosen)})
            stages[TRAINING].append(Stage("weights", len(training), len(chosen), lost[TRAINING][-1]))
            training = training.select(chosen)
    return training, held_out


def tokenized_sources(
    sources: Sequence[Source], tokenizer: Any, experiment: Experiment, which: str
) -> tuple[Pairs, Counts]:
    """The pairs of some sources, from the cache if they were tokenized before; many show their progress.

    Args:
      sources: read one after the other.
      tokenizer: Hugging Face tokenizer.
      experiment: as in `load_pairs`.
      which: 'training' or 'held out', for the progress.

    Returns:
      (the pairs, those of the held-out prompts marked; what was counted).
    """
    config, data, kind = experiment.config, experiment.config.data, experiment.record_kind
    steps = experiment.cleaning if which == TRAINING else ()
    chat = experiment.chat
    if prints_date(tokenizer):
        chat = chat._replace(day=chat.day or datetime.date.today())
    options = dict(max_length=config.max_length, too_long=config.too_long, keep_end=data.keep_end, chat=chat)
    options["mask_format"] = data.mask_format
    drawn = data.eval_fraction, data.flip_labels, data.eval_limit if data.eval_fraction else None
    path = None
    if data.cache_dir != "":
        directory = Path(data.cache_dir or user_cache() / "tokens").expanduser()
        what = dict(
            sources=list(map(source_digest, sources)), kind=kind, drawn=drawn, ascii=data.ascii_quotes, **options
        )
        if any(drawn) or any(source.fraction < 1 for source in sources) or data.pairs != WHICH_PAIRS[0]:
            what["seed"] = config.seed, held_out_seed(experiment)
        if steps:
            others = [source_digest(source) for source in experiment.sources_for("eval")]
            what["cleaning"] = list(steps), [content_digest(name, "test") for name in benchmark_names(steps)], others
        path = directory / f"{token_key(tokenizer, **what)}.arrow"

    def make() -> Made:
        counts = new_counts(len(sources))
        rows = [count_rows(source.name, source.part) for source in sources]

        def chunks() -> Iterator[Pairs]:
            with Progress(None if None in rows else sum(rows), f"{which} record") as progress:
                loses = Alphabet(tokenizer).loses
                records = source_records(sources, experiment, counts, steps, progress, loses)
                pairs = iter_pairs(records, tokenizer, remarks=counts.noticed, **options)
                while some := list(itertools.islice(pairs, CHUNK)):
                    for record, pair in some:
                        if isinstance(pair, str):
                            part = HELD_OUT if record.held_out else TRAINING
                            counts.lost[part][record.source][pair] += 1
                            counts.tokenizing[part][pair] += 1
                    kept = [(record, pair) for record, pair in some if not isinstance(pair, str)]
                    origins = [Origin(r.source, r.held_out, prompt_key(r.prompt)) for r, _ in kept]
                    yield from_list([pair for _, pair in kept], origins)

        return chunks(), counts.as_json

    pairs, about = cached_tokens(path, make)
    return pairs, from_json(about)


def source_records(
    sources: Sequence[Source],
    experiment: Experiment,
    counts: Counts,
    steps: Sequence[BoundStep] = (),
    progress: Progress | None = None,
    loses: Loses = lambda record: False,
) -> Iterator[Record]:
    """The records of some sources as they are tokenized: read, marked if held out, cleaned, labels flipped.

    Args:
      sources: read one after the other.
      experiment: as in `load_pairs`.
      counts: of these sources; added to as the iterator goes on.
      steps: of cleaning; with any, all records are read before the first one comes.
      progress: of the reading.
      loses: whether the tokenizer loses a character of a record, for the steps of cleaning that ask.
    """
    data, seed = experiment.config.data, experiment.config.seed
    kind = experiment.record_kind
    scored = any(step.step.scores for step in steps) and not kind["margin"]
    if scored:
        kind["margin"] = True

    def as_read() -> Iterator[Record]:
        done = itertools.count(1)
        fraction, limit, drawn_by = data.eval_fraction, data.eval_limit, held_out_seed(experiment)
        for number, source in enumerate(sources):
            part = HELD_OUT if source.use == "eval" else TRAINING
            for record in read_source(source, number, counts.tally(part, number), seed=seed, **kind):
                counts.read[number] += 1
                if progress and (count := next(done)) % 1024 == 0 and count > SHOWN:
                    progress.update(count)
                if fraction and source.use == "train" and draw_number(drawn_by, record.prompt) < fraction:
                    if limit and counts.held >= limit:
                        counts.over += 1
                        continue
                    counts.held += 1
                    record = record._replace(held_out=True)
                yield record._replace(margin=math.nan) if scored and record.held_out else record
            if not counts.read[number]:
                reasons = listed(counts.lost[part][number]).replace("none", "there was no row")
                raise UserError(f"{source.name}: no record is left ({reasons})")

    def cleaned() -> Iterator[Record]:
        records = list(as_read())
        held_out = [record for record in records if record.held_out]
        prompts = [record.prompt for record in held_out]
        for source in experiment.sources_for("eval"):
            if any(step.options.get("held_out_too") for step in steps):
                prompts += [one.prompt for one in source_prompts(source)]
        training = [record for record in records if not record.held_out]
        kept, counts.cleaning = clean(
            training, steps, prompts, watched, lambda record: loses(ascii_quotes(record) if ascii_ else record)
        )
        yield from held_out
        yield from (record._replace(margin=math.nan) if scored else record for record in kept)

    flip, ascii_ = data.flip_labels, data.ascii_quotes
    for record in cleaned() if steps else as_read():
        if flip and not record.held_out:
            (record,), flipped = flip_labels([record], flip, seed)
            counts.flipped += flipped
            counts.flippable += 1
        counts.plain += isinstance(record.prompt, str)
        counts.chatted += not isinstance(record.prompt, str)
        yield ascii_quotes(record) if ascii_ else record


def held_out_seed(experiment: Experiment) -> int:
    """By which prompts are held out: the same for runs that differ in their seed, if data.eval_seed is set."""
    seed = experiment.config.data.eval_seed
    return experiment.config.seed if seed is None else seed


def watched(records: list[Record], what: str) -> Iterable[Record]:
    """The records; of many it shows how far they were gone through."""
    if len(records) <= SHOWN:
        return records

    def shown() -> Iterator[Record]:
        with Progress(len(records), f"{what}: record") as progress:
            for number, record in enumerate(records, 1):
                yield record
                progress.update(number)

    return shown()


def datasheet_of(experiment: Experiment, data: Data, training: PairSet, tokenizer: Any) -> dict[str, Any]:
    """The datasheet of the training pairs; nothing is read or tokenized again.

    Args:
      experiment: fitted to its model.
      data: of `load_pairs`.
      training: its training pairs, packed.
      tokenizer: Hugging Face tokenizer.
    """
    return make_datasheet(
        experiment.plain,
        training,
        read=data.read_from,
        stages=data.stages,
        steps=experiment.cleaning,
        mixture=data.sources,
        kind=experiment.loss.kind,
        chat=data.chat,
        tokenizer=tokenizer,
        digest=digest_of(data.training),
        noticed=data.noticed,
        unread=data.unread,
        notes=data.notes,
    )


def load_prompts(path: str, limit: int | None) -> list[Prompt]:
    """Reads prompts to sample from; says on stderr what was dropped and why."""
    prompts, dropped = read_prompts(path, limit=limit)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    note(f"{path}: {len(prompts)} prompts; dropped {reasons}")
    return prompts
