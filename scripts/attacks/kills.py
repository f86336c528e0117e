"""Kills commands at random moments: python scripts/attacks/kills.py 300 [NAME].

Each of the commands in targets.COMMANDS is killed (SIGKILL) a share of the number given, a few times in one directory,
and then let finish. Its final files must be bit for bit those of the same command undisturbed, and nothing hidden may
stay.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from targets import COMMANDS, environment, final_files, make_inputs, run, words_of

IN_A_ROW = 3  # kills of one directory before it may finish


def kill_once(words: list[str], seconds: float) -> bool:
    """Starts a command and kills it, with all its children, after some time; whether it was still running."""
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    alive = process.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return alive


def hidden(out: Path) -> list[str]:
    """Temporary files and directories that were left."""
    return [path.name for path in out.rglob(".*") if path.name.endswith((".part", ".new", ".old", ".unfinished"))]


def attack(name: str, count: int, scratch: Path, draw: random.Random) -> tuple[int, int]:
    """(kills that met a living process, directories whose final files were not the undisturbed ones)."""
    inputs, plain = scratch / "inputs", scratch / "plain" / "out"
    make_inputs(inputs)
    for out in (plain, scratch / "warm" / "out"):  # the second finds its programs compiled, as those to be killed do
        began = time.monotonic()
        status, said = run(words_of(name, out, inputs))
        took = time.monotonic() - began
        if status:
            raise SystemExit(f"{name}: {said}")
    wanted, met, wrong = final_files(plain), 0, 0
    for number in range(-(-count // IN_A_ROW)):
        out = scratch / str(number) / "out"  # the name of the directory is that of the model
        for _ in range(min(IN_A_ROW, count - number * IN_A_ROW)):
            met += kill_once(words_of(name, out, inputs), draw.uniform(0.3, 1.0) * took)
        status, said = run(words_of(name, out, inputs))
        found = final_files(out) if out.exists() else {}
        different = sorted(file for file in {*wanted, *found} if wanted.get(file) != found.get(file))
        if status or different or hidden(out):
            wrong += 1
            print(f"{name}, directory {number}: status {status}, {different or hidden(out) or said[-300:]}", flush=True)
    return met, wrong


def main(count: int, *names: str) -> int:
    """Attacks the commands, each a share of the kills."""
    draw, failed = random.Random(0), 0
    names = names or tuple(COMMANDS)
    for number, name in enumerate(names):
        share = count // len(names) + (number < count % len(names))
        if share:
            with tempfile.TemporaryDirectory() as scratch:
                met, wrong = attack(name, share, Path(scratch), draw)
            print(f"{name}: {met} of {share} kills met a living process; {wrong} directories went wrong", flush=True)
            failed += wrong
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, *sys.argv[2:]))
