"""Records of messages -> the texts of prompt and responses, by a chat template; nothing of a row is lost unsaid.

    prompt      template(prompt, add_generation_prompt=True), what a model is asked with
    response    what template(prompt + response) has after it, up to the response's own end

A template may contradict itself: it opens `<think>` only where an answer is asked for, or writes the header of the next
turn though it is told not to. Then the text of the conversation does not begin with the text of the prompt, or goes on
after the response. The prompt stays what a model is asked with, the response ends at its own end, and it is said once.
"""

from __future__ import annotations

import contextlib
import functools
import os.path
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prefalign_jax.data import trials
from prefalign_jax.data.messages import Messages
from prefalign_jax.data.records import Record
from prefalign_jax.data.remarks import Remarks
from prefalign_jax.data.shapes import (
    CLOSE,
    Frame,
    Part,
    Tools,
    bare,
    frame_of,
    has_marks,
    mark,
    marked,
    parts_of,
    places,
    unmarked,
    values_of,
    with_values,
)
from prefalign_jax.data.template import AS_IT_IS, MAY_DROP, ChatOptions, Template, as_json
from prefalign_jax.data.trials import LeftOut, left_out
from prefalign_jax.data.turns import Closing, Render, Stretch, Stretches, Turn, Unclear, turns_in
from prefalign_jax.limits import time_limit
from prefalign_jax.types import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_DIFFERENT = (
    "the chat template writes some conversations otherwise than their prompts; prompts are those that a model is asked "
    "with"
)
_SHOWN = 60  # characters of a part in an error


class Form(NamedTuple):
    """What is known of a shape, once it was rendered with marks.

    Attributes:
      parts: of the shape.
      frame: None where the template does not take the marks.
      missing: the parts that it leaves out of every conversation of the shape.
      tried: what it leaves out of the parts that it writes in its own way; these are always the same.
      reopened: where the text of a conversation does not begin with that of its prompt, how much of the prompt's end is
        not in it; -1 where they differ before the last turn; 0 where it begins with it.
      lead: in the second case, how much of the response stands before its first part.
      meeting: what is said of that.
      next_turn: what the template writes after the end of the response.
      key: under which it is kept.
    """

    parts: tuple[Part, ...]
    frame: Frame | None
    missing: tuple[int, ...] = ()
    tried: tuple[LeftOut, ...] = ()
    reopened: int = 0
    lead: int = 0
    meeting: str = ""
    next_turn: str = ""
    key: Any = None

    def fits(self, values: Sequence[Any], text: str) -> bool:
        """Whether a row's text is what the frame makes of its parts."""
        return self.frame is not None and (
            self.frame.filled(values) == text or self.frame.starts(values, text) is not None
        )


class Conversation(NamedTuple):
    """What a template is given, and what it makes of it.

    Attributes:
      messages, tools, kwargs: what it is given.
      before: messages before the response.
      asked: the text is that of a prompt, up to where an answer begins.
      continued: the prompt ends with an answer that the response goes on with.
      shape, values: see `shapes.values_of`.
      text: what the template makes of it.
    """

    messages: Messages
    tools: Tools
    kwargs: Mapping[str, Any]
    before: int
    asked: bool
    continued: bool
    shape: tuple[Any, ...]
    values: list[Any]
    text: str

    def looked_for(self, part: Part) -> bool:
        """Whether a part should be in this text: those of the prompt are looked for where an answer is asked for."""
        return self.asked or part.turn >= self.before


class Renderer:
    """A tokenizer's chat template with options, and what was found out about it. Whoever asks limits its time.

    Args:
      tokenizer: a Hugging Face tokenizer.
      options: see `ChatOptions`.
      keep_end: white space after an end of turn belongs to the turn.
      mask_format: of what the assistant writes, the template's own is not trained: ends of turns, what wraps calls.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: ChatOptions = AS_IT_IS,
        *,
        keep_end: bool = False,
        mask_format: bool = False,
    ):
        self._template = Template(tokenizer, options)
        self._may_drop = options.may_drop
        self._eos = tokenizer.eos_token
        self._keep_end, self._mask_format = keep_end, mask_format
        self._forms: dict[Any, Form] = {}
        self._turns: dict[Any, list[Turn] | Unclear] = {}
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")

    def texts(self, record: Record, remarks: Remarks, *, responses: bool = True) -> list[str]:
        """[prompt, prompt + chosen, prompt + rejected, ...], without what is trained; see `rendered`."""
        return [text for text, _ in self.rendered(record, remarks, responses=responses)]

    def rendered(
        self, record: Record, remarks: Remarks, *, responses: bool = True
    ) -> list[tuple[str, Stretches | None]]:
        """The prompt, and prompt + response for each of the responses, with what is trained of them.

        Args:
          record: of messages.
          remarks: what is left out with leave, or contradictory, is added.
          responses: False gives the prompt alone.

        Returns:
          (text, stretches) of each; None where everything after the prompt is trained alike.

        Raises:
          UserError: the template does not render the record, it leaves out a part without leave, or it cannot be told
            what the assistant writes.
        """
        prompt, tools, kwargs = record.prompt, record.tools, dict(record.chat_template_kwargs)
        continued = bool(prompt) and prompt[-1]["role"] == "assistant"
        before = len(prompt) - continued  # the messages before the response
        first, last = values_of(prompt[:before]), values_of((), tools)

        def conversation(messages: Messages, asked: bool) -> Conversation:
            (shape, values), more = first, values_of(messages[before:])
            shape, values = shape + more[0] + last[0], values + more[1] + last[1]
            text = self._template.render(messages, tools, kwargs, asked=asked)
            return Conversation(messages, tools, kwargs, before, asked, continued, shape, values, text)

        try:
            whole = conversation(prompt, True)
            start = whole.text
            rewritten: set[str] = set()
            sides, lost = [], [("prompt", self._checked(whole, rewritten)[1])]
            for number, given in enumerate(record.responses if responses else ()):
                messages, weights = weighed(given)
                whole = conversation(joined(prompt, messages), False)
                form, gone = self._checked(whole, rewritten)
                side = ("chosen", "rejected")[number] if number < 2 else f"others[{number - 2}]"
                lost.append((side, gone))
                sides.append((side, whole, form, weights, self._response(whole, form, start, remarks)))
        except UserError:
            raise
        except Exception as error:  # a template raises whatever it likes
            raise UserError(f"{record.where}: the chat template does not render it: {one_line(error)}") from None
        names = self._allowed(record, lost, before)
        unread = [name for name in kwargs if not self._template.reads(name, bool(tools))]
        if rewritten or names or unread:
            remarks.rewritten.update(rewritten)
            remarks.left_out.update(names | {f"{name!r} of chat_template_kwargs" for name in unread})
        texts: list[tuple[str, Stretches | None]] = [(start, None)]
        for side, whole, form, weights, (at, own) in sides:
            try:
                stretches = self._stretches(whole, form, weights, at, len(own), len(start))
            except Unclear as error:
                instead = "set another data.chat_template"
                instead += "" if record.rejected else ", or data.train_on=last, which trains the last answer alone"
                raise UserError(
                    f"{record.where}: {side}: what the assistant writes cannot be told from the rest, as the chat "
                    f"template {one_line(error)}; {instead}"
                ) from None
            texts.append((start + own, stretches))
        return texts

    def _allowed(self, record: Record, lost: Sequence[tuple[str, Sequence[LeftOut]]], before: int) -> set[str]:
        """What was left out with leave, for people; without leave it stops the run."""
        names = set()
        for side, gone in lost:
            for part, piece in gone:
                earlier = 0 <= part.turn < before
                if part.name == "reasoning" and earlier:  # a template's way to keep prompts short, asked or trained
                    names.add("the reasoning of earlier turns")
                elif part.name not in MAY_DROP:
                    names |= {f"the field {part.name!r} of messages"} if part.name else set()
                elif part.name in self._may_drop:
                    names.add(f"the {MAY_DROP[part.name]}")
                else:
                    turn = f"prompt[{part.turn}]." if earlier else f"{side}[{part.turn - before}]."
                    where = part.where if part.turn < 0 else turn + part.where
                    what = _called(part, before)
                    shown = piece if len(piece) <= _SHOWN else piece[:_SHOWN] + "..."
                    only = (
                        part.name == "reasoning" and not record.rejected and part.turn - before + 1 < len(record.chosen)
                    )
                    other = " to one that writes it, such as chatml_tools" * (part.name in ("tools", "calls", "tool"))
                    raise UserError(
                        f"{record.where}: the chat template leaves out the {what}; set data.chat_template{other}, "
                        f"{'write data.train_on=last, ' * only}or allow it with data.template_may_drop={part.name} "
                        f"({where}: {shown!r})"
                    )
        return names

    # What the template does with the parts.

    def _checked(self, whole: Conversation, rewritten: set[str]) -> tuple[Form, list[LeftOut]]:
        """(the form of a conversation, what its text leaves out).

        What is asked with is the prompt that is trained, so the parts of the prompt are looked for there, and in the
        text of the conversation those of the response. Whose words stand otherwise in the text is added to `rewritten`.
        """
        values, text = whole.values, whole.text
        form = self._form(whole, ())
        opaque = form.frame.opaque if form.frame else ()
        if opaque:
            form = self._form(whole, opaque)
        fits = form.fits(values, text)
        if not fits:
            # Templates look at what system messages say, and many rows say the same.
            said = {n for n, part in enumerate(form.parts) if part.name in ("system", "developer")}
            if said - set(opaque):
                form = self._form(whole, tuple(sorted(said | set(opaque))))
                fits = form.fits(values, text)
        if fits:
            if not (form.missing or form.tried):
                return form, []
            gone = [*(LeftOut(form.parts[n], _shown(values[n])) for n in form.missing), *form.tried]
        else:
            looked_for = {part for part in form.parts if whole.looked_for(part)}
            render = functools.partial(self._render, kwargs=whole.kwargs, asked=whole.asked)
            gone = left_out(whole.messages, whole.tools, render, text, looked_for)
            lost = {one.part for one in gone}
            for part in trials.rewritten(whole.messages, whole.tools, text, looked_for - lost):
                called = _called(part, whole.before) if part.name in MAY_DROP else f"field {part.name!r} of messages"
                rewritten.add(f"the {called}")
        return form, [one for one in gone if whole.looked_for(one.part)]

    def _render(self, *conversation: Any, **how: Any) -> str:
        """What the template makes of a conversation that is not the row's."""
        with time_limit():
            return self._template.render(*conversation, **how)

    def _form(self, whole: Conversation, opaque: tuple[int, ...]) -> Form:
        """The form of a shape, or of its conversations that have these opaque parts; learnt once."""
        told = repr(whole.kwargs) if whole.kwargs else ""
        key: Any = (whole.shape, whole.before, whole.asked, whole.continued, told)
        if opaque:
            key = (key, as_json([whole.values[number] for number in opaque]))
        form = self._forms.get(key)
        if form is None:
            form = self._forms[key] = self._learnt(whole, opaque)._replace(key=key)
        return form

    def _learnt(self, whole: Conversation, opaque: Sequence[int]) -> Form:
        """The form of a shape, or of the conversations of a shape that have these opaque parts."""
        messages, tools, kwargs, before, asked, continued = whole[:6]
        parts_here = list(parts_of(messages, tools))
        parts = tuple(part for part, _ in parts_here)
        render = functools.partial(self._render, kwargs=kwargs)
        values = _marks_for(parts_here, opaque)
        try:
            with_marks, marked_tools = with_values(messages, tools, values)
            text = render(with_marks, marked_tools, asked=asked)
        except Exception:  # it looks at names and identities: marks go into the texts alone
            looked_at = [n for n, (part, value) in enumerate(parts_here) if part.name in ("", "calls", "tools")]
            if not looked_at or opaque:
                return Form(parts, None)
            return Form(parts, Frame(("",), (), {}, (), tuple(looked_at)))
        frame = frame_of(text, values, opaque)

        def left(number: int) -> bool:
            other = [*values]
            other[number] = {"x": "x"} if isinstance(parts_here[number][1], Mapping) else "x"
            try:
                return render(*with_values(messages, tools, other), asked=asked) == text
            except Exception:  # it looked
                return False

        missing = tuple(number for number in frame.missing if left(number))
        tried: list[LeftOut] = []
        if opaque:
            whole = functools.partial(render, asked=asked)
            chosen = {parts[number] for number in opaque}
            tried = left_out(messages, tools, whole, whole(messages, tools), chosen)
        form = Form(parts, frame, missing, tuple(tried))
        if not (asked or continued):
            with contextlib.suppress(Exception):  # it raises for the marks, or for another turn: nothing is known
                form = self._with_ends(form, with_marks, marked_tools, values, kwargs, before, text)
        return form

    def _with_ends(
        self,
        form: Form,
        messages: Messages,
        tools: Tools,
        values: Sequence[Any],
        kwargs: Mapping[str, Any],
        before: int,
        text: str,
    ) -> Form:
        """The form with what the template makes of the beginning and the end of the response.

        Args:
          form: of a conversation that ends with a response.
          messages, tools, values: with marks.
          kwargs, before: as of the conversation.
          text: of the messages with marks.
        """
        frame, count = form.frame, len(values)
        prompt, answer = messages[:before], {"role": "assistant", "content": mark(count)}
        start = self._render(prompt, tools, kwargs, asked=True)

        # The beginning.
        reopened, lead, meeting = 0, 0, ""
        if not text.startswith(start):
            given = self._render([*prompt, answer], tools, kwargs).partition(mark(count))[0]
            earlier = given
            if len(messages) > before + 1:  # the answer is not the last turn
                with contextlib.suppress(Exception):  # not every template takes another turn of the user
                    longer = self._render([*prompt, answer, {"role": "user", "content": "x"}], tools, kwargs)
                    earlier = longer.partition(mark(count))[0]
            common = len(os.path.commonprefix([start, given, earlier, text]))
            if has_marks(start[common:]):
                own = (one for n, one in zip(frame.order, frame.texts, strict=False) if form.parts[n].turn >= before)
                asked_last, given_last = start[start.rfind(CLOSE) + 1 :], next(own, "")
                shared = len(os.path.commonprefix([asked_last, given_last]))
                reopened, lead = -1, (len(given_last) - shared) * bool(shared)
            else:
                reopened = len(start) - common
            shown = start.rfind(CLOSE, 0, common) + 1
            meeting = (
                f"the chat template ends a prompt with {unmarked(start[shown:])!r} where an answer is asked for, "
                f"with {unmarked(given[shown:])!r} where one is given; prompts are those that a model is asked with"
            )

        # The end: what follows it in another turn's place shows what belongs to the response.
        tail = frame.texts[-1] if frame.order and form.parts[frame.order[-1]].turn >= before else ""
        next_turn = ""
        if tail[self._end_of_turn(tail) :].strip():
            with contextlib.suppress(Exception):  # not every template takes another turn of the user
                longer = self._render([*messages, {"role": "user", "content": mark(count)}], tools, kwargs)
                more = frame_of(longer, [*values, mark(count)], frame.opaque)
                after = more.texts[more.order.index(count)]
                shared = os.path.commonprefix([tail, after])
                if (rest := tail[len(shared) :]).strip() and start.endswith(rest):
                    next_turn = tail[self._end_of_turn(shared) :]
        return form._replace(reopened=reopened, lead=lead, meeting=meeting, next_turn=next_turn)

    def _end_of_turn(self, tail: str) -> int:
        """How much of what follows a response belongs to it: its first EOS or special token, and white space."""
        match = re.search(re.escape(self._eos), tail) if self._eos else None
        match = match or self._special.search(tail)
        if match is None:
            return 0
        return len(tail) - len(tail[match.end() :].lstrip())

    def _response(self, whole: Conversation, form: Form, start: str, remarks: Remarks) -> tuple[int, str]:
        """(where in a conversation its response begins, the response up to its own end)."""
        text, at = whole.text, len(start)
        if not text.startswith(start):
            at -= form.reopened
            if form.reopened > 0 and text.startswith(start[:at]):
                opened = start[at:].strip()
                at += len(opened) * text.startswith(opened, at)  # it opens by itself what the prompt has opened
            else:
                at = self._begin(whole, form, start)
            remarks.say(form.meeting or _DIFFERENT)
        own = text[at:]
        if form.next_turn and own.endswith(form.next_turn):
            own = own[: -len(form.next_turn)]
            remarks.say(
                f"the chat template writes {form.next_turn!r} after the last answer though no other is asked for; "
                "responses end before it"
            )
        return at, own

    def _begin(self, whole: Conversation, form: Form, start: str) -> int:
        """Where the response begins in a text that does not begin with its prompt's: at its first part."""
        starts = form.frame.starts(whole.values, whole.text) if form.frame is not None else None
        for number, at in zip(form.frame.order, starts or (), strict=False) if form.frame is not None else ():
            if form.parts[number].turn >= whole.before:
                return at - form.lead
        return len(os.path.commonprefix([start, whole.text]))

    # What is trained.

    def _stretches(
        self, whole: Conversation, form: Form, weights: Sequence[float], at: int, length: int, start: int
    ) -> Stretches | None:
        """What is trained of the text of a prompt and a response; None for all that follows the prompt.

        Args:
          whole, form: the conversation.
          weights: of the messages of the response; () where each counts once.
          at, length: where in the conversation's text the response begins, and how long it is.
          start: how long the prompt's text is.

        Raises:
          Unclear: it cannot be told.
        """
        first, last = whole.before, len(whole.messages) - 1
        if first == last and not weights and not self._mask_format:
            return None
        weights = weights or (1.0,) * (last + 1 - first)
        answered = whole.messages[last]["role"] == "assistant"
        turns = self._turns_of(whole, form) if first < last else [Turn(first, at, at + length)] * answered
        latest = at + length
        if turns and turns[-1].number == last:  # as the response ends, not as the template says
            turns[-1] = turns[-1]._replace(end=latest)
            latest = max(at, min(turn.begin for turn in turns if turn.number == last))
        if self._mask_format:
            turns = self._said(whole, form, turns)
        parts = []
        for number, begin, end in turns:
            begin, end = max(begin, at), min(end, at + length)
            if weights[number - first] and begin < end:
                parts.append(Stretch(begin - at + start, end - at + start, weights[number - first]))
        end_weight = weights[-1] if answered and not self._mask_format else 0.0
        return Stretches(tuple(parts), latest - at + start, end_weight)

    def _turns_of(self, whole: Conversation, form: Form) -> list[Turn]:
        """The turns of the assistant in the text of a conversation whose response has several messages."""
        if not form.fits(whole.values, whole.text):
            *marks, places = self._marked_row(whole)
            turns = self._found(whole, form, *marks)
            return [Turn(number, places(begin), places(end)) for number, begin, end in turns]
        turns = self._turns.get(form.key)
        if turns is None:
            try:
                turns = self._found(whole, form, *self._marked_shape(whole, form))
            except Unclear as error:
                turns = error
            self._turns[form.key] = turns
        if isinstance(turns, Unclear):
            raise turns
        return form.frame.placed(turns, whole.values, whole.text)

    def _found(
        self, whole: Conversation, form: Form, text: str, messages: Messages, owners: Mapping[int, int], render: Render
    ) -> list[Turn]:
        closing = Closing(self._eos, self._special, form.next_turn, self._keep_end)
        generated = self._template.tells_generated(bool(whole.tools))
        return turns_in(text, messages, whole.before, owners, render, closing, generated=generated)

    def _marked_shape(self, whole: Conversation, form: Form) -> tuple[str, Messages, dict[int, int], Render]:
        """(a text with marks in place of the parts, its messages, to which of them a mark belongs, how to render)."""
        opaque = form.frame.opaque
        values = _marks_for(list(parts_of(whole.messages, whole.tools)), opaque)
        messages, tools = with_values(whole.messages, whole.tools, values)

        def render(messages: Messages, **how: bool) -> str:
            text = self._render(messages, tools, whole.kwargs, anew=True, **how)
            return frame_of(text, values, opaque).marked

        return form.frame.marked, messages, {n: part.turn for n, part in enumerate(form.parts)}, render

    def _marked_row(self, whole: Conversation) -> tuple[str, Messages, dict[int, int], Render, Callable[[int], int]]:
        """The same for a row whose text is not what its shape's frame makes of it, with marks around what is said.

        The last is the place in the row's text of one in the text with marks.
        """
        parts = list(parts_of(whole.messages, whole.tools))
        answers = [message["role"] == "assistant" for message in whole.messages]

        def with_marks(number: int, part: Part, value: Any, where: Sequence[int]) -> Any:
            marks_it = part.name and part.turn >= whole.before and answers[part.turn] and isinstance(value, str)
            return _around(value, number, where) if marks_it else value

        owners = {2 * n + after: part.turn for n, (part, _) in enumerate(parts) for after in (0, 1)}
        for where in ((0, 1), (1,), ()):  # a template may look at how a text begins, or ends
            values = [with_marks(number, *part, where) for number, part in enumerate(parts)]
            messages, tools = with_values(whole.messages, whole.tools, values)
            render = functools.partial(_render_with, self._render, tools, whole.kwargs)
            try:
                text = self._render(messages, tools, whole.kwargs)
            except Exception:  # it looked
                continue
            if bare(text) == whole.text and not has_marks(bare(text)):
                return text, messages, owners, render, lambda place, text=text: len(bare(text[:place]))
        raise Unclear("looks at what the messages say")

    def _said(self, whole: Conversation, form: Form, turns: Sequence[Turn]) -> list[Turn]:
        """Of the turns what the messages themselves say, without what the template writes around it."""
        first = whole.before
        if form.fits(whole.values, whole.text):
            said = form.frame.spans(whole.values, whole.text)
            said = [Turn(form.parts[n].turn, *span) for n, span in said]
            hidden = [form.parts[n].turn for n in form.frame.opaque]
        else:
            text, _, owners, _, place = self._marked_row(whole)
            ends = {number: place(at) for number, at in places(text)}
            said = [Turn(owners[n], ends[n], ends[n + 1]) for n in ends if n % 2 == 0 and n + 1 in ends]
            parts = enumerate(part for part, _ in parts_of(whole.messages, whole.tools))
            hidden = [part.turn for n, part in parts if part.name and not {2 * n, 2 * n + 1} <= ends.keys()]
        written = {turn.number for turn in turns}
        if lost := sorted(written.intersection(hidden)):
            raise Unclear(f"writes parts of message {lost[0] - first} of it in a way of its own (data.mask_format)")
        return [
            Turn(number, max(begin, turn.begin), min(end, turn.end))
            for turn in turns
            for number, begin, end in said
            if number == turn.number and begin < turn.end and turn.begin < end
        ]


def _render_with(
    render: Callable[..., str], tools: Tools, kwargs: Mapping[str, Any], messages: Messages, **how: bool
) -> str:
    return render(messages, tools, kwargs, anew=True, **how)


def _marks_for(parts: Sequence[tuple[Part, Any]], opaque: Sequence[int]) -> list[Any]:
    """Marks in place of parts, but for those that are opaque."""
    values = marked(parts)
    for number in opaque:
        values[number] = parts[number][1]
    return values


def _around(value: str, number: int, where: Sequence[int]) -> str:
    """A text with marks at its first and at its last character that is no white space."""
    said = value.strip()
    before, after = value[: len(value) - len(value.lstrip())], value[len(value.rstrip()) :]
    begin, end = (mark(2 * number + n) if n in where else "" for n in (0, 1))
    return before + begin + said + end + after


def weighed(response: Messages) -> tuple[Messages, tuple[float, ...]]:
    """(the messages of a response without their weights, the weights; () where each counts once).

    Example:
      >>> weighed([{"role": "assistant", "content": "Hi", "weight": 0.5}])
      ([{'role': 'assistant', 'content': 'Hi'}], (0.5,))
    """
    weights = tuple(float(message.get("weight", 1.0)) for message in response)
    if all("weight" not in message for message in response):
        return response, ()
    plain = [{name: value for name, value in message.items() if name != "weight"} for message in response]
    return plain, weights if any(weight != 1 for weight in weights) else ()


def joined(prompt: Messages, response: Messages) -> Messages:
    """Prompt and response as one conversation; a prompt that ends with an assistant message is continued."""
    if not prompt or prompt[-1]["role"] != "assistant":
        return prompt + response
    *before, begun = prompt
    return [*before, {**begun, **response[0], "content": begun["content"] + response[0]["content"]}, *response[1:]]


def _called(part: Part, before: int) -> str:
    """What people call a part that data.template_may_drop names."""
    return "response" if part.name == "assistant" and part.turn >= before else MAY_DROP[part.name]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else as_json(value)
