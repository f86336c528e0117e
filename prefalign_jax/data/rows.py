"""Any data file, directory or hub data set -> its rows, one at a time, each with its place.

Nothing is held but the row at hand (a Parquet file's group of rows), so the size of a file does not matter. What is no
row stops the reading with its file and row; what can be put right is:

    a byte order mark, CRLF, empty lines     passed over
    .json that is one array                  its elements are the rows
    NaN                                      a number like others: fields that are read refuse it, others may hold it
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from prefalign_jax.data.memory import MemoryRows
from prefalign_jax.types import Place, UserError, one_line

LARGEST_ROW = 16 * 2**20  # bytes of JSON; a longer row is no pair but a file without line ends

_FILE = re.compile(r"\.(jsonl|ndjson|json)(\.gz)?$|\.parquet$")
_ARRAY = re.compile(r"\.json(\.gz)?$")
_LOOKS_LOCAL = re.compile(r"^[./~]|\.(jsonl?|ndjson|gz|zst|zip|parquet|arrow|csv|tsv|txt)$")
_SAVED = ("dataset_dict.json", "state.json")  # of `datasets.save_to_disk`
_CHUNK = 2**20
_NUMBER = "0123456789.eE+-"
_SPACE = re.compile(r"\s*")


def read_rows(path: str | Path | MemoryRows, split: str = "train") -> Iterator[tuple[Place, Any]]:
    """(its place, row) of every row.

    Args:
      path: a .jsonl, .json or .parquet file (JSON gzipped or not); a directory of such files, of which those are read
        whose name, or folder, begins with the split; a directory written by `datasets.save_to_disk`; or a hub name,
        'owner/name' or 'owner/name:subset'; or rows in memory.
      split: which part of a directory or hub data set; a single file is read whole.

    Returns:
      An iterator over the rows in order.

    Raises:
      UserError: there is no such data, or a row is malformed; from the iterator, where it comes to it.
    """
    if isinstance(path, MemoryRows):
        return iter(path)
    path = str(path)
    local = Path(path).expanduser()
    if local.is_dir() and any((local / name).exists() for name in _SAVED):
        return _dataset_rows(path, _saved_dataset(path, split))
    if local.exists():
        return (row for file in split_files(local, split) for row in _file_rows(file))
    if _LOOKS_LOCAL.search(path):
        raise UserError(f"{path}: no such file or directory")
    return _dataset_rows(path, _hub_dataset(path, split))


def content_digest(path: str | Path | MemoryRows, split: str = "train") -> str:
    """SHA-256 of what `read_rows` reads: the bytes of its files with their names, or a hub data set's fingerprint.

    Args:
      path, split: as there.

    Returns:
      64 hexadecimal digits; they change with any byte, and hold on another machine and in another directory.
    """
    if isinstance(path, MemoryRows):
        return path.digest
    path = str(path)
    local = Path(path).expanduser()
    digest = hashlib.sha256()
    if local.is_dir() and any((local / name).exists() for name in _SAVED):
        digest.update(_saved_dataset(path, split)._fingerprint.encode())
    elif local.exists():
        for file in split_files(local, split):
            try:
                with file.open("rb") as opened:
                    digest.update(f"{file.name}\n{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
            except OSError as error:
                raise UserError(f"{file}: expected a readable file, found {one_line(error)}") from None
    elif _LOOKS_LOCAL.search(path):
        raise UserError(f"{path}: no such file or directory")
    else:
        digest.update(_hub_dataset(path, split)._fingerprint.encode())
    return digest.hexdigest()


def count_rows(path: str | Path | MemoryRows, split: str = "train") -> int | None:
    """How many rows `read_rows` will come to, where it can be told at once: not of gzipped files and arrays of JSON.

    Empty lines are counted too, so it is for showing progress only.
    """
    if isinstance(path, MemoryRows):
        return len(path)
    path = str(path)
    local = Path(path).expanduser()
    if local.is_dir() and any((local / name).exists() for name in _SAVED):
        return len(_saved_dataset(path, split))
    if not local.exists():
        return None if _LOOKS_LOCAL.search(path) else len(_hub_dataset(path, split))
    counts = [_count(file) for file in split_files(local, split)]
    return None if None in counts else sum(counts)


def _count(file: Path) -> int | None:
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_metadata(file).num_rows
        if file.suffix == ".gz" or _ARRAY.search(file.name):
            return None
        with file.open("rb") as opened:
            return sum(block.count(b"\n") for block in iter(lambda: opened.read(_CHUNK), b""))
    except (OSError, ValueError):  # whoever reads it says what is wrong
        return None


def split_files(path: Path, split: str) -> list[Path]:
    """The file itself, or a directory's files of a split by the name of file or folder; unnamed ones are all 'train'.

    Raises:
      UserError: there is none, or the file is of no kind that is read.
    """
    if path.is_file():
        if not _FILE.search(path.name):
            raise UserError(f"{path}: expected a .jsonl, .jsonl.gz or .parquet file")
        return [path]
    files = sorted(f for f in path.rglob("*") if f.is_file() and _FILE.search(f.name))

    def begins_with(words: str) -> list[Path]:
        # 'train' is in 'train-00000-of-00001.parquet' and 'train.jsonl.gz', but not in 'train_prefs.jsonl'.
        pattern = re.compile(rf"(^|/)({words})([-./]|_?\d)")
        return [f for f in files if pattern.search(f.relative_to(path).as_posix())]

    found = begins_with(re.escape(split))
    if not found and split == "train" and not begins_with(r"(train|test|valid|validation|dev|eval)(_\w+)?"):
        found = files
    if not found:
        there = ", ".join(f.relative_to(path).as_posix() for f in files[:4]) or "no .jsonl, .jsonl.gz or .parquet"
        raise UserError(f"{path}: no file of the split {split!r}, found {there}; name another split or a file")
    return found


def json_rows(file: Path) -> Iterator[tuple[Place, Any]]:
    """(its place, JSON value) of each line of a JSONL file, or each element of a .json file that is one array.

    Gzipped or not; empty lines are passed over, but counted.
    """
    number = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as opened:
            if _ARRAY.search(file.name) and _is_array(opened):
                for number, element in enumerate(_elements(file, opened), 1):  # noqa: B007
                    yield element
                return
            while line := opened.readline(LARGEST_ROW + 1):
                number += 1
                if len(line) > LARGEST_ROW:
                    raise _too_long(file, number)
                if stripped := line.strip():
                    place = Place(str(file), number)
                    yield place, _loads(stripped, place)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{Place(str(file), number + 1)}: expected a readable file, found {one_line(error)}") from None


class _Twice(ValueError):
    """A JSON object has a field twice, and readers disagree which one counts."""


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(fields)
    if len(out) < len(fields):
        names = [name for name, _ in fields]
        raise _Twice(f"the field {next(name for name in names if names.count(name) > 1)!r} twice")
    return out


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _loads(line: bytes, where: Place) -> Any:
    try:
        return _DECODER.decode(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        found = getattr(error, "msg", None) or str(error)
        raise UserError(f"{where}: expected one JSON object in UTF-8, found {found}") from None


def _too_long(file: Path, number: int) -> UserError:
    return UserError(
        f"{Place(str(file), number)}: longer than {LARGEST_ROW // 2**20} MiB; expected one JSON object a line "
        "(or, in a .json file, an array of them)"
    )


def _is_array(opened: BinaryIO) -> bool:
    start = opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    opened.seek(0)
    return start[:1] == b"["


def _elements(file: Path, opened: BinaryIO) -> Iterator[tuple[Place, Any]]:
    """The elements of one JSON array, decoded as they come."""
    text, at, number, ended = "", 0, 0, False
    decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def more() -> bool:
        nonlocal text, at
        read = opened.read(max(_CHUNK, len(text) - at))  # doubled, so that a long element is not decoded many times
        try:
            new = decoder.decode(read, final=not read)
        except UnicodeDecodeError as error:
            raise UserError(f"{Place(str(file), number + 1)}: expected JSON in UTF-8, found {error}") from None
        if read:
            text, at = text[at:] + new, 0
        return bool(read)

    def next_character() -> str:
        nonlocal at
        while True:
            at = _SPACE.match(text, at).end()
            if at < len(text) or not more():
                return text[at : at + 1]

    next_character()
    at += 1  # the opening bracket
    while not ended:
        where = Place(str(file), number + 1)
        if next_character() == "]" and not number:
            at += 1
            break
        while True:
            try:
                row, end = _DECODER.raw_decode(text, at)
                if text[end : end + 1].strip(_NUMBER) or not more():  # a number may go on
                    break
            except _Twice as error:
                raise UserError(f"{where}: expected a JSON object, found {error}") from None
            except (ValueError, RecursionError) as error:
                if len(text) - at > LARGEST_ROW:
                    raise _too_long(file, number + 1) from None
                if isinstance(error, RecursionError) or not more():
                    found = getattr(error, "msg", None) or str(error)
                    raise UserError(f"{where}: expected a JSON array of objects, found {found}") from None
        at, number = end, number + 1
        yield where, row
        match next_character():
            case ",":
                at += 1
            case "]":
                at, ended = at + 1, True
            case other:
                found = f"{other!r}" if other else "the end of the file"
                raise UserError(f"{where}: expected ',' or ']' after it, found {found}")
    if rest := next_character():
        raise UserError(f"{Place(str(file), number + 1)}: expected nothing after the array, found {rest!r}")


def _file_rows(file: Path) -> Iterator[tuple[Place, Any]]:
    return _parquet_rows(file) if file.suffix == ".parquet" else json_rows(file)


def _parquet_rows(file: Path) -> Iterator[tuple[Place, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield Place(str(file), number), row
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{Place(str(file), number + 1)}: expected a readable file, found {one_line(error)}") from None


def _dataset_rows(name: str, dataset: Any) -> Iterator[tuple[Place, Any]]:
    for number, row in enumerate(dataset, 1):
        yield Place(name, number), row


def _saved_dataset(name: str, split: str) -> Any:
    import datasets

    try:
        dataset = datasets.load_from_disk(name)
    except Exception as error:  # the library raises whatever it likes
        raise UserError(f"{name}: cannot load the split {split!r}: {one_line(error)}") from None
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise UserError(f"{name}: no split {split!r}, found {', '.join(dataset)}")
    return dataset[split]


def _hub_dataset(name: str, split: str) -> Any:
    import datasets

    repository, _, subset = name.partition(":")
    try:
        try:
            return datasets.load_dataset(repository, subset or None, split=split)
        except ValueError:  # a subset is a configuration, or a folder as in HH-RLHF
            if not subset:
                raise
            return datasets.load_dataset(repository, data_dir=subset, split=split)
    except Exception as error:  # the library and the network raise whatever they like
        raise UserError(f"{name}: cannot load the split {split!r}: {one_line(error)}") from None
