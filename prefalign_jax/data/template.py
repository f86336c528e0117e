"""A tokenizer's chat template and what it is told: variables, a date that stays, arguments in the form it takes."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prefalign_jax.options import choose, split_names
from prefalign_jax.types import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# What data.template_may_drop may name, and how an error calls it.
MAY_DROP = {
    "system": "system message",
    "developer": "developer message",
    "user": "user message",
    "assistant": "assistant message",
    "tool": "tool result",
    "reasoning": "reasoning",
    "tools": "tools",
    "calls": "tool calls",
}
SPECIAL_IN_TEXT = {"keep": "control tokens", "split": "text"}  # what special tokens in a row's own text become
# Arguments of apply_chat_template that this package sets.
_OURS = """add_generation_prompt chat_template continue_final_message conversation max_length messages padding
    return_assistant_tokens_mask return_dict return_tensors sanitize_control_tokens tokenize tokenizer_kwargs tools
    truncation""".split()
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# No text has these characters: they are reserved for what a program does with text inside.
BEGIN, END = "\ufdd4", "\ufdd5"  # stand around what a template says is generated
_DATE = "%d %b %Y"  # of `date_string`, as the templates that know it write it
_DIRECTIVES = "aAbBdHIjmMpSUwWyYxXcZz"  # of strftime


class ChatOptions(NamedTuple):
    """What a chat template is told, and what may become of what it is given.

    Attributes:
      kwargs: (name, value) told with every conversation, such as enable_thinking; a row's own take their place.
      may_drop: names of MAY_DROP that the template may leave out.
      day: what it prints as the date; None is today.
      split_special: encode special tokens that are spelled in a row's own text as text.
    """

    kwargs: tuple[tuple[str, Any], ...] = ()
    may_drop: tuple[str, ...] = ()
    day: datetime.date | None = None
    split_special: bool = False


AS_IT_IS = ChatOptions()
# Options that `chat_options` takes.
CHAT_FIELDS = ("chat_template_kwargs", "template_may_drop", "date", "special_in_text")


def template_kwargs(given: Any, name: str = "data.chat_template_kwargs") -> tuple[tuple[str, Any], ...]:
    """What a chat template is told, from an object or its JSON.

    Args:
      given: None for nothing.
      name: of the option, for messages.

    Raises:
      UserError: it is no object, or names what is not for a user to set.

    Example:
      >>> template_kwargs('{"enable_thinking": false}')
      (('enable_thinking', False),)
    """
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: expected a JSON object, found {given[:60]!r}: {one_line(error)}") from None
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"{name}: expected an object such as {{'enable_thinking': False}}, found {given!r}")
    if (key := not_to_be_set(given or {})) is not None:
        raise UserError(f"{name}: {key!r} is no variable of a chat template that may be set")
    return tuple(sorted((given or {}).items()))


def not_to_be_set(names: Iterable[Any]) -> Any:
    """The first of some names that is no variable of a chat template for a user to set; None if all are."""
    return next((key for key in names if key in _OURS or not isinstance(key, str) or not key.isidentifier()), None)


def chat_options(
    chat_template_kwargs: Any = None,
    template_may_drop: str | None = None,
    date: str | None = None,
    special_in_text: str | None = None,
    *,
    where: str = "data.",
) -> ChatOptions:
    """The options as a user writes them.

    Args:
      chat_template_kwargs: see `template_kwargs`.
      template_may_drop: names of MAY_DROP, with commas.
      date: YYYY-MM-DD; None for today.
      special_in_text: 'keep', or 'split' to encode special tokens that a row's text spells as text; None keeps.
      where: what stands before the names of the options, for messages.

    Raises:
      UserError: one is invalid.

    Example:
      >>> chat_options(template_may_drop="reasoning").may_drop
      ('reasoning',)
    """
    names = tuple(split_names(template_may_drop))
    for name in names:
        choose(f"{where}template_may_drop", name, MAY_DROP)
    try:
        day = datetime.date.fromisoformat(date) if date else None
    except ValueError:
        raise UserError(f"{where}date={date!r}: write a day as YYYY-MM-DD") from None
    split = choose(f"{where}special_in_text", special_in_text or "keep", SPECIAL_IN_TEXT) == SPECIAL_IN_TEXT["split"]
    return ChatOptions(template_kwargs(chat_template_kwargs, f"{where}chat_template_kwargs"), names, day, split)


def prints_date(tokenizer: Tokenizer) -> bool:
    """Whether the chat template may print the date, so that its texts depend on the day."""
    template = tokenizer.chat_template
    sources = template.values() if isinstance(template, Mapping) else [template] if template else []
    return any("strftime_now" in source or _wants_date_string(source) for source in sources)


class Template:
    """A tokenizer's chat template. Whoever renders it sets a limit to the time that it takes.

    Args:
      tokenizer: a Hugging Face tokenizer with a chat template.
      options: see `ChatOptions`.
    """

    def __init__(self, tokenizer: Tokenizer, options: ChatOptions):
        self._tokenizer = tokenizer
        self._kwargs = dict(options.kwargs)
        self._day = options.day or datetime.date.today()
        self._sources: dict[bool, str] = {}
        self._arguments_as_text: bool | None = None  # None: not yet known

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        asked: bool = False,
        anew: bool = False,
        generated: bool = False,
    ) -> str:
        """The text of a conversation; some templates take the arguments of calls as objects, some as JSON text.

        Args:
          messages, tools: the conversation; arguments are objects.
          kwargs: what a row tells the template.
          asked: up to where an answer, or the rest of a last message of the assistant, begins.
          anew: then an answer begins after a last message of the assistant too.
          generated: with a BEGIN and an END around what stands between its `{% generation %}` and
            `{% endgeneration %}`.

        Raises:
          Exception: whatever the template raises.
        """
        continued = asked and not anew and messages[-1]["role"] == "assistant"
        how = dict(asked=asked, continued=continued, generated=generated)
        calls = [call.get("function", call) for message in messages for call in message.get("tool_calls", ())]
        given = [call["arguments"] for call in calls if call.get("arguments")]
        if not given or self._arguments_as_text is False:
            return self._rendered(messages, tools, kwargs, **how)
        if self._arguments_as_text:
            return self._rendered(_with_text_arguments(messages), tools, kwargs, **how)
        # The one is tried, then the other: text where objects raise, or are printed as Python writes them.
        text, error = "", None
        try:
            text = self._rendered(messages, tools, kwargs, **how)
            self._arguments_as_text = any(str(one) in text and str(one) != as_json(one) for one in given)
        except Exception as first:  # a template raises whatever it likes
            error, self._arguments_as_text = first, True
        if self._arguments_as_text:
            try:
                return self._rendered(_with_text_arguments(messages), tools, kwargs, **how)
            except Exception:
                self._arguments_as_text = False if error is None else None
                if error is not None:
                    raise error from None
        return text

    def _with_generated(
        self,
        source: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        kwargs: Mapping[str, Any],
    ) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        (text,), (generated,) = render_jinja_template(
            [list(messages)],
            tools=list(tools) or None,
            chat_template=source,
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **kwargs},
        )
        for begin, end in reversed(generated):  # from the end, so that places stay what they are
            text = text[:begin] + BEGIN + text[begin:end] + END + text[end:]
        return text

    def tells_generated(self, tools: bool = False) -> bool:
        """Whether the template, the one for conversations with or without tools, marks what a model generates."""
        return _GENERATION.search(self._source(tools)) is not None

    def reads(self, name: str, tools: bool = False) -> bool:
        """Whether a variable of this name stands in the template, the one for conversations with or without tools."""
        return re.search(rf"\b{re.escape(name)}\b", self._source(tools)) is not None

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        kwargs: Mapping[str, Any] | None,
        *,
        asked: bool,
        continued: bool,
        generated: bool,
    ) -> str:
        source = self._source(bool(tools))
        if generated:
            return self._with_generated(source, messages, tools, {**self._kwargs, **(kwargs or {})})
        return self._tokenizer.apply_chat_template(
            list(messages),
            chat_template=source,
            tokenize=False,
            add_generation_prompt=asked and not continued,
            continue_final_message=continued,
            **{**self._kwargs, **(kwargs or {}), **({"tools": list(tools)} if tools else {})},
        )

    def _source(self, tools: bool) -> str:
        """The template for conversations with or without tools, its date that of the options."""
        if tools not in self._sources:
            source = self._tokenizer.get_chat_template(tools=[{}] if tools else None)
            for name in self._kwargs:
                if not re.search(rf"\b{re.escape(name)}\b", source):
                    raise UserError(f"data.chat_template_kwargs: the chat template reads no {name!r}")
            if _wants_date_string(source):
                self._kwargs.setdefault("date_string", self._day.strftime(_DATE))
            self._sources[tools] = _dated(source, self._day) if "strftime_now" in source else source
        return self._sources[tools]


def as_json(value: Any) -> str:
    """JSON as templates write it."""
    return json.dumps(value, ensure_ascii=False)


def _wants_date_string(source: str) -> bool:
    """Whether it prints `date_string` and has no date of its own for it, as Llama 3.1's has."""
    own = r"set\s+date_string\b|date_string\s*\|"
    return bool(re.search(r"\bdate_string\b", source)) and not re.search(own, source)


def _dated(source: str, day: datetime.date) -> str:
    """A template for which it is always this day: its own macro stands before the library's `strftime_now`."""
    moment = datetime.datetime.combine(day, datetime.time())
    wanted = {*re.findall(r"%[-#_0^]?[a-zA-Z%]", source), *(f"%{letter}" for letter in _DIRECTIVES)}
    replaced = "".join(f".replace({one!r}, {moment.strftime(one)!r})" for one in sorted(wanted, key=len, reverse=True))
    return "{% macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro %}\n" + source


def _with_text_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of calls as JSON texts."""

    def as_text(call: Mapping[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": as_text(call["function"])}
        return {**call, "arguments": as_json(call["arguments"])} if call.get("arguments") is not None else dict(call)

    return [
        {**message, **({"tool_calls": list(map(as_text, calls))} if (calls := message.get("tool_calls")) else {})}
        for message in messages
    ]
