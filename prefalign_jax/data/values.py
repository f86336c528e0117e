"""Single values of a row, checked: a mistake names the field, what it should hold, and what it holds, shortened."""

from __future__ import annotations

import decimal
import json
import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

LARGEST = 1e38  # float32 holds the difference of two such numbers
SMALLEST = 1.1754944e-38  # positive float32 numbers below it become 0 on some devices
DEEPEST = 64  # levels of lists and objects in a value that is read

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_SHOWN, _NAMES = 100, 12  # characters of a value in a message, and names of fields
_TRUTH = {
    True: ("true", "1", "1.0", "yes", "desirable", "chosen", "good"),
    False: ("false", "0", "0.0", "no", "undesirable", "rejected", "bad"),
}


class Malformed(ValueError):
    """A row breaks its format; whoever reads adds where."""


class Dropped(Exception):
    """A well-formed row is no pair; its one argument is the reason that is counted."""


def expected(what: str, value: Any, field: str = "") -> Malformed:
    """The error of a field that holds something else."""
    return Malformed((f"field {cut(field)!r}: " if field else "") + f"expected {what}, found {show(value)}")


def show(value: Any) -> str:
    """A value for a message, shortened."""
    if value is None or (isinstance(value, list) and not value):
        return "nothing"
    try:
        return cut(f"{kind(value)} {reprlib.repr(value)}")
    except ValueError:  # Python writes no integer of more than some thousand digits
        return kind(value)


def cut(text: str, most: int = _SHOWN) -> str:
    """A text on one line of a terminal: at most so many characters, and escapes for what cannot be printed.

    Example:
      >>> cut("a\\nb"), cut("abcdef", 5)
      ('a\\\\nb', 'ab...')
    """
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]


def kind(value: Any) -> str:
    """The JSON type of a value, for a message."""
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def name_of(field: Any) -> str:
    """A field's name for a message or a count; there may be names that no terminal prints, or none.

    Example:
      >>> name_of("id"), name_of(""), name_of("\\ud800")
      ('id', "''", '\\\\ud800')
    """
    return cut(str(field), 40) or "''"


def names(row: Mapping) -> str:
    """The fields that a row has, for a message."""
    filled = [name_of(name) for name, value in row.items() if not missing(value)]
    return ", ".join(filled[:_NAMES]) + (f", ... ({len(filled)} in all)" if len(filled) > _NAMES else "") or "no field"


def missing(value: Any) -> bool:
    """Whether a field is as good as not there: null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def empty(value: Any) -> bool:
    """Whether a field is missing or says nothing: an empty string, list or object."""
    return missing(value) or (isinstance(value, str | list | dict) and not value)


def string(value: Any, field: str) -> str:
    """The value, which must be a string of valid Unicode."""
    if not isinstance(value, str):
        raise expected("a string", value, field)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise expected("valid Unicode", value[error.start : error.end], field) from None
    return value


def number(value: Any, field: str, what: str = "a finite number", above: float = -math.inf) -> float:
    """The value, which must be a number, or one as text, that float32 holds.

    Args:
      value: of the field.
      field: its name.
      what: is expected, in words.
      above: the number must be larger.
    """
    given = value
    if isinstance(value, decimal.Decimal):
        value = float(value)
    if isinstance(value, str) and len(value) < 64 and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, Real) or not (value > above and abs(value) <= LARGEST):
        raise expected(f"{what} (float32)", given, field)
    return float(value)


def choice(value: Any, options: Sequence[Any], field: str) -> Any:
    """The one of the options that the value equals: 1 for 1.0, as pandas writes it, and for '1', as CSV does."""
    for one in options:
        if isinstance(value, Real | str) and value == one:
            return one
        if isinstance(one, int) and isinstance(value, str) and _NUMBER.fullmatch(value[:64]) and float(value) == one:
            return one
    raise expected(f"one of {', '.join(map(repr, options))}", value, field)


def truth(value: Any, field: str) -> bool:
    """The value as True or False: a truth value, 1 or 0, or one of these as text in any case.

    Example:
      >>> truth(1.0, "label"), truth("False", "label")
      (True, False)
    """
    for answer, texts in _TRUTH.items():
        if (value.strip().lower() in texts) if isinstance(value, str) else isinstance(value, Real) and value == answer:
            return answer
    raise expected("true or false (or 1 or 0)", value, field)


def scalar(value: Any, field: str) -> Any:
    """The value, which must be None, a string, a number or a truth value."""
    if value is not None and not isinstance(value, str | Real):  # a truth value is a number
        raise expected("a string, a number or a truth value", value, field)
    return string(value, field) if isinstance(value, str) else value


def parsed(text: str, field: str) -> Any:
    """The value that a text of JSON writes; a list or an object also where that text was written as JSON again."""
    try:
        value = json.loads(string(text, field))
        again = isinstance(value, str) and value.lstrip()[:1] in ("[", "{")
        return json.loads(value) if again else value
    except RecursionError:
        raise expected(f"JSON of at most {DEEPEST} levels", text, field) from None
    except Malformed:
        raise
    except ValueError as error:
        raise expected(f"JSON ({cut(str(error))})", text, field) from None


def plain(value: Any, field: str, *, nulls: bool = False, levels: int = DEEPEST) -> Any:
    """A value of JSON, copied without the null fields of its objects.

    Arrow gives every object of a column the fields of all; what one lacks is null. A null that somebody wrote cannot be
    told from it, so it goes too, whatever file it came from. Nulls in lists stay.

    Args:
      value: lists, objects, strings, numbers, truth values.
      field: for the message.
      nulls: keep the null fields, where no Arrow table was between.
      levels: it may have.
    """
    if isinstance(value, str):
        return string(value, field)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping | list | tuple):
        if not levels:
            raise Malformed(f"field {field!r}: expected at most {DEEPEST} levels of lists and objects")
        inner = dict(nulls=nulls, levels=levels - 1)
        if not isinstance(value, Mapping):
            return [plain(one, field, **inner) for one in value]
        return {
            string(key, field): plain(one, field, **inner) for key, one in value.items() if nulls or one is not None
        }
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    raise expected("a value of JSON", value, field)


def texts(value: Any, levels: int = 8) -> Iterable[str]:
    """The strings in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif levels and isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from texts(one, levels - 1)
