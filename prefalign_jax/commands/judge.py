"""Judges two models' samples: --first=A.jsonl --second=B.jsonl --judge=reward:kindness --out=DIR.

The judge is reward:NAME (judges/rewards.py), model:DIR (a reward model), logp:MODEL or mean_logp:MODEL (the response's
log-probability), dpo:POLICY,REFERENCE or mean_dpo:POLICY,REFERENCE (the implicit reward), endpoint:URL (a language
model) or human:FILE (verdicts downloaded from pairs.html). --option=NAME=VALUE sets its options, =@FILE reads one from
a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefalign_jax.cli.parser import Parser, run_file


def main(argv: Sequence[str]) -> None:
    """Judges, and prints the table."""
    parser = Parser("prefalign judge", __doc__)
    parser.add_argument("--first", required=True, help="samples of the first model: .jsonl, or .json of AlpacaEval")
    parser.add_argument("--second", required=True, help="samples of the model it is compared with")
    parser.add_argument("--questions", help="MT-Bench's questions; --first and --second are answers in its format")
    parser.add_argument("--judge", required=True, help="KIND:WHAT, such as reward:kindness; see above")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the judge; repeatable")
    parser.add_argument("--load", action="append", default=[], metavar="FILE.py", help="runs it first: more rewards")
    parser.add_argument("--out", required=True, type=Path, help="gets verdicts.jsonl, summary.json and pairs.html")
    options = parser.read(argv)
    for file in options.load:
        run_file(file)
    from prefalign_jax.judges.judge_files import judge_files

    files = (options.first, options.second)
    print(judge_files(*files, options.judge, options.out, options=options.option, questions=options.questions))
