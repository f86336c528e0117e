"""What is said of records on their way to tokens although nothing of them is dropped: counts, and examples."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Set
from typing import Any

_SHOWN = 12  # characters or tokens named in a line


@dataclasses.dataclass
class Remarks:
    """What was noticed of some records; the counts are records, whatever number of times one shows it.

    Attributes:
      left_out: what the chat template leaves out with leave: name of a part -> records.
      rewritten: whose words the chat template writes otherwise than the row -> records.
      meeting: sentences on where prompt and response meet otherwise when an answer is asked for than when one is given.
      unencodable, in_responses: records that hold a character for which the tokenizer has no token, and those of them
        that hold it in a response.
      characters: such a character -> records.
      special: records whose own text spells a special token.
      tokens: such a token -> records.
      responses: of groups that stay, those that are dropped: reason -> responses.
    """

    left_out: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    rewritten: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    meeting: list[str] = dataclasses.field(default_factory=list)
    unencodable: int = 0
    in_responses: int = 0
    characters: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    special: int = 0
    tokens: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    responses: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def as_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        return dict(vars(self))

    def say(self, sentence: str) -> None:
        """Keeps a sentence about the meeting of prompt and response, once."""
        if sentence not in self.meeting:
            self.meeting.append(sentence)

    def lost(self, prompt: Set[str], responses: Set[str]) -> None:
        """Counts a record that has these characters, if any."""
        if prompt or responses:
            self.unencodable += 1
            self.in_responses += bool(responses)
            self.characters.update(prompt | responses)

    def spelled(self, tokens: Set[str]) -> None:
        """Counts a record that spells these special tokens, if any."""
        if tokens:
            self.special += 1
            self.tokens.update(tokens)


def from_json(about: Mapping[str, Any]) -> Remarks:
    """What `Remarks.as_json` gave, also after a way through JSON.

    Example:
      >>> from_json(Remarks(special=1).as_json()) == Remarks(special=1)
      True
    """
    names = ("left_out", "rewritten", "characters", "tokens", "responses")
    counters = {name: collections.Counter(about[name]) for name in names}
    return Remarks(**{**about, **counters})


def lines(remarks: Remarks, split: bool = False) -> list[str]:
    """The remarks for people, a line each.

    Args:
      remarks: of some records.
      split: whether special tokens in their text were encoded as text.

    Example:
      >>> print(*lines(Remarks(unencodable=2, in_responses=1, characters=collections.Counter({"é": 2}))))
      the tokenizer loses characters of 2 records, of 1 in a response ('é'); data.clean=unencodable drops them
    """
    out = list(remarks.meeting)
    for name, count in remarks.left_out.items():
        out.append(f"the chat template leaves out {name} of {count} records")
    for name, count in remarks.rewritten.items():
        out.append(f"the chat template rewrites {name} of {count} records: the case, white space or characters differ")
    for reason, count in remarks.responses.items():
        out.append(f"{count} responses of groups are dropped: {reason}")
    if remarks.unencodable:
        which = _listed(remarks.characters)
        out.append(
            f"the tokenizer loses characters of {remarks.unencodable} records, of {remarks.in_responses} in a response "
            f"({which}); data.clean=unencodable drops them"
        )
    if remarks.special:
        fate = (
            "they stay text" if split else "they become control tokens; data.special_in_text=split encodes them as text"
        )
        out.append(f"{remarks.special} records spell special tokens in their text ({_listed(remarks.tokens)}): {fate}")
    return out


def _listed(counts: collections.Counter) -> str:
    named = [repr(what) for what in sorted(counts, key=lambda what: (-counts[what], what))[:_SHOWN]]
    more = f" and {len(counts) - _SHOWN} others" if len(counts) > _SHOWN else ""
    return ", ".join(named) + more
