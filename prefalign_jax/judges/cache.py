"""Finished answers on disk, so that none is paid for or computed twice."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefalign_jax.types import UserError, one_line


class Cache:
    """Key -> JSON value, kept as a file of lines that only grows; several threads may put.

    A process killed in the middle of a line loses that line alone: it is no JSON, is passed over, and the next one
    begins on a line of its own.
    """

    def __init__(self, descriptor: int, values: dict[str, Any]):
        self.descriptor, self.values, self.lock = descriptor, values, threading.Lock()

    def get(self, key: str) -> Any:
        """The value, None if there is none."""
        return self.values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keeps a value; it is in the system's hands when this returns."""
        line = (json.dumps({"key": key, "value": value}) + "\n").encode()
        with self.lock:
            self.values[key] = value
            while line:  # a write may be cut short
                line = line[os.write(self.descriptor, line) :]


@contextlib.contextmanager
def open_cache(path: str | Path) -> Iterator[Cache]:
    """Opens, or begins, the cache in a file, and holds it: two processes would pay twice.

    Args:
      path: of the JSONL file.

    Raises:
      UserError: it cannot be written, or another process holds it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {one_line(error)}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another process is writing there; wait for it, or use another place") from None
        text = path.read_bytes()
        values = {}
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                values[row["key"]] = row["value"]
        if text and not text.endswith(b"\n"):
            os.write(descriptor, b"\n")
        yield Cache(descriptor, values)
    finally:
        os.close(descriptor)
