"""Runs every point of an experiment's sweep(): --config=FILE.py[:ARG] --workdir=DIR [--jobs=N] [--config.x=y ...]."""

import sys
from pathlib import Path

from prefalign_jax import cli
from prefalign_jax.analysis.sweep import commands, read_points, run_sweep
from prefalign_jax.types import UserError


def main() -> int:
    """Reads the command line; what begins with --config. goes to all points."""
    parser = cli.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="experiment with a sweep(): FILE.py or FILE.py:ARG")
    parser.add_argument("--workdir", required=True, type=Path, help="gets a directory for each point, and results.csv")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--dry_run", action="store_true", help="print the runs' commands and stop")
    options, common = parser.parse_known_args()
    for before, word in zip(["", *common], common, strict=False):
        value = before.startswith("--config.") and "=" not in before
        if not value and not word.startswith(("--config.", "--noconfig.")):
            raise UserError(f"unexpected argument {word!r}; options for all points are written --config.name=value")
    points = read_points(options.config, common)
    command = [sys.executable, str(Path(__file__).with_name("train.py"))]
    if options.dry_run:
        print(*commands(points, options.workdir, command), sep="\n")
        return 0
    return run_sweep(points, options.workdir, command, jobs=options.jobs)


if __name__ == "__main__":
    sys.exit(cli.status_of(main))
