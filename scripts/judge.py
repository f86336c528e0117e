"""`prefalign judge`, from a checkout: python scripts/judge.py --first=A.jsonl --second=B.jsonl --judge=J --out=DIR"""

import sys

from prefalign_jax.commands import main

if __name__ == "__main__":
    sys.exit(main(["judge", *sys.argv[1:]]))
