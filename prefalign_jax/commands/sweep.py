"""Runs every point of an experiment's sweep(): --config=NAME[:ARG] --workdir=DIR [--jobs=N] [--config.FIELD=VALUE ...].

A field set here is set for all points. The same command goes on where a sweep in DIR was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from prefalign_jax.cli.parser import Parser, add_config

TRAIN = [sys.executable, "-P", "-m", "prefalign_jax", "train"]  # -P: no file of the directory is taken for a module


def main(argv: Sequence[str]) -> int:
    """Runs the points that are not done."""
    parser = Parser("prefalign sweep", __doc__)
    add_config(parser)
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="gets the runs, and results.csv")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--dry_run", action="store_true", help="print the runs' commands and stop")
    options, words = parser.read_with_fields(argv)
    from prefalign_jax.analysis.sweep import commands, read_points, run_sweep

    points = read_points(options.config, words)
    if options.dry_run:
        print(*commands(points, options.workdir, TRAIN), sep="\n")
        return 0
    return run_sweep(points, options.workdir, TRAIN, jobs=options.jobs)
