"""Comparisons side by side in one self-contained HTML page, read blind, with a person's own verdicts to download."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from prefalign_jax.files import write_text
from prefalign_jax.generation.sample_files import as_text
from prefalign_jax.intervals import Interval
from prefalign_jax.judges.judge import Verdict
from prefalign_jax.judges.win_rate import WinRate, win_rate
from prefalign_jax.pages.frame import render


def page(verdicts: Sequence[Verdict], names: tuple[str, str], judge: str = "judge") -> str:
    """HTML that shows a comparison at a time, the models' names hidden and on sides that a digest of the texts chooses.

    A person's own verdicts stay in the browser and can be downloaded as JSONL that `judge.read_verdicts` reads.

    Args:
      verdicts: at least one; those without preference are shown too.
      names: of (first, second).
      judge: what gave the verdicts.

    Returns:
      The page, without anything to load from elsewhere.
    """
    rows = []
    for verdict in verdicts:
        comparison = verdict.comparison
        first, second = comparison.texts
        texts = json.dumps([comparison.prompt, sorted([first, second])])
        odd = hashlib.sha256(texts.encode()).digest()[0] % 2 == 1
        rows.append(
            {
                **comparison._asdict(),  # for the verdicts that a person downloads
                "prompt_text": as_text(comparison.prompt),
                "texts": {"first": first, "second": second},
                "preference": verdict.preference,
                "reason": verdict.reason,
                "scores": verdict.scores,
                # Of the two texts, not of the models: which model a digest puts first is as good as a coin.
                "swapped": odd != (first > second),
            }
        )
    digest = hashlib.sha256(json.dumps([names, rows]).encode()).hexdigest()
    data = {"names": names, "judge": judge, "digest": digest, "rows": rows}
    title = f"{len(rows):,} comparison{'s' * (len(rows) > 1)}, {judge}"
    rate, *facts = summary(win_rate(verdicts), names, judge)
    return render(
        "judges/page.html", title=title, scripts=["judges/page.js"], data=data, names=names, rate=rate[1], facts=facts
    )


def summary(result: WinRate, names: tuple[str, str], judge: str) -> list[tuple[str, str]]:
    """What the verdicts say, as (name, value): first how often the first model wins."""

    def shown(rate: Interval | None) -> str:
        return "no verdict" if rate is None else f"{rate.mean:.1%} [{rate.low:.1%}, {rate.high:.1%}]"

    facts = [
        ("win rate", f"{names[0]} wins {shown(result.rate)} against {names[1]}" if result.rate else "no verdict"),
        ("verdicts", f"{result.wins:,} won, {result.ties:,} tied, {result.losses:,} lost; {result.prompts:,} prompts"),
    ]
    if result.length_controlled is not None:
        facts.append(("at equal lengths", shown(result.length_controlled)))
    if result.inconsistent is not None:
        facts.append(("asked in both orders", f"{result.inconsistent:.1%} of verdicts change"))
    if result.lost:
        lost = "; ".join(f"{count:,} {reason}" for reason, count in result.lost.items())
        facts.append(("no verdict", lost))
    return [*facts, ("judge", judge)]


def write_page(path: str | Path, verdicts: Sequence[Verdict], names: tuple[str, str], judge: str = "judge") -> None:
    """Writes `page` to a file, which appears whole or not at all."""
    write_text(Path(path), page(verdicts, names, judge))
