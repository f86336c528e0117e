"""Tokenized pairs kept on disk under a key of everything that they are made of, and mapped from there.

A file is written a chunk at a time and put in its place when it is whole, with its checksum beside it: one that agrees
with that can be believed, and data larger than memory can be tokenized. It is an Arrow file, which any reader of Arrow
opens: a row a pair, and in the last batch's metadata what its maker says about them. Two runs that make the same file
each write their own; the last stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefalign_jax.data.pairs import Pairs, concatenate
from prefalign_jax.files import intact, remove_parts, sealed
from prefalign_jax.processes import note
from prefalign_jax.types import WriteError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

FORMAT = 5  # raise it whenever an old file would no longer be right

Made = tuple[Iterable[Pairs], Callable[[], Mapping[str, Any]]]


def token_key(tokenizer: Tokenizer, **what: object) -> str:
    """A digest of all that decides the tokens: the tokenizer with its template, this package's data code, and more.

    Args:
      tokenizer: a Hugging Face tokenizer.
      **what: the content of the data, and every option that it is read, chosen and tokenized by; among them the day,
        if the template prints it.

    Returns:
      64 hexadecimal digits.
    """
    import tokenizers
    import transformers

    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    about = {
        "format": FORMAT,
        "libraries": [transformers.__version__, tokenizers.__version__],
        "tokenizer": backend.to_str() if backend is not None else [type(tokenizer).__name__, tokenizer.get_vocab()],
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "code": _code(),
        "what": what,
    }
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _code() -> str:
    """A digest of the modules that turn rows into tokens, so that no file outlives a change of them."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def cached_tokens(path: Path | None, make: Callable[[], Made]) -> tuple[Pairs, dict[str, Any]]:
    """Maps pairs from a file named after their key, or makes and writes them.

    One that is not to the bit what was written is made anew. Where nothing can be written the pairs are made in memory.

    Args:
      path: .arrow file, named by `token_key`; None keeps no file.
      make: gives the pairs in chunks, as `pairs.from_list` makes them, and what says about them (JSON) after the last.

    Returns:
      (the pairs, what is said about them).
    """
    if path is not None:
        if path.exists():
            with contextlib.suppress(*_UNREADABLE):
                if intact(path):
                    return _read(path)
            note(f"{path} is damaged; its pairs are tokenized anew")
        try:
            remove_parts(path.parent)
            with sealed(path) as part:
                _write(part, *make())
            return _read(path)
        except WriteError as error:  # a full disk, a directory that is not ours
            note(f"tokens are kept in memory: {error}")
    chunks, about = make()
    return concatenate(list(chunks)), dict(about())


_UNREADABLE = (OSError, ValueError, KeyError)  # Arrow's own errors among them
_PLAIN = {"weight": np.float64, "margin": np.float64, "label": np.bool_, "place": np.int32, "row": np.int64}
_PLAIN |= {"source": np.int32, "held_out": np.bool_, "prompt_key": np.uint64}


def _write(file: Path, chunks: Iterable[Pairs], about: Callable[[], Mapping[str, Any]]) -> None:
    import pyarrow as pa

    fields = [("prompt", pa.list_(pa.int32())), ("responses", pa.list_(pa.list_(pa.int32())))]
    fields += [("token_weights", pa.list_(pa.list_(pa.float32()))), ("scores", pa.list_(pa.float64()))]
    fields += [(name, pa.from_numpy_dtype(kind)) for name, kind in _PLAIN.items()]
    schema = pa.schema([*fields, ("digest", pa.binary(16))])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for chunk in chunks:
            count, most = chunk.scores.shape
            prompts, responses = (_ends(chunk.length[:, part]) for part in (slice(0, 1), slice(1, None)))
            each = np.arange(count + 1, dtype=np.int32) * most  # ends of the lists of responses
            lists = [_lists(chunk.buffers[0], prompts), _lists(chunk.buffers[1], responses, each)]
            weights = chunk.token_weights[1]  # null where each token counts once
            lists.append(pa.nulls(count, fields[2][1]) if weights is None else _lists(weights, responses, each))
            lists.append(_lists(chunk.scores.reshape(-1), each))
            plain = [_array(getattr(chunk, name)) for name in _PLAIN]
            digest = [None, pa.py_buffer(np.ascontiguousarray(chunk.digest))]
            columns = [*lists, *plain, pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(chunk), digest)]
            places = json.dumps(chunk.places)
            writer.write_batch(pa.record_batch(columns, schema=schema), custom_metadata={"places": places})
        last = pa.record_batch([pa.nulls(0, kind) for kind in schema.types], schema=schema)
        writer.write_batch(last, custom_metadata={"about": json.dumps(about())})


def _ends(lengths: np.ndarray) -> np.ndarray:
    """Where lists end that lie one after the other, and where the first begins."""
    return np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])


def _lists(values: np.ndarray, *ends: np.ndarray) -> Any:
    """A column of lists of numbers, or of lists of lists."""
    import pyarrow as pa

    column = _array(values)
    for each in ends:
        column = pa.ListArray.from_arrays(_array(each), column)
    return column


# Arrow's own array() and to_numpy() import pandas, which takes half a second.


def _array(values: np.ndarray) -> Any:
    """A column of numbers."""
    import pyarrow as pa

    packed = np.packbits(values, bitorder="little") if values.dtype == bool else np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(packed)])


def _numbers(column: Any) -> np.ndarray:
    """The numbers of a column without nulls: where they lie, except for truth values, which are bits there."""
    if str(column.type) != "bool":
        return np.from_dlpack(column)
    bits = np.unpackbits(np.frombuffer(column.buffers()[1], np.uint8), bitorder="little")
    return bits[column.offset :][: len(column)].view(bool)


def _read(path: Path) -> tuple[Pairs, dict[str, Any]]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:  # what is read of it keeps it mapped
        reader = pa.ipc.open_file(source)
        batches = [reader.get_batch_with_custom_metadata(i) for i in range(reader.num_record_batches)]
    *batches, (_, about) = batches
    return concatenate([_chunk(batch, metadata) for batch, metadata in batches]), json.loads(about[b"about"])


def _chunk(batch: Any, metadata: Mapping[bytes, bytes]) -> Pairs:
    prompts, responses, weights = (batch.column(name) for name in ("prompt", "responses", "token_weights"))
    count = batch.num_rows
    nested = responses.values
    starts, ends = (_numbers(x.offsets) for x in (prompts, nested))
    most = len(nested) // count if count else 2
    digest = batch.column("digest")
    return Pairs(
        buffers=(_numbers(prompts.values), _numbers(nested.values)),
        token_weights=(None, None if count and weights.null_count else _numbers(weights.values.values)),
        buffer=np.broadcast_to(np.array([0] + [1] * most, np.int32), (count, 1 + most)),
        start=np.concatenate([starts[:-1, None], ends[:-1].reshape(count, most)], axis=1).astype(np.int64),
        length=np.concatenate([np.diff(starts)[:, None], np.diff(ends).reshape(count, most)], axis=1),
        scores=_numbers(batch.column("scores").values).reshape(count, most),
        places=tuple(json.loads(metadata[b"places"])),
        digest=np.frombuffer(digest.buffers()[1], np.uint64).reshape(-1, 2)[digest.offset :][:count],
        **{name: _numbers(batch.column(name)) for name in _PLAIN},
    )
