"""Judges two models' samples: --first=A.jsonl --second=B.jsonl --judge=reward:kindness --out=DIR.

The judge is reward:NAME (judges/rewards.py), model:DIR (a reward model), endpoint:URL (a language model) or
human:FILE (verdicts downloaded from pairs.html); --option=NAME=VALUE sets its options, =@FILE reads one from a file.
"""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path

from prefalign_jax.cli.parser import Parser
from prefalign_jax.types import UserError, one_line


def main(argv: Sequence[str]) -> None:
    """Judges, and prints the table."""
    parser = Parser("prefalign judge", __doc__)
    parser.add_argument("--first", required=True, help="samples of the first model: .jsonl, or .json of AlpacaEval")
    parser.add_argument("--second", required=True, help="samples of the model it is compared with")
    parser.add_argument("--questions", help="MT-Bench's questions; --first and --second are answers in its format")
    parser.add_argument("--judge", required=True, help="reward:NAME, model:DIR, endpoint:URL or human:FILE")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the judge; repeatable")
    parser.add_argument("--load", action="append", default=[], metavar="FILE.py", help="runs it first: more rewards")
    parser.add_argument("--out", required=True, type=Path, help="gets verdicts.jsonl, summary.json and pairs.html")
    options = parser.read(argv)
    for file in options.load:
        try:
            runpy.run_path(file)
        except Exception as error:  # a user's own code raises whatever it likes
            raise UserError(f"--load={file}: {type(error).__name__}: {one_line(error)}") from None
    from prefalign_jax.judges.judge_files import judge_files

    files = (options.first, options.second)
    print(judge_files(*files, options.judge, options.out, options=options.option, questions=options.questions))
