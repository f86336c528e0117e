"""Exports a kept checkpoint of a run, finished or stopped: WORKDIR [--checkpoint=best|last|STEP] [--out=DIR]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefalign_jax.cli.parser import Parser


def main(argv: Sequence[str]) -> int:
    """Exports the checkpoint."""
    parser = Parser("prefalign export", __doc__)
    parser.add_argument("workdir", type=Path, help="--workdir of the run")
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="last, best, or the number of a step")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to; WORKDIR/export-STEP by default")
    options = parser.read(argv)
    from prefalign_jax.kept import export_kept

    export_kept(options.workdir, options.checkpoint, options.out)
    return 0
