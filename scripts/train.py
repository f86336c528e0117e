"""Trains what a config describes: --config=experiments/dpo.py:model=...,data=... --workdir=DIR."""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from prefalign_jax import cli, quickstart
from prefalign_jax.train import train


def main(config: ConfigDict, workdir: Path) -> int:
    """Runs the job that the config names."""
    if config.job == "quickstart":
        return quickstart.run(config, workdir)
    return cli.STOPPED if train(config, workdir).stopped else 0


if __name__ == "__main__":
    sys.exit(cli.launch(main))
