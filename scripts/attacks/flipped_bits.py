"""Flips one bit at a time in a checkpoint and in caches: python scripts/attacks/flipped_bits.py 500.

The argument is how many places in each. Prints how many were found; the exit status is 1 unless all were.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from targets import run, words_of

from prefalign_jax import checkpoint
from prefalign_jax.files import intact


def flip(file: Path, bit: int) -> None:
    """Changes one bit of a file."""
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def newest(directory: Path) -> int | None:
    """The step that a run would go on from; what it says is swallowed."""
    with contextlib.redirect_stderr(io.StringIO()), checkpoint.open_checkpoints(directory) as checkpoints:
        return checkpoint.newest(checkpoints)


def attack(directory: Path, count: int, found: Callable[[Path], bool], seed: int) -> int:
    """How many of `count` flipped bits, each in a fresh copy of a directory, are found."""
    draw, total = random.Random(seed), 0
    files = [file.relative_to(directory) for file in directory.rglob("*") if file.is_file() and file.stat().st_size]
    for _ in range(count):
        file = draw.choice(files)  # small files as often as large ones
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / directory.name
            shutil.copytree(directory, copy)
            flip(copy / file, draw.randrange(8 * (copy / file).stat().st_size))
            total += found(copy)
    return total


def main(count: int) -> int:
    """Attacks what a run with a cached reference has left."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        status, said = run(words_of("cached reference", out, out))
        if status:
            print(said)
            return 1
        steps = sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdecimal())
        kept = Path(scratch) / "last" / str(steps[-1])
        shutil.copytree(out / "checkpoints" / str(steps[-1]), kept)
        missed = 0
        for name, directory, found in (
            ("checkpoint", kept.parent, lambda copy: newest(copy) is None),
            ("token cache", out / "tokens", lambda copy: not all(map(intact, copy.glob("*.arrow")))),
            ("reference cache", out / "reference", lambda copy: not all(map(intact, copy.glob("*.npz")))),
        ):
            total = attack(directory, count, found, seed=0)
            print(f"{name}: {total} of {count} flipped bits found", flush=True)
            missed += count - total
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
