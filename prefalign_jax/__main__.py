"""python -m prefalign_jax COMMAND ... is prefalign COMMAND ..."""

import sys

from prefalign_jax.commands import main

if __name__ == "__main__":
    sys.exit(main())
