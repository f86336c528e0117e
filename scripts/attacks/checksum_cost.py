"""Measures what checksums of checkpoints cost: python scripts/attacks/checksum_cost.py 1 (GiB of arrays).

Prints seconds a GiB for a save without checksums, the checksums when it is written, the same when it is read, and
reading the arrays: the least of three measurements.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from prefalign_jax.files import checksum

TIMES = 3


def seconds(action: Callable[..., Any], *arguments: Any) -> float:
    """How long a call takes."""
    began = time.monotonic()
    action(*arguments)
    return time.monotonic() - began


def checksums(files: Sequence[Path]) -> list[str]:
    """Of all files of a checkpoint."""
    return [checksum(file) for file in files]


def main(gib: float) -> None:
    """Measures and prints."""
    tree = {f"{n}": jax.random.normal(jax.random.key(n), (1024, 32 * 1024)) for n in range(round(8 * gib))}
    size, rows = sum(x.nbytes for x in tree.values()) / 2**30, []
    for _ in range(TIMES):
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch) / "0"
            saving = seconds(ocp.save_checkpointables, place, {"state": tree})
            files = [file for file in place.rglob("*") if file.is_file()]
            sums = seconds(checksums, files), seconds(checksums, files)
            rows.append((saving, *sums, seconds(ocp.load_checkpointables, place, {"state": tree})))
    names = ("save without checksums", "checksums when written", "checksums when read", "reading the arrays")
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        print(f"{name}: {min(values) / size:.2f} s a GiB")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
