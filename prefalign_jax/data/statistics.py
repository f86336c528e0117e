"""What training data look like in numbers: lengths, length bias, turns, what max_length costs."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from prefalign_jax.data.records import Record
from prefalign_jax.data.words import content, turns
from prefalign_jax.intervals import share_interval
from prefalign_jax.types import Pair

QUANTILES = {"least": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "99%": 0.99, "most": 1.0}
PREFIX = 5  # words of a prompt's beginning
FREQUENT = 10  # beginnings that are listed


def quantiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Quantiles that are values themselves, and the mean.

    Args:
      values: [N], of any kind of number.

    Returns:
      {name of QUANTILES or 'mean': value}, {} for no value.

    Example:
      >>> quantiles([1, 2, 3, 10])["median"], quantiles([1, 2, 3, 10])["mean"]
      (2, 4.0)
    """
    values = np.asarray(values)
    if not values.size:
        return {}
    values_at = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf").tolist()
    return dict(zip(QUANTILES, values_at, strict=True)) | {"mean": float(values.mean())}


def length_bias(
    chosen: Sequence[int] | np.ndarray, rejected: Sequence[int] | np.ndarray, prompts: Sequence[Any] | None = None
) -> dict[str, Any]:
    """How often the longer response is the chosen one, and how much a rule that sees nothing but lengths gets right.

    Args:
      chosen, rejected: [N] lengths of the responses, in any unit.
      prompts: [N] what is equal for pairs of the same prompt, which are not independent; each its own if None.

    Returns:
      `longer`, `shorter` and `equal`: pairs whose chosen response is that. `longer_wins`: share of longer among pairs
      of different lengths, with Wilson's 95% interval in `low` and `high`. `rule`: 'longer' or 'shorter', whichever
      wins more often, and `accuracy`: how often it picks the chosen response, where an even draw breaks the ties of
      equal lengths. `mean_difference`: mean length of chosen less that of rejected. {} for no pair.

    Example:
      >>> found = length_bias([5, 9, 9, 4], [3, 4, 8, 4])
      >>> found["longer"], found["equal"], found["longer_wins"], found["rule"], found["accuracy"]
      (3, 1, 1.0, 'longer', 0.875)
    """
    difference = np.asarray(chosen, np.int64) - np.asarray(rejected, np.int64)
    if not difference.size:
        return {}
    longer, shorter, equal = (int(np.count_nonzero(mask)) for mask in (difference > 0, difference < 0, difference == 0))
    out: dict[str, Any] = {"longer": longer, "shorter": shorter, "equal": equal}
    if longer + shorter:
        differ = difference != 0
        clusters = None if prompts is None else np.asarray(prompts)[differ]
        share = share_interval(difference[differ] > 0, clusters=clusters)
        out |= {"longer_wins": share.mean, "low": share.low, "high": share.high}
    out["rule"] = "longer" if longer >= shorter else "shorter"
    out["accuracy"] = (max(longer, shorter) + equal / 2) / difference.size
    out["mean_difference"] = float(difference.mean())
    return out


def numbered(keys: Sequence[Any]) -> np.ndarray:
    """[N] the same number for equal keys.

    Example:
      >>> numbered(["a", "b", "a"]).tolist()
      [0, 1, 0]
    """
    known: dict[Any, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], np.int64)


def text_lengths(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """{'prompt', 'chosen', 'rejected': [N] characters}, without 'rejected' where there is none; of groups the worst."""
    texts = {"prompt": [record.prompt for record in records], "chosen": [record.chosen for record in records]}
    if any(record.rejected for record in records):
        texts["rejected"] = [(record.rejected, *record.others)[-1] for record in records]
    return {side: np.array([len(content(text)) for text in some], np.int64) for side, some in texts.items()}


def token_lengths(pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """{'prompt', 'chosen', 'rejected': [N] tokens, EOS included}, as `text_lengths`."""
    ids = {"prompt": [pair.prompt for pair in pairs], "chosen": [pair.chosen for pair in pairs]}
    if any(len(pair.rejected) for pair in pairs):
        ids["rejected"] = [pair.responses[-1] for pair in pairs]
    return {side: np.array(list(map(len, some)), np.int64) for side, some in ids.items()}


def truncation(full: Sequence[Pair], kept: Sequence[Pair], max_length: int) -> dict[str, int]:
    """What max_length costs.

    Args:
      full: pairs as they would be without a limit.
      kept: pairs as they are trained on; a `where` that is missing here was dropped.
      max_length: tokens of prompt + longest response.

    Returns:
      Counts of pairs: `pairs`, those `too_long`, and of these `dropped`, with a `cut_prompt` and with a `cut_response`;
      of tokens: `tokens` in full, `lost_prompt_tokens` and `lost_response_tokens`, those of dropped pairs included.
    """
    left = collections.defaultdict(list)
    for pair in kept:
        left[pair.where, pair.label].append(pair)
    out = dict.fromkeys(("pairs", "too_long", "dropped", "cut_prompt", "cut_response"), 0)
    out |= dict.fromkeys(("tokens", "lost_prompt_tokens", "lost_response_tokens"), 0)
    for pair in full:
        prompt, response = len(pair.prompt), sum(map(len, pair.responses))
        out["pairs"] += 1
        out["too_long"] += prompt + max(map(len, pair.responses)) > max_length
        out["tokens"] += prompt + response
        kept_pairs = left[pair.where, pair.label]
        if kept_pairs:
            one = kept_pairs.pop(0)
            prompt -= len(one.prompt)
            response -= sum(map(len, one.responses))
            out["cut_prompt"] += prompt > 0
            out["cut_response"] += response > 0
        else:
            out["dropped"] += 1
        out["lost_prompt_tokens"] += prompt
        out["lost_response_tokens"] += response
    return out


def beginnings(records: Sequence[Record]) -> list[tuple[str, int]]:
    """The most frequent first words of what people ask first, with how many prompts begin so, each prompt once."""
    firsts = {str(record.prompt): (turns(record.prompt) or [content(record.prompt)])[0] for record in records}
    counts = collections.Counter(" ".join(first.split()[:PREFIX]) for first in firsts.values())
    return [(text, count) for text, count in counts.most_common(FREQUENT) if count > 1]


def repeated_prompts(records: Sequence[Record]) -> dict[str, int]:
    """How many prompts there are, how many records share theirs with an earlier one, and the most of one prompt."""
    counts = collections.Counter(str(record.prompt) for record in records)
    return {
        "prompts": len(counts),
        "records_of_an_earlier_prompt": len(records) - len(counts),
        "most_of_one_prompt": max(counts.values(), default=0),
    }
