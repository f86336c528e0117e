"""`prefalign sweep`, from a checkout: python scripts/sweep.py --config=FILE.py[:ARG] --workdir=DIR [--jobs=N]"""

import sys

from prefalign_jax.commands import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
