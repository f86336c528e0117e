"""Columns of `datasets` that keep a class as its number: what a row says is the class's name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the classes of each column that holds classes.

    Args:
      features: of a data set, or their JSON objects.

    Example:
      >>> class_names({"label": {"names": ["good", "bad"], "_type": "ClassLabel"}, "id": {"dtype": "int64"}})
      {'label': ['good', 'bad']}
    """
    out = {}
    for column, feature in features.items():
        kind = feature.get("_type") if isinstance(feature, Mapping) else type(feature).__name__
        if kind == "ClassLabel":
            out[column] = feature["names"] if isinstance(feature, Mapping) else feature.names
    return out


def class_names_in(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The same from the metadata of an Arrow table, where `datasets` leaves its features."""
    try:
        return class_names(json.loads((metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, ValueError, TypeError, AttributeError):  # others may use the name for what they like
        return {}


def named(rows: Iterable[Any], classes: Mapping[str, list[str]]) -> Iterable[Any]:
    """Rows with names in place of numbers of classes; a number of no class is no value.

    Example:
      >>> [*named([{"label": 1}, {"label": -1}], {"label": ["good", "bad"]})]
      [{'label': 'bad'}, {'label': None}]
    """
    if not classes:
        return rows

    def name(column: str, value: Any) -> Any:
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        return classes[column][value] if 0 <= value < len(classes[column]) else None

    return ({**row, **{column: name(column, row[column]) for column in classes if column in row}} for row in rows)
