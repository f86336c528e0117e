"""Texts and conversations as rows write them -> a string, or messages with 'role' and 'content' as templates take them.

{'from': 'human', 'value': ...}              {'role': 'user', 'content': ...}; other names of roles, in any case, too
content as a list of parts                   their texts, joined
a string of JSON that is a list of messages  the messages, also if it is written as JSON a second time
an object with nothing but 'messages'        its messages
one message                                  a list of it
'function_call' (a role, or a field)         'tool_calls'
tool arguments as a string of JSON           the object
null fields                                  go, at any depth
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prefalign_jax.data.values import (
    SMALLEST,
    Malformed,
    expected,
    missing,
    number,
    parsed,
    plain,
    show,
    string,
    truth,
)

Messages = list[dict[str, Any]]  # [{'role': ..., 'content': ...}, ...]
Text = str | Messages

ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "function", "ipython"), "tool"),
}
_CALLS = ("function_call", "tool_call")  # roles of messages that are nothing but a call, as JSON
_NAMES = {"from": "role", "value": "content"}

# Fields of a message that templates may read; what others mean is not known.
_STRINGS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")  # texts, as is the content
KNOWN = frozenset(("role", "content", "tool_calls", *_STRINGS))
WEIGHT = "weight"  # of a message that is read: how much its tokens count, where that is not 1
# Fields that say whether a message is trained, which of the two answers says so, and those that may say how much.
FLAGS = {
    **dict.fromkeys((WEIGHT, "train", "training", "trainable", "loss", "loss_weight"), True),
    **dict.fromkeys(("masked", "mask"), False),
}
_WEIGHTS = (WEIGHT, "loss_weight")
FLAGGED = frozenset(FLAGS)  # looked for in every message
_LOST = ("refusal", "audio", "images", "image", "videos", "video")  # fields of a message that no tokens hold

# Objects, written as JSON, once or twice, or as Python writes them; and what tells messages among these.
_JSON = re.compile(r"""[\s\ufeff]*"?\s*(\[\s*)?\{\s*(?=\\*["'])""")
_ROLE = re.compile(rf"""\\*["'](role|from)\\*["']\s*:\s*\\*["']({"|".join([*_ROLES, *_CALLS])})\\*["']""", re.I)
_SAID = re.compile(r"""["'](content|value)\\*["']\s*:""")
_WHOLE = ("messages", "conversations", "conversation")  # the one field of an object that wraps messages
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_text(value: Any, field: str) -> Text:
    """A string or messages, checked.

    Args:
      value: of the field, see the module.
      field: its name, for the message.

    Raises:
      Malformed: it is neither.

    Example:
      >>> read_text([{"from": "Human", "value": [{"type": "text", "text": "Hi"}]}], "prompt")
      [{'role': 'user', 'content': 'Hi'}]
    """
    if isinstance(value, str):
        if _JSON.match(value) and (messages := _from_json(value, field)) is not None:
            return messages
        return string(value, field)
    if isinstance(value, Mapping):
        if len(value) == 1 and (name := next(iter(value))) in _WHOLE:
            return read_text(value[name], f"{field}.{name}")
        return [read_message(value, field)]
    if not isinstance(value, list):
        raise expected("a string or a list of messages", value, field)
    return [read_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def _from_json(text: str, field: str) -> Messages | None:
    """The messages that a string writes; None for other JSON, such as the output of a program."""
    try:
        value = parsed(text.lstrip("\ufeff"), field)
    except Malformed:
        if _ROLE.match(text, _JSON.match(text).end()) or (_ROLE.search(text) and _SAID.search(text)):
            raise expected("messages as JSON", text, field) from None
        return None
    inner = value
    if isinstance(value, Mapping):
        name = next(iter(value), "")
        inner = value[name] if len(value) == 1 and name in _WHOLE and isinstance(value[name], list) else [value]
    return read_text(value, field) if isinstance(inner, list) and all(map(_looks_like_one, inner)) else None


def _looks_like_one(value: Any) -> bool:
    """Whether a value of JSON is a message, and no object that happens to have a 'role'."""
    if not isinstance(value, Mapping):
        return False
    role = value.get("role", value.get("from"))
    known = isinstance(role, str) and role.strip().lower().replace("-", "_") in (*_ROLES, *_CALLS)
    return known and not {"content", "value", "tool_calls", "function_call"}.isdisjoint(value)


def read_message(message: Any, field: str) -> dict[str, Any]:
    """One message, checked and copied.

    Args:
      message: with 'role' and 'content', or 'from' and 'value'.
      field: its place in the row, for errors.

    Raises:
      Malformed: it is none.
    """
    if not isinstance(message, Mapping):
        raise expected("a message with 'role' and 'content'", message, field)
    role, content = message.get("role"), message.get("content")
    if role in ROLES and isinstance(content, str) and len(message) == 2:  # most are so
        return {"role": role, "content": string(content, f"{field}.content")}

    out = {name: value for name, value in message.items() if value is not None}
    for theirs, ours in _NAMES.items():
        if theirs in out and ours not in out:
            out[ours] = out.pop(theirs)
    if "role" not in out or not ({"content", "tool_calls", "function_call"} & out.keys() or "content" in message):
        raise expected("a message with 'role' and 'content' (or 'from' and 'value')", message, field)
    calls, nulls = out.pop("tool_calls", None) or [], False
    if isinstance(calls, str):
        calls, nulls = parsed(calls, f"{field}.tool_calls"), True
    if name := next((name for name in _LOST if out.get(name)), None):
        raise Malformed(f"field '{field}.{name}': no text holds it; leave the row out (data.map_fn)")
    role, content = string(out.pop("role"), f"{field}.role"), out.pop("content", None)
    known = role.strip().lower().replace("-", "_")
    if known in _CALLS:
        nulls = True
        calls, content, known = parsed(string(content, f"{field}.content"), f"{field}.content"), None, "assistant"
        calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
    if known not in _ROLES:
        raise expected(f"one of {', '.join(ROLES)} (or human, gpt, model)", role, f"{field}.role")
    if call := out.pop("function_call", None):
        calls = [*calls, {"type": "function", "function": call}]
    if calls and content is None:
        content = ""
    read = {"role": _ROLES[known], "content": _content(content, f"{field}.content")}
    if calls:
        read["tool_calls"] = _calls(calls, f"{field}.tool_calls", nulls)
    for name, value in out.items():
        place = f"{field}.{name}"
        read[string(name, field)] = _content(value, place) if name in _STRINGS else plain(value, place)
    return read


def _content(content: Any, field: str) -> str:
    """A message's content: a string, or a list of parts that are text."""
    if not isinstance(content, list):
        return string(content, field)
    out = []
    for i, part in enumerate(content):
        place = f"{field}[{i}]"
        if not isinstance(part, Mapping):
            raise expected("a part with 'type' and 'text'", part, place)
        given = {name: value for name, value in part.items() if value is not None}
        kind = given.pop("type", "text")
        if kind not in _TEXT_PARTS or given.keys() != {"text"}:
            raise expected("a part of type 'text' with a 'text' and nothing else", part, place)
        out.append(string(given["text"], f"{place}.text"))
    return "".join(out)


def _calls(calls: Any, field: str, nulls: bool) -> list[dict[str, Any]]:
    """Tool calls as templates take them: without null fields, and with arguments as objects, not as their JSON."""
    if not isinstance(calls, list):
        raise expected("a list of tool calls", calls, field)
    out = []
    for i, call in enumerate(calls):
        where = f"{field}[{i}]"
        if not isinstance(call, Mapping):
            raise expected("a tool call", call, where)
        call = plain(call, where, nulls=nulls)
        place, inside = call, where
        if "function" in call:
            place, inside = call["function"], f"{where}.function"
            if not isinstance(place, dict):
                raise expected("an object with 'name' and 'arguments'", place, inside)
        string(place.get("name"), f"{inside}.name")
        if isinstance(place.get("arguments"), str):
            arguments = f"{inside}.arguments"
            place["arguments"] = plain(parsed(place["arguments"], arguments), arguments, nulls=True)
        out.append(call)
    return out


def read_tools(value: Any, field: str = "tools") -> tuple[dict[str, Any], ...]:
    """Tools that may be called: a list of objects with a name each, or that as JSON, as Parquet files keep it."""
    nulls = isinstance(value, str)
    if nulls:
        value = parsed(value, field) if value.strip() else None
    if not value:
        return ()
    if not isinstance(value, list):
        raise expected("a list of objects, or its JSON", value, field)
    tools = ()
    for i, tool in enumerate(value):
        written = isinstance(tool, str)
        tool = parsed(tool, f"{field}[{i}]") if written else tool
        if not isinstance(tool, Mapping):
            raise expected("a list of objects, or its JSON", value, field)
        tools += (plain(tool, f"{field}[{i}]", nulls=nulls or written),)
    for i, tool in enumerate(tools):
        inside = tool.get("function", tool)
        if not isinstance(inside, dict) or not isinstance(inside.get("name"), str) or not inside["name"]:
            raise expected("a tool with a 'name'", value[i], f"{field}[{i}]")
    return tools


def read_history(value: Any, field: str = "history") -> Messages:
    """What was said before: messages, or a list of [question, answer]; either may be a string of JSON."""
    if isinstance(value, str):
        value = parsed(value, field) if value.strip() else []
    if not isinstance(value, list):
        raise expected("a list of messages, or of [question, answer]", value, field)
    out = []
    for i, turn in enumerate(value):
        place = f"{field}[{i}]"
        if isinstance(turn, Mapping):
            out.append(read_message(turn, place))
        elif isinstance(turn, list | tuple) and len(turn) == 2:
            for role, text in zip(("user", "assistant"), turn, strict=True):
                out.append({"role": role, "content": string(text, place)})
        else:
            raise expected("a message, or [question, answer]", turn, place)
    return out


def obeyed(messages: Messages, field: str, first: int = 0, *, trained: bool) -> Messages:
    """Messages without the flags that say whether they are trained; an answer that counts otherwise has a 'weight'.

    Args:
      messages: of a prompt, or of a response.
      field: where the row has them, for the message.
      first: the number of the first of them there.
      trained: whether they are of a response, of which the assistant's messages are trained.

    Raises:
      Malformed: a message asks to be trained and is not, or its flags contradict each other.

    Example:
      >>> obeyed([{"role": "assistant", "content": "a", "train": False}], "messages", trained=True)
      [{'role': 'assistant', 'content': 'a', 'weight': 0.0}]
    """
    if all(map(FLAGGED.isdisjoint, messages)):
        return messages
    out = []
    for i, message in enumerate(messages, first):
        flags = {name: value for name, value in message.items() if name in FLAGS and not missing(value)}
        weights = {name: _weight(value, name, f"{field}[{i}].{name}") for name, value in flags.items()}
        message = {name: value for name, value in message.items() if name not in FLAGS}
        if trained and message["role"] == "assistant":
            if len(set(weights.values())) > 1:
                raise Malformed(f"fields {', '.join(map(repr, weights))} of {field}[{i}] contradict each other")
            if (weight := next(iter(weights.values()), 1.0)) != 1:
                message[WEIGHT] = weight
        elif name := next((name for name, weight in weights.items() if weight), None):
            raise Malformed(
                f"field '{field}[{i}].{name}': {show(flags[name])} says that the message is trained, and it is "
                f"not; write data.ignore=message.{name}, or shorten the conversation (data.map_fn)"
            )
        out.append(message)
    return out


def _weight(value: Any, name: str, place: str) -> float:
    """How much a message counts that has this value in the field of FLAGS."""
    says = "0 or a positive finite number"
    try:
        return float(truth(value, place) == FLAGS[name])
    except Malformed:
        if name not in _WEIGHTS:
            raise
    if (weight := number(value, place, says)) < SMALLEST:  # 0 was a truth value
        raise expected(f"{says} (float32)", value, place)
    return weight
