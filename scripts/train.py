"""`prefalign train`, from a checkout: python scripts/train.py --config=experiments/dpo.py:model=MODEL,data=DATA"""

import sys

from prefalign_jax.commands import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
