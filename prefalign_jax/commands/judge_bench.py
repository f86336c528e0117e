"""Measures judges on benchmarks: --data=DIR --judge=reward:more_words --judge=logp:MODEL --out=DIR.

Each file is told by the fields of its rows: LLMBar, JudgeBench, HHH alignment, Auto-J, PandaLM, MT-Bench's human votes,
RewardBench, AlpacaEval's annotations, and any other pairs that `prefalign train` reads. Prints how often each judge is
right, with 95% intervals, as each benchmark counts it; writes judge_bench.json and judge_bench.html, by subset too.

A judge is reward:NAME (judges/rewards.py), model:DIR (a reward model), logp:MODEL or mean_logp:MODEL (the response's
log-probability, its sum or its mean over tokens), dpo:POLICY,REFERENCE or mean_dpo:POLICY,REFERENCE (the implicit
reward, likewise), or endpoint:URL (a language model, asked in both orders). Options of one judge may follow it, as in
--judge="endpoint:URL model=NAME"; --option=NAME=VALUE is for every judge that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefalign_jax.cli.parser import Parser, run_file


def main(argv: Sequence[str]) -> None:
    """Judges, and prints the tables."""
    parser = Parser("prefalign judge-bench", __doc__)
    add = parser.add_argument
    add("--data", required=True, nargs="+", action="extend", metavar="PATH", help="files or directories; repeatable")
    add("--judge", required=True, action="append", metavar="KIND:WHAT", help="see above; repeatable")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of every judge that has it; repeatable")
    add("--load", action="append", default=[], metavar="FILE.py", help="runs it first: more rewards")
    add("--limit", type=int, metavar="N", help="at most N pairs of a benchmark, spread evenly over its rows")
    add("--out", required=True, type=Path, metavar="DIR", help="gets judge_bench.json, judge_bench.html and the scores")
    options = parser.read(argv)
    for file in options.load:
        run_file(file)
    from prefalign_jax.judges.bench import bench_judges

    print(bench_judges(options.data, options.judge, options.out, options=options.option, limit=options.limit))
    print(f"\nin {options.out}: judge_bench.json, judge_bench.html")
