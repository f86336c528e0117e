"""Where the tokens of a text lie.

Some tokenizers drop characters that they have no token for. What such a one says of its tokens' places is wrong from
the first dropped character on, up to the next special token: it counts the characters that have tokens alone.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

from prefalign_jax.types import UserError, one_line

Places = Any  # a `tokenizers.Encoding` or a `_Kept`; None where nobody asked

_FRAME = "a"  # a character is tried between two of these


class _Kept(NamedTuple):
    """The places in a text of which a tokenizer drops characters.

    Attributes:
      encoding: that of the text without them.
      kept: the place in the text of each character that is left.
    """

    encoding: Any
    kept: Sequence[int]

    def char_to_token(self, at: int) -> int | None:
        """As a `tokenizers.Encoding` does; None for a character that is dropped."""
        here = bisect_left(self.kept, at)
        return self.encoding.char_to_token(here) if self.kept[here : here + 1] == [at] else None

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        """As a `tokenizers.Encoding` does."""
        chars = self.encoding.token_to_chars(token)
        if chars is None or chars[0] == chars[1]:
            return None
        return self.kept[chars[0]], self.kept[chars[1] - 1] + 1


class Placing:
    """Encodes texts, and says where their tokens lie where that is asked.

    Args:
      backend: a `tokenizers.Tokenizer`.
    """

    def __init__(self, backend: Any):
        self._backend = backend
        self._dropped: dict[str, bool] = {}
        added = sorted((one.content for one in backend.get_added_tokens_decoder().values()), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, filter(None, added))) or r"(?!)")

    def __call__(self, texts: Sequence[str], placed: bool) -> list[tuple[list[int], Places]]:
        """(ids without the special tokens that a tokenizer adds, places) of each text; places are None unless `placed`.

        Raises:
          UserError: a text has other tokens without the characters that are dropped, so nobody knows where they lie.
        """
        if not placed:
            return [(one.ids, None) for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        encoded = self._backend.encode_batch(texts, add_special_tokens=False)
        return [(one.ids, self._places(text, one)) for text, one in zip(texts, encoded, strict=True)]

    def _places(self, text: str, encoding: Any) -> Places:
        dropped = {character for character in set(text) if self._drops(character)}
        if not dropped:
            return encoding
        added = {at for match in self._added.finditer(text) for at in range(*match.span())}
        kept = [at for at, character in enumerate(text) if character not in dropped or at in added]
        other = self._backend.encode("".join(text[at] for at in kept), add_special_tokens=False)
        if other.ids != encoding.ids:
            raise UserError(
                f"the tokenizer drops the characters {one_line(repr(''.join(sorted(dropped))))} and does not say where "
                "its tokens lie, which weights within a response need; data.clean=unencodable drops such rows"
            )
        return _Kept(other, kept)

    def _drops(self, character: str) -> bool:
        if character not in self._dropped:
            tried = (_FRAME + character + _FRAME, _FRAME + _FRAME)
            with_it, without = (self._backend.encode(text, add_special_tokens=False).ids for text in tried)
            self._dropped[character] = with_it == without
        return self._dropped[character]
