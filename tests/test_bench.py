"""Judges on benchmarks: what counts as right, what makes the whole, and the command."""

import collections
import json
import math

import numpy as np
import pytest

from prefalign_jax import commands
from prefalign_jax.intervals import share_interval, wilson
from prefalign_jax.judges import rewards
from prefalign_jax.judges.bench import measure
from prefalign_jax.judges.benchmarks import (
    BENCHMARKS,
    OVERALLS,
    RULES,
    SECTIONS,
    Benchmark,
    Questions,
    read_questions,
)
from prefalign_jax.judges.judge import Comparison, Verdict, by_reward
from prefalign_jax.types import UserError
from published_rows import ALPACA_EVAL, PAIRS, PANDALM
from test_judges import Server, reply

# Format -> (a row in which 'Air scatters blue.' is better than 'Paint.', its subset in a file called Natural.jsonl).
ROWS = {
    "llmbar": (PAIRS["princeton-nlp/LLMBar"][1], "Natural"),
    "judgebench": (PAIRS["ScalerLab/JudgeBench"][1], "knowledge"),
    "autoj": (PAIRS["GAIR-NLP/auto-j"][1], "explaining_general"),
    "hhh_alignment": (PAIRS["HuggingFaceH4/hhh_alignment"][1], "Natural"),
    "prometheus_hhh": (PAIRS["prometheus-eval's HHH alignment"][1], "honest"),
    "mt_bench_human": (PAIRS["lmsys/mt_bench_human_judgments"][1], "turn 1"),
    "rewardbench": (PAIRS["allenai/reward-bench"][1], "alpacaeval-easy"),
    "pandalm": ({**PANDALM, "input": ""}, "bloom-7b_llama-7b"),
    "alpaca_eval": (ALPACA_EVAL, "helpful_base"),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(benchmark, subsets, prompts=None):
    """A comparison for each subset, with prompts of their own unless they are given."""
    prompts = range(len(subsets)) if prompts is None else prompts
    asked = [Comparison(f"prompt {prompt}", "good", "bad") for prompt in prompts]
    return Questions("name", benchmark, asked, list(subsets), collections.Counter(), [])


def said(preferences):
    return [Verdict(None, p, "lost" if p is None else "") for p in preferences]


# The benchmarks


def test_every_benchmark_is_tested():
    assert ROWS.keys() == BENCHMARKS.keys()
    assert {b.rule for b in BENCHMARKS.values()} <= RULES.keys()
    assert {b.overall for b in BENCHMARKS.values()} <= OVERALLS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_published_row_has_its_subset_and_its_better_response_first(tmp_path, name):
    row, subset = ROWS[name]
    (asked,) = read_questions([write(tmp_path / "Natural.jsonl", [row])])
    assert (asked.name, asked.subsets, dict(asked.dropped)) == (name, [subset], {})
    assert asked.comparisons[0].texts == ("Air scatters blue.", "Paint.")
    for reward, accuracy in (("more_words", 1), ("fewer_words", 0)):
        verdicts = by_reward(rewards.scorer(reward))(asked.comparisons)
        assert measure(asked, {reward: verdicts}).whole[reward].accuracy.mean == accuracy


def test_files_are_told_by_their_rows_and_a_directory_is_read_whole(tmp_path):
    llmbar, judgebench = ROWS["llmbar"][0], ROWS["judgebench"][0]
    for name in ("GPTInst", "Manual"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "dataset.jsonl", [{**llmbar, "input": name}])
    write(tmp_path / "z.jsonl", [judgebench, {"prompt": "p", "chosen": "a b", "rejected": "c"}])
    first, second, third = read_questions([tmp_path])
    assert (first.name, first.subsets) == ("llmbar", ["GPTInst", "Manual"])
    assert (second.name, third.name, third.benchmark.title) == ("judgebench", str(tmp_path / "z.jsonl"), "z")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("pandalm", {"annotator1": 0, "annotator2": 0, "annotator3": 1}, "tie"),  # most say so
        ("pandalm", {"annotator1": 1, "annotator2": 2, "annotator3": 0}, "tie"),
        ("pandalm", {"response1": True}, "unreadable"),
        ("autoj", {"label": 2}, "tie"),
        ("mt_bench_human", {"winner": "tie"}, "tie"),
        ("judgebench", {"label": "A=B"}, "unreadable"),
        ("llmbar", {"output_1": " "}, "empty response"),
    ],
)
def test_a_row_that_asks_nothing_is_left_out_and_counted(tmp_path, name, change, reason):
    row = ROWS[name][0]
    (asked,) = read_questions([write(tmp_path / "Natural.jsonl", [row, {**row, **change}])])
    assert len(asked.comparisons) == 1 and dict(asked.dropped) == {reason: 1}
    assert len(asked.unread) == (reason == "unreadable") and all(
        "Natural.jsonl, row 2: field" in x for x in asked.unread
    )


def test_of_several_annotators_most_are_right(tmp_path):
    row = {**ROWS["pandalm"][0], "annotator1": 1, "annotator2": 1, "annotator3": 2}
    (asked,) = read_questions([write(tmp_path / "rows.jsonl", [row])])
    assert [c.texts for c in asked.comparisons] == [("Paint.", "Air scatters blue.")]


def test_a_limit_is_spread_over_the_rows(tmp_path):
    rows = [{**ROWS["llmbar"][0], "input": str(i)} for i in range(10)]
    (asked,) = read_questions([write(tmp_path / "Natural.jsonl", rows)], limit=4)
    assert [c.prompt[0]["content"] for c in asked.comparisons] == ["0", "2", "5", "7"] and len(asked.subsets) == 4


# What counts as right


@pytest.mark.parametrize(
    ("orders", "worth"),
    [  # (shown first, shown second) -> what it is worth by each rule
        ((1.0, 1.0), {"half": 1, "more": 1, "both": 1, "decided": 1}),
        ((1.0, 0.5), {"half": 0.75, "more": 1, "both": 0, "decided": 1}),
        ((1.0, 0.0), {"half": 0.5, "more": 0, "both": 0, "decided": math.nan}),
        ((0.5, 0.5), {"half": 0.5, "more": 0, "both": 0, "decided": math.nan}),
        ((0.0, 0.5), {"half": 0.25, "more": 0, "both": 0, "decided": 0}),
        ((0.0, 0.0), {"half": 0, "more": 0, "both": 0, "decided": 0}),
    ],
)
def test_what_a_verdict_is_worth(orders, worth):
    verdict = Verdict(None, sum(orders) / 2, orders=orders)
    assert {name: rule.worth(verdict) for name, rule in RULES.items()} == pytest.approx(worth, nan_ok=True)


def test_judgebench_counts_as_its_own_script_does():
    """An order that agrees with the label counts 1, one that says the opposite -1; right if the sum is positive."""
    for one in (0.0, 0.5, 1.0):
        for other in (0.0, 0.5, 1.0):
            votes = sum((vote == 1) - (vote == 0) for vote in (one, other))
            assert RULES[BENCHMARKS["judgebench"].rule].worth(Verdict(None, (one + other) / 2)) == (votes > 0)


def test_lost_verdicts_and_ties_are_counted():
    asked = questions(Benchmark("b", None, rule="decided"), ["s"] * 5)
    score = measure(asked, {"judge": said([1, 0, 0.5, None, None])}).whole["judge"]
    assert (score.accuracy.mean, score.pairs, score.ties, score.lost) == (0.5, 2, 1, {"lost": 2})
    empty = measure(asked, {"judge": said([None] * 5)}).whole["judge"]
    assert empty.accuracy is None and empty.pairs == 0


# What makes the whole


def test_pairs_subsets_and_sections():
    subsets = ["a"] * 30 + ["b"] * 10
    preferences = [1] * 27 + [0] * 3 + [1] * 2 + [0] * 8
    for overall, mean in (("pairs", 29 / 40), ("subsets", (0.9 + 0.2) / 2), ("sections", (0.9 + 0.2) / 2)):
        result = measure(questions(Benchmark("b", None, overall=overall), subsets), {"judge": said(preferences)})
        assert result.whole["judge"].accuracy.mean == pytest.approx(mean)
        assert [result.subsets[name]["judge"].accuracy.mean for name in "ab"] == pytest.approx([0.9, 0.2])
        assert [result.subsets[name]["judge"].pairs for name in "ab"] == [30, 10]


def test_rewardbench_s_score_is_the_mean_of_its_sections():
    """As its calculate_scores_per_section: subsets by their published sizes, however many pairs there are."""
    accuracies = {"alpacaeval-easy": 1.0, "mt-bench-med": 0.5, "math-prm": 0.25, "hep-go": 0.75, "donotanswer": 0.5}
    subsets = [name for name in accuracies for _ in range(4)]
    preferences = [float(i < 4 * share) for share in accuracies.values() for i in range(4)]
    result = measure(questions(BENCHMARKS["rewardbench"], subsets), {"judge": said(preferences)})
    chat = (1.0 * 100 + 0.5 * 40) / 140
    reasoning = (0.25 * 984 + 0.75 * 164) / (984 + 164)
    assert result.whole["judge"].accuracy.mean == pytest.approx((chat + reasoning + 0.5) / 3)
    assert sum(len(section) for section in SECTIONS.values()) == 23


def test_intervals_are_of_prompts():
    asked = questions(Benchmark("b", None), ["s"] * 40)
    score = measure(asked, {"judge": said([1] * 30 + [0] * 10)}).whole["judge"]
    assert score.accuracy[1:] == pytest.approx(wilson(0.75, 40), abs=0.01) and score.prompts == 40
    # Each vote four times is no more than each vote once.
    asked = questions(Benchmark("b", None), ["s"] * 160, np.repeat(range(40), 4))
    again = measure(asked, {"judge": said(np.repeat([1] * 30 + [0] * 10, 4).tolist())}).whole["judge"]
    assert again.accuracy == pytest.approx(score.accuracy, abs=0.01) and (again.pairs, again.prompts) == (160, 40)
    assert share_interval(np.repeat([1.0] * 30 + [0.0] * 10, 4)).low > again.accuracy.low + 0.05


def test_the_difference_to_the_first_judge_is_of_the_pairs_that_both_judged():
    asked = questions(Benchmark("b", None), ["s"] * 60)
    first = said([1] * 30 + [0] * 20 + [None] * 10)
    second = said([1] * 40 + [0] * 10 + [1] * 10)
    result = measure(asked, {"first": first, "second": second}).whole
    assert result["first"].change is None and result["second"].accuracy.mean == pytest.approx(50 / 60)
    change = result["second"].change
    assert change.mean == pytest.approx(10 / 50) and 0 < change.low < change.mean < change.high < 0.4
    few = measure(questions(Benchmark("b", None), ["s"] * 19), {"first": first[:19], "second": second[:19]})
    assert few.whole["second"].change is None


# The command


@pytest.fixture
def bench(capsys, tmp_path):
    """bench(*arguments) -> (status, stdout, stderr, judge_bench.json or None)."""

    def run(*arguments):
        status = commands.main(["judge-bench", *map(str, arguments), f"--out={tmp_path / 'out'}"])
        result = tmp_path / "out" / "judge_bench.json"
        return status, *capsys.readouterr(), json.loads(result.read_text()) if result.exists() else None

    return run


@pytest.fixture
def data(tmp_path):
    """LLMBar's rows and JudgeBench's, four each."""
    rows = [[{**ROWS[name][0], asked: f"{i}?"} for i in range(4)] for name, asked in NAMED.items()]
    return [write(tmp_path / f"{name}.jsonl", part) for name, part in zip(NAMED, rows, strict=True)]


NAMED = {"llmbar": "input", "judgebench": "question"}


def test_the_command_writes_what_it_prints(bench, data, tmp_path):
    status, out, err, result = bench("--data", *data, "--judge=reward:more_words", "--judge=reward:distinct n=3")
    assert status == 0
    assert "LLMBar: 4 pairs of 4 prompts\n" in out and "\nJudgeBench: 4 pairs" in out
    assert "reward:distinct n=3" in out and "1.000 [0.510, 1.000]" in out and "consistent" not in out
    assert [b["name"] for b in result["benchmarks"]] == ["llmbar", "judgebench"]
    assert result["judges"]["reward:distinct n=3"] == {"judge": "reward:distinct", "options": ["n=3"]}
    scores = result["benchmarks"][1]["judges"]
    assert scores["reward:more_words"]["accuracy"]["mean"] == 1 and scores["reward:more_words"]["pairs"] == 4
    assert list(result["benchmarks"][1]["subsets"]) == ["knowledge"]
    assert "reward:more_words" in (tmp_path / "out" / "judge_bench.html").read_text()


def test_an_option_is_for_every_judge_that_has_it(bench, data):
    judges = ("--judge=reward:more_words", "--judge=reward:distinct")
    status, _, _, result = bench("--data", *data, *judges, "--option=n=1")
    assert status == 0 and [about["options"] for about in result["judges"].values()] == [[], ["n=1"]]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.close()


def test_a_judge_that_looks_at_the_position_alone_is_found_out(bench, data, server):
    """Half right where orders are averaged, never where they are summed; the pairs are the same, and asked once."""
    server.answer = lambda question, number, headers: reply("Verdict: A")
    judge = f"--judge=endpoint:{server.url} model=m"
    status, out, _, result = bench("--data", *data, judge)
    assert status == 0 and len(server.requests) == 8 and "better shown first / second" in out
    for benchmark, accuracy in zip(result["benchmarks"], (0.5, 0.0), strict=True):
        (score,) = benchmark["judges"].values()
        assert (score["accuracy"]["mean"], score["consistent"], score["orders"]) == (accuracy, 0.0, [1.0, 0.0])
    assert bench("--data", *data, judge)[3] == result and len(server.requests) == 8


def test_votes_on_one_pair_ask_once(bench, tmp_path, server):
    vote = ROWS["mt_bench_human"][0]
    server.answer = lambda question, number, headers: reply(
        "Verdict: " + ("A" if "<answer_A>\nAir" in question else "B")
    )
    rows = [vote, {**vote, "judge": "expert_1"}, {**vote, "judge": "expert_2", "winner": "model_a"}]
    file = write(tmp_path / "votes.jsonl", rows)
    _, _, _, result = bench(f"--data={file}", f"--judge=endpoint:{server.url}", "--option=model=m")
    (score,) = result["benchmarks"][0]["judges"].values()
    assert score["accuracy"]["mean"] == pytest.approx(2 / 3) and score["consistent"] == 1 and score["prompts"] == 1
    assert len(server.requests) <= 4  # two orders of the pair, and of the pair the other way round


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--judge=reward:kindnes"], "did you mean 'kindness'"),
        (["--judge=oracle:x"], "--judge='oracle' is unknown"),
        (["--judge=human:x.jsonl"], "a person's verdicts are of other pairs"),
        (["--judge=reward:kindness", "--option=n=3"], "any judge has no hyper-parameter 'n'"),
        (["--judge=reward:more_words", "--judge=reward:distinct m=3"], "any judge has no hyper-parameter 'm'"),
        (["--judge=reward:kindness", "--judge=reward:kindness"], "given twice; write each judge once"),
        (["--judge=reward:kindness '"], "put quotes around a path with a space"),
        (["--judge=reward:kindness", "--limit=0"], "--limit=0 must be at least 1"),
        (["--judge=reward:kindness", "--data=./nowhere.jsonl"], "nowhere.jsonl: no such file or directory"),
        (["--judge=reward:kindness", "--dta=x"], "--dta: no such option; did you mean '--data'?"),
    ],
)
def test_mistakes_are_one_line_and_status_2(bench, data, arguments, says):
    status, out, err, result = bench("--data", *data, *arguments)
    assert (status, out, result) == (2, "", None)
    assert err.startswith("error: ") and says in err and err.count("\n") == 1


def test_a_benchmark_without_a_pair_is_a_mistake(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{**ROWS["llmbar"][0], "label": 3}])
    with pytest.raises(
        UserError, match=r"LLMBar: no pair to judge \(unreadable: 1\); .*row 1: field 'label': expected"
    ):
        read_questions([file])
