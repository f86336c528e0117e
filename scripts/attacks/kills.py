"""Kills commands at random moments: python scripts/attacks/kills.py 300 [NAME ...].

Each of the commands in targets.COMMANDS is killed (SIGKILL) a share of the number given, up to five times in one
directory, and then let finish. The moments lie anywhere in the life of the command that nothing disturbs. The final
files must be bit for bit those of the same command undisturbed, and nothing hidden may stay. Of a sweep either all
processes are killed, or the sweep alone, whose run lives on. Prints a row for each command.
"""

from __future__ import annotations

import itertools
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from started import Command, Server, import_all
from targets import COMMANDS, differing, final_files, run, undisturbed

IN_A_ROW = 5  # kills of one directory before it may finish


class Tally(NamedTuple):
    """What became of a command's kills: those that met it alive, the directories, and those that went wrong."""

    kills: int
    directories: int
    wrong: int


def hidden(out: Path) -> list[str]:
    """Temporary files and directories that were left."""
    return [path.name for path in out.rglob(".*") if path.name.endswith((".part", ".new", ".old", ".unfinished"))]


def attack(name: str, count: int, scratch: Path, server: Server, draw: random.Random) -> Tally:
    """Kills one command until `count` kills have met it alive."""
    words, out, took, wanted = undisturbed(name, scratch)
    met, wrong = 0, 0
    for number in itertools.count(1):
        shutil.rmtree(out, ignore_errors=True)
        times = min(draw.randint(1, IN_A_ROW), count - met)
        moments = []
        status, said = None, ""
        while len(moments) < times and status is None:
            moments.append(draw.uniform(0, took))
            command = Command(words)
            status = command.wait(moments[-1])
            if status is None:
                command.kill()
                met += 1
                if draw.random() < 0.5:
                    server.kill_runs()
            said = command.said()
        if status is None:
            status, said = run(words)
        different = differing(final_files(out), wanted)
        if status or different or hidden(out) or "Traceback" in said:
            wrong += 1
            shown = ", ".join(f"{moment / took:.2f}" for moment in moments)
            print(f"{name}, killed at {shown}: status {status}, {different}, {hidden(out)}, {said[-500:]}", flush=True)
        if met >= count:
            return Tally(met, number, wrong)


def main(count: int, *names: str) -> int:
    """Attacks the commands, each a share of the kills."""
    draw, failed = random.Random(0), 0
    names = names or tuple(COMMANDS)
    print("| command | kills | directories | went wrong | seconds |\n|---|---|---|---|---|", flush=True)
    for number, name in enumerate(names):
        share = count // len(names) + (number < count % len(names))
        if share:
            with tempfile.TemporaryDirectory() as scratch:
                began, server = time.monotonic(), Server(Path(scratch) / "server")
                try:
                    tally = attack(name, share, Path(scratch), server, draw)
                finally:
                    server.close()
            seconds = time.monotonic() - began
            print(f"| {name} | {tally.kills} | {tally.directories} | {tally.wrong} | {seconds:.0f} |", flush=True)
            failed += tally.wrong
    return int(failed > 0)


if __name__ == "__main__":
    import_all()
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 40, *sys.argv[2:]))
