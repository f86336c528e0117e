"""Shows what an experiment would train on: --config=dpo:model=MODEL,data=DATA --workdir=DIR.

Prints tables of lengths, length bias, what max_length costs and what cleaning would drop; writes data.json,
and data.html with histograms and pairs token by token, read off the packed batches of the run. No weights are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from prefalign_jax.cli.launch import launch


def main(argv: Sequence[str]) -> int | None:
    """Inspects the data of a config."""
    return launch("inspect", __doc__, inspect_data, argv)


def inspect_data(config: ConfigDict, workdir: Path) -> None:
    """Prints the tables and writes the files."""
    from prefalign_jax.inspection.inspect_data import inspect

    inspect(config, workdir)
