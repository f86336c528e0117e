"""Runs the commands of README.md and docs/*.md, and lists what ran and what needs a hub, a GPU or an endpoint.

They run in a copy of the repository, in a short form: a training takes 64 pairs, and sweeps of hours print their runs.
Without options it needs no network and no file: MODEL and DATA are those of the quickstart.
"""

import sys

from docs_pages.commands import main
from prefalign_jax.exits import status_of

if __name__ == "__main__":
    sys.exit(status_of(lambda: main(__doc__)))
