"""Files that appear whole or not at all, and directories held by one run: a kill leaves what was there before."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prefalign_jax.types import UserError, WriteError, one_line

BLOCK = 2**22  # bytes of a file that one thread sums up at a time
_TRIALS = 100  # of the removal of a directory, over 2 s
_PART = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(part|new|old)")  # what is written beside its place
# What the system said -> what to do about it.
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on the disk, then start the same command again"),
    errno.EFBIG: "raise the limit on the size of files, then start the same command again",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "name a place that you may write to"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY), "move away what is in its place"),
    errno.ELOOP: "move away the link that is in its place",
}


def user_cache() -> Path:
    """Where what can be made again is kept between runs: $XDG_CACHE_HOME/prefalign_jax, ~/.cache/prefalign_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefalign_jax"


# Writing


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Tells in one line what the system has against writing a file.

    Args:
      path: what is written, for the message.

    Raises:
      WriteError: the disk is full, the place is read-only, a directory is where the file is due, and the like.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Libraries written in Rust or C++ raise errors of their own, with the system's number in the text.
        told = re.search(r"(?i:os error |errno |os_error_code=')(\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else told and int(told[1])
        if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # pathlib's before Python 3.13
            number = errno.ELOOP
        if number is None and not isinstance(error, OSError):
            raise
        reason = os.strerror(number) if number else str(error).splitlines()[0]
        remedy = _REMEDIES.get(number, "see to the disk, then start the same command again")
        raise WriteError(f"{path} cannot be written: {reason}; {remedy}") from error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside its place to write to, which is put there once all went well; directories on its way are made.

    Raises:
      WriteError: it cannot be written; what was there before is left as it was.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")  # machines that share a disk share numbers too
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.touch(exist_ok=False)
            with marked(part):
                yield part
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes bytes."""
    with whole(path) as part:
        part.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def marked(path: Path) -> Iterator[None]:
    """Holds a file or directory as long as this process lives: `remove_parts` leaves it alone then."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks, and nothing is removed there
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_parts(directory: Path) -> None:
    """Removes what killed processes left half written in a directory and below, and puts back what they had moved away.

    Args:
      directory: links in it are not followed.
    """
    for folder, directories, files in os.walk(directory):
        for name in [name for name in (*directories, *files) if _PART.fullmatch(name)]:
            part = Path(folder, name)
            if name in directories:
                directories.remove(name)
            with contextlib.suppress(OSError), _unused(part):
                place = part.with_name(_PART.fullmatch(name)["name"])
                if name.endswith(".old") and not place.exists():
                    part.rename(place)
                elif part.is_dir():
                    shutil.rmtree(part)
                else:
                    part.unlink()


def remove_directory(directory: Path) -> None:
    """Removes a directory that threads of a write that failed may still be adding files to.

    Raises:
      OSError: it cannot be removed.
    """
    for left in reversed(range(_TRIALS)):
        try:
            shutil.rmtree(directory)
            return
        except OSError as error:
            if not directory.exists():
                return
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT) or not left:
                raise
        time.sleep(0.02)


@contextlib.contextmanager
def _unused(part: Path) -> Iterator[None]:
    """Raises OSError if a process is at work on it."""
    descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


# What is read is what was written


def checksum(file: Path) -> str:
    """A checksum of every byte of a file, in 16 hexadecimal digits: CRC-32 of each block, and a digest of all of those.

    No single error within 32 bits of a block goes unseen, and any other with a probability of 2^-32. A cryptographic
    digest of the whole takes several times as long.
    """
    with file.open("rb") as opened, ThreadPoolExecutor() as pool:
        size = os.fstat(opened.fileno()).st_size
        sums = pool.map(lambda at: zlib.crc32(os.pread(opened.fileno(), BLOCK, at)), range(0, size, BLOCK))
        return hashlib.sha256(f"{size} {list(sums)}".encode()).hexdigest()[:16]


@contextlib.contextmanager
def sealed(path: Path) -> Iterator[Path]:
    """`whole`, and its checksum in a file NAME.sum beside it."""
    with whole(path) as part:
        yield part
        write_text(_sum_of(path), checksum(part) + "\n")


def intact(path: Path) -> bool:
    """Whether a file is to the bit what `sealed` wrote."""
    try:
        return _sum_of(path).read_bytes() == f"{checksum(path)}\n".encode()
    except OSError:
        return False


def _sum_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sum")


# Reading


DEEPEST = 64  # levels of nesting in JSON; what reads a value level by level breaks at some depth, and nothing has more
JSON_KINDS: dict[str, Callable[[Any], bool]] = {
    "anything": lambda x: True,
    "null": lambda x: x is None,
    "true": lambda x: x is True,
    "false": lambda x: x is False,
    "an integer": lambda x: type(x) is int and -(2**63) <= x < 2**63,
    "a count": lambda x: type(x) is int and 0 < x < 2**31,
    "zero": lambda x: type(x) is int and x == 0,
    "a number": lambda x: type(x) is float or JSON_KINDS["an integer"](x),
    "a positive number": lambda x: JSON_KINDS["a number"](x) and 0 < x < math.inf,
    "a string": lambda x: isinstance(x, str),
    "a list": lambda x: isinstance(x, list),
    "an object": lambda x: isinstance(x, dict),
}
# JSON_KINDS joined by ' or '; (one shape, or another); [the shape of a list's elements]; {field: shape}, where
# 'field?' may be missing and '*' is every field.
Shape = str | tuple["Shape", ...] | list["Shape"] | Mapping[str, "Shape"]


def read_json(path: Path, shape: Shape = "anything", *, missing: Any = None) -> Any:
    """The value that a JSON file holds.

    Args:
      path: of the file.
      shape: that it must have.
      missing: what a file that is not there stands for; None for an error.

    Raises:
      UserError: the file cannot be read, it is no JSON, or its value has another shape.
    """
    if missing is not None and not path.is_file():
        return missing
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: expected JSON, found {one_line(error)}") from None
    return parse_json(text, shape, where=path)


def read_json_lines(path: Path, shape: Shape = "an object") -> list[Any]:
    """The rows of a JSONL file, [] if there is none. A last line without its end is still being written: no row.

    Args:
      path: of the file.
      shape: of a row.

    Raises:
      UserError: another line is broken, or has another shape.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: expected lines of JSON, found {one_line(error)}") from None
    return [parse_json(line, shape, where=f"{path}, row {number}") for number, line in enumerate(lines, 1)]


def parse_json(text: str | bytes, shape: Shape = "anything", *, where: object) -> Any:
    """A JSON value of this shape; `where` is for the message.

    Raises:
      UserError: the text is no JSON, is nested deeper than DEEPEST, or its value has another shape.

    Example:
      >>> parse_json('{"step": "3"}', {"step": "an integer"}, where="a.json")
      Traceback (most recent call last):
      prefalign_jax.types.UserError: a.json, field 'step': expected an integer, found '3'
    """
    try:
        # An integer that no machine counts to is a number like others; Python would refuse to read or to convert it.
        value = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))
        level = [value]
        for _ in range(DEEPEST):
            level = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, list | dict)]
            level = list(itertools.chain.from_iterable(level))
        if level:
            raise RecursionError
    except RecursionError:
        raise UserError(f"{where}: expected JSON, found more than {DEEPEST} levels of nesting") from None
    except ValueError as error:
        raise UserError(f"{where}: expected JSON, found {one_line(error)}") from None
    return shaped(value, shape, where=where)


def shaped(value: Any, shape: Shape, *, where: object) -> Any:
    """The value itself, which has this shape; `where` is for the message.

    Raises:
      UserError: it has another.
    """
    if isinstance(shape, str):
        if not any(JSON_KINDS[kind](value) for kind in shape.split(" or ")):
            shown = "nothing" if value is None else f"{value!r:.40}"
            raise UserError(f"{where}: expected {shape}, found {shown}")
    elif isinstance(shape, tuple):
        for one in shape[:-1]:
            with contextlib.suppress(UserError):
                return shaped(value, one, where=where)
        shaped(value, shape[-1], where=where)
    elif isinstance(shape, list):
        for number, one in enumerate(shaped(value, "a list", where=where)):
            shaped(one, shape[0], where=f"{where}, element {number}")
    else:
        shaped(value, "an object", where=where)
        for name, inner in shape.items():
            if name != "*" and not name.endswith("?") and name not in value:
                raise UserError(f"{where}: it has no field {name!r}")
            for one in value if name == "*" else {name.removesuffix("?")} & value.keys():
                shaped(value[one], inner, where=f"{where}, field {one!r}")
    return value


# One at a time


def hold(path: Path) -> int | None:
    """Opens a file for appending, made if missing, and holds it against every other process.

    Args:
      path: of the file; a link in its place is not followed.

    Returns:
      The file's descriptor, None if another process holds it. The system lets go of it however the process ends.

    Raises:
      WriteError: it cannot be opened.
    """
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
    return descriptor


def append(path: Path, descriptor: int, line: bytes) -> None:
    """Appends a line to a file that `hold` opened: whole, or on a full disk not at all.

    Raises:
      WriteError: it cannot be written.
    """
    with writing(path):
        before = os.fstat(descriptor).st_size
        try:
            while line:  # a write may be cut short
                line = line[os.write(descriptor, line) :]
        except OSError:
            os.ftruncate(descriptor, before)
            raise


@contextlib.contextmanager
def locked(directory: Path, option: str = "--workdir") -> Iterator[None]:
    """Makes a directory and holds it: two runs that write the same files would leave neither's.

    What an earlier run that was killed left half written in it is removed.

    Args:
      directory: of the run.
      option: that named it, for messages.

    Raises:
      WriteError: it cannot be made or written.
      UserError: another run holds it.
    """
    with writing(f"{option}={directory}"):
        directory.mkdir(parents=True, exist_ok=True)
    descriptor = hold(directory / ".lock")
    if descriptor is None:
        raise UserError(f"{option}={directory}: another run is writing there; use another")
    try:
        remove_parts(directory)
        yield
    finally:
        os.close(descriptor)
