"""Runs every point of an experiment's sweep(): --config=NAME[:ARG] --workdir=DIR [--jobs=N] [--config.FIELD=VALUE ...].

Or of a grid, without a sweep(): --grid loss.beta=0.05,0.1,0.5 --grid learning_rate=1e-4,3e-4 --seeds=8. With both,
every point of sweep() is run with each combination of the grid. A field set by --config.FIELD is set for all points.
The same command goes on where a sweep in DIR was stopped.

--together=N runs points that differ in seeds and numbers alone as members of one program, at most N; auto asks memory.
--devices=0,1,2,3 deals runs and programs to accelerators.

--search=optuna lets Optuna choose values: --range loss.beta=0.01..1,log --grid loss.name=dpo,hinge --trials=20
--metric=eval/rewards/accuracies. Trials that do worse than the median are stopped early.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefalign_jax.cli.parser import Parser, add_config
from prefalign_jax.options import choose
from prefalign_jax.types import UserError

RUN = [sys.executable, "-P", "-m", "prefalign_jax"]  # -P: no file of the directory is taken for a module
TRAIN, TOGETHER = [*RUN, "train"], [*RUN, "together"]


def main(argv: Sequence[str]) -> int:
    """Runs the points that are not done."""
    parser = Parser("prefalign sweep", __doc__)
    add_config(parser)
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="gets the runs, and results.csv")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time, 1 by default")
    numbers = "GPUs or TPU chips, as in 0,1,2,3: on each one run, or one program, at a time, that sees no other"
    parser.add_argument("--devices", metavar="N,N", help=numbers)
    parser.add_argument(
        "--grid", action="append", default=[], metavar="FIELD=VALUES", help="values of a field, with commas; repeatable"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="the seeds 0 to N - 1, as --grid seed=0,1,...")
    how = "points in one program at most: off (1), a number, or auto, as many as memory has room for"
    parser.add_argument("--together", default="off", metavar="N", help=how)
    search = parser.add_argument_group("search, in place of a grid (docs/sweeps.md)")
    search.add_argument("--search", metavar="optuna", help="choose values by what earlier trials gave")
    where = "values between two ends, with ,log evenly in their logarithm; repeatable"
    search.add_argument("--range", action="append", default=[], metavar="FIELD=LOW..HIGH", help=where)
    search.add_argument("--trials", type=int, metavar="N", help="how many trials, those of earlier calls counted")
    search.add_argument("--metric", metavar="NAME", help="a column of eval.jsonl; its last value is a trial's")
    best = "which value of the metric is best; by default min of losses, max of accuracies, margins and samples/reward"
    search.add_argument("--mode", choices=("max", "min"), help=best)
    search.add_argument("--no_pruning", action="store_true", help="let every trial run to its end")
    parser.add_argument("--dry_run", action="store_true", help="print the runs' commands and stop")
    options, words = parser.read_with_fields(argv)
    from prefalign_jax.analysis.sweep import commands, read_grid, read_points, run_sweep

    if options.jobs is not None and options.devices is not None:
        raise UserError("--devices says how many runs there are at a time; leave --jobs out")
    devices = options.devices.split(",") if options.devices is not None else ()
    many = dict(jobs=1 if options.jobs is None else options.jobs, devices=devices)
    if options.search is not None:
        return _search(options, words, many)
    for name in ("range", "trials", "metric", "mode", "no_pruning"):
        if getattr(options, name):
            raise UserError(f"--{name} is a search's; write --search=optuna too, or leave it out")
    points = read_points(options.config, words, read_grid(options.grid, options.seeds))
    if options.dry_run:
        print(*commands(points, options.workdir, TRAIN), sep="\n")
        return 0
    words = {"off": 1, "auto": None}
    together = words.get(options.together, options.together)
    if isinstance(together, str):
        if not together.isdecimal():
            raise UserError(f"--together={together}: write off, auto, or a number of points")
        together = int(together)
    return run_sweep(points, options.workdir, TRAIN, together=together, program=TOGETHER, **many)


def _search(options: argparse.Namespace, words: Sequence[str], many: Mapping[str, Any]) -> int:
    """Runs the trials of a search that are not done."""
    from prefalign_jax.analysis.search import read_search, run_search
    from prefalign_jax.analysis.sweep import check_jobs, read_grid

    choose("--search", options.search, {"optuna": None})
    for name, without in (("seeds", None), ("together", "off"), ("dry_run", False)):
        if getattr(options, name) != without:
            raise UserError(f"--{name} does not fit --search, whose trials are known one after the other; leave it out")
    if options.trials is None or options.trials < 1:
        raise UserError("--search needs --trials=N, at least 1")
    check_jobs(**many)
    what = read_grid(options.grid), options.metric, options.mode, not options.no_pruning
    search = read_search(options.config, words, options.range, *what)
    return run_search(search, options.workdir, TRAIN, options.trials, **many)
