"""`prefalign inspect`, from a checkout: python scripts/inspect_data.py --config=experiments/dpo.py:model=M,data=D"""

import sys

from prefalign_jax.commands import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
