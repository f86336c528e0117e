"""What a chat template does with each part of a conversation, found by rendering it again with marks in their place.

Conversations of one shape (roles, fields, calls) differ in their parts alone: the texts, the arguments of calls, the
tools. A template renders such a shape once with a mark in place of each part. What stands between the marks is its
frame; a mark that is gone is a part that the template leaves out. Filled with a row's own parts the frame gives the
row's own text, or the template looks at what they say, and the row is tried by itself (data/trials.py).

    shape    user: text, assistant: text
    marked   <|im_start|>user\\n{0}<|im_end|>\\n<|im_start|>assistant\\n{1}<|im_end|>\\n
    frame    <|im_start|>user\\n   <|im_end|>\\n<|im_start|>assistant\\n   <|im_end|>\\n
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

REASONING = ("reasoning_content", "reasoning", "thinking")  # what a message may call its reasoning
IDENTITIES = ("id", "type", "tool_call_id")  # fields that tie a call to its result; a template may do without

# No text has these characters: they are reserved for what a program does with text inside.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"{OPEN}(\\d+){CLOSE}")


class Part(NamedTuple):
    """Something of a conversation that a template should write.

    Attributes:
      name: what data.template_may_drop calls it; '' for what a template may always leave out.
      turn: the number of its message; -1 for a tool.
      where: the field, such as 'content' or 'tool_calls[0].arguments'.
    """

    name: str
    turn: int
    where: str


def parts_of(messages: Messages, tools: Tools) -> Iterator[tuple[Part, Any]]:
    """The parts and their values, in the order in which `values_of` has the values."""
    for turn, message in enumerate(messages):
        for field, value in message.items():
            if field == "tool_calls":
                for number, call in enumerate(value):
                    where, function = f"tool_calls[{number}]", call.get("function", call)
                    if call.get("id"):
                        yield Part("", turn, f"{where}.id"), call["id"]
                    yield Part("calls", turn, f"{where}.name"), function["name"]
                    if function.get("arguments"):
                        yield Part("calls", turn, f"{where}.arguments"), function["arguments"]
            elif field != "role" and isinstance(value, str) and value and not value.isspace():
                name = message["role"] if field == "content" else "reasoning" if field in REASONING else field
                yield Part("" if field in IDENTITIES else name, turn, field), value
    for number, tool in enumerate(tools):
        yield Part("tools", -1, f"tools[{number}]"), tool


def values_of(messages: Messages, tools: Tools = ()) -> tuple[tuple[Any, ...], list[Any]]:
    """(the shape, the values of the parts); quick, since every row passes here.

    Those of two conversations one after the other are those of the two joined.
    """
    shape: list[Any] = []
    values: list[Any] = []
    for message in messages:
        shape.append(message["role"])
        for field, value in message.items():
            if field == "tool_calls":
                for call in value:
                    function = call.get("function", call)
                    shape += ("call", *call, *function)
                    if call.get("id"):
                        values.append(call["id"])
                    values.append(function["name"])
                    if function.get("arguments"):
                        shape.append(type(function["arguments"]).__name__)
                        values.append(function["arguments"])
            elif field != "role":
                if isinstance(value, str) and value and not value.isspace():
                    shape.append(field)
                    values.append(value)
                else:
                    shape.append(f"{field}={value!r}")
    for tool in tools:
        shape.append("tool")
        values.append(tool)
    return tuple(shape), values


def with_values(messages: Messages, tools: Tools, values: Sequence[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """The conversation with other values of its parts."""
    left = iter(values)
    out = []
    for message in messages:
        new = dict(message)
        for field, value in message.items():
            if field == "tool_calls":
                new[field] = [_with_values(call, left) for call in value]
            elif field != "role" and isinstance(value, str) and value and not value.isspace():
                new[field] = next(left)
        out.append(new)
    return out, [next(left) for _ in tools]


def _with_values(call: Mapping[str, Any], left: Iterator[Any]) -> dict[str, Any]:
    call = dict(call)
    if call.get("id"):
        call["id"] = next(left)
    function = dict(call.get("function", call))
    function["name"] = next(left)
    if function.get("arguments"):
        function["arguments"] = next(left)
    return {**call, "function": function} if "function" in call else {**call, **function}


def mark(number: int) -> str:
    """What stands in place of a part."""
    return f"{OPEN}{number}{CLOSE}"


def places(text: str) -> Iterator[tuple[int, int]]:
    """(number, place) of the marks in a text."""
    return ((int(one[1]), one.start()) for one in _MARK.finditer(text))


def bare(text: str) -> str:
    """A text without its marks."""
    return _MARK.sub("", text)


def unmarked(text: str) -> str:
    """A text with marks for people."""
    return _MARK.sub("...", text)


def has_marks(text: str) -> bool:
    """Whether a text has a character of a mark, so that marks in it could not be told from it."""
    return OPEN in text or CLOSE in text


def marked(parts: Sequence[tuple[Part, Any]]) -> list[Any]:
    """Values with marks: for a text a mark, for arguments an object of two, for a tool one as name and description."""
    out: list[Any] = []
    for number, (part, value) in enumerate(parts):
        if part.where.endswith(".id") or part.where == "tool_call_id":
            out.append(f"Zq{number:07d}")  # nine letters and digits: some templates insist
        elif isinstance(value, str):
            out.append(mark(number))
        elif part.name == "tools":
            inner = dict(value.get("function", value))
            inner |= {name: mark(number) for name in ("name", "description") if isinstance(inner.get(name), str)}
            out.append({**value, "function": inner} if "function" in value else inner)
        else:
            out.append({mark(number): mark(number)} if isinstance(value, Mapping) else [mark(number)])
    return out


def _function(value: Any) -> Any:
    return value["function"] if isinstance(value, Mapping) and "function" in value else value


# How templates write an object: all of it or what stands under `function`, as JSON on one line or several, as Python.
DUMPS: tuple[Callable[[Any], str], ...] = (
    json.JSONEncoder(ensure_ascii=False).encode,  # as json.dumps, which makes an encoder for each value
    lambda value: json.dumps(value, ensure_ascii=False, indent=4),
    lambda value: json.dumps(value, ensure_ascii=False, indent=2),
    lambda value: json.dumps(_function(value), ensure_ascii=False),
    lambda value: json.dumps(_function(value), ensure_ascii=False, indent=4),
    lambda value: json.dumps(_function(value), ensure_ascii=False, indent=2),
    str,
)


class Frame(NamedTuple):
    """What a template writes around the parts of a shape.

    Attributes:
      texts: K + 1 texts.
      order: K numbers of parts, what stands between them.
      dumps: for parts that are objects, how they are written: number -> of DUMPS.
      missing: the parts that it leaves out.
      opaque: parts that are objects and are written in the template's own way, so that rows with others differ.
    """

    texts: tuple[str, ...]
    order: tuple[int, ...]
    dumps: dict[int, Callable[[Any], str]]
    missing: tuple[int, ...]
    opaque: tuple[int, ...]

    def filled(self, values: Sequence[Any]) -> str:
        """The text with these parts."""
        out = [self.texts[0]]
        for number, text in zip(self.order, self.texts[1:], strict=True):
            value = values[number]
            out += (value if isinstance(value, str) else self.dumps[number](value), text)
        return "".join(out)

    @property
    def marked(self) -> str:
        """The text with marks."""
        marks = (mark(number) + text for number, text in zip(self.order, self.texts[1:], strict=True))
        return "".join((self.texts[0], *marks))

    def bases(self, values: Sequence[Any], text: str) -> list[int] | None:
        """Where in a row's text each of `texts` begins; None where the frame does not fit."""
        starts = self.starts(values, text)
        if starts is None:
            return None
        ends = [*starts[1:], len(text)][: len(starts)]
        return [0, *(end - len(one) for end, one in zip(ends, self.texts[1:], strict=True))]

    def spans(self, values: Sequence[Any], text: str) -> list[tuple[int, tuple[int, int]]]:
        """(number, (begin, end)) of each part in a row's text that the frame fits."""
        ends = self.bases(values, text)[1:]
        return list(zip(self.order, zip(self.starts(values, text), ends, strict=True), strict=True))

    def placed(self, turns: Sequence[Any], values: Sequence[Any], text: str) -> list[Any]:
        """Stretches of `marked`, tuples with `begin` and `end`, as they lie in a row's text that the frame fits."""
        bases, bounds = self.bases(values, text), [0]
        for number, one in zip(self.order, self.texts, strict=False):
            bounds.append(bounds[-1] + len(one) + len(mark(number)))

        def place(at: int) -> int:
            piece = bisect.bisect_right(bounds, at) - 1
            return bases[piece] + at - bounds[piece]

        return [turn._replace(begin=place(turn.begin), end=place(turn.end)) for turn in turns]

    def starts(self, values: Sequence[Any], text: str) -> list[int] | None:
        """Where in a row's text its parts begin, in `order`; None where the frame does not fit.

        Templates trim white space and escape what they put into JSON: a part may stand there so.
        """
        at, out = 0, []
        if not text.startswith(self.texts[0]):
            return None
        at = len(self.texts[0])
        last = len(self.order) - 1
        for k, number in enumerate(self.order):
            after = self.texts[k + 1]
            for written in self._written(number, values[number]):
                end = at + len(written)
                fits = text.startswith(written, at) and text.startswith(after, end)
                if fits and (k < last or end + len(after) == len(text)):
                    break
            else:
                return None
            out.append(at)
            at = end + len(after)
        return out

    def _written(self, number: int, value: Any) -> Iterator[str]:
        if not isinstance(value, str):
            yield self.dumps[number](value)
            return
        yield value
        for trim in (str.strip, str.rstrip, str.lstrip):
            yield trim(value)
            yield trim(value, "\n")
        escaped = json.dumps(value, ensure_ascii=False)[1:-1]
        yield escaped
        yield escaped.strip()


def frame_of(text: str, values: Sequence[Any], fixed: Sequence[int] = ()) -> Frame:
    """The frame of a rendering.

    Args:
      text: with marks.
      values: from `marked`, which were rendered.
      fixed: numbers of parts that were rendered as they are; they belong to the frame.
    """
    dumps, opaque = {}, list(fixed)
    for number, value in enumerate(values):
        if number in fixed:
            continue
        if isinstance(value, str):
            text = text if value == mark(number) else text.replace(value, mark(number))
            continue
        for dump in DUMPS:
            if (written := dump(value)) in text:
                text, dumps[number] = text.replace(written, mark(number)), dump
                break
        else:
            opaque += [number] if mark(number) in text else []
    pieces = _MARK.split(text)
    order = tuple(map(int, pieces[1::2]))
    missing = tuple(sorted(set(range(len(values))) - set(order) - set(opaque)))
    return Frame(tuple(pieces[::2]), order, dumps, missing, tuple(opaque))
