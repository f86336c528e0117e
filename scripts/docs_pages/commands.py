"""The commands of the pages: which there are, which of them run here, and what became of those.

A command is a line of a fenced block without a language, or of one in bash, that begins with a program of PROGRAMS. In
prose it is code that begins with one and has arguments. Code with three dots is a part of a command. Other lines are
output, or options to add, and are left alone. Words in capitals stand for what a reader has.

All commands run in one copy of the repository, page by page, so a later one finds what an earlier one left. By default
they run in a short form: a training takes 64 pairs without warm-up, a sweep of hours only prints its runs, and devices
are simulated. What was added is shown.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from prefalign_jax.cli.parser import Parser
from prefalign_jax.tables import aligned, markdown
from prefalign_jax.types import UserError

ROOT = Path(__file__).parents[2]
PROGRAMS = ("prefalign", "python", "pip", "export", "for", "mkdocs", "ruff", "git", "sbatch", "docker")
BEGINS = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:(?:{'|'.join(PROGRAMS)}) |scripts/launch/)")
# What stands for what the quickstart leaves, the first command of the README. Others are given by --give.
QUICKSTART = "runs/quickstart"
GIVEN = {
    "MODEL": f"{QUICKSTART}/sft/export",
    "DATA": f"{QUICKSTART}/data/train.jsonl",
    "EXPERIMENT": f"dpo:model={QUICKSTART}/sft/export,data={QUICKSTART}/data/train.jsonl",
    "PROMPTS.jsonl": f"{QUICKSTART}/data/held_out.jsonl",
    "PAIRS.jsonl": f"{QUICKSTART}/data/train.jsonl",
    "WORKDIR": "runs/dpo",
    "STEP": "last",
    "FILE.json": "runs/file.json",
    "DIR": "runs/dir",  # of its own for every command that runs
    "HOST": "localhost",
    "PORT": "12357",
    "IMAGE": "prefalign",
    "CLAIM": "runs",
    "CHECKOUT": ".",
}
NAMES = re.compile(r"(?<![\w.$/])([A-Z][A-Z_]{2,}(?:\.\w+)?|URL)(?![\w=]|_)")
# What a command needs that is not here; the first that fits is said.
NEEDS = (
    (r"--device=gpu|benchmark\.py gpu|\[cuda\]", "a GPU"),
    (r"--peer=(?!separate)|peer_\w+", "another trainer's environment"),
    (r"\bparity\b|models_page", "PyTorch, gigabytes"),
    (r"endpoint:", "an endpoint"),
    (r"^sbatch|tpu_pod", "a cluster"),
    (r"^docker", "Docker"),
    (r"(train|single_host\.sh) .*--config=(experiments/)?handbook/|--config=experiments/RECIPE", "a model of the hub"),
    (r"check_commands", "nothing: it is this script"),
)
INDEX = r"\bpip install|-m venv"
DEVICES = "JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8"
FEW = "--config.data.limit=64 --config.warmup_steps=0"
# The short form of a command, where {} is the command; the first that fits.
SHORT = (
    (r"-m pytest", "{} tests/test_imports.py"),
    (r"benchmark\.py train", "{} --shape=tiny --lengths=16+8x4 --max_length=64"),
    (r"benchmark\.py prefix", "{} --batches=2 --layers=1 --width=64 --vocabulary=256 --shorter=16"),
    (r"benchmark\.py cost", "{} --tokens=8 --vocabulary=256 --layers=1 --width=64 --pairs=2 --steps=2"),
    (r"benchmark\.py members", "{} --members=2 --shape=tiny"),
    (r"benchmark\.py pack", "{} --vocabulary=1024"),
    (r"benchmark\.py data", "{} --pairs=1e3"),
    (r"benchmark\.py import", "{} --params=1e7"),
    (r"prefalign plan (?!.*--model)", "{} --model=mistral-7b"),
    (r"--help|prefalign train .*config=quickstart", "{}"),
    (
        r"prefalign train .*smollm2",
        "{} --config.steps=2 --config.warmup_steps=0 --config.data.eval_limit=8 --config.samples.max_new_tokens=2",
    ),
    (r"prefalign sweep .*(experiments/|config=quickstart|--grid .*--grid .*--seeds)", "{} --dry_run"),
    (r"config\.job=(pairs|rounds)|method=pairs", "{} --config.on_policy.limit=16"),
    (r"prefalign train .*mesh\.", f"{DEVICES} {{}} {FEW}"),
    (r"prefalign sweep .*--search", f"{{}} --trials=2 {FEW}"),
    (r"prefalign sweep .*dpo_vs_orpo", f"{{}} {FEW} --config.max_length=256"),
    (r"prefalign sweep .*--seeds", f"{{}} --seeds=1 {FEW}"),
    (r"prefalign (train|inspect|sweep)", f"{{}} {FEW}"),
    (r"prefalign (generate|judge-bench)", "{} --limit=16"),
)

AGAIN = "nothing: it ran at "  # begins the reason of a command that an earlier page has too
HEAD = ("page", "commands", "ran", "failed", "had run before", "did not run, for it needs")


class Command(NamedTuple):
    """A command and where it stands."""

    page: str
    line: int
    text: str


class Outcome(NamedTuple):
    """What became of a command.

    Attributes:
      command: as the page has it.
      line: as it ran; "" if it did not.
      status: 0, another exit status, or "over time".
      seconds: that it took.
      reason: why it did not run; "" if it did.
    """

    command: Command
    line: str = ""
    status: int | str = 0
    seconds: int = 0
    reason: str = ""


def read(page: str, text: str) -> list[Command]:
    """The commands of a page. Lines of one block that start processes of one run are one command.

    Example:
      >>> page = "Text.\\n\\n```\\nprefalign train \\\\\\n  --config=dpo  # a minute\\nstep 1/9\\n```\\n"
      >>> for command in read("a.md", page + "See `prefalign list losses`."):
      ...     print(command)
      Command(page='a.md', line=4, text='prefalign train --config=dpo')
      Command(page='a.md', line=8, text='prefalign list losses')
    """
    commands, fenced, inside, parts, first = [], False, False, [], 0
    prose = []  # the same lines, those of blocks empty
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r" *```(\w*)", line)
        prose.append("" if fence or fenced else line)
        if fence:
            fenced = not fenced
            inside = fenced and fence[1] in ("", "bash", "sh")
            parts = []
        elif inside:
            first = first if parts else number
            parts.append(line.strip().removesuffix("\\").strip())
            if not line.endswith("\\"):
                whole = re.sub(r"\s+#.*$", "", " ".join(parts))
                if "--process=" in whole and commands and "--process=" in commands[-1].text:
                    commands[-1] = commands[-1]._replace(text=f"{commands[-1].text} & {whole}")
                elif BEGINS.match(whole):
                    commands.append(Command(page, first, whole))
                parts = []
    prose = "\n".join(prose)
    for code in re.finditer(r"`([^`]+)`", prose):
        whole = " ".join(code[1].split())
        if BEGINS.match(whole) and len(whole.split()) > 1 + whole.startswith("prefalign") and "..." not in whole:
            commands.append(Command(page, prose.count("\n", 0, code.start()) + 1, whole))
    return sorted(commands, key=lambda command: command.line)


def missing(text: str, given: Mapping[str, str], fresh: bool, left: Mapping[str, str]) -> str:
    """Why a command does not run here; "" if it does.

    Args:
      text: the command.
      given: what placeholders stand for.
      fresh: whether packages may be installed.
      left: directories that a command before this one would have left, and why it did not.
    """
    needs = [*NEEDS, *([] if fresh else [(INDEX, "the package index: --fresh")])]
    for pattern, reason in needs:
        if re.search(pattern, text):
            return reason
    if names := [name for name in NAMES.findall(text) if name not in given and not re.search(rf"\b{name}=", text)]:
        return f"{', '.join(dict.fromkeys(names))}: give it"
    for directory, reason in left.items():
        if directory not in writes(text) and re.search(rf"{re.escape(directory)}(?!\w)", text):
            return reason
    return ""


def filled(text: str, given: Mapping[str, str], full: bool) -> str:
    """The command as it runs here."""
    if loop := re.fullmatch(r"(for .*?; do )(.*)(; done)", text):
        return loop[1] + filled(loop[2], given, full) + loop[3]
    if " & " in text:
        return " & ".join(filled(part, given, full) for part in text.split(" & ")) + " && wait $!"
    text = NAMES.sub(lambda match: given.get(match[1], match[1]), text)
    if full:
        return text
    text = re.sub(r"(attacks/\w+\.py) \d+", r"\1 1", text)
    return next((form.format(text) for pattern, form in SHORT if re.search(pattern, text)), text)


def writes(text: str) -> list[str]:
    """The directories below runs/ that a command writes."""
    return [directory.rstrip("/") for directory in re.findall(r"--(?:workdir|out)[= ](runs/[\w./]+)", text)]


def copy(directory: Path) -> None:
    """The repository's files, as a reader has them after cloning it."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, files.split("\0")):
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a link to a directory would take the copy into it
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    # A loss of one's own, as its page has it.
    page = (ROOT / "docs" / "own_losses.md").read_text(encoding="utf-8")
    loss = re.search(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[1]
    (directory / "my_loss.py").write_text(
        "# ruff: noqa\n" + loss.replace('"MODEL"', repr(GIVEN["MODEL"])).replace('"DATA"', repr(GIVEN["DATA"]))
    )


def _environment(directory: Path, fresh: bool) -> dict[str, str]:
    """Variables for the commands: PATH with this Python first, and with a `prefalign` where it is not installed.

    Where packages are installed, the .venv that README makes comes first. The package is then the one installed there.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    others = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if fresh:
        return {**others, "PATH": f"{directory / '.venv' / 'bin'}{os.pathsep}{path}"}
    if not shutil.which("prefalign", path=path):
        print("prefalign is not installed here: python -m prefalign_jax stands in")
        command = directory / "bin" / "prefalign"
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m prefalign_jax "$@"\n', encoding="utf-8")
        command.chmod(0o755)
        path = f"{command.parent}{os.pathsep}{path}"
    return {**others, "PYTHONPATH": str(directory), "PATH": path}


def pages() -> list[Path]:
    """README, docs in the order of their names, CONTRIBUTING: the README makes what the others use.

    Pages in Japanese have the same commands, so they are left out.
    """
    docs = ROOT / "docs"
    english = sorted({*docs.rglob("*.md")} - {*(docs / "ja").rglob("*.md")})
    return [ROOT / "README.md", *english, ROOT / "CONTRIBUTING.md"]


def run(line: str, directory: Path, environment: Mapping[str, str], seconds: float) -> tuple[int | str, str]:
    """Exit status, or "over time", and what it printed. Past its time it ends with all that it started."""
    process = subprocess.Popen(
        ["bash", "-c", line],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "over time", process.communicate()[0]


def listing(outcomes: Sequence[Outcome]) -> str:
    """What ran, what did not and why, and the sums of each page: a table in Markdown."""
    ran = [(one.status, one.seconds, _place(one.command), one.line) for one in outcomes if one.line]
    others = sorted((one.reason, _place(one.command), one.command.text) for one in outcomes if one.reason)
    failed = sum(status != 0 for status, *_ in ran)
    pages: dict[str, list[Outcome]] = {}
    for one in outcomes:
        pages.setdefault(one.command.page, []).append(one)
    parts = (
        aligned(("status", "seconds", "where", "what ran"), ran),
        aligned(("did not run here, for it needs", "where", "command"), others),
        markdown(HEAD, [(page, *sums(here)) for page, here in pages.items()]),
        f"{len(outcomes)} commands: {len(ran)} ran, {failed} of them failed; {len(others)} did not",
    )
    return "\n\n".join(parts)


def sums(outcomes: Sequence[Outcome]) -> tuple[int, int, int, int, str]:
    """The cells of HEAD but the first: commands, those that ran, failed, had run, and what the others need."""
    reasons = Counter(re.sub(r"^.*, which failed", "one that failed", one.reason) for one in outcomes)
    again = sum(reasons.pop(reason) for reason in [*reasons] if reason.startswith(AGAIN))
    ran = reasons.pop("", 0)
    needs = ", ".join(f"{reason} {number}" for reason, number in sorted(reasons.items()))
    return len(outcomes), ran, sum(one.status != 0 for one in outcomes), again, needs


def _place(command: Command) -> str:
    return f"{command.page}:{command.line}"


class Options(NamedTuple):
    """What runs, and how: the options of the script.

    Attributes:
      given: more placeholders, or others in place of GIVEN's.
      full: run commands as they are written, however long.
      fresh: install the package as README says, into the copy's .venv, and run everything there.
      only: run those whose text or page has this; the rest are said to be left out.
      seconds: that a command may take.
    """

    given: Mapping[str, str]
    full: bool
    fresh: bool
    only: str
    seconds: float


def check(directory: Path, options: Options) -> int:
    """Runs what runs here, and prints what became of each command.

    Args:
      directory: scratch; it becomes a copy of the repository. What passed in it before is not run again.
      options: what runs, and how.

    Returns:
      1 if a command failed, else 0.
    """
    copy(directory)
    record = directory / "passed.json"  # command as it ran -> seconds
    passed = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    environment = _environment(directory, options.fresh)
    seen: dict[str, str] = {}
    left: dict[str, str] = {}
    outcomes = []
    for page in pages():
        name = page.relative_to(ROOT).as_posix()
        for command in read(name, page.read_text(encoding="utf-8")):
            place = _place(command)
            given = {**GIVEN, "DIR": f"runs/{page.stem}_{command.line}", **options.given}
            line = filled(command.text, given, options.full)
            reason = missing(command.text, given, options.fresh, left)
            if not reason and command.text in seen:
                reason = f"{AGAIN}{seen[command.text]}"
            elif not reason and line not in passed and not re.search(options.only, f"{place} {command.text}"):
                reason = "left out by --only"
            if reason:
                outcomes.append(Outcome(command, reason=reason))
                left |= {} if reason.startswith(AGAIN) else dict.fromkeys(writes(command.text), reason)
                continue
            seen[command.text] = place
            status, took = 0, passed.get(line)
            if took is None:
                print(f"{place}: {line}", flush=True)
                began = time.monotonic()
                status, said = run(line, directory, environment, options.seconds)
                took = round(time.monotonic() - began)
                said_at = directory / "said" / place.replace("/", "_")
                said_at.parent.mkdir(exist_ok=True)
                said_at.write_text(said, encoding="utf-8")
                if status == 0:
                    passed[line] = took
                    record.write_text(json.dumps(passed, indent=1), encoding="utf-8")
                else:
                    print(f"  {status}: {' | '.join(said.strip().splitlines()[-3:])}", flush=True)
                    left |= dict.fromkeys(writes(command.text), f"{place}, which failed")
            outcomes.append(Outcome(command, line, status, took))
            if "--dry_run" in line:
                left |= dict.fromkeys(writes(command.text), "hours: --full")
    print("\n" + listing(outcomes))
    return int(any(one.status != 0 for one in outcomes))


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
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="install the package and its extras into a new environment, as README says, and run everything there",
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="of the place (docs/data.md:12) or the command")
    parser.add_argument(
        "--seconds", type=float, default=600, metavar="N", help="that a command may take (default: 600)"
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="run there, and keep what the commands leave; what passed there before is not run again",
    )
    args = parser.read(sys.argv[1:])
    pairs = [one.partition("=") for one in args.give]
    if faulty := [one for one, (name, _, path) in zip(args.give, pairs, strict=True) if not name.isupper() or not path]:
        raise UserError(f"--give={faulty[0]}: expected NAME=PATH, such as HARMLESS=data/test.jsonl.gz")
    given = {name: str(Path(path).absolute()) if Path(path).exists() else path for name, _, path in pairs}
    options = Options(given, args.full, args.fresh, args.only, args.seconds)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        return check(args.keep.absolute(), options)
    with tempfile.TemporaryDirectory() as directory:
        return check(Path(directory), options)
