"""Where a model's texts end: every place that says so, read in one way for generation, judges, samples and export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefalign_jax.limits import time_limit
from prefalign_jax.models.hf_io import read_object
from prefalign_jax.types import UserError

_PROBE = "prefalign"


def stop_ids(directory: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a response.

    They are the union of eos_token_id in generation_config.json and in config.json, the tokenizer's end of sequence,
    and the token that ends a turn under the chat template.

    Args:
      directory: the model's; either file may be missing.
      tokenizer: a Hugging Face tokenizer, with the chat template that is in use.

    Returns:
      Token ids, each once, those of the files first.

    Raises:
      UserError: a file is malformed.
    """
    files = (Path(directory) / name for name in ("generation_config.json", "config.json"))
    stored = [i for file in files for i in _eos(file, read_object(file, missing={}))]
    return tuple(dict.fromkeys([*stored, *written_ends(tokenizer)]))


def stored_ends(directory: str | Path) -> tuple[int, ...]:
    """The tokens at which transformers ends a text: generation_config.json's, or config.json's where that has none.

    Args:
      directory: the model's; either file may be missing.

    Raises:
      UserError: a file is malformed.
    """
    generation = Path(directory) / "generation_config.json"
    file = generation if generation.is_file() else Path(directory) / "config.json"
    return tuple(_eos(file, read_object(file, missing={})))


def written_ends(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that training writes at the end of a response: end of sequence, end of turn."""
    return tuple(dict.fromkeys(i for i in (tokenizer.eos_token_id, end_of_turn(tokenizer)) if i is not None))


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template writes right after an assistant's message.

    Args:
      tokenizer: a Hugging Face tokenizer.

    Returns:
      Its id; None if there is no template, it fails, or it ends a turn with ordinary text.
    """
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PROBE}]
    try:
        with time_limit():
            tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(_PROBE)[2].lstrip()
    except Exception:  # a template raises whatever it likes; one that was never used must not cost a finished run
        return None
    return max(
        ((len(text), i) for text, i in special_tokens(tokenizer).items() if tail.startswith(text)), default=(0, None)
    )[1]


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of every special token; all_special_ids lacks those without a role, such as Llama 3's <|eot_id|>."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def split_stops(stops: Sequence[str], tokenizer: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Tells stop texts that are special tokens from ordinary ones: decoded text never shows a special token.

    Args:
      stops: texts that end a response.
      tokenizer: a Hugging Face tokenizer.

    Returns:
      (ids of those that are special tokens, the others).

    Raises:
      UserError: a text holds a special token and more, so that neither way finds it.
    """
    special = special_tokens(tokenizer)
    others = tuple(text for text in stops if text not in special)
    for text in others:
        for token in special:
            if token in text:
                raise UserError(f"the stop text {text!r} holds the special token {token!r} and more; write {token!r}")
    return tuple(special[text] for text in stops if text in special), others


def generation_config(tokenizer: Any, base: str | Path | None = None) -> dict[str, Any]:
    """The fields of generation_config.json: the base's, with every token at which the trained model ends a response.

    Args:
      tokenizer: a Hugging Face tokenizer, with the chat template that was trained.
      base: directory of the model that training started from; its sampling settings and special ids are kept.

    Returns:
      The fields; ids that nobody names are left out.

    Raises:
      UserError: a file of the base is malformed.
    """
    fields: Mapping[str, Any] = {} if base is None else read_object(Path(base) / "generation_config.json", missing={})
    hf = {} if base is None else read_object(Path(base) / "config.json", missing={})
    ends = tuple(dict.fromkeys([*(() if base is None else stored_ends(base)), *written_ends(tokenizer)]))
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": None if not ends else ends[0] if len(ends) == 1 else list(ends),
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name in ("bos_token_id", "pad_token_id"):
        if fields or name in hf:  # a base that says nothing of one means none
            ids[name] = fields.get(name, hf.get(name))
    out = {**fields, **ids}
    return {name: value for name, value in out.items() if value is not None or name not in ids}


def _eos(file: Path, fields: Mapping[str, Any]) -> list[int]:
    value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise UserError(f"{file}: eos_token_id: expected a token id or a list of them, not {value!r}")
    return ids
