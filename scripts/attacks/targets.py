"""Small commands that are attacked, and what of their files must be the same however often they are."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from started import Command

ROOT = Path(__file__).parents[2]
CACHE = Path(tempfile.gettempdir()) / "prefalign_jax_attacks"
# Before jax is imported: one device, no network, this checkout's package, every compiled program kept.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
ENVIRONMENT |= {"XDG_CACHE_HOME": str(CACHE), "JAX_COMPILATION_CACHE_DIR": str(CACHE / "programs")}
ENVIRONMENT |= {"TOKENIZERS_PARALLELISM": "false", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
os.environ |= ENVIRONMENT
sys.path.insert(0, str(ROOT))
MODEL = ROOT / "tests" / "goldens" / "trl"
RUN = "steps=24 save_steps=3 eval_steps=8 batch_size=4 max_length=256 log_steps=1 data.limit=48"
RUN += f" data.eval_path={MODEL / 'pairs.jsonl'} data.eval_limit=8 learning_rate=1e-3"
# A name -> the command's words; OUT is where it writes, INPUTS what `make_inputs` made.
COMMANDS = {
    "dpo": "train dpo",
    "cached reference": "train dpo reference.kind=cached",
    "lora": "train dpo lora.rank=4",
    "orpo": "train orpo",
    "rounds": "train dpo job=rounds on_policy.rounds=2 on_policy.prompts=INPUTS/prompts.jsonl on_policy.pairing=all"
    " samples.reward=more_words samples.max_new_tokens=8 steps=9",
    "generate": "generate --model=MODEL --prompts=PAIRS --out=OUT/samples.jsonl --n=2 --limit=24 --max_new_tokens=24",
    "judge": "judge --first=INPUTS/first.jsonl --second=INPUTS/second.jsonl --judge=reward:kindness --out=OUT",
    "sweep": "sweep --config=INPUTS/sweep.py --workdir=OUT",
    "sweep together": "sweep --config=INPUTS/sweep.py --workdir=OUT --together=2",
}
_LEFT_OUT = re.compile(r"(^|/)(\.lock|\.point_lock|log\.txt|tokens/.*)$|(checkpoints|tensorboard)/|\.png$")
_MEASURED = re.compile(r"time|per_second|memory|input_wait|seconds|tokens$|flops")  # of a clock, or of sums over it


def words_of(name: str, out: Path, inputs: Path) -> list[str]:
    """The words of a name in COMMANDS."""
    first, *words = COMMANDS[name].split()
    if first == "train":
        loss, *fields = words
        data = "" if "job=rounds" in fields else f",data={MODEL / 'pairs.jsonl'}"
        words = [f"--config={loss}:model={MODEL}{data}", f"--workdir={out}"]
        words += [f"--config.{field}" for field in [*RUN.split(), *fields]]
        words += [f"--config.data.cache_dir={out / 'tokens'}"]
    places = {"MODEL": MODEL, "PAIRS": MODEL / "pairs.jsonl", "OUT": out, "INPUTS": inputs}
    for place, path in places.items():
        words = [re.sub(rf"\b{place}\b", str(path), word) for word in words]
    return [first, *words]


def make_inputs(directory: Path) -> None:
    """Writes what the commands read: two models' samples, prompts, and a sweep of two points."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = ("The cat sat", "A dog ran", "In the house", "We saw it")
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    for name, text in (("first", "What a kind and lovely answer"), ("second", "No")):
        rows = ({"prompt": f"prompt {n}", "response": f"{text} {n}", "model": name} for n in range(2000))
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "sweep.py").write_text(
        "from prefalign_jax.config import defaults\n\n\ndef get_config(arg=''):\n    c = defaults('dpo')\n"
        f"    c.model.path, c.data.path = {str(MODEL)!r}, {str(MODEL / 'pairs.jsonl')!r}\n"
        "    c.steps, c.batch_size, c.max_length, c.save_steps, c.log_steps, c.data.limit = 12, 4, 256, 3, 1, 48\n"
        "    c.tensorboard, c.learning_rate = False, 1e-3\n    return c\n\n\n"
        "def sweep():\n    return [{'seed': seed} for seed in (0, 1)]\n"
    )


def run(words: list[str]) -> tuple[int, str]:
    """(exit status, what it said) of a command that nothing disturbs."""
    command = Command(words)
    return command.wait(), command.said()


def undisturbed(name: str, scratch: Path) -> tuple[list[str], Path, float, Mapping[str, str]]:
    """(words of a command, where it writes, how many seconds it takes, its final files); files name the place."""
    inputs, out = scratch / "inputs", scratch / "out"
    make_inputs(inputs)
    words, seconds, files = words_of(name, out, inputs), 0.0, {}
    for _ in range(2):  # the second run finds its programs compiled, as those that are attacked do
        shutil.rmtree(out, ignore_errors=True)
        began = time.monotonic()
        status, said = run(words)
        seconds = time.monotonic() - began
        if status:
            raise SystemExit(f"{name}: {said}")
        files = final_files(out)
    return words, out, seconds, files


def differing(files: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """The names of the files that are not alike, or not in both."""
    return sorted(name for name in {*wanted, *files} if wanted.get(name) != files.get(name))


def final_files(out: Path) -> Mapping[str, str]:
    """Name -> digest of what a finished command leaves, without what a clock measured and without caches' names."""
    files = {}
    for file in sorted(out.rglob("*")):
        name = file.relative_to(out).as_posix()
        if not file.is_file() or _LEFT_OUT.search(name):
            continue
        files[name] = hashlib.sha256(_without_clock(file, str(out))).hexdigest()
    return files


def _without_clock(file: Path, out: str) -> bytes:
    if file.name in ("metrics.jsonl", "eval.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [{key: value for key, value in row.items() if not _MEASURED.search(key)} for row in rows]
        return json.dumps(kept).encode()
    if file.name in ("results.csv", "results.json", "point.json"):
        return b""  # hold times and places
    return file.read_bytes().replace(out.encode(), b"OUT")
