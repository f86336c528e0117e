"""Starts two processes that are not one run, in each of ten ways: python scripts/attacks/differences.py.

All of them must be refused before the first step: status 2 in both, and one line that names what differs.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from targets import MODEL, ROOT

FIELDS = {  # what differs, in both processes -> what the line names
    "learning_rate": ("1e-4", "1e-3"),
    "data.limit": ("60", "40"),
    "steps": ("14", "10"),
    "batch_size": ("4", "8"),
    "seed": ("0", "1"),
    "loss.beta": ("0.1", "0.2"),
    "max_length": ("256", "200"),
}


def pair(options: list[list[str]], roots: list[Path], places: list[Path]) -> list[tuple[int, str]]:
    """(exit status, last line) of two processes with options, package and working directory of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for number in (0, 1):
        words = [sys.executable, "-m", "prefalign_jax", "train", "--config=dpo:model=model,data=pairs.jsonl"]
        words += [f"--workdir={places[0] / 'run'}", f"--coordinator=127.0.0.1:{port}", "--processes=2"]
        words += [f"--process={number}", "--heartbeat=30", *options[number]]
        env = {**os.environ, "PYTHONPATH": str(roots[number]), "XDG_CACHE_HOME": str(places[number] / "cache")}
        processes.append(subprocess.Popen(words, cwd=places[number], env=env, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=600)[1] for process in processes]
    return [
        (one.returncode, (text.strip().splitlines() or [""])[-1]) for one, text in zip(processes, said, strict=True)
    ]


def main() -> int:
    """Tries all differences; prints the line of each."""
    refused, total = 0, 0
    usual = {"steps": "10", "batch_size": "4", "max_length": "256"}

    def check(name: str) -> None:
        nonlocal refused, total
        with tempfile.TemporaryDirectory() as scratch:
            places = [Path(scratch) / str(number) for number in (0, 1)]
            for place in places:
                place.mkdir()
                shutil.copytree(MODEL, place / "model")
                shutil.copy(MODEL / "pairs.jsonl", place / "pairs.jsonl")
            roots = [ROOT, ROOT]
            options = [[f"--config.{key}={value}" for key, value in usual.items() if key != name] for _ in (0, 1)]
            if name in FIELDS:
                for number in (0, 1):
                    options[number].append(f"--config.{name}={FIELDS[name][number]}")
            elif name == "training pairs":
                file = places[1] / "pairs.jsonl"
                file.write_text("".join(file.read_text().splitlines(keepends=True)[::-1]))
            elif name == "files of model.path":
                weights = places[1] / "model" / "model.safetensors"
                data = bytearray(weights.read_bytes())
                data[len(data) // 2] ^= 1
                weights.write_bytes(data)
            else:
                roots[1] = Path(scratch) / "code"
                shutil.copytree(ROOT / "prefalign_jax", roots[1] / "prefalign_jax", symlinks=False)
                with (roots[1] / "prefalign_jax" / "optim.py").open("a") as code:
                    code.write("\n# another version\n")
            (first, line), (second, other) = pair(options, roots, places)
        good = first == second == 2 and line == other and f"differ in {'the ' * (name not in FIELDS)}{name}" in line
        print(f"{name}: {'refused' if good else f'NOT REFUSED ({first}, {second}; {other})'}: {line}", flush=True)
        refused, total = refused + good, total + 1

    for name in (*FIELDS, "training pairs", "files of model.path", "code of prefalign_jax"):
        check(name)
    print(f"{refused} of {total} differences refused")
    return int(refused < total)


if __name__ == "__main__":
    sys.exit(main())
