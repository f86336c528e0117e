"""What the assistant writes in the text of a conversation: where each of its turns begins and ends.

A template that has `{% generation %}` says it. Of others the text is compared with what they make of the conversation
so far. What asks for a turn ends where the turn begins, and the end of the turn is what closes the conversation when
the turn is its last. Marks in place of the parts (data/shapes.py) show where in the text the two meet.

    whole    <|im_start|>user\\n{0}<|im_end|>\\n<|im_start|>assistant\\n{1}<|im_end|>\\n<|im_start|>user\\n{2} ...
    asked    <|im_start|>user\\n{0}<|im_end|>\\n<|im_start|>assistant\\n
    closed   <|im_start|>user\\n{0}<|im_end|>\\n<|im_start|>assistant\\n{1}<|im_end|>\\n
    turn                                                            [{1}<|im_end|>]
"""

from __future__ import annotations

import contextlib
import itertools
import os.path
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prefalign_jax.data.shapes import Messages, mark, places, unmarked
from prefalign_jax.data.template import BEGIN, END
from prefalign_jax.types import one_line

_BOUND = re.compile(f"[{BEGIN}{END}]")


class Unclear(Exception):
    """Why it cannot be told what the assistant writes; completes 'the chat template ...'."""


class Stretch(NamedTuple):
    """A stretch of a text, and by how much each of its tokens counts."""

    begin: int
    end: int
    weight: float = 1.0


class Stretches(NamedTuple):
    """What is trained of a text.

    Attributes:
      parts: in order; what stands in none of them is read and not trained.
      last: where the last message of the response begins, if it is the assistant's; else the end of the text.
      end: by how much an end-of-sequence token counts that is added after the text.
    """

    parts: tuple[Stretch, ...]
    last: int
    end: float = 1.0


class Closing(NamedTuple):
    """What ends a turn.

    Attributes:
      eos: the end-of-sequence token.
      special: matches any special token.
      next_turn: what the template writes after the end of the last turn though it is not told to.
      spaces: white space after the end of a turn belongs to it.
    """

    eos: str | None
    special: re.Pattern[str]
    next_turn: str = ""
    spaces: bool = False

    def end(self, closed: str, after: str) -> int | None:
        """How much of what follows a turn in a conversation belongs to it; None where that is not clear.

        Args:
          closed: what follows the turn where it is the last.
          after: what follows it in the conversation.
        """
        closed = closed.removesuffix(self.next_turn) if self.next_turn else closed
        for end in self._ends(closed):
            if after.startswith(closed[:end]):
                common = os.path.commonprefix([closed[end:], after[end:]])
                return end + (len(common) - len(common.lstrip())) * self.spaces
        return None

    def _ends(self, closed: str) -> Iterator[int]:
        if self.eos and self.eos in closed:
            yield closed.index(self.eos) + len(self.eos)
        yield len(closed.rstrip())
        if match := self.special.search(closed):
            yield match.end()


class Turn(NamedTuple):
    """A turn of the assistant in a text: the number of its message, and where it begins and ends."""

    number: int
    begin: int
    end: int


class _Mark(NamedTuple):
    number: int
    begin: int
    end: int


Render = Callable[..., str]  # (messages, asked=, generated=) -> their text with marks


def turns_in(
    text: str,
    messages: Messages,
    first: int,
    owners: Mapping[int, int],
    render: Render,
    closing: Closing,
    *,
    generated: bool,
) -> list[Turn]:
    """The turns of the assistant in a response of several messages.

    Args:
      text: of the conversation, with marks.
      messages: the conversation with marks.
      first: the number of the response's first message, which begins where the prompt ends.
      owners: mark -> the number of the message that has it.
      render: of the template.
      closing: what ends a turn.
      generated: the template says what is generated.

    Returns:
      The turns in order; of some templates that say what is generated several of a message. One that is `first` begins
      at 0, and one that is the last message ends where the text does: the caller knows better where the response does.

    Raises:
      Unclear: it cannot be told.
    """
    numbers = [n for n, message in enumerate(messages) if n >= first and message["role"] == "assistant"]

    def shown(conversation: Messages, **how: bool) -> str:
        try:
            return render(conversation, **how)
        except Exception as error:  # a template raises whatever it likes
            raise Unclear(f"does not render what leads up to it: {one_line(error)}") from None

    def begin_of(number: int) -> int:
        return _begin(text, owners, number, shown(messages[:number], asked=True), lambda: headers(number))

    def headers(number: int) -> Iterator[str]:
        """What it writes before an answer, as the last turn and as an earlier one."""
        new = mark(max(owners, default=0) + 1)
        answer = {"role": "assistant", "content": new}
        for more in ([answer], [answer, {"role": "user", "content": "x"}]):
            with contextlib.suppress(Unclear):
                yield _after_marks(shown([*messages[:number], *more]).partition(new)[0])[1]

    if generated:
        turns = _generated(shown(messages, generated=True), text, messages, owners, numbers)
        return [turn for one in turns for turn in _trimmed(one, text, first, begin_of, closing)]
    turns = []
    for number in numbers:
        begin, end = 0, len(text)
        if number > first:
            begin = begin_of(number)
        if number + 1 < len(messages):
            closed = shown(messages[: number + 1])
            end = _end(text, owners, number, begin, closed, closing)
            if number == first and _before(text, owners, first) > _before(closed, owners, first):
                raise Unclear("writes other messages before it")
        turns.append(Turn(number, begin, end))
    if any(one.end > other.begin for one, other in itertools.pairwise(turns)):
        raise Unclear("writes the turns of the assistant in another order")
    return turns


def _marks(text: str) -> list[_Mark]:
    return [_Mark(number, at, at + len(mark(number))) for number, at in places(text)]


def _after_marks(text: str) -> tuple[int | None, str]:
    """(the last mark, what follows it)."""
    marks = _marks(text)
    return (marks[-1].number, text[marks[-1].end :]) if marks else (None, text)


def _own(marks: Sequence[_Mark], owners: Mapping[int, int], number: int) -> range:
    """Which marks are those of a message."""
    own = [i for i, one in enumerate(marks) if owners.get(one.number) == number]
    if own and own != list(range(own[0], own[-1] + 1)):
        raise Unclear("writes a message in several places")
    return range(own[0], own[-1] + 1) if own else range(0)


def _before(text: str, owners: Mapping[int, int], number: int) -> int:
    """How much stands before the first mark of a message; 0 where it has none."""
    return next((one.begin for one in _marks(text) if owners.get(one.number) == number), 0)


def _begin(text: str, owners: Mapping[int, int], number: int, asked: str, headers: Callable[[], Iterable[str]]) -> int:
    """Where a turn begins.

    Args:
      text, owners: see `turns_in`.
      number: of its message.
      asked: the text that asks for it.
      headers: what may stand before an answer.
    """
    marks = _marks(text)
    own = _own(marks, owners, number)
    known = marks[own[0] - 1].number if own and own[0] else None
    if not own or _after_marks(asked)[0] != known:
        if text.startswith(asked):
            return len(asked)
        raise Unclear("writes what comes before it otherwise than where it asks for it")
    at, first = marks[own[0] - 1].end if own[0] else 0, marks[own[0]].begin
    before, header = text[at:first], _after_marks(asked)[1]
    if before.startswith(header):
        return at + len(header)
    if header.startswith(before):  # what is asked with opens more, such as <think>
        return first
    both = [one for one in headers() if header.startswith(one) and before.startswith(one)]
    if not both:
        raise Unclear(f"writes {unmarked(before)!r} before it and {unmarked(header)!r} where it asks for it")
    return at + max(map(len, both))


def _end(text: str, owners: Mapping[int, int], number: int, begin: int, closed: str, closing: Closing) -> int:
    """Where a turn ends that others follow; `closed` is the text up to it."""
    marks = _marks(text)
    own = _own(marks, owners, number)
    if own and _after_marks(closed)[0] == marks[own[-1]].number:
        at = marks[own[-1]].end
        after, closed = (
            text[at : marks[own[-1] + 1].begin if own[-1] + 1 < len(marks) else None],
            _after_marks(closed)[1],
        )
        length = closing.end(closed, after)
        if length is None:
            raise Unclear(f"ends it with {closed!r} where it is the last, and goes on with {unmarked(after)!r} here")
        return at + length
    # It has nothing that a mark could stand for: all of the text must be the same, and nothing follows its end.
    ends = [closed.rfind(closing.eos) + len(closing.eos)] if closing.eos and closing.eos in closed else []
    ends += [match.end() for match in closing.special.finditer(closed)][-1:]
    for end in ends:
        if begin <= end and text.startswith(closed[:end]) and not closed[end:].replace(closing.eos or " ", "").strip():
            return end
    raise Unclear("writes it otherwise where others follow")


def _generated(
    tracked: str, text: str, messages: Messages, owners: Mapping[int, int], numbers: Sequence[int]
) -> list[Turn]:
    """What the template says is generated, by messages."""
    bounds, plain = [], tracked
    while match := _BOUND.search(plain):
        bounds.append(match.start())
        plain = plain[: match.start()] + plain[match.end() :]
    if plain != text:
        raise Unclear("writes it otherwise while it says what is generated")
    stretches = list(zip(bounds[::2], bounds[1::2], strict=True))
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    marks = _marks(text)
    by_marks = [
        {owners.get(one.number) for one in marks if begin <= one.begin and one.end <= end} for begin, end in stretches
    ]
    if len(stretches) == len(answers) and all(
        whose <= {number} for whose, number in zip(by_marks, answers, strict=True)
    ):
        whose = answers
    elif all(len(one) == 1 for one in by_marks):
        whose = [next(iter(one)) for one in by_marks]
    else:
        raise Unclear("marks as generated what is not one message of the assistant")
    turns = [Turn(number, *stretch) for number, stretch in zip(whose, stretches, strict=True)]
    return [turn for turn in turns if turn.number in numbers]


def _trimmed(turn: Turn, text: str, first: int, begin_of: Callable[[int], int], closing: Closing) -> Iterator[Turn]:
    """What is generated without the header that asks for it, and without white space after its end."""
    begin, end = turn.begin, turn.end
    if turn.number > first:
        with contextlib.suppress(Unclear):  # then what the template says is all that is known
            begin = max(begin, begin_of(turn.number))
    shown = text[begin:end].rstrip()
    ends = [match.end() for match in closing.special.finditer(shown)]
    if not closing.spaces and shown and (shown.endswith(closing.eos or " ") or ends[-1:] == [len(shown)]):
        end = begin + len(shown)
    if begin < end:
        yield Turn(turn.number, begin, end)
