"""Writes docs/losses.md and docs/losses.png from the losses themselves: python scripts/losses_page.py"""

import sys

from docs_pages.losses import write
from prefalign_jax.exits import status_of

if __name__ == "__main__":
    sys.exit(status_of(write))
