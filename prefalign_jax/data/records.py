"""Any preference file -> records: prompt, chosen and rejected as text or as messages, with their provenance.

A row that cannot be a pair (empty, identical, with two different prompts or scored the other way round) is dropped and
counted by its reason; a row that is malformed, or says something that nobody reads, stops the run with its file, row
and field. Fields whose meaning is not known are counted by name. Nothing else is left out.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefalign_jax.data.conversation import (
    bare,
    first_answer,
    is_answer,
    is_trained,
    last_answer,
    parting,
    until_last_answer,
    untrained,
)
from prefalign_jax.data.fields import BESIDE, PAIRS, PROMPTS, SUPERVISED, UNPAIRED, account, account_messages, mapping
from prefalign_jax.data.formats import FORMATS, Format, detect, in_common
from prefalign_jax.data.groups import (
    BEST_WORST,
    GROUP_FIELDS,
    gathered,
    is_group,
    pairs_of,
    read_group,
    scores_of,
)
from prefalign_jax.data.messages import (
    FLAGS,
    Messages,
    Text,
    obeyed,
    read_history,
    read_text,
    read_tools,
)
from prefalign_jax.data.pairing import check_pairs
from prefalign_jax.data.rows import read_rows
from prefalign_jax.data.template import not_to_be_set
from prefalign_jax.data.values import (
    SMALLEST,
    Dropped,
    Malformed,
    empty,
    expected,
    kind,
    missing,
    names,
    number,
    parsed,
    plain,
    scalar,
    show,
    string,
    truth,
)
from prefalign_jax.types import Place, UserError

Rows = Iterable[tuple[Place, Any]]  # rows with their places

TRAIN_ON = ("all", "last")  # which assistant messages of a response are trained

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # the turns of an HH-RLHF transcript
_COMPLETIONS = ("completion", "response", "messages")  # what rows with one response may call it
_BETWEEN = re.compile(r"\b(human|user|assistant|system|im_start|im_end|inst)\b|[\W_]", re.IGNORECASE)
_LABELS = ("label", "kto_tag")  # what rows may call the label
_SCORES = ("score_{}", "{}_score", "rating_{}", "{}-rating")  # of a response
_MESSAGE = "message."  # begins the name of a field of messages
_BESIDE = frozenset(BESIDE)

_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})


class Record(NamedTuple):
    """One preference, one demonstration or one labelled completion, before tokenization.

    Prompt and responses are either all strings or all lists of messages. A response is then the rest of a conversation
    from an assistant message on: what the assistant writes is trained, what tools and users write is read. An assistant
    message that counts otherwise has a 'weight', 0 for one that is read.
    """

    prompt: Text
    chosen: Text  # of unpaired data the completion, whatever its label
    rejected: Text  # '' or [] for supervised and unpaired data
    weight: float = 1.0
    margin: float = math.nan  # by how much the chosen response is better; NaN where nobody asked
    label: bool = True  # of unpaired data: whether the completion is desirable
    where: Place = Place()
    columns: tuple[tuple[str, Any], ...] = ()  # (name, value or None) of further fields that were asked for
    tools: tuple[dict[str, Any], ...] = ()  # what the chat template is told may be called, as JSON schemas
    chat_template_kwargs: tuple[tuple[str, Any], ...] = ()  # what it is told besides, such as enable_thinking
    source: int = 0  # its number in a mixture
    held_out: bool = False
    others: tuple[Text, ...] = ()  # of a group the further responses
    scores: tuple[float, ...] = ()  # of a group one for each of `responses`, more is better

    @property
    def responses(self) -> tuple[Text, ...]:
        """What may be trained: one, two, or all of a group, the best first."""
        return (self.chosen, self.rejected, *self.others) if self.rejected else (self.chosen,)


@dataclasses.dataclass
class Tally:
    """What is counted while rows are read.

    Attributes:
      dropped: {reason: records}.
      unread: {field: rows} that nobody reads and whose meaning is not known, or does not matter to this kind of data.
      notes: {what: records} that are read in part.
    """

    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unread: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    notes: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def read_records(
    path: str | Path,
    *,
    split: str = "train",
    responses: Sequence[str] = ("chosen", "rejected"),
    limit: int | None = None,
    unpaired: bool = False,
    margin: bool = False,
    columns: Sequence[str] = (),
    format: str | None = None,
    ignore: Sequence[str] = (),
    train_on: str = "all",
    groups: bool = False,
    pairs: str = BEST_WORST,
    seed: int = 0,
) -> tuple[list[Record], dict[str, int]]:
    """Reads preference pairs, demonstrations or labelled completions from a file, a directory or the Hugging Face hub.

    The formats of a row, told apart by its fields and their types:
      prompt, chosen, rejected as strings;
      the same as lists of messages, or a string prompt (one user message) with lists of messages;
      chosen and rejected as whole conversations: what they share is the prompt, the rest of each its response;
      chosen and rejected as HH-RLHF transcripts: the prompt ends with the last '\\n\\nAssistant:' of each;
      several `responses` to a prompt with scores, ranks or comparisons, see groups.py;
      and the published ones of `formats.FORMATS`, which are first brought into one of these.
    Supervised rows (one name in `responses`) may also call the response 'completion' or 'response', be a conversation
    called 'messages', or have nothing but a 'text'.
    Unpaired rows hold a prompt, a 'completion', 'response' or 'messages', and a 'label', true or false (or 1 or 0). One
    with chosen and rejected, in any format of pairs, is two records: the chosen labelled true, the rejected false.

    A response of messages begins with an assistant message. Tools and users may follow, and more of the assistant. What
    stands after its last assistant message is cut and counted. A 'prompt' that is given is the prompt. Of whole
    conversations the prompt is:
      of a pair what both share, up to an answer in each (`conversation.parting`). Where they part at another message,
        the responses begin with the answer before it, and what they share of them is read and not trained;
      of a demonstration what comes before the first answer; of a chosen response beside a rejected one, as of the pair;
      of a labelled completion what comes before the answer to the user's last turn.
    A flag of an assistant message, such as 'weight' or 'train' (`messages.FLAGS`), becomes its 'weight'.

    Beside them may stand 'system', a system prompt, and 'history', what was said before: then strings are messages too.
    A field 'weight' is how much the record counts, 'tools' (a list, or its JSON) what may be called,
    'chat_template_kwargs' (an object, or its JSON) what the chat template is told. Another field that is known to mean
    something stops the reading (`fields.MEANINGS`). An assistant message that calls tools may have no content.

    Args:
      path: a file, a directory or a hub name, see `rows.read_rows`.
      split: which part of a directory or hub data set; a single file is read whole.
      responses: the fields of the preferred response and of the other one; one name alone reads supervised data. Not
        used for unpaired data.
      limit: stop after so many records, be it between the two of one row.
      unpaired: read completions with a label, each a record without a rejected response. A row with chosen and
        rejected is dropped where the pair would be.
      margin: every pair must say by how much its chosen response is better: a 'margin', or 'score_chosen' and
        'score_rejected', or 'chosen_score' and 'rejected_score' (with the names in `responses`), which are subtracted.
        If it is worse the row is dropped. Without this option no such field is read.
      columns: names of further fields to keep with the record, such as where the pair comes from; strings, numbers or
        truth values.
      format: a key of FORMATS that all rows have; None tells each row's from its fields.
      ignore: fields that are read as if they were not there; 'message.FIELD' is one of every message.
      train_on: 'all' trains every assistant message of a response, 'last' the last alone: without a rejected response
        all before it becomes the prompt, in a pair the others are read.
      groups: a record holds all responses of a group, best first, with a score each. A pair is a group of two, with the
        scores that it has, or with 1 and 0. Without this option a group becomes pairs.
      pairs: which ones, see `pairing.choose_pairs`. For unpaired and supervised data those are best and worst.
      seed: of pairs='random:N'; which pairs those are depends on the texts and the seed alone.

    Returns:
      The records in the order of the rows, and the number of rows dropped for each reason.

    Raises:
      UserError: an option does not apply, the data cannot be read, a row is malformed, or no record is left.
    """
    tally = Tally()
    options = dict(responses=responses, unpaired=unpaired, margin=margin, columns=columns, format=format, ignore=ignore)
    options |= dict(train_on=train_on, groups=groups, pairs=pairs, seed=seed)
    records = list(itertools.islice(iter_records(read_rows(path, split), tally, **options), limit))
    if not records:
        counts = ", ".join(f"{reason}: {n}" for reason, n in tally.dropped.items()) or "there was no row"
        raise UserError(f"{path}: no record is left ({counts})")
    for place, name in enumerate(columns):
        if all(record.columns[place][1] is None for record in records):
            raise UserError(f"{path}: no row has the field {name!r}")
    return records, dict(tally.dropped)


class Reading(NamedTuple):
    """How rows are read: the options of `read_records`."""

    responses: Sequence[str] = ("chosen", "rejected")
    unpaired: bool = False
    margin: bool = False
    columns: Sequence[str] = ()
    format: str | None = None
    ignore: Sequence[str] = ()
    beside: Sequence[str] = ()  # fields that something else reads, such as a filter
    train_on: str = "all"
    groups: bool = False
    pairs: str = BEST_WORST
    seed: int = 0

    @property
    def kind(self) -> str:
        """What the records are."""
        return UNPAIRED if self.unpaired else PAIRS if len(self.responses) == 2 else SUPERVISED


_PAIRS = Reading()


def iter_records(rows: Rows, tally: Tally, **options: Any) -> Iterator[Record]:
    """The records of rows, one at a time, so that data larger than memory can be read.

    Args:
      rows: with their places.
      tally: what gives no record, and what is not read, is counted here as the iterator goes on.
      **options: responses, unpaired, margin, columns, format, ignore, train_on, groups, pairs, seed, as in
        `read_records`.

    Raises:
      UserError: an option does not apply, or, from the iterator, a row is malformed.
    """
    reading = Reading(**options)
    if not reading.unpaired and not 1 <= len(reading.responses) <= 2:
        raise UserError(f"responses: expected one or two field names, found {list(reading.responses)}")
    if reading.train_on not in TRAIN_ON:
        raise UserError(f"train_on: expected one of {', '.join(TRAIN_ON)}, found {reading.train_on!r}")
    if reading.margin and reading.kind != PAIRS:
        raise UserError(f"margin: applies to pairs; leave it out for {reading.kind} data")
    check_pairs("pairs", reading.pairs)
    if reading.groups and reading.kind != PAIRS:
        raise UserError(f"groups: applies to pairs; leave it out for {reading.kind} data")
    if reading.pairs != BEST_WORST and (reading.groups or reading.kind != PAIRS):
        raise UserError(f"pairs={reading.pairs!r}: applies to pairs; leave it out for groups and other data")
    return _records(rows, tally, reading)


def _records(rows: Rows, tally: Tally, reading: Reading) -> Iterator[Record]:
    for where, row, common in common_rows(rows, tally, reading):
        for one in common:
            responses = reading.responses if one is row else ("chosen", "rejected")[: len(reading.responses)]
            try:
                if reading.unpaired:
                    records = _unpaired(one, reading, tally)
                elif reading.groups:
                    records = [_group(one, responses, reading, tally)]
                else:
                    records = [_record(one, responses, reading, tally)]
                kept = tuple((name, scalar(row.get(name), name)) for name in reading.columns)
            except Malformed as error:
                raise UserError(f"{where}: {error}") from None
            except Dropped as reason:
                tally.dropped[str(reason)] += 1
            else:
                yield from (record._replace(where=where, columns=kept) for record in records)


def _without(rows: Rows, reading: Reading, unread: collections.Counter) -> Rows:
    """The rows without the fields that are ignored, which are counted."""
    ignored = [name for name in reading.ignore if not name.startswith(_MESSAGE)]
    if not ignored:
        return rows

    def rest(row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        unread.update(name for name in ignored if not empty(row.get(name)))
        return {name: value for name, value in row.items() if name not in ignored}

    return ((where, rest(row)) for where, row in rows)


def common_rows(
    rows: Rows, tally: Tally, reading: Reading, kind: str = ""
) -> Iterator[tuple[Place, Mapping, Sequence[Mapping]]]:
    """Brings rows of published formats into the common one.

    Args:
      rows: with their places.
      tally: the rows that are left out are counted here by reason, as the iterator goes on.
      reading: how they are read.
      kind: what for, if it is not `reading.kind`.

    Returns:
      An iterator over (its place, the row, its rows in the common format); of a group the first row.
    """
    kind = kind or reading.kind
    whole = reading.groups and kind == PAIRS
    how = reading.pairs if kind == PAIRS else BEST_WORST
    draw = functools.partial(draw_number, f"pairs {reading.seed}")

    def joins(form: Format) -> tuple[str, ...]:
        """The fields that are the same in the rows of a group."""
        if form.group:
            return (form.group,)
        return form.gather if whole or how != BEST_WORST else ()

    def gather(name: str, given: Sequence[tuple[Place, Mapping]]) -> list[Mapping]:
        """The groups of rows that are pairs."""
        rows = []
        for _, row in given:
            with _counted(tally):
                rows.append(in_common(name, row, [row]))
        out, identical = gathered(rows, FORMATS[name].gather)
        tally.dropped.update(["identical responses"] * identical)
        return out

    def in_pairs(name: str, row: Mapping) -> Sequence[Mapping]:
        """The row, or the pairs of its group where those are wanted."""
        if whole or not is_group(row):
            return (row,)
        options = dict(named=FORMATS[name].answers, margins=reading.margin, ordered=kind in (UNPAIRED, SUPERVISED))
        out, ties = pairs_of(row, how, draw, **options)
        tally.dropped.update(["tie"] * ties)
        return out

    def read(name: str, given: Sequence[tuple[Place, Mapping]]) -> tuple[Place, Mapping, Sequence[Mapping]]:
        (where, row), form, out = given[0], FORMATS[name], []
        fields = (*form.fields, *form.signs)
        try:
            with _counted(tally):
                if any(row.get(field) is None for field in fields):
                    raise Malformed(f"format {name!r} has the fields {', '.join(fields)}, found {names(row)}")
                one_by_one = form.group or not joins(form)
                common = in_common(name, row, [row for _, row in given]) if one_by_one else gather(name, given)
                out = [one for each in common for one in in_pairs(name, each)]
        except Malformed as error:
            raise UserError(f"{where}: {error}") from None
        return where, row, out

    def read_all() -> tuple[Place, Mapping, Sequence[Mapping]]:
        given = group.copy()
        group.clear()
        if FORMATS[grouped].group and not whole and how == BEST_WORST:
            tally.dropped.update(["neither best nor worst of its prompt"] * (len(given) - 2))
        return read(grouped, given)

    group: list[tuple[Place, Mapping]] = []
    grouped, same = "", None
    for where, row in _without(rows, reading, tally.unread):
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: {expected('a JSON object', row)}")
        name = reading.format or detect(row, pairs=kind in (PAIRS, UNPAIRED))
        fields = joins(FORMATS[name])
        values = [None if missing(row.get(field)) else row[field] for field in fields]
        if group and (name, values) != (grouped, same):
            yield read_all()
        if fields:
            grouped, same = name, values
            group.append((where, row))
        elif name == "common" and not is_group(row):
            yield where, row, (row,)
        else:
            yield read(name, [(where, row)])
    if group:
        yield read_all()


@contextlib.contextmanager
def _counted(tally: Tally) -> Iterator[None]:
    """Counts what is left out by its reason."""
    try:
        yield
    except Dropped as reason:
        tally.dropped[str(reason)] += 1


class Prompt(NamedTuple):
    """What is to be answered."""

    prompt: Text
    id: str  # the row's field 'id', or ''
    where: Place
    tools: tuple[dict[str, Any], ...] = ()  # as in a `Record`
    chat_template_kwargs: tuple[tuple[str, Any], ...] = ()


TOLD = ("tools", "chat_template_kwargs")  # fields of a row with a prompt that the chat template is told


def told_by(record: Any) -> dict[str, tuple]:
    """Those attributes of a record, to make another with."""
    return {name: getattr(record, name) for name in TOLD}


def told(prompt: Any) -> dict[str, Any]:
    """Those fields of a row with this prompt, where it has them; also of another record with these attributes."""
    values = dict(zip(TOLD, (list(prompt.tools), dict(prompt.chat_template_kwargs)), strict=True))
    return {name: value for name, value in values.items() if value}


def read_prompts(
    path: str | Path, *, split: str = "train", limit: int | None = None
) -> tuple[list[Prompt], dict[str, int]]:
    """Reads prompts, each once, from rows that hold nothing else or are in any format of `read_records`.

    Args:
      path, split: as there.
      limit: stop after so many prompts.

    Returns:
      The prompts in the order of the rows, and the number of rows dropped for each reason.

    Raises:
      UserError: the data cannot be read, a row is malformed, or no prompt is left.
    """
    known, tally = {}, Tally()
    dropped = tally.dropped
    for one in iter_prompts(read_rows(path, split), tally):
        if len(known) == limit:
            break
        key = json.dumps([one.prompt, one.tools, one.chat_template_kwargs], sort_keys=True)
        if known.setdefault(key, one) is not one:
            dropped["the prompt of an earlier row"] += 1
    if not known:
        counts = ", ".join(f"{reason}: {n}" for reason, n in dropped.items()) or "there was no row"
        raise UserError(f"{path}: no prompt is left ({counts})")
    return list(known.values()), dict(dropped)


def iter_prompts(rows: Rows, tally: Tally, reading: Reading = _PAIRS) -> Iterator[Prompt]:
    """The prompts of rows, one at a time; the rows without one are counted by reason.

    Args:
      rows: with their places.
      tally: what gives no prompt, and what is not read, is counted here as the iterator goes on.
      reading: the format of the rows, and what is ignored of them.
    """
    for where, given, common in common_rows(rows, tally, reading, kind=PROMPTS):
        if not common:
            continue
        row = common[0]
        try:
            sides = [name for name in ("chosen", *_COMPLETIONS, "text") if not missing(row.get(name))][:1]
            sides += ["rejected"] if sides == ["chosen"] and not missing(row.get("rejected")) else []
            prompt, answers = _conversation(row, sides, reading, tally, trained=False)
            used = {*_BESIDE, *_LABELS, *reading.beside, "id", "chosen", "rejected", *_COMPLETIONS, "text"}
            account(row, used, PROMPTS, [prompt, *answers], tally.unread)
            _check_answers(answers)
            id = "" if missing(given.get("id")) else str(scalar(given["id"], "id"))
            one = Prompt(prompt, id, where, **read_told(row, prompt))
        except Malformed as error:
            raise UserError(f"{where}: {error}") from None
        except Dropped as reason:
            tally.dropped[str(reason)] += 1
            continue
        if prompt:
            yield one
        else:
            tally.dropped["no prompt"] += 1


def ascii_quotes(record: Record) -> Record:
    """The record with curly quotes, dashes and ellipses as ASCII, for tokenizers that would read them as unknown.

    Example:
      >>> ascii_quotes(Record("“Hi”", "it’s", "a – b…")).rejected
      'a - b...'
    """

    def fold(text: Text) -> Text:
        if isinstance(text, str):
            return text.translate(_ASCII)
        return [{**message, "content": message["content"].translate(_ASCII)} for message in text]

    others = tuple(map(fold, record.others))
    sides = dict(prompt=fold(record.prompt), chosen=fold(record.chosen), rejected=fold(record.rejected))
    return record._replace(**sides, others=others)


def split_by_prompt(records: Iterable[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Holds out about a fraction of the prompts; all records of one prompt fall on the same side.

    Args:
      records: what to split; a record's side depends on its prompt and the seed alone, so it stays when others come.
      fraction: share of the prompts to hold out, in [0, 1).
      seed: another seed holds out other prompts.

    Returns:
      (train, held_out), each in the given order.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"fraction to hold out: expected a number in [0, 1), found {fraction}")
    sides: tuple[list[Record], list[Record]] = [], []
    for record in records:
        sides[draw_number(seed, record.prompt) < fraction].append(record)
    return sides


def flip_labels(records: Iterable[Record], share: float, seed: int) -> tuple[list[Record], int]:
    """Swaps the responses of about a share of the pairs, as annotators who err would.

    Args:
      records: pairs; a pair's fate depends on its texts and the seed alone, and what a small share swaps a larger one
        swaps too.
      share: in [0, 1).
      seed: another seed swaps others.

    Returns:
      (the records in the given order, how many were swapped).

    Example:
      >>> flip_labels([Record("Hi", "a", "b"), Record("Hi", "c", "d")], 0.0, seed=0)[1]
      0
    """
    out = list(records)
    flipped = [i for i, r in enumerate(out) if draw_number(f"flip {seed}", [r.prompt, r.chosen, r.rejected]) < share]
    for i in flipped:
        out[i] = out[i]._replace(chosen=out[i].rejected, rejected=out[i].chosen)
    return out, len(flipped)


def draw_number(seed: int | str, what: Any) -> float:
    """A number in [0, 1) that is a function of its arguments."""
    key = f"{seed}\n{json.dumps(what, sort_keys=True, ensure_ascii=False)}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


# One row -> one record, or the two of a pair that is read as unpaired.


def _unpaired(row: Mapping, reading: Reading, tally: Tally) -> list[Record]:
    if not missing(row.get("chosen")) and not missing(row.get("rejected")):
        pair = _record(row, ("chosen", "rejected"), reading, tally)
        chosen = pair._replace(rejected=type(pair.rejected)())
        return [chosen, chosen._replace(chosen=pair.rejected, label=False)]
    labels = [name for name in _LABELS if row.get(name) is not None][:1]
    responses = [name for name in _COMPLETIONS if not missing(row.get(name))][:1]
    if not responses:
        either = f"one of the fields {', '.join(_COMPLETIONS)} with a label, or chosen and rejected"
        raise Malformed(f"expected {either}, found {names(row)}; {_map(row, ('prompt', 'completion', 'label'))}")
    label = truth(row[labels[0]] if labels else None, "label")
    return [_record(row, responses, reading, tally, labels)._replace(label=label)]


def _record(
    row: Mapping, responses: Sequence[str], reading: Reading, tally: Tally, beside: Sequence[str] = ()
) -> Record:
    """The record of a row in the common format.

    Args:
      row: the row.
      responses: the names of its responses; of supervised data those that others may stand for.
      reading: how it is read.
      tally: for what is not read.
      beside: fields that were read besides.
    """
    weight = _number(row, "weight", "a positive finite number", above=0.0)
    margin, scores = _margin(row, responses) if reading.margin else (math.nan, ())
    fields = list(responses)
    if reading.kind == SUPERVISED:
        alternatives = (fields[0], *_COMPLETIONS, "text")
        fields = [name for name in alternatives if not missing(row.get(name))][:1]
        if not fields:
            either = f"one of the fields {', '.join(alternatives[:-1])} or text"
            raise Malformed(f"expected {either}, found {names(row)}; {_map(row, ('prompt', 'completion'))}")
    prompt, sides = _conversation(row, fields, reading, tally)
    used = {*_BESIDE, *fields, *scores, *beside, *reading.columns, *reading.beside} - (
        {"prompt"} if fields == ["text"] else set()
    )
    account(row, used, reading.kind, [prompt, *sides], tally.unread)
    told = read_told(row, prompt)

    _check_answers(sides)
    if margin < 0:
        raise Dropped("rejected scores higher")
    prompt, sides = _trained(prompt, sides, reading, tally)
    rejected = sides[1] if len(sides) == 2 else type(sides[0])()
    return Record(prompt, sides[0], rejected, 1.0 if weight is None else weight, margin, **told)


def _trained(prompt: Text, sides: list[Text], reading: Reading, tally: Tally) -> tuple[Text, list[Text]]:
    """(prompt, responses) of which what `train_on` asks for is trained; notes what is read or trained besides."""
    if isinstance(prompt, str):
        return prompt, sides
    if reading.train_on == "last":
        prompt, sides = _last_alone(prompt, sides)
    if reading.kind == SUPERVISED and any(map(is_answer, prompt)):
        tally.notes["with earlier answers, which are not trained"] += 1
    answers = [message for side in sides for message in side if is_answer(message)]
    if not all(map(is_trained, answers)):
        tally.notes["with answers that are read and not trained"] += 1
    if any(sum(map(is_trained, side)) > 1 for side in sides):
        tally.notes["with several answers that are trained"] += 1
    return prompt, sides


def _group(row: Mapping, responses: Sequence[str], reading: Reading, tally: Tally) -> Record:
    """The record of a group in the common format, or of a pair, which is a group of two.

    Args:
      row: the row.
      responses: the names of a pair's two.
      reading: how it is read.
      tally: for what is read in part or not at all.
    """
    weight = _number(row, "weight", "a positive finite number", above=0.0)
    whole = is_group(row)
    if whole:
        group = read_group(row)
        scores, read = scores_of(group), GROUP_FIELDS
        tally.unread.update(group.unread)
        responses = [f"responses[{i}]" for i in range(len(scores))]
        row = {**row, **dict(zip(responses, group.responses, strict=True))}
    else:
        scores, read = _two_scores(row, responses)
    prompt, sides = _conversation(row, responses, reading, tally)
    used = {*_BESIDE, *responses, *read, *reading.columns, *reading.beside}
    account(row, used, PAIRS, [prompt, *sides], tally.unread)
    told = read_told(row, prompt)
    if not whole:
        _check_answers(sides)
        if scores[0] < scores[1]:
            raise Dropped("rejected scores higher")
    ranked = sorted(zip(scores, sides, strict=True), key=lambda one: (-one[0], draw_number("tie", _bare(one[1]))))
    filled = [one for one in ranked if _is_trainable(one[1])]
    kept = [one for i, one in enumerate(filled) if all(_bare(one[1]) != _bare(side) for _, side in filled[:i])]
    if len(kept) < 2:
        raise Dropped("fewer than two different responses")
    if kept[0][0] == kept[-1][0]:
        raise Dropped("tie")
    tally.notes.update(["without the empty responses of a group"] * (len(filled) < len(ranked)))
    tally.notes.update(["with one of a group's equal responses"] * (len(kept) < len(filled)))
    scores, sides = zip(*kept, strict=True)
    prompt, (chosen, rejected, *others) = _trained(prompt, list(sides), reading, tally)
    margin = scores[0] - scores[-1] if reading.margin else math.nan
    weight = 1.0 if weight is None else weight
    return Record(prompt, chosen, rejected, weight, margin, others=tuple(others), scores=scores, **told)


def _two_scores(row: Mapping, responses: Sequence[str]) -> tuple[tuple[float, float], tuple[str, ...]]:
    """(the scores of a pair, the fields that say them)."""
    for form in _SCORES:
        fields = tuple(form.format(name) for name in responses)
        scores = [_number(row, name) for name in fields]
        if None not in scores:
            return tuple(scores), fields
    margin = _number(row, "margin")
    return ((1.0, 0.0), ()) if margin is None else ((margin, 0.0), ("margin",))


def _conversation(
    row: Mapping, fields: Sequence[str], reading: Reading, tally: Tally, *, trained: bool = True
) -> tuple[Text, list[Text]]:
    """(prompt, responses) of a row, wherever it keeps what comes before the responses.

    Args:
      row: in the common format.
      fields: of the responses; none for a prompt alone.
      reading: of which message fields are ignored.
      tally: for those.
      trained: whether the responses are to be trained, as weights and masks of messages may ask.
    """
    if lacking := [name for name in fields or ("prompt",) if row.get(name) is None]:
        lacking = [*(["prompt"] if fields and row.get("prompt") is None else []), *lacking]
        raise Malformed(f"expected {', '.join(('prompt', *fields))}, found {names(row)}; {_map(row, lacking)}")
    sides = [read_text(row[name], name) for name in fields]
    asked = None if missing(row.get("prompt")) else read_text(row["prompt"], "prompt")
    prompt = "" if fields == ["text"] else asked
    for name, side in zip(fields, sides, strict=True):
        if type(side) is not type(sides[0]):
            raise expected(f"{kind(sides[0])}, as in {fields[0]!r}", row[name], name)

    before = _before(row)
    strings = [*sides, *([] if prompt is None else [prompt])]
    if isinstance(strings[0], str) and (before is not None or isinstance(prompt, list)):
        if not prompt and before:
            field = "system" if not empty(row.get("system")) else "history"
            raise Malformed(f"field {field!r}: it goes through the chat template; write the rest as messages")
        if prompt:
            sides = [[{"role": "assistant", "content": side}] for side in sides]
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if sides and isinstance(sides[0], str):
        return _split_strings(row, prompt, sides, fields)
    if not sides and not isinstance(prompt, list):
        return prompt or "", []

    leave = [name.removeprefix(_MESSAGE) for name in reading.ignore if name.startswith(_MESSAGE)]
    before = before or []
    given = [part for part in (before, prompt, *sides) if isinstance(part, list)]
    for name in leave:
        tally.unread[_MESSAGE + name] += any(name in message for part in given for message in part)
    leave += () if trained else FLAGS
    if leave:
        prompt = _without_fields(prompt, leave) if isinstance(prompt, list) else prompt
        before, *sides = (_without_fields(part, leave) for part in (before, *sides))
    parted = _split_messages(row, prompt, sides, fields, reading.kind if trained else PROMPTS)
    tally.unread.update(f"{name}[] after the last answer" for name in parted.cut)
    system = -int(not empty(row.get("system")))  # stands before the row's own history
    before = obeyed(before, "history", system, trained=False)
    responses, shared = [], parted.shared
    for name, side, first in zip(fields, parted.sides, parted.firsts, strict=False):
        if shared:
            obeyed(side[:shared], name, first, trained=False)
        side = obeyed(side, name, first, trained=True)
        responses.append(untrained(side[:shared]) + side[shared:] if shared else side)
    parts = [("history", before, system), (parted.asked_in, parted.prompt, 0)]
    parts += zip(fields, responses, parted.firsts, strict=False)
    account_messages(parts, reading.kind if trained else PROMPTS, tally.unread)
    return _joined(before, parted.prompt), responses


def _without_fields(messages: Messages, names: Sequence[str]) -> Messages:
    return [{name: value for name, value in message.items() if name not in names} for message in messages]


def _last_alone(prompt: Messages, sides: list[Messages]) -> tuple[Messages, list[Messages]]:
    """(prompt, responses) with the last trained message alone trained; the prompt of one response ends before it."""
    lasts = [max(i for i, message in enumerate(side) if is_trained(message)) for side in sides]
    if len(sides) > 1:
        return prompt, [untrained(side[:last]) + side[last:] for side, last in zip(sides, lasts, strict=True)]
    (side,), (last,) = sides, lasts
    return [*prompt, *map(bare, side[:last])], [side[last:]]


def _before(row: Mapping) -> Messages | None:
    """What a row's system prompt and history put before its prompt; None where it has neither field."""
    if missing(row.get("system")) and missing(row.get("history")):
        return None
    system = "" if missing(row.get("system")) else string(row["system"], "system")
    history = [] if empty(row.get("history")) else read_history(row["history"])
    return _joined([{"role": "system", "content": system}] if system else [], history)


def _joined(before: Messages, after: Messages) -> Messages:
    """One conversation of two, with one system prompt."""
    if before and after and before[0]["role"] == "system" and after[0]["role"] in ("system", "developer"):
        if before[0] != after[0]:
            raise Malformed(
                f"field 'system': the conversation begins with another one, {show(after[0]['content'])}; "
                "write data.ignore=system, or leave out one of them (data.map_fn)"
            )
        after = after[1:]
    return [*before, *after]


def _map(row: Mapping, wanted: Sequence[str]) -> str:
    """What to write for a row of other columns."""
    return f"if others hold them, write --config.data.columns={mapping(row, wanted)}"


def read_told(row: Mapping, prompt: Text) -> dict[str, tuple]:
    """What a row with this prompt tells the chat template, as a `Record` and a `Prompt` keep it.

    Raises:
      Malformed: it is malformed, or the prompt is plain text.
    """
    return dict(zip(TOLD, (_tools(row, prompt), _template_kwargs(row, prompt)), strict=True))


def _tools(row: Mapping, prompt: Text) -> tuple[dict[str, Any], ...]:
    """The row's tools."""
    tools = () if missing(row.get("tools")) else read_tools(row["tools"])
    if tools and isinstance(prompt, str):
        raise Malformed("field 'tools': they go through the chat template; write the prompt as a list of messages")
    return tools


def _template_kwargs(row: Mapping, prompt: Text) -> tuple[tuple[str, Any], ...]:
    """What the row tells the chat template: an object, or its JSON; Parquet's nulls are no value."""
    field = "chat_template_kwargs"
    told = row.get(field)
    if isinstance(told, str):
        told = parsed(told, field) if told.strip() else None
    if empty(told):
        return ()
    if not isinstance(told, Mapping):
        raise expected("an object, or its JSON", told, field)
    if told and isinstance(prompt, str):
        raise Malformed("field 'chat_template_kwargs': there is no chat template for plain text; write messages")
    if (key := not_to_be_set(told)) is not None:
        raise Malformed(f"field {field!r}: {show(key)} is no variable of a chat template that may be set")
    return tuple(plain(told, field).items())


def _margin(row: Mapping, responses: Sequence[str]) -> tuple[float, tuple[str, ...]]:
    """(by how much the chosen response is better, the fields that say so)."""
    margin = _number(row, "margin")
    if margin is not None:
        return margin, ("margin",)
    pairs = [tuple(form.format(name) for name in responses) for form in _SCORES]
    for fields in pairs:
        better, worse = (_number(row, name) for name in fields)
        if better is not None and worse is not None:
            return better - worse, fields
    either = ", or ".join(" and ".join(fields) for fields in (["margin"], *pairs))
    raise Malformed(f"expected the field {either}, found {names(row)}; {_map(row, ('margin',))}")


def _number(row: Mapping, field: str, what: str = "a finite number", above: float = -math.inf) -> float | None:
    """The number in a field, or None where there is none."""
    value = row.get(field)
    if missing(value) and not isinstance(value, float) or value == "":
        return None
    value_read = number(value, field, what, above)
    if 0 < value_read < SMALLEST and above == 0:
        raise expected(f"{what} that float32 does not hold as 0", value, field)
    return value_read


def _split_strings(row: Mapping, prompt: Text | None, sides: list[str], fields: Sequence[str]) -> tuple[str, list[str]]:
    """(prompt, responses), the prompt taken out of HH-RLHF transcripts where there is none."""
    if isinstance(prompt, str):
        return prompt, sides
    prompts = []
    for side, name in zip(sides, fields, strict=True):
        if not side.startswith(_HUMAN) or _ASSISTANT not in side:
            raise Malformed(
                f"expected a field 'prompt', or an HH-RLHF transcript ({_HUMAN!r} ... {_ASSISTANT!r} ...) in {name!r}; "
                f"found {names(row)}; {_map(row, ('prompt',))}"
            )
        prompts.append(side[: side.rindex(_ASSISTANT) + len(_ASSISTANT)])
    return _same(prompts), [side[len(prompts[0]) :] for side in sides]


class Parted(NamedTuple):
    """Messages of a row as prompt and responses.

    Attributes:
      prompt: messages, without flags.
      asked_in: the field that has them.
      sides: the responses.
      firsts: the number of the first message of each in its field.
      shared: so many messages of the responses are the same in all, and are not trained.
      cut: fields of which something after the last answer is left out.
    """

    prompt: Messages
    asked_in: str
    sides: list[Messages]
    firsts: Sequence[int]
    shared: int = 0
    cut: Sequence[str] = ()


def _split_messages(
    row: Mapping, prompt: Text | None, sides: list[Messages], fields: Sequence[str], kind: str
) -> Parted:
    """Prompt and responses, wherever the row keeps the messages before the responses.

    Args:
      row: in the common format.
      prompt: its field.
      sides: the fields of the responses.
      fields: their names.
      kind: what the row is read as.
    """
    ends = [until_last_answer(side) for side in sides]
    cut = [name for name, side, end in zip(fields, sides, ends, strict=True) if len(end) < len(side)]
    if prompt is None or (isinstance(prompt, str) and any(side and not is_answer(side[0]) for side in sides)):
        # Beside whole conversations a string prompt only repeats one message or all; another text would go unread.
        if prompt and not _repeats(prompt, [message["content"] for message in sides[0]]):
            raise expected(f"a message of {fields[0]!r}, which holds the whole conversation", prompt, "prompt")
        if kind == PROMPTS and len(sides) == 1 and cut:
            return Parted(sides[0], fields[0], [], ())  # what is asked last has no answer yet
        for side, end, name in zip(sides, ends, fields, strict=True):
            if prompt is None and len(side) == len(end) == 1:
                whole = f"expected a field 'prompt', or a whole conversation in {name!r}"
                raise Malformed(f"{whole}; found {names(row)}; {_map(row, ('prompt',))}")
            if not first_answer(end):
                raise expected("a conversation with an answer of the assistant", side, name)
        begin, part = _begin(row, ends, fields, kind)
        if not begin:
            raise Dropped("prompts differ")
        prompts = [obeyed(end[:begin], name, trained=False) for name, end in zip(fields, ends, strict=True)]
        return Parted(prompts[0], fields[0], [end[begin:] for end in ends], [begin] * len(ends), part - begin, cut)

    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt:
        raise expected("at least one message", prompt, "prompt")
    asked = list(map(bare, prompt))
    firsts = [len(asked) if list(map(bare, side[: len(asked)])) == asked else 0 for side in sides]
    for side, first, name in zip(sides, firsts, fields, strict=True):
        obeyed(side[:first], name, trained=False)
        if side[first:] and not is_answer(side[first]):
            first_said = "an assistant message first (what comes before it belongs in the prompt)"
            raise expected(first_said, side[first:], name)
    responses = [end[first:] for end, first in zip(ends, firsts, strict=True)]
    return Parted(obeyed(prompt, "prompt", trained=False), "prompt", responses, firsts, 0, cut)


def _begin(row: Mapping, sides: list[Messages], fields: Sequence[str], kind: str) -> tuple[int, int]:
    """(where the responses of whole conversations begin, up to where they are not trained), see `read_records`."""
    if len(sides) > 1:
        return parting(sides)
    begin = first_answer(sides[0])
    if kind == UNPAIRED:
        begin = last_answer(sides[0])
    elif kind == PROMPTS:
        begin = len(sides[0]) - 1
    elif fields == ["chosen"] and isinstance(row.get("rejected"), list):  # a pair whose chosen response is wanted
        with contextlib.suppress(Malformed):
            if isinstance(other := read_text(row["rejected"], "rejected"), list) and other:
                both, part = parting([sides[0], until_last_answer(other)])
                begin = both or begin
                return begin, part if begin < part < len(sides[0]) else begin
    return begin, begin


def _repeats(text: str, said: Sequence[str]) -> bool:
    """Whether a text stands in one that was said, or is all of them with nothing but the names of roles between."""
    if any(text.strip() in one for one in said):
        return True
    for one in said:
        text = text.replace(one.strip(), "", 1)
    return not _BETWEEN.sub("", text)


def _same(prompts: list) -> Any:
    if any(prompt != prompts[0] for prompt in prompts):
        raise Dropped("prompts differ")
    return prompts[0]


def _check_answers(sides: Sequence[Text]) -> None:
    if not all(map(_says_something, sides)):
        raise Dropped("empty response")
    if len(sides) == 2 and _bare(sides[0]) == _bare(sides[1]):
        raise Dropped("identical responses")
    trained = (
        side if isinstance(side, str) else [message for message in side if is_trained(message)] for side in sides
    )
    if not all(map(_says_something, trained)):
        raise Dropped("nothing of a response is trained")


def _is_trainable(side: Text) -> bool:
    """Whether there is something of a response to train."""
    try:
        _check_answers([side])
    except Dropped:
        return False
    return True


def _bare(side: Text) -> Text:
    return side if isinstance(side, str) else list(map(bare, side))


def _says_something(side: Text) -> bool:
    """Whether an assistant writes or calls something in a response."""
    if isinstance(side, str):
        return bool(side.strip())
    return any(message["content"].strip() or message.get("tool_calls") for message in side if is_answer(message))
