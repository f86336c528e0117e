"""`prefalign evaluate`, from a checkout: python scripts/evaluate.py --model=DIR --data=FILE --out=DIR"""

import sys

from prefalign_jax.commands import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
