"""The commands of the pages: which there are, which of them run here, and what became of those.

A command is a line of a fenced block without a language, or of one in bash, that begins with a program of PROGRAMS.
Other lines are output, or options to add, and are left alone. Words in capitals stand for what a reader has.

All commands run in one copy of the repository, page by page, so a later one finds what an earlier one left. By default
they run in a short form: a training takes 64 pairs without warm-up, a sweep of hours only prints its runs. What was
added is shown.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from prefalign_jax.cli.parser import Parser
from prefalign_jax.tables import aligned
from prefalign_jax.types import UserError

ROOT = Path(__file__).parents[2]
PROGRAMS = ("prefalign", "python", "pip", "export", "JAX_PLATFORMS", "XLA_FLAGS", "mkdocs", "ruff", "git")
# What stands for what the quickstart leaves, the first command of the README. Others are given by --give.
QUICKSTART = "runs/quickstart"
GIVEN = {
    "MODEL": f"{QUICKSTART}/sft/export",
    "DATA": f"{QUICKSTART}/data/train.jsonl",
    "PROMPTS.jsonl": f"{QUICKSTART}/data/held_out.jsonl",
    "PAIRS.jsonl": f"{QUICKSTART}/data/train.jsonl",
    "FILE.json": "runs/file.json",
    "DIR": "runs/dir",
}
NAMES = re.compile(r"(?<![\w.$/])([A-Z][A-Z_]{2,}(?:\.\w+)?|URL)(?![\w=]|_)")
# What a command needs that is not here; the first that fits is said.
NEEDS = (
    (r"\bpip install|-m venv", "the package index"),
    (r"-m pytest", "minutes: CI runs the tests"),
    (r"--device=gpu|benchmark\.py gpu", "a GPU"),
    (r"endpoint:", "an endpoint"),
    (r"--coordinator=", "several processes"),
    (r"prefalign train .*mesh\.", "several devices"),
    (r"--peer=(?!separate)|peer_\w+/", "another trainer's environment"),
    (r"--config=(experiments/)?handbook/(?!.*--model)|--config=experiments/RECIPE", "a model of the hub"),
    (r"--sets=hh-rlhf|harmless-base/|hh-rlhf/|judge_benchmarks", "HH-RLHF or other data that the reader has"),
)
LONG = r"scripts/benchmark\.py"  # measures for minutes
# What the short form adds; the first that fits.
SHORT = (
    (r"prefalign train .*config=quickstart", ""),
    (r"prefalign sweep .*(experiments/papers|config=quickstart)", "--dry_run"),
    (r"config\.job=(pairs|rounds)|method=pairs", "--config.on_policy.limit=16"),
    (r"prefalign (train|inspect)", "--config.data.limit=64 --config.warmup_steps=0"),
    (r"prefalign sweep", "--config.data.limit=64 --config.warmup_steps=0"),
    (r"prefalign (generate|judge-bench)", "--limit=16"),
)


class Command(NamedTuple):
    """A command and where it stands."""

    page: str
    line: int
    text: str


def read(page: str, text: str) -> list[Command]:
    """The commands of a page.

    Example:
      >>> page = "Text.\\n\\n```\\nprefalign train \\\\\\n  --config=dpo  # a minute\\nstep 1/9\\n```\\n"
      >>> read("a.md", page)
      [Command(page='a.md', line=4, text='prefalign train --config=dpo')]
    """
    commands, fenced, inside, parts, first = [], False, False, [], 0
    for number, line in enumerate(text.splitlines(), 1):
        if fence := re.match(r" *```(\w*)", line):
            fenced = not fenced
            inside = fenced and fence[1] in ("", "bash", "sh")
            parts = []
        elif inside:
            first = first if parts else number
            parts.append(line.strip().removesuffix("\\").strip())
            if not line.endswith("\\"):
                whole = re.sub(r"\s+#.*$", "", " ".join(parts))
                if re.split(r"[\s=]", whole)[0] in PROGRAMS:
                    commands.append(Command(page, first, whole))
                parts = []
    return commands


def missing(text: str, given: Mapping[str, str], full: bool, left: Sequence[str] = ()) -> str:
    """Why a command does not run here; "" if it does.

    Args:
      text: the command.
      given: what placeholders stand for.
      full: whether what takes long runs too.
      left: directories that a command before this one would have left, and did not.
    """
    for pattern, reason in NEEDS:
        if re.search(pattern, text):
            return reason
    if names := [name for name in NAMES.findall(text) if name not in given and not re.search(rf"\b{name}=", text)]:
        return f"{', '.join(dict.fromkeys(names))}: give it"
    if not full and re.search(LONG, text):
        return "minutes: --full"
    others = [directory for directory in left if directory not in writes(text)]
    if lacks := [directory for directory in others if re.search(rf"{re.escape(directory)}(?!\w)", text)]:
        return f"{lacks[0]}, which a command before did not write here"
    return ""


def filled(text: str, given: Mapping[str, str], full: bool) -> str:
    """The command as it runs here."""
    text = NAMES.sub(lambda match: given.get(match[1], match[1]), text)
    added = "" if full else next((more for pattern, more in SHORT if re.search(pattern, text)), "")
    return f"{text} {added}".strip()


def writes(text: str) -> list[str]:
    """The directories below runs/ that a command writes."""
    return re.findall(r"--(?:workdir|out)[= ](runs/[\w./]+)", text)


def copy(directory: Path) -> None:
    """The repository's files, as a reader has them after cloning it."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, files.split("\0")):
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    # A loss of one's own, as its page has it.
    page = (ROOT / "docs" / "own_losses.md").read_text(encoding="utf-8")
    loss = re.search(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[1]
    (directory / "my_loss.py").write_text(
        loss.replace('"MODEL"', repr(GIVEN["MODEL"])).replace('"DATA"', repr(GIVEN["DATA"]))
    )


def _path(directory: Path) -> str:
    """PATH with this Python first, and with a `prefalign` where the package is not installed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if not shutil.which("prefalign", path=path):
        print("prefalign is not installed here: python -m prefalign_jax stands in")
        command = directory / "bin" / "prefalign"
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m prefalign_jax "$@"\n', encoding="utf-8")
        command.chmod(0o755)
        path = f"{command.parent}{os.pathsep}{path}"
    return path


def pages() -> list[Path]:
    """README, then docs in the order of their names: the README makes what the others use.

    Pages in Japanese have the same commands, so they are left out.
    """
    docs = ROOT / "docs"
    return [ROOT / "README.md", *sorted({*docs.rglob("*.md")} - {*(docs / "ja").rglob("*.md")})]


def check(directory: Path, given: Mapping[str, str], full: bool, only: str, seconds: float) -> int:
    """Runs what runs here, and prints what became of each command.

    Args:
      directory: scratch; it becomes a copy of the repository.
      given: more placeholders, or others in place of GIVEN's.
      full: run commands as they are written, however long.
      only: run those whose text or page has this; the rest are said to be left out.
      seconds: that a command may take.

    Returns:
      1 if a command failed, else 0.
    """
    copy(directory)
    given = {**GIVEN, **given}
    environment = {**os.environ, "PYTHONPATH": str(directory), "PATH": _path(directory)}
    seen: dict[str, str] = {}
    ran, left, skipped = [], [], []
    for page in pages():
        name = page.relative_to(ROOT).as_posix()
        for command in read(name, page.read_text(encoding="utf-8")):
            place = f"{name}:{command.line}"
            reason = missing(command.text, given, full, left)
            if not reason and command.text in seen:
                reason = f"ran at {seen[command.text]}"
            elif not reason and only and not re.search(only, f"{place} {command.text}"):
                reason = "left out by --only"
            if reason:
                skipped.append((reason, place, command.text))
                left += [] if reason.startswith("ran at") else writes(command.text)
                continue
            seen[command.text] = place
            line = filled(command.text, given, full)
            print(f"{place}: {line}", flush=True)
            began = time.monotonic()
            try:
                done = subprocess.run(
                    ["bash", "-c", line],
                    cwd=directory,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=seconds,
                )
                status, said = done.returncode, done.stdout + done.stderr
            except subprocess.TimeoutExpired as error:
                status, said = "over time", (error.stderr or b"").decode(errors="replace")
            ran.append((status, f"{time.monotonic() - began:.0f}", place, line))
            if status != 0:
                print(f"  {status}: {' | '.join(said.strip().splitlines()[-3:])}", flush=True)
            if status != 0 or "--dry_run" in line:
                left += writes(command.text)
    print("\n" + aligned(("status", "seconds", "where", "what ran"), ran))
    print("\n" + aligned(("did not run here, for it needs", "where", "command"), sorted(skipped)))
    failed = sum(status != 0 for status, *_ in ran)
    print(f"\n{len(ran)} ran, {failed} of them failed; {len(skipped)} did not")
    return int(failed > 0)


def main(what: str) -> int:
    """Reads the command line, of a script that does what is said, and runs the commands."""
    parser = Parser("check_commands.py", what)
    parser.add_argument(
        "--give",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="what a word in capitals stands for; repeatable",
    )
    parser.add_argument("--full", action="store_true", help="commands as they are written: hours")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the place (docs/data.md:12) or the command")
    parser.add_argument(
        "--seconds", type=float, default=600, metavar="N", help="that a command may take (default: 600)"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="run there, and keep what the commands leave")
    args = parser.read(sys.argv[1:])
    pairs = [one.partition("=") for one in args.give]
    if faulty := [one for one, (name, _, path) in zip(args.give, pairs, strict=True) if not name.isupper() or not path]:
        raise UserError(f"--give={faulty[0]}: expected NAME=PATH, such as HARMLESS=data/test.jsonl.gz")
    given = {name: str(Path(path).absolute()) if Path(path).exists() else path for name, _, path in pairs}
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        return check(args.keep.absolute(), given, args.full, args.only, args.seconds)
    with tempfile.TemporaryDirectory() as directory:
        return check(Path(directory), given, args.full, args.only, args.seconds)
