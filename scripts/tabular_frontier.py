"""Reward against divergence where the best is known: how near each loss comes on a table, drawn to a PNG: OUT.png.

Every loss is followed by gradient descent from the reference, its expectation over Bradley-Terry pairs a plain sum. The
line is the most reward that any policy has at a divergence (arXiv 2305.18290, Eq. 4): nothing lies above it.
"""

import sys
from pathlib import Path

from prefalign_jax.analysis.tabular_figure import draw_tabular_frontier
from prefalign_jax.cli.parser import Parser
from prefalign_jax.exits import status_of


def main() -> None:
    """Reads the command line, draws and prints."""
    parser = Parser("tabular_frontier.py", __doc__)
    parser.add_argument("out", type=Path, metavar="OUT.png", help="the figure")
    print(draw_tabular_frontier(parser.read(sys.argv[1:]).out))


if __name__ == "__main__":
    sys.exit(status_of(main))
