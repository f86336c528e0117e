"""Reading and tokenizing beside another checkout of this package."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefalign_jax.types import UserError

SIDE = Path(__file__).parent / "sides" / "tokenize_side.py"
HERE = Path(__file__).parents[2]


def tokenize(
    *,
    other: str = "",
    data: str = "",
    tokenizer: str = "",
    chat_template: str = "",
    max_length: int = 512,
    rounds: int = 7,
) -> dict[str, Any]:
    """Reading and tokenizing a file of pairs, in turn with another checkout: processor seconds, medians of the rounds.

    Args:
      other: directory of the other checkout.
      data: file of preference pairs.
      tokenizer: directory or hub name.
      chat_template: in place of the tokenizer's own.
      max_length: longer pairs are left out.
      rounds: of each side that count; one more comes before.

    Returns:
      Seconds of both sides, their ratios, and whether the tokens are the same.
    """
    if not (data and tokenizer) or not (Path(other) / "prefalign_jax").is_dir() or rounds < 1:
        raise UserError("write --data=FILE, --tokenizer=DIR, --other=CHECKOUT and --rounds of at least 1")
    roots = {"here": HERE, "other": Path(other).resolve()}
    command = [sys.executable, "-P", str(SIDE), data, tokenizer, chat_template, str(max_length)]
    seconds: dict[str, list[list[float]]] = {name: [] for name in roots}
    made: dict[str, list[Any]] = {}
    with contextlib.ExitStack() as stack:
        sides = {}
        for name, root in roots.items():
            how = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            side = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(root)}, **how)
            sides[name] = stack.enter_context(side)
        for number in range(rounds + 1):
            for name in roots if number % 2 else reversed(roots):
                sides[name].stdin.write("\n")
                sides[name].stdin.flush()
                line = sides[name].stdout.readline()
                if not line:
                    raise UserError(f"{roots[name]}: its side failed, see above")
                *times, pairs, digest = json.loads(line)
                made[name] = [pairs, digest]
                seconds[name] += [times] if number else []
        for side in sides.values():
            side.stdin.close()
    figures: dict[str, Any] = {"pairs": made["here"][0], "same tokens": made["here"] == made["other"]}
    for part, number in (("read", 0), ("tokenize", 1)):
        medians = {name: statistics.median(times[number] for times in some) for name, some in seconds.items()}
        figures |= {f"{part}, {name}, s": value for name, value in medians.items()}
        figures[f"{part}, ratio"] = medians["here"] / medians["other"]
    both = {name: statistics.median(map(sum, some)) for name, some in seconds.items()}
    figures["both, ratio"] = both["here"] / both["other"]
    return figures
