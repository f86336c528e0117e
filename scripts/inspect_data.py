"""Shows what an experiment would train on: --config=experiments/dpo.py:model=...,data=... --workdir=DIR.

Prints tables of lengths, length bias, what max_length costs and what cleaning would drop; writes data.json,
and data.html with histograms and pairs token by token, read off the packed batches of the run. No weights are loaded.
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from prefalign_jax import cli
from prefalign_jax.inspection.inspect_data import inspect


def main(config: ConfigDict, workdir: Path) -> None:
    """Inspects the data of the config."""
    inspect(config, workdir)


if __name__ == "__main__":
    sys.exit(cli.launch(main))
