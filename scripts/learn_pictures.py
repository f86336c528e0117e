"""Writes the pictures of docs/learn. DIR is where the commands that --commands prints were run."""

import sys
from pathlib import Path

from docs_pages.learn import commands, write
from prefalign_jax.cli.parser import Parser
from prefalign_jax.exits import status_of


def main() -> None:
    """Reads the command line and draws."""
    parser = Parser("learn_pictures.py", __doc__)
    parser.add_argument("directory", type=Path, nargs="?", metavar="DIR", help="has kept/; without it only dpo.png")
    parser.add_argument("--commands", action="store_true", help="print what makes the runs, and stop")
    args = parser.read(sys.argv[1:])
    if args.commands:
        print(*commands(), sep="\n")
    else:
        write(args.directory)


if __name__ == "__main__":
    sys.exit(status_of(main))
