"""Groups of responses: what a row may say of them, which pairs they become, and what a loss of groups gets."""

import itertools
import json
import math
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefalign_jax.config import defaults
from prefalign_jax.data.groups import Comparison, Group, gathered, scores_of
from prefalign_jax.data.memory import MemoryRows
from prefalign_jax.data.reading import Tally
from prefalign_jax.data.records import iter_records, read_records
from prefalign_jax.experiment import read as read_config
from prefalign_jax.load_data import load_pairs
from prefalign_jax.types import UserError
from published_rows import ALPACA_EVAL, PAIRS, PANDALM, SHP, Q, assistant, helpsteer, sample, user

LETTERS = "abcdefgh"


def read(*rows, **options):
    tally = Tally()
    return list(iter_records(MemoryRows("rows", rows), tally, **options)), tally


def group(**fields):
    return {"prompt": "Why?", "responses": [*LETTERS[:4]], **fields}


def preferred(records):
    """The pairs as texts: 'ab' is a over b."""
    return [record.chosen + record.rejected for record in records]


def permuted(row, order):
    """The same row with its responses in another order."""
    new = {**row, "responses": [row["responses"][i] for i in order]}
    for name in ("scores", "ranks"):
        if name in row:
            new[name] = [row[name][i] for i in order]
    if "comparisons" in row:
        new["comparisons"] = [[order.index(place) for place in pair] for pair in row["comparisons"]]
    return new


def content(record):
    return record[:5], record.others, record.scores


def in_order(records):
    return sorted(map(content, records), key=str)


# Pairs


SCORES = [random.Random(seed).choices((0.0, 0.5, 1.0, 3.0), k=2 + seed % 5) for seed in range(20)]


@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_the_pairs_are_what_counting_gives(scores):
    row = group(responses=[*LETTERS[: len(scores)]], scores=scores)
    every = itertools.permutations(range(len(scores)), 2)
    better = {LETTERS[i] + LETTERS[j]: scores[i] - scores[j] for i, j in every if scores[i] > scores[j]}
    ties = sum(a == b for a, b in itertools.combinations(scores, 2))
    records, tally = read(row, pairs="all", margin=True)
    assert {text: record.margin for text, record in zip(preferred(records), records, strict=True)} == better
    assert len(records) == len(better) and +tally.dropped == +Counter(tie=ties)
    # Of neighbours no third response is between the two.
    score_of = dict(zip(LETTERS, scores, strict=False))
    between = {text for text in better if any(score_of[text[1]] < x < score_of[text[0]] for x in scores)}
    assert {*preferred(read(row, pairs="adjacent")[0])} == better.keys() - between
    # The first of the best over the first of the worst.
    one = LETTERS[scores.index(max(scores))] + LETTERS[scores.index(min(scores))]
    records, tally = read(row)
    assert preferred(records) == [one] * bool(better) and +tally.dropped == +Counter(tie=not better)


def test_neighbours_are_a_chain():
    records, _ = read(group(responses=[*"dbac"], scores=[1, 3, 4, 2]), pairs="adjacent", margin=True)
    assert preferred(records) == ["ab", "bc", "cd"] and {record.margin for record in records} == {1.0}


def test_random_pairs_are_a_function_of_seed_and_texts():
    rows = [group(prompt=f"Why {n}?", responses=[*"abcde"], ranks=[1, 2, 2, 3, 4]) for n in range(20)]
    options = dict(pairs="random:3", seed=5)
    records, tally = read(*rows, **options)
    every = read(*rows, pairs="all")[0]
    assert len(records) == 60 and {*map(str, map(content, records))} < {*map(str, map(content, every))}
    assert tally.dropped == {"tie": 20}
    backwards = [permuted(row, (4, 2, 0, 1, 3)) for row in reversed(rows)]
    assert in_order(read(*backwards, **options)[0]) == in_order(records)
    assert in_order(read(*rows, **options | {"seed": 6})[0]) != in_order(records)
    assert len({str(preferred(records[at : at + 3])) for at in range(0, 60, 3)}) > 5  # not the same ones of each prompt
    assert len(read(rows[0], pairs="random:100")[0]) == 9


@pytest.mark.parametrize("scores", [[4, 1, 3, 2], [0.5, -1, 7, 3]])
@pytest.mark.parametrize("how", ["best_worst", "all", "adjacent", "random:2"])
def test_the_order_of_the_responses_changes_no_pair(scores, how):
    row, order = group(scores=scores), (2, 0, 3, 1)
    one, other = (list(map(content, read(each, pairs=how)[0])) for each in (row, permuted(row, order)))
    assert one == other


def test_listed_comparisons_are_the_pairs_whatever_the_scores_say():
    listed = [[1, 0], {"chosen": 2, "rejected": 3, "weight": 2, "margin": 0.5}, {"chosen": 0, "rejected": 3.0}]
    row = group(comparisons=listed, weight=3)
    for how in ("best_worst", "all"):
        records, tally = read(row, pairs=how)
        assert preferred(records) == ["ba", "cd", "ad"] and [record.weight for record in records] == [3, 6, 3]
        assert not tally.dropped
    records, tally = read(group(comparisons=listed[1:2]), margin=True)
    assert [record.margin for record in records] == [0.5]
    records, tally = read(group(comparisons=listed, scores=[1, 2, 4, 3]), margin=True)  # the scores fill the gaps
    assert [record.margin for record in records] == [1, 0.5] and tally.dropped == {"rejected scores higher": 1}
    assert len(read(row, pairs="random:2")[0]) == 2
    with pytest.raises(UserError, match="row 1: field 'comparisons': data.pairs=adjacent takes neighbours in an order"):
        read(row, pairs="adjacent")


def test_what_else_a_row_says_is_said_once():
    row = group(scores=[1, 2, 3, 4], id=7, system="Be brief.", weight=2, tools=[])
    row["comparisons"] = [{"chosen": 0, "rejected": 1, "by": "Ada"}, {"chosen": 1, "rejected": 2, "by": None}]
    records, tally = read(row, columns=("id",))
    assert tally.unread == {"comparisons[].by": 1, "margin": 1} and len(records) == 2
    assert {(record.weight, record.columns, record.prompt[0]["content"]) for record in records} == {
        (2.0, (("id", 7),), "Be brief.")
    }
    del row["comparisons"]
    tally = read(row)[1]
    assert tally.unread == {"id": 1, "margin": 1, "responses[] between best and worst": 1}
    assert read(row, pairs="all")[1].unread == {"id": 1, "margin": 1}


def test_one_response_is_read_as_other_kinds_of_data_as_the_best_and_the_worst_are():
    row = group(scores=[2, 1, 4, 3])
    records, _ = read(row, unpaired=True)
    assert [(record.chosen, record.label) for record in records] == [("c", True), ("b", False)]
    records, _ = read(row, responses=("chosen",))
    assert [(record.chosen, record.rejected) for record in records] == [("c", "")]
    # Of comparisons those are the ends of their order.
    chain = group(comparisons=[[2, 0], [0, 3], [3, 1]])
    records, _ = read(chain, unpaired=True)
    assert [(record.chosen, record.label) for record in records] == [("c", True), ("b", False)]
    for kind in ({"unpaired": True}, {"responses": ("chosen",)}):
        with pytest.raises(UserError, match="none says how"):
            read(group(comparisons=[[0, 1], [2, 3]]), **kind)
    for kind in ({"unpaired": True}, {"responses": ("chosen",)}, {"groups": True}):
        with pytest.raises(UserError, match="pairs='all': applies to pairs"):
            read(row, pairs="all", **kind)
    for how in ("worst", "random", "random:0", "random:-1", "all:3", ""):
        with pytest.raises(UserError, match="unknown; write one of best_worst, all, adjacent, random:N"):
            read(row, pairs=how)


# Groups


@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_a_record_has_all_responses_best_first_in_whatever_order_they_come(scores):
    row = group(responses=[*LETTERS[: len(scores)]], scores=scores)
    records, tally = read(row, groups=True)
    if len({*scores}) == 1:
        assert not records and tally.dropped == {"tie": 1}
        return
    (record,) = records
    assert [*record.scores] == sorted(scores, reverse=True)
    assert dict(zip(record.responses, record.scores, strict=True)) == dict(zip(LETTERS, scores, strict=False))
    places = range(len(scores))
    for order in (places[::-1], random.Random(0).sample(places, len(scores))):
        assert content(read(permuted(row, order), groups=True)[0][0]) == content(record)
    assert not tally.dropped and not +tally.notes and math.isnan(record.margin)
    assert read(row, groups=True, margin=True)[0][0].margin == max(scores) - min(scores)


@pytest.mark.parametrize(
    ("fields", "responses", "scores"),
    [
        ({"ranks": [2, 1, 3, 3]}, "bacd", (-1, -2, -3, -3)),
        ({"comparisons": [[0, 1], [1, 2], [2, 3]]}, "abcd", (-1, -2, -3, -4)),
        ({"comparisons": [[3, 1], [3, 0], [1, 2], [0, 2]]}, "dabc", (-1, -2, -2, -4)),
        ({"comparisons": [[3, 0], [3, 1], [3, 2]]}, "dabc", (-1, -2, -2, -2)),
        ({"comparisons": [[3, 0], [3, 1], [3, 2]], "scores": [1, 2, 3, 0]}, "cbad", (3, 2, 1, 0)),
        ({"comparisons": [{"chosen": 3, "rejected": i, "margin": i + 1} for i in range(3)]}, "dabc", (3, 2, 1, 0)),
    ],
)
def test_ranks_and_comparisons_become_scores(fields, responses, scores):
    (record,), _ = read(group(**fields), groups=True)
    ties = [sorted(record.responses[i] for i in range(4) if record.scores[i] == score) for score in record.scores]
    assert record.scores == scores and ties == [
        sorted(responses[i] for i in range(4) if scores[i] == score) for score in scores
    ]


@pytest.mark.parametrize(
    ("comparisons", "message"),
    [
        ([[0, 1], [1, 2], [2, 0], [0, 3]], "responses[0] is better than itself by them"),
        ([[0, 1], [2, 3]], "none says how responses[0] and responses[3] compare"),
        ([[0, 1], [1, 2]], "none says how responses[1] and responses[3] compare"),
        ([{"chosen": 0, "rejected": 1, "margin": 1}], "none says how responses[0] and responses[2] compare"),
    ],
)
def test_comparisons_that_order_not_all_responses_are_refused_for_losses_of_groups(comparisons, message):
    with pytest.raises(UserError) as caught:
        read(group(comparisons=comparisons), groups=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(read(group(comparisons=comparisons))[0]) == len(comparisons)  # they are pairs


def test_margins_give_back_the_scores_that_they_are_differences_of():
    rng = np.random.default_rng(0)
    for responses in (2, 5, 9):
        scores = rng.normal(size=responses)
        every = list(itertools.permutations(range(responses), 2))
        pairs = [every[i] for i in rng.permutation(len(every))[: 2 * responses]]
        pairs += [(i, i + 1) for i in range(responses - 1)]  # so that all are joined
        listed = [Comparison(i, j, rng.uniform(0.1, 3), scores[i] - scores[j]) for i, j in pairs]
        assert scores_of(Group([*range(responses)], None, listed)) == pytest.approx(scores - scores.min(), abs=1e-8)
    # Of one comparison with two margins it is their weighted mean.
    listed = [Comparison(0, 1, 1.0, 3.0), Comparison(0, 1, 2.0, 6.0), Comparison(1, 0, 1.0, -3.0)]
    assert scores_of(Group(["a", "b"], None, listed)) == [4.5, 0.0]


def test_a_pair_is_a_group_of_two():
    pair = {"prompt": "Why?", "chosen": "a", "rejected": "b"}
    rows = [pair, {**pair, "score_chosen": 5, "score_rejected": 3}, {**pair, "margin": 0.5}]
    rows += [{**pair, "score_chosen": 3, "score_rejected": 5}, {**pair, "rejected": "a"}, {**pair, "margin": 0}]
    records, tally = read(*rows, groups=True)
    assert [record.scores for record in records] == [(1.0, 0.0), (5.0, 3.0), (0.5, 0.0)]
    assert {record.responses for record in records} == {("a", "b")} and not tally.unread
    assert tally.dropped == {"rejected scores higher": 1, "identical responses": 1, "tie": 1}


def test_empty_and_equal_responses_leave_a_group_and_are_counted():
    rows = [
        group(responses=["a", "", "b", " "], scores=[1, 9, 2, 8]),
        group(responses=["a", "b", "a", "c"], scores=[1, 2, 3, 0]),
        group(responses=["a", "a", "", "a"], scores=[1, 2, 3, 0]),
    ]
    records, tally = read(*rows, groups=True)
    assert [record.responses for record in records] == [("b", "a"), ("a", "b", "c")]
    assert [record.scores for record in records] == [(2, 1), (3, 2, 0)]
    assert tally.dropped == {"fewer than two different responses": 1}
    assert tally.notes == {"without the empty responses of a group": 1, "with one of a group's equal responses": 1}


MALFORMED = [
    ({"scores": [1, 2]}, "field 'scores': expected 4 numbers, one for each response, found 2"),
    ({"scores": [1, 2, None, 4]}, "field 'scores[2]': expected a finite number (float32), found nothing"),
    ({"scores": [1, 2, "x", 4]}, "field 'scores[2]': expected a finite number (float32), found a string 'x'"),
    ({"scores": {"a": 1}}, "field 'scores': expected a list, found an object"),
    ({"scores": "[1, 2"}, "field 'scores': expected JSON"),
    ({"ranks": [0, 1, 2, 3]}, "field 'ranks[0]': expected a rank, 1 for the best (float32), found a number 0"),
    ({}, "field 'responses': expected one of the fields scores, ranks, comparisons beside it; if another holds them"),
    ({"scores": [1, 2, 3, 4], "ranks": [4, 3, 2, 1]}, "fields 'scores' and 'ranks': expected one of them"),
    ({"scores": [1, 2, 3, 4], "margin": 1}, "field 'margin': the scores of responses say it"),
    ({"responses": "abcd", "scores": [1]}, "field 'responses': expected a list, found a string 'abcd'"),
    ({"responses": ["a", 3], "scores": [1, 2]}, "expected a string or a list of messages, found a number 3"),
    ({"responses": ["a", None], "scores": [1, 2]}, "field 'responses[1]': expected a text or messages, found nothing"),
    ({"responses": ["a", [assistant("b")]], "scores": [2, 1]}, "expected a string"),
    ({"comparisons": [[0, 4]]}, "field 'comparisons[0]': expected the places of two responses, 0 to 3"),
    ({"comparisons": [[0, -1]]}, "field 'comparisons[0]': expected the places of two responses, 0 to 3"),
    ({"comparisons": [[0, 1], [0, 0.5]]}, "field 'comparisons[1]': expected the places of two responses"),
    ({"comparisons": [[True, 0]]}, "field 'comparisons[0]': expected the places of two responses"),
    ({"comparisons": [[1, 1]]}, "field 'comparisons[0]': expected two different responses"),
    ({"comparisons": [[1, 2, 3]]}, "field 'comparisons[0]': expected [better, worse], or an object with"),
    ({"comparisons": [{"chosen": 1}]}, "field 'comparisons[0]': expected [better, worse], or an object with"),
    ({"comparisons": ["01"]}, "field 'comparisons[0]': expected [better, worse], or an object with"),
    (
        {"comparisons": [{"chosen": 1, "rejected": 0, "weight": 0}]},
        "field 'comparisons[0].weight': expected a positive",
    ),
    (
        {"comparisons": [{"chosen": 1, "rejected": 0, "margin": "x"}]},
        "field 'comparisons[0].margin': expected a finite",
    ),
    ({"scores": [1, 2, 3, 4], "chosen": "a", "rejected": "d"}, "field 'responses' holds several responses"),
]


@pytest.mark.parametrize(("fields", "message"), MALFORMED, ids=[message for _, message in MALFORMED])
@pytest.mark.parametrize("kind", [{}, {"pairs": "all"}, {"groups": True}], ids=str)
def test_a_malformed_group_is_one_line(fields, message, kind):
    with pytest.raises(UserError) as caught:
        read({"prompt": "Why?", "chosen": "a", "rejected": "b"}, group(**fields), **kind)
    said = str(caught.value)
    assert said.startswith("rows, row 2: ") and message in said and said.isprintable() and len(said) < 300


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"responses": [], "scores": []}, "fewer than two answers"),
        ({"responses": ["a"], "scores": [1]}, "fewer than two answers"),
        ({"comparisons": []}, "no comparison"),
        ({"scores": [1, 1, 1, 1]}, "tie"),
    ],
)
@pytest.mark.parametrize("kind", [{}, {"groups": True}, {"unpaired": True}], ids=str)
def test_what_compares_nothing_is_counted(fields, reason, kind):
    assert read(group(**fields), **kind) == ([], Tally(dropped=Counter([reason])))


# Formats


ALPACA_EVALS = [{**ALPACA_EVAL, "output_2": text, "preference": p} for text, p in (("Water.", 1.2), ("Air.", 1.75))]
SHPS = [
    {**SHP, "human_ref_A": a, "human_ref_B": b, "labels": int(x > y), "score_ratio": max(x, y) / min(x, y)}
    for (a, x), (b, y) in itertools.combinations((("Paint.", 2), ("Air.", 12), ("Water.", 3)), 2)
]


def log_odds(p):
    return math.log(p) - math.log1p(-p)


# Data set -> (rows, responses best first, scores).
BLUE = ("Air scatters blue.", "Water.", "Paint.")
GROUPS = {
    "openbmb/UltraFeedback": ([PAIRS["openbmb/UltraFeedback"][1]], BLUE, (4.75, 3, 2)),
    "berkeley-nest/Nectar": ([PAIRS["berkeley-nest/Nectar"][1]], tuple(f" {text}" for text in BLUE), (-1, -2, -3)),
    "HuggingFaceH4/stack-exchange-preferences": (
        [PAIRS["HuggingFaceH4/stack-exchange-preferences"][1]],
        BLUE,
        (5, 1, 0),
    ),
    "nvidia/HelpSteer": (
        [helpsteer(Q, text, score) for text, score in (("Water.", 2), ("Paint.", 0), ("Air.", 4))],
        ("Air.", "Water.", "Paint."),
        (4, 2, 0),
    ),
    "samples with rewards": (
        [sample(Q, text, score) for text, score in (("Water.", -2.5), ("Sea.", math.nan), ("Air.", 4))],
        ("Air.", "Water."),
        (4, -2.5),
    ),
    "stanfordnlp/SHP": (SHPS, ("Air.", "Water.", "Paint."), (math.log(6), math.log(1.5), 0)),
    "AlpacaEval": (ALPACA_EVALS, ("Air.", "Paint.", "Water."), (log_odds(0.75) + log_odds(0.8), log_odds(0.8), 0)),
    "PandaLM": (
        [PANDALM, {**PANDALM, "response1": "Water.", "annotator1": 1, "annotator2": 1}],
        ("Water.", "Air scatters blue.", "Paint."),
        (2 * log_odds(5 / 6), log_odds(5 / 6), 0),
    ),
}
NEXT = {"prompt": "p", "chosen": "c", "rejected": "r"}


def text_of(response):
    return response if isinstance(response, str) else response[-1]["content"]


@pytest.mark.parametrize("name", GROUPS)
def test_published_groups(name):
    rows, responses, scores = GROUPS[name]
    records, _ = read(*rows, NEXT, groups=True)
    assert tuple(map(text_of, records[0].responses)) == responses and len(records) == 2
    assert records[0].scores == pytest.approx(scores)
    # Another prompt is another group.
    other = json.loads(json.dumps(rows).replace(Q, "And the sea?").replace("hcyzcc", "other"))
    records, _ = read(*rows, *other, groups=True)
    assert [tuple(map(text_of, record.responses)) for record in records] == [responses] * 2
    assert records[0].prompt != records[1].prompt and records[0].scores == records[1].scores
    # Of rows with scores all pairs are those of the group.
    if name not in ("stanfordnlp/SHP", "AlpacaEval", "PandaLM"):
        pairs, tally = read(*rows, pairs="all", margin=True)
        expected = itertools.combinations(zip(responses, records[0].scores, strict=True), 2)
        assert [(text_of(r.chosen), text_of(r.rejected), r.margin) for r in pairs] == [
            (a, b, x - y) for (a, x), (b, y) in expected
        ]
        assert not tally.dropped


@pytest.mark.parametrize("name", ["stanfordnlp/SHP", "AlpacaEval", "PandaLM"])
def test_rows_that_are_pairs_stay_the_pairs_that_they_are(name):
    rows = GROUPS[name][0]
    as_they_are = read(*rows, margin=True)[0]
    gathered_ones = read(*rows, pairs="all", margin=True)[0]
    assert [content(record)[0] for record in gathered_ones] == [content(record)[0] for record in as_they_are]
    assert len(read(*rows, pairs="random:1")[0]) == 1


def test_pairs_that_nothing_joins_are_groups_of_their_own():
    def pair(chosen, rejected, **more):
        return [{"prompt": "p", "chosen": chosen, "rejected": rejected, **more}]

    joined, identical = gathered([pair("a", "b"), pair("c", "d"), pair("e", "e"), pair("b", "c", margin=2)], ["prompt"])
    assert [row["responses"] for row in joined] == [["a", "b", "c", "d"]] and identical == 1
    assert [(c["chosen"], c["rejected"], c["margin"]) for c in joined[0]["comparisons"]] == [
        (0, 1, None), (2, 3, None), (1, 2, 2)
    ]  # fmt: skip
    joined, _ = gathered([pair("a", "b"), pair("c", "d"), pair("a", "e", weight=1)], ["prompt"])
    assert [row["responses"] for row in joined] == [["a", "b", "e"], ["c", "d"]]
    with pytest.raises(ValueError, match="field 'weight': rows with the same 'prompt' are read together, and differ"):
        gathered([pair("a", "b"), pair("c", "d", weight=2)], ["prompt"])


def test_the_weight_of_a_group_is_that_of_its_rows():
    rows = [{**row, "weight": 4} for row in ALPACA_EVALS]
    assert [record.weight for record in read(*rows, groups=True)[0]] == [4.0]
    with pytest.raises(UserError, match="row 1: field 'weight': rows with the same 'instruction' and 'input' are read"):
        read(rows[0], {**rows[1], "weight": 1}, groups=True)


# Containers


MESSAGES = {"prompt": [user("Why?")], "responses": [[assistant(text)] for text in "abc"]}
EVERY = {name: rows for name, (rows, *_) in GROUPS.items()} | {
    "scores": [group(scores=[1, 2.5, 4, 3])],
    "ranks": [group(ranks=[1, 2, 2, 4])],
    "comparisons": [group(comparisons=[[0, 1], [1, 2], [2, 3]])],
    "comparisons as objects": [group(comparisons=[{"chosen": i, "rejected": i + 1, "margin": 1} for i in range(3)])],
    "messages": [{**MESSAGES, "scores": [1, 2, 3]}, {**MESSAGES, "scores": [3, 1, 2], "prompt": [user("How?")]}],
}


@pytest.mark.parametrize("kind", [{}, {"pairs": "all"}, {"groups": True}], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_every_container_gives_the_same(tmp_path, name, kind):
    rows = EVERY[name]
    records = list(map(content, read(*rows, **kind)[0]))
    assert records

    # A table fills with nulls what a row lacks.
    table = pa.Table.from_pylist(rows)
    for field in sorted({"weight", "label", "scores", "ranks", "comparisons", "responses", "chosen"}.difference(*rows)):
        table = table.append_column(field, pa.nulls(len(table), pa.float64()))
    pq.write_table(table, tmp_path / "rows.parquet")
    assert [content(r) for r in read_records(tmp_path / "rows.parquet", **kind)[0]] == records

    def numpied(value):
        if isinstance(value, dict):
            return {key: numpied(one) for key, one in value.items()}
        if isinstance(value, list):
            out = np.empty(len(value), object)
            out[:] = [numpied(one) for one in value]
            return out
        return np.float32(value) if isinstance(value, float) and value * 4 % 1 == 0 else value

    assert [content(r) for r in read(*map(numpied, rows), **kind)[0]] == records

    lists = ("responses", "scores", "ranks", "comparisons", "completions", "answers", "prompt")
    texts = [{k: json.dumps(v) if k in lists and isinstance(v, list) else v for k, v in row.items()} for row in rows]
    assert [content(r) for r in read(*texts, **kind)[0]] == records


def test_ways_to_write_the_responses():
    """Whole conversations, messages alone, and strings after a system prompt are the same group."""
    asked, scores = [user("Why?")], {"scores": [1, 2, 3]}
    texts = {"prompt": "Why?", "system": "Be brief.", "responses": [*"abc"], **scores}
    brief = [{"role": "system", "content": "Be brief."}, *asked]
    rows = [
        texts,
        {"prompt": brief, "responses": [assistant(text) for text in "abc"], **scores},
        {"responses": [[*brief, assistant(text)] for text in "abc"], **scores},
    ]
    for kind in ({"groups": True}, {"pairs": "all"}):
        one, *others = ([content(record) for record in read(row, **kind)[0]] for row in rows)
        assert all(other == one for other in others)
    differ = {"responses": [[user("Why?"), assistant("a")], [user("How?"), assistant("b")]], "scores": [1, 2]}
    assert read(differ, groups=True)[1].dropped == {"prompts differ": 1}


# A run


@pytest.fixture
def load(tmp_path, tiny_tokenizer):
    """The data of a run on some rows, with changes of its config."""

    def run(rows, loss="dpo", **fields):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = defaults(loss)
        fields = {"data.path": str(path), "data.cache_dir": str(tmp_path / "cache"), **fields}
        config.update_from_flattened_dict(fields)
        return load_pairs(read_config(config, complete=False).fitted(64), tiny_tokenizer)

    return run


ROWS = [
    group(prompt=f"Why {n}?", responses=[f" {n}{text}" for text in "abcd"], scores=[n % 3, 1, 2, 3]) for n in range(9)
]


def texts_of(pairs):
    return [tuple(map(bytes, (pair.prompt, pair.chosen, pair.rejected))) for pair in pairs]


def test_a_run_trains_on_the_pairs_that_it_asks_for(load, capsys):
    data = load(ROWS, **{"data.pairs": "all"})
    ties = sum(row["scores"][0] in row["scores"][1:] for row in ROWS)
    assert len(data.training) == 6 * len(ROWS) - ties and data.dropped["training"] == {"tie": ties}
    assert data.stages["training"][0].before == 6 * len(ROWS) and f"dropped {ties} tie" in capsys.readouterr().err
    assert len(load(ROWS).training) == len(ROWS)
    # The pairs of a group come one after the other, from the same row.
    places = [pair.where.row for pair in data.training]
    assert places == sorted(places)


def test_random_pairs_follow_the_seed_and_are_not_those_of_another_in_the_cache(load):
    one, two, again = (texts_of(load(ROWS, seed=seed, **{"data.pairs": "random:2"}).training) for seed in (0, 1, 0))
    assert one == again != two and len(one) == len(two) == 2 * len(ROWS)


def test_held_out_prompts_keep_all_their_pairs(load):
    data = load(ROWS, **{"data.pairs": "all", "data.eval_fraction": 0.4})
    sides = [{prompt for prompt, *_ in texts_of(pairs)} for pairs in (data.training, data.held_out)]
    assert sides[0].isdisjoint(sides[1]) and len(sides[0] | sides[1]) == len(ROWS) and all(sides)


def test_a_loss_of_groups_gets_them_whole(load):
    rows = [*ROWS, {"prompt": "Why?", "chosen": " yes", "rejected": " no", "score_chosen": 2, "score_rejected": 1}]
    data = load(rows, "plackett_luce")
    assert len(data.training) == len(rows) and not data.dropped["training"]
    assert [len(pair.responses) for pair in data.training] == [4] * len(ROWS) + [2]
    for pair, row in zip(data.training, rows, strict=True):
        scores = row.get("scores", [1, 2])
        assert list(pair.scores) == sorted(scores, reverse=True)


def test_every_step_of_cleaning_takes_groups(load):
    spoilt = [
        group(responses=[" a", " b", " Human: c"], scores=[1, 2, 3]),  # role_markers
        group(responses=[" a b", " A, b!", " a; b"], scores=[1, 2, 3]),  # same_responses
        group(responses=[" a", " b", " c d e f"], scores=[3, 2, 1]),  # lengths
        group(responses=[" e", " f", " g"], scores=[3, 2, 1]),
        group(responses=[" g", " f", " e"], scores=[3, 2, 1]),  # contradictions, with the one before
        group(responses=[" x", " y", " z"], scores=[1.5, 1, 1]),  # score_gap
        group(responses=[" x", " y", " z\ufffd"], scores=[4, 2, 1]),  # lost_characters
        ROWS[0],  # exact_duplicates
        {**ROWS[0], "prompt": "Why  0?"},  # near_duplicates
    ]
    steps = "encoding,lost_characters,unencodable,exact_duplicates,near_duplicates,contradictions,ties,score_gap"
    steps += ",same_responses,lengths,role_markers"
    options = {"score_gap.least": 0.75, "lengths.most_words": 3}
    fields = {f"data.cleaning.{name}": value for name, value in options.items()}
    data = load([*ROWS, *spoilt], "plackett_luce", **{"data.clean": steps}, **fields)
    assert [len(pair.responses) for pair in data.training] == [4] * len(ROWS)
    assert data.dropped["training"] == {
        "lost characters": 1,
        "exact duplicate": 1,
        "near duplicate": 1,
        "contradictory": 2,
        "score gap under 0.75": 1,
        "responses of the same words": 1,
        "response over 3 words": 1,
        "role marker in a response": 1,
    }
    options = {"data.clean": "encoding", "data.ascii_quotes": True}
    (pair,) = load([group(responses=[" a", " b", " “naÃ¯ve”"], scores=[3, 2, 1])], "plackett_luce", **options).training
    (plain,) = load([group(responses=[" a", " b", ' "naïve"'], scores=[3, 2, 1])], "plackett_luce").training
    assert pair.others[0].tolist() == plain.others[0].tolist()


@pytest.mark.parametrize(
    ("loss", "fields", "message"),
    [
        ("dpo", {"data.pairs": "worst"}, "data.pairs='worst' is unknown; write one of best_worst, all, adjacent"),
        ("dpo", {"data.pairs": "random:0"}, "data.pairs='random:0' is unknown"),
        ("kto", {"data.pairs": "all"}, "data.pairs='all' applies to losses of pairs; loss 'kto' reads unpaired data"),
        ("sft", {"data.pairs": "all"}, "data.pairs='all' applies to losses of pairs; loss 'sft' reads supervised data"),
        ("plackett_luce", {"data.pairs": "all"}, "loss 'plackett_luce' reads whole groups"),
        ("plackett_luce", {"data.group": True}, "'plackett_luce' reads whole groups, which have their prompt once"),
        ("plackett_luce", {"data.flip_labels": 0.1}, "data.flip_labels applies to pairs without scores"),
    ],
)
def test_options_that_do_not_apply_are_refused(load, loss, fields, message):
    with pytest.raises(UserError) as caught:
        load(ROWS, loss, **fields)
    assert message in str(caught.value)
