"""The commands: `prefalign NAME ...`, `python -m prefalign_jax NAME ...`, and each as scripts/NAME.py.

A command is a module here with `main(argv)`, which reads its options and makes one call. What takes long to import is
imported when it is needed, so that --help and a mistyped option answer at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from absl import logging

from prefalign_jax import __version__
from prefalign_jax.cli.experiments import experiments
from prefalign_jax.cli.parser import set_environment
from prefalign_jax.exits import status_of
from prefalign_jax.options import did_you_mean
from prefalign_jax.types import UserError

# Name -> what it does. The module has the same name, with _ for -.
COMMANDS = {
    "train": "runs an experiment: data, training, evaluation, export",
    "sweep": "runs every point of an experiment's sweep()",
    "together": "trains several runs that differ in numbers alone in one program",
    "report": "compares runs in a page",
    "export": "turns a kept checkpoint of a run into a Hugging Face directory",
    "generate": "samples responses to prompts",
    "evaluate": "measures a model on held-out pairs",
    "judge": "compares two models' samples",
    "judge-bench": "measures judges on benchmarks of judges",
    "inspect": "shows what an experiment would train on",
    "plan": "says what a step takes on devices that are not here",
    "list": "names experiments, losses, families, formats and templates",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: its name and what follows; the process's own by default.

    Returns:
      The exit status: 2 after a mistake of the user's, which is printed as one line.
    """
    return status_of(lambda: _run(*(sys.argv[1:] if argv is None else argv)))


def _run(name: str = "--help", *rest: str) -> int | None:
    if name in ("-h", "--help", "help"):
        print("usage: prefalign COMMAND [OPTION ...]\n")
        print(*(f"  {command:<12}{what}" for command, what in COMMANDS.items()), sep="\n")
        print("\nprefalign COMMAND --help lists its options. To begin: prefalign train --config=quickstart")
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        if name.split(":")[0] in experiments():
            raise UserError(f"{name!r} is an experiment; write prefalign train --config={name}")
        if name.startswith("-"):
            raise UserError(
                f"{name} comes after a command, such as prefalign train {name}; there are {', '.join(COMMANDS)}"
            )
        raise UserError(f"no command {name!r}; {did_you_mean(name, COMMANDS)}there are {', '.join(COMMANDS)}")
    set_environment()
    logging.set_verbosity(logging.WARNING)  # Orbax and Grain report their inner life at INFO
    try:
        return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").main(rest)
    except SystemExit as end:  # argparse's, after --help
        return end.code
