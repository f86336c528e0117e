"""Finished answers on disk, so that none is paid for or computed twice."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefalign_jax.files import Shape, append, hold, parse_json, writing
from prefalign_jax.types import UserError


class Cache:
    """Key -> JSON value, kept as a file of lines that only grows; several threads may put.

    A process killed in the middle of a line loses that line alone: it is no JSON, is passed over, and the next one
    begins on a line of its own.
    """

    def __init__(self, path: Path, descriptor: int, values: dict[str, Any]):
        self.path, self.descriptor, self.values, self.lock = path, descriptor, values, threading.Lock()

    def get(self, key: str) -> Any:
        """The value, None if there is none."""
        return self.values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keeps a value; it is in the system's hands when this returns."""
        line = (json.dumps({"key": key, "value": value}) + "\n").encode()
        with self.lock:
            self.values[key] = value
            append(self.path, self.descriptor, line)


@contextlib.contextmanager
def open_cache(path: str | Path, shape: Shape = "anything") -> Iterator[Cache]:
    """Opens, or begins, the cache in a file, and holds it: two processes would pay twice.

    Args:
      path: of the JSONL file.
      shape: of a value; a line that is none is passed over.

    Raises:
      WriteError: it cannot be written.
      UserError: another process holds it.
    """
    with writing(path):
        path = Path(path).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = hold(path)
    if descriptor is None:
        raise UserError(f"{path}: another process is writing there; wait for it, or use another place")
    try:
        text = path.read_bytes()
        values = {}
        for line in text.splitlines():
            with contextlib.suppress(UserError):
                row = parse_json(line, {"key": "a string", "value": shape}, where=path)
                values[row["key"]] = row["value"]
        if text and not text.endswith(b"\n"):
            append(path, descriptor, b"\n")
        yield Cache(path, descriptor, values)
    finally:
        os.close(descriptor)
