"""A record's text taken apart: what is written, its words, their shingles, and the turns of the person who asks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from prefalign_jax.data.conversation import is_trained
from prefalign_jax.data.records import Record, Text

# Scripts without spaces: each character is a word. Thai, Lao and others like them are not told apart.
_CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_CHARACTERS}]|[^\\W{_CHARACTERS}]+")
_TURN = re.compile(r"\n\n(Human|Assistant):")


def content(text: Text) -> str:
    """What is written: a string as it is, the contents and calls of messages one after the other.

    Example:
      >>> content([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
      'Hi\\nHello'
      >>> content([{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}])
      '{"name": "f", "arguments": {}}'
    """
    if isinstance(text, str):
        return text
    out = []
    for message in text:
        calls = [call.get("function", call) for call in message.get("tool_calls", ())]
        if message["content"] or not calls:
            out.append(message["content"])
        out += [json.dumps(call, ensure_ascii=False) for call in calls]
    return "\n".join(out)


def parts(record: Record) -> list[str]:
    """The contents of prompt, chosen, rejected and a group's others; without a rejected response that one is empty."""
    return [content(text) for text in (record.prompt, record.chosen, record.rejected, *record.others)]


def responses(record: Record) -> list[str]:
    """What is trained of the responses that there are: of messages those of the assistant."""
    sides = record.responses
    return [content(side if isinstance(side, str) else list(filter(is_trained, side))) for side in sides]


def words(text: str) -> list[str]:
    """Words without case and punctuation; of Chinese and Japanese the characters.

    Example:
      >>> words("It's GPT-2, 日本語だ")
      ['it', 's', 'gpt', '2', '日', '本', '語', 'だ']
    """
    return _WORD.findall(text.casefold())


def runs(these: Sequence[str], size: int) -> list[str]:
    """Every `size` words in a row, each joined by spaces.

    Example:
      >>> runs(["a", "b", "c"], 2)
      ['a b', 'b c']
    """
    return [" ".join(these[i : i + size]) for i in range(len(these) - size + 1)]


def shingles(text: str, size: int) -> frozenset[str]:
    """The set of runs of `size` words; of a shorter text all its words, and of one without words its characters.

    Example:
      >>> sorted(shingles("The cat, the cat!", 2)), shingles("Hi", 2), shingles(" !? ", 2), shingles("", 2)
      (['cat the', 'the cat'], frozenset({'hi'}), frozenset({'!?'}), frozenset())
    """
    tokens = words(text)
    if not tokens:
        return frozenset([text.strip()] if text.strip() else [])
    return frozenset(runs(tokens, min(size, len(tokens))))


def turns(prompt: Text) -> list[str]:
    """What the person wrote, turn by turn: user messages, the Human's turns of an HH-RLHF transcript, or the string.

    Example:
      >>> turns("\\n\\nHuman: Hi\\n\\nAssistant: Hello\\n\\nHuman: Why?\\n\\nAssistant:")
      [' Hi', ' Why?']
    """
    if not isinstance(prompt, str):
        return [message["content"] for message in prompt if message["role"] == "user"]
    if not prompt.startswith("\n\nHuman:"):
        return [prompt]
    pieces = _TURN.split(prompt)[1:]  # role, text, role, text, ...
    return [text for role, text in zip(pieces[::2], pieces[1::2], strict=True) if role == "Human"]
