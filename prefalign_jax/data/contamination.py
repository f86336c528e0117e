"""Training records that hold the prompts of a benchmark, which a model must not be measured with afterwards."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from prefalign_jax.data.records import Record, Text, read_prompts
from prefalign_jax.data.words import parts, runs, turns, words
from prefalign_jax.options import split_names

SHORTEST = 8  # fewer words in a row are met by chance


class Index(NamedTuple):
    """What gives a benchmark away.

    Attributes:
      heads: the first words of each run that is looked for -> (all its words, joined, and the benchmark).
      head: how many words those are.
      short: whole prompts too short to be looked for in other texts -> the benchmark.
    """

    heads: dict[str, dict[str, str]]
    head: int
    short: dict[str, str]


def contamination(
    records: Iterable[Record],
    held_out: Sequence[Text],
    *,
    benchmarks: str = "",
    held_out_too: bool = False,
    ngram: int = 13,
) -> tuple[list[Record], dict[str, int]]:
    """Drops records that hold `ngram` words in a row of a benchmark's prompt, anywhere in prompt or responses.

    Of a prompt without a turn that long its longest turn is looked for as a whole, and of one with fewer than 8 words
    in each, which anybody may write, only records with exactly that prompt are dropped. Case and punctuation do not
    count, nor do a benchmark's system and assistant messages.

    Args:
      records: of which those without stay.
      held_out: the run's own held-out prompts.
      benchmarks: files of prompts, or whatever else `read_prompts` reads, separated by commas; of a hub data set the
        split 'test'.
      held_out_too: take `held_out` for one more benchmark.
      ngram: words in a row.

    Returns:
      The records that stay, and how many hold something of each benchmark; one that holds several counts for the one
      met first in its text.

    Raises:
      UserError: a file cannot be read.

    Source: Brown et al., arXiv 2005.14165, appendix C (13 words; shorter examples whole, of 8 words at least).
    """
    sources: dict[str, list[Text]] = {}
    for path in split_names(benchmarks):
        local = Path(path).expanduser()
        name = local.name if local.exists() else path  # where a file lies means nothing to a reader of the counts
        sources.setdefault(f"in benchmark {name}", []).extend(one.prompt for one in read_prompts(path, split="test")[0])
    if held_out_too:
        sources["in a held-out prompt"] = list(held_out)
    index = make_index(sources, ngram)
    kept, dropped = [], collections.Counter(dict.fromkeys(sources, 0))
    for record in records:
        reason = found_in(record, index)
        if reason is None:
            kept.append(record)
        else:
            dropped[reason] += 1
    return kept, dict(dropped)


def make_index(sources: dict[str, Sequence[Text]], ngram: int) -> Index:
    """What to look for.

    Args:
      sources: benchmark -> prompts; what several hold counts for the first.
      ngram: words in a row.
    """
    index = Index({}, min(SHORTEST, ngram), {})
    for name, prompts in sources.items():
        for prompt in prompts:
            said = [words(turn) for turn in turns(prompt)]
            longest = max(said, key=len, default=[])
            known_runs = [run for turn in said for run in runs(turn, ngram)]
            if not known_runs and len(longest) >= index.head:
                known_runs = [" ".join(longest)]
            elif not known_runs and longest:
                index.short.setdefault(" ".join(word for turn in said for word in turn), name)
            for run in known_runs:
                head = " ".join(run.split(" ")[: index.head])
                index.heads.setdefault(head, {}).setdefault(run, name)
    return index


def found_in(record: Record, index: Index) -> str | None:
    """The benchmark that a record holds something of, None if there is none."""
    whole = " ".join(word for turn in turns(record.prompt) for word in words(turn))
    if whole in index.short:
        return index.short[whole]
    for text in parts(record):
        these = words(text)
        for at, head in enumerate(runs(these, index.head)):
            for run, name in index.heads.get(head, {}).items():
                if " ".join(these[at : at + run.count(" ") + 1]) == run:
                    return name
    return None
