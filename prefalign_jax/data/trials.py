"""One conversation tried by itself: each piece of each part is changed, and what changes nothing is left out.

This is for rows whose text is not what their shape's frame makes of them, because the template looks at what they say:
DeepSeek R1's cuts what stands before `</think>`, SmolLM 3's reads `/no_think` in the system message and takes it out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

from prefalign_jax.data.shapes import DUMPS, Messages, Part, Tools, has_marks, mark, parts_of, places, with_values

Render = Callable[[Messages, Tools], str]

_TAG = re.compile(r"<[^<>\s]{1,48}>")
_WORD = re.compile(r"<[^<>\s]*>|[^\s<>]+")
_WORDS = 8  # words that are gone from a text and are tried one by one
_OTHER = "x"  # a text in place of another
FORMAL = ("type", "strict", "function.strict")  # of a tool: they say nothing of what it does


class LeftOut(NamedTuple):
    """A part, or a piece of it, that the template does not write and does not look at."""

    part: Part
    piece: str


class _Piece(NamedTuple):
    """A stretch of a text, and the marks that are put into it."""

    start: int
    end: int
    marks: tuple[int, ...]  # places


def left_out(messages: Messages, tools: Tools, render: Render, text: str, looked_for: Container[Part]) -> list[LeftOut]:
    """What the template leaves out of a conversation.

    Args:
      messages, tools: the conversation.
      render: of the template.
      text: what it gives for them.
      looked_for: the parts to try.

    Returns:
      The pieces in order, each the largest of its kind.
    """
    parts = [part for part, _ in parts_of(messages, tools)]
    values = [value for _, value in parts_of(messages, tools)]

    def same(number: int, value: Any) -> bool:
        """Whether the text stays as it is with another value of a part."""
        other = [*values]
        other[number] = value
        try:
            return render(*with_values(messages, tools, other)) == text
        except Exception:  # a template that raises has looked
            return False

    tried = [part in looked_for for part in parts]
    pieces = [
        list(_pieces(v)) if isinstance(v, str) and wanted else [] for v, wanted in zip(values, tried, strict=True)
    ]
    survived = _survived(values, pieces, lambda other: render(*with_values(messages, tools, other)))
    out = []
    for number, (part, value) in enumerate(zip(parts, values, strict=True)):
        if not tried[number]:
            continue
        if not isinstance(value, str):
            if not any(dump(value) in text for dump in DUMPS):
                places = (place for place, other in _changed(value, "") if same(number, other))
                out += [LeftOut(part, place) for place in places if part.name != "tools" or place not in FORMAL]
            continue
        lost = [one for one in pieces[number] if survived is None or not survived[number, one]]
        lost = [one for one in lost if same(number, value[: one.start] + _OTHER + value[one.end :])]
        out += [LeftOut(_named(part, value, one.end), value[one.start : one.end]) for one in lost]
        if not lost:
            gone = [word for word in dict.fromkeys(_WORD.findall(value)) if word not in text][:_WORDS]
            out += [LeftOut(part, word) for word in gone if same(number, value.replace(word, ""))]
    return out


def rewritten(messages: Messages, tools: Tools, text: str, looked_for: Container[Part]) -> list[Part]:
    """The parts whose words stand otherwise in a template's text: in another case, with other white space, escaped.

    What stands between tags such as </think> may move; as JSON writes it, it is the same.
    """

    def whole(value: str) -> bool:
        pieces = filter(None, (piece.strip() for piece in _TAG.split(value)))
        return all(piece in text or json.dumps(piece, ensure_ascii=False)[1:-1] in text for piece in pieces)

    parts = parts_of(messages, tools)
    return [part for part, value in parts if part in looked_for and isinstance(value, str) and not whole(value)]


def _survived(
    values: Sequence[Any], pieces: Sequence[Sequence[_Piece]], render: Callable[[Sequence[Any]], str]
) -> dict[tuple[int, _Piece], bool] | None:
    """Which pieces are written whole, as marks in them show; None where no marks can be set."""
    if any(isinstance(value, str) and has_marks(value) for value in values):
        return None
    numbers: dict[tuple[int, _Piece], list[int]] = {}
    other, count = list(values), 0
    for number, some in enumerate(pieces):
        for one in reversed(some):  # from the end, so that places stay what they are
            numbers[number, one] = list(range(count, count + len(one.marks)))
            for place, which in zip(reversed(one.marks), reversed(numbers[number, one]), strict=True):
                other[number] = other[number][:place] + mark(which) + other[number][place:]
            count += len(one.marks)
    try:
        seen = {number for number, _ in places(render(other))}
    except Exception:  # it does not like the marks
        return None
    return {key: seen.issuperset(which) for key, which in numbers.items()}


def _pieces(value: str) -> Iterator[_Piece]:
    """Halves of the stretches between tags such as </think>; marks go behind words, never into a tag."""
    at = 0
    for tag in (*_TAG.finditer(value), None):
        end = tag.start() if tag else len(value)
        words = [(at + word.start(), at + word.end()) for word in re.finditer(r"\S+", value[at:end])]
        middle = (len(words) + 1) // 2
        for half in (words[:middle], words[middle:]):
            if half:
                yield _Piece(half[0][0], half[-1][1], tuple(sorted({half[0][1], half[-1][1]})))
        at = tag.end() if tag else end


def _named(part: Part, value: str, end: int) -> Part:
    """The part; what an assistant says before a closing tag is its reasoning."""
    tags = [tag.group() for tag in _TAG.finditer(value, end)]
    return part._replace(name="reasoning") if part.name == "assistant" and any(t[1] == "/" for t in tags) else part


def _changed(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """(a place in an object, the object with another value there), for every place."""
    if isinstance(value, dict):
        named = where == "" or where.endswith("properties")
        for key, inner in value.items():
            place = f"{where}.{key}" if where else key
            if named and not (where == "" and key in ("function", "type", "name", "description", "parameters")):
                yield place, {(f"{k}{_OTHER}" if k == key else k): v for k, v in value.items()}
            for at, other in _changed(inner, place):
                yield at, {**value, key: other}
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            for at, other in _changed(inner, f"{where}[{number}]"):
                yield at, [*value[:number], other, *value[number + 1 :]]
    elif isinstance(value, bool) or value is None:
        yield where, not value
    elif isinstance(value, str):
        yield where, value + _OTHER
    else:
        yield where, value + 1
