"""Whole conversations: where prompt and responses part, and which of a response's messages are trained.

A response is the rest of a conversation after its prompt: answers of the assistant, results of tools, further turns of
the user. What the assistant writes is trained, the rest is read. An answer that counts otherwise has a 'weight'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefalign_jax.data.messages import FLAGGED, WEIGHT, Messages


def is_answer(message: Mapping[str, Any]) -> bool:
    """Whether the assistant writes a message."""
    return message["role"] == "assistant"


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether a message of a response is trained."""
    return is_answer(message) and message.get(WEIGHT, 1.0) > 0


def untrained(messages: Messages) -> Messages:
    """The messages, of which none is trained.

    Example:
      >>> untrained([{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}])
      [{'role': 'assistant', 'content': 'a', 'weight': 0.0}, {'role': 'user', 'content': 'q'}]
    """
    return [{**message, WEIGHT: 0.0} if is_answer(message) else message for message in messages]


def until_last_answer(messages: Messages) -> Messages:
    """A conversation up to the assistant's last message; what stands after it is part of no prompt and no response."""
    last = next((i for i in reversed(range(len(messages))) if is_answer(messages[i])), -1)
    return messages[: last + 1]


def first_answer(messages: Messages) -> int:
    """Where the first answer to something begins, 0 where there is none.

    Example:
      >>> first_answer([{"role": "assistant"}, {"role": "user"}, {"role": "assistant"}])
      2
    """
    return next((i for i in range(1, len(messages)) if _begins(messages, i)), 0)


def last_answer(messages: Messages) -> int:
    """Where the answer to the user's last turn begins, 0 where there is none; calls and their results are part of it.

    Example:
      >>> last_answer([{"role": role} for role in ("user", "assistant", "user", "assistant", "tool", "assistant")])
      3
    """
    asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=0)
    return next((i for i in range(max(1, asked), len(messages)) if _begins(messages, i)), 0)


def last_alone(prompt: Messages, sides: list[Messages]) -> tuple[Messages, list[Messages]]:
    """(prompt, responses) with the last trained message alone trained; the prompt of one response ends before it."""
    lasts = [max(i for i, message in enumerate(side) if is_trained(message)) for side in sides]
    if len(sides) > 1:
        return prompt, [untrained(side[:last]) + side[last:] for side, last in zip(sides, lasts, strict=True)]
    (side,), (last,) = sides, lasts
    return [*prompt, *map(bare, side[:last])], [side[last:]]


def parting(sides: Sequence[Messages]) -> tuple[int, int]:
    """Where the responses of whole conversations begin, and where they part.

    They part at the first message that is not the same in all, whatever its weight. A response begins with an answer,
    and so does what is asked of a model. So where they part at a turn of the user, at a tool's result, or at the second
    of two answers in a row, the responses begin at the last answer before it that follows no other. What they share of
    it is part of both and should not be trained.

    Args:
      sides: conversations, each up to its last answer.

    Returns:
      (begin, part), begin <= part. (0, part) where they part before the first answer: then their prompts differ.

    Example:
      >>> begun = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "call"}]
      >>> result, answer = {"role": "tool", "content": "4"}, {"role": "assistant", "content": "Four."}
      >>> parting([[*begun, result, answer], [*begun, {**result, "content": "5"}, answer]])
      (1, 2)
    """
    plain = [[bare(message) for message in side] for side in sides]
    shortest = min(map(len, plain))
    part = next((i for i in range(shortest) if any(side[i] != plain[0][i] for side in plain[1:])), shortest)
    places = range(min(part, shortest - 1), 0, -1)
    return next((i for i in places if all(_begins(side, i) for side in plain)), 0), part


def bare(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what says whether it is trained."""
    if FLAGGED.isdisjoint(message):
        return message
    return {name: value for name, value in message.items() if name not in FLAGGED}


def _begins(messages: Sequence[Mapping[str, Any]], i: int) -> bool:
    """Whether an answer begins with message i, which is not the first."""
    return is_answer(messages[i]) and not is_answer(messages[i - 1])
