"""Judges two models' samples: --first=A.jsonl --second=B.jsonl --judge=reward:kindness --out=DIR.

The judge is reward:NAME (judges/rewards.py), model:DIR (a reward model), endpoint:URL (a language model) or
human:FILE (verdicts downloaded from pairs.html); --option=NAME=VALUE sets its options, =@FILE reads one from a file.
"""

import argparse
import json
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefalign_jax import cli
from prefalign_jax.generation.sample_files import (
    Sample,
    read_alpaca_eval,
    read_mt_bench,
    read_samples,
    whole_conversations,
    write_jsonl,
)
from prefalign_jax.judges import endpoint, judge, page, reward_model, rewards, win_rate
from prefalign_jax.options import check_hyper, choose, hyper_parameters, read_as
from prefalign_jax.types import UserError, one_line


def of_reward(name: str, out: Path, **options: Any) -> judge.Judge:
    """A reward of rewards.REWARDS."""
    return judge.by_reward(rewards.scorer(name, **options))


def of_model(path: str, out: Path, **options: Any) -> judge.Judge:
    """A reward model; its scores are kept in scores.jsonl."""
    return judge.by_reward(reward_model.scorer(path, out / "scores.jsonl", **options))


def of_endpoint(url: str, out: Path, **options: Any) -> judge.Judge:
    """A language model; its replies are kept in replies.jsonl."""
    return endpoint.endpoint(url, out / "replies.jsonl", **options)


def of_person(path: str, out: Path) -> judge.Judge:
    """A person's verdicts, found by the texts."""
    known = {json.dumps(v.comparison[:3]): v for v in judge.read_verdicts(path)}

    def look_up(comparisons: Sequence[judge.Comparison]) -> list[judge.Verdict]:
        found = [known.get(json.dumps(c[:3])) for c in comparisons]
        return [
            judge.Verdict(c, None, "not judged") if v is None else v._replace(comparison=c)
            for c, v in zip(comparisons, found, strict=True)
        ]

    return look_up


# The first word of --judge -> (makes the judge, the function whose keyword-only parameters are its options).
JUDGES: dict[str, tuple[Callable[..., judge.Judge], Callable[[str], Any]]] = {
    "reward": (of_reward, lambda name: choose("reward", name, rewards.REWARDS)),
    "model": (of_model, lambda path: reward_model.scorer),
    "endpoint": (of_endpoint, lambda url: endpoint.endpoint),
    "human": (of_person, lambda path: of_person),
}


def make_judge(spec: str, given: Sequence[str], out: Path) -> judge.Judge:
    """The judge that --judge and --option describe."""
    kind, colon, what = spec.partition(":")
    make, taker = choose("--judge", kind, JUDGES)
    if not what:
        raise UserError(f"--judge={spec}: write {kind}: and a name, directory, URL or file after it")
    known, options = hyper_parameters(taker(what)), {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--option={text}: write NAME=VALUE")
        check_hyper(f"judge {kind!r}", {name: known.get(name)}, known, {})
        try:
            value = Path(value[1:]).read_text(encoding="utf-8") if value.startswith("@") else value
            options[name] = read_as(value, known[name])
        except (OSError, ValueError) as error:
            kind_of = type(known[name]).__name__
            raise UserError(f"--option={name}: expected a value of type {kind_of}, found {one_line(error)}") from None
    return make(what, out, **options)


def read(path: str, questions: str | None) -> list[Sample]:
    """Our samples, AlpacaEval's outputs, or with a file of questions MT-Bench's answers."""
    if questions:
        return whole_conversations(read_mt_bench(path, questions))
    return read_alpaca_eval(path) if path.endswith(".json") else read_samples(path)


def main() -> None:
    """Judges, prints the table, writes verdicts.jsonl, summary.json and pairs.html."""
    parser = cli.Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", required=True, help="samples of the first model: .jsonl, or .json of AlpacaEval")
    parser.add_argument("--second", required=True, help="samples of the model it is compared with")
    parser.add_argument("--questions", help="of MT-Bench: --first and --second are answers in its format")
    parser.add_argument("--judge", required=True, help="reward:NAME, model:DIR, endpoint:URL or human:FILE")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the judge; repeatable")
    parser.add_argument("--load", action="append", default=[], metavar="FILE.py", help="adds to rewards.REWARDS")
    parser.add_argument("--out", required=True, type=Path, help="gets verdicts.jsonl, summary.json and pairs.html")
    values = parser.parse_args()
    for file in values.load:
        try:
            runpy.run_path(file)
        except Exception as error:  # a user's own code raises whatever it likes
            raise UserError(f"--load={file}: {type(error).__name__}: {one_line(error)}") from None
    first, second = (read(path, values.questions) for path in (values.first, values.second))
    comparisons, dropped = judge.pair_samples(first, second)
    if not comparisons:
        raise UserError(f"{values.first} and {values.second} have no prompt in common: {dropped}")
    for reason, count in dropped.items():
        print(f"not compared: {count} {reason}", file=sys.stderr)
    out = values.out
    verdicts = make_judge(values.judge, values.option, out)(comparisons)
    names = tuple(", ".join(sorted({s.model for s in side})) for side in (first, second))
    result = win_rate.win_rate(verdicts)
    judge.write_verdicts(out / "verdicts.jsonl", verdicts)
    summary = {"first": names[0], "second": names[1], "judge": values.judge, "options": values.option}
    write_jsonl(out / "summary.json", [{**summary, "not_compared": dropped, **win_rate.plain(result)}])
    page.write_page(out / "pairs.html", verdicts, names, values.judge)
    print(win_rate.table(result, *names, values.judge))


if __name__ == "__main__":
    sys.exit(cli.status_of(main))
