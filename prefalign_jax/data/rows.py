"""Any data file, directory or hub data set -> its rows, one at a time, each with its place.

Nothing is held but the row at hand (a Parquet or Arrow file's group of rows), so the size of a file does not matter.
What is no row stops the reading with its file and row; what can be put right is:

    a byte order mark, CRLF, empty lines     passed over
    .json that is one array                  its elements are the rows
    NaN                                      a number like others: fields that are read refuse it, others may hold it
    .csv, .tsv                               the first line names the fields; every value is a string
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from prefalign_jax.data.class_labels import class_names, class_names_in, named
from prefalign_jax.data.memory import MemoryRows
from prefalign_jax.data.splits import data_files, left_out, split_files
from prefalign_jax.data.values import cut, name_of
from prefalign_jax.types import Place, UserError, one_line

MOST_EMPTY = 100_000  # lines one after the other; a small gzipped file may hold billions
LARGEST_ROW = 16 * 2**20  # bytes of JSON; a longer row is no pair but a file without line ends

_FILE = re.compile(r"\.(jsonl|ndjson|json|csv|tsv)(\.gz)?$|\.(parquet|arrow|feather)$", re.IGNORECASE)
_READABLE = ".jsonl, .json, .csv, .tsv, .parquet or .arrow"  # in words
# Holds data, to all appearance, and is not read.
_OTHER_FILE = re.compile(
    r"\.((jsonl?|ndjson|csv|tsv|txt|parquet|arrow)\.\w+|zst|bz2|xz|zip|tar|tgz|txt|xlsx?|pkl|pickle|pt|npz?|h5|hdf5|db|sqlite)$",
    re.IGNORECASE,
)
_ARRAY = re.compile(r"\.json(\.gz)?$", re.IGNORECASE)
_LOOKS_LOCAL = re.compile(r"^[./~]|\.(jsonl?|ndjson|gz|zst|zip|parquet|arrow|feather|csv|tsv|txt)$", re.IGNORECASE)
_SAVED = ("dataset_dict.json", "state.json")  # of `datasets.save_to_disk`
_CHUNK = 2**20
_ROWS = 1024  # of an Arrow table as objects at once
_NUMBER = "0123456789.eE+-"
_SPACE = re.compile(r"\s*")


def read_rows(path: str | Path | MemoryRows, split: str = "train") -> Iterator[tuple[Place, Any]]:
    """(its place, row) of every row.

    Args:
      path: a .jsonl, .json, .csv, .tsv, .parquet or .arrow file (those of text gzipped or not); a directory of such
        files, of which those of the split are read, see `splits.of_split`; a directory written by
        `datasets.save_to_disk`; or a hub name, 'owner/name' or 'owner/name:subset'; or rows in memory.
      split: which part of a directory or hub data set; a single file is read whole.

    Returns:
      An iterator over the rows in order.

    Raises:
      UserError: there is no such data, or a row is malformed; from the iterator, where it comes to it.
    """
    data = _data_at(path, split)
    if isinstance(data, MemoryRows):
        return iter(data)
    if not isinstance(data, list):
        return _dataset_rows(str(path), data)
    return (row for file in data for row in _file_rows(file))


def content_digest(path: str | Path | MemoryRows, split: str = "train") -> str:
    """SHA-256 of what `read_rows` reads: the bytes of its files with their names, or a hub data set's fingerprint.

    Args:
      path, split: as there.

    Returns:
      64 hexadecimal digits; they change with any byte, and hold on another machine and in another directory.
    """
    data, digest = _data_at(path, split), hashlib.sha256()
    if isinstance(data, MemoryRows):
        return data.digest
    if not isinstance(data, list):
        digest.update(data._fingerprint.encode())
        return digest.hexdigest()
    for file in data:
        try:
            with file.open("rb") as opened:
                digest.update(f"{file.name}\n{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            raise UserError(f"{file}: expected a readable file, found {_said(error)}") from None
    return digest.hexdigest()


def count_rows(path: str | Path | MemoryRows, split: str = "train") -> int | None:
    """How many rows `read_rows` will come to, where that can be told at once; else None.

    Empty lines are counted too, so it is for showing progress only.
    """
    data = _data_at(path, split)
    if not isinstance(data, list):
        return len(data)
    counts = [_count(file) for file in data]
    return None if None in counts else sum(counts)


def local_files(path: str | Path) -> list[Path]:
    """The data files that a path names, of a directory those of every split.

    Raises:
      UserError: there is no such file or directory, or it holds no data file.
    """
    local = _local(path)
    if local is None:
        raise UserError(f"{path}: no such file or directory")
    files = list(data_files(local, _FILE).values()) if local.is_dir() else [local]
    if not files:
        raise UserError(f"{path}: the directory holds no {_READABLE} file")
    return files


def files_left_out(path: str | Path | MemoryRows, split: str = "train") -> dict[str, str]:
    """The data files of a directory that `read_rows` leaves out: {name: the split that it says, or why else}."""
    local = None if isinstance(path, MemoryRows) else _local(path)
    if not local or not local.is_dir() or _is_saved(local):
        return {}
    others = {str(file): "of no kind that is read" for file in data_files(local, _OTHER_FILE)}
    return left_out(local, split, _FILE) | {name: why for name, why in others.items() if not _FILE.search(name)}


def _data_at(path: str | Path | MemoryRows, split: str) -> list[Path] | MemoryRows | Any:
    """The files, or the data set of `datasets`, that a path names; rows in memory as they are."""
    if isinstance(path, MemoryRows):
        return path
    local = _local(path)
    if local is None:
        return _hub_dataset(str(path), split)
    return _saved_dataset(str(path), local, split) if _is_saved(local) else split_files(local, split, _FILE, _READABLE)


def _local(path: str | Path) -> Path | None:
    """The file or directory of a path, None for a name of the hub."""
    try:
        local = Path(path).expanduser()
        if local.exists():
            return local
    except (OSError, RuntimeError, ValueError) as error:  # a name that no file can have, a ~ of nobody
        raise UserError(f"{cut(str(path))}: expected a file or directory, found {_said(error)}") from None
    if _LOOKS_LOCAL.search(str(path)):
        raise UserError(f"{path}: no such file or directory")
    return None


def _is_saved(local: Path) -> bool:
    return local.is_dir() and any((local / name).exists() for name in _SAVED)


def _count(file: Path) -> int | None:
    try:
        if _suffix(file) == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_metadata(file).num_rows
        if _suffix(file) not in (".jsonl", ".ndjson"):
            return None
        with file.open("rb") as opened:
            return sum(block.count(b"\n") for block in iter(lambda: opened.read(_CHUNK), b""))
    except (OSError, ValueError):  # whoever reads it says what is wrong
        return None


def json_rows(file: Path) -> Iterator[tuple[Place, Any]]:
    """(its place, JSON value) of each line of a JSONL file, or each element of a .json file that is one array.

    Gzipped or not; empty lines are passed over, but counted.
    """
    number = empty = 0
    try:
        with (gzip.open if _suffix(file) == ".gz" else open)(file, "rb") as opened:
            if _ARRAY.search(file.name) and _is_array(opened):
                for number, element in enumerate(_elements(file, opened), 1):  # noqa: B007
                    yield element
                return
            while line := opened.readline(LARGEST_ROW + 1):
                number += 1
                if len(line) > LARGEST_ROW:
                    raise _too_long(file, number)
                empty = 0 if (stripped := line.strip()) else empty + 1
                if empty > MOST_EMPTY:
                    raise UserError(f"{Place(str(file), number)}: expected a row, found {MOST_EMPTY:,} empty lines")
                if stripped:
                    place = Place(str(file), number)
                    yield place, _loads(stripped, place)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{Place(str(file), number + 1)}: expected a readable file, found {_said(error)}") from None


class _Twice(ValueError):
    """A JSON object has a field twice, and readers disagree which one counts."""


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(fields)
    if len(out) < len(fields):
        names = [name for name, _ in fields]
        raise _Twice(f"the field {name_of(next(name for name in names if names.count(name) > 1))!r} twice")
    return out


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _loads(line: bytes, where: Place) -> Any:
    try:
        return _DECODER.decode(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        found = _wrong(error)
        if line in (b"[", b"{"):
            found = (
                f"{line.decode()!r} alone; values of several lines are read from a .json file that is one array of rows"
            )
        raise UserError(f"{where}: expected one JSON object in UTF-8, found {found}") from None


def _said(error: BaseException) -> str:
    """What a library says of a file, which may hold any of its bytes."""
    return cut(one_line(error), 200)


def _wrong(error: Exception) -> str:
    """What the decoder of JSON met."""
    return "too many levels" if isinstance(error, RecursionError) else getattr(error, "msg", None) or str(error)


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
        empty = 0
        while True:
            start, at = at, _SPACE.match(text, at).end()
            empty += at - start
            if empty > LARGEST_ROW:
                raise _too_long(file, number + 1)
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
                    raise UserError(f"{where}: expected a JSON array of objects, found {_wrong(error)}") from None
        at, number = end, number + 1
        yield where, row
        match next_character():
            case ",":
                at += 1
            case "]":
                at, ended = at + 1, True
            case other:
                what = f"{other!r}" if other else "the end of the file"
                raise UserError(f"{where}: expected ',' or ']' after it, found {what}")
    if rest := next_character():
        raise UserError(f"{Place(str(file), number + 1)}: expected nothing after the array, found {rest!r}")


def _file_rows(file: Path) -> Iterator[tuple[Place, Any]]:
    kind = _suffix(file)
    if kind == ".parquet":
        return _arrow_rows(file, _parquet_batches)
    if kind in (".arrow", ".feather"):
        return _arrow_rows(file, _arrow_batches)
    if separator := _separator(file):
        return _table_rows(file, separator)
    return json_rows(file)


def _suffix(file: Path) -> str:
    return file.suffix.lower()


def _separator(file: Path) -> str:
    """What stands between the values of a CSV or TSV file; '' for another kind."""
    name = file.name.lower().removesuffix(".gz")
    return "," if name.endswith(".csv") else "\t" if name.endswith(".tsv") else ""


def _arrow_rows(file: Path, batches: Callable[[Path], Iterator[Any]]) -> Iterator[tuple[Place, Any]]:
    import pyarrow

    number = 0
    try:
        for batch in batches(file):
            batch.validate(full=True)  # Arrow trusts a file's offsets, and a wrong one ends the process
            _once(batch.schema.names, file)
            classes = class_names_in(batch.schema.metadata)
            for start in range(0, batch.num_rows, _ROWS):
                for row in named(batch.slice(start, _ROWS).to_pylist(maps_as_pydicts="strict"), classes):
                    number += 1
                    yield Place(str(file), number), row
    except UserError:
        raise
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise UserError(f"{Place(str(file), number + 1)}: expected a readable file, found {_said(error)}") from None


def _once(columns: Sequence[str], file: Path) -> None:
    """Refuses a table with two columns of one name, of which a row could hold one."""
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise UserError(f"{file}: two columns are called {name_of(twice)!r}; rename one")


def _parquet_batches(file: Path) -> Iterator[Any]:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file).iter_batches(_ROWS)


def _arrow_batches(file: Path) -> Iterator[Any]:
    """The batches of an Arrow file, or of a stream in a file, as `datasets` keeps them."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        try:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:
            source.seek(0)
            batches = pyarrow.ipc.open_stream(source)
        yield from batches


def _table_rows(file: Path, separator: str) -> Iterator[tuple[Place, Any]]:
    """The rows of a CSV or TSV file, counted from the first after the names."""
    number, text = 0, {"encoding": "utf-8-sig", "newline": ""}

    def lines(opened: TextIO) -> Iterator[str]:
        while line := opened.readline(LARGEST_ROW + 1):
            if len(line) > LARGEST_ROW:
                raise _too_long(file, number + 1)
            yield line

    csv.field_size_limit(LARGEST_ROW)
    try:
        with gzip.open(file, "rt", **text) if _suffix(file) == ".gz" else file.open(**text) as opened:
            table = csv.reader(lines(opened), delimiter=separator, strict=True)
            head = [name.strip() for name in next(table, [])]
            if other := next((one for one in ";\t|," if len(head) == 1 and one != separator and one in head[0]), ""):
                what = f"found {other!r} between their names; write them with commas, or with tabs as .tsv"
                raise UserError(f"{file}: expected columns separated by {separator!r}, {what}")
            _once(head, file)
            for cells in table:
                number += 1
                if not cells:
                    continue
                if len(cells) != len(head):
                    what = f"{len(cells)} values for {len(head)} columns"
                    raise UserError(f"{Place(str(file), number)}: expected one value a column, found {what}")
                yield Place(str(file), number), dict(zip(head, cells, strict=True))
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        raise UserError(f"{Place(str(file), number + 1)}: expected a readable file, found {_said(error)}") from None


def _dataset_rows(name: str, dataset: Any) -> Iterator[tuple[Place, Any]]:
    number = 0
    rows = iter(named(dataset, class_names(dataset.features or {})))
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the library raises whatever it likes
            raise UserError(f"{Place(name, number + 1)}: expected a readable row, found {_said(error)}") from None
        number += 1
        yield Place(name, number), row


def _saved_dataset(name: str, local: Path, split: str) -> Any:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(local))
    except Exception as error:  # the library raises whatever it likes
        raise UserError(f"{name}: cannot load the split {split!r}: {_said(error)}") from None
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
        raise UserError(f"{name}: cannot load the split {split!r}: {_said(error)}") from None
