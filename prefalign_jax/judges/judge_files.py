"""Two files of samples and a judge -> verdicts, a win rate with its interval, and a page to read them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefalign_jax.files import locked
from prefalign_jax.generation.sample_files import (
    Sample,
    read_alpaca_eval,
    read_mt_bench,
    read_samples,
    whole_conversations,
    write_jsonl,
)
from prefalign_jax.judges import page, win_rate
from prefalign_jax.judges.judge import pair_samples, write_verdicts
from prefalign_jax.judges.kinds import make_judge
from prefalign_jax.processes import note
from prefalign_jax.types import UserError


def judge_files(
    first: str, second: str, judge: str, out: Path, *, options: Sequence[str] = (), questions: str | None = None
) -> str:
    """Judges, and writes verdicts.jsonl, summary.json and pairs.html.

    Args:
      first, second: samples of a model each: ours, or AlpacaEval's outputs where the file ends in .json.
      judge: KIND:WHAT, see `kinds.make_judge`.
      out: directory for the files.
      options: of the judge, NAME=VALUE.
      questions: of MT-Bench; `first` and `second` are answers to them in its format.

    Returns:
      The table of the result.

    Raises:
      UserError: a file cannot be read, the judge is unknown, the samples have no prompt in common, or another process
        is writing to `out`.
    """
    sides = [_read(path, questions) for path in (first, second)]
    comparisons, dropped = pair_samples(*sides)
    if not comparisons:
        raise UserError(f"{first} and {second} have no prompt in common: {dropped}")
    for reason, count in dropped.items():
        note(f"not compared: {count} {reason}")
    names = tuple(", ".join(sorted({sample.model for sample in side})) for side in sides)
    with locked(out, "--out"):
        verdicts = make_judge(judge, options, out)(comparisons)
        result = win_rate.win_rate(verdicts)
        write_verdicts(out / "verdicts.jsonl", verdicts)
        summary = {"first": names[0], "second": names[1], "judge": judge, "options": [*options]}
        write_jsonl(out / "summary.json", [{**summary, "not_compared": dropped, **win_rate.plain(result)}])
        page.write_page(out / "pairs.html", verdicts, names, judge)
    return win_rate.table(result, *names, judge)


def _read(path: str, questions: str | None) -> list[Sample]:
    if questions:
        return whole_conversations(read_mt_bench(path, questions))
    return read_alpaca_eval(path) if path.endswith(".json") else read_samples(path)
