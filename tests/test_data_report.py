import math

import numpy as np
import pytest

from prefalign_jax.data.records import Record
from prefalign_jax.inspection.data_report import (
    as_text,
    make_report,
    tables_of,
    would_drop,
)
from prefalign_jax.types import Pair, Place


def pair(prompt, chosen, rejected, where):
    return Pair(*(np.ones(n, np.int32) for n in (prompt, chosen, rejected)), where=Place(where, 1))


def test_scores_are_not_asked_of_data_without_them():
    records = [Record("a", "b", "c"), Record("a", "b", "c")]
    without = would_drop(records, "pairs", scores=False)
    assert without["exact_duplicates"] == {"exact duplicate": 1} and "ties" not in without
    assert would_drop([r._replace(margin=0.0) for r in records], "pairs", scores=True)["ties"] == {"tied scores": 2}
    assert {"ties", "contradictions"}.isdisjoint(would_drop(records, "supervised", scores=False))


@pytest.mark.parametrize("kind", ["pairs", "supervised", "unpaired"])
def test_every_table_has_as_many_cells_as_columns(kind):
    rejected = "" if kind != "pairs" else "no, never"
    records = [Record(f"q {i} {i}", "yes" * (i + 1), rejected, where=Place(str(i), 1)) for i in range(4)]
    pairs = [pair(2, i + 1, 2 if rejected else 0, str(i)) for i in range(4)]
    scores = {"margin": np.array([0.5, 1.0])}
    report = make_report(records, pairs, pairs, scores, kind=kind, max_length=4)
    stage = {"name": "read", "before": 4, "after": 4, "dropped": {}, "repaired": {"wrong encoding": 1}}
    tables = tables_of({**report, "stages": {"training": [stage], "held out": []}})
    assert all(len(row) == len(head) for _, head, rows in tables for row in rows)
    titles = {title for title, _, _ in tables}
    assert ("Length bias" in titles) == (kind == "pairs") and "Scores" in titles
    text = as_text(tables)
    assert "1 wrong encoding (changed)" in text and "nan" not in text
    assert not any(isinstance(x, float) and math.isnan(x) for _, _, rows in tables for row in rows for x in row)
