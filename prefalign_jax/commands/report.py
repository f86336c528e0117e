"""Reports on runs and sweeps in one page: DIR [DIR ...] [--out=report.html] [--group_by=FIELD,...] [--metrics=...]."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from prefalign_jax.cli.parser import Parser
from prefalign_jax.options import split_names

FEW = 3  # directories that a page's title names


def title_of(directories: Sequence[Path]) -> str:
    """The directories' names where they are few, else the directory that they are in and how many they are.

    Example:
      >>> title_of([Path("/runs/a"), Path("/runs/b")]), title_of([Path(f"/runs/{number}") for number in range(32)])
      ('a and b', 'runs: 32 directories')
    """
    whole = [directory.resolve() for directory in directories]
    if len(whole) <= FEW:
        return " and ".join(directory.name for directory in whole)
    return f"{Path(os.path.commonpath(whole)).name or 'runs'}: {len(whole)} directories"


def main(argv: Sequence[str]) -> int:
    """Writes the page and says what was written."""
    parser = Parser("prefalign report", __doc__)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="--workdir of a run or of a sweep")
    parser.add_argument("--out", type=Path, help="the page; DIR/report.html by default. Pictures go beside it")
    parser.add_argument(
        "--group_by", type=split_names, metavar="FIELDS", help="config fields; all that differ but seeds"
    )
    parser.add_argument("--metrics", type=split_names, metavar="NAMES", help="columns of eval.jsonl or metrics.jsonl")
    parser.add_argument(
        "--x", type=split_names, metavar="NAMES", help="equal compute: flops, trained_tokens, seconds, tokens, pairs"
    )
    options = parser.read(argv)
    from prefalign_jax.analysis.compare_page import markdown, write_page
    from prefalign_jax.analysis.runs import find_runs

    runs = find_runs(options.directories)
    written = write_page(
        runs,
        options.out or options.directories[0] / "report.html",
        title=title_of(options.directories),
        group_by=options.group_by,
        metrics=options.metrics,
        columns=options.x,
    )
    print(markdown(runs, options.group_by, options.metrics))
    print(f"{written[0]}, and {len(written) - 1} pictures in {written[-1].parent}")
    return 0
