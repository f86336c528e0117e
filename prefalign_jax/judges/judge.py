"""Comparisons in, verdicts out: the interface of every judge, and the judge that any score makes."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefalign_jax.data.records import Prompt, Text, told, told_by
from prefalign_jax.data.rows import json_rows
from prefalign_jax.generation.sample_files import (
    Sample,
    answer_text,
    as_row,
    response_of,
    text_of,
    told_with,
    write_jsonl,
)
from prefalign_jax.types import Place, UserError


class Comparison(NamedTuple):
    """Two responses to one prompt, and what the chat template was told with it."""

    prompt: Text
    first: Text
    second: Text
    id: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    chat_template_kwargs: tuple[tuple[str, Any], ...] = ()

    @property
    def texts(self) -> tuple[str, str]:
        """The two responses as a judge reads them."""
        return answer_text(self.first), answer_text(self.second)


class Verdict(NamedTuple):
    """What a judge says of a comparison.

    Attributes:
      comparison: what was judged.
      preference: for `first`, in [0, 1], a tie 0.5; None where the verdict was lost.
      reason: why it was lost, '' otherwise.
      scores: of (first, second), of a judge that scores each alone.
      orders: of a judge asked both ways, the preference for `first` when it is shown first, and when it is second.
    """

    comparison: Comparison
    preference: float | None
    reason: str = ""
    scores: tuple[float, float] | None = None
    orders: tuple[float, float] | None = None


class Scores(NamedTuple):
    """A number for each of N responses.

    Attributes:
      values: [N] float64, NaN where there is none.
      reasons: N texts, '' where there is a number, else why there is none.
    """

    values: np.ndarray
    reasons: list[str]


Judge = Callable[[Sequence[Comparison]], list[Verdict]]
# (prompts, responses) -> a number for each response; a prompt with tools or the like is a `Prompt`.
Scorer = Callable[[Sequence[Text | Prompt], Sequence[Text]], Scores]


def pair_samples(first: Sequence[Sample], second: Sequence[Sample]) -> tuple[list[Comparison], dict[str, int]]:
    """Puts two models' samples side by side: by id, or by prompt where there is none; the k-th with the k-th.

    Args:
      first, second: of one model each.

    Returns:
      The comparisons in the order of `first`, and how many samples were left out for each reason: 'only in the first',
      'only in the second', 'prompts differ' (pairs, under one id).
    """

    def by_key(samples: Sequence[Sample]) -> dict[tuple[str, int], Sample]:
        seen, out = collections.Counter(), {}
        for sample in samples:
            key = sample.id or json.dumps(_asked(sample), ensure_ascii=False, sort_keys=True)
            out[key, seen[key]] = sample
            seen[key] += 1
        return out

    ours, theirs = by_key(first), by_key(second)
    comparisons, dropped = [], collections.Counter()
    for (key, number), sample in ours.items():
        other = theirs.get((key, number))
        if other is None:
            dropped["only in the first"] += 1
        elif _asked(other) != _asked(sample):
            dropped["prompts differ"] += 1
        else:
            name = sample.id or str(len(comparisons) + 1)
            repeated = f"#{number + 1}" if number and sample.id else ""
            both = sample.response, other.response
            comparisons.append(Comparison(sample.prompt, *both, name + repeated, **told_by(sample)))
    if lonely := len(theirs.keys() - ours.keys()):
        dropped["only in the second"] = lonely
    return comparisons, dict(dropped)


def _asked(sample: Sample) -> dict[str, Any]:
    """All that a sample's model was asked with."""
    return {"prompt": sample.prompt, **told(sample)}


def by_reward(score: Scorer) -> Judge:
    """The judge that prefers the higher score: 1 for a win of `first`, 0.5 for a tie, 0 for a loss.

    Args:
      score: of prompts and responses, such as `rewards.scorer("fewer_words")` or `reward_model.scorer(path)`.

    Returns:
      The judge; a verdict without both scores is lost, with the reason.
    """

    def judge(comparisons: Sequence[Comparison]) -> list[Verdict]:
        where = Place("a response to score")
        prompts = [
            Prompt(c.prompt, c.id, where, c.tools, c.chat_template_kwargs) if told(c) else c.prompt for c in comparisons
        ]
        values, reasons = score(prompts * 2, [c.first for c in comparisons] + [c.second for c in comparisons])
        n = len(comparisons)
        out = []
        for i, comparison in enumerate(comparisons):
            a, b = float(values[i]), float(values[n + i])
            if math.isnan(a) or math.isnan(b):
                out.append(Verdict(comparison, None, reasons[i] or reasons[n + i]))
            else:
                out.append(Verdict(comparison, (1.0 if a > b else 0.0) if a != b else 0.5, scores=(a, b)))
        return out

    return judge


def write_verdicts(path: str | Path, verdicts: Sequence[Verdict]) -> None:
    """Writes a JSONL file with a line a verdict, its comparison's fields beside its own; whole or not at all."""
    rows = []
    for verdict in verdicts:
        fields = verdict._asdict()
        rows.append({**as_row(fields.pop("comparison")), **fields})
    write_jsonl(path, rows)


def read_verdicts(path: str | Path) -> list[Verdict]:
    """Reads verdicts: what `write_verdicts` wrote, or a person downloaded from the side-by-side page.

    Args:
      path: JSONL of prompt, first, second, preference (in [0, 1] or null), and optionally id, reason, scores, orders.

    Raises:
      UserError: the file cannot be read or a row is malformed.
    """

    def pair(where: Place, row: dict, name: str) -> tuple[float, float] | None:
        value = row.get(name)
        if value is None:
            return None
        if not (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))):
            raise UserError(f"{where}: field {name!r}: expected two numbers, found {value!r:.40}")
        return float(value[0]), float(value[1])

    out = []
    for where, row in json_rows(Path(path)):
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object, found {type(row).__name__}")
        texts = {"id": "", "reason": "", **row}
        for name in ("id", "reason"):
            if not isinstance(texts.get(name), str):
                raise UserError(f"{where}: field {name!r}: expected a string, found {row.get(name)!r:.40}")
        preference = row.get("preference")
        if preference is not None and not (_is_number(preference) and 0 <= preference <= 1):
            raise UserError(f"{where}: field 'preference': expected null or 0 to 1, found {preference!r:.40}")
        prompt = text_of(where, row, "prompt")
        both = (response_of(where, row, name, prompt) for name in ("first", "second"))
        comparison = Comparison(prompt, *both, texts["id"], **told_with(where, row, prompt))
        reason = texts["reason"] or ("no reason given" if preference is None else "")
        out.append(Verdict(comparison, preference, reason, pair(where, row, "scores"), pair(where, row, "orders")))
    return out


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
