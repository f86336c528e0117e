"""Trains several runs in one program, as `prefalign sweep --together` does: --runs=FILE.

FILE is a JSON list of {"arguments": [...], "workdir": DIR}, the arguments of `prefalign train`. The runs may differ in
their seeds and numbers alone. The same command goes on where they stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefalign_jax.cli.experiments import config_of
from prefalign_jax.cli.parser import Parser, add_config
from prefalign_jax.exits import STOPPED
from prefalign_jax.files import read_json
from prefalign_jax.types import UserError


def main(argv: Sequence[str]) -> int:
    """Runs what the file names."""
    parser = Parser("prefalign together", __doc__)
    parser.add_argument("--runs", required=True, type=Path, metavar="FILE", help="JSON list of the runs")
    options = parser.read(argv)
    if not options.runs.is_file():
        raise UserError(f"--runs={options.runs}: no such file")
    points = []
    for run in read_json(options.runs, [{"arguments": ["a string"], "workdir": "a string"}]):
        each = Parser("prefalign train", "")
        add_config(each)
        config, words = each.read_with_fields(run["arguments"])
        points.append((config_of(config.config, words), Path(run["workdir"])))
    from prefalign_jax.together import train_together

    return STOPPED if train_together(points) else 0
