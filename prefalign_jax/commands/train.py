"""Runs what an experiment describes: --config=dpo:model=MODEL,data=DATA --workdir=DIR [--config.FIELD=VALUE ...].

The same command goes on where a run in DIR stopped. --print_config shows every field with its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from prefalign_jax.cli.launch import launch


def main(argv: Sequence[str]) -> int | None:
    """Runs the job that the config names."""
    return launch("train", __doc__, run_job, argv)


def run_job(config: ConfigDict, workdir: Path) -> int:
    """Runs a config; the exit status."""
    from prefalign_jax.jobs import JOBS

    return JOBS[config.job](config, workdir)
