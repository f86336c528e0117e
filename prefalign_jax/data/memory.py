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

from prefalign_jax.types import Place, UserError

if TYPE_CHECKING:
    from datasets import Dataset

# What a caller may give for data, a path or hub name among it.
RowsOrPath: TypeAlias = "str | Path | Sequence[Mapping[str, Any]] | Dataset"


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
        for number, row in enumerate(self.rows, 1):
            yield Place(self.name, number), row

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
                digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=_plain).encode() + b"\n")
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
    if isinstance(splits, list) and hasattr(data, "__len__"):  # a Dataset
        return MemoryRows(name, data)
    if isinstance(data, Sequence):
        return MemoryRows(name, list(data))
    hint = "; write DATA.to_dict('records')" if hasattr(data, "to_dict") else ""
    raise UserError(
        f"{name}: expected a path, a hub name, a list of dicts or a datasets.Dataset, this is a "
        f"{type(data).__name__}{hint}"
    )


def _plain(value: Any) -> Any:
    """A NumPy value as JSON takes it."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is none")
