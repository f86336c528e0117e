"""Special tokens that are spelled in a row's own text: found, and where it is asked for encoded as text.

A tokenizer takes `<|im_end|>` for the token, whoever wrote it. To tell a row's own from the template's, the row's are
broken by a character before the template is rendered; those that are whole afterwards are the template's, and become
others, known to a second tokenizer, which knows the first ones not at all. Then the breaks are taken out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefalign_jax.data.places import Places, Placing
from prefalign_jax.data.records import Record
from prefalign_jax.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# No text has these characters: they are reserved for what a program does with text inside.
_BREAK, _OURS = "\ufdd2", "\ufdd3"
MARKS = frozenset((_BREAK, _OURS))

# What of a record may be in its text.
_WRITTEN = ("prompt", "chosen", "rejected", "others", "tools", "chat_template_kwargs")


class Written(str):
    """A text in which special tokens are text, but for those between two `_OURS`."""


class SpecialTokens:
    """The special tokens of a tokenizer.

    Args:
      tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        tokens = sorted((token for token in tokens if len(token) > 1 and token.strip()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self._begins = {token[0] for token in tokens}
        self._aliased: tuple[Placing, dict[int, int]] | None = None

    def spelled(self, record: Record) -> set[str]:
        """Those that stand in a record's own text."""
        text = "\0".join(strings_of([getattr(record, name) for name in _WRITTEN]))
        for one in self._begins:  # quicker than the pattern, and most texts have none
            if one in text:
                return set(self._pattern.findall(text))
        return set()

    def broken(self, record: Record) -> Record:
        """The record with a break in each of them."""

        def broken(value: Any) -> Any:
            if isinstance(value, str):
                return self._pattern.sub(lambda match: match[0][0] + _BREAK + match[0][1:], value)
            if isinstance(value, Mapping):
                return {key: inner if key == "role" else broken(inner) for key, inner in value.items()}
            return type(value)(map(broken, value)) if isinstance(value, list | tuple) else value

        return record._replace(**{name: broken(getattr(record, name)) for name in _WRITTEN})

    def written(self, text: str) -> Written:
        """A text that was rendered of a broken record."""
        return Written(self._pattern.sub(lambda match: _OURS + match[0] + _OURS, text).replace(_BREAK, ""))

    def encode(self, texts: Sequence[Written], placed: bool = False) -> list[tuple[list[int], Places]]:
        """(ids, places) of such texts, without the special tokens that a tokenizer adds.

        Args:
          texts: from `written`.
          placed: where the tokens lie in their texts is wanted too.

        Raises:
          UserError: this is a tokenizer without the parts that it takes.
        """
        if self._aliased is None:
            copy, ids = _aliased(self._tokenizer)
            self._aliased = Placing(copy), ids
        placing, ids = self._aliased
        encoded = placing([str(text) for text in texts], placed)
        return [([ids.get(one, one) for one in each], places) for each, places in encoded]


def strings_of(value: Any) -> list[str]:
    """The texts in a prompt, a response or tools, without the names of fields and roles."""
    out: list[str] = []
    _add_strings(value, out)
    return out


def _add_strings(value: Any, out: list[str]) -> None:
    if isinstance(value, str):
        out.append(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if type(inner) is not str:
                _add_strings(inner, out)
            elif key != "role":
                out.append(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _add_strings(inner, out)


def _aliased(tokenizer: Tokenizer) -> tuple[Any, dict[int, int]]:
    """(a copy of a tokenizer that knows its special tokens between two `_OURS` alone, its ids -> the tokenizer's)."""
    import tokenizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("data.special_in_text=split needs a tokenizer with a tokenizer.json; this one has none")
    state = json.loads(backend.to_str())
    state["post_processor"] = None  # it may name special tokens, and adds what is not wanted here
    spelled = {}
    for token in state["added_tokens"]:
        alias = _OURS + token["content"] + _OURS if token["special"] else token["content"]
        spelled[alias] = token["id"]
        token["content"] = alias
    copy = tokenizers.Tokenizer.from_str(json.dumps(state))
    return copy, {copy.token_to_id(alias): number for alias, number in spelled.items()}


def encoder(
    tokenizer: Tokenizer, special: SpecialTokens
) -> Callable[[Sequence[str], bool], list[tuple[list[int], Places]]]:
    """(texts, placed) -> (ids without special tokens, places) of each, in as many threads as there are processors.

    A template writes its own special tokens, and of text we know better where BOS and EOS belong. Places are
    None unless `placed`, because they take time.

    Args:
      tokenizer: a Hugging Face tokenizer.
      special: its special tokens, for texts that are `Written`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)

    def plain(texts: Sequence[str], placed: bool) -> list[tuple[list[int], Places]]:
        if backend is None and placed:
            raise UserError(
                "a response of several messages, weights of messages and data.mask_format need a tokenizer with a "
                "tokenizer.json, which says where its tokens lie; this one has none"
            )
        if backend is None:
            return [(ids, None) for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids]
        return placing(texts, placed)

    if backend is not None:
        tokenizer("")  # leaves the backend without truncation and padding
        placing = Placing(backend)

    def encode(texts: Sequence[str], placed: bool = False) -> list[tuple[list[int], Places]]:
        written = [text for text in texts if isinstance(text, Written)]
        if not written:
            return plain(texts, placed) if texts else []
        others = iter(plain([t for t in texts if not isinstance(t, Written)], placed))
        ours = iter(special.encode(written, placed))
        return [next(ours if isinstance(text, Written) else others) for text in texts]

    return encode
