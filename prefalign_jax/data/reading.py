"""How rows are read, what is counted meanwhile, and rows of published formats brought into the common one."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prefalign_jax.data.fields import PAIRS, SUPERVISED, UNPAIRED
from prefalign_jax.data.formats import FORMATS, Format, detect, fields_of, in_common
from prefalign_jax.data.groups import BEST_WORST, gathered, is_group, pairs_of
from prefalign_jax.data.values import Dropped, Malformed, empty, expected, missing, names
from prefalign_jax.types import Place, UserError

Rows = Iterable[tuple[Place, Any]]  # rows with their places

MESSAGE = "message."  # begins the name of a field of messages


@dataclasses.dataclass
class Tally:
    """What is counted while rows are read.

    Attributes:
      dropped: {reason: records}.
      unread: {field: rows} that nobody reads and whose meaning is not known, or does not matter to this kind of data.
      notes: {what: records} that are read in part.
    """

    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unread: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    notes: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class Reading(NamedTuple):
    """How rows are read: the options of `read_records`."""

    responses: Sequence[str] = ("chosen", "rejected")
    unpaired: bool = False
    margin: bool = False
    columns: Sequence[str] = ()
    format: str | None = None
    ignore: Sequence[str] = ()
    beside: Sequence[str] = ()  # fields that something else reads, such as a filter
    train_on: str = "all"
    groups: bool = False
    pairs: str = BEST_WORST
    seed: int = 0

    @property
    def kind(self) -> str:
        """What the records are."""
        return UNPAIRED if self.unpaired else PAIRS if len(self.responses) == 2 else SUPERVISED


def common_rows(
    rows: Rows, tally: Tally, reading: Reading, kind: str = ""
) -> Iterator[tuple[Place, Mapping, Sequence[Mapping]]]:
    """Brings rows of published formats into the common one.

    Args:
      rows: with their places.
      tally: the rows that are left out are counted here by reason, as the iterator goes on.
      reading: how they are read.
      kind: what for, if it is not `reading.kind`.

    Returns:
      An iterator over (its place, the row, its rows in the common format); of a group the first row.
    """
    kind = kind or reading.kind
    whole = reading.groups and kind == PAIRS
    how = reading.pairs if kind == PAIRS else BEST_WORST
    draw = functools.partial(draw_number, f"pairs {reading.seed}")

    def joins(form: Format) -> tuple[str, ...]:
        """The fields that are the same in the rows of a group."""
        if form.group:
            return (form.group,)
        return form.gather if whole or how != BEST_WORST else ()

    def gather(name: str, given: Sequence[tuple[Place, Mapping]]) -> list[Mapping]:
        """The groups of rows that are pairs."""
        rows = []
        for _, row in given:
            with _counted(tally):
                rows.append(in_common(name, row, [row]))
        out, identical = gathered(rows, FORMATS[name].gather)
        tally.dropped.update(["identical responses"] * identical)
        return out

    def in_pairs(name: str, row: Mapping) -> Sequence[Mapping]:
        """The row, or the pairs of its group where those are wanted."""
        if whole or not is_group(row):
            return (row,)
        options = dict(named=FORMATS[name].answers, margins=reading.margin, ordered=kind in (UNPAIRED, SUPERVISED))
        out, ties = pairs_of(row, how, draw, **options)
        tally.dropped.update(["tie"] * ties)
        return out

    def read(name: str, given: Sequence[tuple[Place, Mapping]]) -> tuple[Place, Mapping, Sequence[Mapping]]:
        (where, row), form, out = given[0], FORMATS[name], []
        try:
            with _counted(tally):
                if not form.fits(*fields_of(row)):
                    fields = ", ".join((*form.fields, *form.signs))
                    raise Malformed(f"format {name!r} has the fields {fields}, found {names(row)}")
                one_by_one = form.group or not joins(form)
                common = in_common(name, row, [row for _, row in given]) if one_by_one else gather(name, given)
                out = [one for each in common for one in in_pairs(name, each)]
        except Malformed as error:
            raise UserError(f"{where}: {error}") from None
        return where, row, out

    def read_all() -> tuple[Place, Mapping, Sequence[Mapping]]:
        given = group.copy()
        group.clear()
        if FORMATS[grouped].group and not whole and how == BEST_WORST:
            tally.dropped.update(["neither best nor worst of its prompt"] * (len(given) - 2))
        return read(grouped, given)

    group: list[tuple[Place, Mapping]] = []
    grouped, same = "", None
    for where, row in _without(rows, reading, tally.unread):
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: {expected('a JSON object', row)}")
        name = reading.format or detect(row, pairs=kind in (PAIRS, UNPAIRED))
        fields = joins(FORMATS[name])
        values = [None if missing(row.get(field)) else row[field] for field in fields]
        if group and (name, values) != (grouped, same):
            yield read_all()
        if fields:
            grouped, same = name, values
            group.append((where, row))
        elif name == "common" and not is_group(row):
            yield where, row, (row,)
        else:
            yield read(name, [(where, row)])
    if group:
        yield read_all()


def _without(rows: Rows, reading: Reading, unread: collections.Counter) -> Rows:
    """The rows without the fields that are ignored, which are counted."""
    ignored = [name for name in reading.ignore if not name.startswith(MESSAGE)]
    if not ignored:
        return rows

    def rest(row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        unread.update(name for name in ignored if not empty(row.get(name)))
        return {name: value for name, value in row.items() if name not in ignored}

    return ((where, rest(row)) for where, row in rows)


@contextlib.contextmanager
def _counted(tally: Tally) -> Iterator[None]:
    """Counts what is left out by its reason."""
    try:
        yield
    except Dropped as reason:
        tally.dropped[str(reason)] += 1


def draw_number(seed: int | str, what: Any) -> float:
    """A number in [0, 1) that is a function of its arguments."""
    key = f"{seed}\n{json.dumps(what, sort_keys=True, ensure_ascii=False)}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
