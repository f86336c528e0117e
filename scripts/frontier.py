"""Plots reward against KL for the runs of a sweep, DIR/frontier.png, and prints a table: DIR [--pairs=pairs.jsonl]."""

import sys
from pathlib import Path

from prefalign_jax.analysis.frontier import report_frontier
from prefalign_jax.cli.parser import Parser
from prefalign_jax.exits import status_of


def main() -> None:
    """Reads the command line, draws and prints."""
    parser = Parser("frontier.py", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="--workdir of a sweep whose runs have `samples`")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="pairs.jsonl of the job `pairs`, for the best of n")
    options = parser.read(sys.argv[1:])
    print(report_frontier(options.directory, options.pairs))


if __name__ == "__main__":
    sys.exit(status_of(main))
