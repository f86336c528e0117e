"""Measures families against transformers for the table of docs/models.md: python scripts/models_page.py [WORD ...]"""

import sys

from docs_pages.models import write
from prefalign_jax.exits import status_of

if __name__ == "__main__":
    sys.exit(status_of(lambda: write(*sys.argv[1:])))
