"""Any preference file -> records: prompt, chosen and rejected as text or as messages, with their provenance.

A row that cannot be a pair (empty, identical, with two different prompts or scored the other way round) is dropped and
counted by its reason; a row that is malformed stops the run with its file, row and field. Nothing else is left out.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefalign_jax.data.formats import FORMATS, Dropped, Malformed, detect, expected, kind, show
from prefalign_jax.data.rows import read_rows
from prefalign_jax.types import Place, UserError

Messages = list[dict[str, Any]]  # [{'role': ..., 'content': ...}, ...]
Text = str | Messages
Rows = Iterable[tuple[Place, Any]]  # rows with their places

ROLES = ("system", "developer", "user", "assistant", "tool")

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # the turns of an HH-RLHF transcript
_COMPLETIONS = ("completion", "response", "messages")  # what rows with one response may call it
_LARGEST = 1e38  # float32 holds the difference of two such numbers

_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})


class Record(NamedTuple):
    """One preference, one demonstration or one labelled completion, before tokenization.

    Prompt and responses are either all strings or all lists of messages; a response is then one assistant message.
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
) -> tuple[list[Record], dict[str, int]]:
    """Reads preference pairs, demonstrations or labelled completions from a file, a directory or the Hugging Face hub.

    The formats of a row, told apart by its fields and their types:
      prompt, chosen, rejected as strings;
      the same as lists of messages, or a string prompt (one user message) with lists of messages;
      chosen and rejected as whole conversations: the last assistant message is the response, all before it the prompt;
      chosen and rejected as HH-RLHF transcripts: the prompt ends with the last '\\n\\nAssistant:' of each;
      and the published ones of `formats.FORMATS`, which are first brought into one of these.
    Supervised rows (one name in `responses`) may also call the response 'completion' or 'response', be a conversation
    called 'messages', of which the last message is the response, or have nothing but a 'text'.
    Unpaired rows hold a prompt, a 'completion', 'response' or 'messages', and a 'label', true or false (or 1 or 0). One
    with chosen and rejected, in any format of pairs, is two records: the chosen labelled true, the rejected false.
    A field 'weight' is how much the record counts, 'tools' (a list, or its JSON) what may be called,
    'chat_template_kwargs' (an object, or its JSON) what the chat template is told; every other field that `columns`
    does not name is ignored. An assistant message that calls tools may have no content.

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

    Returns:
      The records in the order of the rows, and the number of rows dropped for each reason.

    Raises:
      UserError: an option does not apply, the data cannot be read, a row is malformed, or no record is left.
    """
    dropped = collections.Counter()
    options = dict(responses=responses, unpaired=unpaired, margin=margin, columns=columns)
    records = list(itertools.islice(iter_records(read_rows(path, split), dropped, format=format, **options), limit))
    if not records:
        counts = ", ".join(f"{reason}: {n}" for reason, n in dropped.items()) or "there was no row"
        raise UserError(f"{path}: no record is left ({counts})")
    for number, name in enumerate(columns):
        if all(record.columns[number][1] is None for record in records):
            raise UserError(f"{path}: no row has the field {name!r}")
    return records, dict(dropped)


def iter_records(
    rows: Rows,
    dropped: collections.Counter,
    *,
    responses: Sequence[str] = ("chosen", "rejected"),
    unpaired: bool = False,
    margin: bool = False,
    columns: Sequence[str] = (),
    format: str | None = None,
) -> Iterator[Record]:
    """The records of rows, one at a time, so that data larger than memory can be read.

    Args:
      rows: with their places.
      dropped: the rows that give no record are counted here by reason, as the iterator goes on.
      responses, unpaired, margin, columns, format: as in `read_records`.

    Raises:
      UserError: an option does not apply, or, from the iterator, a row is malformed.
    """
    if not unpaired and not 1 <= len(responses) <= 2:
        raise UserError(f"responses: expected one or two field names, found {list(responses)}")
    if margin and (unpaired or len(responses) == 1):
        raise UserError(f"margin: applies to pairs; leave it out for {'unpaired' if unpaired else 'supervised'} data")
    return _records(rows, dropped, responses, unpaired, margin, columns, format)


def _records(rows, dropped, responses, unpaired, margin, columns, format) -> Iterator[Record]:
    for where, row, common in in_common(rows, dropped, format, pairs=unpaired or len(responses) == 2):
        for one in common:
            names = responses if one is row else ("chosen", "rejected")[: len(responses)]
            try:
                found = _unpaired(one) if unpaired else [_record(one, names, margin)]
                kept = tuple((name, _plain(row.get(name), name)) for name in columns)
            except Malformed as error:
                raise UserError(f"{where}: {error}") from None
            except Dropped as reason:
                dropped[str(reason)] += 1
            else:
                yield from (record._replace(where=where, columns=kept) for record in found)


def in_common(
    rows: Rows, dropped: collections.Counter, format: str | None = None, *, pairs: bool = True
) -> Iterator[tuple[Place, Mapping, Sequence[Mapping]]]:
    """Brings rows of published formats into the common one.

    Args:
      rows: with their places.
      dropped: the rows that are left out are counted here by reason, as the iterator goes on.
      format: a key of FORMATS, or None to tell each row's.
      pairs: whether pairs are wanted, or labelled completions, not demonstrations.

    Returns:
      An iterator over (its place, the row, its rows in the common format); of a group the first row.
    """
    group: list[tuple[Place, Mapping]] = []

    def read(where: Place, row: Mapping, name: str, given: Any) -> tuple[Place, Mapping, Sequence[Mapping]]:
        form = FORMATS[name]
        try:
            if any(row.get(field) is None for field in form.fields):
                raise Malformed(f"format {name!r} has the fields {', '.join(form.fields)}, found {_names(row)}")
            return where, row, form.read(given)
        except Malformed as error:
            raise UserError(f"{where}: {error}") from None
        except Dropped as reason:
            dropped[str(reason)] += 1
            return where, row, ()

    def read_group() -> tuple[Place, Mapping, Sequence[Mapping]]:
        (where, row), given = group[0], [row for _, row in group]
        group.clear()
        if len(given) > 2:
            dropped["neither best nor worst of its prompt"] += len(given) - 2
        return read(where, row, grouped, given)

    grouped = ""
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: {expected('a JSON object', row)}")
        name = format or detect(row, pairs)
        field = FORMATS[name].group
        if group and (name != grouped or row.get(field) != group[0][1].get(field)):
            yield read_group()
        if field:
            grouped = name
            group.append((where, row))
        else:
            yield read(where, row, name, row)
    if group:
        yield read_group()


class Prompt(NamedTuple):
    """What is to be answered."""

    prompt: Text
    id: str  # the row's field 'id', or ''
    where: Place
    tools: tuple[dict[str, Any], ...] = ()  # as in a `Record`
    chat_template_kwargs: tuple[tuple[str, Any], ...] = ()


def told(prompt: Prompt) -> dict[str, Any]:
    """What a row with this prompt says beside it: its tools and what it tells the chat template, where it does."""
    fields = {"tools": list(prompt.tools), "chat_template_kwargs": dict(prompt.chat_template_kwargs)}
    return {name: value for name, value in fields.items() if value}


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
    known, dropped = {}, collections.Counter()
    for one in iter_prompts(read_rows(path, split), dropped):
        if len(known) == limit:
            break
        key = json.dumps([one.prompt, one.tools, one.chat_template_kwargs], sort_keys=True)
        if known.setdefault(key, one) is not one:
            dropped["the prompt of an earlier row"] += 1
    if not known:
        counts = ", ".join(f"{reason}: {n}" for reason, n in dropped.items()) or "there was no row"
        raise UserError(f"{path}: no prompt is left ({counts})")
    return list(known.values()), dict(dropped)


def iter_prompts(rows: Rows, dropped: collections.Counter) -> Iterator[Prompt]:
    """The prompts of rows, one at a time; the rows without one are counted by reason."""
    for where, row, common in in_common(rows, dropped, pairs=False):
        if not common:
            continue
        row, given = common[0], row
        try:
            answered = [name for name in ("chosen", "rejected", *_COMPLETIONS, "text") if row.get(name) is not None]
            if answered or "prompt" not in row:
                pair = {"chosen", "rejected"} <= set(answered)
                prompt = _record(row, ("chosen", "rejected") if pair else ("chosen",)).prompt
            else:
                prompt = _text(row["prompt"], "prompt")
            id = str(_plain(given.get("id"), "id") if given.get("id") is not None else "")
            one = Prompt(prompt, id, where, _tools(row, prompt), _template_kwargs(row, prompt))
        except Malformed as error:
            raise UserError(f"{where}: {error}") from None
        except Dropped as reason:
            dropped[str(reason)] += 1
            continue
        if prompt:
            yield one
        else:
            dropped["no prompt"] += 1


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

    return record._replace(prompt=fold(record.prompt), chosen=fold(record.chosen), rejected=fold(record.rejected))


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
        sides[draw(seed, record.prompt) < fraction].append(record)
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
    flipped = [i for i, r in enumerate(out) if draw(f"flip {seed}", [r.prompt, r.chosen, r.rejected]) < share]
    for i in flipped:
        out[i] = out[i]._replace(chosen=out[i].rejected, rejected=out[i].chosen)
    return out, len(flipped)


def draw(seed: int | str, what: Any) -> float:
    """A number in [0, 1) that is a function of its arguments."""
    key = f"{seed}\n{json.dumps(what, sort_keys=True, ensure_ascii=False)}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


# One row -> one record, or the two of a pair that is read as unpaired.


def _unpaired(row: Mapping) -> list[Record]:
    if row.get("chosen") is not None and row.get("rejected") is not None:
        pair = _record(row, ("chosen", "rejected"))
        chosen = pair._replace(rejected=type(pair.rejected)())
        return [chosen, chosen._replace(chosen=pair.rejected, label=False)]
    names = [name for name in _COMPLETIONS if row.get(name) is not None][:1]
    if not names:
        either = f"one of the fields {', '.join(_COMPLETIONS)} with a label, or chosen and rejected"
        raise Malformed(f"expected {either}, found {_names(row)}")
    label = row.get("label")
    if not isinstance(label, int) or label not in (False, True):  # 0 and 1 equal these
        raise expected("true or false (or 1 or 0)", label, "label")
    return [_record(row, names)._replace(label=bool(label))]


def _record(row: Mapping, responses: Sequence[str], scored: bool = False) -> Record:
    weight = _number(row, "weight", "a positive finite number", above=0.0)
    margin = _margin(row, responses) if scored else math.nan

    supervised = len(responses) == 1
    names = list(responses)
    if supervised:
        alternatives = (names[0], *_COMPLETIONS)
        names = [name for name in alternatives if row.get(name) is not None][:1]
        if not names and row.get("text") is not None:
            row, names = {"prompt": "", "text": row["text"]}, ["text"]
        if not names:
            raise Malformed(f"expected one of the fields {', '.join(alternatives)} or text, found {_names(row)}")
    sides = [_text(row.get(name), name) for name in names]
    prompt = None if row.get("prompt") is None else _text(row["prompt"], "prompt")
    if len({type(side) for side in sides}) > 1:
        raise expected(f"{kind(sides[0])}, as in {names[0]!r}", sides[1], names[1])

    split = _split_strings if isinstance(sides[0], str) else _split_messages
    prompt, sides = split(prompt, sides, names)
    if any(not _content(side).strip() for side in sides):
        raise Dropped("empty response")
    if not supervised and sides[0] == sides[1]:
        raise Dropped("identical responses")
    if margin < 0:
        raise Dropped("rejected scores higher")
    rejected = type(sides[0])() if supervised else sides[1]
    told = dict(tools=_tools(row, prompt), chat_template_kwargs=_template_kwargs(row, prompt))
    return Record(prompt, sides[0], rejected, 1.0 if weight is None else weight, margin, **told)


def _tools(row: Mapping, prompt: Text) -> tuple[dict[str, Any], ...]:
    """The row's tools: a list of objects, or that as JSON, as Parquet files keep it."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, "tools") if tools.strip() else None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise expected("a list of objects, or its JSON", tools, "tools")
    if isinstance(prompt, str):
        raise Malformed("field 'tools': they go through the chat template; write the prompt as a list of messages")
    return tuple(tools)


def _template_kwargs(row: Mapping, prompt: Text) -> tuple[tuple[str, Any], ...]:
    """What the row tells the chat template: an object, or its JSON; Parquet's nulls are no value."""
    told = row.get("chat_template_kwargs")
    if isinstance(told, str):
        told = _parsed(told, "chat_template_kwargs") if told.strip() else None
    if told is not None and not isinstance(told, Mapping):
        raise expected("an object, or its JSON", told, "chat_template_kwargs")
    told = tuple((name, value) for name, value in (told or {}).items() if value is not None)
    if told and isinstance(prompt, str):
        raise Malformed("field 'chat_template_kwargs': there is no chat template for plain text; write messages")
    return told


def _parsed(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise expected(f"JSON ({error})", text, field) from None


def _margin(row: Mapping, responses: Sequence[str]) -> float:
    margin = _number(row, "margin")
    if margin is not None:
        return margin
    forms = ("score_{}", "{}_score", "rating_{}", "{}-rating")
    pairs = [[form.format(name) for name in responses] for form in forms]
    for names in pairs:
        better, worse = (_number(row, name) for name in names)
        if better is not None and worse is not None:
            return better - worse
    either = ", or ".join(" and ".join(names) for names in (["margin"], *pairs))
    raise Malformed(f"expected the field {either}, found {_names(row)}")


def _number(row: Mapping, field: str, what: str = "a finite number", above: float = -math.inf) -> float | None:
    """The number in a field, or None where there is none; all numbers are float32 in the end."""
    value = row.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > above and abs(value) <= _LARGEST):
        raise expected(f"{what} (float32)", value, field)
    return float(value)


def _plain(value: Any, field: str) -> Any:
    if value is not None and not isinstance(value, str | int | float):  # a truth value is an int
        raise expected("a string, a number or a truth value", value, field)
    return value


def _split_strings(prompt: Text | None, sides: list[str], names: list[str]) -> tuple[str, list[str]]:
    """(prompt, responses), the prompt taken out of HH-RLHF transcripts where there is none."""
    if isinstance(prompt, str):
        return prompt, sides
    if prompt is not None:
        raise expected(f"a string, because {names[0]!r} is one", prompt, "prompt")
    prompts = []
    for side, name in zip(sides, names, strict=True):
        if not side.startswith(_HUMAN) or _ASSISTANT not in side:
            raise Malformed(
                f"expected a field 'prompt', or an HH-RLHF transcript ({_HUMAN!r} ... {_ASSISTANT!r} ...) in {name!r}; "
                f"found no prompt and {show(side)}"
            )
        prompts.append(side[: side.rindex(_ASSISTANT) + len(_ASSISTANT)])
    return _same(prompts), [side[len(prompts[0]) :] for side in sides]


def _split_messages(prompt: Text | None, sides: list[Messages], names: list[str]) -> tuple[Messages, list[Messages]]:
    """(prompt, responses), each response one assistant message, wherever the row keeps the messages before it."""
    conversation = prompt is None or (isinstance(prompt, str) and any(s and s[0]["role"] != "assistant" for s in sides))
    if conversation:
        for side, name in zip(sides, names, strict=True):
            if len(side) < 2 or side[-1]["role"] != "assistant":
                raise expected("a conversation that ends with an assistant message", side, name)
        context = _same([side[:-1] for side in sides])
        # Beside whole conversations a string prompt only repeats one message or all; another text would go unread.
        if prompt and not any(prompt.strip() in m["content"] or m["content"] in prompt for m in context):
            raise expected(f"a message of {names[0]!r}, which holds the whole conversation", prompt, "prompt")
        return context, [side[-1:] for side in sides]

    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt:
        raise expected("at least one message", prompt, "prompt")
    n = len(prompt)
    sides = [side[n:] if side[:n] == prompt else side for side in sides]
    for side, name in zip(sides, names, strict=True):
        if [message["role"] for message in side] not in ([], ["assistant"]):
            raise expected("one assistant message (what comes before it belongs in the prompt)", side, name)
    return prompt, sides


def _same(prompts: list) -> Any:
    if any(prompt != prompts[0] for prompt in prompts):
        raise Dropped("prompts differ")
    return prompts[0]


def _text(value: Any, field: str) -> Text:
    """A string or a list of messages, checked; a message loses the fields that are None (Parquet fills them in)."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise expected("valid Unicode", value[error.start : error.end], field) from None
        return value
    if not isinstance(value, list):
        raise expected("a string or a list of messages", value, field)
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, field: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys() | _implied(message):
        raise expected("a message with 'role' and 'content'", message, field)
    if message["role"] not in ROLES:
        raise expected(f"one of {', '.join(ROLES)}", message["role"], f"{field}.role")
    out = {key: value for key, value in message.items() if value is not None}
    if calls := out.get("tool_calls"):
        out["tool_calls"] = _calls(calls, f"{field}.tool_calls")
        out.setdefault("content", "")
    else:
        out.pop("tool_calls", None)
    if not isinstance(out.get("content"), str):
        raise expected("a string", message["content"], f"{field}.content")
    _text(out["content"], f"{field}.content")
    return out


def _implied(message: Mapping) -> set[str]:
    """A message that calls tools need not say anything."""
    return {"content"} if message.get("tool_calls") else set()


def _calls(calls: Any, field: str) -> list[dict[str, Any]]:
    """Tool calls as templates take them: without null fields, and with arguments as objects, not as their JSON."""
    if not isinstance(calls, list):
        raise expected("a list of tool calls", calls, field)
    out = []
    for i, call in enumerate(calls):
        if not isinstance(call, Mapping):
            raise expected("a tool call", call, f"{field}[{i}]")
        call = {key: value for key, value in call.items() if value is not None}
        place, where = call, f"{field}[{i}]"
        if "function" in call:
            if not isinstance(call["function"], Mapping):
                raise expected("an object with 'name' and 'arguments'", call["function"], f"{where}.function")
            call["function"] = {key: value for key, value in call["function"].items() if value is not None}
            place, where = call["function"], f"{where}.function"
        if not isinstance(place.get("name"), str):
            raise expected("a string", place.get("name"), f"{where}.name")
        if isinstance(place.get("arguments"), str):
            place["arguments"] = _parsed(place["arguments"], f"{where}.arguments")
        out.append(call)
    return out


def _content(side: Text) -> str:
    """What a response says or calls, for a look at whether it is empty."""
    if isinstance(side, str):
        return side
    return "".join(message["content"] or ("call" if message.get("tool_calls") else "") for message in side)


def _names(row: Mapping) -> str:
    return ", ".join(str(name) for name, value in row.items() if value is not None) or "no field"
