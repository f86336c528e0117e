"""What the inspection of data reports: the numbers of data/statistics.py as one record and as tables."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prefalign_jax.data.cleaning import CLEANING, BoundStep, Loses, Watch, clean
from prefalign_jax.data.records import Record
from prefalign_jax.data.remarks import from_json, lines
from prefalign_jax.data.statistics import (
    QUANTILES,
    beginnings,
    length_bias,
    numbered,
    quantiles,
    repeated_prompts,
    text_lengths,
    token_lengths,
    truncation,
)
from prefalign_jax.data.words import turns
from prefalign_jax.tables import Table, aligned
from prefalign_jax.types import Pair


def would_drop(
    records: Sequence[Record],
    kind: str,
    scores: bool,
    watch: Watch = lambda records, name: records,
    loses: Loses = lambda record: False,
) -> dict[str, dict[str, int]]:
    """What every cleaning step that needs no option would drop or change by itself, by its name and reason.

    Args:
      records: as they are trained on.
      kind: one of cleaning.RECORD_KINDS.
      scores: whether they have margins.
      watch, loses: as in `cleaning.clean`.
    """
    out = {}
    for name, step in CLEANING.items():
        if kind in step.kinds and not step.required and (scores or not step.scores):
            _, (stage,) = clean(list(records), [BoundStep(name, step.options)], watch=watch, loses=loses)
            out[name] = {**stage.dropped, **stage.repaired}
    return out


def make_report(
    records: Sequence[Record],
    pairs: Sequence[Pair],
    full: Sequence[Pair],
    scores: Mapping[str, np.ndarray],
    *,
    kind: str,
    max_length: int,
    watch: Watch = lambda records, name: records,
    loses: Loses = lambda record: False,
) -> dict[str, Any]:
    """Everything that data.json says of the data, but for where they come from.

    Args:
      records: as they are tokenized.
      pairs: as they are trained on.
      full: as they would be without max_length.
      scores: what the data say of how good the responses are: name -> [N].
      kind: one of cleaning.RECORD_KINDS.
      max_length: see `truncation`.
      watch, loses: as in `cleaning.clean`.

    Returns:
      JSON values.
    """
    tokens, characters = token_lengths(pairs), text_lengths(records)
    out: dict[str, Any] = {
        "tokens": {side: quantiles(values) for side, values in tokens.items()},
        "characters": {side: quantiles(values) for side, values in characters.items()},
    }
    if kind == "pairs":
        prompts = numbered([np.asarray(pair.prompt).tobytes() for pair in pairs])
        texts = numbered([str(record.prompt) for record in records])
        out["length_bias"] = {
            "tokens": length_bias(tokens["chosen"], tokens["rejected"], prompts),
            "characters": length_bias(characters["chosen"], characters["rejected"], texts),
        }
    out["truncation"] = truncation(full, pairs, max_length)
    out["cleaning_would_drop"] = would_drop(
        records, kind, not all(np.isnan(record.margin) for record in records), watch, loses
    )
    out["prompts"] = repeated_prompts(records)
    out["beginnings"] = beginnings(records)
    counts = collections.Counter(len(turns(record.prompt)) for record in records)
    out["turns"] = {str(number): counts[number] for number in sorted(counts)}
    out["scores"] = {name: quantiles(values) for name, values in scores.items()}
    return out


def tables_of(report: Mapping[str, Any]) -> list[Table]:
    """The report as tables for people."""
    out: list[Table] = []
    if "stages" in report:
        rows = []
        for part, stages in report["stages"].items():
            for stage in stages:
                counts = {**stage["dropped"], **{f"{why} (changed)": n for why, n in stage["repaired"].items()}}
                reasons = ", ".join(f"{n:,} {why}" for why, n in counts.items() if n)
                rows.append((f"{part}: {stage['name']}", stage["before"], stage["after"], reasons))
        out.append(Table("Records", ("stage", "in", "out", "left out, by reason"), rows))
    noticed = {part: lines(from_json(about)) for part, about in report.get("noticed", {}).items()}
    if any(noticed.values()):
        rows = [(part, line) for part, some in noticed.items() for line in some]
        out.append(Table("Noticed", ("data", "what"), rows))
    for name, head in (("notes", "Records read in part"), ("unread", "Fields that are not used")):
        if rows := [(part, *item) for part, counts in report.get(name, {}).items() for item in counts.items()]:
            out.append(Table(head, ("of", "what" if name == "notes" else "field", "count"), rows))
    for unit in ("tokens", "characters", "scores"):
        columns = [name for name in (*QUANTILES, "mean") if any(name in values for values in report[unit].values())]
        rows = [(side, *map(_short, map(values.get, columns))) for side, values in report[unit].items() if values]
        if rows:
            out.append(Table(unit.capitalize(), ("", *columns), rows))
    if "length_bias" in report:
        rows = []
        for unit, bias in report["length_bias"].items():
            share = (
                ""
                if "longer_wins" not in bias
                else f"{bias['longer_wins']:.3f} [{bias['low']:.3f}, {bias['high']:.3f}]"
            )
            counts = bias["longer"], bias["shorter"], bias["equal"]
            rows.append((unit, *counts, share, f"prefer the {bias['rule']}: {bias['accuracy']:.3f}"))
        head = ("chosen, in", "longer", "shorter", "equal", "longer wins [95%]", "accuracy of lengths alone")
        out.append(Table("Length bias", head, rows))
    cost = report["truncation"]
    rows = [(name.replace("_", " "), number) for name, number in cost.items()]
    out.append(Table("What max_length costs", ("", "count"), rows))
    rows = [(step, why, n) for step, counts in report["cleaning_would_drop"].items() for why, n in counts.items()]
    out.append(Table("What cleaning would drop or change", ("step", "reason", "records"), rows))
    rows = [(name.replace("_", " "), number) for name, number in report["prompts"].items()]
    rows += [(f"{number} turns of the user", count) for number, count in report["turns"].items()]
    out.append(Table("Prompts", ("", "count"), rows))
    if report["beginnings"]:
        out.append(Table("Most frequent beginnings", ("first words", "prompts"), report["beginnings"]))
    return out


def as_text(tables: Sequence[Table]) -> str:
    """Tables for a terminal."""
    return "\n".join(f"\n{table.title}\n{aligned(table.head, table.rows, indent=2)}" for table in tables)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}" if value % 1 else f"{value:,.0f}"
