"""What a config chooses by name: look it up, check its hyper-parameters, say what was meant if it is not there."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from prefalign_jax.types import UserError

# A hyper-parameter's name -> (is this value valid?, what is, in words).
Checks = Mapping[str, tuple[Callable[[Any], bool], str]]


TRUTH = {"true": True, "1": True, "false": False, "0": False}
DTYPES = ("float32", "bfloat16")  # of a computation
SHOWN = 12  # names in a message


def did_you_mean(name: Any, names: Iterable[str]) -> str:
    """'did you mean NEAREST? ' for a name that resembles one of `names`, else nothing.

    Example:
      >>> did_you_mean("adamm", ["adamw", "sgd"])
      "did you mean 'adamw'? "
    """
    near = difflib.get_close_matches(str(name), list(names), 1)
    return f"did you mean {near[0]!r}? " if near else ""


def choose(field: str, name: Any, table: Mapping[str, Any]) -> Any:
    """table[name].

    Args:
      field: of the config, for the message.
      name: a key of the table.
      table: what there is to choose from.

    Returns:
      The entry.

    Raises:
      UserError: there is no such entry; the line names the nearest, and all of them if they are few.
    """
    if name not in table:
        listed = ", ".join(table)
        if len(table) > SHOWN:
            nearest = difflib.get_close_matches(str(name), table, SHOWN, cutoff=0.0)
            listed = f"{', '.join(nearest)}, ... ({len(table)} in all)"
        raise UserError(f"{field}={name!r} is unknown; {did_you_mean(name, table)}write one of {listed}")
    return table[name]


def split_names(text: str | None) -> list[str]:
    """What a field names, separated by commas.

    Example:
      >>> split_names("a, b,"), split_names(None)
      (['a', 'b'], [])
    """
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def split_values(text: str) -> list[str]:
    """What stands between commas, but for commas in brackets.

    Example:
      >>> split_values("dpo,sft(beta=1,gamma=2)")
      ['dpo', 'sft(beta=1,gamma=2)']
    """
    return re.split(r",(?![^()]*\))", text)


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not None, without the name.

    Example:
      >>> given({"name": "adamw", "b1": 0.9, "b2": None})
      {'b1': 0.9}
    """
    return {key: value for key, value in fields.items() if value is not None and key != "name"}


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as dotted names.

    Example:
      >>> flatten({"seed": 0, "loss": {"name": "dpo", "beta": 0.1}})
      {'seed': 0, 'loss.name': 'dpo', 'loss.beta': 0.1}
    """
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def hyper_parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters of a function and their defaults.

    Example:
      >>> hyper_parameters(lambda x, *, beta=0.1: x)
      {'beta': 0.1}
    """
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def truth(text: str) -> bool:
    """What 'true' or 'false' says, in either case, or 1 or 0.

    Raises:
      ValueError: the text says neither.
    """
    if text.lower() not in TRUTH:
        raise ValueError(text)
    return TRUTH[text.lower()]


def read_as(text: str, default: Any) -> Any:
    """A text as a value of the default's type, a string if there is none.

    Raises:
      ValueError: it is not one.

    Example:
      >>> read_as("false", True), read_as("1e-3", 0.1)
      (False, 0.001)
    """
    kind = str if default is None else type(default)
    return truth(text) if kind is bool else kind(text)


def _alike(value: Any, default: Any) -> bool:
    """Whether a value is of its default's type; an integer is a number too, a truth value is not."""
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, Real if isinstance(default, Real) else type(default))


def check_hyper(what: str, given: Mapping[str, Any], known: Iterable[str], checks: Checks) -> None:
    """Checks that what is given exists and is in range.

    Args:
      what: whose hyper-parameters they are, such as "loss 'dpo'".
      given: name -> value.
      known: the names it has; with their defaults, whose types are checked too.
      checks: for some of the names.

    Raises:
      UserError: a name is not known, or a value is out of range.
    """
    defaults = dict(known) if isinstance(known, Mapping) else dict.fromkeys(known)
    for key, value in given.items():
        if key not in defaults:
            has = f"it has {', '.join(defaults)}" if defaults else "it has none"
            raise UserError(f"{what} has no hyper-parameter {key!r}; {did_you_mean(key, defaults)}{has}")
        if not _alike(value, defaults[key]):
            raise UserError(f"{what}: {key}={value!r} is not of type {type(defaults[key]).__name__}")
        if key in checks and not checks[key][0](value):
            raise UserError(f"{what}: {key}={value!r} is out of range; write {checks[key][1]}")
