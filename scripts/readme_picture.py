"""Writes docs/readme.png, the picture of the README: DIR, the --workdir of a quickstart with DPO"""

import sys
from pathlib import Path

from docs_pages.readme import write
from prefalign_jax.cli.parser import Parser
from prefalign_jax.exits import status_of


def main() -> None:
    """Reads the command line and draws."""
    parser = Parser("readme_picture.py", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="--workdir of prefalign train --config=quickstart")
    write(parser.read(sys.argv[1:]).directory)


if __name__ == "__main__":
    sys.exit(status_of(main))
