"""Any preference file -> records: prompt, chosen and rejected as text or as messages, with their provenance.

A row that cannot be a pair (empty, identical, with two different prompts or scored the other way round) is dropped and
counted by its reason; a row that is malformed, or says something that nobody reads, stops the run with its file, row
and field. Fields whose meaning is not known are counted by name. Nothing else is left out.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefalign_jax.data.conversation import (
    bare,
    is_answer,
    is_trained,
    last_alone,
)
from prefalign_jax.data.fields import BESIDE, PAIRS, PROMPTS, SUPERVISED, account
from prefalign_jax.data.groups import (
    BEST_WORST,
    GROUP_FIELDS,
    is_group,
    read_group,
    scores_of,
)
from prefalign_jax.data.messages import (
    Text,
    read_tools,
)
from prefalign_jax.data.pairing import check_pairs
from prefalign_jax.data.reading import Reading, Rows, Tally, common_rows, draw_number
from prefalign_jax.data.rows import read_rows
from prefalign_jax.data.sides import sides_of, what_to_map
from prefalign_jax.data.template import not_to_be_set
from prefalign_jax.data.values import (
    SMALLEST,
    Dropped,
    Malformed,
    empty,
    expected,
    missing,
    names,
    number,
    parsed,
    plain,
    scalar,
    show,
    truth,
)
from prefalign_jax.types import Place, UserError

TRAIN_ON = ("all", "last")  # which assistant messages of a response are trained

_COMPLETIONS = ("completion", "response", "messages")  # what rows with one response may call it
_LABELS = ("label", "kto_tag")  # what rows may call the label
_SCORES = ("score_{}", "{}_score", "rating_{}", "{}-rating")  # of a response
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
            prompt, answers = sides_of(row, sides, reading, tally, trained=False)
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
        raise Malformed(f"expected {either}, found {names(row)}; {what_to_map(row, ('prompt', 'completion', 'label'))}")
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
            raise Malformed(f"expected {either}, found {names(row)}; {what_to_map(row, ('prompt', 'completion'))}")
    prompt, sides = sides_of(row, fields, reading, tally)
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
        prompt, sides = last_alone(prompt, sides)
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
    prompt, sides = sides_of(row, responses, reading, tally)
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
    raise Malformed(f"expected the field {either}, found {names(row)}; {what_to_map(row, ('margin',))}")


def _number(row: Mapping, field: str, what: str = "a finite number", above: float = -math.inf) -> float | None:
    """The number in a field, or None where there is none."""
    value = row.get(field)
    if missing(value) and not isinstance(value, float) or value == "":
        return None
    value_read = number(value, field, what, above)
    if 0 < value_read < SMALLEST and above == 0:
        raise expected(f"{what} that float32 does not hold as 0", value, field)
    return value_read


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
