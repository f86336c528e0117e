"""What the fields of rows mean: the one table by which a field that nobody reads is either a mistake or a remark.

A reader takes from a row what its format says. Whatever else the row has is looked up here. If training without it is
training on something else than the row says, the run stops with file, row, field and what to write. Every other field
is counted under its name, which the run prints.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from prefalign_jax.data.messages import KNOWN, WEIGHT
from prefalign_jax.data.values import Malformed, empty, name_of, texts

PAIRS, UNPAIRED, SUPERVISED, PROMPTS = "pairs", "unpaired", "supervised", "prompts"  # what rows are read as
# What every kind of row may have beside its responses.
BESIDE = ("prompt", "system", "history", "tools", "chat_template_kwargs", "weight")
_TRAINED = (PAIRS, UNPAIRED, SUPERVISED)
_ALL = (*_TRAINED, PROMPTS)


class Meaning(NamedTuple):
    """What a field says.

    Attributes:
      says: in words.
      common: the field of the common format that says it, '' if none does.
      kinds: of reading that would be wrong without it.
      text: only a string, a list or an object says it: `turns` may also be a number of turns.
    """

    says: str
    common: str
    kinds: tuple[str, ...]
    text: bool = True


_ASKED = Meaning("what is asked", "prompt", _ALL)
_SYSTEM = Meaning("the system prompt", "system", _ALL)
_TURNS = Meaning("a conversation", "messages", _ALL)
_BETTER = Meaning("the preferred response", "chosen", _TRAINED)
_WORSE = Meaning("the response that is not preferred", "rejected", (PAIRS, UNPAIRED))
_RESPONSE = Meaning("a response", "completion", _TRAINED)
_RESPONSES = Meaning("several responses", "responses", _TRAINED)
_COMPARED = Meaning("which responses are preferred", "comparisons", (PAIRS, UNPAIRED))
_SCORES = Meaning("scores of several responses", "scores", ())
_RANKS = Meaning("ranks of several responses", "ranks", ())
_REASONING = Meaning("the reasoning before a response", "", _TRAINED)
_LABEL = Meaning("whether the response is desirable", "label", _TRAINED, text=False)
_WINNER = Meaning("which response is preferred", "", (PAIRS, UNPAIRED), text=False)
_WEIGHT = Meaning("how much the row counts", "weight", _TRAINED, text=False)
_MASK = Meaning("which tokens are trained", "", _TRAINED, text=False)
_STRENGTH = Meaning("how strong the preference is", "margin", (PAIRS,), text=False)
_SCORE = Meaning("a score, which this loss does not read", "margin", (), text=False)
_TOOLS = Meaning("tools that may be called", "tools", _ALL)
_TEMPLATE = Meaning("what the chat template is told", "", _ALL)
_MEDIA = Meaning("pictures or sound, which no text holds", "", _ALL)
_OF_MESSAGES = (_SYSTEM, _WEIGHT, _MASK, _LABEL, _TOOLS, _TEMPLATE, _MEDIA)  # what a message may say too

# A field's name, in lower case and with _ for spaces and hyphens -> what it says.
MEANINGS: dict[str, Meaning] = {
    "prompt": _ASKED,
    "instruction": _ASKED,
    "instructions": _ASKED,
    "question": _ASKED,
    "query": _ASKED,
    "problem": _ASKED,
    "input": _ASKED,
    "inputs": _ASKED,
    "context": _ASKED,
    "contexts": _ASKED,
    "post": _ASKED,
    "passage": _ASKED,
    "human": _ASKED,
    "user_prompt": _ASKED,
    "user_input": _ASKED,
    "system": _SYSTEM,
    "system_prompt": _SYSTEM,
    "system_message": _SYSTEM,
    "system_msg": _SYSTEM,
    "sys_prompt": _SYSTEM,
    "system_instruction": _SYSTEM,
    "developer": _SYSTEM,
    "history": _TURNS,
    "chat_history": _TURNS,
    "messages": _TURNS,
    "conversation": _TURNS,
    "conversations": _TURNS,
    "conversation_history": _TURNS,
    "dialog": _TURNS,
    "dialogue": _TURNS,
    "turns": _TURNS,
    "chosen": _BETTER,
    "chosen_response": _BETTER,
    "chosen_conversations": _BETTER,
    "preferred": _BETTER,
    "preferred_output": _BETTER,
    "accepted": _BETTER,
    "better": _BETTER,
    "good": _BETTER,
    "positive": _BETTER,
    "rejected": _WORSE,
    "rejected_response": _WORSE,
    "rejected_conversations": _WORSE,
    "dispreferred": _WORSE,
    "non_preferred_output": _WORSE,
    "worse": _WORSE,
    "bad": _WORSE,
    "negative": _WORSE,
    "completion": _RESPONSE,
    "response": _RESPONSE,
    "output": _RESPONSE,
    "answer": _RESPONSE,
    "text": _RESPONSE,
    "responses": _RESPONSES,
    "scores": _SCORES,
    "ranks": _RANKS,
    "comparisons": _COMPARED,
    "thinking": _REASONING,
    "reasoning": _REASONING,
    "reasoning_content": _REASONING,
    "chain_of_thought": _REASONING,
    "label": _LABEL,
    "labels": _LABEL,
    "kto_tag": _LABEL,
    "desirable": _LABEL,
    "is_chosen": _LABEL,
    "preference": _WINNER,
    "winner": _WINNER,
    "choice": _WINNER,
    "weight": _WEIGHT,
    "mask": _MASK,
    "masked": _MASK,
    "train_detail": _MASK,
    "train_on_input": _MASK,
    "train_on_inputs": _MASK,
    "preference_score": _STRENGTH,
    "margin": _SCORE,
    "score_chosen": _SCORE,
    "score_rejected": _SCORE,
    "chosen_score": _SCORE,
    "rejected_score": _SCORE,
    "rating_chosen": _SCORE,
    "rating_rejected": _SCORE,
    "chosen_rating": _SCORE,
    "rejected_rating": _SCORE,
    "tools": _TOOLS,
    "functions": _TOOLS,
    "tool_definitions": _TOOLS,
    "available_tools": _TOOLS,
    "chat_template": _TEMPLATE,
    "chat_template_kwargs": _TEMPLATE,
    "documents": _TEMPLATE,
    "image": _MEDIA,
    "images": _MEDIA,
    "audio": _MEDIA,
    "audios": _MEDIA,
    "video": _MEDIA,
    "videos": _MEDIA,
}

# What stands before 'weight' or 'mask' in the name of one, of the row or of a part of it.
_WHOSE = """assistant chosen completion example importance instance label loss pair prompt rejected response row sample
    token train training""".split()
_EMPHASIS = re.compile(rf"(({'|'.join(_WHOSE)})_)*((?P<weight>weights?|multiplier)|masks?)")


def meaning_of(name: Any, value: Any) -> Meaning | None:
    """What a field says, None where nobody knows.

    Example:
      >>> meaning_of("System-Prompt", "Be brief.").common, meaning_of("turns", 3), meaning_of("id", "a7")
      ('system', None, None)
      >>> meaning_of("chosen_weight", 0.5).common, meaning_of("body_weight", 70)
      ('weight', None)
    """
    name = str(name).strip().lower().replace("-", "_").replace(" ", "_")
    meaning = MEANINGS.get(name)
    if meaning is None and (emphasis := _EMPHASIS.fullmatch(name)):
        meaning = _WEIGHT if emphasis["weight"] else _MASK
    return None if meaning is None or (meaning.text and not isinstance(value, str | list | dict)) else meaning


def account(row: Mapping, used: Collection[str], kind: str, parts: Iterable[Any], unread: Counter) -> None:
    """Accounts for every field of a row that its reader did not use.

    Args:
      row: in the common format.
      used: the names of the fields that were read.
      kind: what the row is read as.
      parts: what was made of it; a field that only repeats something of this is not lost.
      unread: is added to, {field: rows}.

    Raises:
      Malformed: a field says something that is not used.
    """
    others = row.keys() - used
    if not others:
        return
    for name in row:  # in their order, not the set's
        if name not in others or empty(value := row[name]):
            continue
        meaning = meaning_of(name, value)
        if meaning is not None and kind in meaning.kinds and not _repeats(value, parts):
            elsewhere = meaning.common not in ("", name)
            where = f", or map it to {meaning.common!r} (data.columns, data.map_fn)" if elsewhere else ""
            raise Malformed(
                f"field {name_of(name)!r} holds {meaning.says}, and nothing reads it here; "
                f"write data.ignore={name_of(name)} to leave it out{where}"
            )
        unread[name_of(name)] += 1


def account_messages(parts: Iterable[tuple[str, Sequence[Mapping], int]], kind: str, unread: Counter) -> None:
    """Accounts for the fields of messages that a template may not read; counts them as 'message.FIELD'.

    Args:
      parts: (the field that has them, messages, the number of the first there).
      kind: what the row is read as.
      unread: is added to.

    Raises:
      Malformed: one says something that is not used.
    """
    others = set()
    for field, part, first in parts:
        for number, message in enumerate(part, first):
            if len(message) == 2:  # role and content
                continue
            for name in message.keys() - KNOWN - {WEIGHT}:  # it was obeyed
                meaning = meaning_of(name, message[name])
                if meaning in _OF_MESSAGES and kind in meaning.kinds and not empty(message[name]):
                    raise Malformed(
                        f"field '{field}[{number}].{name_of(name)}' holds {meaning.says}, and nothing reads it in a "
                        f"message; write data.ignore=message.{name_of(name)} to leave it out"
                    )
                others.add(name)
    unread.update(f"message.{name_of(name)}" for name in others)


def _repeats(value: Any, parts: Iterable[Any]) -> bool:
    """Whether all that a value writes was read elsewhere: a question beside the messages that begin with it."""
    read = {text.strip() for part in parts for text in texts(part)}
    written = [text.strip() for text in texts(value)]
    return bool(written) and read.issuperset(written)


def mapping(row: Mapping, wanted: Iterable[str]) -> str:
    """A value of data.columns that gives a row what it lacks, guessed from what its fields usually mean.

    Example:
      >>> mapping({"question": "Hi?", "good": "Hello.", "b": "No."}, ("prompt", "chosen", "rejected"))
      'prompt=question,chosen=good,rejected=FIELD'
      >>> mapping({"prompt": "Hi?", "choosen": "Hello.", "rejected": "No."}, ("chosen",))
      'chosen=choosen'
    """
    guesses: dict[str, str] = {}
    for name, value in row.items():
        if (meaning := meaning_of(name, value)) is not None and not empty(value):
            common = "prompt" if meaning.common == "messages" and "prompt" in wanted else meaning.common
            guesses.setdefault(common, name_of(name))
    others = [str(name) for name in row if name not in wanted and name_of(name) not in guesses.values()]
    for name in wanted:
        if name not in guesses and (near := difflib.get_close_matches(name, others, 1, cutoff=0.8)):
            guesses[name] = name_of(near[0])  # misspelled
    return ",".join(f"{name}={guesses.get(name, 'FIELD')}" for name in wanted)
