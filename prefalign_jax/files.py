"""Files that appear whole or not at all, and directories held by one run: a kill leaves what was there before."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefalign_jax.types import UserError, one_line


def user_cache() -> Path:
    """Where what can be made again is kept between runs: $XDG_CACHE_HOME/prefalign_jax, ~/.cache/prefalign_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefalign_jax"


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside its place to write to, which is put there once all went well."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")  # machines that share a disk share numbers too
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON with a final newline."""
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, missing: Any = None) -> Any:
    """The value that a JSON file holds.

    Args:
      path: of the file.
      missing: what a file that is not there stands for; None for an error.

    Raises:
      UserError: the file cannot be read, or it is no JSON.
    """
    if missing is not None and not path.is_file():
        return missing
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, found {one_line(error)}") from None


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Makes the directory and holds it: two runs that write the same files would leave neither's.

    Args:
      workdir: of the run.

    Raises:
      UserError: it cannot be made, or another run holds it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however the process ends
        except OSError:
            raise UserError(f"--workdir={workdir}: another run is writing there; use another") from None
        yield
