"""Does SFT first matter, comparing within a pair, the strength: answers from a sweep, and DIR/direct_alignment.png."""

import sys
from pathlib import Path

from prefalign_jax.analysis.direct_alignment import report_direct_alignment
from prefalign_jax.cli.parser import Parser
from prefalign_jax.exits import status_of


def main() -> None:
    """Reads the command line, draws and prints."""
    parser = Parser("direct_alignment.py", __doc__)
    where = "--workdir of the sweep of experiments/papers/direct_alignment.py"
    parser.add_argument("directory", type=Path, metavar="DIR", help=where)
    parser.add_argument("--sft", type=Path, metavar="DIR", help="its runs of SFT, for the comparison at equal compute")
    since = "compare how far the runs have moved from this model, on one scale for all methods"
    parser.add_argument("--since", metavar="MODEL", help=since)
    options = parser.read(sys.argv[1:])
    print(report_direct_alignment(options.directory, options.sft, options.since))


if __name__ == "__main__":
    sys.exit(status_of(main))
