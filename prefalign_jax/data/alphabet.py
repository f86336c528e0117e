"""Which characters a tokenizer can hold: those that come back from its tokens.

A tokenizer with a token for every byte holds all. Others drop what they have no token for, or make it unknown.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from prefalign_jax.data.records import Record
from prefalign_jax.data.spelled import strings_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_FRAME = "a"  # a character is tried between two of these: some tokenizers take white space off the ends


class Alphabet:
    """The characters that a tokenizer holds; each is tried once.

    Args:
      tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._held: set[str] = set()  # whatever stands beside them
        self._lost: set[str] = set()  # wherever they stand
        self._tried: set[str] = set()
        every = _every_byte()
        self.whole = self._back(every) == every  # it holds all characters
        self._spelled = frozenset("".join(tokenizer.get_vocab()))  # no text that comes back has any other character

    def lost(self, *texts: str) -> set[str]:
        """The characters of some texts that do not come back from their tokens."""
        if self.whole:
            return set()
        lost: set[str] = set()
        for text in texts:
            characters = set(text) - self._held
            if not characters:
                continue
            for new in characters - self._tried:
                self._try(new)
            characters -= self._held
            lost |= characters & self._lost
            if depends := characters - self._lost:
                back = self._back(text)
                lost |= {one for one in depends if back.count(one) < text.count(one)}
        return lost

    def loses(self, record: Record) -> bool:
        """Whether a character of a record does not come back."""
        return bool(self.lost(*strings_of([record.prompt, *record.responses, record.tools])))

    def _try(self, character: str) -> None:
        """Tries a character alone, and twice: some tokenizers make one space of several."""
        self._tried.add(character)
        once, twice = (_FRAME + character * times + _FRAME for times in (1, 2))
        if self._holds(character, once):
            if self._holds(character, twice):
                self._held.add(character)
        elif character not in self._spelled:  # else a token of several characters may hold what none holds alone
            self._lost.add(character)

    def _holds(self, character: str, text: str) -> bool:
        return self._back(text).count(character) >= text.count(character)

    def _back(self, text: str) -> str:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return backend.decode(backend.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _every_byte() -> str:
    """A text with every byte that UTF-8 has, in characters that no vocabulary would list one by one."""
    points = [*range(0x20, 0x7F), *range(0x80, 0x800, 1)]
    points += [*range(0x800, 0xD800, 0x3F1), *range(0xE000, 0x10000, 0x3F1), *range(0x10000, 0x110000, 0x10F01)]
    text = "".join(chr(point) for point in points)
    return "".join(one for one in text if unicodedata.normalize("NFC", one) == one and not unicodedata.combining(one))
