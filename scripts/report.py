"""`prefalign report`, from a checkout: python scripts/report.py DIR [DIR ...]"""

import sys

from prefalign_jax.commands import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
