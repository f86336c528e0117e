"""A datasheet of what a run was trained on: sources with their hashes, counts by stage and reason, lengths, template.

Source: Gebru et al., arXiv 1803.09010, for the idea; this one holds what a program can know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefalign_jax.data.cleaning import BoundStep, Stage
from prefalign_jax.data.counts import listed_fields
from prefalign_jax.data.memory import MemoryRows
from prefalign_jax.data.pipeline import PairSet
from prefalign_jax.data.remarks import Remarks, lines
from prefalign_jax.data.rows import content_digest
from prefalign_jax.data.statistics import length_bias, quantiles
from prefalign_jax.files import write_json, write_text
from prefalign_jax.tables import markdown

FORMAT = 1


class ReadFrom(NamedTuple):
    """Something that was read.

    Attributes:
      name: of a file, a directory or a data set of the hub, as it was named.
      role: what it was read for.
      records: read from it; None where they were not counted.
      sha256: of the file's bytes; else `rows.content_digest`.
      of: 'file' or 'content'.
      bytes: of the file, None without one.
    """

    name: str
    role: str
    records: int | None
    sha256: str
    of: str
    bytes: int | None


def read_from(name: str | MemoryRows, split: str, role: str, records: int | None = None) -> ReadFrom:
    """Says what something that was read is; a file is read once more for its hash.

    Args:
      name, split: as `read_rows` takes them.
      role, records: see `ReadFrom`.
    """
    path = None if isinstance(name, MemoryRows) else Path(name).expanduser()
    if path is None or not path.is_file():
        return ReadFrom(str(name), role, records, content_digest(name, split), "content", None)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ReadFrom(name, role, records, digest, "file", path.stat().st_size)


def make_datasheet(
    config: Mapping[str, Any],
    data: PairSet,
    *,
    read: Sequence[ReadFrom],
    stages: Mapping[str, Sequence[Stage]],
    steps: Sequence[BoundStep],
    mixture: Sequence[Mapping[str, Any]],
    kind: str,
    chat: bool,
    tokenizer: Any,
    digest: str,
    noticed: Mapping[str, Remarks] = {},
    unread: Mapping[str, Mapping[str, int]] | None = None,
    notes: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, Any]:
    """What is known of the data once they are tokenized; nothing is read or tokenized again.

    Args:
      config: the run's, resolved.
      data: the training pairs.
      read, stages, mixture: of `load_data.Data`.
      steps: of the cleaning.
      kind: one of cleaning.RECORD_KINDS.
      chat: whether there are messages, which go through the chat template.
      tokenizer: Hugging Face tokenizer.
      digest: of the training pairs.
      noticed: what was noticed of the records, by part.
      unread, notes: of `load_data.Data`.

    Returns:
      JSON values.
    """
    fields = config["data"]
    template = tokenizer.chat_template if chat else None
    return {
        "format": FORMAT,
        "sources": [one._asdict() for one in read],
        "mixture": list(mixture),
        "stages": {part: [stage._asdict() for stage in some] for part, some in stages.items()},
        "noticed": {part: lines(some) for part, some in noticed.items() if lines(some)},
        "unread": {part: dict(fields) for part, fields in (unread or {}).items() if fields},
        "notes": {part: dict(counts) for part, counts in (notes or {}).items() if counts},
        "cleaning": {step.name: step.options for step in steps},
        "seed": config["seed"],
        "tokenizer": {
            "name": str(config["model"]["path"]),
            "vocabulary": len(tokenizer),
            "bos": tokenizer.bos_token,
            "eos": tokenizer.eos_token,
        },
        "template": {
            "name": (fields["chat_template"] or "the tokenizer's own") if chat else None,
            "sha256": hashlib.sha256(str(template).encode()).hexdigest() if template else None,
            "text": template,
            "kwargs": fields["chat_template_kwargs"],
            "date": fields["date"],
            "may_drop": fields["template_may_drop"],
        },
        "max_length": config["max_length"],
        "too_long": config["too_long"],
        "training": _training(data, kind, digest) | _cut(data, kind, config),
    }


def _training(data: PairSet, kind: str, digest: str) -> dict[str, Any]:
    """What the training pairs are: how many, their digest, their tokens by side, whether the longer ones are chosen."""
    lengths = data.lengths
    tokens = {"prompt": lengths.prompt, "chosen": lengths.responses[:, 0]}
    if kind == "pairs":
        tokens["rejected"] = lengths.responses[:, 1]
    elif kind == "unpaired":  # what stands as rejected is the completion of another prompt
        desirable = data.pairs.label
        every = tokens.pop("chosen")
        tokens |= {"desirable": every[desirable], "undesirable": every[~desirable]}
    sums = {side: quantiles(values) | {"sum": int(values.sum())} for side, values in tokens.items() if values.size}
    about = {"kind": kind, "count": len(data.pairs), "sha256": digest}
    about |= {"trained_tokens": int(lengths.trained.sum()), "tokens": sums}
    if kind == "pairs":
        keys = data.pairs.prompt_key  # all 0 where pairs come from elsewhere than a reader
        prompts = keys if keys.any() else None
        about["length_bias"] = length_bias(tokens["chosen"], tokens["rejected"], prompts)
    return about


def _cut(data: PairSet, kind: str, config: Mapping[str, Any]) -> dict[str, int]:
    """How many are cut to max_length, which they fill then; {} where the longer ones are dropped."""
    if config["too_long"] == "drop":
        return {}
    responses = data.lengths.responses if kind == "pairs" else data.lengths.responses[:, :1]
    return {"cut": int((data.lengths.prompt + responses.max(axis=1) == config["max_length"]).sum())}


def write_datasheet(workdir: Path, sheet: Mapping[str, Any]) -> None:
    """Writes datasheet.json and datasheet.md."""
    write_json(workdir / "datasheet.json", sheet)
    write_text(workdir / "datasheet.md", "# Training data\n\n" + as_markdown(sheet))


def as_markdown(sheet: Mapping[str, Any], level: int = 2) -> str:
    """The sheet for people: sections of tables.

    Args:
      sheet: from `make_datasheet`.
      level: of the headings.
    """
    mark = "#" * level
    training = sheet["training"]
    out = [f"{mark} Sources"]
    rows = [
        (
            Path(s["name"]).name if s["of"] == "file" else s["name"],
            s["role"],
            s["records"],
            f"{s['sha256']} ({s['of']})",
        )
        for s in sheet["sources"]
    ]
    out.append(markdown(("source", "for", "records", "SHA-256"), rows))
    if sheet["mixture"]:
        head = list(sheet["mixture"][0])  # source, its pairs, its share, what it lost
        rows = [[one[head[0]], one[head[1]], f"{one[head[2]]:.1%}", _counts(one[head[3]])] for one in sheet["mixture"]]
        out.append(markdown(head, rows))
    out.append(f"{mark} Counts")
    rows = []
    for part, stages in sheet["stages"].items():
        for stage in stages:
            counts = {**stage["dropped"], **{f"{reason} (changed)": n for reason, n in stage["repaired"].items()}}
            rows.append((part, stage["name"], stage["before"], stage["after"], _counts(counts)))
    out.append(markdown(("part", "stage", "in", "out", "left out, by reason"), rows))
    for part, some in sheet["noticed"].items():
        out.append(f"Noticed of the {part} data:\n\n" + "\n".join(f"- {line}" for line in some))
    for part, counts in sheet.get("notes", {}).items():
        out.append(f"Of the {part} records: {_counts(counts)}.")
    for part, counted in sheet.get("unread", {}).items():
        out.append(f"Fields of {part} rows that are not used: {listed_fields(counted)}.")
    if options := {name: given for name, given in sheet["cleaning"].items() if given}:
        out.append("Options: " + "; ".join(f"{name} {_words(given)}" for name, given in options.items()) + ".")
    out.append(f"{mark} Tokens")
    names = [name for name in next(iter(training["tokens"].values()), {})]
    rows = [(side, *(_number(values[name]) for name in names)) for side, values in training["tokens"].items()]
    out.append(markdown(("of each", *names), rows))
    template = sheet["template"]["name"] or "none, the data are plain text"
    out.append(
        f"{training['count']:,} in training ({training['kind']}), {training['trained_tokens']:,} tokens trained. "
        f"At most {sheet['max_length']:,} tokens (too_long: {sheet['too_long']}), "
        f"{sheet['tokenizer']['vocabulary']:,} in the vocabulary. Chat template: {template}. "
        f"SHA-256 of the tokenized data: {training['sha256']}."
    )
    if bias := training.get("length_bias"):
        interval = ""
        if "longer_wins" in bias:
            interval = f" ({bias['longer_wins']:.3f} of those that differ, {bias['low']:.3f} to {bias['high']:.3f})"
        out.append(
            f"Length bias: the chosen response has more tokens in {bias['longer']:,} pairs{interval}, fewer in "
            f"{bias['shorter']:,}, as many in {bias['equal']:,}; always preferring the {bias['rule']} one is right in "
            f"{bias['accuracy']:.3f}."
        )
    return "\n\n".join(out) + "\n"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in counts.items()) or "none"


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items() if value)  # 0 and '' set no limit


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
