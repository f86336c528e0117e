"""`prefalign generate`, from a checkout: python scripts/generate.py --model=DIR --prompts=FILE --out=samples.jsonl"""

import sys

from prefalign_jax.commands import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
