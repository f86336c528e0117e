"""Running a benchmark, a step of it in a process of its own, and the memory that the process takes."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import prefalign_jax
from prefalign_jax.cli.parser import Parser
from prefalign_jax.files import write_json
from prefalign_jax.options import choose, hyper_parameters
from prefalign_jax.tables import aligned
from prefalign_jax.types import UserError

GIB = 2**30
PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}  # --device -> what JAX calls it


def run(benchmarks: Mapping[str, Callable[..., dict[str, Any]]], argv: Sequence[str]) -> None:
    """Runs the benchmark that a command line names, prints a table and writes the figures.

    Args:
      benchmarks: name -> a function whose keyword-only parameters are its options.
      argv: the name, the options, and --out.

    Raises:
      UserError: a mistake in the command line, or a figure that cannot be had.
    """
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print("usage: benchmark.py BENCHMARK [--OPTION=VALUE ...] --out=FILE.json\n")
        print(*(f"  {key:<8}{function.__doc__.splitlines()[0]}" for key, function in benchmarks.items()), sep="\n")
        return
    function = choose("benchmark", name, benchmarks)
    parser, takes = Parser(f"benchmark.py {name}", function.__doc__), hyper_parameters(function)
    writes = takes.pop("out", None) is not None  # the benchmark itself, into a directory
    for option, default in takes.items():
        if isinstance(default, bool):
            parser.add_truth(f"--{option}", f"default: {default}")
        else:
            parser.add_argument(f"--{option}", type=type(default), default=default, help=f"default: {default}")
    metavar = "DIR" if writes else "FILE.json"
    parser.add_argument("--out", required=True, type=Path, metavar=metavar, help="gets options and figures")
    options = vars(parser.read(rest))
    if writes:
        print(table(name, function(**options)))
        return
    out = options.pop("out")
    figures = function(**options)
    print(table(name, figures))
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib")}
    made_by = {"python": platform.python_version(), "processors": os.cpu_count(), **versions}
    made_by["prefalign_jax"] = prefalign_jax.__version__
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"benchmark": name, "options": options, "made by": made_by, "found": figures})


def measured(step: str, **arguments: Any) -> tuple[dict[str, Any], int, int]:
    """Runs a step in a process of its own.

    Args:
      step: MODULE.FUNCTION of this folder.
      **arguments: its arguments; `devices` is how many a CPU simulates.

    Returns:
      (what it returned, peak of its anonymous memory, peak of its file-backed memory), both in bytes.

    Raises:
      UserError: it failed.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={arguments['devices']}".strip()
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-P", "-m", "benchmarks.measuring", step, json.dumps(arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        peaks = (0, 0)
        while child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                peaks = tuple(map(max, peaks, resident(child.pid)))
            time.sleep(0.002)
        text = child.stdout.read()
    if child.returncode:
        raise UserError(f"the process that was to {step} ended with status {child.returncode}")
    return json.loads(text.splitlines()[-1]), *peaks


# Runs a command in place of itself that ends when the process that started it does, however that ends. Linux alone has
# prctl: 1 is PR_SET_PDEATHSIG, 9 SIGKILL. Where that process has ended already, another is the parent.
_TIED = """import ctypes, os, sys
getattr(ctypes.CDLL(None), "prctl", lambda *_: None)(1, 9)
os.getppid() == int(sys.argv[1]) and os.execvp(sys.argv[2], sys.argv[2:])"""


def answer_of(
    command: Sequence[str], device: str, *, seconds: float | None = None, cache: Path | None = None, apart: bool = False
) -> dict[str, Any]:
    """Runs a process on one device and reads the JSON in the last line that it prints.

    Args:
      command: the program and its arguments.
      device: a key of PLATFORMS.
      seconds: it is ended after so many.
      cache: directory of compiled programs; None compiles all anew.
      apart: it is to import nothing of this checkout.

    Returns:
      What it printed.

    Raises:
      subprocess.TimeoutExpired: it took longer.
      UserError: it failed.
    """
    environment = {**os.environ, "JAX_PLATFORMS": PLATFORMS[device], "HF_HUB_OFFLINE": "1"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false" if cache is None else "true"
    if cache is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    environment["JAX_TRACEBACK_FILTERING"] = "off"  # so that an error's last line is the error
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    flags = environment.get("XLA_FLAGS", "").split()
    environment["XLA_FLAGS"] = " ".join(x for x in flags if "device_count" not in x)  # one device, not many simulated
    paths = [str(Path(__file__).parents[1]), *filter(None, [environment.pop("PYTHONPATH", None)])]
    if not apart:
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    tied = [sys.executable, "-S", "-c", _TIED, str(os.getpid()), *command]
    done = subprocess.run(tied, capture_output=True, text=True, env=environment, timeout=seconds)
    if done.returncode:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "no message")
        raise UserError(f"{Path(command[-2]).name} ended with status {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def resident(pid: int) -> tuple[int, int]:
    """Bytes of a process's anonymous and of its file-backed memory, now; 0 once it has ended.

    Raises:
      UserError: the system does not say.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        raise UserError("memory is read from /proc/PID/status, which this system does not have; use Linux") from None
    fields = dict(line.split(":", 1) for line in lines)
    return tuple(1024 * int(fields.get(name, "0").split()[0]) for name in ("RssAnon", "RssFile"))


def table(name: str, figures: dict[str, Any]) -> str:
    """Two columns."""
    rows = [(key, value if isinstance(value, bool | str) else f"{value:,.3f}") for key, value in figures.items()]
    return f"{name}\n{aligned((), rows, indent=2)}"


def main(step: str, arguments: str) -> None:
    """Runs a step in this process and prints what it returns."""
    module, _, function = step.partition(".")
    print(json.dumps(getattr(importlib.import_module(f"benchmarks.{module}"), function)(**json.loads(arguments))))


if __name__ == "__main__":
    main(*sys.argv[1:])
