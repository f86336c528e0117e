"""Records -> token ids, with the roles known: where the prompt ends, what is trained, where a response ends.

    text   ids(prompt + chosen) + EOS
    chat   ids(template(prompt + chosen)), cut after the token that ends the turn, + EOS if that token is another

A tokenizer may merge characters across the end of the prompt: ids(prompt) need not begin ids(prompt + chosen). The
prompt is therefore the common prefix of both and of ids(prompt + rejected). Decoding prompt + response gives back the
text, and both responses are predicted from the same last prompt token. The texts of a conversation always begin with
the text of its prompt (data/rendering.py).
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
from prefalign_jax.data.records import Prompt, Record, Text, told_by
from prefalign_jax.data.remarks import Remarks
from prefalign_jax.data.rendering import Renderer
from prefalign_jax.data.spelled import MARKS, SpecialTokens, Written, encoder, strings_of
from prefalign_jax.data.template import AS_IT_IS, ChatOptions
from prefalign_jax.limits import time_limit
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
      path: a directory with tokenizer files (the network is not asked then), or a hub name.
      chat_template: a name in CHAT_TEMPLATES, a .jinja file, or the template itself; None keeps the tokenizer's own.

    Returns:
      The tokenizer.

    Raises:
      UserError: the tokenizer or the template cannot be loaded, or the tokenizer has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    path = str(path)
    local = Path(path).expanduser()
    if not local.exists() and path.startswith((".", "/", "~")):
        raise UserError(f"{path}: no such tokenizer directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(local) if local.exists() else path, trust_remote_code=False, local_files_only=local.exists()
        )
    except Exception as error:  # the library and the network raise whatever they like
        raise UserError(f"{path}: cannot load a tokenizer: {one_line(error)}") from None
    if chat_template is not None:
        template = _template(chat_template)
        tokenizer.add_tokens(list(template.tokens), special_tokens=True)  # those it has keep their ids
        tokenizer.eos_token = template.eos or tokenizer.eos_token
        tokenizer.chat_template = template.jinja
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no end-of-sequence token, so no response would ever end")
    return tokenizer


def tokenize_records(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    too_long: str = "drop",
    keep_end: bool = False,
    chat: ChatOptions = AS_IT_IS,
    remarks: Remarks | None = None,
) -> tuple[list[Pair], dict[str, int]]:
    """Tokenizes records into pairs, see `iter_pairs`.

    Returns:
      The pairs in the order of the records, and the number of records dropped for each reason.
    """
    options = dict(max_length=max_length, too_long=too_long, keep_end=keep_end, chat=chat, remarks=remarks)
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
      chat: what the chat template is told and may leave out.
      remarks: gets what is noticed of records that are not dropped, as the iterator goes on.

    Returns:
      An iterator over (record, its pair) in the order of the records; where no pair is made of one, the reason in its
      place: 'too long', 'identical responses', 'identical after truncation', 'no prompt', or 'end token inside the
      response'.

    Raises:
      UserError: an option is invalid, or the chat template is missing, does not render a record, or leaves out a part
        of it without leave.
    """
    if too_long not in TOO_LONG:
        raise UserError(f"too_long: expected one of {', '.join(TOO_LONG)}, found {too_long!r}")
    if max_length < 2:
        raise UserError(f"max_length: expected at least 2 tokens, found {max_length}")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, so no response would ever end")
    prefix = _prefix(tokenizer)
    eos, bos, special = tokenizer.eos_token_id, tokenizer.bos_token_id, _special_ids(tokenizer)
    texts_of = _texts_of(tokenizer, chat, Remarks() if remarks is None else remarks)
    encode = encoder(tokenizer, SpecialTokens(tokenizer))

    def finished(batch: list[Record], texts_ids: Iterable[list[int]]) -> Iterator[tuple[Record, Pair | str]]:
        encoded = iter(texts_ids)
        for record in batch:
            ids = [next(encoded) for _ in range(3 if record.rejected else 2)]
            chat = not isinstance(record.prompt, str)
            if not chat and ids[1][: len(prefix)] != prefix:
                ids = [prefix + x for x in ids]
            n = len(os.path.commonprefix(ids))
            responses = [_ended(x[n:], tokenizer, eos, special if chat else {eos}, keep_end) for x in ids[1:]]
            if any(response.count(eos) > 1 for response in responses):
                yield record, "end token inside the response"  # nothing may be trained after it
                continue
            pair = _fit(ids[1][:n], responses, max_length, too_long, bos)
            if not isinstance(pair, str):
                about = dict(weight=record.weight, margin=record.margin, label=record.label, where=record.where)
                pair = Pair(*(np.asarray(x, np.int32) for x in pair), **about)
            yield record, pair

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
                job = pool.submit(encode, texts)
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
        (ids,) = encode(texts)
        if isinstance(one.prompt, str) and ids[: len(prefix)] != prefix:
            ids = prefix + ids
        if not ids:
            raise UserError(f"prompt {number} has no token; a response is predicted from its last")
        out.append(np.asarray(ids, np.int32))
    return out


def _texts_of(
    tokenizer: Tokenizer, chat: ChatOptions, remarks: Remarks, responses: bool = True
) -> Callable[[Record], list[str]]:
    """Record -> [prompt, prompt + chosen, prompt + rejected], the last only where there is a rejected response."""
    render, alphabet, special = Renderer(tokenizer, chat), Alphabet(tokenizer), SpecialTokens(tokenizer)

    def texts_of(record: Record) -> list[str]:
        spelled = special.spelled(record)
        split = chat.split_special and bool(spelled)
        if isinstance(record.prompt, str):
            sides = [record.chosen, record.rejected][: (2 if record.rejected else 1) if responses else 0]
            texts = [record.prompt, *(record.prompt + side for side in sides)]
            texts = list(map(Written, texts)) if split else texts
        elif not tokenizer.chat_template:
            raise UserError(
                f"{record.where}: the tokenizer has no chat template for messages; "
                f"set data.chat_template to {', '.join(CHAT_TEMPLATES)} or a .jinja file"
            )
        else:
            texts = render.texts(special.broken(record) if split else record, remarks, responses=responses)
            texts = list(map(special.written, texts)) if split else texts
        remarks.spelled(spelled)
        if alphabet.whole:
            return texts
        prompt, answers = (alphabet.lost(*strings_of(value)) for value in ([record.prompt, record.tools], record[1:3]))
        remarks.lost(prompt, answers)
        if not isinstance(record.prompt, str) and (template := alphabet.lost(*texts) - prompt - answers - MARKS):
            remarks.say(f"the tokenizer loses characters of the chat template: {''.join(sorted(template))!r}")
        return texts

    return texts_of


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """BOS, where this tokenizer writes one."""
    plain, wrapped = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return wrapped[: wrapped.index(plain[0])]


def _ended(response: list[int], tokenizer: Tokenizer, eos: int, ends: set[int], keep_end: bool) -> list[int]:
    """The response with one EOS at its end; if a token of `ends` is last but for whitespace, that whitespace is cut."""
    last = next((i for i in reversed(range(len(response))) if response[i] in ends), None)
    if last is None or tokenizer.decode(response[last + 1 :]).strip():
        return [*response, eos]
    body, end, tail = response[:last], response[last], response[last + 1 :]
    while end == eos and body[-1:] == [eos]:
        body = body[:-1]
    if keep_end:
        return [*body, end, *tail]
    return [*body, end] if end == eos else [*body, end, eos]


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    # all_special_ids lacks tokens such as Llama 3's <|eot_id|>, which the tokenizer's configuration does not name.
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {*tokenizer.all_special_ids, *added} - {tokenizer.unk_token_id}


def _fit(
    prompt: list[int], responses: list[list[int]], max_length: int, too_long: str, bos: int | None
) -> tuple[list[int], list[int], list[int]] | str:
    """(prompt, chosen, rejected) within max_length, or the reason why there is no such pair."""
    supervised = len(responses) == 1
    if not supervised and responses[0] == responses[1]:
        return "identical responses"
    if not prompt:
        first = {response[0] for response in responses}
        prompt, responses = [responses[0][0]], [response[1:] for response in responses]
        if len(first) > 1 or not all(responses):
            return "no prompt"
    longest = max(map(len, responses))
    if len(prompt) + longest > max_length:
        if too_long == "truncate_prompt":
            head = prompt[:1] if prompt[0] == bos else []
            room = max_length - longest - len(head)
            if room < 1:
                return "too long"
            prompt = head + prompt[-room:]
        elif too_long == "truncate_response" and len(prompt) < max_length:
            responses = [response[: max_length - len(prompt)] for response in responses]
            if not supervised and responses[0] == responses[1]:
                return "identical after truncation"
        else:
            return "too long"
    return prompt, responses[0], [] if supervised else responses[1]


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
