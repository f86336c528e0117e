"""Rows in memory, in place of a file: a list of dicts, or a data set of the `datasets` library."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from prefalign_jax.data.class_labels import class_names, named
from prefalign_jax.data.values import DEEPEST
from prefalign_jax.types import Place, UserError

if TYPE_CHECKING:
    from datasets import Dataset

# What a caller may give for data, a path or hub name among it.
RowsOrPath: TypeAlias = "str | Path | Sequence[Mapping[str, Any]] | Dataset"


_NOTHING = ("NAType", "NaTType")  # of pandas


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryRows:
    """Rows that somebody has at hand.

    Attributes:
      name: what messages call them.
      rows: dicts, in order.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]

    def __iter__(self) -> Iterator[tuple[Place, Any]]:
        for number, row in enumerate(named(self.rows, class_names(getattr(self.rows, "features", None) or {})), 1):
            yield Place(self.name, number), _as_json(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"{self.name} ({len(self)} rows, {self.digest[:12]})"

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the content of all rows in order: 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for place, row in self:
            try:
                digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
            except (TypeError, ValueError) as error:
                raise UserError(f"{place}: expected values as in JSON: {error}") from None
        return digest.hexdigest()


def as_source(data: RowsOrPath, name: str = "data") -> str | MemoryRows:
    """What a caller gives for data: a path or hub name as text, or rows in memory.

    Args:
      data: a path, a hub name, a list of dicts, or a datasets.Dataset.
      name: of the argument, for messages.

    Raises:
      UserError: it is something else.
    """
    if isinstance(data, MemoryRows):
        return data
    if isinstance(data, str | Path):
        return str(data)
    splits = getattr(data, "column_names", None)
    if isinstance(splits, Mapping):  # a DatasetDict
        raise UserError(
            f"{name} has the splits {', '.join(splits)}; choose one, as in data[{next(iter(splits), '')!r}]"
        )
    if isinstance(splits, list) and hasattr(data, "__len__") and hasattr(data, "features"):  # a Dataset
        return MemoryRows(name, data)
    if isinstance(data, Sequence):
        return MemoryRows(name, list(data))
    ways = {"to_pylist": "to_pylist()", "to_dict": "to_dict('records')"}  # of pyarrow, of pandas
    hint = next((f"; write DATA.{call}" for name, call in ways.items() if hasattr(data, name)), "")
    raise UserError(
        f"{name}: expected a path, a hub name, a list of dicts or a datasets.Dataset, this is a "
        f"{type(data).__name__}{hint}"
    )


def _as_json(value: Any, levels: int = DEEPEST + 1) -> Any:
    """A value as JSON has it: what NumPy and pandas hold in place of lists, numbers, texts and nothing."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, dict | list | tuple) and levels:  # who reads it says that there are too many
        if isinstance(value, dict):
            return {key: _as_json(one, levels - 1) for key, one in value.items()}
        return [_as_json(one, levels - 1) for one in value]
    return None if type(value).__name__ in _NOTHING else value
