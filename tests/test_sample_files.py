import json

import pytest

from prefalign_jax.generation.sample_files import (
    Sample,
    Score,
    as_text,
    read_alpaca_eval,
    read_lm_eval,
    read_mt_bench,
    read_samples,
    write_alpaca_eval,
    write_mt_bench,
    write_samples,
)
from prefalign_jax.types import UserError

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "More\n“quoted”"},
]


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_samples_come_back_as_they_were_written(tmp_path):
    samples = [
        Sample("p", "line\nbreak\u2028 and ünïcode", "m", "a", 7, {"temperature": 0.5, "stop": ["x"]}),
        Sample(TALK, "", "m"),
    ]
    write_samples(tmp_path / "deep" / "s.jsonl", samples)
    assert read_samples(tmp_path / "deep" / "s.jsonl") == samples
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["s.jsonl"], "a scratch file is left"


def test_only_prompt_response_and_model_are_needed(tmp_path):
    path = lines(tmp_path / "s.jsonl", {"prompt": "p", "response": "r", "model": "m", "reward": 3})
    assert read_samples(path) == [Sample("p", "r", "m")]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "p", "model": "m"}, "row 2: field 'response': expected a string, found nothing"),
        ({"prompt": "p", "response": 3, "model": "m"}, "row 2: field 'response': expected a string, found int 3"),
        ({"prompt": 1, "response": "r", "model": "m"}, "row 2: field 'prompt': expected a list, found int 1"),
        ({"prompt": "p", "response": "r", "model": "m", "seed": True}, "field 'seed': expected an integer"),
        ({"prompt": ["x"], "response": "r", "model": "m"}, "field 'prompt[0]': expected an object, found str"),
        ({"prompt": [{"role": "bot", "content": ""}], "response": "r", "model": "m"}, "role: expected one of system"),
        ([1], "row 2: expected an object, found list"),
        ('{"prompt": "p', "row 2: expected one JSON object in UTF-8, found"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, row, says):
    path = lines(tmp_path / "s.jsonl", {"prompt": "p", "response": "r", "model": "m"}, row)
    with pytest.raises(UserError) as error:
        read_samples(path)
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_empty_files_are_one_line_errors(tmp_path):
    for read in (read_samples, read_alpaca_eval, read_lm_eval):
        with pytest.raises(UserError, match="nowhere.json"):
            read(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="there is no sample"):
        read_samples(lines(tmp_path / "empty.jsonl"))


def test_a_conversation_is_read_under_its_roles():
    assert as_text(TALK) == "[user]\nHi\n\n[assistant]\nHello\n\n[user]\nMore\n“quoted”"
    assert as_text(TALK[:1]) == "Hi"


# AlpacaEval


def test_alpaca_eval_has_its_four_fields_and_comes_back(tmp_path):
    path = tmp_path / "outputs.json"
    write_alpaca_eval(path, [Sample("Why?", "Because.", "mine"), Sample(TALK[:1], "Yo", "mine")], "helpful")
    assert json.loads(path.read_text()) == [
        {"instruction": "Why?", "output": "Because.", "generator": "mine", "dataset": "helpful"},
        {"instruction": "Hi", "output": "Yo", "generator": "mine", "dataset": "helpful"},
    ]
    assert read_alpaca_eval(path)[0] == Sample("Why?", "Because.", "mine", settings={"dataset": "helpful"})


def test_alpaca_eval_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(UserError, match="row 1: .* not a conversation"):
        write_alpaca_eval(tmp_path / "o.json", [Sample(TALK, "x", "m")])
    assert not (tmp_path / "o.json").exists()
    (tmp_path / "o.json").write_text('[{"instruction": "a", "output": "b", "generator": "g"}, {"instruction": "a"}]')
    with pytest.raises(UserError, match="o.json, row 2: field 'output': expected a string, found nothing"):
        read_alpaca_eval(tmp_path / "o.json")
    (tmp_path / "o.json").write_text("{}")
    with pytest.raises(UserError, match="expected a JSON list of outputs"):
        read_alpaca_eval(tmp_path / "o.json")


# MT-Bench

QUESTION = {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}
ANSWER = {
    "question_id": 81,
    "answer_id": "x",
    "model_id": "m",
    "choices": [{"index": 0, "turns": ["One.", "Two."]}, {"index": 1, "turns": ["Uno.", "Dos."]}],
    "tstamp": 1.0,
}


def test_mt_bench_turns_hold_the_conversation_so_far_and_come_back(tmp_path):
    questions, answers = lines(tmp_path / "q.jsonl", QUESTION), lines(tmp_path / "a.jsonl", ANSWER)
    samples = read_mt_bench(answers, questions)
    assert [(s.id, s.response, s.model) for s in samples] == [
        ("81/1", "One.", "m"),
        ("81/2", "Two.", "m"),
        ("81/1", "Uno.", "m"),
        ("81/2", "Dos.", "m"),
    ]
    assert [m["content"] for m in samples[3].prompt] == ["Write.", "Uno.", "Rewrite."]
    assert [m["content"] for m in samples[0].prompt] == ["Write."]
    write_mt_bench(tmp_path / "b.jsonl", samples)
    row = json.loads((tmp_path / "b.jsonl").read_text())
    assert {**ANSWER, "answer_id": row["answer_id"], "tstamp": row["tstamp"]} == row
    assert read_mt_bench(tmp_path / "b.jsonl", questions) == samples


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({**ANSWER, "question_id": 82}, "row 1: question 82 is not in"),
        ({**ANSWER, "choices": [{"index": 0, "turns": ["a", "b", "c"]}]}, "3 turns, and question 81 has 2"),
        ({**ANSWER, "choices": [{"index": 0, "turns": ["a", 2]}]}, "field 'turns\\[1\\]': expected a string"),
        ({**ANSWER, "choices": ["a"]}, "expected an object, found str"),
    ],
)
def test_mt_bench_mistakes_are_named(tmp_path, answer, says):
    questions, answers = lines(tmp_path / "q.jsonl", QUESTION), lines(tmp_path / "a.jsonl", answer)
    with pytest.raises(UserError, match=says):
        read_mt_bench(answers, questions)


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ([Sample("p", "r", "m", "81")], "id QUESTION/TURN, found '81'"),
        ([Sample("p", "r", "m", "81/2")], "question 81: a turn is missing"),
        ([Sample("p", "r", "m", "81/1"), Sample("p", "r", "n", "82/1")], "is of one model, found m, n"),
    ],
)
def test_mt_bench_is_not_written_of_something_else(tmp_path, samples, says):
    with pytest.raises(UserError, match=says):
        write_mt_bench(tmp_path / "a.jsonl", samples)


# lm-evaluation-harness


def test_lm_eval_scores_meet_their_standard_errors(tmp_path):
    results = {
        "arc_easy": {
            "alias": " - arc_easy",
            "sample_len": 2376,
            "acc,none": 0.5,
            "acc_stderr,none": 0.01,
            "acc_norm,none": 0.6,
            "acc_norm_stderr,none": "N/A",
        },
        "gsm8k": {"exact_match,strict-match": 0, "exact_match_stderr,strict-match": 0.02},
        "old": {"acc": 0.25, "acc_stderr": 0.03},
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": results, "versions": {}}))
    assert read_lm_eval(path) == [
        Score("arc_easy", "acc", "none", 0.5, 0.01),
        Score("arc_easy", "acc_norm", "none", 0.6, None),
        Score("gsm8k", "exact_match", "strict-match", 0.0, 0.02),
        Score("old", "acc", "", 0.25, 0.03),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"results": {"t": {"acc,none": "high"}}}', "task 't': score 'acc,none': expected a number, found 'high'"),
        ('{"results": {"t": 3}}', "task 't': expected an object"),
        ('{"config": {}}', "field 'results': expected an object, found nothing"),
        ('{"results": {}}', "there is no score"),
        ("[]", "expected an object, found list"),
        ("{", "expected JSON"),
    ],
)
def test_lm_eval_mistakes_are_named(tmp_path, text, says):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=says):
        read_lm_eval(tmp_path / "results.json")
