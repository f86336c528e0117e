"""Fills the disk at many moments of a command: python scripts/attacks/full_disk.py 50 [NAME ...].

At a random moment of its life no file of the command may grow beyond a random size any more (RLIMIT_FSIZE), which the
system enforces whatever library writes. The command must end with status 1 and one line. The same command without a
limit must then leave what an undisturbed one leaves.
"""

from __future__ import annotations

import itertools
import random
import resource
import shutil
import sys
import tempfile
from pathlib import Path

from started import Command, import_all
from targets import differing, final_files, run, undisturbed

COMMANDS = ("dpo", "cached reference", "lora", "rounds", "generate", "judge")


def attack(name: str, count: int, scratch: Path, draw: random.Random) -> int:
    """Fills the disk until `count` runs have met it; how many did not end as they should."""
    words, out, took, wanted = undisturbed(name, scratch)
    largest = max(file.stat().st_size for file in out.rglob("*") if file.is_file())
    met, wrong = 0, 0
    for moment in itertools.count():
        shutil.rmtree(out, ignore_errors=True)
        # Every other limit is there from the start, where each size stops another file.
        at, size = draw.uniform(0, took) * (moment % 2), int(largest ** draw.uniform(0, 1))
        command = Command(words)
        status = command.wait(at) if at else None
        if status is None:
            resource.prlimit(command.process.pid, resource.RLIMIT_FSIZE, (size, size))
            status = command.wait()
        said = command.said()
        if status == 0:  # it had written all that is larger
            continue
        met += 1
        last = (said.strip().splitlines() or [""])[-1]
        faults = []
        if status != 1 or said.count("error: ") != 1 or not last.startswith("error: ") or "Traceback" in said:
            faults.append(f"status {status}: {said[-500:]}")
        status, said = run(words)
        different = differing(final_files(out), wanted)
        if status or different:
            faults.append(f"afterwards status {status}, {different}, {said[-300:] if status else ''}")
        for fault in faults:
            print(f"{name}, limit of {size} bytes after {at:.1f} s: {fault}", flush=True)
        wrong += bool(faults)
        if met == count:
            return wrong


def main(count: int, *names: str) -> int:
    """Attacks the commands, each a share of the moments."""
    draw, failed = random.Random(0), 0
    names = names or COMMANDS
    print("| command | disk full | went wrong |\n|---|---|---|", flush=True)
    for number, name in enumerate(names):
        if share := count // len(names) + (number < count % len(names)):
            with tempfile.TemporaryDirectory() as scratch:
                wrong = attack(name, share, Path(scratch), draw)
            print(f"| {name} | {share} | {wrong} |", flush=True)
            failed += wrong
    return int(failed > 0)


if __name__ == "__main__":
    import_all()
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 12, *sys.argv[2:]))
