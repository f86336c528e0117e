"""What is counted of some sources on the way from their rows to their pairs: nothing is lost without a reason."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from prefalign_jax.data import remarks
from prefalign_jax.data.cleaning import Stage
from prefalign_jax.data.reading import Tally
from prefalign_jax.data.remarks import Remarks

TRAINING, HELD_OUT = "training", "held out"  # parts


def added(counts: Iterable[Mapping[str, int]]) -> collections.Counter:
    """Several counts by reason as one."""
    return sum(map(collections.Counter, counts), collections.Counter())


def listed(counts: Mapping[str, int]) -> str:
    """Counts by reason, in words.

    Example:
      >>> listed({"empty response": 2, "tie": 0}), listed({})
      ('2 empty response', 'none')
    """
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count) or "none"


def listed_fields(unread: Mapping[str, int]) -> str:
    """Names of fields with the rows that have them, those of equal counts together.

    Example:
      >>> listed_fields({"id": 300, "source": 300, "note": 2})
      'id, source (300 rows each), note (2 rows)'
    """
    groups: dict[int, list[str]] = {}
    for name, count in sorted(unread.items(), key=lambda item: -item[1]):
        if count:
            groups.setdefault(count, []).append(name)
    rows = {count: f"{count} row{'s' * (count > 1)}{' each' * (len(some) > 1)}" for count, some in groups.items()}
    return ", ".join(f"{', '.join(some)} ({rows[count]})" for count, some in groups.items())


@dataclasses.dataclass
class Counts:
    """Counts that grow while some sources are read, cleaned and tokenized.

    Attributes:
      lost: part -> for each source {reason: records}.
      tokenizing: part -> {reason: records}, those of `lost` that tokenization left out.
      unread: for each source {field: rows} that nobody reads.
      notes: for each source {what: records} that are read in part.
      read: [sources] records.
      held, over: records held out, and those beyond the limit of held-out records.
      cleaning: what became of the training records.
      flippable, flipped: pairs whose label might have been flipped, and those whose label was.
      chatted, plain: records that are messages, and those that are plain text.
      noticed: of the records that were tokenized, those that were dropped too.
    """

    lost: dict[str, list[collections.Counter]]
    tokenizing: dict[str, collections.Counter]
    unread: list[collections.Counter]
    notes: list[collections.Counter]
    read: list[int]
    held: int = 0
    over: int = 0
    cleaning: list[Stage] = dataclasses.field(default_factory=list)
    flippable: int = 0
    flipped: int = 0
    chatted: int = 0
    plain: int = 0
    noticed: Remarks = dataclasses.field(default_factory=Remarks)

    def tally(self, part: str, source: int) -> Tally:
        """What the reading of a source counts."""
        return Tally(self.lost[part][source], self.unread[source], self.notes[source])

    def noted(self) -> dict[str, int]:
        """{what: records} that are read in part, or otherwise than the others."""
        mixed = {"as plain text, the others as messages": self.plain} if self.chatted and self.plain else {}
        return dict(added(self.notes)) | mixed

    def remarks(self) -> str:
        """What is read in part or not at all, for the line that says what was dropped."""
        notes, unread = self.noted(), listed_fields(added(self.unread))
        return (f"; {listed(notes)}" if notes else "") + (f"; not used: {unread}" if unread else "")

    def as_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        stages = [stage._asdict() for stage in self.cleaning]
        return {**vars(self), "cleaning": stages, "noticed": self.noticed.as_json()}

    def stages(self, part: str) -> dict[str, list[Stage]]:
        """What became of the records, up to their tokenization.

        Args:
          part: 'training', of which some may be held out, or 'held out'.

        Returns:
          part -> its stages.
        """
        every, reasons = sum(self.read), dict(added(self.lost[part]) - self.tokenizing[part])
        stages: dict[str, list[Stage]] = {TRAINING: [], HELD_OUT: []}
        stages[part].append(Stage("read", every + sum(reasons.values()), every, reasons))
        if taken := self.held + self.over:
            stages[TRAINING].append(Stage("hold out", every, every - taken, {"held out": taken}))
            others = {"for training": every - taken, "over data.eval_limit": self.over}
            stages[HELD_OUT].append(Stage("hold out", every, self.held, others))
        stages[TRAINING] += self.cleaning
        if self.flippable:
            flipped = {"flipped label": self.flipped}
            stages[TRAINING].append(Stage("flip labels", self.flippable, self.flippable, {}, flipped))
        for name, some in stages.items():
            if some:
                gone, before = dict(self.tokenizing[name]), some[-1].after
                some.append(Stage("tokenize", before, before - sum(gone.values()), gone))
        return stages


def new_counts(sources: int) -> Counts:
    """Counts of so many sources, of which nothing is read."""
    counter = collections.Counter
    return Counts(
        lost={part: [counter() for _ in range(sources)] for part in (TRAINING, HELD_OUT)},
        tokenizing={part: counter() for part in (TRAINING, HELD_OUT)},
        unread=[counter() for _ in range(sources)],
        notes=[counter() for _ in range(sources)],
        read=[0] * sources,
    )


def from_json(about: Mapping[str, Any]) -> Counts:
    """What `Counts.as_json` gave, also after a way through JSON.

    Example:
      >>> from_json(new_counts(2).as_json()) == new_counts(2)
      True
    """
    counter = collections.Counter
    return Counts(
        **{
            **about,
            "lost": {part: list(map(counter, counts)) for part, counts in about["lost"].items()},
            "tokenizing": {part: counter(counts) for part, counts in about["tokenizing"].items()},
            "unread": list(map(counter, about["unread"])),
            "notes": list(map(counter, about["notes"])),
            "cleaning": [Stage(**stage) for stage in about["cleaning"]],
            "noticed": remarks.from_json(about["noticed"]),
        }
    )
