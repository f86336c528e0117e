"""Several sources of data as one: what is taken of each, and no prompt on both sides of a split.

    mix = (
        {"path": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_prefs", "weight": 0.7},
        {"path": "hh/train.jsonl.gz", "weight": 0.3, "filter": {"source": ["helpful-base"]}},
        {"path": "HuggingFaceH4/ultrafeedback_binarized", "split": "test_prefs", "use": "eval"},
        {"path": "hh/test.jsonl.gz", "use": "test"},
    )

`weight`s are the sources' shares of the training pairs. They hold exactly (to a pair): of the sources that have more
than their share a part is taken, drawn by the seed, and what is left is counted. Nothing is repeated.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefalign_jax.data.conversation import first_answer
from prefalign_jax.data.formats import FORMATS
from prefalign_jax.data.memory import MemoryRows
from prefalign_jax.data.pairs import Pairs
from prefalign_jax.data.reading import Reading, Rows, Tally, draw_number
from prefalign_jax.data.records import Prompt, Record, Text, iter_prompts, iter_records
from prefalign_jax.data.rows import content_digest, read_rows
from prefalign_jax.data.splits import TEST, VALIDATION, split_of
from prefalign_jax.data.values import empty, name_of, names
from prefalign_jax.options import choose, did_you_mean, split_names
from prefalign_jax.types import Place, UserError, one_line

USES = ("train", "eval", "test")


class Source(NamedTuple):
    """Where some of the data come from, and what is taken of them.

    Attributes:
      path: a file, a directory, a hub name or rows in memory, see `rows.read_rows`.
      use: train; eval, held out; test, only its prompts are read, to keep them out of training and evaluation.
      split: of a directory or hub data set; 'train' for use=train, 'test' for others, unless it is set.
      subset: of a hub data set.
      format: a key of formats.FORMATS; None tells each row's from its fields.
      columns: name in the common format -> the row's own, with dots into objects ('info.post').
      filter: field -> value, or list of values, that rows must have there.
      map_fn: 'module:function', from a row to a row, a list of rows, or None to leave it out; called last.
      ignore: fields, of the row as it then is, that are read as if they were not there; 'message.FIELD' for one of
        every message.
      fraction: part of the records that is taken, drawn by the seed.
      limit: records at most, the first ones.
      weight: the source's share of the training pairs, relative to the other sources'.
    """

    path: str | MemoryRows
    use: str = "train"
    split: str | None = None
    subset: str | None = None
    format: str | None = None
    columns: Mapping[str, str] | None = None
    filter: Mapping[str, Any] | None = None
    map_fn: str | None = None
    ignore: tuple[str, ...] = ()
    fraction: float = 1.0
    limit: int | None = None
    weight: float | None = None

    @property
    def name(self) -> str | MemoryRows:
        """As `read_rows` takes it."""
        return f"{self.path}:{self.subset}" if self.subset else self.path

    @property
    def part(self) -> str:
        """The split that is read."""
        return self.split or ("train" if self.use == "train" else "test")

    def __str__(self) -> str:
        whole = isinstance(self.path, MemoryRows) or Path(self.path).expanduser().is_file()
        return str(self.name) if whole else f"{self.name} ({self.part})"


def sources_of(data: Mapping[str, Any]) -> list[Source]:
    """The sources that the data fields of a config name, `data.path` with `data.eval_path` or `data.mix`, checked.

    Raises:
      UserError: naming the source, its field, and what it takes.
    """
    if data["mix"] is None:
        both = {name: data[name] for name in _SHARED}
        sources = []
        if data["path"]:
            sources.append(_source(both | _named(data, "path", "split", "limit"), "data"))
        if data["eval_path"]:
            fields = {name.removeprefix("eval_"): data[name] for name in ("eval_path", "eval_split", "eval_limit")}
            sources.append(_source(both | fields | {"use": "eval"}, "data"))
        return sources
    of_sources = dict.fromkeys(("path", "limit", "eval_path", *_SHARED)) | {"split": "train", "eval_split": "test"}
    if not data["eval_fraction"]:
        of_sources["eval_limit"] = None
    for name, unset in of_sources.items():
        if data[name] != unset:
            raise UserError(f"data.{name}={data[name]!r} and data.mix are both set; write it into a source of data.mix")
    sources = [_source(fields, f"data.mix[{i}]") for i, fields in enumerate(data["mix"])]
    training = [source for source in sources if source.use == "train"]
    if not training:
        raise UserError("data.mix has no source with use='train'")
    unweighted = [source.name for source in training if source.weight is None]
    if 0 < len(unweighted) < len(training):
        raise UserError(f"data.mix: give every training source a weight or none; {unweighted[0]} has none")
    return sources


_SHARED = ("format", "columns", "map_fn", "ignore")  # fields of data that both of its sources take


def _named(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: fields[name] for name in names}


def _pairs_of(text: str, field: str) -> dict[str, str]:
    """What 'name=theirs,other=theirs' writes."""
    pairs = [item.partition("=") for item in split_names(text)]
    if any(not name or not theirs for name, _, theirs in pairs):
        raise UserError(
            f"{field}={text!r}: write NAME=THEIRS,NAME=THEIRS, as in prompt=question,chosen=good,rejected=bad"
        )
    return {name.strip(): theirs.strip() for name, _, theirs in pairs}


def _source(fields: Any, place: str) -> Source:
    known = Source._fields
    fields = _plain(fields)
    if isinstance(fields, Mapping):
        if isinstance(fields.get("columns"), str):
            fields = {**fields, "columns": _pairs_of(fields["columns"], f"{place}.columns")}
        if isinstance(fields.get("ignore"), str):
            fields = {**fields, "ignore": split_names(fields["ignore"])}
    if not isinstance(fields, Mapping) or not isinstance(fields.get("path"), str | MemoryRows):
        raise UserError(f"{place}: expected a dict with 'path' and any of {', '.join(known[1:])}, found {fields!r}")
    for name in fields:
        if name not in known:
            raise UserError(f"{place}: no field {name!r}, {did_you_mean(name, known)}there are {', '.join(known)}")
    source = Source(**{name: value for name, value in fields.items() if value is not None})
    if not isinstance(source.ignore, list | tuple) or not all(isinstance(name, str) for name in source.ignore):
        raise UserError(f"{place}.ignore={source.ignore!r}: write names of fields, with commas between them")
    source = source._replace(ignore=tuple(source.ignore))
    choose(f"{place}.use", source.use, dict.fromkeys(USES))
    if source.format is not None:
        choose(f"{place}.format", source.format, FORMATS)
    kinds = {"split": str, "subset": str, "columns": Mapping, "filter": Mapping, "map_fn": str, "limit": int}
    for name, kind in {**kinds, "fraction": (int, float), "weight": (int, float)}.items():
        value = getattr(source, name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(f"{place}.{name}={value!r} is no {getattr(kind, '__name__', 'number').lower()}")
    if not 0 < source.fraction <= 1:
        raise UserError(f"{place}.fraction={source.fraction} must lie in (0, 1]; nothing is repeated")
    for name in ("limit", "weight"):
        value = getattr(source, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{place}.{name}={value} must be positive")
    if source.weight is not None and source.use != "train":
        raise UserError(f"{place}.weight applies to use='train', not {source.use!r}")
    for name in ("fraction", "limit"):
        if source.use == "test" and getattr(source, name) != Source._field_defaults[name]:
            raise UserError(f"{place}.{name} applies to use='train' and 'eval': all prompts of a test set are kept out")
    if place != "data" and source.use == "train" and split_of(source.part) in (VALIDATION, TEST):
        raise UserError(
            f"{place}: the split {source.part!r} is for measuring; set its use to 'eval' or 'test', or name another"
        )
    if source.map_fn is not None:
        load_function(source.map_fn, f"{place}.map_fn")
    return source


def _plain(value: Any) -> Any:
    """Dicts for whatever reads like one, such as a ConfigDict."""
    return {key: _plain(one) for key, one in value.items()} if hasattr(value, "items") else value


def load_function(name: str, field: str) -> Callable[[Mapping], Any]:
    """The function that 'module:function' names.

    Raises:
      UserError: there is none.
    """
    module, _, function = name.partition(":")
    try:
        loaded = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module raises whatever it likes
        loaded = error
    if not callable(loaded):
        raise UserError(f"{field}={name!r}: expected 'module:function', importable from here, found {loaded!r}")
    return loaded


def source_digest(source: Source) -> str:
    """Of the content of a source and of all that decides what is read of it; of a map_fn the text of its module."""
    digest = hashlib.sha256(content_digest(source.name, source.part).encode())
    digest.update(repr(source._replace(weight=None)).encode())
    if source.map_fn:
        spec = importlib.util.find_spec(source.map_fn.partition(":")[0])
        digest.update(Path(spec.origin).read_bytes())
    return digest.hexdigest()


def adapted(rows: Rows, source: Source, tally: Tally) -> Iterator[tuple[Place, Any]]:
    """Rows after a source's filter, columns and map_fn; what they leave out or put another in place of is counted."""
    dropped = tally.dropped
    function = load_function(source.map_fn, "map_fn") if source.map_fn else None
    wanted = {
        name: values if isinstance(values, list | tuple) else (values,)
        for name, values in (source.filter or {}).items()
    }
    replaced = set(source.columns or ()) - set((source.columns or {}).values())
    for where, row in rows:
        if isinstance(row, Mapping):
            if any(_field(row, name, where, "filter") not in values for name, values in wanted.items()):
                dropped["left out by the filter"] += 1
                continue
            if source.columns:
                tally.unread.update(name for name in replaced if not empty(row.get(name)))
                row = {
                    **{name: value for name, value in row.items() if name not in source.columns.values()},
                    **{name: _field(row, theirs, where, "columns") for name, theirs in source.columns.items()},
                }
        if function is None:
            yield where, row
            continue
        try:
            out = function(row)
        except Exception as error:  # the user's own
            raise UserError(f"{where}: map_fn {source.map_fn}: {type(error).__name__}: {one_line(error)}") from None
        out = out if isinstance(out, list) else [] if out is None else [out]
        dropped["left out by map_fn"] += not out
        yield from ((where, one) for one in out)


def _field(row: Mapping, name: str, where: Place, what: str) -> Any:
    """The value of a field, with dots into objects."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise UserError(f"{where}: {what}: no field {name!r}, found {names(row)}")
        value = value[part]
    return value


def _reading(source: Source, **kind: Any) -> Reading:
    """How the adapted rows of a source are read."""
    form = source.format or ("common" if source.columns or source.map_fn else None)
    filtered = tuple({part for name in source.filter or () for part in (name, name.partition(".")[0])})
    return Reading(format=form, ignore=source.ignore, beside=filtered, **kind)


def read_source(source: Source, number: int, tally: Tally, *, seed: int = 0, **kind: Any) -> Iterator[Record]:
    """The records of a source, one at a time.

    Args:
      source: where from.
      number: of the source, for `Record.source`.
      tally: what is left out, and what is not read, is counted here as the iterator goes on.
      seed: of what a fraction takes, and of random pairs; a record's fate depends on its texts and the seed alone.
      **kind: options of `iter_records`.

    Returns:
      An iterator over the records, those of use='eval' marked as held out.
    """
    rows = adapted(read_rows(source.name, source.part), source, tally)
    records = iter_records(rows, tally, **_reading(source, seed=seed, **kind)._asdict())

    def taken() -> Iterator[Record]:
        for record in records:
            texts = [record.prompt, record.chosen, record.rejected, *record.others]
            if source.fraction < 1 and draw_number(f"fraction {seed}", texts) >= source.fraction:
                tally.dropped["left out by the fraction"] += 1
            else:
                yield record._replace(source=number, held_out=source.use == "eval")
        for name in source.ignore:
            if source.use == "train" and not tally.unread[name]:
                raise UserError(f"{source.name}: data.ignore: no row has the field {name_of(name)!r}")

    return itertools.islice(taken(), source.limit)


def source_prompts(source: Source) -> Iterator[Prompt]:
    """The prompts of a source, to be kept out of others."""
    tally = Tally()
    return iter_prompts(adapted(read_rows(source.name, source.part), source, tally), tally, _reading(source))


def prompt_keys(source: Source, openings: bool = False) -> np.ndarray:
    """The keys of the prompts of a test set, uint64, sorted.

    Args:
      source: the test set.
      openings: also those of what comes before a prompt's first answer: the prompts of demonstrations, of which every
        answer is trained.
    """
    prompts = [one.prompt for one in source_prompts(source)]
    if openings:
        prompts += [one[: first_answer(one)] for one in prompts if not isinstance(one, str) and first_answer(one)]
    return np.unique(np.array(list(map(prompt_key, prompts)), np.uint64))


def normalised(prompt: Text) -> str:
    """A prompt's words without case, spaces, and the way that its turns are written, so that equal ones compare equal.

    Example:
      >>> normalised([{"role": "user", "content": "Why  is\\nit BLUE?"}]) == normalised("\\n\\nHuman: why is it blue?"
      ...                                                                        "\\n\\nAssistant:")
      True
    """
    if not isinstance(prompt, str):
        prompt = "\n".join(message["content"] for message in prompt)
    prompt = re.sub(r"\n\n(Human|Assistant):", "\n", prompt)
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def prompt_key(prompt: Text) -> int:
    """64 bits of the normalised prompt."""
    return int.from_bytes(hashlib.blake2b(normalised(prompt).encode(), digest_size=8).digest(), "big")


def leaked(pairs: Pairs, keys: np.ndarray) -> np.ndarray:
    """[P] bool: which pairs have a prompt with one of these keys."""
    return np.isin(pairs.prompt_key, keys)


def in_proportion(numbers: np.ndarray, weights: Sequence[float | None], seed: int) -> np.ndarray:
    """Chooses pairs such that the sources' shares are as their weights.

    Args:
      numbers: [P], the source of each pair.
      weights: of the sources, by number; all None takes everything.
      seed: of which pairs of a source are taken.

    Returns:
      The numbers of the pairs chosen, in order: as many as there can be without one twice.

    Raises:
      UserError: a source has no pair.

    Example:
      >>> in_proportion(np.array([0, 0, 0, 0, 1, 1]), [1, 1], seed=0)[-2:]
      array([4, 5])
    """
    share = np.array([weight or 0.0 for weight in weights], np.float64)
    if not share.any():
        return np.arange(len(numbers))
    available = np.bincount(numbers, minlength=len(share))
    if (available[share > 0] == 0).any():
        raise UserError(f"no pair is left of source {int(np.argmax((share > 0) & (available == 0)))} of data.mix")
    share /= share.sum()
    total = (available[share > 0] / share[share > 0]).min()
    take = np.minimum(np.floor(total * share + 0.5).astype(np.int64), available)
    chosen = [
        np.flatnonzero(numbers == source)[np.random.default_rng((seed, source)).permutation(available[source])[:count]]
        for source, count in enumerate(take)
    ]
    return np.sort(np.concatenate(chosen))
