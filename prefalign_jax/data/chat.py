"""Records -> token ids, with the roles known: where the prompt ends, what is trained, where a response ends.

    text   ids(prompt + chosen) + EOS
    chat   ids(template(prompt + chosen)), cut after the token that ends the turn, + EOS if that token is another

A tokenizer may merge characters across the end of the prompt: ids(prompt) need not begin ids(prompt + chosen). The
prompt is therefore the common prefix of both and of ids(prompt + rejected). Decoding prompt + response gives back the
text, and both responses are predicted from the same last prompt token. The texts of a conversation always begin with
the text of its prompt (data/rendering.py).

Of a response of several messages what the assistant writes is trained, its ends of turn included; what tools and users
say is read (data/turns.py). A token is trained if one of its characters is, as in transformers' masks.
"""

from __future__ import annotations

import collections
import itertools
import os.path
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from prefalign_jax.data.alphabet import Alphabet
from prefalign_jax.data.places import Places
from prefalign_jax.data.records import Prompt, Record, Text, told_by
from prefalign_jax.data.remarks import Remarks
from prefalign_jax.data.rendering import Renderer
from prefalign_jax.data.spelled import MARKS, SpecialTokens, Written, encoder, strings_of
from prefalign_jax.data.template import AS_IT_IS, ChatOptions
from prefalign_jax.data.turns import Stretch, Stretches
from prefalign_jax.files import read_json
from prefalign_jax.gguf.file import gguf_file, read_gguf
from prefalign_jax.gguf.tokenizer import tokenizer_of
from prefalign_jax.limits import time_limit
from prefalign_jax.torch_free import tokenizer_library
from prefalign_jax.types import Pair, Place, UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

TOO_LONG = ("drop", "truncate_prompt", "truncate_response")

_BATCH = 1024  # records per call of the tokenizer


class ChatTemplate(NamedTuple):
    """A template, the special tokens it writes, and the token that is EOS under it, if not the tokenizer's own."""

    jinja: str
    tokens: tuple[str, ...] = ()
    eos: str | None = None


CHAT_TEMPLATES = {
    "chatml": ChatTemplate(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        tokens=("<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
    ),
    # ChatML with tools, as Qwen 2.5 and Hermes write them.
    "chatml_tools": ChatTemplate(
        "{% if tools %}{{ '<|im_start|>system\n' }}"
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
        "{{ '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}"
        "{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}"
        "{{ '\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n\' }}{% endif %}'
        "{% for m in messages %}{% if m['role'] == 'tool' %}"
        "{% if loop.first or loop.previtem['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
        "{{ '\n<tool_response>\n' + m['content'] + '\n</tool_response>' }}"
        "{% if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
        "{% elif not (tools and loop.first and m['role'] == 'system') %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['content'] %}{{ m['content'] + ('\n' if m['tool_calls'] else '') }}{% endif %}"
        "{% for call in m['tool_calls'] or [] %}"
        "{{ '<tool_call>\n{\"name\": ' + call['function']['name'] | tojson }}"
        "{{ ', \"arguments\": ' + call['function']['arguments'] | tojson }}"
        "{{ '}\n</tool_call>' + ('' if loop.last else '\n') }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        tokens=("<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
    ),
    "llama3": ChatTemplate(
        "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
        " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        eos="<|eot_id|>",
    ),
    "zephyr": ChatTemplate(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ),
}


def load_tokenizer(path: str | Path, chat_template: str | None = None) -> Tokenizer:
    """Loads a Hugging Face tokenizer, and gives it a chat template if one is named.

    Special tokens of the template that the tokenizer lacks are added, so len(tokenizer) may exceed the rows of the
    model's embedding: the caller resizes it.

    Args:
      path: a directory with tokenizer files (the network is not asked then), a GGUF file, or a hub name.
      chat_template: a name in CHAT_TEMPLATES, a .jinja file, or the template itself; None keeps the tokenizer's own.

    Returns:
      The tokenizer.

    Raises:
      UserError: the tokenizer or the template cannot be loaded, or the tokenizer has no end-of-sequence token.
    """
    path, file = str(path), gguf_file(path)
    tokenizer = tokenizer_of(read_gguf(file)) if file else _of_directory(path)
    if chat_template is not None:
        template = _template(chat_template)
        tokenizer.add_tokens(list(template.tokens), special_tokens=True)  # those it has keep their ids
        tokenizer.eos_token = template.eos or tokenizer.eos_token
        tokenizer.chat_template = template.jinja
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no end-of-sequence token, so no response would ever end")
    return tokenizer


def check_tokens(path: str | Path, directory: str | Path, tokenizer: Tokenizer, whose: str) -> None:
    """Refuses a model some of whose tokens have other numbers in another's tokenizer.

    Args:
      path: what the user calls the model.
      directory: where it lies.
      tokenizer: the other's.
      whose: what the message calls that one.
    """
    known = tokenizer.get_vocab()
    for token, number in load_tokenizer(directory).get_vocab().items():
        if known.get(token) != number:
            raise UserError(f"{path}: token {number} is {token!r}, and another in {whose}")


_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def _of_directory(path: str) -> Tokenizer:
    """The tokenizer of a Hugging Face directory or hub name."""
    auto = tokenizer_library().AutoTokenizer
    local = Path(path).expanduser()
    if not local.exists() and path.startswith((".", "/", "~")):
        raise UserError(f"{path}: no such tokenizer directory")
    try:
        return auto.from_pretrained(
            str(local) if local.exists() else path, trust_remote_code=False, local_files_only=local.exists()
        )
    except Exception as error:  # the library and the network raise whatever they like
        for name in _FILES:  # it does not say which of them it cannot read
            read_json(local / name, "an object", missing={})
        raise UserError(f"{path}: cannot load a tokenizer: {one_line(error)}") from None


def tokenize_records(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    too_long: str = "drop",
    keep_end: bool = False,
    mask_format: bool = False,
    chat: ChatOptions = AS_IT_IS,
    remarks: Remarks | None = None,
) -> tuple[list[Pair], dict[str, int]]:
    """Tokenizes records into pairs, see `iter_pairs`.

    Returns:
      The pairs in the order of the records, and the number of records dropped for each reason.
    """
    options = dict(max_length=max_length, too_long=too_long, keep_end=keep_end, mask_format=mask_format)
    options |= dict(chat=chat, remarks=remarks)
    outcomes = [pair for _, pair in iter_pairs(records, tokenizer, **options)]
    reasons = [pair for pair in outcomes if isinstance(pair, str)]
    return [pair for pair in outcomes if not isinstance(pair, str)], dict(collections.Counter(reasons))


def iter_pairs(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    too_long: str = "drop",
    keep_end: bool = False,
    mask_format: bool = False,
    chat: ChatOptions = AS_IT_IS,
    remarks: Remarks | None = None,
) -> Iterator[tuple[Record, Pair | str]]:
    """Tokenizes records into pairs whose responses end with one end-of-sequence token, which is trained.

    A prompt of no token at all cannot predict a response, so the first token of the responses joins the prompt if they
    share it. A prompt that ends with an assistant message is continued, not answered. A prompt string repeated inside
    the responses stays there.

    Args:
      records: as read_records gives them; strings are plain text, messages go through the tokenizer's chat template.
      tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
      max_length: most tokens of prompt + longer response.
      too_long: what becomes of a longer pair: 'drop'; 'truncate_prompt' on the left, after its BOS;
        'truncate_response' on the right, without EOS.
      keep_end: train also on what the template writes after its end of turn (often a newline), as TRL's DPO does.
      mask_format: train on what the messages themselves say, not on what the template writes around it, such as ends
        of turns; of plain text not on its end.
      chat: what the chat template is told and may leave out.
      remarks: gets what is noticed of records that are not dropped, as the iterator goes on.

    Returns:
      An iterator over (record, its pair) in the order of the records; where no pair is made of one, the reason in its
      place: 'too long', 'identical responses', 'identical after truncation', 'no prompt', 'no trained token', or 'end
      token inside the response'. A group of more than two responses loses those alone to which a reason applies, as
      long as two remain; `remarks` counts them.

    Raises:
      UserError: an option is invalid, or the chat template is missing, does not render a record, or leaves out a part
        of it without leave, or it cannot be told what the assistant writes.
    """
    if too_long not in TOO_LONG:
        raise UserError(f"too_long: expected one of {', '.join(TOO_LONG)}, found {too_long!r}")
    if max_length < 2:
        raise UserError(f"max_length: expected at least 2 tokens, found {max_length}")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, so no response would ever end")
    prefix = _prefix(tokenizer)
    eos, bos, special = tokenizer.eos_token_id, tokenizer.bos_token_id, _special_ids(tokenizer)
    remarks = Remarks() if remarks is None else remarks
    texts_of = _texts_of(tokenizer, chat, remarks, keep_end=keep_end, mask_format=mask_format)
    encode = encoder(tokenizer, SpecialTokens(tokenizer))

    def tokens_of(texts: Sequence[tuple[str, Stretches | None]]) -> list[_Tokens]:
        plain = iter(encode([text for text, stretches in texts if stretches is None], False))
        placed = iter(encode([text for text, stretches in texts if stretches is not None], True))
        return [
            _Tokens(next(plain)[0]) if stretches is None else _weighted(*next(placed), text, stretches, eos)
            for text, stretches in texts
        ]

    def finished(batch: list[Record], tokens: Iterable[_Tokens]) -> Iterator[tuple[Record, Pair | str]]:
        encoded = iter(tokens)
        for record in batch:
            whole = [next(encoded) for _ in range(1 + len(record.responses))]
            chat = not isinstance(record.prompt, str)
            if not chat and whole[1].ids[: len(prefix)] != prefix:
                whole = [one.after(prefix) for one in whole]
            n = len(os.path.commonprefix([one.ids for one in whole]))
            ends = special if chat else {eos}
            responses = [_ended(one.rest(n), tokenizer, eos, ends, keep_end) for one in whole[1:]]
            made = _fit(whole[1].ids[:n], responses, max_length, too_long, bos, eos)
            if isinstance(made, str):
                yield record, made
                continue
            for reason in made.dropped:
                remarks.responses[reason] += 1
            chosen, *others = (np.asarray(one.ids, np.int32) for one in made.responses)
            weights = [one.weights for one in made.responses] + [None] * (not others)  # of an empty rejected one
            yield (
                record,
                Pair(
                    np.asarray(made.prompt, np.int32),
                    chosen,
                    others[0] if others else np.zeros(0, np.int32),
                    weight=record.weight,
                    margin=record.margin,
                    label=record.label,
                    where=record.where,
                    others=tuple(others[1:]),
                    scores=tuple(record.scores[number] for number in made.numbers) if record.scores else (),
                    token_weights=() if all(one is None for one in weights) else tuple(weights),
                ),
            )

    def pairs() -> Iterator[tuple[Record, Pair | str]]:
        # While the tokenizer's threads are at one batch the next is read and the one before is finished.
        with ThreadPoolExecutor(1) as pool:
            waiting = None
            for batch in _batched(records):
                texts = []
                with time_limit() as start_anew:  # a downloaded template may have no end
                    for record in batch:
                        start_anew()
                        texts += texts_of(record)
                job = pool.submit(tokens_of, texts)
                if waiting:
                    yield from finished(waiting[0], waiting[1].result())
                waiting = batch, job
            if waiting:
                yield from finished(waiting[0], waiting[1].result())

    return pairs()


def _batched(records: Iterable[Record]) -> Iterator[list[Record]]:
    records = iter(records)
    while batch := list(itertools.islice(records, _BATCH)):
        yield batch


def tokenize_prompts(
    prompts: Sequence[Text | Prompt],
    tokenizer: Tokenizer,
    chat: ChatOptions = AS_IT_IS,
    remarks: Remarks | None = None,
) -> list[np.ndarray]:
    """Prompts alone, to be continued: as `tokenize_records` has them but for a token that would span their end.

    Args:
      prompts: strings are plain text; messages go through the chat template, up to where the answer begins. A `Prompt`
        has its tools and what it tells the template.
      tokenizer: a Hugging Face tokenizer.
      chat, remarks: as in `iter_pairs`.

    Returns:
      Token ids [N] int32 of each, none empty.

    Raises:
      UserError: a prompt has no token, or the chat template is missing, does not render it, or leaves out a part of it
        without leave.
    """
    prefix, out = _prefix(tokenizer), []
    texts_of = _texts_of(tokenizer, chat, Remarks() if remarks is None else remarks, responses=False)
    encode = encoder(tokenizer, SpecialTokens(tokenizer))
    for number, prompt in enumerate(prompts, 1):
        one = prompt if isinstance(prompt, Prompt) else Prompt(prompt, "", Place(f"prompt {number}"))
        with time_limit():
            texts = texts_of(Record(one.prompt, "", "", where=one.where, **told_by(one)))
        ((ids, _),) = encode([text for text, _ in texts], False)
        if isinstance(one.prompt, str) and ids[: len(prefix)] != prefix:
            ids = prefix + ids
        if not ids:
            raise UserError(f"prompt {number} has no token; a response is predicted from its last")
        out.append(np.asarray(ids, np.int32))
    return out


def _texts_of(
    tokenizer: Tokenizer,
    chat: ChatOptions,
    remarks: Remarks,
    responses: bool = True,
    *,
    keep_end: bool = False,
    mask_format: bool = False,
) -> Callable[[Record], list[tuple[str, Stretches | None]]]:
    """Record -> the texts of the prompt and of prompt + response for each response, with what is trained of them."""
    render = Renderer(tokenizer, chat, keep_end=keep_end, mask_format=mask_format)
    alphabet, special = Alphabet(tokenizer), SpecialTokens(tokenizer)

    def plain(record: Record) -> Iterator[tuple[str, Stretches | None]]:
        start = len(record.prompt)
        yield record.prompt, None
        for side in record.responses if responses else ():
            text = record.prompt + side
            yield text, Stretches((Stretch(start, len(text)),), start, end=0.0) if mask_format else None

    def texts_of(record: Record) -> list[tuple[str, Stretches | None]]:
        spelled = special.spelled(record)
        split = chat.split_special and bool(spelled)
        if isinstance(record.prompt, str):
            texts = list(plain(record))
            texts = [(Written(text), stretches) for text, stretches in texts] if split else texts
        elif not tokenizer.chat_template:
            raise UserError(
                f"{record.where}: the tokenizer has no chat template for messages; "
                f"set data.chat_template to {', '.join(CHAT_TEMPLATES)} or a .jinja file"
            )
        else:
            texts = render.rendered(special.broken(record) if split else record, remarks, responses=responses)
            texts = [_written(special, *one) for one in texts] if split else texts
        remarks.spelled(spelled)
        if alphabet.whole:
            return texts
        asked, given = [record.prompt, record.tools], record.responses
        prompt, answers = (alphabet.lost(*strings_of(value)) for value in (asked, given))
        remarks.lost(prompt, answers)
        if not isinstance(record.prompt, str):
            of_template = alphabet.lost(*(text for text, _ in texts)) - prompt - answers - MARKS
            if of_template:
                remarks.say(f"the tokenizer loses characters of the chat template: {''.join(sorted(of_template))!r}")
        return texts

    return texts_of


def _written(special: SpecialTokens, text: str, stretches: Stretches | None) -> tuple[str, Stretches | None]:
    """`special.written` of a text and of what is trained of it."""
    if stretches is None:
        return special.written(text), None
    bounds = sorted({0, len(text), stretches.last, *(at for part in stretches.parts for at in part[:2])})
    pieces = [special.written(text[begin:end]) for begin, end in itertools.pairwise(bounds)]
    moved = dict(zip(bounds, itertools.accumulate(map(len, pieces), initial=0), strict=True))
    parts = tuple(Stretch(moved[begin], moved[end], weight) for begin, end, weight in stretches.parts)
    return Written("".join(pieces)), Stretches(parts, moved[stretches.last], stretches.end)


class _Tokens(NamedTuple):
    """A text, or a response, in tokens.

    Attributes:
      ids: the tokens.
      weights: by how much each counts; None where each counts once.
      last: the number of the token with which its last message begins.
      end: by how much an end-of-sequence token counts that is added.
      broken: there is an end-of-sequence token inside what is trained before the last message.
    """

    ids: list[int]
    weights: np.ndarray | None = None
    last: int = 0
    end: float = 1.0
    broken: bool = False

    def after(self, prefix: list[int]) -> _Tokens:
        """With some tokens before it."""
        weights = None if self.weights is None else np.concatenate([np.zeros(len(prefix), np.float32), self.weights])
        return self._replace(ids=prefix + self.ids, weights=weights, last=self.last + len(prefix))

    def rest(self, start: int) -> _Tokens:
        """From a token on."""
        weights = None if self.weights is None else self.weights[start:]
        return self._replace(ids=self.ids[start:], weights=weights, last=max(self.last - start, 0))

    def until(self, stop: int) -> _Tokens:
        """Up to a token."""
        return self._replace(ids=self.ids[:stop], weights=None if self.weights is None else self.weights[:stop])

    def plain(self) -> _Tokens:
        """Without weights where each counts once."""
        return self._replace(weights=None) if self.weights is not None and np.all(self.weights == 1) else self


def _weighted(ids: list[int], places: Places, text: str, stretches: Stretches, eos: int) -> _Tokens:
    """The tokens of a text with stretches that are trained: each token that has a character in one of them."""
    weights, broken = np.zeros(len(ids), np.float32), False
    for begin, end, weight in stretches.parts:
        here = _tokens_in(places, len(ids), begin, end)
        weights[here] = np.maximum(weights[here], weight)
        if end <= stretches.last and eos in ids[here]:
            _, stop = places.token_to_chars(ids.index(eos, here.start))
            broken |= bool(text[stop:end].strip())
    last = _tokens_in(places, len(ids), stretches.last, len(text)).start
    return _Tokens(ids, weights, last, stretches.end, broken)


def _tokens_in(places: Places, count: int, begin: int, end: int) -> slice:
    """Those of a text's tokens that have a character in a stretch of it."""
    first = next((n for at in range(begin, end) if (n := places.char_to_token(at)) is not None), count)
    last = next((n for at in range(end - 1, begin - 1, -1) if (n := places.char_to_token(at)) is not None), count - 1)
    while last + 1 < count and (chars := places.token_to_chars(last + 1)) and chars[0] < end:
        last += 1  # a character of several tokens
    return slice(first, max(first, last + 1))


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """BOS, where this tokenizer writes one."""
    plain, wrapped = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return wrapped[: wrapped.index(plain[0])]


def _ended(response: _Tokens, tokenizer: Tokenizer, eos: int, ends: set[int], keep_end: bool) -> _Tokens:
    """The response with one EOS at its end; if a token of `ends` is last but for whitespace, that whitespace is cut."""
    ids = response.ids
    last = next((i for i in reversed(range(len(ids))) if ids[i] in ends), None)
    if last is None or tokenizer.decode(ids[last + 1 :]).strip():
        body = last = stop = len(ids)
        added = [eos]
    else:
        body, stop = last, len(ids) if keep_end else last + 1
        while ids[last] == eos and ids[body - 1 : body] == [eos]:
            body -= 1
        added = [] if keep_end or ids[last] == eos else [eos]
    weights = response.weights
    if weights is not None:
        weights = np.concatenate([weights[:body], weights[last:stop], np.float32([response.end] * len(added))])
    return response._replace(ids=[*ids[:body], *ids[last:stop], *added], weights=weights)


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    # all_special_ids lacks tokens such as Llama 3's <|eot_id|>, which the tokenizer's configuration does not name.
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {*tokenizer.all_special_ids, *added} - {tokenizer.unk_token_id}


class _Fitted(NamedTuple):
    """A prompt and its responses within max_length: their numbers, and of a group the reasons of those dropped."""

    prompt: list[int]
    responses: list[_Tokens]
    numbers: list[int]
    dropped: list[str]


def _fit(
    prompt: list[int], given: list[_Tokens], max_length: int, too_long: str, bos: int | None, eos: int
) -> _Fitted | str:
    """The responses that can be trained, or the reason why there is no such pair, or too few for a group."""
    left, dropped = dict(enumerate(given)), []
    least = min(len(given), 2)

    def drop(number: int, reason: str) -> None:
        del left[number]
        dropped.append(reason)

    def drop_repeated(reason: str) -> None:
        for number in sorted(left, reverse=True):
            if any(left[earlier].ids == left[number].ids for earlier in left if earlier < number):
                drop(number, reason)

    for number, one in enumerate(given):
        if one.broken or one.ids[one.last :].count(eos) > 1:
            drop(number, "end token inside the response")  # nothing may be trained after it
    drop_repeated("identical responses")
    if len(left) < least:
        return dropped[0]
    if not prompt:
        first = {one.ids[0] for one in left.values()}
        prompt, left = next(iter(left.values())).ids[:1], {number: one.rest(1) for number, one in left.items()}
        if len(first) > 1 or not all(one.ids for one in left.values()):
            return "no prompt"
    longest = max(len(one.ids) for one in left.values())
    if len(prompt) + longest > max_length:
        if too_long == "truncate_prompt":
            head = prompt[:1] if prompt[0] == bos else []
            room = max_length - longest - len(head)
            if room < 1:
                return "too long"
            prompt = head + prompt[-room:]
        elif too_long == "truncate_response" and len(prompt) < max_length:
            left = {number: one.until(max_length - len(prompt)) for number, one in left.items()}
            drop_repeated("identical after truncation")
        else:
            for number in [number for number, one in left.items() if len(prompt) + len(one.ids) > max_length]:
                drop(number, "too long")
    for number in [number for number, one in left.items() if one.weights is not None and not one.weights.any()]:
        drop(number, "no trained token")
    if len(left) < least or (dropped and len(given) <= 2):
        return dropped[-1]
    return _Fitted(prompt, [one.plain() for one in left.values()], list(left), dropped)


def _template(name: str) -> ChatTemplate:
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    if "{" in name:
        return ChatTemplate(name)
    try:
        return ChatTemplate(Path(name).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        expected = f"{', '.join(CHAT_TEMPLATES)} or a .jinja file"
        raise UserError(f"chat_template: expected {expected}, found {name!r}: {one_line(error)}") from None
