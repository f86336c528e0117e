"""`prefalign plan`, from a checkout: python scripts/plan.py --config=FILE.py[:ARG] --devices=64 --device=h200"""

import sys

from prefalign_jax.commands import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
