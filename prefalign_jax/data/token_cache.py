"""Tokenized pairs kept on disk under a key of everything that they are made of."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prefalign_jax.data.records import Record
from prefalign_jax.files import whole
from prefalign_jax.types import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

FORMAT = 1  # raise it whenever the tokens of an old file would no longer be right

Tokenized = tuple[list[Pair], dict[str, int]]


def token_key(records: Sequence[Record], tokenizer: Tokenizer, **options: object) -> str:
    """A digest of all that decides the tokens: every record, the tokenizer with its template, and the options.

    Args:
      records: as they would be tokenized.
      tokenizer: a Hugging Face tokenizer.
      **options: of `tokenize_records`.

    Returns:
      64 hexadecimal digits.
    """
    import tokenizers
    import transformers

    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    about = {
        "format": FORMAT,
        # A template may write the date.
        "today": datetime.date.today().isoformat() if "strftime" in str(tokenizer.chat_template) else None,
        "libraries": [transformers.__version__, tokenizers.__version__],
        "tokenizer": backend.to_str() if backend is not None else [type(tokenizer).__name__, tokenizer.get_vocab()],
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "options": options,
    }
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for record in records:
        digest.update(json.dumps(record, ensure_ascii=True, allow_nan=True).encode() + b"\n")
    return digest.hexdigest()


def cached_tokens(path: Path | None, make: Callable[[], Tokenized]) -> Tokenized:
    """Reads pairs from a file named after their key, or makes and writes them.

    The file appears whole or not at all, so one that is there can be believed; one that cannot be read is made anew.

    Args:
      path: .npz file, named by `token_key`; None keeps nothing.
      make: gives the pairs and the numbers dropped by reason.

    Returns:
      What `make` gives.
    """
    if path is not None and path.exists():
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass
    pairs, dropped = make()
    if path is not None:
        with contextlib.suppress(OSError):  # a full disk, a directory that is not ours: nothing is kept
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as part, part.open("wb") as file:
                _write(file, pairs, dropped)
    return pairs, dropped


PARTS = ("prompt", "chosen", "rejected")


def _write(file, pairs: list[Pair], dropped: dict[str, int]) -> None:
    columns = {}
    for part in PARTS:
        rows = [getattr(pair, part) for pair in pairs]
        columns[f"{part}.length"] = np.array([len(row) for row in rows], np.int32)
        columns[part] = np.concatenate([np.zeros(0, np.int32), *rows])
    for name in ("weight", "margin", "label"):
        columns[name] = np.array([getattr(pair, name) for pair in pairs])
    about = {"where": [pair.where for pair in pairs], "dropped": dropped}
    np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **columns)


def _read(path: Path) -> Tokenized:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        about = json.loads(stored["about"].tobytes())
        sides = [np.split(stored[part], np.cumsum(stored[f"{part}.length"])[:-1]) for part in PARTS]
        columns = [stored[name].tolist() for name in ("weight", "margin", "label")]
    if not about["where"]:
        return [], about["dropped"]
    pairs = [
        Pair(*ids, weight=weight, margin=margin, label=label, where=where)
        for *ids, weight, margin, label, where in zip(*sides, *columns, about["where"], strict=True)
    ]
    return pairs, about["dropped"]
