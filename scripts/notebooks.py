"""Makes the .ipynb files of experiments/notebooks from the .py files: python scripts/notebooks.py [--execute]"""

import argparse
import sys

from docs_pages.notebooks import SOURCES, write
from prefalign_jax.exits import status_of

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=sorted(SOURCES), help="which: %(default)s")
    parser.add_argument("--execute", action="store_true", help="execute also those whose code is as it was")
    sys.exit(status_of(lambda: write(**vars(parser.parse_args()))))
