"""Tables for people: aligned for a terminal, in Markdown, and as records that a page shows."""

from __future__ import annotations

import numbers
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from prefalign_jax.types import printable

# What may stand to the right: a number, a count such as 3/10, a time such as 0:01:09.
_NUMBER = re.compile(r"[-+−]?\d[\d,.:/]*(e[-+−]?\d+)?%?")
_EMPTY = ("", "-")


class Cell(NamedTuple):
    """A cell of a page: its text, a smaller line beneath it, and whether it stands out."""

    text: str
    beneath: str = ""
    strong: bool = False


class Table(NamedTuple):
    """A table whose first column names its rows.

    Attributes:
      title: what it shows.
      head: names of the columns.
      rows: cells, as many in each as there are columns: text, numbers, None for nothing, or on pages `Cell`.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows as a page shows them."""
        return [[cell if isinstance(cell, Cell) else Cell(written(cell)) for cell in row] for row in self.rows]

    @property
    def right(self) -> list[bool]:
        """Which columns stand to the right."""
        return to_the_right([[cell.text for cell in row] for row in self.cells]) or [False] * len(self.head)


def written(value: Any) -> str:
    """A cell as text: whole numbers with separators, yes or no, nothing for None.

    Example:
      >>> [written(value) for value in (12345, True, None, "0.50")]
      ['12,345', 'yes', '', '0.50']
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, numbers.Integral) else str(value)


def to_the_right(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold numbers and nothing else; the first names the rows and never does.

    Example:
      >>> to_the_right([["1", "7", "0.5 [0.4, 0.6]"], ["2", "-", ""]])
      [False, True, False]
    """

    def holds_numbers(column: Sequence[str]) -> bool:
        said = [cell for cell in column if cell not in _EMPTY]
        return bool(said) and all(map(_NUMBER.fullmatch, said))

    return [number > 0 and holds_numbers(column) for number, column in enumerate(zip(*rows, strict=True))]


def aligned(head: Sequence[str], rows: Sequence[Sequence[Any]], indent: int = 0) -> str:
    """A table for a terminal: columns two spaces apart, numbers to the right.

    Args:
      head: names of the columns; () for a table without.
      rows: as many cells in each; what would steer a terminal is shown as '?'.
      indent: spaces before each line.

    Returns:
      A line for each row, without a newline at the end.

    Example:
      >>> print(aligned(("loss", "pairs", "beta"), [("dpo", 12345, "0.1"), ("日本", 7, None)]))
      loss   pairs  beta
      dpo   12,345   0.1
      日本       7
    """
    body = [[printable(written(cell)) for cell in row] for row in rows]
    lines = [[printable(name) for name in head], *body] if head else body
    right = to_the_right(body) if body else [False] * len(head)
    widths = [max(map(_columns, column)) for column in zip(*lines, strict=True)]

    def put(cell: str, width: int, to_right: bool) -> str:
        room = " " * (width - _columns(cell))
        return room + cell if to_right else cell + room

    return "\n".join(" " * indent + "  ".join(map(put, line, widths, right)).rstrip() for line in lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown.

    Example:
      >>> print(markdown(("loss", "pairs"), [("a|b", 12345)]))
      | loss | pairs |
      |---|---|
      | a\\|b | 12,345 |
    """

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(written(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def _columns(text: str) -> int:
    """How many columns of a terminal the text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)
