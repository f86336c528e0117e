"""A row in the common format -> its prompt and its responses, wherever it keeps what comes before the responses."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prefalign_jax.data.conversation import (
    bare,
    first_answer,
    is_answer,
    last_answer,
    parting,
    until_last_answer,
    untrained,
)
from prefalign_jax.data.fields import PROMPTS, UNPAIRED, account_messages, mapping
from prefalign_jax.data.messages import FLAGS, Messages, Text, obeyed, read_history, read_text
from prefalign_jax.data.reading import MESSAGE, Reading, Tally
from prefalign_jax.data.values import Dropped, Malformed, empty, expected, kind, missing, names, show, string

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # the turns of an HH-RLHF transcript
# Fields that say which of two responses is better, in tables that people make.
TELLING = frozenset(
    {"winner", "preferred", "preferred_response", "preference", "better", "best", "choice", "label", "vote"}
)
_BETWEEN = re.compile(r"\b(human|user|assistant|system|im_start|im_end|inst)\b|[\W_]", re.IGNORECASE)


def sides_of(
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
        raise Malformed(f"expected {', '.join(('prompt', *fields))}, found {names(row)}; {what_to_map(row, lacking)}")
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

    leave = [name.removeprefix(MESSAGE) for name in reading.ignore if name.startswith(MESSAGE)]
    before = before or []
    given = [part for part in (before, prompt, *sides) if isinstance(part, list)]
    for name in leave:
        tally.unread[MESSAGE + name] += any(name in message for part in given for message in part)
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


def what_to_map(row: Mapping, wanted: Sequence[str]) -> str:
    """What to write for a row of other columns."""
    columns = mapping(row, wanted)
    which = next((name for name in row if str(name).lower() in TELLING), "")
    function = f"; where {which!r} says which of two is better, map the rows by --config.data.map_fn=MODULE:FUNCTION"
    return f"if others hold them, write --config.data.columns={columns}{function * bool(which and 'FIELD' in columns)}"


def _split_strings(row: Mapping, prompt: Text | None, sides: list[str], fields: Sequence[str]) -> tuple[str, list[str]]:
    """(prompt, responses), the prompt taken out of HH-RLHF transcripts where there is none."""
    if isinstance(prompt, str):
        return prompt, sides
    prompts = []
    for side, name in zip(sides, fields, strict=True):
        if not side.startswith(_HUMAN) or _ASSISTANT not in side:
            raise Malformed(
                f"expected a field 'prompt', or an HH-RLHF transcript ({_HUMAN!r} ... {_ASSISTANT!r} ...) in {name!r}; "
                f"found {names(row)}; {what_to_map(row, ('prompt',))}"
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
                raise Malformed(f"{whole}; found {names(row)}; {what_to_map(row, ('prompt',))}")
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
