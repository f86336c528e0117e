"""Fills the disk at many moments of a run: python scripts/attacks/full_disk.py 50.

No file of the run may grow beyond a limit (RLIMIT_FSIZE), which the system enforces whatever library writes. The limits
run from one byte to the largest file, so that each stops another write. Each run must end with status 1 and one line,
and the same command without a limit must then leave what an undisturbed run leaves.
"""

from __future__ import annotations

import functools
import resource
import sys
import tempfile
from pathlib import Path

from started import import_all
from targets import final_files, run, words_of


def limited(size: int) -> None:
    """In the child: files of at most so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def main(count: int, name: str = "lora") -> int:
    """Attacks one command; prints a line for each moment at which something was not as it should be."""
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plain" / "out"
        status, said = run(words_of(name, plain, plain))
        if status:
            print(said)
            return 1
        wanted = final_files(plain)
        largest = max(file.stat().st_size for file in plain.rglob("*") if file.is_file())
        for moment in range(count):
            size = max(1, int(largest ** (moment / count)))
            out = Path(scratch) / str(moment) / "out"  # the name of the directory is that of the model
            status, said = run(words_of(name, out, out), functools.partial(limited, size))
            last = said.strip().splitlines()[-1:] or [""]
            wrong = []
            if status != 1 or not last[0].startswith("error: ") or "Traceback" in said:
                wrong.append(f"status {status}: {last[0][:200]}")
            status, said = run(words_of(name, out, out))
            found = final_files(out)
            if status or found != wanted:
                different = sorted(file for file in {*wanted, *found} if wanted.get(file) != found.get(file))
                wrong.append(f"afterwards status {status}, {different}")
            for line in wrong:
                print(f"limit of {size} bytes: {line}", flush=True)
            failed += bool(wrong)
    print(f"disk full at {count} moments: {count - failed} ended with one line and went on to the same files")
    return int(failed > 0)


if __name__ == "__main__":
    import_all()
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 8, *sys.argv[2:]))
