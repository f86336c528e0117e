import json

import pytest

from prefalign_jax.generation.sample_files import (
    Sample,
    answer_text,
    as_text,
    read_alpaca_eval,
    read_mt_bench,
    read_samples,
    write_alpaca_eval,
    write_jsonl,
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
        Sample(TALK, [{"role": "assistant", "content": "One."}, TALK[0], TALK[1]], "m"),
    ]
    write_jsonl(tmp_path / "deep" / "s.jsonl", (sample._asdict() for sample in samples))
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
        ({"prompt": "p", "response": TALK[1:2], "model": "m"}, "field 'response': messages answer messages; write the"),
        (
            {"prompt": TALK, "response": TALK, "model": "m"},
            "field 'response': expected a message of the assistant first",
        ),
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
    for read in (read_samples, read_alpaca_eval):
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


def test_mt_bench_turns_hold_the_conversation_so_far(tmp_path):
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


def test_a_response_of_messages_is_read_under_their_roles():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert answer_text([TALK[1]]) == answer_text("Hello") == "Hello"
    assert answer_text([call, {"role": "tool", "content": "4"}, TALK[1]]) == (
        '[assistant]\n{"name": "f", "arguments": {}}\n\n[tool]\n4\n\n[assistant]\nHello'
    )
